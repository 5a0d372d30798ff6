"""LoKr: a Kronecker product of small matrices added to the weight.

Yeh et al. 2023 (LyCORIS), arXiv:2309.14859, eq. 5: ΔW = s·(w1 ⊗ w2), of which w2, and with
`decompose_both` w1 too, is a product of low rank where that is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from peftc.passes.loha import Lycoris

if TYPE_CHECKING:
    from torch import fx

    from peftc.sites import SiteEditor


# By the dimensions of w2. PEFT's product with three is another one: there w1's rows come second.
_PRODUCTS = {2: "ac,bd->abcd", 3: "ac,bdk->badck", 4: "ac,bdkl->abcdkl"}


class Lokr(Lycoris):
    """Inject Kronecker products of small matrices: y + s·(w1 ⊗ w2)·x."""

    peft_type: ClassVar[str | None] = "LOKR"
    peft_fields: ClassVar[Mapping[str, str]] = {
        **Lycoris.peft_fields, "decompose_both": "decompose_both", "decompose_factor": "factor",
    }  # fmt: skip

    decompose_both: bool = Field(False, description="make w1 a product of low rank too")
    factor: int = Field(
        -1, ge=-1, description="the size of w1, or the divisor next below it; -1: near the root"
    )

    def delta(self, site: SiteEditor, rank: int) -> fx.Node:
        from peftc.graphs import aten

        out, width, *kernel = site.site.shape
        (a, b), (c, d) = _factors(out, self.factor), _factors(width, self.factor)
        if self.decompose_both and rank < max(a, c) / 2:
            left = site.parameter("lokr_w1_a", (a, rank))
            w1 = site.mm(left, site.parameter("lokr_w1_b", (rank, c), "kaiming_uniform"))
        else:
            w1 = site.parameter("lokr_w1", (a, c))
        w2, dimensions = self.second(site, (b, d, *kernel), rank)
        product = site.op(aten.einsum.default, _PRODUCTS[dimensions], [w1, w2])
        return site.op(aten.reshape.default, product, [out, -1])

    def second(self, site: SiteEditor, shape: tuple[int, ...], rank: int) -> tuple[fx.Node, int]:
        """The matrix w2, or the kernel, and how many dimensions PEFT gives it."""
        from peftc.graphs import aten

        b, d, *kernel = shape
        if rank >= max(b, d) / 2:
            return site.parameter("lokr_w2", shape, "kaiming_uniform"), len(shape)
        if core := self.core(site, "lokr_t2", rank):
            left = site.parameter("lokr_w2_a", (rank, b), "kaiming_uniform")
            right = site.parameter("lokr_w2_b", (rank, d), "kaiming_uniform")
            return site.op(aten.einsum.default, "ijkl,ip,jr->prkl", [core, left, right]), 4
        left = site.parameter("lokr_w2_a", (b, rank), "kaiming_uniform")
        width = d * math.prod(kernel)
        return site.mm(left, site.parameter("lokr_w2_b", (rank, width), "kaiming_uniform")), 2


def _factors(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a number, as PEFT chooses them: the first the one asked for, or near below."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = min(math.isqrt(size), size if factor < 0 else max(factor, 1))
    first = next(k for k in range(most, 0, -1) if size % k == 0)
    return first, size // first
