"""Fusing: a quantized layer and its LoRA as one operator in the live model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peftc.contract import Effect, Pass, PassResult
from peftc.errors import PassError, PeftcError
from peftc.targets import ALL_LINEAR, Targets

if TYPE_CHECKING:
    from peftc.program import Program


class Fuse(Targets, Pass):
    """Compute a 4-bit layer and its LoRA by one operator, with no second pass over the output."""

    effect: ClassVar[Effect] = Effect.EQUAL

    def check(self, program: Program) -> list[PeftcError]:
        chosen, errors = self.pick(program)
        if self.targets == ALL_LINEAR:
            return errors
        fusible = _fusible(program, chosen)
        return errors + [
            PassError(
                "is not in 4 bits with a plain LoRA beside it",
                where=fqn,
                fix="exclude it; a LoRA with dropout is not fused",
            )
            for fqn in chosen
            if fqn not in fusible
        ]

    def run(self, program: Program) -> PassResult:
        chosen, _ = self.pick(program)
        new = _fusible(program, chosen) - program.fused
        if not new:
            return PassResult(program, modified=False)
        fused = program.rewrite(fused=program.fused | new)
        return PassResult(fused, modified=True, measured={"fused": len(new)})


def _fusible(program: Program, names: list[str]) -> set[str]:
    """The sites in which a quantized layer and a LoRA become one node."""
    from peftc.fusing import opened

    return {
        fqn
        for fqn in names
        if any(
            str(node.target) == "peftc.nf4_lora.default"
            for node in opened(program.sites[fqn], program.bindings(program.sites[fqn]), lora=True)[
                0
            ].nodes
        )
    }
