"""What is promised of strangers' files, held by the source: no pickle, no code, one way to open."""

from __future__ import annotations

import ast
import functools
import os
import pickle
import signal
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftc import capture, tune
from peftc.errors import CaptureError, CheckpointError, Interrupted, PeftcError
from peftc.sources import tokenizer_of
from peftc.tuner import Tuner

from .conftest import MakeCheckpoint
from .fuzz.readers import readers
from .helpers import ROOT, copied, edit
from .talker import LORA, sums, talker, tuning
from .test_layering import SOURCES

PICKLERS = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
}  # fmt: skip
# What opens files otherwise than by peftc.files, each for a reason.
OPENERS = {
    "files.py": "it is peftc.files",
    "machine.py": "/proc/cpuinfo",
    "memory.py": "/proc/self",
    "demo.py": "the package's own data",
    "demo_model.py": "a package of pip's, against a pinned hash",
    "nf4_native.py": "the package's own library",
    "analysis_view.py": "--plot FILE, which the user names",
    "inductor_compile.py": "what torch has just compiled",
    "examples.py": "--data FILE, which the user names and which is a regular file",
    "artifact.py": "logs and locks in a staging directory that is looked over before",
    "runs.py": "the figures' log, made anew before",
    "outline.py": "peftc's own cache",
    "onnx_adapters.py": "what onnxruntime has just written",
    "inductor_cache.py": "peftc's own cache, by hash",
    "warm.py": "what torch has just compiled",
    "direct.py": "files in a staging directory, which holds no links",
}
OURS = {"Checkpoint", "Artifact", "ConstantCache", "AdapterDirectory", "cls", "stage", "slots"}
READING = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "fromfile", "memmap"}
GONE = {  # modules that Python 3.12 and 3.13 no longer have
    "aifc", "asynchat", "asyncore", "audioop", "cgi", "cgitb", "chunk", "crypt", "distutils",
    "imghdr", "imp", "mailcap", "msilib", "nis", "nntplib", "ossaudiodev", "pipes", "smtpd",
    "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib", "lib2to3", "tkinter.tix",
}  # fmt: skip


@functools.cache
def trees() -> list[tuple[Path, ast.AST]]:
    return [(file, ast.parse(file.read_text())) for file in SOURCES]


def calls(tree: ast.AST) -> Iterator[tuple[str, str, ast.Call]]:
    """What is called, of what, and the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute):
                yield called.attr, ast.unparse(called.value), node
            elif isinstance(called, ast.Name):
                yield called.id, "", node


def said(call: ast.Call, name: str) -> object:
    """The constant that a call gives by keyword."""
    values = [k.value for k in call.keywords if k.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def imported(tree: ast.AST) -> Iterator[tuple[str, set[str]]]:
    """The modules that are imported, and which names of them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, {"*"}) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, {alias.name for alias in node.names}


def test_no_pickle_is_opened() -> None:
    for file, tree in trees():
        for module, names in imported(tree):
            assert module.split(".")[0] not in PICKLERS or names == {"UnpicklingError"}, file
        for name, of, call in calls(tree):
            if (name, of) == ("load", "torch"):
                assert said(call, "weights_only") is True, f"{file}:{call.lineno}"
            assert said(call, "allow_pickle") is not True, f"{file}:{call.lineno}"
            assert not (name == "load" and of in ("yaml", "np", "numpy")) or (
                ast.unparse(call.args[1]) == "_Loader"
            ), f"{file}:{call.lineno}"


def test_code_of_a_model_is_never_asked_for() -> None:
    for file, tree in trees():
        for name, of, call in calls(tree):
            where = f"{file}:{call.lineno}"
            assert said(call, "trust_remote_code") in (None, False), where
            assert said(call, "use_kernels") is None, where
            if name == "from_pretrained" and of.split(".")[-1].startswith("Auto"):
                local = said(call, "gguf_file") or "gguf_file" in ast.unparse(call)
                assert local or said(call, "trust_remote_code") is False, where


def test_files_are_opened_in_one_place() -> None:
    found = set()
    for file, tree in trees():
        for name, of, _ in calls(tree):
            if name in READING and of not in OURS and "engine_for" not in of:
                found.add(file.name)
    assert found <= OPENERS.keys(), found - OPENERS.keys()
    assert OPENERS.keys() - {"nf4_native.py", "outline.py"} <= found, "or say why no more"


def test_table_of_paths_names_every_reader() -> None:
    table = (ROOT / "docs" / "trust.md").read_text()
    assert [name for name in readers() if f"`{name}`" not in table] == []


def test_config_that_names_kernels_of_the_hub_is_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = copied(checkpoint("llama"), tmp_path / "base")
    for change in (
        {"attn_implementation": "someone/kernels"},
        {"_attn_implementation": "kernels-community/flash-attn@v1:f"},
        {"attn_implementation": {"": "a/b"}},
        {"text_config": {"experts_implementation": "x/y"}},
    ):
        edit(base / "config.json", **change)
        with pytest.raises(CaptureError, match="names code to fetch from the hub"):
            capture(base)


def test_code_beside_a_known_model_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("transformers asks whether to run it")

    monkeypatch.setattr("builtins.input", asked)
    base = talker(tmp_path / "base")
    (base / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(base / "config.json", auto_map={"AutoConfig": "mine.A", "AutoModelForCausalLM": "mine.B"})
    edit(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.C", "mine.D"]},
         tokenizer_class="Mine")  # fmt: skip
    try:
        tokenizer_of(capture(base))
    except PeftcError as error:
        assert "custom code" in str(error)
    assert not (tmp_path / "ran").exists()


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.filterwarnings("ignore")
def test_pickles_of_an_interrupted_training_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = talker(tmp_path / "base"), sums(tmp_path / "sums.jsonl")
    plain = Tuner.training_step

    def stopped(self: Any, *args: Any, **more: Any) -> Any:
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **more)

    settings = tuning(data, steps=4, save_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(Tuner, "training_step", stopped)
        with pytest.raises(Interrupted):
            tune(base, settings, tmp_path / "out", [LORA])
    (kept,) = (tmp_path / ".out.peftc-training").glob("checkpoint-*")
    files = [file for file in kept.iterdir() if file.suffix in (".pt", ".pth", ".bin")]
    assert {file.name for file in files} >= {"optimizer.pt", "rng_state.pth"}
    sound = {file: file.read_bytes() for file in files}
    assert pickle.dumps(Bomb(tmp_path / "ran"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (kept / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
        with pytest.raises(CheckpointError, match="cannot be gone on from"):
            tune(base, settings, tmp_path / "out", [LORA])
        assert not (tmp_path / "ran").exists()
        (kept / name).write_bytes(sound[kept / name])
    for name in ("training_args.bin",):  # which nobody reads
        (kept / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    tune(base, settings, tmp_path / "out", [LORA])
    assert not (tmp_path / "ran").exists()


def test_sources_are_of_the_oldest_python_that_is_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"
    assert project["tool"]["mypy"]["python_version"] == "3.11"
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").glob("*.py"),
             *(ROOT / "docs").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 3.12 warns of what a later one refuses
        for file in files:
            tree = ast.parse(file.read_text(), str(file), feature_version=(3, 11))
            compile(tree, str(file), "exec")
            assert not {name for name, _ in imported(tree)} & GONE, file
