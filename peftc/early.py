"""The head start: tensors that a merge will most likely leave as they are, copied meanwhile.

Importing torch takes more than a second of one core. In that time a thread copies, within the
kernel, the bytes of modules that no adapter names into files of the claimed staging directory that
are no part of the artifact. It is a guess, and nothing depends on it: the linker takes those files
over, skips bytes that are the very ones it would copy, of unchanged files, and writes all others.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from threading import Event, Thread

from peftc.artifact import AHEAD, LOG, MANIFEST, Artifact, claimed, obstacles
from peftc.checkpoint import PEFT_PREFIX, Checkpoint, contained, read_json, subfolder
from peftc.files import fresh, opened
from peftc.safetensors_file import SafetensorsFile, TensorRef, read_header

_PIECE_BYTES = 64 << 20  # between two pieces the thread waits for the interpreter's lock
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass
class _Copy:
    """A file of the source: its size, time and inode, and how far its runs of tensors are copied.

    A run is of neighbours, and is copied up to an offset.
    """

    path: Path
    state: list[int]
    runs: list[tuple[list[TensorRef], int]] = field(default_factory=list)


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

    def __exit__(self, *_: object) -> None:
        with self._held:
            self._end()

    def hand_over(self, states: Mapping[str, list[int]]) -> Path | None:
        """Ends the copying; the linker begins.

        Args:
            states: Size, time and inode of every file that the program reads. What was copied of a
                file in another state is worth nothing.

        Returns:
            The staging directory, claimed, or None where none was.
        """
        self._end()
        for copy in self._copies.values():
            if states.get(str(copy.path)) != copy.state:
                copy.runs.clear()
        return self._claim

    def adopt(self, name: str, path: Path) -> dict[TensorRef, int]:
        """Moves a file to where the linker wants it, if any of it was copied.

        Returns:
            How many bytes of its tensors lie in it, where they lie in the source.
        """
        copy = self._copies.pop(name, None)
        if copy is None or self._claim is None:
            return {}
        (self._claim / AHEAD / name).replace(path)
        return {
            ref: min(end - ref.start, ref.nbytes)
            for run, end in copy.runs
            for ref in run
            if ref.start < end
        }

    def _end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _guess(self) -> None:
        with suppress(Exception):  # what is wrong, the export finds out, and says it better
            base, adapters = _inputs(self._source, self._adapters)
            checkpoint = Checkpoint.open(base)
            touched = _touched(checkpoint, adapters)
            target, sources = self._target.absolute(), [base, *adapters]
            resumed = target.parent / f".{target.name}.peftc-staging" / LOG
            if not touched or not target.parent.is_dir() or resumed.exists():
                return
            if obstacles(target, checkpoint.nbytes, sources, self._overwrite):
                return
            self._claim = self._held.enter_context(claimed(target))
            (self._claim / AHEAD).mkdir()
            for file in checkpoint.files:
                self._copy(file, self._claim / AHEAD / file.path.name, touched)

    def _copy(self, file: SafetensorsFile, target: Path, touched: set[str]) -> None:
        runs = groupby(file.tensors.values(), lambda ref: ref.name.rpartition(".")[0] in touched)
        with opened(file.path) as source, fresh(target) as out:
            info = os.fstat(source.fileno())
            copy = _Copy(file.path, [info.st_size, info.st_mtime_ns, info.st_ino])
            self._copies[file.path.name] = copy
            reserve(out.fileno(), file.size)
            for changes, tensors in runs:
                run = list(tensors)
                position, end = run[0].start, run[-1].start + run[-1].nbytes
                while position < end and not changes:
                    if self._ended.is_set():
                        return
                    count = min(end - position, _PIECE_BYTES)
                    done = copy_piece(source.fileno(), out.fileno(), count, position, position)
                    if not done:
                        return
                    position += done
                    copy.runs.append((run, position))


def copy_piece(source: int, out: int, count: int, start: int, offset: int) -> int:
    """Copies bytes between files within the kernel, or through memory where it cannot.

    Returns:
        How many; 0 at the source's end.
    """
    try:
        return os.copy_file_range(source, out, count, start, offset)
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
        return os.pwrite(out, os.pread(source, count, start), offset)


def reserve(out: int, size: int) -> None:
    """Takes a file's place on the disk, unless it has it."""
    if os.fstat(out).st_size != size:
        os.ftruncate(out, size)
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(out, 0, size)


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
