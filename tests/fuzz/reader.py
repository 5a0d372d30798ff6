"""One reader of strangers' files: the bytes of one file are hostile, the others sound."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reader:
    """One of peftc's readers.

    Attributes:
        name: Of it, in reports and in the corpus.
        file: The file that is hostile.
        others: What lies beside it.
        read: Reads the folder, or raises a PeftcError.
        seeds: Sound files to begin from.
        share: Of the inputs, against the others: less where one takes long.
    """

    name: str
    file: str
    others: dict[str, bytes]
    read: Callable[[Path], Any]
    seeds: tuple[bytes, ...]
    share: float = 1.0

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder in memory with the other files in it."""
        cache = os.environ.get("PEFTC_CACHE")
        memory = Path("/dev/shm")
        base = memory if os.access(memory, os.W_OK) else None
        root = Path(tempfile.mkdtemp(prefix="peftc-fuzz-", dir=base))
        try:
            for name, data in self.others.items():
                (root / name).parent.mkdir(exist_ok=True)
                (root / name).write_bytes(data)
            os.environ["PEFTC_CACHE"] = str(root / "cache")
            yield root
        finally:
            os.environ.pop("PEFTC_CACHE") if cache is None else os.environ.update(PEFTC_CACHE=cache)
            shutil.rmtree(root, ignore_errors=True)

    def feed(self, root: Path, data: bytes) -> None:
        """Reads `data`; whatever comes of it but a PeftcError is for the caller to report."""
        (root / self.file).write_bytes(data)
        self.read(root)


def safetensors(tensors: dict[str, Any], size: int, **more: Any) -> bytes:
    """A safetensors file of zeros with such a header."""
    text = json.dumps({**tensors, **more}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def tensor(dtype: str, shape: list[int], low: int, high: int) -> dict[str, Any]:
    """A header's entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [low, high]}


def as_bytes(value: Any) -> bytes:
    """JSON."""
    return json.dumps(value).encode()


def zeros(**shapes: list[int]) -> bytes:
    """A file of fp32 zeros; `__` in a name is a dot."""
    table, position = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        table[name.replace("__", ".")] = tensor("F32", shape, position, position + size)
        position += size
    return safetensors(table, position)
