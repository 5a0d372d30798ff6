"""BitFit: only biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199, §3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from peftc.passes.full import Full
from peftc.targets import Names

if TYPE_CHECKING:
    from peftc.program import Program


class BitFit(Full):
    """Train biases and nothing else; PEFT has no such adapter, peftc reads it."""

    peft_type: ClassVar[str | None] = "BITFIT"

    targets: Names = Field(
        ".*",
        description="modules whose biases are trained, those within them too: names or suffixes "
        "(query,dense), a regular expression, or all-linear; default: all",
    )

    def own(self, program: Program, modules: list[str]) -> list[str]:
        # Those of experts and state spaces are parameters beside others: down_proj_bias, dt_bias.
        found = [f for f in program.tensors_of(modules) if f.endswith("bias")]
        if all(f.endswith(".bias") for f in found):
            return found
        # A router's is set by no gradient: a buffer.
        buffers = {name for name, _ in program.source.skeleton().named_buffers()}
        return [f for f in found if f not in buffers]
