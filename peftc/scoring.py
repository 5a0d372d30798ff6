"""Loss per token of a live model on rows of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from peftc.token_rows import IGNORED, Batch, Rows


def token_loss(
    model: nn.Module,
    rows: Rows,
    batch: int,
    collate: Callable[[Sequence[Batch]], Batch],
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> tuple[float, int]:
    """The sum of the losses of all learned tokens of some rows, and how many they are.

    Args:
        model: A causal language model of transformers; evaluated in eval mode.
        rows: What to evaluate on.
        batch: How many rows at once.
        collate: Makes a batch of rows.
        device: Where the model is.
        rank: Which of `world` processes this is; each takes its share of the batches, and all
            call the model equally often.
        world: How many processes there are.
    """
    mode = model.training
    model.eval()
    lows = list(range(0, len(rows), batch))
    rounds = -(-len(lows) // world)
    total, count = 0.0, 0
    with torch.no_grad():
        for turn in range(rounds):
            index = turn * world + rank
            low = lows[min(index, len(lows) - 1)]
            made: Batch = collate([rows[i] for i in range(low, min(low + batch, len(rows)))])
            learned = int((made["labels"][:, 1:] != IGNORED).sum())
            loss = model(**{name: tensor.to(device) for name, tensor in made.items()}).loss
            if index < len(lows):
                total, count = total + float(loss) * learned, count + learned
    model.train(mode)
    return total, count


def perplexity(loss: float) -> float:
    """E to the loss per token; infinite where that is no number."""
    return math.exp(loss) if loss < 700 else math.inf
