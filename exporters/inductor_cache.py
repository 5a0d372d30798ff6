"""Libraries compiled before, kept under a hash of all that they depend on.

Weights are what a library is given, so another fine-tuning of a model, and another adapter, has the
libraries of the one before: only what is new is compiled.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch._inductor.config
from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler

from peftc.artifact import digest, key_of, versions
from peftc.checkpoint import cache_folder
from peftc.machine import here

HASHES = "hashes.json"


def kept(form: str, options: dict[str, Any], make: Callable[[], Iterable[str]]) -> list[str]:
    """The files of a library, from the cache where they are known.

    Args:
        form: The graph that it computes, and the shapes and dtypes that it takes.
        options: Of the compiler.
        make: Compiles it; returns its files.
    """
    compiler = get_compiler_version_info(get_cpp_compiler())
    config = torch._inductor.config.save_config_portable()  # whose get_hash varies by process
    key = key_of(form, options, compiler, config, versions(), here())
    folder = cache_folder() / "libraries" / key
    if (known := _known(folder)) is not None:
        return known
    made = [str(file) for file in make()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            stage = Path(name) / key
            stage.mkdir()
            for file in made:
                shutil.copyfile(file, stage / Path(file).name)
            hashes = {file.name: digest(file) for file in stage.iterdir()}
            (stage / HASHES).write_text(json.dumps(hashes))
            if folder.exists():  # and is damaged
                folder.replace(Path(name) / "old")
            stage.replace(folder)
    except OSError:
        pass  # without a cache every export takes as long as the first
    return made


def _known(folder: Path) -> list[str] | None:
    """The files of a folder, if they are what was put there."""
    try:
        hashes = json.loads((folder / HASHES).read_text())
        same = all(digest(folder / name) == hash for name, hash in hashes.items())
    except (OSError, ValueError, AttributeError):
        return None
    return [str(folder / name) for name in hashes] if same else None
