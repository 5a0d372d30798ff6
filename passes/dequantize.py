"""Dequantizing: 4-bit weights as plain ones again, their own values or the original's."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from peftc.contract import Effect, Pass, PassResult, Place
from peftc.errors import PassError, PeftcError
from peftc.targets import ALL_LINEAR, Targets

if TYPE_CHECKING:
    from peftc.constants import Constant
    from peftc.program import Program


class Dequantize(Targets, Pass):
    """Make 4-bit weights plain again: the values that they stand for, or the original ones."""

    effect: ClassVar[Effect] = Effect.EQUAL

    base: Literal["dequantized", "original"] = Field(
        "dequantized",
        description="dequantized, the values that an adapter was trained on, or original, those "
        "before they were quantized",
    )
    original: Place | None = Field(
        None, description="where the original weights are, if they were not quantized just before"
    )

    def declared(self) -> Effect:
        return Effect.EQUAL if self.base == "dequantized" else Effect.BOUNDED

    def pick(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        """The selected sites that are in 4 bits; by default all of them."""
        packed = program.packed
        if self.targets == ALL_LINEAR and not self.exclude and not self.layers:
            return list(packed), []
        chosen, errors = super().pick(program)
        if self.targets != ALL_LINEAR:
            errors += [
                PassError("is not in 4 bits", where=fqn, fix="leave it out")
                for fqn in chosen
                if fqn not in packed
            ]
        return [fqn for fqn in chosen if fqn in packed], errors

    def check(self, program: Program) -> list[PeftcError]:
        chosen, errors = self.pick(program)
        if errors or self.base == "dequantized":
            return errors
        try:
            _, errors = self._originals(program, chosen)
        except PeftcError as error:
            return [error]
        return errors

    def run(self, program: Program) -> PassResult:
        from peftc.constants import Derived

        chosen, _ = self.pick(program)
        if not chosen:
            return PassResult(program, modified=False)
        if self.base == "original":
            plain, _ = self._originals(program, chosen)
        else:
            packed = program.packed
            plain = {
                program.sites[fqn].name("weight"): Derived(c.graph, c.inputs, c.spec)
                for fqn, c in packed.items()
                if fqn in set(chosen)
            }
        return PassResult(program.rewrite(constants=plain), modified=True)

    def _originals(
        self, program: Program, chosen: list[str]
    ) -> tuple[dict[str, Constant], list[PeftcError]]:
        """The weights before they were quantized, and an error for each that is not to be had."""
        from peftc.capturing import capture
        from peftc.four_bit import origin

        other = capture(self.original) if self.original else None
        found: dict[str, Constant] = {}
        errors: list[PeftcError] = []
        for fqn, packed in program.packed.items():
            if fqn not in chosen:
                continue
            name = program.sites[fqn].name("weight")
            original = other.constants.get(name) if other else origin(packed)
            if original is None or original.spec.shape != packed.spec.shape:
                has = "none" if original is None else list(original.spec.shape)
                errors.append(
                    PassError(
                        f"its original is not to be had: {has} in {self.original or 'this model'}, "
                        f"{list(packed.spec.shape)} here",
                        where=name,
                        fix="name the directory of the original weights: --original DIR",
                    )
                )
                continue
            found[name] = original
        return found, errors
