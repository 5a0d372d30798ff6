"""Routing: at each site the input decides how much each of several adapters adds, token by token.

y = y₀ + Σₖ gₖ(x)·(yₖ − y₀) with g = softmax(R·x): Zadouri et al. 2023, arXiv:2309.05444, eq. 3. The
adapters may be of any methods that work on sites; the router R is what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, PrivateAttr

from peftc.contract import Effect, Method, absent
from peftc.errors import PassError, PeftcError, located
from peftc.targets import Names, listed

if TYPE_CHECKING:
    from torch import fx

    from peftc.graphs import Builder
    from peftc.program import Program
    from peftc.sites import SiteEditor


EXPERTS = "experts"


class Router(Method):
    """Weigh attached adapters by the input, token by token, with a trained router at each site."""

    effect: ClassVar[Effect] = Effect.CHANGES
    peft_type: ClassVar[str | None] = "PEFTC_ROUTER"
    peft_fields: ClassVar[Mapping[str, str]] = {
        "experts": "experts", "top": "top", "train_experts": "train_experts",
    }  # fmt: skip
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "convolution", "embedding"})

    adapter: str = Field("router", pattern=r"^[A-Za-z0-9_-]+$", description="the router's name")
    targets: Names = Field(EXPERTS, description=f"where; {EXPERTS}: where several experts are")
    experts: Names | None = Field(
        None, description="the adapters that are weighed, by name; default: all that are attached"
    )
    top: int | None = Field(
        None, gt=0, description="how many of them a token gets at a site; default: all"
    )
    train_experts: bool = Field(False, description="train the experts too")

    _parts: dict[str, tuple[fx.Graph, dict[int, fx.Graph]]] = PrivateAttr(default_factory=dict)

    def inject(self, site: SiteEditor) -> None:
        import torch

        from peftc.graphs import aten
        from peftc.mixing import mixture

        base, experts = self._parts[site.site.fqn]
        dim = site.kind.channels
        router = site.down("router.weight", len(experts))
        logits = site.apply(router, site.cast_input(router))
        weights = site.op(torch.ops.peftc.route.default, logits, self.top, dim)
        order = list(experts)

        def gate(build: Builder, number: int, y: fx.Node) -> fx.Node:
            own = order.index(number)
            return build.op(aten.slice.Tensor, weights, dim, own, own + 1)

        site.y = mixture(site, base, experts, gate)

    def pick(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        at = self._experts_at(program)
        if self.targets == EXPERTS:
            given = self.model_copy(update={"targets": list(at)})
            return super(Router, given).pick(program) if at else ([], self._lonely())
        chosen, errors = super().pick(program)
        errors += [
            PassError(
                "has fewer than two experts, among which nothing is to be weighed",
                where=fqn,
                fix="exclude it, or attach adapters that have this site",
            )
            for fqn in chosen
            if fqn not in at
        ]
        return chosen, errors

    def names(self, program: Program) -> list[str]:
        """The adapters that are weighed."""
        if self.experts is None:
            return [name for name in program.adapters if name != self.adapter]
        return listed(self.experts)

    def _experts_at(self, program: Program) -> dict[str, list[str]]:
        """The experts of each site that has several, in the program's order."""
        known = [program.adapters[n] for n in self.names(program) if n in program.adapters]
        at = {fqn: [a.name for a in known if fqn in a.sites] for fqn in program.sites}
        return {
            fqn: names
            for fqn, names in at.items()
            if len(names) > 1 and program.sites[fqn].kind.name in self.kinds
        }

    def _lonely(self) -> list[PeftcError]:
        return [
            PassError(
                "no site has two experts or more",
                where="experts",
                fix="attach several adapters of the same sites before: Attach(path=…, adapter=…)",
            )
        ]

    def check(self, program: Program) -> list[PeftcError]:
        return self._misnamed(program) or super().check(program)

    def unserved(self, program: Program, names: Sequence[str]) -> list[PeftcError]:
        errors = self._misnamed(program) or super().unserved(program, names)
        if self.top is not None and (at := self._experts_at(program)):
            fewest = min(at, key=lambda fqn: len(at[fqn]))
            if self.top > len(at[fewest]):
                errors.append(
                    PassError(
                        f"has {len(at[fewest])} experts, of which a token cannot get {self.top}",
                        where=fewest,
                        fix="lower top",
                    )
                )
        return errors

    def _misnamed(self, program: Program) -> list[PeftcError]:
        """Experts that are not there, or are none that can be weighed."""
        from peftc.deltas import unstackable

        errors = located(absent(self.names(program), program), "experts")
        for name in self.names(program):
            if name in program.adapters and program.adapters[name].prefixed:
                errors.append(
                    PassError(
                        "puts virtual tokens before a sequence, and adds nothing at a site",
                        where=f"adapter {name}",
                        fix="leave it out: experts=…",
                    )
                )
        return errors or unstackable(program)

    def settled(self, program: Program) -> Self:
        from peftc.deltas import again, alone

        at, mine = self._experts_at(program), self.names(program)
        base = alone(program, [name for name in program.adapters if name not in mine])
        singles = {name: again(base, program, [name]) for name in mine}
        settled = self.model_copy()
        settled._parts = {
            fqn: (
                base.sites[fqn].graph,
                {mine.index(name): singles[name].sites[fqn].graph for name in names},
            )
            for fqn, names in at.items()
        }
        return settled

    def freezes(self, program: Program) -> Sequence[str]:
        return () if self.train_experts else self.names(program)

    def peft_config(self) -> dict[str, Any]:
        return {k: v for k, v in super().peft_config().items() if v is not None}
