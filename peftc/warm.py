"""What torch.compile made of a live model, kept beside its artifact, so that a start need not wait.

Format: a ZIP file of torch's portable cache (`torch.compiler.save_cache_artifacts`) and, which that
lacks, of the libraries that a C++ compiler made of it; and a JSON file that has its hash and says
which torch and machine it is for. Like a library it is code that will run: load it only from where
you trust.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from peftc.checkpoint import contained, read_json
from peftc.errors import ArtifactError, raise_all
from peftc.files import opened, write
from peftc.machine import differences, here

CACHE, TOLD = "torch_compile.cache", "torch_compile.json"
PORTABLE = "portable"
LIBRARY = re.compile(r"[a-z0-9]{2}/[a-z0-9.]+\.so")
PROBE = "_chk_kernel"  # in the code by which inductor tries what the processor can do


def save_compile_cache(folder: str | Path) -> dict[str, int]:
    """Writes all that torch.compile made in this process; call it after the model has run.

    Args:
        folder: An artifact's directory, or any other.

    Returns:
        How many entries there are of each kind of cache.

    Raises:
        ArtifactError: Nothing was compiled, or the folder cannot be written.
    """
    found = torch.compiler.save_cache_artifacts()
    if found is None or not found[0]:
        raise ArtifactError(
            "nothing was compiled in this process",
            where=str(folder),
            fix="run the compiled model once before, at the shapes that it is to know",
        )
    portable, info = found
    counts = {kind: len(keys) for kind, keys in info.artifacts.items()}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(PORTABLE, portable)
        for number, file in enumerate(_libraries(), 1):
            archive.write(file, file.relative_to(_home()))
            counts["libraries"] = number
    data = packed.getvalue()
    told = {"built": here(), "blake3": blake3(data).hexdigest(), "entries": counts}
    try:
        for name, content in ((CACHE, data), (TOLD, json.dumps(told, indent=2).encode())):
            staged = Path(folder) / f".{name}.new"
            write(staged, content)
            staged.replace(Path(folder) / name)
    except OSError as error:
        raise ArtifactError(
            f"could not be written: {error.strerror}",
            where=str(folder),
            fix="choose a place where you may write",
        ) from error
    return counts


def load_compile_cache(folder: str | Path) -> dict[str, int]:
    """Has torch.compile know what another process compiled; call it before the model runs.

    Args:
        folder: Where `save_compile_cache` wrote.

    Returns:
        How many entries there are of each kind of cache.

    Raises:
        ArtifactError: There is none, it is damaged, or it was made by another torch or machine.
    """
    root = Path(folder)
    told: dict[str, Any] = read_json(root / TOLD, "a cache of torch.compile")
    with opened(contained(root, CACHE)) as file:
        data = file.read()
    if blake3(data).hexdigest() != told.get("blake3"):
        raise ArtifactError(
            "is not what was saved, and is not loaded",
            where=str(root / CACHE),
            fix="compile again, and save it",
        )
    raise_all(differences(told["built"], here(), str(root / CACHE)))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        torch.compiler.load_cache_artifacts(archive.read(PORTABLE))
        for name in filter(LIBRARY.fullmatch, archive.namelist()):
            _put(_home() / name, archive.read(name))
    counts: dict[str, int] = told["entries"]
    return counts


def _home() -> Path:
    """Where inductor keeps its files."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def _libraries() -> Iterator[Path]:
    """What this process loaded of inductor's libraries, and its probes of the processor."""
    home = _home()
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    loaded = {Path(spec.origin) for spec in specs if spec is not None and spec.origin}
    for file in sorted(home.glob("*/*.so")):
        code = file.with_suffix(".cpp")
        if file in loaded or (code.is_file() and PROBE in code.read_text(errors="replace")):
            yield file


def _put(file: Path, content: bytes) -> None:
    """Writes a library where there is none."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(content)
        fresh.chmod(0o755)
        fresh.replace(file)
