"""Merging: every adapter folded into the weights, or an error that names what cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from peftc.contract import Effect, Pass, PassResult
from peftc.errors import FoldError, PassError, PeftcError, raise_all

if TYPE_CHECKING:
    from peftc.program import Adapter, Program


class Merge(Pass):
    """Merge all attached adapters into the weights: W + Σ s·B·A, rounded once."""

    effect: ClassVar[Effect] = Effect.EQUAL

    keep_virtual: bool = Field(
        False, description="leave a prompt or prefix, which no weight can hold, beside the weights"
    )

    def check(self, program: Program) -> list[PeftcError]:
        from peftc.algebra import fold_sites

        without_sites = [] if self.keep_virtual else unmergeable(program)
        return [*without_sites, *self.left(program, fold_sites(program)[1])]

    def run(self, program: Program) -> PassResult:
        from peftc.algebra import fold_sites

        merged, errors = fold_sites(program, partly=self.keep_virtual)
        raise_all(self.left(program, errors))
        return PassResult(merged, modified=merged is not program)

    def left(self, program: Program, errors: list[FoldError]) -> list[FoldError]:
        """The errors that are none of a prompt that is to be kept."""
        kept = {fqn for a in _virtual(program) for fqn in a.sites} if self.keep_virtual else set()
        return [error for error in errors if error.where not in kept]


def unmergeable(program: Program) -> list[PeftcError]:
    """An error for each adapter that works on no site, and so on nothing that could be folded."""
    return [
        PassError(
            f"the adapter {adapter.name!r} is no change of weights: it puts "
            "virtual tokens before each sequence",
            where=f"adapter {adapter.name}",
            fix="keep it beside the model: write it with --format cache or onnx, or leave out "
            "--merge and write it with --format peft",
        )
        for adapter in _virtual(program)
        if not adapter.sites
    ]


def _virtual(program: Program) -> list[Adapter]:
    """The adapters that put virtual tokens before a sequence."""
    return [adapter for adapter in program.adapters.values() if adapter.prefixed]
