"""OFT: the input rotated, block by block, by orthogonal matrices (arXiv:2306.07280, eq. 6).

Qiu et al. 2023, with PEFT's Cayley transform by a Neumann series (arXiv:2506.19847, eq. 6): only
what is above the diagonal of each block's skew-symmetric matrix is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from peftc.contract import Method, trained_biases

if TYPE_CHECKING:
    from torch import fx

    from peftc.program import Program
    from peftc.sites import SiteEditor


class Rotation(Method):
    """Rotates inputs by blocks, of which either the size or the number is chosen."""

    peft_neutral: ClassVar[frozenset[str]] = frozenset({"init_weights"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    block_size: int = Field(0, ge=0, description="size of the blocks; default: PEFT's")
    blocks: int = Field(0, ge=0, description="how many blocks, in the place of their size")
    bias: str = Field("none", description="which of the base's biases are trained too")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.blocks and self.block_size:
            raise ValueError("give the blocks' size or their number, not both")
        return self

    def trains(self, program: Program, sites: list[str]) -> list[str]:
        biases = trained_biases(program, self.bias, sites)
        return list(dict.fromkeys((*super().trains(program, sites), *biases)))


class Oft(Rotation):
    """Inject orthogonal blocks that rotate the input: W·R·x."""

    peft_type: ClassVar[str | None] = "OFT"
    peft_fields: ClassVar[Mapping[str, str]] = {
        "oft_block_size": "block_size", "r": "blocks", "block_share": "share", "coft": "coft",
        "eps": "eps", "use_cayley_neumann": "neumann", "num_cayley_neumann_terms": "terms",
        "bias": "bias",
    }  # fmt: skip
    peft_defaults: ClassVar[Mapping[str, Any]] = {"oft_block_size": 32, "r": 0}
    peft_neutral: ClassVar[frozenset[str]] = Rotation.peft_neutral | {"module_dropout"}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})

    block_size: int = Field(
        0, ge=0, description="size of the blocks, or the divisor next to it; default: 32"
    )
    share: bool = Field(False, description="use one block for all")
    coft: bool = Field(False, description="keep the rotation within eps of none (COFT)")
    eps: float = Field(6e-5, gt=0, description="how far COFT may rotate")
    neumann: bool = Field(True, description="approximate the rotation by a series, with no inverse")
    terms: int = Field(5, gt=0, description="how many terms the series has")
    bias: Literal["none", "all", "oft_only"] = Field(
        "none", description="which of the base's biases are trained too"
    )

    def inject(self, site: SiteEditor) -> None:
        if site.kind.name == "embedding":  # ids cannot be rotated: its rows are
            blocks = self.rotations(site, "oft_embedding_R.weight", site.out_features)
            turned = rotate(site, site.type_as(site.y, blocks), blocks)
            site.y = site.type_as(turned, site.y)
        else:
            rotate_input(site, lambda: self.rotations(site, "oft_R.weight", site.in_features))

    def rotations(self, site: SiteEditor, name: str, features: int) -> fx.Node:
        """The blocks (n, size, size) that rotate so many features."""
        import torch

        from peftc.graphs import aten

        if self.blocks:
            count = near_divisor(features, self.blocks)
        else:
            count = features // near_divisor(features, self.block_size or 32)
        size, own = features // count, 1 if self.share else count
        entries = site.parameter(name, (own, size * (size - 1) // 2))
        if self.coft:  # PEFT shortens the parameter itself, before each use of it
            length = site.op(aten.linalg_vector_norm.default, entries, 2, [1], True)
            bound = self.eps / math.sqrt(2 * own)
            inverse = site.op(
                aten.reciprocal.default, site.op(aten.clamp_min.default, length, bound)
            )
            entries = site.mul(entries, site.op(aten.detach.default, site.mul(inverse, bound)))
        skew = site.op(torch.ops.peftc.skew.default, entries, size)
        turned = site.op(torch.ops.peftc.cayley.default, skew, self.terms if self.neumann else 0)
        return site.op(aten.expand.default, turned, [count, size, size]) if self.share else turned

    def peft_config(self) -> dict[str, Any]:
        size = 0 if self.blocks else self.block_size or 32
        return {**super().peft_config(), "oft_block_size": size}


def near_divisor(features: int, wanted: int) -> int:
    """The divisor next to the one that is wanted, as PEFT takes it; of two, the lower one."""
    divisors = (d for d in range(1, features + 1) if features % d == 0)
    return min(divisors, key=lambda d: abs(d - wanted))


def rotate(site: SiteEditor, x: fx.Node, blocks: fx.Node) -> fx.Node:
    """Features x times a block-diagonal matrix."""
    import torch

    return site.op(torch.ops.peftc.rotate.default, x, blocks)


def rotate_input(site: SiteEditor, blocks: Callable[[], fx.Node]) -> None:
    """Rotates the site's input: after the rotations of adapters that are there already."""
    import torch

    turn = torch.ops.peftc.rotate.default
    if earlier := [node for node in site.graph.nodes if node.target is turn]:
        users = list(earlier[-1].users)
        with site.graph.inserting_before(earlier[-1].next):
            later = rotate(site, earlier[-1], blocks())
        for user in users:
            user.replace_input_with(earlier[-1], later)
        return

    def change(x: fx.Node) -> fx.Node:
        made = blocks()
        return rotate(site, site.type_as(x, made), made)

    site.change_input(change)
