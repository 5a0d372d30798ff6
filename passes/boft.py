"""BOFT: the input rotated by orthogonal blocks, the output scaled (arXiv:2311.06243, eq. 5).

Liu et al. 2023. Of its butterfly factors there is one, as in PEFT wherever its CUDA extension is
not compiled: PEFT sets `boft_n_butterfly_factor` to 1 then, whatever the config says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftc.errors import PassError, PeftcError
from peftc.passes.oft import Rotation, rotate_input

if TYPE_CHECKING:
    from torch import fx

    from peftc.program import Program
    from peftc.sites import SiteEditor


class Boft(Rotation):
    """Inject orthogonal blocks that rotate the input, and scale the output: s·(W·R·x) + b."""

    peft_type: ClassVar[str | None] = "BOFT"
    peft_fields: ClassVar[Mapping[str, str]] = {
        "boft_block_size": "block_size", "boft_block_num": "blocks", "bias": "bias",
    }  # fmt: skip
    peft_defaults: ClassVar[Mapping[str, Any]] = {"boft_block_size": 4}
    peft_neutral: ClassVar[frozenset[str]] = Rotation.peft_neutral | {
        "boft_dropout", "boft_n_butterfly_factor",
    }  # fmt: skip

    block_size: int = Field(0, ge=0, description="size of the blocks; default: 4")
    bias: Literal["none", "all", "boft_only"] = Field(
        "none", description="which of the base's biases are trained too"
    )

    def inject(self, site: SiteEditor) -> None:
        from peftc.graphs import aten

        rotate_input(site, lambda: self.rotations(site))
        factors = site.flatten(site.parameter("boft_s", (site.out_features, 1), "full"), 0)
        y = site.scale_output(site.y, factors)
        if site.site.bias:  # which is not scaled; so written, a scale of one changes no bit
            bias = site.const("bias")
            y = site.add(y, site.op(aten.sub.Tensor, bias, site.mul(bias, factors)))
        site.y = site.type_as(y, site.y)

    def rotations(self, site: SiteEditor) -> fx.Node:
        """The blocks (n, size, size); PEFT trains whole matrices and takes their skew part."""
        import torch

        from peftc.graphs import aten

        count = self.blocks or site.in_features // self.divisor
        size = site.in_features // count
        whole = site.parameter("boft_R", (1, count, size, size))
        matrices = site.op(aten.select.int, whole, 0, 0)
        flipped = site.op(aten.transpose.int, matrices, 1, 2)
        skew = site.mul(site.op(aten.sub.Tensor, matrices, flipped), 0.5)
        return site.op(torch.ops.peftc.cayley.default, skew, 0)

    @property
    def divisor(self) -> int:
        """What the input's features have to be a multiple of."""
        return self.blocks or self.block_size or 4

    def check(self, program: Program) -> list[PeftcError]:
        sites = {fqn: program.sites[fqn].in_features for fqn in self.pick(program)[0]}
        return super().check(program) + [
            PassError(
                f"{features} features are no multiple of {self.divisor}",
                where=fqn,
                fix="choose another block_size or number of blocks, or exclude it",
            )
            for fqn, features in sites.items()
            if features % self.divisor
        ]

    def peft_config(self) -> dict[str, Any]:
        size = 0 if self.blocks else self.divisor
        return {**super().peft_config(), "boft_block_size": size}
