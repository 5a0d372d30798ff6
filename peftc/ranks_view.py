"""Ranks by site, as a table, as JSON or as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.analysis_view import ready_to_plot, save
from peftc.terminal import Terminal

if TYPE_CHECKING:
    from peftc.passes.prune_ranks import Pruning


def show(found: Sequence[Pruning], error: float, terminal: Terminal) -> None:
    """Prints what pruning would do to each site, the largest error first, or all as JSON.

    Args:
        found: For each site.
        error: Of all sites together.
        terminal: Where to.
    """
    before, left = sum(one.rank for one in found), sum(one.left for one in found)
    sites = [asdict(one) for one in found]
    terminal.data({"ranks": before, "left": left, "error": error, "sites": sites})
    if terminal.as_json:
        return
    several = len({one.adapter for one in found}) > 1
    rows = [
        (f"{one.site} ({one.adapter})" if several else one.site, one.rank, one.left,
         f"{one.error:.1e}", f"{one.norm:.3g}")
        for one in sorted(found, key=lambda one: -one.error)
    ]  # fmt: skip
    title = f"{left} of {before} ranks left, error {error:.1e} of ‖ΔW‖ over all sites"
    terminal.table(title, ("site", "rank", "left", "error", "‖ΔW‖"), rows)


def plot_ranks(
    ranks: Mapping[str, int], path: str | Path, history: Mapping[int, int] | None = None
) -> None:
    """Draws the rank of each site as a PNG: kinds of layers by the number of their layer.

    Args:
        ranks: By the site's name, such as `RankSchedule.ranks` has them.
        path: The file.
        history: How many ranks there were in all, by the step, such as `RankSchedule.history`.

    Raises:
        MissingDependency: matplotlib is not installed.
        ArtifactError: The file cannot be written.
    """
    path = Path(path)
    ready_to_plot(path)
    drawing = import_module("matplotlib.figure")  # without pyplot, which would choose a display
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in ranks))
    places = {name: (kinds.index(name.rpartition(".")[2]), _layer(name)) for name in ranks}
    grid = [[float("nan")] * (1 + max(c for _, c in places.values())) for _ in kinds]
    for name, (row, column) in places.items():
        grid[row][column] = ranks[name]
    figure = drawing.Figure(figsize=(12, 3 + 2.5 * bool(history)), layout="constrained")
    *above, axis = figure.subplots(1 + bool(history), 1, squeeze=False).ravel()
    image = axis.imshow(grid, aspect="auto", vmin=0, cmap="viridis")
    axis.set(title="rank by site", xlabel="layer", yticks=range(len(kinds)), yticklabels=kinds)
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis)
    if history and above:
        _curve(above[0], history)
    save(figure, path)


def _layer(name: str) -> int:
    """The first number in a site's name."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(numbers[0]) if numbers else 0


def _curve(axis: Any, history: Mapping[int, int]) -> None:
    axis.plot(list(history), list(history.values()), ".-")
    axis.set(title="ranks of all sites", xlabel="step", ylim=(0, None))
    axis.grid(alpha=0.3)
