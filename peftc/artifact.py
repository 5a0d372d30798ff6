"""Artifacts: directories with a manifest, staged beside their target and published by a rename."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from peftc.checkpoint import read_json, within
from peftc.errors import ArtifactError, CheckpointError, PeftcError, raise_all
from peftc.files import FULL, clashes, is_plain, lines, opened, write
from peftc.files import fresh as new_file
from peftc.interrupts import Terminated, later

MANIFEST = "peftc.json"
SCHEMA = 1
WEIGHTS = ".safetensors"  # the end of the names of files that are nothing but numbers
STAGING = "staging"  # what a directory is for in which an artifact is written
LOG = "done.jsonl"  # in a staging directory: what is finished
AHEAD = "ahead"  # in one too: what was copied before it was known to be needed
LOCK = "lock"  # in every directory of work: held by the run that works there, whose name is in it
HOLDER = 300  # bytes at most of that name


@dataclass(frozen=True)
class Sealed:
    """A file that is complete on the disk."""

    size: int
    blake3: str


class Staging:
    """A directory under construction.

    What is finished is written down, with what was measured of it, so that a run that was killed
    goes on from there. A run with another key starts afresh.

    Args:
        root: Holds the tree, which becomes the artifact, and the log of what is finished.
        target: The artifact's directory.
        key: What the work depends on.
        overwrite: The target may be an artifact of peftc.
    """

    def __init__(self, root: Path, target: Path, key: str, overwrite: bool = False) -> None:
        self.path, self.target, self.overwrite = root / "tree", target, overwrite
        self.files: dict[str, Sealed] = {}
        self.notes: dict[str, Any] = {}
        self._log = root / LOG
        first, *rest = lines(self._log) or [{}]
        if first != {"key": key} or _has_links(self.path):
            rest = []
            if self.path.exists():
                shutil.rmtree(self.path)
        self.path.mkdir(exist_ok=True)
        # Only what is there stays in the log: a file that is written anew must not look finished.
        sealed = [line for line in rest if self._is_whole(line)]
        fresh = root / "done.new"
        write(fresh, "".join(json.dumps(line) + "\n" for line in ({"key": key}, *sealed)))
        fresh.replace(self._log)
        for line in sealed:
            self.files[line["file"]] = Sealed(line["size"], line["blake3"])
            self.notes[line["file"]] = line["note"]

    def _is_whole(self, line: Mapping[str, Any]) -> bool:
        try:
            size = within(self.path, line["file"]).stat().st_size
            return bool(size == line["size"]) and {"blake3", "note"} <= line.keys()
        except (PeftcError, OSError, LookupError, TypeError, AttributeError):
            return False

    def place(self, name: str) -> Path:
        """Where a file of this name is to be written.

        Raises:
            ArtifactError: It leads out of the directory, or differs from another file's by the case
                of its letters alone, so that some disks would take the two for one.
        """
        if not all(is_plain(part) for part in name.split("/")):
            raise ArtifactError(
                f"{name!r} is no name of a file in it", where=str(self.target), fix="rename it"
            )
        if twins := clashes([*self.files, name]):
            raise ArtifactError(
                f"would hold files that differ by their letters' case alone: {', '.join(twins)}",
                where=str(self.target),
                fix="rename one of them in the source: some disks take them for one file",
            )
        return self.path / name

    def seal(self, name: str, blake3: str, note: Any = None) -> None:
        """Writes down that a file is complete; its bytes must be on the disk."""
        size = (self.path / name).stat().st_size
        self.files[name], self.notes[name] = Sealed(size, blake3), note
        self._append({"file": name, "size": size, "blake3": blake3, "note": note})

    def add(self, name: str, data: bytes) -> None:
        """Writes a small file and seals it."""
        path = self.place(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.seal(name, blake3(data).hexdigest())

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest and renames the directory to its target.

        Raises:
            ArtifactError: Meanwhile something else has appeared there.
        """
        names = sorted(self.files.keys() - {MANIFEST})  # an earlier run may have written one
        files = {name: vars(self.files[name]) for name in names}
        text = json.dumps({**manifest, "files": files}, indent=2) + "\n"
        self.add(MANIFEST, text.encode())
        for folder in {self.path, *((self.path / name).parent for name in files)}:
            fsync_folder(folder)
        raise_all(occupied(self.target, self.overwrite))
        previous = _previous(self.target)
        with later():
            if self.target.exists():
                shutil.rmtree(previous, ignore_errors=True)
                self.target.replace(previous)
            self.path.replace(self.target)
            fsync_folder(self.target.parent)
            shutil.rmtree(previous, ignore_errors=True)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._log.open("a") as log:
            log.write(json.dumps(line) + "\n")
            log.flush()
            os.fsync(log.fileno())


@contextmanager
def staging(
    target: Path,
    *,
    key: str,
    need: int,
    sources: list[Path],
    overwrite: bool = False,
    claim: Path | None = None,
) -> Iterator[Staging]:
    """Opens the staging directory of a target, `.NAME.peftc-staging` beside it.

    Args:
        target: The artifact's directory, which must not exist.
        key: What the work depends on; a staging directory of another key is discarded.
        need: The bytes that will be written.
        sources: Directories that are read, and must not be written into.
        overwrite: Replace an artifact that peftc wrote.
        claim: The staging directory, where the caller has claimed it already.

    Raises:
        ArtifactError: The target exists, lies in a source, does not fit on the disk, or another run
            is writing it.
    """
    raise_all(obstacles(target, need, sources, overwrite))
    with nullcontext(claim) if claim else claimed(target) as root:
        yield Staging(root, target.absolute(), key, overwrite)


@contextmanager
def claimed(target: Path, purpose: str = STAGING, kept: bool = False) -> Iterator[Path]:
    """Makes and locks a directory of work beside a target, and removes it, unless killed.

    Args:
        target: The artifact's directory.
        purpose: What the directory is for, which its name says.
        kept: Leave it there.

    Raises:
        ArtifactError: It cannot be made, another run is working there, or what is written does not
            fit on the disk.
        CheckpointError: A file that is read cannot be.
    """
    target = target.absolute()
    root = target.parent / f".{target.name}.peftc-{purpose}"
    if root.is_symlink():
        raise ArtifactError(
            "is a link, and what it leads to is not touched", where=str(root), fix="remove the link"
        )
    lock: IO[bytes] | None = None
    try:
        with later():
            lock = _lock(root, target)
        shutil.rmtree(root / AHEAD, ignore_errors=True)  # of a run that was killed
        if purpose == STAGING and not target.exists() and _previous(target).exists():
            _previous(target).replace(target)  # the run was killed between two renames
        yield root
    except (ConnectionError, InterruptedError):
        raise
    except OSError as error:
        raise _typed(error, root, target) from error
    except Terminated:
        kept = True
        raise
    finally:
        if lock is not None:
            with later(), lock:
                if not kept:
                    shutil.rmtree(root, ignore_errors=True)


def _lock(root: Path, target: Path) -> IO[bytes]:
    """Holds the lock of a directory of work, which names this process."""
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            lock = os.fdopen(os.open(root / LOCK, flags, 0o666), "r+b", buffering=0)
        except FileNotFoundError:  # the run that held it has just ended
            continue
        except OSError as error:
            raise ArtifactError(
                f"cannot be written: {error.strerror}",
                where=str(target),
                fix="choose a place where you may write",
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = ""
            with lock, suppress(OSError):
                holder = os.pread(lock.fileno(), HOLDER, 0).decode(errors="replace").strip()
            raise ArtifactError(
                f"another run of peftc{f' ({holder})' if holder else ''} is writing it",
                where=str(target),
                fix=f"wait for it to end; while it runs it holds {root / LOCK}",
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), (root / LOCK).stat()):
                break
        lock.close()  # of a directory that its run has removed meanwhile
    with suppress(OSError):  # on a full disk it has no name
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock


def _typed(error: OSError, root: Path, target: Path) -> PeftcError:
    """An error of the system: of writing, unless it names a file elsewhere."""
    name = error.filename
    path = Path(name).absolute() if isinstance(name, str) else target
    own = path in (target.parent, target, _previous(target), root) or root in path.parents
    full = error.errno in FULL
    if not (own or full):
        return _unread(error, str(path))
    return ArtifactError(
        f"could not be written: {error.strerror or error}",
        where=str(target if own else path),
        fix=f"{'make room on' if full else 'check'} the disk, or choose another place",
    )


def _unread(error: OSError, path: str) -> CheckpointError:
    return CheckpointError(
        f"cannot be read: {error.strerror}", where=path, fix="check that it is there, and readable"
    )


def _previous(target: Path) -> Path:
    """Where an artifact is that another one is about to replace."""
    return target.parent / f".{target.name}.peftc-previous"


def _is_ours(target: Path) -> bool:
    """Whether a directory is empty, or holds an artifact of peftc."""
    if target.is_dir() and not any(target.iterdir()):
        return True
    try:
        Artifact.open(target)
    except PeftcError:
        return False
    return True


def occupied(target: Path, overwrite: bool) -> list[PeftcError]:
    """What already is where a target is to be, and is not replaced."""
    if not (target.exists() or target.is_symlink()):
        return []
    if not overwrite:
        return [
            ArtifactError("exists already", where=str(target), fix="choose another, or --overwrite")
        ]
    if target.is_symlink() or not _is_ours(target):
        return [
            ArtifactError(
                f"is not an artifact of peftc (it has no {MANIFEST}), and is not overwritten",
                where=str(target),
                fix="remove it yourself, or choose another place",
            )
        ]
    return []


def obstacles(target: Path, need: int, sources: list[Path], overwrite: bool) -> list[PeftcError]:
    """What stands against writing a target; see `staging`."""
    errors = occupied(target, overwrite)
    where, real = str(target), target.resolve()
    for source in sources:
        home = source.resolve()
        if real == home or home in real.parents or real in home.parents:
            errors.append(
                ArtifactError(
                    f"lies inside the source {source}, or holds it",
                    where=where,
                    fix="write to a directory of its own",
                )
            )
    anchor = next(folder for folder in (real, *real.parents) if folder.exists())
    staged = real.parent / f".{real.name}.peftc-staging"
    free = shutil.disk_usage(anchor).free + sum(
        file.stat().st_blocks * 512 for file in staged.rglob("*") if file.is_file()
    )
    if need > free:
        errors.append(
            ArtifactError(
                f"needs {need / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free",
                where=where,
                fix="make room, or write to another disk",
            )
        )
    return errors


class _Sealed(BaseModel):
    size: int = Field(ge=0)
    blake3: str


class _Step(BaseModel):
    title: str
    options: dict[str, Any]
    effect: str


class _Manifest(BaseModel):
    """What all manifests say; what those of a kind say besides, its readers check."""

    model_config = ConfigDict(strict=True)

    kind: Literal["apply", "model", "adapter", "cache", "onnx", "onnx-adapter", "pt2"]
    source: dict[str, Any]
    files: dict[str, _Sealed]
    adapters: dict[str, str] = {}
    journal: list[_Step] = []
    inputs: dict[str, str] = {}
    versions: dict[str, str] = {}
    proof: dict[str, Any] = {}

    @field_validator("source")
    @classmethod
    def _named(cls, source: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(source.get("path", source.get("module")), str):
            raise ValueError("it has neither a path nor a module")
        return source


@dataclass(frozen=True)
class Artifact:
    """A published directory and its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Opens a directory that peftc wrote.

        Raises:
            CheckpointError: It has no manifest, or a damaged one.
            ArtifactError: The manifest has another schema.
        """
        manifest = read_json(path / MANIFEST, "an artifact of peftc")
        if manifest.get("peftc") != SCHEMA:
            raise ArtifactError(
                f"has schema {manifest.get('peftc')!r}, and this peftc reads {SCHEMA}",
                where=str(path / MANIFEST),
                fix="write the artifact again with this version",
            )
        found = cls(path, manifest)
        with found.described():
            _Manifest.model_validate(manifest)
        return found

    @contextmanager
    def described(self) -> Iterator[None]:
        """Where a manifest is looked into, what is missing there or of another type is damage.

        Raises:
            ArtifactError: In place of a KeyError and its kin.
        """
        try:
            yield
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            wrong = error.errors()[0] if isinstance(error, ValidationError) else None
            at = ".".join(map(str, wrong["loc"])) if wrong else ""
            raise ArtifactError(
                f"is damaged: {f'{at}: ' if at else ''}{wrong['msg'] if wrong else repr(error)}",
                where=str(self.path / MANIFEST),
                fix="write the artifact again",
            ) from error

    def damage(self, weights: bool = True) -> list[PeftcError]:
        """An error for each file whose size or hash is not the manifest's.

        Args:
            weights: Read the weights too, which takes as long as their size; else of them only the
                sizes are compared.
        """
        errors: list[PeftcError] = []
        for name, sealed in self.manifest["files"].items():
            try:
                file = within(self.path, name)
                read = weights or not name.endswith(WEIGHTS)
                good = file.stat().st_size == sealed["size"] and not (
                    read and digest(file) != sealed["blake3"]
                )
            except (PeftcError, OSError):
                good = False
            if not good:
                errors.append(
                    ArtifactError(
                        "is missing, or not what was published",
                        where=str(self.path / name),
                        fix="export it again",
                    )
                )
        return errors


def digest(path: Path) -> str:
    """The BLAKE3 of a file in hex, as `b3sum` prints it: a safe hash that keeps up with disks.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        with opened(path) as file:
            return hashlib.file_digest(file, blake3).hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise _unread(error, str(path)) from error


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def key_of(*parts: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of peftc and what its numbers depend on."""
    found = {}
    for name in ("peftc", "torch", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source tree"
    return found


def _has_links(folder: Path) -> bool:
    """Whether something below a folder would be written or read through a link."""
    return folder.is_symlink() or any(path.is_symlink() for path in folder.rglob("*"))
