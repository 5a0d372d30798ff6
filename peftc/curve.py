"""A loss curve as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def draw(metrics: Sequence[Mapping[str, Any]]) -> bytes:
    """The losses of a training against its steps.

    Args:
        metrics: As metrics.jsonl has them.

    Returns:
        A PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for key, style, label in (("loss", "-", "training"), ("eval_loss", "o--", "evaluation")):
        if points := [(line["step"], line[key]) for line in metrics if key in line]:
            axis.plot(*zip(*points, strict=True), style, label=label, linewidth=1)
    axis.set(xlabel="step", ylabel="loss per token")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()
