"""Prefix tuning: trained keys and values of virtual positions, before every layer's own.

Li and Liang 2021, arXiv:2101.00190, section 4.2; section 4.3 has the reparametrizing perceptron.
Without it, as by default, this is P-tuning v2 (Liu et al. 2021, arXiv:2110.07602).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, PrivateAttr

from peftc.contract import Effect, Method
from peftc.errors import PassError, PeftcError, raise_all
from peftc.targets import Targets

if TYPE_CHECKING:
    from torch import nn

    from peftc.attention import Attention
    from peftc.constants import Constant
    from peftc.program import Program
    from peftc.sites import SiteEditor

TABLE = "prompt_embeddings"


class PrefixTuning(Method):
    """Train keys and values of virtual tokens that every layer attends to: prefix, P-tuning v2."""

    effect: ClassVar[Effect] = Effect.CHANGES
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    peft_kin: ClassVar[frozenset[str]] = frozenset(
        {"CARTRIDGE"}
    )  # trained but for its first tokens
    prefixed: ClassVar[bool] = True
    peft_fields: ClassVar[Mapping[str, str]] = {"num_virtual_tokens": "virtual_tokens"}
    # Its file holds what the perceptron made; the shapes are compared with the model's.
    peft_neutral: ClassVar[frozenset[str]] = frozenset({
        "prefix_projection", "encoder_hidden_size", "init_weights", "num_transformer_submodules",
        "num_layers", "num_attention_heads", "token_dim", "num_frozen_tokens",
    })  # fmt: skip

    virtual_tokens: int = Field(20, gt=0, description="how many virtual tokens there are")
    projection: bool = Field(
        False, description="train them through a perceptron, which is folded away when saved"
    )
    hidden: int | None = Field(
        None, gt=0, description="the perceptron's hidden features; default: as a layer's keys have"
    )
    _attention: Attention | None = PrivateAttr(None)

    def inject(self, site: SiteEditor) -> None:
        """Adds nothing: it belongs to attention, which is no site."""

    def pick(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        """No site, for none is rewritten."""
        return [], []

    def settled(self, program: Program) -> Self:
        settled = self.model_copy()
        settled._attention = self.where(program)
        return settled

    def where(self, program: Program) -> Attention:
        """Where the model attends.

        Raises:
            PassError: It has no attention that takes a prefix.
        """
        found = program.source.attention()
        if found is None:
            raise PassError(
                "has no self-attention over text by transformers' AttentionInterface, which is "
                "where a prefix goes",
                where=", ".join(program.source.architectures),
                fix="take a method that changes weights, such as lora",
            )
        return found

    def check(self, program: Program) -> list[PeftcError]:
        errors = super().check(program)
        try:
            return errors + self.obstacles(program, self.where(program))
        except PassError as error:
            return [*errors, error]

    def unserved(self, program: Program, names: Sequence[str]) -> list[PeftcError]:
        others = [a.name for a in program.adapters.values() if a.prefixed]
        return super().unserved(program, names) + [
            PassError(
                f"the adapter {other!r} puts virtual tokens first already",
                where=", ".join(program.source.architectures),
                fix="attach one of the two, or switch between them: peftc.together",
            )
            for other in others[:1]
        ]

    def obstacles(self, program: Program, found: Attention) -> list[PeftcError]:
        """What keeps a model from taking this prefix."""
        errors: list[PeftcError] = []
        where = ", ".join(program.source.architectures)
        if not found.alike or found.key_size != found.value_size:
            errors.append(
                PassError(
                    "keys and values do not have one shape in all layers, and one table cannot "
                    "hold them",
                    where=where,
                    fix="take a method that changes weights, such as lora",
                )
            )
        if not found.numbered:
            errors.append(
                PassError(
                    "numbers positions where they cannot be moved behind a prefix",
                    where=where,
                    fix="take a method that changes weights, such as lora",
                )
            )
        if found.longest is not None and self.virtual_tokens >= found.longest:
            errors.append(
                PassError(
                    f"{self.virtual_tokens} virtual tokens leave none of the model's "
                    f"{found.longest} positions",
                    where=where,
                    fix="take fewer: virtual_tokens=20",
                )
            )
        for option in sorted(self.model_fields_set & set(Targets.model_fields)):
            errors.append(
                PassError(
                    "a prefix goes before every layer's keys and values",
                    where=option,
                    fix=f"leave out {option}",
                )
            )
        if self.hidden is not None and not self.projection:
            errors.append(
                PassError(
                    "there are no hidden features without a perceptron",
                    where="hidden",
                    fix="give projection too, or leave out hidden",
                )
            )
        return errors

    def common(self, program: Program, sites: Sequence[str]) -> dict[str, Constant]:
        """The start of the table (n, layers · 2 · width), or of the perceptron that makes it."""
        import torch

        from peftc.constants import Initial
        from peftc.graphs import Spec

        found = self.where(program)
        raise_all(self.obstacles(program, found))
        n, width = self.virtual_tokens, found.width
        columns, hidden = len(found.modules) * 2 * width, self.hidden or width
        shapes: dict[str, tuple[int, ...]] = {TABLE: (n, columns)}
        if self.projection:
            shapes = {
                "embedding.weight": (n, width),
                "transform.0.weight": (hidden, width), "transform.0.bias": (hidden,),
                "transform.2.weight": (columns, hidden), "transform.2.bias": (columns,),
            }  # fmt: skip
        start: dict[str, Constant] = {}
        for name, shape in shapes.items():
            spec = Spec(shape, torch.float32)
            if name in (TABLE, "embedding.weight"):
                start[name] = Initial(name, spec, "gaussian", self.seed)
            else:  # as nn.Linear has them, a bias by its weight's features
                fan = shapes[name.replace("bias", "weight")][1]
                scale = 1.0 if len(shape) > 1 else 1 / math.sqrt(fan)
                start[name] = Initial(name, spec, "kaiming_uniform", self.seed, scale)
        return start

    def written(self, tensors: Mapping[str, Constant]) -> Mapping[str, Constant]:
        """The table that the perceptron makes, in its place: PEFT keeps no more."""
        import torch

        from peftc.constants import derive
        from peftc.graphs import Builder, aten

        if not self.projection:
            return tensors
        build = Builder()
        inner, outer = (
            (build.const(f"transform.{i}.weight"), build.const(f"transform.{i}.bias"))
            for i in (0, 2)
        )
        hidden = build.linear(build.const("embedding.weight"), *inner)
        build.graph.output(build.linear(build.op(aten.tanh.default, hidden), *outer))
        own = {
            "embedding.weight",
            *(f"transform.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")),
        }
        table = derive(build.graph, {name: tensors[name] for name in own}, torch.float32)
        return {TABLE: table, **{name: x for name, x in tensors.items() if name not in own}}

    def enliven(self, model: nn.Module, tensors: Mapping[str, Any]) -> None:
        from peftc.prefixes import install

        assert self._attention is not None
        install(model, self._attention, self.adapter, tensors)

    def withdraw(self, model: nn.Module) -> None:
        from peftc.prefixes import remove

        assert self._attention is not None
        remove(model, self._attention)

    def peft_config(self) -> dict[str, Any]:
        found = self._attention
        shapes = {} if found is None else {
            "token_dim": found.width, "num_attention_heads": found.heads,
            "num_layers": len(found.modules), "num_transformer_submodules": found.submodules,
        }  # fmt: skip
        config = {**super().peft_config(), **shapes, "prefix_projection": False}
        return {key: value for key, value in config.items() if value is not None}
