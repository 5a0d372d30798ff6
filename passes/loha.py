"""LoHa: the Hadamard product of two low-rank matrices added to the weight.

Hyeon-Woo et al. 2021, arXiv:2108.06098, prop. 1 (of convolutions, prop. 3), as LyCORIS has it, Yeh
et al. 2023, arXiv:2309.14859, eq. 4: ΔW = s·(w1_a·w1_b) ∘ (w2_a·w2_b).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field

from peftc.contract import Method
from peftc.errors import PassError, PeftcError
from peftc.patterns import pattern_key
from peftc.targets import Pattern, unbound_patterns

if TYPE_CHECKING:
    from torch import fx

    from peftc.constants import Distribution
    from peftc.program import Program
    from peftc.sites import SiteEditor


class Lycoris(Method):
    """Adds a matrix ΔW, made of small ones, to that of the site."""

    peft_fields: ClassVar[Mapping[str, str]] = {
        "r": "rank", "alpha": "alpha", "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern", "use_effective_conv2d": "tucker",
    }  # fmt: skip
    peft_defaults: ClassVar[Mapping[str, Any]] = {"r": 8, "alpha": 8}
    peft_neutral: ClassVar[frozenset[str]] = frozenset(
        {"init_weights", "rank_dropout", "module_dropout", "rank_dropout_scale"}
    )
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})

    rank: int = Field(16, gt=0, description="rank of the small matrices")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="ΔW is scaled by alpha / rank; default: the "
        "rank, a scale of 1"
    )  # fmt: skip
    rank_pattern: dict[Pattern, Annotated[int, Field(gt=0)]] = Field(
        {}, description="ranks by module: q_proj=32"
    )
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        {}, description="alphas by module: q_proj=64"
    )
    tucker: bool = Field(
        False, description="give a convolution's small matrices a core of the kernel's size"
    )

    @abstractmethod
    def delta(self, site: SiteEditor, rank: int) -> fx.Node:
        """What is added to the site's matrix, before it is scaled."""

    def inject(self, site: SiteEditor) -> None:
        fqn = site.site.fqn
        rank = self.rank_pattern.get(pattern_key(self.rank_pattern, fqn) or "", self.rank)
        alpha = self.rank if self.alpha is None else self.alpha
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, fqn) or "", alpha)
        delta = site.mul(self.delta(site, rank), alpha / rank)
        site.add_to_output(site.apply(delta, site.cast_input(delta)))

    def core(self, site: SiteEditor, name: str, rank: int) -> fx.Node | None:
        """A new Tucker core (rank, rank, *kernel); None where a kernel is a point, or none asked.

        PEFT keeps that of one dimension with a second one.
        """
        kernel = site.site.shape[2:]
        if not self.tucker or not kernel or set(kernel) == {1}:
            return None
        return site.parameter(name, (rank, rank, *kernel, 1)[:4], "kaiming_uniform")

    def weighted(self, weight: float) -> Self:
        alpha = (self.rank if self.alpha is None else self.alpha) * weight
        patterns = {key: value * weight for key, value in self.alpha_pattern.items()}
        more = {"alpha": alpha, "alpha_pattern": patterns}
        return self if weight == 1 else self.model_copy(update=more)

    def check(self, program: Program) -> list[PeftcError]:
        chosen = self.pick(program)[0]
        errors = unbound_patterns("rank pattern", self.rank_pattern, chosen)
        return super().check(program) + errors + unbound_patterns(
            "alpha pattern", self.alpha_pattern, chosen)  # fmt: skip

    def unserved(self, program: Program, names: Sequence[str]) -> list[PeftcError]:
        return super().unserved(program, names) + [
            PassError("PEFT serves no convolution of three dimensions", where=fqn, fix="exclude it")
            for fqn in names
            if len(program.sites[fqn].shape) > 4
        ]

    def peft_config(self) -> dict[str, Any]:
        alpha = self.rank if self.alpha is None else self.alpha
        return {**super().peft_config(), "alpha": int(alpha) if alpha == int(alpha) else alpha}


class Loha(Lycoris):
    """Inject Hadamard products of low-rank matrices: y + s·((w1_a·w1_b) ∘ (w2_a·w2_b))·x."""

    peft_type: ClassVar[str | None] = "LOHA"

    def delta(self, site: SiteEditor, rank: int) -> fx.Node:
        first = self.product(site, "1", rank, "kaiming_uniform")
        return site.mul(first, self.product(site, "2", rank, "zeros"))

    def product(self, site: SiteEditor, n: str, rank: int, start: Distribution) -> fx.Node:
        """One low-rank matrix (out, in); a core makes it one for each place of the kernel."""
        from peftc.graphs import aten

        out, *extent = site.site.shape
        core = self.core(site, f"hada_t{n}", rank)
        rows = (rank, out) if core else (out, rank)
        width = extent[0] if core else math.prod(extent)
        a = site.parameter(f"hada_w{n}_a", rows, "kaiming_uniform")
        b = site.parameter(f"hada_w{n}_b", (rank, width), start)
        if core is None:
            return site.mm(a, b)
        return site.flatten(site.op(aten.einsum.default, "ijkl,jr,ip->prkl", [core, b, a]), 1)
