"""AdaLoRA: ΔW as P·Λ·Q, whose ranks a budget prunes (Zhang et al. 2023, arXiv:2303.10512, eq. 3).

Here is the parametrization, with E for Λ, A for Q and B for P; the budget is in `budget`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from peftc.contract import Method, trained_biases
from peftc.errors import PassError, PeftcError
from peftc.targets import unbound_patterns

if TYPE_CHECKING:
    from torch import nn

    from peftc.program import Program, Schedule
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
    target_r: int | None = Field(
        None, gt=0, description="mean rank of the sites at the end; default: two thirds of init_r"
    )
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="the branch is scaled by alpha / init_r; "
        "default: init_r"
    )  # fmt: skip
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A, in training")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="which of the base's biases are trained too"
    )
    tinit: int | None = Field(
        None, ge=0, description="steps before ranks are pruned; default: a tenth of all"
    )
    tfinal: int | None = Field(
        None, ge=0, description="steps after the last rank is pruned; default: half of all"
    )
    delta_t: int | None = Field(
        None, gt=0, description="steps between two prunings; default: all steps / 500"
    )
    beta1: float = Field(0.85, gt=0, lt=1, description="smoothing of a rank's sensitivity")
    beta2: float = Field(0.85, gt=0, lt=1, description="smoothing of its uncertainty")
    orth_reg_weight: float = Field(0.5, ge=0, description="weight of A's and B's orthogonality")
    total_step: int | None = Field(
        None, gt=0, description="all steps of the training; default: as many as there are"
    )
    rank_pattern: Annotated[dict[str, list[bool]], BeforeValidator(_modules)] = Field(
        {}, description="which of a module's init_r ranks are left, by its whole name"
    )

    @model_validator(mode="after")
    def _has_time(self) -> Self:
        used = (self.tinit or 0) + (self.tfinal or 0)
        if self.total_step is not None and used >= self.total_step:
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
        errors = [*super().check(program)]
        errors += unbound_patterns("rank pattern", self.rank_pattern, chosen)
        if self.final_r >= self.init_r:
            errors.append(self._nothing_to_prune())
        return errors

    @property
    def final_r(self) -> int:
        """The mean rank of the sites at the end; the paper starts from 1.5 times that."""
        return max(1, self.init_r * 2 // 3) if self.target_r is None else self.target_r

    def _nothing_to_prune(self) -> PeftcError:
        return PassError(
            f"target_r {self.final_r} is not below init_r {self.init_r}: no rank would be pruned",
            fix="raise init_r, or lower target_r; for fixed ranks use lora",
        )

    def _phases(self, total: int) -> tuple[int, int, int]:
        """tinit, tfinal and delta_t of a training of so many steps, about as the paper has them."""
        first = total // 10 if self.tinit is None else self.tinit
        final = total // 2 if self.tfinal is None else self.tfinal
        return first, final, max(1, total // 500) if self.delta_t is None else self.delta_t

    def schedule(self, program: Program, model: nn.Module, total_steps: int) -> Schedule:
        """The orthogonality of A and B, and the budget of ranks.

        Raises:
            PassError: The options leave this training no step to prune in, or the model is not
                this program's.
        """
        from peftc.passes.budget import Budget, RankSchedule

        if not self.rank_pattern and self.final_r >= self.init_r:
            raise self._nothing_to_prune()
        sites = program.adapters[self.adapter].sites
        total = self.total_step or total_steps
        first, final, every = self._phases(total)
        last = total - final
        if total > total_steps or first >= last:
            raise PassError(
                f"its ranks are to be pruned from step {first} to step {last}, and the training "
                f"has {total_steps} steps",
                where=f"adapter {self.adapter}",
                fix="leave out tinit, tfinal and total_step, which then follow from the training, "
                "or train longer",
            )
        start = sum(sum(self.rank_pattern.get(fqn, [True] * self.init_r)) for fqn in sites)
        budget = Budget(start, min(start, self.final_r * len(sites)), first, last, every)
        return RankSchedule(self, model, sites, budget)

    def trains(self, program: Program, sites: list[str]) -> list[str]:
        biases = trained_biases(program, self.bias, sites)
        return list(dict.fromkeys((*super().trains(program, sites), *biases)))

    def peft_config(self) -> dict[str, Any]:
        # PEFT takes no config without a length: one too short for anything stands for none.
        first, final, every = self._phases(self.total_step or 0)
        return {
            **super().peft_config(),
            "target_r": self.final_r,
            "tinit": first,
            "tfinal": final,
            "deltaT": every,
            "total_step": self.total_step or first + final + 1,
            "lora_alpha": self.init_r if self.alpha is None else self.alpha,
            "rank_pattern": {f"{n}.lora_E": k for n, k in self.rank_pattern.items()} or None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        first, last = config.get("tinit") or 0, config.get("tfinal") or 0
        if config.get("total_step") == first + last + 1:  # see `peft_config`
            every = config.get("deltaT", 1)
            config = {
                **config, "total_step": None, "tinit": first or None, "tfinal": last or None,
                "deltaT": None if every == 1 else every,
            }  # fmt: skip
        return super().from_peft(config)
