"""LayerNorm tuning: only normalizations are trained (Zhao et al. 2023, arXiv:2312.11420, §2.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from peftc.errors import PeftcError
from peftc.passes.full import Full
from peftc.targets import Names

if TYPE_CHECKING:
    from peftc.program import Program

ALL_NORMS = ["all-norms"]


class LayerNorm(Full):
    """Train the model's normalizations, their weights and biases, and nothing else."""

    peft_type: ClassVar[str | None] = "LN_TUNING"

    targets: Names = Field(
        ALL_NORMS,
        description="modules that are trained whole, named or by a regular expression, or "
        "all-norms: every module whose weight is a vector",
    )

    def modules(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        if self.targets != ALL_NORMS:
            return super().modules(program)
        known = program.constants.items()
        vectors = {f.removesuffix(".weight") for f, c in known if len(c.spec.shape) == 1}
        norms = self.model_copy(update={"targets": ".*"})
        chosen, errors = super(LayerNorm, norms).modules(program)
        return [module for module in chosen if module in vectors], errors

    def infix(self, program: Program, fqn: str) -> str:
        whole = program.tensors_of(self.saved(program)[0])
        return "" if fqn in whole else "ln_tuning_layers."
