"""LoRA: a low-rank branch beside a linear layer (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from peftc.contract import ALL_KINDS, AdapterName, Effect, Method, trained_biases
from peftc.errors import AdapterError, PassError, PeftcError, did_you_mean
from peftc.passes.tokens import Ids, replace_rows, with_tied
from peftc.patterns import pattern_key
from peftc.targets import LINEARS, Names, Pattern, Targets, unbound_patterns

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
        "trainable_token_indices": "tokens", "share_a": "share_a",
    }  # fmt: skip
    peft_defaults: ClassVar[Mapping[str, Any]] = {"r": 8, "lora_alpha": 8}
    peft_neutral: ClassVar[frozenset[str]] = frozenset(
        {
            "corda_config", "eva_config", "init_lora_weights", "layer_replication", "loftq_config",
            "lora_ga_config",
            "megatron_core", "qalora_group_size",
        }
    )  # fmt: skip
    kinds: ClassVar[frozenset[str]] = ALL_KINDS
    grouped: ClassVar[bool] = False

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
    init: str = Field(
        "kaiming",
        pattern=r"^(kaiming|gaussian|pissa|pissa_niter_\d{1,3}|olora)$",
        description="A's start: kaiming (uniform, a = √5) or gaussian (deviation 1/rank), with B "
        "zero; or a part of the weight, which it loses: pissa, pissa_niter_N (quicker), olora",
    )
    rank_pattern: dict[Pattern, Annotated[int, Field(gt=0)]] = Field(
        {}, description="ranks by module: q_proj=32"
    )
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        {}, description="alphas by module: q_proj=64"
    )

    share_a: AdapterName | None = Field(
        None,
        description="the adapter whose A is this one's too: a B for each task, and one A that all "
        "of them train (arXiv:2404.19245)",
    )

    parameters: Names | None = Field(
        None,
        description="parameters of fused experts, beside targets: mlp.experts.gate_up_proj",
    )

    tokens: dict[str, Ids] = Field(
        {}, description="ids whose embeddings are trained too, by module: embed_tokens=32000"
    )

    _rows: dict[str, list[int]] = PrivateAttr(default_factory=dict)

    def inject(self, site: SiteEditor) -> None:
        if ids := self.tokens_at(site.site.fqn):
            replace_rows(site, "token_adapter.trainable_tokens_delta", ids)
            return
        a, b = self.factors(site)
        if self.share_a is not None:
            embedding = site.kind.name == "embedding"
            site.tie("lora_embedding_A" if embedding else "lora_A.weight", self.share_a)
        bias = site.parameter("lora_B.bias", (site.out_features,)) if self.lora_bias else None
        x = site.cast_input(a)
        if site.kind.name != "embedding":  # ids are not dropped
            x = site.dropout("lora_dropout", self.dropout, x)
        branch = site.mix(site.apply(a, x), b, bias)
        site.add_to_output(site.mul(branch, self.scale_at(site.site.fqn)))

    def factors(self, site: SiteEditor) -> tuple[fx.Node, fx.Node]:
        """A and B as matrices (rank, in) and (out, rank); PEFT names an embedding's its own way."""
        rank = self.rank_at(site.site.fqn)
        if site.kind.name == "embedding":
            b = site.up("lora_embedding_B", rank, "gaussian")
            return site.down("lora_embedding_A", rank), b
        if self.moves_base and site.given is None:
            from peftc.passes.starts import take

            starts = take(site, self.init, rank, self.scale_at(site.site.fqn))
            names = ("lora_A.weight", "lora_B.weight")
            a, b = (
                site.parameter(n, s.spec.shape, start=s) for n, s in zip(names, starts, strict=True)
            )
            return a, b
        start = ("kaiming_uniform", 1.0) if self.init == "kaiming" else ("gaussian", 1 / rank)
        a = site.down("lora_A.weight", rank, *start)  # type: ignore[arg-type]
        return a, site.up("lora_B.weight", rank)

    def pick(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        further = [Targets(targets=list(self.tokens))] if self.tokens else []
        if self.parameters:
            more = {"exclude": self.exclude, "layers": self.layers}
            further.append(Targets(targets=self.parameters, **more))
        chosen, errors = super().pick(program) if self.targets or not further else ([], [])
        for targets in further:
            found, wrong = targets.pick(program)
            chosen, errors = [*chosen, *with_tied(program, found)], [*errors, *wrong]
        return [fqn for fqn in program.sites if fqn in set(chosen)], errors

    def settled(self, program: Program) -> Self:
        heads = {
            tied: ids
            for pattern, ids in self.tokens.items()
            for tied in with_tied(program, Targets(targets=[pattern]).pick(program)[0])
        }
        settled = self.model_copy()
        settled._rows = heads
        return settled

    def tokens_at(self, fqn: str) -> list[int]:
        """The ids whose rows are trained at one site."""
        return self._rows.get(fqn, [])

    @property
    def moves_base(self) -> bool:
        """Whether A and B start as a part of the weight, which is taken from it."""
        return self.init not in ("kaiming", "gaussian")

    def declared(self) -> Effect:
        return Effect.EQUAL if self.moves_base else self.effect

    def unserved(self, program: Program, names: Sequence[str]) -> list[PeftcError]:
        errors = super().unserved(program, names)
        if not self.moves_base:
            return errors
        return errors + [
            PassError(
                f"{self.init} needs a linear layer, and this is a {program.sites[fqn].kind.name}",
                where=fqn,
                fix="exclude it",
            )
            for fqn in names
            if program.sites[fqn].kind.name not in LINEARS
        ]

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
            smaller = min(math.prod(site.kind.down(1, site.shape)[1:]), site.out_features)
            if self.rank_at(fqn) > smaller:
                errors.append(
                    PassError(
                        f"rank {self.rank_at(fqn)} is above the smaller dimension, {smaller}",
                        where=fqn,
                        fix="lower the rank, or give this layer its own by rank_pattern",
                    )
                )
        return errors + self._unshared(program, chosen)

    def _unshared(self, program: Program, chosen: list[str]) -> list[PeftcError]:
        """What keeps this adapter from having the A of another."""
        if self.share_a is None:
            return []
        if self.moves_base:
            return [PassError(f"{self.init} starts A anew", where="share_a", fix="leave out init")]
        other = program.adapters.get(self.share_a)
        if other is None or not isinstance(other.method, Lora):
            return [
                PassError(
                    f"there is no LoRA named {self.share_a!r} to share A with",
                    where="share_a",
                    fix=did_you_mean(self.share_a, program.adapters)
                    if program.adapters
                    else f"put one before: lora --adapter {self.share_a}",
                )
            ]
        errors: list[PeftcError] = [
            PassError(
                f"{self.share_a!r} has no A of rank {self.rank_at(fqn)} here",
                where=fqn,
                fix="give both adapters the same targets and ranks",
            )
            for fqn in chosen
            if fqn not in other.sites or other.method.rank_at(fqn) != self.rank_at(fqn)
        ]
        return errors[:1]

    def trains(self, program: Program, sites: list[str]) -> list[str]:
        biases = trained_biases(program, self.bias, sites)
        return list(dict.fromkeys((*super().trains(program, sites), *biases)))

    def peft_config(self) -> dict[str, Any]:
        alpha = self.alpha if self.alpha is not None else self.rank
        config = super().peft_config()
        if self.share_a is None:
            del config["share_a"]  # which PEFT does not have
        return {
            **config,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "init_lora_weights": "gaussian" if self.init == "gaussian" else True,
            "trainable_token_indices": dict(self.tokens) or None,
        }

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return super().reads(config) and not config.get("use_dora")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        start = str(config.get("init_lora_weights", True)).lower()
        if start not in _STARTS:
            raise AdapterError(
                f"the adapter was started by {start!r}, which changed the base's weights too",
                fix="save it with PEFT's path_initial_model_for_weight_conversion",
            )
        if isinstance(rows := config.get("trainable_token_indices"), list):
            config = {**config, "trainable_token_indices": {"embed_tokens": rows}}
        return super().from_peft(config)
