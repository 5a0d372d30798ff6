"""VeRA: one frozen random pair A, B for all sites, and two trained vectors at each.

Kopiczko et al. 2023, arXiv:2310.11454, eq. 2: y + λ_b·B(λ_d·A(x)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from peftc.contract import Method, trained_biases

if TYPE_CHECKING:
    from peftc.constants import Constant
    from peftc.program import Program
    from peftc.sites import SiteEditor


class Vera(Method):
    """Inject branches whose A and B are random, frozen and shared; two vectors scale them."""

    peft_type: ClassVar[str | None] = "VERA"
    additive: ClassVar[bool] = True
    peft_fields: ClassVar[Mapping[str, str]] = {
        "r": "rank", "projection_prng_key": "projection_seed", "vera_dropout": "dropout",
        "save_projection": "save_projection", "d_initial": "d_initial", "bias": "bias",
    }  # fmt: skip
    peft_neutral: ClassVar[frozenset[str]] = frozenset({"init_weights"})

    rank: int = Field(256, gt=0, description="rank of A and B; larger than LoRA's")
    projection_seed: int = Field(0, ge=0, description="seed of A and B")
    save_projection: bool = Field(
        True, description="save A and B too, so that no other version of torch draws others"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A, in training")
    d_initial: float = Field(0.1, allow_inf_nan=False, description="start of the vector behind A")
    bias: Literal["none", "all", "vera_only"] = Field(
        "none", description="which of the base's biases are trained too"
    )

    def inject(self, site: SiteEditor) -> None:
        from peftc.graphs import aten

        vector_d = site.parameter("vera_lambda_d", (self.rank,), "full", self.d_initial)
        vector_b = site.parameter("vera_lambda_b", (site.out_features,))
        a, b = (site.share(name, saved=self.save_projection) for name in ("vera_A", "vera_B"))
        a = site.op(aten.slice.Tensor, a, 1, 0, site.in_features)
        b = site.op(aten.slice.Tensor, b, 0, 0, site.out_features)
        x = site.dropout("vera_dropout", self.dropout, site.cast_input(vector_d))
        inner = site.mul(site.apply(a, x), vector_d)
        site.add_to_output(site.mul(site.mix(inner, b), vector_b))

    def common(self, program: Program, sites: Sequence[str]) -> dict[str, Constant]:
        """A and B, as large as the largest site asks, drawn one after the other as by PEFT."""
        import torch

        from peftc.constants import Initial
        from peftc.graphs import Spec

        wide = max((program.sites[fqn].in_features for fqn in sites), default=1)
        high = max((program.sites[fqn].out_features for fqn in sites), default=1)
        found: dict[str, Constant] = {}
        skip = 0
        for name, shape in (("vera_A", (self.rank, wide)), ("vera_B", (high, self.rank))):
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
            spec = Spec(shape, torch.float32)
            found[name] = Initial(name, spec, "stream", self.projection_seed, bound, skip=skip)
            skip += math.prod(shape)
        return found

    def trains(self, program: Program, sites: list[str]) -> list[str]:
        biases = trained_biases(program, self.bias, sites)
        return list(dict.fromkeys((*super().trains(program, sites), *biases)))
