"""Files that may be a stranger's: only regular ones are opened, and nothing is written by a link.

All that peftc itself reads and writes goes through here. What opens files by itself, as
transformers and onnxruntime do, is let into a folder only when `checkpoint.intruders` finds none.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write fails with that lacks room
LARGEST = 1 << 30  # bytes of a file that is read whole, where nothing says less


def descriptor(path: Path) -> int:
    """Opens a regular file to read, without waiting: a pipe would hold who opens it.

    Raises:
        OSError: It cannot be opened, or is a pipe, a device, a socket or a folder.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"has a name that no file has: {error}", str(path)) from error
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, "is not a regular file", str(path))


def opened(path: Path) -> io.BufferedReader:
    """As `descriptor`, as a binary file object."""
    return os.fdopen(descriptor(path), "rb")


def content(path: Path, most: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: It cannot be read, or holds more than `most` bytes.
    """
    with opened(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(errno.EFBIG, f"is larger than {most} bytes", str(path))
        return file.read(size)


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log, a line each; one that was cut off by a kill ends it."""
    found: list[dict[str, Any]] = []
    try:
        with opened(path) as file:
            for line in file:
                value = json.loads(line)
                if not isinstance(value, dict):
                    break
                found.append(value)
    except (OSError, ValueError, RecursionError):
        pass
    return found


def fresh(path: Path) -> BinaryIO:
    """A new file to write, in the place of what has its name: through a link nothing is written.

    Raises:
        OSError: It cannot be made.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def write(path: Path, data: bytes | str) -> None:
    """Writes all of a new file; see `fresh`."""
    with fresh(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def is_plain(name: str) -> bool:
    """Whether a name is one of a file, and no way to another folder."""
    return (
        name == Path(name).name
        and "\\" not in name
        and name.isprintable()
        and name not in ("", "..")
    )


def clashes(names: Iterable[str]) -> list[str]:
    """Two of these names that some disks take for one: they differ by case, or by how é is written.

    Returns:
        The two, or nothing.
    """
    seen: dict[str, str] = {}
    for name in names:
        same = unicodedata.normalize("NFC", name).casefold()
        if (other := seen.setdefault(same, name)) != name:
            return [other, name]
    return []
