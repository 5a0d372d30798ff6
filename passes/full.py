"""Full fine-tuning of chosen modules, the baseline that every other method is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from peftc.contract import Method
from peftc.errors import PassError, PeftcError
from peftc.targets import ALL_LINEAR, Names, holders

if TYPE_CHECKING:
    from peftc.program import Program
    from peftc.sites import SiteEditor


class Full(Method):
    """Train chosen modules whole, weights and biases; PEFT has no such adapter, peftc reads it."""

    peft_type: ClassVar[str | None] = "FULL"

    targets: Names = Field(
        ALL_LINEAR,
        description="modules that are trained whole, those within them too: names or suffixes "
        "(mlp,lm_head), a regular expression (.* for all), or all-linear",
    )

    def inject(self, site: SiteEditor) -> None:
        """Adds nothing: a module that is trained whole computes what it computed."""

    def own(self, program: Program, modules: list[str]) -> list[str]:
        """The tensors of these modules that are trained."""
        return program.tensors_of(modules)

    def modules(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        """The selected modules, and what matched nothing."""
        return self.select(program, holders(program))

    def pick(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        """No site, for none is rewritten."""
        return [], []

    def trains(self, program: Program, sites: list[str]) -> list[str]:
        own = self.own(program, self.modules(program)[0])
        owners = (program.aliases.get(fqn, fqn) for fqn in own)
        return list(dict.fromkeys((*super().trains(program, sites), *owners)))

    def check(self, program: Program) -> list[PeftcError]:
        modules, errors = self.modules(program)
        errors += super().check(program)
        if not errors and not self.own(program, modules):
            errors.append(
                PassError(
                    f"none of the {len(modules)} modules has what {type(self).__name__} trains",
                    where=", ".join(modules[:3]),
                    fix="choose others as targets, or another method",
                )
            )
        return errors
