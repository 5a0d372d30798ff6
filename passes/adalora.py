"""AdaLoRA: ΔW as P·Λ·Q, of which ranks can be pruned (Zhang et al. 2023, arXiv:2303.10512, eq. 3).

Here is the parametrization; its budget of ranks is a matter of the training loop.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from peftc.contract import Method, trained_biases
from peftc.errors import PeftcError
from peftc.targets import unbound_patterns

if TYPE_CHECKING:
    from peftc.program import Program
    from peftc.sites import SiteEditor

_EPSILON = 1e-5  # PEFT adds it to the rank that it divides by


def _modules(value: Any) -> Any:
    """PEFT's names of the tensors E, as names of their modules."""
    if not isinstance(value, Mapping):
        return value
    return {re.sub(r"\.lora_E(\.[^.]*)?$", "", str(key)): kept for key, kept in value.items()}


class AdaLora(Method):
    """Inject branches B·diag(E)·A with E zero at the start, whose ranks can be pruned."""

    peft_type: ClassVar[str | None] = "ADALORA"
    additive: ClassVar[bool] = True
    peft_fields: ClassVar[Mapping[str, str]] = {
        "init_r": "init_r", "target_r": "target_r", "lora_alpha": "alpha",
        "lora_dropout": "dropout", "bias": "bias", "rank_pattern": "rank_pattern",
        "tinit": "tinit", "tfinal": "tfinal", "deltaT": "delta_t", "beta1": "beta1",
        "beta2": "beta2", "orth_reg_weight": "orth_reg_weight", "total_step": "total_step",
    }  # fmt: skip
    peft_defaults: ClassVar[Mapping[str, Any]] = {"lora_alpha": 8}
    peft_neutral: ClassVar[frozenset[str]] = frozenset(
        {  # of LoRA's config, which PEFT extends; it reads none of these here
            "alpha_pattern", "corda_config", "eva_config", "init_lora_weights", "lora_bias",
            "loftq_config", "lora_ga_config", "megatron_core", "qalora_group_size", "r",
            "use_rslora",
        }
    )  # fmt: skip
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "convolution"})
    grouped: ClassVar[bool] = False

    init_r: int = Field(12, gt=0, description="rank of each site at the start")
    target_r: int = Field(8, gt=0, description="mean rank of the sites at the end")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="the branch is scaled by alpha / init_r; "
        "default: init_r"
    )  # fmt: skip
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A, in training")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="which of the base's biases are trained too"
    )
    tinit: int = Field(0, ge=0, description="steps before ranks are pruned")
    tfinal: int = Field(0, ge=0, description="steps after the last rank is pruned")
    delta_t: int = Field(1, gt=0, description="steps between two prunings")
    beta1: float = Field(0.85, gt=0, lt=1, description="smoothing of a rank's sensitivity")
    beta2: float = Field(0.85, gt=0, lt=1, description="smoothing of its uncertainty")
    orth_reg_weight: float = Field(0.5, ge=0, description="weight of A's and B's orthogonality")
    total_step: int = Field(1000, gt=0, description="all steps of the training")
    rank_pattern: Annotated[dict[str, list[bool]], BeforeValidator(_modules)] = Field(
        {}, description="which of a module's init_r ranks are left, by its whole name"
    )

    @model_validator(mode="after")
    def _has_time(self) -> Self:
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError("tinit and tfinal leave no step of total_step for pruning")
        for name, kept in self.rank_pattern.items():
            if len(kept) != self.init_r:
                raise ValueError(f"rank_pattern of {name}: {len(kept)} for {self.init_r} ranks")
        return self

    def inject(self, site: SiteEditor) -> None:
        rank = sum(self.rank_pattern.get(site.site.fqn, [True] * self.init_r))
        width = math.prod(site.kind.down(1, site.site.shape))
        a = site.parameter("lora_A", (rank, width), "gaussian", 0.02)
        b = site.parameter("lora_B", (site.out_features, rank), "gaussian", 0.02)
        e = site.parameter("lora_E", (rank, 1))
        x = site.dropout("lora_dropout", self.dropout, site.cast_input(a))
        branch = site.mix(site.apply(site.mul(a, e), x), b)
        alpha = self.init_r if self.alpha is None else self.alpha
        site.add_to_output(site.mul(branch, alpha / (self.init_r + _EPSILON)))

    def check(self, program: Program) -> list[PeftcError]:
        chosen = self.pick(program)[0]
        unbound = unbound_patterns("rank pattern", self.rank_pattern, chosen)
        return [*super().check(program), *unbound]

    def trains(self, program: Program, sites: list[str]) -> list[str]:
        biases = trained_biases(program, self.bias, sites)
        return list(dict.fromkeys((*super().trains(program, sites), *biases)))

    def peft_config(self) -> dict[str, Any]:
        return {
            **super().peft_config(),
            "lora_alpha": self.init_r if self.alpha is None else self.alpha,
            "rank_pattern": {f"{n}.lora_E": k for n, k in self.rank_pattern.items()} or None,
        }
