"""Writing past the page cache: blocks go from memory to the disk as they are.

An artifact is written once and not read soon. Through the page cache each of its bytes is copied
once more, into memory that has to be found for it, and what others had there is lost; that takes
longer than all else that a merge does with a byte. Where a file system knows of no direct writing,
the blocks go through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

BLOCK = 4 << 20  # bytes, by which files are cut from their start
ALIGNMENT = 4096  # of the memory, of the place in the file and of the size of a direct write
_DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSALS = {errno.EINVAL, errno.EOPNOTSUPP}


def memory(blocks: int = 1) -> mmap.mmap:
    """Memory for blocks, where direct writing wants it."""
    return mmap.mmap(-1, blocks * BLOCK)


def reserve(path: Path, size: int) -> None:
    """Takes a file's place on the disk, unless it has it."""
    with path.open("ab") as out:
        if os.fstat(out.fileno()).st_size != size:
            os.ftruncate(out.fileno(), size)
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(out.fileno(), 0, size)


def opened(path: Path) -> int:
    """A descriptor by which a file that exists is written, directly where that can be."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | _DIRECT)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def write(handle: int, block: memoryview, count: int, offset: int) -> None:
    """Writes the first bytes of a block, and what is behind them up to the alignment.

    Args:
        handle: From `opened`.
        block: All of its memory.
        count: Bytes that matter; the file is to be cut behind its last.
        offset: Where the block begins in the file.
    """
    left = block[: -(-count // ALIGNMENT) * ALIGNMENT]
    while left:
        try:
            done = os.pwrite(handle, left, offset)
        except OSError as error:
            flags = fcntl.fcntl(handle, fcntl.F_GETFL)
            if error.errno not in _REFUSALS or not flags & _DIRECT:
                raise
            fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~_DIRECT)
            continue
        left, offset = left[done:], offset + done


def read_into(handle: int, room: memoryview, offset: int) -> bool:
    """Fills memory from a file; whether there was enough."""
    while room:
        got = os.preadv(handle, [room], offset)
        if not got:
            return False
        room, offset = room[got:], offset + got
    return True
