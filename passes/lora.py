"""LoRA: a low-rank branch beside a linear layer (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from peftc.contract import ALL_KINDS, Method
from peftc.errors import AdapterError, PassError, PeftcError
from peftc.targets import Names, Pattern, Targets, pattern_key, unbound_patterns

if TYPE_CHECKING:
    from torch import fx

    from peftc.program import Program
    from peftc.sites import SiteEditor

# Starts that do not touch the base's weights; the others subtract what they took from it.
_STARTS = {"true", "false", "gaussian", "eva", "orthogonal", "none"}


class Lora(Method):
    """Inject low-rank branches: y + s·B(A(dropout(x))), with B zero at the start."""

    peft_type: ClassVar[str | None] = "LORA"
    peft_fields: ClassVar[Mapping[str, str]] = {
        "r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern", "lora_dropout": "dropout", "bias": "bias",
        "lora_bias": "lora_bias", "target_parameters": "parameters",
    }  # fmt: skip
    peft_defaults: ClassVar[Mapping[str, Any]] = {"r": 8, "lora_alpha": 8}
    peft_neutral: ClassVar[frozenset[str]] = frozenset(
        {
            "corda_config", "eva_config", "init_lora_weights", "loftq_config", "lora_ga_config",
            "megatron_core", "qalora_group_size",
        }
    )  # fmt: skip
    kinds: ClassVar[frozenset[str]] = ALL_KINDS

    rank: int = Field(16, gt=0, description="rank of A and B")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="the branch is scaled by alpha / rank; "
        "default: the rank, a scale of 1"
    )  # fmt: skip
    rslora: bool = Field(False, description="scale by alpha / √rank instead (arXiv:2312.03732)")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A, in training")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="which of the base's biases are trained too"
    )
    lora_bias: bool = Field(False, description="give B a bias")
    init: Literal["kaiming", "gaussian"] = Field(
        "kaiming",
        description="A's start: uniform (Kaiming, a = √5) or normal with deviation 1/rank",
    )
    rank_pattern: dict[Pattern, Annotated[int, Field(gt=0)]] = Field(
        {}, description="ranks by module: q_proj=32"
    )
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        {}, description="alphas by module: q_proj=64"
    )

    parameters: Names | None = Field(
        None,
        description="parameters of fused experts, beside targets: mlp.experts.gate_up_proj",
    )

    def inject(self, site: SiteEditor) -> None:
        a, b = self.factors(site)
        bias = site.parameter("lora_B.bias", (site.out_features,)) if self.lora_bias else None
        x = site.dropout("lora_dropout", self.dropout, site.cast_input(a))
        branch = site.mix(site.apply(a, x), b, bias)
        site.add_to_output(site.mul(branch, self.scale_at(site.site.fqn)))

    def factors(self, site: SiteEditor) -> tuple[fx.Node, fx.Node]:
        """A and B as matrices (rank, in) and (out, rank); PEFT names an embedding's its own way."""
        rank = self.rank_at(site.site.fqn)
        if site.kind.name == "embedding":
            b = site.up("lora_embedding_B", rank, "gaussian")
            return site.down("lora_embedding_A", rank), b
        start = ("kaiming_uniform", 1.0) if self.init == "kaiming" else ("gaussian", 1 / rank)
        a = site.down("lora_A.weight", rank, *start)  # type: ignore[arg-type]
        return a, site.up("lora_B.weight", rank)

    def pick(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        if not self.parameters:
            return super().pick(program)
        experts = Targets(
            targets=self.parameters,
            exclude=self.exclude, layers=self.layers, layers_pattern=self.layers_pattern,
        )  # fmt: skip
        chosen, errors = experts.pick(program)
        if self.targets:
            others, more = super().pick(program)
            chosen, errors = [*others, *chosen], [*errors, *more]
        return [fqn for fqn in program.sites if fqn in set(chosen)], errors

    def rank_at(self, fqn: str) -> int:
        """The rank at one site."""
        key = pattern_key(self.rank_pattern, fqn)
        return self.rank if key is None else self.rank_pattern[key]

    def scale_at(self, fqn: str) -> float:
        """What the branch is multiplied by at one site."""
        key, rank = pattern_key(self.alpha_pattern, fqn), self.rank_at(fqn)
        alpha = self.alpha if self.alpha is not None else self.rank
        alpha = alpha if key is None else self.alpha_pattern[key]
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def weighted(self, weight: float) -> Self:
        if weight == 1:
            return self
        alpha = self.alpha if self.alpha is not None else self.rank
        patterns = {key: value * weight for key, value in self.alpha_pattern.items()}
        return self.model_copy(update={"alpha": alpha * weight, "alpha_pattern": patterns})

    def check(self, program: Program) -> list[PeftcError]:
        errors = super().check(program)
        chosen, _ = self.pick(program)
        errors += unbound_patterns("rank pattern", self.rank_pattern, chosen)
        errors += unbound_patterns("alpha pattern", self.alpha_pattern, chosen)
        for fqn in chosen:
            site = program.sites[fqn]
            smaller = min(site.in_features, site.out_features)
            if self.rank_at(fqn) > smaller:
                errors.append(
                    PassError(
                        f"rank {self.rank_at(fqn)} is above the smaller dimension, {smaller}",
                        where=fqn,
                        fix="lower the rank, or give this layer its own by rank_pattern",
                    )
                )
        return errors

    def trains(self, program: Program, sites: list[str]) -> list[str]:
        whole = super().trains(program, sites)
        known = program.stored.values()
        if self.bias == "none":
            return whole
        own = {f"{fqn}.bias" for fqn in sites} if self.bias == "lora_only" else None
        biases = [f for f in known if f.endswith(".bias") and (own is None or f in own)]
        return list(dict.fromkeys((*whole, *biases)))

    def peft_config(self) -> dict[str, Any]:
        alpha = self.alpha if self.alpha is not None else self.rank
        return {
            **super().peft_config(),
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "init_lora_weights": True if self.init == "kaiming" else "gaussian",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        start = str(config.get("init_lora_weights", True)).lower()
        if start not in _STARTS:
            raise AdapterError(
                f"the adapter was started by {start!r}, which changed the base's weights too",
                fix="save it with PEFT's path_initial_model_for_weight_conversion",
            )
        return super().from_peft(config)
