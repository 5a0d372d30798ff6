"""Safetensors headers, read and checked without touching a tensor's bytes.

Format: https://github.com/huggingface/safetensors#format. Eight bytes hold the header's length N
(little-endian), N bytes of JSON map each name to dtype, shape and data_offsets, the tensors follow.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftc.errors import CheckpointError, PeftcError
from peftc.files import opened

MAX_HEADER = 100_000_000  # the limit of the reference implementation
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


State = tuple[int, int, int, int]  # of a file: its size, times of its bytes and entry, and inode


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a tensor lies: `nbytes` bytes from offset `start` of `file`.

    `states` says how that file was when its header was read, and those that say what is in it.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    states: tuple[tuple[str, State], ...] = ()


@dataclass(frozen=True)
class SafetensorsFile:
    """The checked header of one file: its tensors in the order of their bytes."""

    path: Path
    size: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorRef]


def state_of(info: os.stat_result) -> State:
    """What shows that a file changed: a restored time leaves that of the entry, which none sets."""
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino


def read_header(path: Path, *beside: Path) -> SafetensorsFile:
    """Reads and checks a safetensors header.

    Args:
        path: The file.
        beside: Those, such as a config, without which its tensors have no meaning.

    Raises:
        CheckpointError: The file is no regular file, is truncated, or its header is too large, not
            JSON, names a tensor twice, or describes tensors that overlap or leave the file.
    """

    def bad(what: str, fix: str = "download or write the file again") -> CheckpointError:
        return CheckpointError(what, where=str(path), fix=fix)

    try:
        with opened(path) as file:
            info = os.fstat(file.fileno())
            prefix = file.read(8)
            if len(prefix) < 8:
                raise bad(f"is truncated: {info.st_size} bytes hold no safetensors header")
            length = struct.unpack("<Q", prefix)[0]
            if length > min(MAX_HEADER, info.st_size - 8):
                raise bad(f"is truncated or no safetensors file: its header claims {length} bytes")
            raw = file.read(length)
        known = [(str(path), state_of(info))]
        states = (*known, *((str(other), state_of(other.stat())) for other in beside))
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check the file's permissions"
        ) from error
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise bad(f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise bad("its __metadata__ is not a JSON object of strings")
    try:
        "".join([*metadata, *metadata.values()]).encode()
    except UnicodeEncodeError as error:
        raise bad("its __metadata__ is no text") from error
    try:
        refs = [_ref(path, name, entry, 8 + length, states) for name, entry in header.items()]
    except PeftcError as error:
        raise bad(error.what) from error
    refs.sort(key=lambda ref: (ref.start, ref.nbytes))
    position = 8 + length
    for ref in refs:
        if ref.start != position:
            raise bad(f"tensor {ref.name!r} leaves a gap or overlaps its neighbour")
        position += ref.nbytes
    if position != info.st_size:
        raise bad(f"is truncated or too long: {info.st_size} bytes, its header asks for {position}")
    return SafetensorsFile(path, info.st_size, metadata, {r.name: r for r in refs})


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _ref(
    path: Path, name: str, entry: object, base: int, states: tuple[tuple[str, State], ...]
) -> TensorRef:
    shown = _short(name)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise PeftcError(f"tensor {shown} has a name that is no text") from error
    if not (isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}):
        raise PeftcError(f"tensor {shown} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise PeftcError(f"tensor {shown} has the unknown dtype {_short(dtype)}")
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise PeftcError(f"tensor {shown} has a shape or offsets that are not natural numbers")
    nbytes = _nbytes(shape, dtype)
    if offsets[1] - offsets[0] != nbytes:
        raise PeftcError(f"tensor {shown} needs {nbytes} bytes, its offsets {offsets} differ")
    place = base + offsets[0]
    return TensorRef(name, path, dtype, _shared(tuple(shape)), place, int(nbytes), states)


@lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same tuple for all tensors of a shape: large mixtures have a hundred thousand."""
    return shape


def _nbytes(shape: list[int], dtype: str) -> int | float:
    """The size of a tensor; infinite where no file could hold it, at bounded cost."""
    count = 1
    for length in shape:
        count *= length
        if count >= 2**63:
            return math.inf
    return count * BITS[dtype] // 8


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 2**63 for i in value)
