"""Merging into a quantized base: onto which weights, to what precision, and what is left of it.

There is no one right way. Merged onto the dequantized weights the result is what was trained; onto
the original ones it is off by the quantization's error, but survives being quantized again. So the
way is chosen, named in the output, and what it costs is measured.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

from peftc.constants import Packed
from peftc.contract import Pass
from peftc.errors import PassError
from peftc.four_bit import FourBit
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
    progress: Progress = SILENT,
) -> tuple[Program, dict[str, Any] | None]:
    """Merges every adapter of a program.

    Args:
        program: With adapters.
        base: What to merge into where the weights are in 4 bits: `dequantized`, the values that
            were trained on (the default), or `original`, those before they were quantized.
        then: `none`, plain weights in the dtype of the originals (the default), or `nf4`, 4 bits
            again, in the same format.
        original: The checkpoint with the original weights, where there is one.
        force: Do not refuse to quantize where most of the updates are lost.
        progress: Told of every pass.

    Returns:
        The merged program; and, of a base in 4 bits, the choices and what is left of the updates.

    Raises:
        PassError: The options speak of 4 bits, and the base is not in them.
        ProofError: Most of the updates are lost.
    """
    packed = {
        fqn: constant
        for fqn, site in program.sites.items()
        if isinstance(constant := program.weight_of(site), Packed)
    }
    if not packed:
        if base or then:
            raise PassError(
                "the base is not in 4 bits: there is one way only to merge into it",
                fix="leave out --merge-base and --then; to quantize the result, run "
                "`peftc apply MERGED -o OUT nf4` on it",
            )
        return Pipeline([Merge()]).run(program, progress), None
    chosen: MergeBase = base or "dequantized"
    again = then == "nf4"
    names = [fqn for fqn in packed if not program.sites[fqn].is_plain]
    where = str(original) if chosen == "original" and original else None
    steps: list[Pass] = []
    if not again:
        steps.append(Dequantize(base=chosen, original=where))
    elif chosen == "original":
        steps.append(Dequantize(base=chosen, original=where, targets=names))
    bases = Pipeline(steps).run(program, progress)
    merged = Pipeline([Merge()]).run(bases, progress)
    quantizing = _quantizers({fqn: packed[fqn].format for fqn in names}) if again else []
    written = Pipeline(quantizing).run(merged, progress)
    weights = {fqn: program.sites[fqn].name("weight") for fqn in names}
    progress.stage("measure what is left of the updates")
    report = {
        "base": chosen,
        "then": "nf4" if again else "none",
        "original": None if original is None else str(original),
        **survival(
            {
                fqn: Merging(
                    packed[fqn],
                    bases.constants[weight],
                    merged.constants[weight],
                    written.constants[weight],
                )
                for fqn, weight in weights.items()
            }
        ),
    }
    if again and not force:
        refuse(report, "4 bits")
    return written, report


def _quantizers(formats: dict[str, FourBit]) -> list[Pass]:
    """A pass for each format, over the sites that have it."""
    groups: defaultdict[FourBit, list[str]] = defaultdict(list)
    for fqn, form in formats.items():
        groups[form].append(fqn)
    return [
        Nf4(
            targets=names,
            codebook=form.codebook,
            block_size=form.block_size,
            double_quant=form.nested,
            compute_dtype=form.compute,
        )
        for form, names in groups.items()
    ]
