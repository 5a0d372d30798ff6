"""A program as a checkpoint that transformers loads: the source's names, shards and companions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftc.artifact import SCHEMA, Artifact, Staging, digest, key_of, staging, versions
from peftc.checkpoint import INDEX
from peftc.constants import Constant, Derived, Leaf
from peftc.devices import device_of
from peftc.early import HeadStart
from peftc.errors import ArtifactError, CheckpointError, PeftcError, raise_all
from peftc.files import LARGEST, content
from peftc.link import Shard, link, plan
from peftc.program import Program
from peftc.progress import SILENT, Progress
from peftc.proof import Extent, site_proof, wants_whole, watcher, whole_proof
from peftc.safetensors_file import State, state_of
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
    device: str = "cpu",
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
        device: What computes the weights: `cpu`, or `cuda`, in fp32 as well.

    Raises:
        PeftcError: There is no such device.
        ArtifactError: The target cannot be written, or the program still carries adapters.
        CheckpointError: A source file changed while it was read.
        ProofError: The written weights are not equal to what they came from.
    """
    refuse_adapters(program, target)
    device_of(device)
    target = Path(target)
    need = sum(shard.size for shard in plan(program))
    key = key_for(program, proof)
    claim = head.hand_over(states(program)) if head else None
    with staging(
        target, key=key, need=need, sources=folders(program), overwrite=overwrite, claim=claim
    ) as stage:
        progress.stage("link", need)
        measured = write_model(
            program, stage, workers=workers, progress=progress, head=head, device=device
        )
        progress.stage("prove")
        proved = {"site": site_proof(program, measured)}
        if wants_whole(program, proof):
            progress.stage("compare logits")
            proved["whole"] = whole_proof(program, stage.path)
        progress.stage("publish")
        told = {"format": "safetensors"}
        stage.publish(manifest(program, "model", proof=proved, export=told, **(remarks or {})))
    return Artifact.open(target)


def refuse_changes(program: Program) -> None:
    """Raises an error if a file that a program reads is no longer as it was when it was opened.

    Raises:
        CheckpointError: It was written to, replaced or removed; one error for each such file.
    """
    errors: list[PeftcError] = []
    for path, state in states(program).items():
        try:
            what = None if state_of(Path(path).stat()) == state else "changed while it was read"
        except OSError as error:
            what = f"could be read no longer: {error.strerror}"
        if what:
            fix = "run again when nothing writes to it; nothing was published"
            errors.append(CheckpointError(what, where=path, fix=fix))
    raise_all(errors)


def refuse_adapters(program: Program, target: str | Path) -> None:
    """Raises an error unless a program is a plain model."""
    if program.adapters:
        raise ArtifactError(
            f"the program still carries the adapter {', '.join(program.adapters)}",
            where=str(target),
            fix="merge it (--merge), or write it with --format peft",
        )


def key_for(program: Program, *asked: Any) -> str:
    """What the writing of a program depends on, the states of its files among it."""
    return key_of(program.fingerprint, states(program), versions(), asked)


def write_model(
    program: Program,
    stage: Staging,
    folder: str = "",
    workers: int | None = None,
    progress: Progress = SILENT,
    head: HeadStart | None = None,
    shards: list[Shard] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Writes weights and companions into a staging directory; returns what the witnesses saw."""
    kept = {name: content(path, LARGEST) for name, path in program.source.companions().items()}
    for name, data in {**kept, **edited(program)}.items():
        if name != INDEX or shards != []:  # which names files that are not written
            stage.add(folder + name, data)
    measured = link(
        program, stage, folder, shards=shards, workers=workers, watch=watcher(program),
        progress=progress, head=head, device=device,
    )  # fmt: skip
    refuse_changes(program)  # before a proof fails that they explain
    return measured


def manifest(program: Program, kind: str, **more: Any) -> dict[str, Any]:
    """What peftc.json says of a program, but for the files.

    Raises:
        CheckpointError: A file that it was made from has changed meanwhile.
    """
    refuse_changes(program)
    return {
        "peftc": SCHEMA,
        "kind": kind,
        "versions": versions(),
        "source": program.source.pin(),
        "inputs": inputs(program),
        "journal": [vars(entry) for entry in program.journal],
        **more,
    }


def states(program: Program) -> dict[str, State]:
    """Size, times and inode, when it was opened, of every file that the program reads."""

    def leaves(constant: Constant) -> Iterator[Leaf]:
        if isinstance(constant, Leaf):
            yield constant
        elif isinstance(constant, Derived):
            for inner in constant.inputs.values():
                yield from leaves(inner)

    known = {c.ref.states for constant in program.constants.values() for c in leaves(constant)}
    return dict(sorted(state for found in known for state in found))


def inputs(program: Program) -> dict[str, str]:
    """The hash of every file that the program reads beside its source's own: the adapters."""
    files = [file.original.path for file in program.source.layout() if file.original]
    own = {str(path) for file in files for path in (file, file.with_name("config.json"))}
    return {path: digest(Path(path)) for path in states(program) if path not in own}


def folders(program: Program) -> list[Path]:
    """The directories that the program reads."""
    return sorted({Path(path).parent for path in states(program)})
