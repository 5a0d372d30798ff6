"""P-tuning: a prompt that a small network makes (Liu et al. 2021, arXiv:2103.10385, §3).

The network is an MLP, or an LSTM that reads the vectors both ways with an MLP behind it, as PEFT's
are. It does not see the input, so that it is a part of the graph over constants alone: training
trains it, and what is saved is the table that it evaluates to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftc.passes.prompt_tuning import TABLE, Prompt

if TYPE_CHECKING:
    from torch import fx

    from peftc.constants import Constant
    from peftc.graphs import Builder
    from peftc.sites import SiteEditor

Get = Callable[[str, tuple[int, ...], float], "fx.Node"]
Drop = Callable[[int, "fx.Node"], "fx.Node"]
_MLP = "mlp_head"


class PTuning(Prompt):
    """Train vectors before the input together with a network that they go through."""

    peft_type: ClassVar[str | None] = "P_TUNING"
    peft_fields: ClassVar[Mapping[str, str]] = {
        **Prompt.peft_fields,
        "encoder_reparameterization_type": "encoder", "encoder_hidden_size": "hidden",
        "encoder_num_layers": "layers_of_encoder", "encoder_dropout": "dropout",
    }  # fmt: skip

    encoder: Literal["MLP", "LSTM"] = Field("MLP", description="the network")
    hidden: int | None = Field(
        None, gt=0, description="its inner features; default: as many as the embedding has"
    )
    layers_of_encoder: int = Field(2, gt=0, description="layers of an LSTM; an MLP has three")
    dropout: float = Field(0.0, ge=0, lt=1, description="between layers of an LSTM, in training")

    def table(self, site: SiteEditor) -> fx.Node:
        shape = self.virtual_tokens, site.out_features
        vectors = site.parameter(f"prompt_encoder.{TABLE}", shape, "gaussian")
        trained = f"prompt_encoder.{site.adapter}.{_MLP}.0.weight"
        if site.given is not None and trained not in site.given:
            return vectors  # from PEFT's file, which has what the network made

        def get(name: str, shape: tuple[int, ...], bound: float) -> fx.Node:
            scale = bound * math.sqrt(math.prod(shape[1:]))
            return site.parameter(f"prompt_encoder.{name}", shape, "kaiming_uniform", scale)

        def drop(layer: int, x: fx.Node) -> fx.Node:
            return site.dropout(f"prompt_encoder.dropout_{layer}", self.dropout, x)

        return self.encode(site, vectors, get, drop)

    def encode(self, build: Builder, x: fx.Node, get: Get, drop: Drop) -> fx.Node:
        """The network's nodes.

        Args:
            build: Where to add them.
            x: Vectors (virtual tokens, features).
            get: A weight by PEFT's name, its shape, and the bound of its uniform start.
            drop: Dropout behind a layer of the LSTM.
        """
        import torch

        from peftc.graphs import aten

        features, inner = self._width, self.hidden or self._width

        def linear(x: fx.Node, number: int, wide: int, out: int) -> fx.Node:
            bound = 1 / math.sqrt(wide)
            weight, bias = (
                get(f"{_MLP}.{number}.{leaf}", shape, bound)
                for leaf, shape in (("weight", (out, wide)), ("bias", (out,)))
            )
            return build.linear(x, weight, bias)

        def relu(x: fx.Node) -> fx.Node:
            return build.op(aten.relu.default, x)

        if self.encoder == "MLP":
            x = relu(linear(x, 0, features, inner))
            x = relu(linear(x, 2, inner, inner))
            return linear(x, 4, inner, features)
        for layer in range(self.layers_of_encoder):
            wide = features if layer == 0 else 2 * inner
            shapes = {"weight_ih": (4 * inner, wide), "weight_hh": (4 * inner, inner),
                      "bias_ih": (4 * inner,), "bias_hh": (4 * inner,)}  # fmt: skip
            weights = [
                get(f"lstm_head.{leaf}_l{layer}{way}", shape, 1 / math.sqrt(inner))
                for way in ("", "_reverse")
                for leaf, shape in shapes.items()
            ]
            x = drop(layer - 1, x) if layer else x
            x = build.op(torch.ops.peftc.lstm.default, x, weights)
        x = relu(linear(x, 0, 2 * inner, 2 * inner))
        return linear(x, 2, 2 * inner, features)

    def evaluated(self, parts: Mapping[str, Constant]) -> Constant:
        if len(parts) == 1:
            return parts[TABLE]
        import torch

        from peftc.constants import derive
        from peftc.graphs import Builder

        build = Builder()
        table = self.encode(
            build, build.const(TABLE), lambda name, *_: build.const(name), lambda _, x: x
        )
        build.graph.output(table)
        return derive(build.graph, parts, torch.float32)

    def peft_config(self) -> dict[str, Any]:
        return {**super().peft_config(), "encoder_hidden_size": self.hidden or self._width}
