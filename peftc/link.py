"""The linker: writes a program's tensors into files, a few rows in memory at a time.

Files, names and order are the source's. A tensor that no pass touched is read as it is; the others
are evaluated in fp32, rows by rows that stay in a core's cache, and rounded once. Units of work run
on one thread per core and fill the files' blocks, which are hashed and written as they are full.
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from peftc import direct
from peftc.artifact import Staging
from peftc.blocks import BlockFile, Room
from peftc.constants import DTYPE_NAMES, Constant, Derived, Leaf
from peftc.devices import Piece, device_of, fetched, start_worker, true_fp32
from peftc.early import HeadStart
from peftc.errors import CheckpointError
from peftc.evaluate import (
    Evaluation,
    chunks,
    keep_freed_memory,
    single_threaded,
    value,
)
from peftc.files import opened
from peftc.program import OutputFile, Program
from peftc.progress import SILENT, Progress
from peftc.reading import fill, read
from peftc.safetensors_file import TensorRef
from peftc.storage import contents

UNIT_BYTES = 32 << 20


class Watcher(Protocol):
    """Sees every piece of a tensor as it is written, and says what it measured."""

    def see(self, low: int, high: int, rows: torch.Tensor) -> None: ...
    def result(self) -> Any: ...


Watch = Callable[[str], Watcher | None]


@dataclass(frozen=True, slots=True)
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
    device: str = "cpu",
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
        device: What computes; `cuda` as well.

    Returns:
        What the watchers measured, by stored tensor.
    """
    where = device_of(device)
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
        true_fp32(),
        ThreadPoolExecutor(workers, initializer=start_worker, initargs=(where,)) as pool,
        ThreadPoolExecutor(workers) as sealers,
        ThreadPoolExecutor(2 * workers) as writers,
    ):
        room = Room((workers + 2) * (UNIT_BYTES // direct.BLOCK))
        try:
            outputs = [_output(stage.place(shard.name), shard, room, head) for shard in todo]
            sealing = {sealers.submit(output.file.seal, writers): output for output in outputs}
            writing = {
                pool.submit(_write, output, number, where, watch, progress.advance): output
                for output, number in _order(outputs, workers)
            }
            _finish(sealing, writing, stage)
        except BaseException:
            room.fail()
            for executor in (pool, sealers):
                executor.shutdown(cancel_futures=True)
            raise
    return measured | {key: item for output in outputs for key, item in output.notes.items()}


def _finish(
    sealing: dict[Future[str], _Output],
    writing: dict[Future[dict[str, Any]], _Output],
    stage: Staging,
) -> None:
    """Waits for units and files as they end; seals a file when all that is known of it is there."""
    left = Counter(writing.values())
    digests: dict[str, str] = {}
    futures: list[Future[Any]] = [*writing, *sealing]
    for future in as_completed(futures):
        if future in writing:
            output = writing[future]
            output.notes |= future.result()
            left[output] -= 1
        else:
            output = sealing[future]
            digests[output.shard.name] = future.result()
        name = output.shard.name
        if not left[output] and name in digests:
            stage.seal(name, digests.pop(name), output.notes)


@dataclass(eq=False)
class _Output:
    """A file under construction, what it is made of, and what the watchers measured."""

    shard: Shard
    file: BlockFile
    units: list[list[Entry]]
    notes: dict[str, Any] = field(default_factory=dict)


def _output(path: Path, shard: Shard, room: Room, head: HeadStart | None) -> _Output:
    """Takes the file's place on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    copied = head.adopt(shard.name, path) if head else None
    there = _same_blocks(shard, *copied) if copied else ()
    direct.reserve(path, shard.size)
    return _Output(shard, BlockFile(path, shard.size, room, there), list(_units(shard.entries)))


def _same_blocks(shard: Shard, source: Path, copied: Collection[int]) -> set[int]:
    """Which of the source's blocks that were copied are this file's as well."""
    same = set(copied) - set(range(-(-len(shard.header) // direct.BLOCK)))
    for entry in shard.entries:
        ref = entry.constant.ref if isinstance(entry.constant, Leaf) else None
        if ref is None or (ref.file, ref.start) != (source, entry.start):
            last = entry.start + entry.nbytes - 1
            same.difference_update(range(entry.start // direct.BLOCK, last // direct.BLOCK + 1))
    return same


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
        try:
            with opened(original.path) as handle:
                prefix = handle.read(8)
                return prefix + handle.read(struct.unpack("<Q", prefix)[0])
        except (OSError, struct.error) as error:
            raise CheckpointError(
                f"can be read no longer: {error}",
                where=str(original.path),
                fix="restore it, and run again",
            ) from error
    text = json.dumps({"__metadata__": dict(file.metadata), **table}, separators=(",", ":"))
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _units(entries: tuple[Entry, ...]) -> Iterator[list[Entry]]:
    """Runs of neighbouring tensors, large enough to be worth a task; one even of none."""
    unit: list[Entry] = []
    size = 0
    for entry in entries:
        if size >= UNIT_BYTES:
            yield unit
            unit, size = [], 0
        unit.append(entry)
        size += entry.nbytes
    yield unit


def _write(
    output: _Output,
    number: int,
    device: torch.device,
    watch: Watch,
    on_bytes: Callable[[int], None],
) -> dict[str, Any]:
    measured = {}
    if number == 0:
        header = memoryview(output.shard.header)
        for place in output.file.places(0, len(header)):
            place[:], header = header[: len(place)], header[len(place) :]
        on_bytes(len(output.shard.header))
    for entry in output.units[number]:
        watcher = watch(entry.key)
        if isinstance(entry.constant, Leaf) and watcher is None:
            _copy(entry.constant.ref, output.file, entry.start, on_bytes)
            continue
        offset = entry.start
        for low, high, rows in _pieces(entry.constant, device):
            data = rows.contiguous().reshape(-1).view(torch.uint8)
            for place in output.file.places(offset, len(data)):
                torch.frombuffer(place, dtype=torch.uint8).copy_(data[: len(place)])
                data = data[len(place) :]
                offset += len(place)
                on_bytes(len(place))
            if watcher:
                watcher.see(low, high, rows)
        if watcher:
            measured[entry.key] = watcher.result()
    return measured


def _length(constant: Constant) -> int:
    return constant.spec.shape[0] if constant.spec.shape else 1


def _pieces(constant: Constant, device: torch.device) -> Iterator[Piece]:
    """A constant's rows in its own dtype, rounded once, a few at a time."""
    if isinstance(constant, Derived):
        evaluation = Evaluation(constant.graph, constant.inputs, device=device)
        kind = constant.spec.dtype
        computed = (
            (low, high, evaluation.rows(low, high).to(kind)) for low, high in evaluation.spans()
        )
        yield from fetched(computed) if device.type == "cuda" else computed
    elif isinstance(constant, Leaf):
        for low, high in chunks(constant.spec.shape):
            yield low, high, read(constant, low, high)
    else:
        yield 0, _length(constant), value(constant)


def _copy(ref: TensorRef, file: BlockFile, offset: int, on_bytes: Callable[[int], None]) -> None:
    """Reads a tensor's bytes into their places."""
    position = ref.start
    for place in file.places(offset, ref.nbytes):
        fill(place, ref.file, position)
        position += len(place)
        on_bytes(len(place))
