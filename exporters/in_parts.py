"""One export by several processes or machines: each writes its share of the files, one publishes.

A part seals its files in a directory of its own beside the target, on a disk that all of them see.
When all are there they are one staging directory of an export that was interrupted behind its last
file: what is left to do is to prove and to publish.
"""

from __future__ import annotations

import glob
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from heapq import heapreplace
from pathlib import Path
from typing import Any

from peftc.artifact import LOG, MANIFEST, Staging, claimed, obstacles
from peftc.checkpoint import MAX_JSON, read_json, subfolder
from peftc.errors import ArtifactError, PeftcError, raise_all
from peftc.exporters.to_safetensors import folders, key_for, refuse_adapters, refuse_changes
from peftc.files import content, write
from peftc.link import Shard, link, plan
from peftc.program import Program
from peftc.progress import SILENT, Progress
from peftc.proof import Extent, watcher

_DONE = "part.json"  # written when a part is whole


@dataclass(frozen=True)
class Part:
    """The share `number` of `of`, counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Reads `2/4`.

        Raises:
            ArtifactError: It is none.
        """
        found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
        if not found or int(found[1]) > int(found[2]):
            raise ArtifactError(
                f"{text!r} is no part of an export", fix="the second of four is 2/4"
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def purpose(self) -> str:
        return f"part-{self.number}-of-{self.of}"

    def share(self, shards: Sequence[Shard]) -> list[Shard]:
        """Its files: the largest go first, each to the part that has least so far."""
        own: list[Shard] = []
        loads = [(0, number) for number in range(1, self.of + 1)]
        for shard in sorted(shards, key=lambda shard: (-shard.size, shard.name)):
            load, number = loads[0]
            heapreplace(loads, (load + shard.size, number))
            if number == self.number:
                own.append(shard)
        return own


def write_part(
    program: Program,
    target: str | Path,
    part: Part,
    arguments: Mapping[str, Any],
    *,
    overwrite: bool = False,
    proof: Extent = "auto",
    workers: int | None = None,
    progress: Progress = SILENT,
    device: str = "cpu",
) -> dict[str, Any]:
    """Writes and seals a part's files; one that was interrupted goes on.

    Args:
        program: What to write, the same in every part.
        target: The directory that `gathered` is to publish.
        part: Which share.
        arguments: What it takes to make the program again, as JSON.
        overwrite: The target may be an artifact that peftc wrote.
        proof: Of the whole export.
        workers: Threads that compute; default: one per core.
        progress: Told of every byte written.
        device: What computes; may differ from part to part.

    Returns:
        The part's directory, its files and their bytes.

    Raises:
        ArtifactError: The target cannot be written, or the program still carries adapters.
        CheckpointError: A source file changed while it was read.
    """
    refuse_adapters(program, target)
    target = Path(target)
    shards = part.share(plan(program))
    need = sum(shard.size for shard in shards)
    raise_all(obstacles(target, need, folders(program), overwrite))
    key = key_for(program, proof)
    with claimed(target, part.purpose, kept=True) as root:
        stage = Staging(root, target.absolute(), key)
        progress.stage("link", need)
        link(
            program, stage, shards=shards, workers=workers, watch=watcher(program),
            progress=progress, device=device,
        )  # fmt: skip
        refuse_changes(program)
        done = {"key": key, "overwrite": overwrite, "proof": proof, "arguments": arguments}
        fresh = root / "part.new"
        write(fresh, json.dumps(done))
        fresh.replace(root / _DONE)
    return {"path": str(root), "files": [shard.name for shard in shards], "bytes": need}


@dataclass(frozen=True)
class Gathered:
    """What all the parts of an export say, and where they are."""

    key: str
    overwrite: bool
    proof: Extent
    arguments: Mapping[str, Any]
    roots: tuple[Path, ...]

    def remove(self) -> None:
        """Removes the parts' directories, when the artifact is published."""
        for root in self.roots:
            shutil.rmtree(root, ignore_errors=True)


def published(target: Path) -> bool:
    """Whether `finish` was killed behind its publication: then the parts' files lie in the target.

    What is left of them is removed.
    """
    roots, errors = _roots(target.absolute())
    if errors or not (target / MANIFEST).is_file():
        return False
    with claimed(target, kept=True) as stage:  # which it left too
        trees = [stage / "tree", *(root / "tree" for root in roots.values())]
        done = not any(tree.exists() and any(tree.iterdir()) for tree in trees)
        for root in (stage, *roots.values()) if done else ():
            shutil.rmtree(root)
    return done


@contextmanager
def gathered(target: Path) -> Iterator[Gathered]:
    """Moves the parts' files into the target's staging directory, for an export to go on with.

    Raises:
        ArtifactError: Parts are missing, unfinished, at work, or not of one export.
    """
    target = target.absolute()
    roots, errors = _roots(target)
    raise_all(errors)
    with ExitStack() as held:
        for part in roots:
            held.enter_context(claimed(target, part.purpose, kept=True))
        said = [_told(root) for root in roots.values()]
        if len({entry["key"] for entry in said}) > 1:
            raise ArtifactError(
                "its parts are not of one export: sources, adapters, options or versions differ",
                where=str(target),
                fix="write all of them again from the same files with the same command",
            )
        with claimed(target, kept=True) as stage:
            tree = subfolder(stage, "tree")
            tree.mkdir(exist_ok=True)
            lines = [json.dumps({"key": said[0]["key"]}).encode()]
            for root in roots.values():
                lines += content(root / LOG, MAX_JSON).splitlines()[1:]
            write(stage / LOG, b"".join(line + b"\n" for line in lines))
            for root in roots.values():
                for file in sorted(subfolder(root, "tree").iterdir()):
                    file.replace(tree / file.name)
        yield Gathered(**said[0], roots=tuple(roots.values()))


def _told(root: Path) -> dict[str, Any]:
    """What a part says of the export that it is of."""
    told = read_json(root / _DONE, "a part of an export")
    kinds = {"key": str, "overwrite": bool, "proof": str, "arguments": dict}
    if told.keys() != kinds.keys() or any(type(told[name]) is not kinds[name] for name in kinds):
        raise ArtifactError(
            "is damaged", where=str(root / _DONE), fix="remove its directory, and write it again"
        )
    return told


def _roots(target: Path) -> tuple[dict[Part, Path], list[PeftcError]]:
    """The directories of a target's parts, and what is wrong with them."""
    name = f".{target.name}.peftc-"
    found: dict[Part, Path] = {}
    for path in target.parent.glob(f"{glob.escape(name)}part-*-of-*"):
        if match := re.fullmatch(r"part-(\d+)-of-(\d+)", path.name.removeprefix(name)):
            found[Part(int(match[1]), int(match[2]))] = path
    where, counts = str(target), {part.of for part in found}
    if len(counts) != 1:
        what = "has no parts" if not counts else f"has parts of {sorted(counts)} at once"
        fix = "write them: peftc export … --shards 1/2" if not counts else "remove those of one"
        return {}, [ArtifactError(what, where=where, fix=fix)]
    (of,) = counts
    wanted = [Part(number, of) for number in range(1, of + 1)]
    lacking = [part for part in wanted if not (part in found and (found[part] / _DONE).is_file())]
    return {part: found[part] for part in wanted if part in found}, [
        ArtifactError(
            f"part {part.number} of {part.of} is {'unfinished' if part in found else 'missing'}",
            where=where,
            fix=f"run its command (again): … --shards {part.number}/{part.of}",
        )
        for part in lacking
    ]
