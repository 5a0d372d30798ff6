"""Merging into a quantized base: onto which weights, to what precision, and what is left of it.

There is no one right way. Merged onto the dequantized weights the result is what was trained; onto
the original ones it is off by the quantization's error, but survives being quantized again. So the
way is chosen, named in the output, and what it costs is measured.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

from peftc.algebra import fold_sites
from peftc.artifact import MANIFEST, Artifact
from peftc.capturing import CheckpointSource
from peftc.checkpoint import Checkpoint, resolve
from peftc.constants import Packed
from peftc.contract import Effect, Pass
from peftc.errors import PassError, PeftcError
from peftc.four_bit import FourBit, parts_of
from peftc.passes.dequantize import Dequantize
from peftc.passes.merge import Merge
from peftc.passes.nf4 import Nf4
from peftc.pipeline import Pipeline
from peftc.program import Program
from peftc.progress import SILENT, Progress
from peftc.survival import Merging, refuse, survival

MergeBase = Literal["dequantized", "original"]
Then = Literal["none", "nf4"]


def merge(
    program: Program,
    base: MergeBase | None = None,
    then: Then | None = None,
    original: str | Path | None = None,
    force: bool = False,
    keep_virtual: bool = False,
    progress: Progress = SILENT,
) -> tuple[Program, dict[str, Any] | None]:
    """Merges every adapter of a program.

    Args:
        program: With adapters.
        base: What to merge into where the weights are in 4 bits: `dequantized`, the values that
            were trained on (the default), or `original`, those before they were quantized.
        then: `none`, plain weights in the dtype of the originals (the default), or `nf4`, 4 bits
            again, in the same format.
        original: The checkpoint with the original weights; default: see `original_of`.
        force: Do not refuse to quantize where most of the updates are lost.
        keep_virtual: Leave a prompt or prefix, which no weight can hold, as it is.
        progress: Told of every pass.

    Returns:
        The merged program; and, of a base in 4 bits, the choices and what is left of the updates.

    Raises:
        PassError: The options do not go together, or speak of 4 bits and the base is not in them.
        ProofError: Most of the updates are lost.
    """
    folding, packed = Merge(keep_virtual=keep_virtual), program.packed
    if not packed:
        if base or then or original:
            raise PassError(
                "is not in 4 bits: there is one way only to merge into it",
                where=program.source.name,
                fix="leave out --merge-base, --then and --original; to quantize the result, run "
                "`peftc apply MERGED -o OUT nf4` on it",
            )
        return Pipeline([folding]).run(program, progress), None
    chosen: MergeBase = base or "dequantized"
    again = then == "nf4"
    if original and chosen == "dequantized":
        raise PassError(
            "is named, and it is merged into the dequantized weights",
            where=f"--original {original}",
            fix="add --merge-base original, or leave it out",
        )
    original = original or original_of(program)
    names = [fqn for fqn in packed if not program.sites[fqn].is_plain]
    where = str(original) if chosen == "original" and original else None
    if where and _quantized(where):
        raise PassError(
            "holds no original weights: they are in 4 bits",
            where=where,
            fix="name the checkpoint that was quantized: --original DIR",
        )
    steps: list[Pass] = []
    if not again:
        steps.append(Dequantize(base=chosen, original=where))
    elif chosen == "original" and names:
        steps.append(Dequantize(base=chosen, original=where, targets=_only(names)))
    bases = Pipeline(steps).run(program, progress)
    merged = Pipeline([folding]).run(bases, progress)
    weights = {fqn: program.sites[fqn].name("weight") for fqn in names}
    plain = [fqn for fqn in names if not isinstance(merged.constants[weights[fqn]], Packed)]
    quantizing = _quantizers({fqn: packed[fqn].format for fqn in plain}) if again else []
    written = Pipeline(quantizing).run(merged, progress)
    trained, _ = fold_sites(program)
    progress.stage("measure what is left of the updates")
    report = {
        "base": chosen,
        "then": "nf4" if again else "none",
        "original": None if original is None else str(original),
        **survival(
            {
                fqn: Merging(packed[fqn], trained.constants[weight], written.constants[weight])
                for fqn, weight in weights.items()
            }
        ),
    }
    if again and not force:
        refuse(report)
    return written, report


def original_of(program: Program) -> Path | None:
    """The checkpoint whose weights were quantized to a program's.

    Only where peftc did that, had changed nothing else of them before, and they are still there.
    """
    if not isinstance(program.source, CheckpointSource):
        return None
    folder = program.source.checkpoint.path
    home, kind = (folder.parent, "apply") if folder.name == "base" else (folder, "model")
    try:
        content = Artifact.open(home).manifest if (home / MANIFEST).is_file() else {}
        titles = [entry["title"] for entry in content.get("journal", ())]
        if content.get("kind") != kind or "nf4" not in titles:
            return None
        last = max(i for i, title in enumerate(titles) if title == "nf4")
        kept = all(
            entry["title"] == "nf4" or entry["effect"] == Effect.IDENTITY.value
            for entry in content["journal"][:last]
        )
        pin = content["source"]
        same = "path" in pin and Checkpoint.open(pin["path"]).pin() == pin
    except PeftcError:
        return None
    return Path(pin["path"]) if kept and same and not _quantized(pin["path"]) else None


def _quantized(path: str) -> bool:
    """Whether a checkpoint holds weights in 4 bits."""
    return bool(parts_of(Checkpoint.open(resolve(path)).tensors))


def _only(names: list[str]) -> str:
    """An expression for just these sites: a name alone is taken for the end of others too."""
    return f"({'|'.join(map(re.escape, names))})"


def _quantizers(formats: dict[str, FourBit]) -> list[Pass]:
    """A pass for each format, over the sites that have it."""
    groups: defaultdict[FourBit, list[str]] = defaultdict(list)
    for fqn, form in formats.items():
        groups[form].append(fqn)
    return [
        Nf4(
            targets=_only(names),
            codebook=form.codebook,
            block_size=form.block_size,
            double_quant=form.nested,
            compute_dtype=form.compute,
        )
        for form, names in groups.items()
    ]
