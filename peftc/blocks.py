"""Files under construction, a few blocks of each in memory.

Whoever computes some of a file's bytes puts them into its blocks, in any order. Blocks leave in
theirs: each is hashed and written while the next is filled, and its memory serves again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from functools import partial
from mmap import mmap
from pathlib import Path
from threading import Condition

from blake3 import blake3

from peftc import direct

_BEHIND = 3  # blocks of a file that are being written while the next is hashed


class Room:
    """The memory that all files of a run have for their blocks.

    Args:
        most: How many blocks may be open. The one that a file cannot go on without is opened even
            beyond, or those who wait for it would hold the memory that it waits for.
    """

    def __init__(self, most: int) -> None:
        self.most, self.open, self.failed = most, 0, False
        self.news = Condition()
        self._spare: list[mmap] = []

    def take(self) -> mmap:
        """Memory for one more block; `news` is held."""
        self.open += 1
        return self._spare.pop() if self._spare else direct.memory()

    def give_back(self, taken: mmap) -> None:
        """The block is written."""
        with self.news:
            self.open -= 1
            self._spare.append(taken)
            self.news.notify_all()

    def fail(self) -> None:
        """Nothing more will be written."""
        with self.news:
            self.failed = True
            self.news.notify_all()


@dataclass
class _Block:
    """A block that is open, and how many of its bytes it lacks."""

    memory: mmap
    missing: int


class BlockFile:
    """A file under construction.

    Args:
        path: Exists, of its full size.
        size: In bytes.
        room: Where blocks get their memory.
        there: The numbers of blocks that lie in the file already, and are not written again.
    """

    def __init__(self, path: Path, size: int, room: Room, there: Collection[int] = ()) -> None:
        self.path, self.size, self.there = path, size, there
        self._room = room
        self._blocks: dict[int, _Block] = {}
        self._next = 0  # the first block that has not left

    def places(self, offset: int, count: int) -> Iterator[memoryview]:
        """Memory for a range of the file's bytes, to be filled before the next is asked for."""
        while count:
            number, start = divmod(offset, direct.BLOCK)
            part = min(count, direct.BLOCK - start)
            block = self._opened(number)
            yield memoryview(block.memory)[start : start + part]
            with self._room.news:
                block.missing -= part
                self._room.news.notify_all()
            offset, count = offset + part, count - part

    def seal(self, writers: Executor) -> str:
        """Hashes and writes the blocks as they are filled, and forces the file to the disk.

        Returns:
            The hash, in hexadecimal.
        """
        digest, writing = blake3(), deque[Future[None]]()
        handle = direct.opened(self.path)
        try:
            for number in range(-(-self.size // direct.BLOCK)):
                taken, length = self._filled(number), self._length(number)
                view, place = memoryview(taken), number * direct.BLOCK
                if number in self.there:
                    digest.update(view[:length])
                    self._room.give_back(taken)
                    continue
                writing.append(writers.submit(direct.write, handle, view, length, place))
                digest.update(view[:length])
                writing[-1].add_done_callback(partial(self._leave, taken))
                while len(writing) > _BEHIND:
                    writing.popleft().result()
            while writing:
                writing.popleft().result()
            os.ftruncate(handle, self.size)
            os.fsync(handle)
        finally:
            wait(writing)
            os.close(handle)
        return digest.hexdigest()

    def _length(self, number: int) -> int:
        return min(direct.BLOCK, self.size - number * direct.BLOCK)

    def _leave(self, taken: mmap, written: Future[None]) -> None:
        self._room.give_back(taken)

    def _opened(self, number: int) -> _Block:
        """A block, once there is memory for it."""
        room = self._room
        with room.news:
            while number not in self._blocks:
                if room.failed:
                    raise InterruptedError("the writing was given up")
                if room.open < room.most or number == self._next:
                    self._blocks[number] = _Block(room.take(), self._length(number))
                else:
                    room.news.wait()
            return self._blocks[number]

    def _filled(self, number: int) -> mmap:
        """The memory of the next block, once it lacks nothing."""
        with self._room.news:
            while number not in self._blocks or self._blocks[number].missing:
                if self._room.failed:
                    raise InterruptedError("the writing was given up")
                self._room.news.wait()
            self._next = number + 1
            self._room.news.notify_all()  # who waits for the block behind may open it now
            return self._blocks.pop(number).memory
