"""An analysis as a table, as JSON or as a picture."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.errors import ArtifactError, MissingDependency
from peftc.terminal import Terminal

if TYPE_CHECKING:
    from peftc.analysis import SiteAnalysis
    from peftc.spectra import Change, Pair

_BARS = "▁▂▃▄▅▆▇█"
_BINS = 6
_HEAD = ["site", "rank", "effective", "99 %", "‖ΔW‖", "‖W‖", "ratio", "amplified", "σ", "how"]


def ready_to_plot(path: Path) -> None:
    """What can be known before the work about whether `plot` can write.

    Raises:
        MissingDependency: matplotlib is not installed.
        ArtifactError: The file's folder does not exist, or it is a folder itself.
    """
    try:
        there = find_spec("matplotlib") is not None
    except ValueError:  # a module that was set to None
        there = False
    if not there:
        raise MissingDependency(
            "a plot needs matplotlib", where="--plot", fix="pip install 'peftc[train]'"
        )
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ArtifactError(
            "is no file that can be written",
            where=str(path),
            fix="name a file in a folder there is",
        )


def largest(found: Iterable[SiteAnalysis], limit: int | None) -> list[SiteAnalysis]:
    """The sites that change most, if not all of them are wanted."""
    sites = list(found)
    if limit is None or limit >= len(sites):
        return sites
    return sorted(sites, key=lambda s: max(c.relative or 0.0 for c in s.changes))[: -limit - 1 : -1]


def show(found: Sequence[SiteAnalysis], terminal: Terminal, limit: int | None = None) -> None:
    """Prints tables, or everything as JSON.

    Args:
        found: What `analyse` returned.
        terminal: Where to.
        limit: Only so many sites, those that change most.
    """
    shown = largest(found, limit)
    if terminal.as_json:
        terminal.data({"sites": [asdict(site) for site in shown]})
        return
    prefix = _prefix([site.site for site in shown])
    below = f", below {prefix}" if prefix else ""
    most = f", the {len(shown)} of {len(found)} that change most" if len(shown) < len(found) else ""
    tables: dict[str, list[list[str]]] = {}
    for site in shown:
        for change in site.changes:
            row = [site.site.removeprefix(prefix), *_cells(site, change)]
            tables.setdefault(change.adapter, []).append(row)
    noted = any(row[-1] != "factors" for rows in tables.values() for row in rows)
    for adapter, rows in tables.items():
        cut = [row if noted else row[:-1] for row in rows]
        terminal.table(f"what {adapter} adds{below}{most}", _HEAD[: len(cut[0])], cut)
    if pairs := [(site.site.removeprefix(prefix), pair) for site in shown for pair in site.pairs]:
        head = ["site", "adapters", "cosine", "φ(1,1)", "φ(all)", "by chance"]
        terminal.table(f"compared{below}{most}", head, [[s, *_compared(p)] for s, p in pairs])


def _prefix(names: Sequence[str]) -> str:
    """The parts that all of several names begin with, before their last one."""
    common: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(names) < 2 or len(set(parts)) > 1:
            break
        common.append(f"{parts[0]}.")
    return "".join(common)


def _cells(site: SiteAnalysis, change: Change) -> list[str]:
    return [
        "" if change.rank is None else str(change.rank),
        _number(change.effective_rank, ".1f"),
        _number(change.rank_99, "d"),
        _number(change.norm, ".3g"),
        _number(site.norm, ".3g"),
        _number(change.relative, ".1e"),
        _number(change.amplification, ".2f"),
        _spark(change.singular_values),
        "; ".join(filter(None, (change.obstacle or change.how, change.remark))),
    ]


def _compared(pair: Pair) -> list[str]:
    first = pair.similarity[0][0] if pair.similarity else None
    return [
        " · ".join(pair.adapters),
        _number(pair.cosine, "+.3f"),
        _number(first, ".3f"),
        _number(pair.overlap, ".3f"),
        _number(pair.chance, ".3f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _spark(values: Sequence[float]) -> str:
    """The singular values against the first, as a row of bars."""
    if not values or not values[0]:
        return ""
    count = min(_BINS, len(values))
    picked = [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]
    return "".join(_BARS[min(7, int(8 * value / values[0]))] for value in picked)


def plot(found: Sequence[SiteAnalysis], path: Path) -> None:
    """Draws an analysis as a PNG: changes by layer, spectra, and the first two adapters compared.

    Raises:
        MissingDependency: matplotlib is not installed.
        ArtifactError: The file cannot be written.
    """
    ready_to_plot(path)
    drawing = import_module("matplotlib.figure")  # without pyplot, which would choose a display
    pairs = [site.pairs[0] for site in found if site.pairs and site.pairs[0].similarity]
    figure = drawing.Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    lines = _lines(found)
    kinds = list(dict.fromkeys(name.partition(" ")[0] for name in lines))
    adapters = list(dict.fromkeys(name.partition(" ")[2] for name in lines))
    colours = {name: f"C{kinds.index(name.partition(' ')[0])}" for name in lines}
    styles = {n: (".-", "x--", "+:")[adapters.index(n.partition(" ")[2]) % 3] for n in lines}
    for title, axis, of in (
        ("relative change ‖ΔW‖/‖W‖", axes[0], "relative"),
        ("amplification ‖ΔW‖/‖UᵀWV‖", axes[1], "amplification"),
        ("effective rank of ΔW", axes[2], "effective_rank"),
    ):
        most = 0.0
        for name, points in lines.items():
            known = [(x, y) for x, c in points if (y := getattr(c, of)) is not None]
            if known:
                most = max(most, *(y for _, y in known))
                axis.plot(*zip(*known, strict=True), styles[name], label=name, c=colours[name])
        axis.set(title=title, xlabel="layer", ylim=(0, 1.05 * most or 1))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if lines:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    if pairs:
        _similarity(figure, axes[3], pairs)
    else:
        _spectra(axes[3], lines, colours)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG, all of it or nothing.

    Raises:
        ArtifactError: The file cannot be written.
    """
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    try:
        path.write_bytes(data.getvalue())
    except OSError as error:
        raise ArtifactError(
            f"cannot be written: {error.strerror}", where=str(path), fix="name another file"
        ) from error


def _lines(found: Sequence[SiteAnalysis]) -> dict[str, list[tuple[int, Change]]]:
    """The changes of each kind of layer, such as q_proj, by the number of their layer."""
    several = len({change.adapter for site in found for change in site.changes}) > 1
    lines: dict[str, list[tuple[int, Change]]] = {}
    for site in found:
        numbers = re.findall(r"\.(\d+)\.", site.site)
        for change in site.changes:
            name = site.site.rpartition(".")[2] + f" ({change.adapter})" * several
            lines.setdefault(name, []).append((int(numbers[0]) if numbers else 0, change))
    return lines


def _spectra(
    axis: Any, lines: dict[str, list[tuple[int, Change]]], colours: dict[str, str]
) -> None:
    """Each layer's singular values against its first."""
    for name, points in lines.items():
        for _, change in points:
            values = change.singular_values
            if values and values[0]:
                scaled = [value / values[0] for value in values]
                axis.plot(range(1, len(values) + 1), scaled, color=colours[name], alpha=0.4)
    axis.set(title="singular values of ΔW, σᵢ/σ₁", xlabel="i", ylim=(0, None))
    axis.grid(alpha=0.3)


def _similarity(figure: Any, axis: Any, pairs: Sequence[Pair]) -> None:
    """φ(i, j) of two adapters, the mean over the sites."""
    rows = min(len(pair.similarity) for pair in pairs)
    columns = min(len(pair.similarity[0]) for pair in pairs)
    mean = [
        [sum(pair.similarity[i][j] for pair in pairs) / len(pairs) for j in range(columns)]
        for i in range(rows)
    ]
    extent = (0.5, columns + 0.5, 0.5, rows + 0.5)
    image = axis.imshow(mean, vmin=0, vmax=1, origin="lower", aspect="auto", extent=extent)
    one, other = pairs[0].adapters
    axis.set(title="φ(i, j), mean over the sites", ylabel=f"i of {one}", xlabel=f"j of {other}")
    for side in (axis.xaxis, axis.yaxis):
        side.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis)
