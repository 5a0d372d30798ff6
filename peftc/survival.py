"""Survival: how much of an update is left after the weights it was merged into were quantized.

A dequantized weight lies on the codebook's points, and an update smaller than half the way to the
next one snaps back when it is quantized again. So per site, where D is the quantized base that was
trained on, T what training made of it, and F the weight as written: the share of the update
Δ = T − D that is left, ⟨F − D, Δ⟩ / ⟨Δ, Δ⟩; and the error against what was trained, ‖F − T‖ / ‖T‖,
which is that of the output on white input.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from peftc.constants import Constant, Packed
from peftc.errors import ProofError
from peftc.evaluate import Evaluation, chunks, single_threaded
from peftc.graphs import Builder, intern

LEAST = 0.5  # of an update, below which an export is refused
_SHOWN = 5


@dataclass(frozen=True)
class Merging:
    """The forms of one weight on its way.

    Attributes:
        base: D, that the adapter was trained on, as it is dequantized.
        trained: T, that with the update, neither rounded nor quantized.
        written: F, as it is written.
    """

    base: Constant
    trained: Constant
    written: Constant


def survival(mergings: Mapping[str, Merging]) -> dict[str, Any]:
    """What is left of the updates, per site and over all.

    Returns:
        `share` and `output_error` over all sites, and `sites` with each one's.
    """
    with single_threaded(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        sums = dict(zip(mergings, pool.map(_sums, mergings.values()), strict=True))
    whole = sum(sums.values(), torch.zeros(4))
    return {**_figures(whole), "sites": {fqn: _figures(found) for fqn, found in sums.items()}}


def _figures(sums: torch.Tensor) -> dict[str, float]:
    kept, update, error, trained = sums.tolist()
    return {
        "share": kept / update if update else 1.0,
        "relative_update": (update / trained) ** 0.5 if trained else 0.0,
        "output_error": (error / trained) ** 0.5 if trained else 0.0,
    }


def _sums(merging: Merging) -> torch.Tensor:
    """⟨F − D, Δ⟩, ⟨Δ, Δ⟩, ‖F − T‖² and ‖T‖², in fp64."""
    sums = torch.zeros(4, dtype=torch.float64)
    forms = {name: _evaluation(constant) for name, constant in vars(merging).items()}
    packed, dtype = isinstance(merging.written, Packed), merging.written.spec.dtype
    for low, high in chunks(merging.base.spec.shape):
        base, trained, written = (form.rows(low, high).double() for form in forms.values())
        written = written if packed else written.to(dtype).double()
        update, lost = trained - base, written - trained
        pairs = (written - base, update), (update, update), (lost, lost), (trained, trained)
        sums += torch.stack([(a * b).sum() for a, b in pairs])
    return sums


def _evaluation(constant: Constant) -> Evaluation:
    build = Builder()
    build.graph.output(build.const("value"))
    return Evaluation(intern(build.graph), {"value": constant})


def refuse(report: Mapping[str, Any]) -> None:
    """Raises where most of the updates died.

    Raises:
        ProofError: It names what would keep them.
    """
    if report["share"] >= LEAST:
        return
    worst = sorted(report["sites"].items(), key=lambda item: item[1]["share"])[:_SHOWN]
    named = ", ".join(f"{fqn} {figures['share']:.0%}" for fqn, figures in worst)
    raise ProofError(
        f"only {report['share']:.0%} of what was trained is left after quantizing to 4 bits again "
        f"(at least: {named}); the update is {report['relative_update']:.1%} of the weights, less "
        "than a code's step",
        where="--then nf4",
        fix="write 16 bits (--then none), quantize from the original weights (--merge-base "
        "original), keep the branch as an adapter (no --merge, --format peft), or --force",
    )
