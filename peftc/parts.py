"""An export in parts, by processes that share nothing but a disk: any scheduler can run them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftc.api import prepare
from peftc.artifact import Artifact
from peftc.devices import device_of
from peftc.errors import CheckpointError
from peftc.exporters.in_parts import Part, gathered, published, write_part
from peftc.exporters.to_safetensors import key_for, to_safetensors
from peftc.merging import MergeBase, Then
from peftc.progress import SILENT, Progress
from peftc.proof import Extent


def export_part(
    source: str | Path,
    target: str | Path,
    shards: str,
    *,
    merge: bool = False,
    adapters: Sequence[tuple[str, float]] = (),
    merge_base: MergeBase | None = None,
    then: Then | None = None,
    original: str | Path | None = None,
    force: bool = False,
    proof: Extent = "auto",
    overwrite: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Writes a share of an export's files beside the target; `finish` publishes all of them.

    `shards` says which share: `2/4` is the second of four. All else is as for `api.export`, and the
    same in every part.

    Returns:
        The part's directory, its files and their bytes.

    Raises:
        PeftcError: As for an export.
    """
    part = Part.parse(shards)
    device_of(device)
    arguments: dict[str, Any] = {
        "source": _absolute(source),
        "merge": merge,
        "adapters": [(_absolute(folder), weight) for folder, weight in adapters],
        "merge_base": merge_base,
        "then": then,
        "original": None if original is None else _absolute(original),
        "force": force,
    }
    program, _ = prepare(**arguments, progress=progress)
    return write_part(
        program, target, part, arguments, overwrite=overwrite, proof=proof, workers=workers,
        progress=progress, device=device,
    )  # fmt: skip


def finish(
    target: str | Path, *, workers: int | None = None, progress: Progress = SILENT
) -> Artifact:
    """Publishes an export all of whose parts are written.

    Raises:
        ArtifactError: Parts are missing, unfinished, at work, or not of one export.
        CheckpointError: What they were made from has changed.
        ProofError: What they wrote is not equal to what it came from.
    """
    target = Path(target)
    if published(target):
        return Artifact.open(target)
    with gathered(target) as parts:
        program, report = prepare(**parts.arguments, progress=progress)
        if key_for(program, parts.proof) != parts.key:
            raise CheckpointError(
                "the files that its parts were made from have changed, or peftc has",
                where=str(target),
                fix="write all parts again",
            )
        artifact = to_safetensors(
            program, target, overwrite=parts.overwrite, proof=parts.proof, workers=workers,
            progress=progress, remarks={"merge": report} if report else {},
        )  # fmt: skip
        parts.remove()
    return artifact


def _absolute(source: str | Path) -> str:
    """A place that holds in other folders too; a hub id is left as it is."""
    return str(Path(source).absolute()) if Path(source).exists() else str(source)
