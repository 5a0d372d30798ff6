"""Exports that write nothing: all is checked and counted as far as can be before the first byte."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftc.api import prepare
from peftc.artifact import obstacles
from peftc.constants import Leaf
from peftc.errors import raise_all
from peftc.exporters.to_safetensors import folders, refuse_adapters
from peftc.link import plan
from peftc.merging import MergeBase, Then
from peftc.progress import SILENT, Progress


def dry_run(
    source: str | Path,
    target: str | Path,
    *,
    merge: bool = False,
    adapters: Sequence[tuple[str, float]] = (),
    merge_base: MergeBase | None = None,
    then: Then | None = None,
    original: str | Path | None = None,
    force: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Does all of an export to safetensors that comes before its first byte.

    Adapters are attached and merged, and each pass is checked on some features of every site that
    it changed. What only the writing finds is an error of the disk, or a NaN in other rows. The
    arguments are as for `api.export`.

    Returns:
        "files" and their "bytes"; how many "tensors" they hold, and of how many and of how many
        bytes the values are "computed" (the others are copied); the bytes "free" on the disk, and
        whether it "fits"; what the passes measured, as "journal"; and of a base in 4 bits what
        "merge" measured.

    Raises:
        PeftcError: As for an export, but for a disk that is too small, which is told.
    """
    program, report = prepare(
        source, merge, adapters, merge_base, then, original, force, progress=progress
    )
    refuse_adapters(program, target)
    progress.stage("plan")
    target, shards = Path(target).absolute(), plan(program)
    need = sum(shard.size for shard in shards)
    raise_all(obstacles(target, 0, folders(program), overwrite))
    entries = [entry for shard in shards for entry in shard.entries]
    computed = [entry for entry in entries if not isinstance(entry.constant, Leaf)]
    anchor = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(anchor).free
    return {
        "path": str(target),
        "files": len(shards),
        "bytes": need,
        "tensors": len(entries),
        "computed": {"tensors": len(computed), "bytes": sum(entry.nbytes for entry in computed)},
        "free": free,
        "fits": need <= free,
        "journal": [vars(entry) for entry in program.journal],
        **({"merge": report} if report else {}),
    }
