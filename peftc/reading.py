"""Reading of leaves: rows of tensors out of their files, as they are or widened to fp32."""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from pathlib import Path

import torch

from peftc import direct
from peftc.checkpoint import contained
from peftc.constants import Leaf
from peftc.devices import CPU
from peftc.errors import CheckpointError
from peftc.files import descriptor
from peftc.safetensors_file import TensorRef, read_header


def read(
    leaf: Leaf, low: int = 0, high: int | None = None, device: torch.device = CPU
) -> torch.Tensor:
    """Rows low to high of a leaf, in its own dtype, on a device."""
    pinned = device.type == "cuda"
    shape, ref = leaf.spec.shape, leaf.ref
    if not shape:
        raw = _read_bytes(ref.file, ref.start, ref.nbytes, pinned)
        return raw.view(leaf.spec.dtype).reshape(()).to(device)
    high = shape[0] if high is None else high
    row = ref.nbytes // max(1, shape[0])
    raw = _read_bytes(ref.file, ref.start + low * row, (high - low) * row, pinned)
    rows = raw.view(leaf.spec.dtype).reshape(high - low, *shape[1:])
    return rows.to(device, non_blocking=True)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a small file, such as an adapter's.

    Raises:
        CheckpointError: It is missing or damaged, a link out of its folder, or of a dtype that
            torch does not have.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(contained(path.parent, path.name))  # whose errors say what is damaged
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"cannot be read: {error}", where=str(path), fix="download or write it again"
        ) from error


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in fp32, unless it counts."""
    return tensor.float() if tensor.is_floating_point() else tensor


class Recent(threading.local):
    """The pieces of leaves that a thread read last; what is written is so proved at no second read.

    They may be shared because evaluation writes only into results of its own.
    """

    KEPT = 4

    def __init__(self) -> None:
        self.pieces: dict[tuple[TensorRef, int, int, int], torch.Tensor] = {}

    def __call__(self, leaf: Leaf, low: int, high: int) -> torch.Tensor:
        key = leaf.ref, low, high, leaf.ref.file.stat().st_mtime_ns
        if key not in self.pieces:
            if len(self.pieces) >= self.KEPT:
                del self.pieces[next(iter(self.pieces))]
            self.pieces[key] = wide(read(leaf, low, high))
        return self.pieces[key]


recent = Recent()


class _OpenFile:
    """A file descriptor that closes with its last user."""

    def __init__(self, path: Path) -> None:
        self.fd = descriptor(path)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@lru_cache(maxsize=64)
def _open(path: Path, inode: int, size: int) -> _OpenFile:
    return _OpenFile(path)


def _read_bytes(path: Path, start: int, count: int, pinned: bool) -> torch.Tensor:
    raw = torch.empty(count, dtype=torch.uint8, pin_memory=pinned)
    fill(raw.numpy().data, path, start)
    return raw


def fill(room: memoryview, path: Path, start: int) -> None:
    """Reads a file's bytes from `start` on into memory, until it is full.

    Raises:
        CheckpointError: The file ends before, or cannot be read.
    """
    try:
        info = path.stat()
        whole = direct.read_into(_open(path, info.st_ino, info.st_size).fd, room, start)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            fix="check that it is there, may be read, and lies on a sound disk",
        ) from error
    if not whole:
        raise CheckpointError(
            "was truncated while it was read", where=str(path), fix="restore it, and run again"
        )
