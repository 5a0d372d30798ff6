"""The linker: writes a program's tensors into files, a few rows in memory at a time.

Files, names and order are the source's. A tensor that no pass touched is copied by the kernel; the
others are evaluated in fp32, rows by rows that stay in a core's cache, rounded once, and written in
place. Units of work run on one thread per core; each file's hash follows its writing.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition
from typing import Any, Protocol

import torch
from blake3 import blake3

from peftc.artifact import Staging
from peftc.constants import DTYPE_NAMES, Constant, Derived, Leaf
from peftc.early import HeadStart, copy_piece, reserve
from peftc.errors import CheckpointError
from peftc.evaluate import (
    Evaluation,
    chunks,
    keep_freed_memory,
    single_threaded,
    value,
)
from peftc.files import fresh, opened
from peftc.program import OutputFile, Program
from peftc.progress import SILENT, Progress
from peftc.reading import read
from peftc.safetensors_file import TensorRef
from peftc.storage import contents

UNIT_BYTES = 32 << 20
_COPY_BYTES = 1 << 20
_SYNC_BYTES = 256 << 20


class Watcher(Protocol):
    """Sees every piece of a tensor as it is written, and says what it measured."""

    def see(self, low: int, high: int, rows: torch.Tensor) -> None: ...
    def result(self) -> Any: ...


Watch = Callable[[str], Watcher | None]


@dataclass(frozen=True)
class Entry:
    """One tensor of an output file: its stored name, its bytes' place."""

    key: str
    constant: Constant
    start: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """An output file as planned."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]
    size: int


def plan(program: Program, folder: str = "") -> list[Shard]:
    """The files to write, with every tensor's place in them."""
    return [_shard(program, file, folder) for file in program.source.layout()]


def shard_of(name: str, tensors: Mapping[str, Constant]) -> Shard:
    """A file of tensors that the source's layout does not have, each as large as it is written."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].spec.dtype.itemsize)
    return _laid_out(OutputFile(name, tuple(tensors), {"format": "pt"}), "", ordered)


def link(
    program: Program,
    stage: Staging,
    folder: str = "",
    *,
    shards: list[Shard] | None = None,
    workers: int | None = None,
    watch: Watch = lambda key: None,
    progress: Progress = SILENT,
    head: HeadStart | None = None,
) -> dict[str, Any]:
    """Writes a program's weight files into a staging directory and seals them.

    Args:
        program: What to write.
        stage: Where; files that an earlier run sealed in it are not written again.
        folder: A folder of it, with a slash at its end.
        shards: The files; default: those of the source's layout.
        workers: Threads that compute; default: one per core.
        watch: Gives a watcher for a stored tensor, or None.
        progress: Told of every byte written.
        head: What is copied already.

    Returns:
        What the watchers measured, by stored tensor.
    """
    keep_freed_memory()
    workers = workers or len(os.sched_getaffinity(0))
    measured: dict[str, Any] = {}
    todo = []
    for shard in plan(program, folder) if shards is None else shards:
        if shard.name in stage.files:
            measured |= stage.notes[shard.name]
            progress.advance(shard.size)
        else:
            todo.append(shard)
    with (
        single_threaded(),
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ThreadPoolExecutor(workers) as sealers,
    ):
        try:
            _run(todo, stage, pool, sealers, workers, watch, progress.advance, measured, head)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            sealers.shutdown(cancel_futures=True)
            raise
    return measured


def _run(
    todo: list[Shard],
    stage: Staging,
    pool: ThreadPoolExecutor,
    sealers: ThreadPoolExecutor,
    workers: int,
    watch: Watch,
    on_bytes: Callable[[int], None],
    measured: dict[str, Any],
    head: HeadStart | None,
) -> None:
    outputs = [_Output(stage.place(shard.name), shard) for shard in todo]
    writing: dict[Future[dict[str, Any]], tuple[_Output, int]] = {}
    sealing: dict[Future[str], _Output] = {}
    try:
        for output in outputs:
            output.create(head)
            on_bytes(len(output.shard.header))
            sealing[sealers.submit(output.seal)] = output
        for output, number in _order(outputs, workers):
            unit = output.units[number]
            writing[pool.submit(_write, output, unit, watch, on_bytes)] = output, number
        waiting: set[Future[Any]] = {*writing, *sealing}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                if future in writing:
                    output, number = writing[future]
                    output.finish(number, future.result())
                else:
                    output = sealing[future]
                    stage.seal(output.shard.name, future.result(), output.notes)
                    measured |= output.notes
    except BaseException:
        for output in outputs:
            output.fail()
        raise


class _Output:
    """A file under construction: its units may end in any order, its hash follows behind."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self.path, self.shard = path, shard
        self.units = list(_units(shard.entries))
        self.notes: dict[str, Any] = {}
        self.copied: dict[TensorRef, int] = {}  # bytes of tensors that lie in it already
        self._ended: set[int] = set()
        self._whole = 0  # units that have ended without a gap before them
        self._failed = False
        self._news = Condition()

    def create(self, head: HeadStart | None) -> None:
        """Takes the file's place on the disk and writes its header."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.copied = head.adopt(self.shard.name, self.path) if head else {}
        with self.path.open("r+b") if self.copied else fresh(self.path) as file:
            reserve(file.fileno(), self.shard.size)
            file.write(self.shard.header)

    def finish(self, number: int, notes: Mapping[str, Any]) -> None:
        """A unit is written."""
        with self._news:
            self.notes |= notes
            self._ended.add(number)
            while self._whole in self._ended:
                self._whole += 1
            self._news.notify_all()

    def fail(self) -> None:
        """Nothing more will be written."""
        with self._news:
            self._failed = True
            self._news.notify_all()

    def seal(self) -> str:
        """Hashes the file while it grows, then forces it to the disk."""
        digest, position, durable = blake3(), 0, 0
        buffer = memoryview(bytearray(_COPY_BYTES))
        with _descriptor(self.path, os.O_RDONLY) as handle:
            while position < self.shard.size:
                end = self._wait_beyond(position)
                while position < end:
                    count = os.preadv(handle, [buffer[: end - position]], position)
                    digest.update(buffer[:count])
                    position += count
                if position - durable >= _SYNC_BYTES:
                    os.fdatasync(handle)  # early, so that the disk works while others compute
                    durable = position
            os.fsync(handle)
        return digest.hexdigest()

    def _wait_beyond(self, position: int) -> int:
        with self._news:
            while (end := self._written()) <= position and not self._failed:
                self._news.wait()
            if self._failed:
                raise InterruptedError("the writing was given up")
            return end

    def _written(self) -> int:
        """How many bytes are written without a gap."""
        if self._whole == len(self.units):
            return self.shard.size
        return self.units[self._whole][0].start


def _order(outputs: list[_Output], workers: int) -> Iterator[tuple[_Output, int]]:
    """Units of as many files as there are workers in turn: two writers of one file would queue."""
    for first in range(0, len(outputs), workers):
        group = outputs[first : first + workers]
        for number in range(max(len(output.units) for output in group)):
            yield from ((output, number) for output in group if number < len(output.units))


def _shard(program: Program, file: OutputFile, folder: str) -> Shard:
    return _laid_out(file, folder, contents(program, file))


def _laid_out(file: OutputFile, folder: str, tensors: Sequence[tuple[str, Constant]]) -> Shard:
    table: dict[str, Any] = {}
    position = 0
    for key, constant in tensors:
        spec, nbytes = constant.spec, constant.spec.nbytes
        table[key] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    header = _header(file, table)
    entries = []
    for key, constant in tensors:
        low, high = table[key]["data_offsets"]
        entries.append(Entry(key, constant, len(header) + low, high - low))
    return Shard(folder + file.name, header, tuple(entries), len(header) + position)


def _header(file: OutputFile, table: Mapping[str, Any]) -> bytes:
    """The source's own header where it still holds, byte for byte; a new one where not."""
    original = file.original
    if (
        original is not None
        and list(original.tensors) == list(table)
        and all(
            (ref.dtype, list(ref.shape)) == (entry["dtype"], entry["shape"])
            for ref, entry in zip(original.tensors.values(), table.values(), strict=True)
        )
    ):
        with opened(original.path) as handle:
            prefix = handle.read(8)
            return prefix + handle.read(struct.unpack("<Q", prefix)[0])
    text = json.dumps({"__metadata__": dict(file.metadata), **table}, separators=(",", ":"))
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _units(entries: tuple[Entry, ...]) -> Iterator[list[Entry]]:
    """Runs of neighbouring tensors, large enough to be worth a task."""
    unit: list[Entry] = []
    size = 0
    for entry in entries:
        unit.append(entry)
        size += entry.nbytes
        if size >= UNIT_BYTES:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _write(
    output: _Output, unit: list[Entry], watch: Watch, on_bytes: Callable[[int], None]
) -> dict[str, Any]:
    measured = {}
    with _descriptor(output.path, os.O_WRONLY) as out:
        for entry in unit:
            watcher = watch(entry.key)
            if isinstance(entry.constant, Leaf) and watcher is None:
                ref = entry.constant.ref
                done = output.copied.get(ref, 0) if ref.start == entry.start else 0
                on_bytes(done)
                _copy(ref, done, out, entry.start, on_bytes)
                continue
            for low, high, rows in _pieces(entry.constant):
                data = rows.contiguous().reshape(-1).view(torch.uint8).numpy().data
                offset = entry.start + low * (entry.nbytes // max(1, _length(entry.constant)))
                _write_all(out, data, offset)
                if watcher:
                    watcher.see(low, high, rows)
                on_bytes(len(data))
            if watcher:
                measured[entry.key] = watcher.result()
    return measured


def _length(constant: Constant) -> int:
    return constant.spec.shape[0] if constant.spec.shape else 1


def _pieces(constant: Constant) -> Iterator[tuple[int, int, torch.Tensor]]:
    """A constant's rows in its own dtype, rounded once, a few at a time."""
    if isinstance(constant, Derived):
        evaluation = Evaluation(constant.graph, constant.inputs)
        for low, high in evaluation.spans():
            yield low, high, evaluation.rows(low, high).to(constant.spec.dtype)
    elif isinstance(constant, Leaf):
        for low, high in chunks(constant.spec.shape):
            yield low, high, read(constant, low, high)
    else:
        yield 0, _length(constant), value(constant)


def _copy(
    ref: TensorRef, position: int, out: int, offset: int, on_bytes: Callable[[int], None]
) -> None:
    """Copies a tensor's bytes from `position` on; its place in `out` begins at `offset`."""
    with opened(ref.file) as file:
        source = file.fileno()
        while position < ref.nbytes:
            count = min(ref.nbytes - position, _COPY_BYTES)
            done = copy_piece(source, out, count, ref.start + position, offset + position)
            if not done:
                raise CheckpointError(
                    "was truncated while it was read",
                    where=str(ref.file),
                    fix="restore it, and run again",
                )
            position += done
            on_bytes(done)


def _write_all(out: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(out, data, offset)
        data, offset = data[done:], offset + done


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)
