"""DoRA: LoRA on the direction of the weight, whose magnitude is trained on its own.

Liu et al. 2024, arXiv:2402.09353, eq. 5: m · (W + s·B·A) / ‖W + s·B·A‖, the norm of each output
feature held constant by the gradient (§4.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from peftc.contract import Effect, Method
from peftc.errors import PassError, PeftcError
from peftc.passes.lora import Lora

if TYPE_CHECKING:
    from torch import fx

    from peftc.constants import Constant
    from peftc.graphs import Builder
    from peftc.program import Program
    from peftc.sites import SiteEditor


class Dora(Lora):
    """Inject low-rank branches into the weight's direction, and train its magnitude too."""

    effect: ClassVar[Effect] = Effect.EQUAL  # a weight is divided by its norm, and multiplied
    peft_neutral: ClassVar[frozenset[str]] = Lora.peft_neutral | {"use_dora"}
    kinds: ClassVar[frozenset[str]] = Lora.kinds - {"experts"}

    def inject(self, site: SiteEditor) -> None:
        from peftc.graphs import aten

        if self.tokens_at(site.site.fqn):
            super().inject(site)
            return
        start = self.magnitude(site)
        m = site.flatten(site.parameter("lora_magnitude_vector", start.spec.shape, start=start), 0)
        a, b = self.factors(site)
        b = site.mul(b, self.scale_at(site.site.fqn))
        detached = (site.op(aten.detach.default, factor) for factor in (b, a))
        factor = site.op(aten.div.Tensor, m, norm(site, site.add(site.weight, site.mm(*detached))))
        if self.dropout and site.kind.name != "embedding":
            x = site.dropout("lora_dropout", self.dropout, site.cast_input(a))
            base = site.apply(site.type_as(site.weight, x), x)
            more = site.op(aten.sub.Tensor, factor, 1.0)
            branch = site.scale_output(site.mix(site.apply(a, x), b), factor)
            site.add_to_output(site.add(site.scale_output(base, more), branch))
            return
        branch = site.mix(site.apply(a, site.cast_input(a)), b)
        y = site.scale_output(site.add(site.y, branch), factor)
        if site.site.bias:  # which is not a part of the direction
            bias = site.const("bias")
            rest = site.op(aten.sub.Tensor, bias, site.mul(bias, factor))
            y = site.add(y, site.kind.along_output(site, rest))
        site.y = site.type_as(y, site.y)

    def magnitude(self, site: SiteEditor) -> Constant:
        """The norm of the site's weight, in the shape in which PEFT keeps it."""
        import torch

        from peftc.constants import derive
        from peftc.graphs import Builder, aten

        build = Builder()
        length = norm(build, site.kind.matrix(build, build.const("weight")))
        if site.kind.name == "convolution":
            shape = [1, -1, *(1 for _ in site.site.shape[2:])]
            length = build.op(aten.reshape.default, length, shape)
        build.graph.output(length)
        return derive(build.graph, site.bound, torch.float32)

    def weighted(self, weight: float) -> Self:
        return Method.weighted(self, weight)  # the magnitude is not a term of a sum

    def check(self, program: Program) -> list[PeftcError]:
        errors = super().check(program)
        if self.lora_bias:
            errors.append(PassError("Dora has no bias of its own", fix="leave lora_bias out"))
        return errors

    def peft_config(self) -> dict[str, Any]:
        return {**super().peft_config(), "use_dora": True}

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == cls.peft_type and bool(config.get("use_dora"))


def norm(build: Builder, matrix: fx.Node) -> fx.Node:
    """The length of each row; never nought, so that a weight of zeros stays one."""
    from peftc.graphs import aten

    length = build.op(aten.linalg_vector_norm.default, matrix, 2, [1])
    return build.op(aten.clamp_min.default, length, 1e-30)
