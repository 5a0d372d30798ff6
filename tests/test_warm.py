"""torch.compile's cache beside an artifact: a first start that compiles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftc import warm
from peftc.errors import ArtifactError, PeftcError
from peftc.warm import load_compile_cache, save_compile_cache

CODE = """
import json, sys, torch
from torch._dynamo.utils import counters
from peftc.warm import load_compile_cache, save_compile_cache
folder, how = sys.argv[1:]
if how == "load":
    load_compile_cache(folder)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.GELU())
with torch.no_grad():
    torch.compile(model)(torch.ones(3, 6))
if how == "save":
    save_compile_cache(folder)
found = counters["inductor"]
print(json.dumps([found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]]))
"""


def compiler(folder: Path) -> Path:
    """A C++ compiler that writes down what it is asked to compile."""
    script = folder / "c++"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *.cpp*) echo "$*" >> ' + str(folder / "compiled") + ";; esac\n"
        'exec g++ "$@"\n'
    )
    script.chmod(0o755)
    return script


def start(folder: Path, how: str, cache: Path, cxx: Path) -> list[int]:
    """A process that has nothing of this one but where things are."""
    places = {name: os.environ.get(name, "") for name in ("PATH", "HOME", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), how],
        env={
            **places,
            "CXX": str(cxx),
            "ATEN_CPU_CAPABILITY": "default",  # which inductor need not try out
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",  # which takes longer than it saves
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts: list[int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def test_a_first_start_compiles_nothing_where_the_cache_is(tmp_path: Path) -> None:
    folder, asked = tmp_path / "artifact", tmp_path / "compiled"
    folder.mkdir()
    cxx = compiler(tmp_path)
    assert start(folder, "save", tmp_path / "one", cxx) == [0, 1]
    assert asked.read_text()
    asked.unlink()
    assert start(folder, "load", tmp_path / "two", cxx) == [1, 0]
    assert not asked.exists(), asked.read_text()
    (folder / "torch_compile.cache").write_bytes(b"something else")
    with pytest.raises(ArtifactError, match="not loaded"):
        load_compile_cache(folder)


def test_what_was_found_out_about_the_processor_is_kept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "_home", lambda: tmp_path)
    for name, code in (("ab/probe", "void __avx_chk_kernel() {}"), ("cd/other", "int x;")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.cpp").write_text(code)
        (tmp_path / f"{name}.so").write_bytes(b"library")
    assert list(warm._libraries()) == [tmp_path / "ab/probe.so"]


def test_a_cache_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match="torch_compile"):
        load_compile_cache(tmp_path)


def test_a_process_that_compiled_nothing_has_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    with pytest.raises(ArtifactError, match="nothing was compiled"):
        save_compile_cache(tmp_path)
