"""Pieces as libraries in one package, by AOTInductor."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor
import torch.fx.config

from peftc.errors import ArtifactError, CaptureError, MissingDependency, PeftcError
from peftc.exporters.inductor_cache import kept
from peftc.files import FULL
from peftc.pieces import Cut, Piece
from peftc.progress import Progress

LIBRARY = "model.pt2"
OPTIONS: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.enable_line_tables": False,
    "cpp.dynamic_threads": True,  # as many as the machine has that runs it
}


def needs_compiler() -> list[PeftcError]:
    """An error where there is no C++ compiler."""
    if any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return []
    return [
        MissingDependency(
            "needs a C++ compiler, which is not installed",
            where="--format pt2",
            fix="apt-get install g++ (or clang); the machine that runs the result needs none",
        )
    ]


def compile_cuts(cuts: Iterable[Cut], progress: Progress) -> bytes:
    """A package with a library for each piece.

    Raises:
        CaptureError: A piece cannot be compiled.
        ArtifactError: There is no room for what the compiler writes.
    """
    from torch._inductor.package.package import package_aoti

    with _scratch() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own deprecations
        files: dict[str, Any] = {}
        for cut in cuts:
            for piece in cut.pieces.values():
                progress.stage(f"compile {piece.name}")
                files[piece.name] = kept(piece.form, OPTIONS, partial(_compiled, piece))
        path = str(folder / LIBRARY)
        package_aoti(path, files)
        return Path(path).read_bytes()


@contextmanager
def _scratch() -> Iterator[Path]:
    """A directory for the package, and an error that says so where the compiler lacks room."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except (OSError, RuntimeError, CaptureError) as error:
        said = str(error)
        if not isinstance(error, OSError) and not any(os.strerror(n) in said for n in FULL):
            raise
        raise ArtifactError(
            f"the compiler's files could not be written: {said.splitlines()[0]}",
            where=tempfile.gettempdir(),
            fix="make room there, or set TMPDIR and TORCHINDUCTOR_CACHE_DIR to another disk",
        ) from error


def _compiled(piece: Piece) -> list[str]:
    """The files of a piece's library."""
    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        with torch.no_grad():
            files: Any = torch._inductor.aot_compile(piece.module, piece.examples, options=OPTIONS)
    except Exception as error:  # the compiler's exceptions have no class in common
        line = next((x.strip() for x in str(error).splitlines() if x.strip()), repr(error))
        raise CaptureError(
            f"AOTInductor cannot compile it: {line}",
            where=piece.name,
            fix="write the model with --format onnx or safetensors, and report it",
        ) from error
    finally:
        torch.fx.config.do_not_emit_stack_traces = before
    # What running takes, without sources and intermediate files.
    return [file for file in map(str, files) if not file.endswith((".cpp", ".o", ".h"))]
