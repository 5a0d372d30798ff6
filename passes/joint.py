"""The adapter that several are combined to: a LoRA, or whole matrices where factors are lacking."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peftc.passes.lora import Lora

if TYPE_CHECKING:
    from peftc.constants import Constant
    from peftc.program import Program
    from peftc.sites import SiteEditor


@dataclass(frozen=True)
class Joint:
    """What the new adapter adds to one site.

    Attributes:
        matrix: ΔW.
        factors: B and A, if it is a low-rank one.
        bias: Δb, if there is one.
        deviation: From the exact weighted sum, relative to that.
        truncation: What truncating to a rank left out, relative to the matrix.
    """

    matrix: Constant
    factors: tuple[Constant, Constant] | None
    bias: Constant | None
    deviation: float
    truncation: float | None


class _JointLora(Lora):
    """A LoRA with the scale 1 whose factors or biases may be no more than PEFT's form of it.

    Of a whole matrix one factor is the identity, and is not computed with; where a site has no
    bias, PEFT's is zero. So what has no small factors is written as PEFT's LoRA too, and read.
    """

    whole: bool = False

    def inject(self, site: SiteEditor) -> None:
        a, b = self.factors(site)
        bias = site.parameter("lora_B.bias", (site.out_features,)) if self.lora_bias else None
        bias, x = bias if site.site.bias else None, site.cast_input(a)
        if self.whole:
            matrix = a if self.rank_at(site.site.fqn) == site.out_features else b
            site.add_to_output(site.apply(matrix, x, bias))
        else:
            site.add_to_output(site.mix(site.apply(a, x), b, bias))


def truncated(
    matrix: Constant, factors: tuple[Constant, Constant] | None, rank: int
) -> tuple[tuple[Constant, Constant], float]:
    """The best factors of a rank, and their relative error."""
    from peftc.constants import Held
    from peftc.evaluate import value
    from peftc.kernels.lowrank import of_matrix, of_product

    if factors is not None:
        found = of_product(value(factors[0]), value(factors[1]), rank)
    else:
        found = of_matrix(value(matrix), rank)
    origin = hashlib.sha256(f"{rank} {matrix.key}".encode()).hexdigest()
    up, down = Held(found.up, f"B of {origin}"), Held(found.down, f"A of {origin}")
    return (up, down), found.error


def with_joint(program: Program, name: str, made: Mapping[str, Joint], **beside: Any) -> Program:
    """The program with one adapter more: a LoRA where all sites have factors, else matrices.

    Args:
        program: What carries it then.
        name: Its name.
        made: What it adds to each site.
        beside: Options of a LoRA that say what it trains beside, such as modules_to_save.
    """
    from peftc.factors import peft_parameters, with_identity

    whole = any(joint.factors is None for joint in made.values())
    biased = any(joint.bias is not None for joint in made.values())
    given: dict[str, dict[str, Constant]] = {}
    ranks: dict[str, int] = {}
    for fqn, joint in made.items():
        factors = joint.factors
        if whole or factors is None:
            factors = with_identity(joint.matrix)
        ranks[fqn] = factors[1].spec.shape[-2]
        given[fqn] = peft_parameters(program.sites[fqn], name, factors)
        if biased:
            given[fqn][f"lora_B.{name}.bias"] = joint.bias or _zeros(program, fqn)
    result = program.inject(_method(program, name, ranks, whole, biased, beside), list(made), given)
    adapter = result.adapters[name]
    if whole or biased:  # of these tensors, some only stand in the file
        adapter = replace(adapter, frozen=frozenset(adapter.tensors.values()))
    return replace(result, adapters={**result.adapters, name: adapter})


def in_place_of(
    program: Program, names: Sequence[str], name: str, made: Mapping[str, Joint], **beside: Any
) -> Program:
    """The program with a new adapter where the first of those that it replaces stood.

    One that adds nothing at any site is left out. For `beside` see `with_joint`.
    """
    from peftc.deltas import again, alone

    order = list(program.adapters)
    first = min(map(order.index, names))
    before = [other for other in order[:first] if other not in names]
    after = [other for other in order[first:] if other not in names]
    result = alone(program, before)
    result = again(with_joint(result, name, made, **beside) if made else result, program, after)
    kept = {n: program.adapters[n] for n in (*before, *after)}
    return replace(result, adapters={**result.adapters, **kept})


def _zeros(program: Program, fqn: str) -> Constant:
    import torch

    from peftc.constants import Initial
    from peftc.graphs import Spec

    return Initial(fqn, Spec((program.sites[fqn].out_features,), torch.float32), "zeros")


def _method(
    program: Program,
    name: str,
    ranks: Mapping[str, int],
    whole: bool,
    biased: bool,
    beside: Mapping[str, Any],
) -> Lora:
    """A LoRA with the scale 1 that has these ranks."""
    most = max(ranks.values(), default=1)
    own = {rf"^{re.escape(fqn)}": rank for fqn, rank in ranks.items() if rank != most}
    experts = [fqn for fqn in ranks if program.sites[fqn].kind.name == "experts"]
    options = {
        "adapter": name, "rank": most, "alpha": most, "rank_pattern": own, "alpha_pattern": own,
        "targets": [fqn for fqn in ranks if fqn not in experts], "parameters": experts or None,
        "lora_bias": biased, **beside,
    }  # fmt: skip
    return _JointLora(**options, whole=whole) if whole or biased else Lora(**options)
