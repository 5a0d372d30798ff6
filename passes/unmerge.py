"""Unmerging: taking an adapter out of weights that it was merged into."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from peftc.contract import Effect, Pass, PassResult, Place
from peftc.errors import PeftcError
from peftc.passes.attach import Attach
from peftc.passes.merge import Merge

if TYPE_CHECKING:
    from peftc.program import Program


class Unmerge(Pass):
    """Take a merged adapter out of the weights again: W − s·B·A."""

    effect: ClassVar[Effect] = Effect.CHANGES
    positional: ClassVar[str | None] = "path"

    path: Place = Field(description="the adapter's directory, or its id on the hub")
    weight: float = Field(1.0, allow_inf_nan=False, description="the weight it was merged with")

    @property
    def _attach(self) -> Attach:
        return Attach(path=self.path, adapter="unmerge", weight=-self.weight)

    def check(self, program: Program) -> list[PeftcError]:
        return self._attach.check(program)

    def run(self, program: Program) -> PassResult:
        return Merge().run(self._attach.run(program).program)
