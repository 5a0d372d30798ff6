"""The head start: tensors that a merge will most likely leave as they are, copied meanwhile.

Importing torch takes more than a second of one core. In that time a thread copies the blocks of
modules that no adapter names into files of the claimed staging directory that are no part of the
artifact. It is a guess, and nothing depends on it: the linker takes those files over, does not
write blocks again that are the very ones it would write, of unchanged files, and writes all others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import accumulate, count
from pathlib import Path
from threading import Event, Thread
from typing import Any

from peftc import direct
from peftc.artifact import AHEAD, LOG, MANIFEST, STAGING, Artifact, claimed, obstacles
from peftc.checkpoint import PEFT_PREFIX, Checkpoint, contained, read_json, subfolder
from peftc.files import opened
from peftc.safetensors_file import SafetensorsFile, State, read_header, state_of

_RUN = 16  # blocks that are copied at once: between two calls the interpreter's lock is waited for


@dataclass
class _Copy:
    """A file of the source, its state, and which of its blocks are copied."""

    path: Path
    state: State
    blocks: set[int] = field(default_factory=set)


class HeadStart:
    """A context in which an export may begin to copy before it knows its program.

    Args:
        source: As for `api.export`; without a local checkpoint nothing is begun.
        adapters: The directories of further adapters.
        target: The artifact's directory.
        overwrite: As for `api.export`.
    """

    def __init__(
        self, source: str | Path, adapters: Sequence[str], target: Path, overwrite: bool = False
    ) -> None:
        self._source, self._adapters = Path(source), [Path(folder) for folder in adapters]
        self._target, self._overwrite = target, overwrite
        self._held = ExitStack()
        self._claim: Path | None = None  # the staging directory, once it is held
        self._copies: dict[str, _Copy] = {}  # by the file's name
        self._ended = Event()
        self._thread = Thread(target=self._guess, name="peftc-head-start", daemon=True)

    def __enter__(self) -> HeadStart:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._end()
        finally:
            self._held.__exit__(*error)

    def hand_over(self, states: Mapping[str, State]) -> Path | None:
        """Ends the copying; the linker begins.

        Args:
            states: That of every file that the program reads, when it was opened. What was copied
                of a file in another state is worth nothing.

        Returns:
            The staging directory, claimed, or None where none was.
        """
        self._end()
        for copy in self._copies.values():
            if states.get(str(copy.path)) != copy.state:
                copy.blocks.clear()
        return self._claim

    def adopt(self, name: str, path: Path) -> tuple[Path, set[int]] | None:
        """Moves a file to where the linker wants it, if any of it was copied.

        Returns:
            The source's file, and the numbers of its blocks that lie in this one too.
        """
        copy = self._copies.pop(name, None)
        if copy is None or self._claim is None:
            return None
        (self._claim / AHEAD / name).replace(path)
        return copy.path, copy.blocks

    def _end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _guess(self) -> None:
        with suppress(Exception):  # what is wrong, the export finds out, and says it better
            base, adapters = _inputs(self._source, self._adapters)
            checkpoint = Checkpoint.open(base)
            touched = _touched(checkpoint, adapters)
            target, sources = self._target.absolute(), [base, *adapters]
            resumed = target.parent / f".{target.name}.peftc-{STAGING}" / LOG
            if not touched or not target.parent.is_dir() or resumed.exists():
                return
            if obstacles(target, checkpoint.nbytes, sources, self._overwrite):
                return
            self._claim = self._held.enter_context(claimed(target))
            (self._claim / AHEAD).mkdir()
            room = memoryview(direct.memory(_RUN))
            for file in checkpoint.files:
                self._copy(file, self._claim / AHEAD / file.path.name, touched, room)

    def _copy(
        self, file: SafetensorsFile, target: Path, touched: set[str], room: memoryview
    ) -> None:
        spans = [
            (ref.start // direct.BLOCK, -(-(ref.start + ref.nbytes) // direct.BLOCK))
            for ref in file.tensors.values()
            if ref.name.rpartition(".")[0] in touched
        ]
        changed = {number for span in spans for number in range(*span)}
        with opened(file.path) as source:
            copy = _Copy(file.path, state_of(os.fstat(source.fileno())))
            direct.reserve(target, file.size)
            out = direct.opened(target)
            try:
                self._copies[file.path.name] = copy
                # Not the first, of the header, and none that is not whole.
                for first, blocks in _runs(set(range(1, file.size // direct.BLOCK)) - changed):
                    place, part = first * direct.BLOCK, room[: blocks * direct.BLOCK]
                    if self._ended.is_set() or not direct.read_into(source.fileno(), part, place):
                        return
                    direct.write(out, part, len(part), place)
                    copy.blocks.update(range(first, first + blocks))
            finally:
                os.close(out)


def _runs(numbers: set[int]) -> Iterator[tuple[int, int]]:
    """Neighbours among blocks: the first of them, and how many."""
    for first in sorted(numbers):
        if first - 1 not in numbers:
            end = next(number for number in count(first) if number not in numbers)
            for start in range(first, end, _RUN):
                yield start, min(_RUN, end - start)


def _inputs(source: Path, adapters: list[Path]) -> tuple[Path, list[Path]]:
    """The directories of the base and of all adapters; see `api.load`."""
    if (source / MANIFEST).is_file():
        manifest = Artifact.open(source).manifest
        if manifest["kind"] == "apply":
            own = source / "base"
            attached = [subfolder(source, name) for name in manifest["adapters"].values()]
            return own if own.is_dir() else Path(manifest["source"]["path"]), attached + adapters
    if (source / "adapter_config.json").is_file() and not (source / "config.json").exists():
        config = read_json(source / "adapter_config.json", "a PEFT adapter")
        return Path(config["base_model_name_or_path"]), [source, *adapters]
    return source, adapters


def _touched(checkpoint: Checkpoint, adapters: list[Path]) -> set[str]:
    """The stored modules that adapters name; none where that does not say all that will change."""
    modules = {key.rpartition(".")[0] for key in checkpoint.tensors}
    touched: set[str] = set()
    for folder in adapters:
        for key in read_header(contained(folder, "adapter_model.safetensors")).tensors:
            parents = key.removeprefix(PEFT_PREFIX).split(".")[:-1]
            named = modules.intersection(accumulate(parents, "{}.{}".format))
            if not named:  # it is stored under another name, or in parts
                return set()
            touched |= named
    return set() if "quantization_config" in checkpoint.config else touched
