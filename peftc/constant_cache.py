"""Virtual tokens as constant keys and values, for the plain model: they are never run again.

A prefix is nothing else, and in a causal decoder nothing that follows changes what the tokens of a
prompt compute. `peftc.to_cache` writes these keys and values; here they are put before inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc.artifact import Artifact
from peftc.checkpoint import within
from peftc.errors import ArtifactError
from peftc.reading import tensors
from peftc.virtual import Numbering

FILE = "constant_cache.safetensors"
# What keys and values depend on, by the names that configs of transformers have for it.
_SHAPES = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip


def shapes_of(config: Any) -> dict[str, Any]:
    """What a model's config says of the shape of its keys and values."""
    text = config.get_text_config()
    found = {name: getattr(text, name, None) for name in _SHAPES}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class ConstantCache:
    """Keys and values of virtual tokens.

    Attributes:
        layers: For each layer keys and values, (1, heads, tokens, features).
        numbering: The positions of what follows; None where the model finds them by itself.
        shapes: What the config of their model says of them.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    numbering: Numbering | None = None
    shapes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many virtual tokens there are."""
        return self.layers[0][0].shape[2]

    @classmethod
    def open(cls, path: str | Path) -> ConstantCache:
        """Reads what `peftc.to_cache` wrote, or `peftc.to_onnx` beside graphs.

        Raises:
            ArtifactError: It is something else, or damaged.
        """
        artifact = Artifact.open(Path(path))
        beside = artifact.manifest.get("constant_cache")
        if artifact.manifest["kind"] != "cache" and beside is None:
            raise ArtifactError(
                f"is of kind {artifact.manifest['kind']}, and no constant cache",
                where=str(path),
                fix="write one: peftc.to_cache(program, path)",
            )
        if damage := artifact.damage():
            raise damage[0]
        said = beside or artifact.manifest
        with artifact.described():
            stored = tensors(within(artifact.path, said.get("file", FILE)))
            count = sum(name.endswith(".key") for name in stored)
            names = said.get("layers") or [(f"{i}.key", f"{i}.value") for i in range(count)]
            layers = tuple((stored[key], stored[value]) for key, value in names)
            numbering = None if said["numbering"] is None else Numbering(**said["numbering"])
            found = cls(layers, numbering, dict(said["shapes"]))
            if not layers or any(len(x.shape) != 4 for pair in layers for x in pair):
                raise ValueError("its layers are no keys and values of four dimensions")
        return found

    def before(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        copies: int = 1,
        cache: Any = None,
    ) -> dict[str, Any]:
        """Arguments for the plain model's forward or `generate`, with the cache before the ids.

        Args:
            model: The plain model, for its config, dtype and device.
            input_ids: (batch, length).
            attention_mask: (batch, length).
            copies: How many sequences `generate` makes of each: its beams or returned sequences.
            cache: An empty cache of transformers' to fill; default: a dynamic one. A static one has
                to have room for the virtual tokens.

        Raises:
            ArtifactError: The keys and values are those of another model.
        """
        from transformers import DynamicCache

        self._check(model.config)
        batch, length = input_ids.shape
        device, dtype = model.device, model.dtype  # which look at its parameters each time
        cache = DynamicCache(config=model.config) if cache is None else cache
        for i, pair in enumerate(self.layers):
            key, value = (
                tensor.to(device, dtype).expand(batch * copies, -1, -1, -1) for tensor in pair
            )
            cache.update(key, value, i)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.cat([mask.new_ones(batch, self.tokens), mask], 1)
        inputs = {"input_ids": input_ids, "attention_mask": mask, "past_key_values": cache}
        if self.numbering is not None:
            shape = batch, self.tokens + length
            numbers = self.numbering.positions(shape, mask, input_ids.device)
            inputs["position_ids"] = numbers[:, self.tokens :]
        return inputs

    def _check(self, config: Any) -> None:
        given = shapes_of(config)
        other = [
            f"{name} {value} (the model's: {given.get(name)})"
            for name, value in self.shapes.items()
            if given.get(name) != value
        ]
        if other:
            raise ArtifactError(
                f"holds keys and values of another model, one of {', '.join(other)}",
                where=FILE,
                fix="use it with the model that it was made of",
            )
