"""Blocks: files in pieces that are filled in any order, and written past the page cache."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftc import direct
from peftc.blocks import BlockFile, Room

BLOCK = 4096


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "BLOCK", BLOCK)


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct writing, and a file system that has none."""
    if not request.param:
        monkeypatch.setattr(direct, "_DIRECT", 0)


def fill(file: BlockFile, content: bytes, start: int, end: int) -> None:
    for place in file.places(start, end - start):
        place[:] = content[start : start + len(place)]
        start += len(place)


def write(path: Path, content: bytes, cuts: list[int], most: int, workers: int) -> str:
    """Fills a file by several threads, in parts that end anywhere; its hash."""
    direct.reserve(path, len(content))
    room = Room(most)
    file = BlockFile(path, len(content), room)
    ends = [*sorted(cuts), len(content)]
    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(3) as others:
        sealed = others.submit(file.seal, others)
        for start, end in zip([0, *ends], ends, strict=False):
            pool.submit(fill, file, content, start, end)
        digest = sealed.result(timeout=60)
    assert room.open == 0, "memory was not given back"
    return digest


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    size=st.integers(1, 9 * BLOCK), cuts=st.lists(st.floats(0, 1), max_size=9),
    most=st.integers(1, 4), workers=st.integers(1, 4),
)  # fmt: skip
def test_file_is_what_was_put_into_it_however_it_is_cut(
    tmp_path: Path, size: int, cuts: list[float], most: int, workers: int
) -> None:
    content, path = random.Random(size).randbytes(size), tmp_path / "file"
    digest = write(path, content, [int(cut * size) for cut in cuts], most, workers)
    assert path.read_bytes() == content
    assert digest == blake3(content).hexdigest()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 8])
def test_file_ends_where_it_should(tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    write(tmp_path / "file", content, [], 2, 1)
    assert (tmp_path / "file").read_bytes() == content


def test_blocks_that_are_there_are_hashed_and_not_written(tmp_path: Path) -> None:
    path, content = tmp_path / "file", random.Random(0).randbytes(4 * BLOCK)
    path.write_bytes(content[: 2 * BLOCK] + bytes(BLOCK) + content[3 * BLOCK :])
    file = BlockFile(path, len(content), Room(4), there={2})
    with ThreadPoolExecutor(2) as pool:
        sealed = pool.submit(file.seal, pool)
        fill(file, content, 0, len(content))
        assert sealed.result() == blake3(content).hexdigest()
    assert path.read_bytes()[2 * BLOCK : 3 * BLOCK] == bytes(BLOCK)


@pytest.mark.parametrize("place", ["open", "pwrite"])
def test_file_system_without_direct_writing_gets_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    real: dict[str, Callable[..., int]] = {"open": os.open, "pwrite": os.pwrite}
    refused = []

    def open_(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT and place == "open":
            refused.append(place)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real["open"](path, flags, *mode)

    def pwrite(handle: int, data: memoryview, offset: int) -> int:
        if place == "pwrite" and not refused:
            refused.append(place)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real["pwrite"](handle, data, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    content = random.Random(1).randbytes(3 * BLOCK + 5)
    write(tmp_path / "file", content, [100], 2, 2)
    assert refused and (tmp_path / "file").read_bytes() == content


def test_full_disk_ends_who_fills_and_who_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    path, content = tmp_path / "file", bytes(40 * BLOCK)
    direct.reserve(path, len(content))
    room = Room(2)
    file = BlockFile(path, len(content), room)
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(2) as others:
        filling = pool.submit(fill, file, content, 0, len(content))
        with pytest.raises(OSError, match="No space left"):
            others.submit(file.seal, others).result(timeout=60)
        room.fail()
        with pytest.raises(InterruptedError):
            filling.result(timeout=60)


def test_part_that_is_early_waits_for_memory_and_not_for_ever(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(20 * BLOCK)
    digest = write(tmp_path / "file", content, list(range(0, len(content), 1000)), 1, 4)
    assert digest == blake3(content).hexdigest()
