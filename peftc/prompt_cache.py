"""A prompt as constant keys and values, for the plain model: its tokens are never run again.

In a causal decoder nothing that follows changes what the virtual tokens compute, so that their keys
and values are constants. `peftc.to_cache` writes them; here they are put before inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from peftc.artifact import Artifact
from peftc.errors import ArtifactError
from peftc.virtual import Numbering

FILE = "prompt_cache.safetensors"


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of virtual tokens.

    Attributes:
        layers: For each layer keys and values, (1, heads, tokens, features).
        numbering: The positions of what follows; None where the model takes none.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    numbering: Numbering | None

    @property
    def tokens(self) -> int:
        """How many virtual tokens there are."""
        return self.layers[0][0].shape[2]

    @classmethod
    def open(cls, path: str | Path) -> PromptCache:
        """Reads what `peftc.to_cache` wrote.

        Raises:
            ArtifactError: It is something else, or damaged.
        """
        artifact = Artifact.open(Path(path))
        if artifact.manifest["kind"] != "cache":
            raise ArtifactError(
                f"is of kind {artifact.manifest['kind']}, and no prompt's cache",
                where=str(path),
                fix="write one: peftc.to_cache(program, path)",
            )
        if damage := artifact.damage():
            raise damage[0]
        tensors = load_file(artifact.path / FILE)
        layers = tuple(
            (tensors[f"{i}.key"], tensors[f"{i}.value"]) for i in range(len(tensors) // 2)
        )
        numbering = artifact.manifest["numbering"]
        return cls(layers, None if numbering is None else Numbering(**numbering))

    def before(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        copies: int = 1,
        cache: Any = None,
    ) -> dict[str, Any]:
        """Arguments for the plain model's forward or `generate`, with the prompt before the ids.

        Args:
            model: The plain model, for its config, dtype and device.
            input_ids: (batch, length).
            attention_mask: (batch, length).
            copies: How many sequences `generate` makes of each: its beams or returned sequences.
            cache: An empty cache of transformers' to fill; default: a dynamic one. A static one has
                to have room for the virtual tokens.
        """
        from transformers import DynamicCache

        batch, length = input_ids.shape
        cache = DynamicCache(config=model.config) if cache is None else cache
        for i, pair in enumerate(self.layers):
            key, value = (
                tensor.to(model.device, model.dtype).expand(batch * copies, -1, -1, -1)
                for tensor in pair
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
