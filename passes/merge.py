"""Merging: every adapter folded into the weights, or an error that names what cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peftc.contract import Effect, Pass, PassResult
from peftc.errors import PassError, PeftcError, raise_all

if TYPE_CHECKING:
    from peftc.program import Program


class Merge(Pass):
    """Merge all attached adapters into the weights: W + Σ s·B·A, rounded once."""

    effect: ClassVar[Effect] = Effect.EQUAL

    def check(self, program: Program) -> list[PeftcError]:
        from peftc.algebra import fold_sites

        return [*unmergeable(program), *fold_sites(program)[1]]

    def run(self, program: Program) -> PassResult:
        from peftc.algebra import fold_sites

        merged, errors = fold_sites(program)
        raise_all(errors)
        return PassResult(merged, modified=merged is not program)


def unmergeable(program: Program) -> list[PeftcError]:
    """An error for each adapter that works on no site, and so on nothing that could be folded."""
    return [
        PassError(
            f"the adapter {adapter.name!r} is no change of weights: it puts "
            "virtual tokens before each sequence",
            where=f"adapter {adapter.name}",
            fix="keep it beside the model: leave out --merge, and write it with --format peft",
        )
        for adapter in program.adapters.values()
        if adapter.method is not None and adapter.method.prefixed and not adapter.sites
    ]
