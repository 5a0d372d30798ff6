"""A layer of a cache behind keys and values that every text has before it, and no cache holds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, DynamicLayer


class ConstantLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that attention sees behind constant keys and values, which it does not keep.

    Args:
        key: (1, heads, tokens, size).
        value: Likewise.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.constant = key, value

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps new keys and values; returns all that there are."""
        kept = super().update(key_states, value_states, *args, **kwargs)
        key, value = (
            torch.cat([constant.expand(own.shape[0], -1, -1, -1), own], 2)
            for constant, own in zip(self.constant, kept, strict=True)
        )
        return key, value

    def get_seq_length(self) -> int:
        """How many tokens are before the next, the constant ones too."""
        own: int = super().get_seq_length()  # in a capture a symbol, which int() would fix
        return self.constant[0].shape[2] + own


def constant_cache(
    constant: list[tuple[torch.Tensor, torch.Tensor]],
    past: list[tuple[torch.Tensor, torch.Tensor]],
) -> DynamicCache:
    """A cache of such layers that goes on from a past, or from none."""
    cache = DynamicCache()
    cache.layers = [ConstantLayer(*pair) for pair in constant]
    for layer, (key, value) in zip(cache.layers, past, strict=False):
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
    return cache
