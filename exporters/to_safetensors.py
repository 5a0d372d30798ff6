"""A program as a checkpoint that transformers loads: the source's names, shards and companions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftc.artifact import SCHEMA, Artifact, Staging, digest, key_of, staging, versions
from peftc.checkpoint import INDEX
from peftc.constants import Constant, Derived, Leaf
from peftc.early import HeadStart
from peftc.errors import ArtifactError, CheckpointError
from peftc.files import LARGEST, content
from peftc.link import Shard, link, plan
from peftc.program import Program
from peftc.progress import SILENT, Progress
from peftc.proof import Extent, site_proof, wants_whole, watcher, whole_proof
from peftc.storage import edited


def to_safetensors(
    program: Program,
    target: str | Path,
    *,
    overwrite: bool = False,
    proof: Extent = "auto",
    workers: int | None = None,
    progress: Progress = SILENT,
    remarks: Mapping[str, Any] | None = None,
    head: HeadStart | None = None,
) -> Artifact:
    """Writes, proves and publishes a program's checkpoint.

    Args:
        program: What to write; its adapters must be merged.
        target: A directory that does not exist.
        overwrite: Replace an artifact that peftc wrote there.
        proof: `sites` compares each rewritten site; `whole` the logits too, for which the model is
            loaded twice, in fp32; `auto` does that up to 1 GiB of fp32 weights.
        workers: Threads that compute; default: one per core.
        progress: Told of the stages link, prove and publish, and of every byte written.
        remarks: What else the manifest is to say.
        head: What was copied before the program was known.

    Raises:
        ArtifactError: The target cannot be written, or the program still carries adapters.
        CheckpointError: A source file changed while it was read.
        ProofError: The written weights are not equal to what they came from.
    """
    refuse_adapters(program, target)
    target = Path(target)
    before = states(program)
    need = sum(shard.size for shard in plan(program))
    key = key_for(program, before, proof)
    claim = head.hand_over(before) if head else None
    with staging(
        target, key=key, need=need, sources=folders(program), overwrite=overwrite, claim=claim
    ) as stage:
        progress.stage("link", need)
        measured = write_model(program, stage, workers=workers, progress=progress, head=head)
        progress.stage("prove")
        proved = {"site": site_proof(program, measured)}
        if wants_whole(program, proof):
            progress.stage("compare logits")
            proved["whole"] = whole_proof(program, stage.path)
        refuse_changes(program, before)
        progress.stage("publish")
        told = {"format": "safetensors"}
        stage.publish(manifest(program, "model", proof=proved, export=told, **(remarks or {})))
    return Artifact.open(target)


def refuse_changes(program: Program, before: Mapping[str, list[int]]) -> None:
    """Raises an error if a file that a program reads is no longer as it was."""
    changed = [path for path, state in states(program).items() if before[path] != state]
    if changed:
        raise CheckpointError(
            "changed while it was read", where=changed[0], fix="run again; nothing was written"
        )


def refuse_adapters(
    program: Program, target: str | Path, instead: str = "write it with --format peft"
) -> None:
    """Raises an error unless a program is a plain model."""
    if program.adapters:
        raise ArtifactError(
            f"the program still carries the adapter {', '.join(program.adapters)}",
            where=str(target),
            fix=f"merge it (--merge), or {instead}",
        )


def key_for(program: Program, before: Mapping[str, list[int]], proof: Extent) -> str:
    """What the writing of a program depends on, the states of its files among it."""
    return key_of(program.fingerprint, before, versions(), proof)


def write_model(
    program: Program,
    stage: Staging,
    folder: str = "",
    workers: int | None = None,
    progress: Progress = SILENT,
    head: HeadStart | None = None,
    shards: list[Shard] | None = None,
) -> dict[str, Any]:
    """Writes weights and companions into a staging directory; returns what the witnesses saw."""
    kept = {name: content(path, LARGEST) for name, path in program.source.companions().items()}
    for name, data in {**kept, **edited(program)}.items():
        if name != INDEX or shards != []:  # which names files that are not written
            stage.add(folder + name, data)
    watch = watcher(program)
    return link(
        program,
        stage,
        folder,
        shards=shards,
        workers=workers,
        watch=watch,
        progress=progress,
        head=head,
    )


def manifest(program: Program, kind: str, **more: Any) -> dict[str, Any]:
    """What peftc.json says of a program, but for the files."""
    return {
        "peftc": SCHEMA,
        "kind": kind,
        "versions": versions(),
        "source": program.source.pin(),
        "inputs": inputs(program),
        "journal": [vars(entry) for entry in program.journal],
        **more,
    }


def states(program: Program) -> dict[str, list[int]]:
    """Size, time and inode of every file that the program reads."""
    return {
        str(path): [info.st_size, info.st_mtime_ns, info.st_ino]
        for path in sorted(_files(program))
        for info in (path.stat(),)
    }


def inputs(program: Program) -> dict[str, str]:
    """The hash of every file that the program reads beside its source's own: the adapters."""
    own = {file.original.path for file in program.source.layout() if file.original}
    return {str(path): digest(path) for path in sorted(_files(program) - own)}


def folders(program: Program) -> list[Path]:
    """The directories that the program reads."""
    return sorted({path.parent for path in _files(program)})


def _files(program: Program) -> set[Path]:
    def leaves(constant: Constant) -> Iterator[Path]:
        if isinstance(constant, Leaf):
            yield constant.ref.file
        elif isinstance(constant, Derived):
            for inner in constant.inputs.values():
                yield from leaves(inner)

    return {path for constant in program.constants.values() for path in leaves(constant)}
