"""Folding: sites whose output is affine in their input become one linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peftc.contract import Effect, Pass, PassResult

if TYPE_CHECKING:
    from peftc.program import Program


class Fold(Pass):
    """Fold every site that is affine in its input, and of the others the parts that are."""

    effect: ClassVar[Effect] = Effect.EQUAL

    def run(self, program: Program) -> PassResult:
        from peftc.algebra import fold_sites

        folded, left = fold_sites(program, partly=True)
        kept = {str(error.where): error.what for error in left}
        measured = {"kept": kept} if kept else {}
        return PassResult(folded, modified=folded is not program, measured=measured)
