"""LoRA: a low-rank branch beside a linear layer (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from peftc.contract import Method
from peftc.errors import AdapterError, PassError, PeftcError
from peftc.targets import Pattern, pattern_key, unbound_patterns

if TYPE_CHECKING:
    from peftc.program import Program
    from peftc.sites import SiteEditor

# Keys of PEFT's LoraConfig that do not change what a trained adapter computes.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
_FIELDS = {
    "r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "exclude_modules": "exclude",
    "layers_to_transform": "layers", "layers_pattern": "layers_pattern", "use_rslora": "rslora",
    "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern", "lora_dropout": "dropout",
    "bias": "bias", "lora_bias": "lora_bias",
}  # fmt: skip
# Starts that do not touch the base's weights; the others subtract what they took from it.
_STARTS = {"true", "false", "gaussian", "eva", "orthogonal", "none"}


class Lora(Method):
    """Inject low-rank branches: y + s·B(A(dropout(x))), with B zero at the start."""

    peft_type: ClassVar[str | None] = "LORA"

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

    def inject(self, site: SiteEditor) -> None:
        rank = self.rank_at(site.site.fqn)
        start = ("kaiming_uniform", 1.0) if self.init == "kaiming" else ("gaussian", 1 / rank)
        a = site.parameter("lora_A.weight", (rank, site.site.in_features), *start)  # type: ignore[arg-type]
        b = site.parameter("lora_B.weight", (site.site.out_features, rank))
        bias = site.parameter("lora_B.bias", (site.site.out_features,)) if self.lora_bias else None
        x = site.dropout("lora_dropout", self.dropout, site.type_as(site.x, a))
        branch = site.linear(site.linear(x, a), b, bias)
        site.add_to_output(site.mul(branch, self.scale_at(site.site.fqn)))

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

    def trainable_biases(self, program: Program, sites: list[str]) -> list[str]:
        if self.bias == "none":
            return []
        known = set(program.stored.values())
        if self.bias == "lora_only":
            return [f"{fqn}.bias" for fqn in sites if f"{fqn}.bias" in known]
        return [fqn for fqn in program.stored.values() if fqn.endswith(".bias")]

    def peft_config(self) -> dict[str, Any]:
        alpha = self.alpha if self.alpha is not None else self.rank
        return {
            "peft_type": self.peft_type,
            "r": self.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "bias": self.bias,
            "lora_bias": self.lora_bias,
            "init_lora_weights": True if self.init == "kaiming" else "gaussian",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        unknown = sorted(k for k, v in config.items() if v and k not in _NEUTRAL | set(_FIELDS))
        if unknown:
            raise AdapterError(
                f"the adapter uses {', '.join(unknown)}, which peftc cannot attach yet",
                fix="merge it with PEFT",
            )
        start = str(config.get("init_lora_weights", True)).lower()
        if start not in _STARTS:
            raise AdapterError(
                f"the adapter was started by {start!r}, which changed the base's weights too",
                fix="save it with PEFT's path_initial_model_for_weight_conversion",
            )
        # PEFT's own defaults stand for keys that a file leaves out.
        given = {"r": 8, "lora_alpha": 8, **{k: v for k, v in config.items() if v is not None}}
        pattern = given.get("layers_pattern")
        if isinstance(pattern, list):
            given["layers_pattern"] = "|".join(pattern) or None
        return cls(**{name: given[key] for key, name in _FIELDS.items() if key in given})
