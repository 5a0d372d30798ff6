"""What a trained adapter does to each weight: how much it adds, in how many directions, and where.

ΔW is what folding an adapter adds to the base's weight, so that all of this holds for every method
that merges, and reads no method's tensors by name. Where the folded weight is W + Σ s·B·A, the
singular values of ΔW = (Q_B·R_B)(Q_A·R_A)ᵀ are those of the small R_B·R_Aᵀ: O((out + in)·r²) work
instead of O(out·in²), and ΔW itself is never formed. The base's weight is read once, by rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import fx

from peftc import graphs, registry
from peftc.algebra import fold_sites
from peftc.capturing import capture
from peftc.constants import Constant, derive
from peftc.deltas import alone, unstackable
from peftc.errors import AdapterError, PassError, raise_all
from peftc.evaluate import Evaluation, chunks, single_threaded, value
from peftc.factors import Delta, delta_of
from peftc.graphs import Builder
from peftc.kinds import EmbeddingKind, ExpertsKind
from peftc.program import Program
from peftc.progress import SILENT, Progress
from peftc.sites import Site
from peftc.spectra import Change, Comparison, Figures, Pair, Spectrum, of_dense, of_product


@dataclass(frozen=True)
class SiteAnalysis:
    """One site of the base that an adapter changes.

    Attributes:
        site: Its name in the model.
        kind: `linear`, `conv1d`, `embedding`, `convolution` or `experts`.
        shape: Of the stored weight.
        norm: ‖W‖_F of the base.
        changes: What each adapter adds, in the order in which they were given.
        pairs: Each two of them that change this site, compared.
    """

    site: str
    kind: str
    shape: tuple[int, ...]
    norm: float
    changes: tuple[Change, ...]
    pairs: tuple[Pair, ...] = ()


def analyse(
    source: str | Path | Program,
    adapters: Sequence[str | Path] = (),
    progress: Progress = SILENT,
) -> list[SiteAnalysis]:
    """Analyses what adapters add to a model, each by itself, site by site.

    At any time one site's tensors are in memory: thin factors, or a full ΔW where there are none.

    Args:
        source: A checkpoint's directory or hub id, or a program, whose own adapters come first.
        adapters: Directories or hub ids of PEFT adapters.
        progress: Told of the bytes of the base as they are read.

    Raises:
        PeftcError: A part is missing, damaged or does not fit, or there is nothing to analyse.
    """
    program = source if isinstance(source, Program) else capture(source)
    if program.adapters:
        raise_all(unstackable(program))
    base, carriers = _apart(program) if program.adapters else (program, {})
    paths = [str(path) for path in adapters]
    for path, name in zip(paths, _names(paths, set(carriers)), strict=True):
        attach = registry.load("attach").model_validate({"path": path, "adapter": "default"})
        raise_all(attach.check(base))
        carriers[name] = attach.run(base).program
    if not carriers:
        raise PassError(
            "there is no adapter to analyse", where=str(base.source.name), fix="name one"
        )
    added = {name: _added(base, carrier) for name, carrier in carriers.items()}
    names = [fqn for fqn in base.sites if any(fqn in found for found in added.values())]
    if not names:
        raise AdapterError(
            "changes no layer's weight",
            where=", ".join(carriers),
            fix="it may train biases or norms alone, which this analysis does not cover",
        )
    weights = {fqn: base.constants[base.sites[fqn].name("weight")] for fqn in names}
    progress.stage("analyse", sum(weight.spec.nbytes for weight in weights.values()))
    result = []
    with single_threaded():
        for fqn in names:
            here = {name: found[fqn] for name, found in added.items() if fqn in found}
            result.append(_site(base.sites[fqn], weights[fqn], here))
            progress.advance(weights[fqn].spec.nbytes)
    return result


def _apart(program: Program) -> tuple[Program, dict[str, Program]]:
    """A program without its adapters, and with each of them alone."""
    captured = program.captured
    trained = {
        name: {fqn for fqn in adapter.tensors.values() if fqn in captured}
        for name, adapter in program.adapters.items()
    }
    every = {fqn for own in trained.values() for fqn in own}

    def only(names: list[str]) -> Program:
        others = every - {fqn for name in names for fqn in trained[name]}
        return alone(program, names).rewrite(constants={fqn: captured[fqn] for fqn in others})

    return only([]), {name: only([name]) for name in program.adapters}


@dataclass(frozen=True)
class _Added:
    """What an adapter adds to a site: a ΔW, nothing, or why there is none."""

    delta: Delta | None = None
    obstacle: str | None = None
    remark: str | None = None


def _added(base: Program, carrier: Program) -> dict[str, _Added]:
    folded, errors = fold_sites(carrier)
    obstacles = {str(error.where): error.what for error in errors}
    found: dict[str, _Added] = {}
    for fqn, site in base.sites.items():
        weight, bias = site.name("weight"), site.name("bias")
        if fqn in obstacles:
            found[fqn] = _Added(obstacle=obstacles[fqn])
            continue
        before, after = base.constants[weight], folded.constants[weight]
        if carrier.constants[weight] is not before:  # trained whole, or a start that took from it
            after = derive(_named("after"), {"after": after}, torch.float32)
        delta = delta_of(site, {"weight": before}, {"weight": after})
        if delta is None and carrier.sites[fqn].is_plain:
            continue
        shifted = folded.constants.get(bias) is not base.constants.get(bias)
        found[fqn] = _Added(delta, remark="its bias changes too" if shifted else None)
    return found


def _names(paths: Sequence[str], taken: set[str]) -> list[str]:
    """The folders' names, or as much of each path as tells it from the others."""
    short = [Path(path).name for path in paths]
    names: list[str] = []
    for path, name in zip(paths, short, strict=True):
        unique = short.count(name) == 1 and name and name not in taken
        name = base = name if unique else path
        number = 2
        while name in names or name in taken:
            name, number = f"{base} ({number})", number + 1
        names.append(name)
    return names


class _Deltas:
    """The matrices of a ΔW: one, or one for each expert, each made when it is asked for."""

    def __init__(self, delta: Delta) -> None:
        self.matrix = delta.matrix
        self.rank = None if delta.factors is None else delta.factors[1].spec.shape[-2]
        self.factors = None if delta.factors is None else [value(f) for f in delta.factors]

    def __getitem__(self, index: int) -> Spectrum:
        if self.factors is not None:
            b, a = (f if f.dim() == 2 else f[index] for f in self.factors)
            return of_product(b, a)
        if len(self.matrix.spec.shape) == 2:
            return of_dense(value(self.matrix))
        return of_dense(_evaluation(self.matrix).rows(index, index + 1)[0])


def _site(site: Site, weight: Constant, added: Mapping[str, _Added]) -> SiteAnalysis:
    deltas = {name: _Deltas(one.delta) for name, one in added.items() if one.delta}
    changes = {name: Figures(delta.rank) for name, delta in deltas.items()}
    pairs = {names: Comparison() for names in combinations(deltas, 2)}
    square = 0.0
    for index in range(site.shape[0] if isinstance(site.kind, ExpertsKind) else 1):
        spectra = {name: delta[index] for name, delta in deltas.items()}
        norm, kept = _read(site, weight, index, list(spectra.values()))
        square += norm
        for (name, spectrum), within in zip(spectra.items(), kept, strict=True):
            changes[name].see(spectrum, within)
        for (one, other), comparison in pairs.items():
            comparison.see(spectra[one], spectra[other])
    own = tuple(
        changes[name].change(name, square, one.remark)
        if name in changes
        else Change.nothing(name, one.obstacle, one.remark)
        for name, one in added.items()
    )
    energies = {name: figures.energy for name, figures in changes.items()}
    compared = tuple(
        c.pair(names, energies[names[0]] * energies[names[1]]) for names, c in pairs.items()
    )
    return SiteAnalysis(
        site.fqn, site.kind.name, tuple(site.shape), math.sqrt(square), own, compared
    )


def _read(
    site: Site, weight: Constant, index: int, spectra: Sequence[Spectrum]
) -> tuple[float, list[float]]:
    """‖W‖²_F of one of a site's matrices, and ‖Uᵀ·W·V‖²_F for the vectors of each spectrum."""
    # The stored rows of these are features of the input, not of the output.
    turned = site.kind.transposed or isinstance(site.kind, EmbeddingKind)
    frames = [(s.v, s.u) if turned else (s.u, s.v) for s in spectra]
    narrow = [(left.float(), right.float()) for left, right in frames]
    inner = [torch.zeros(left.shape[1], right.shape[1]) for left, right in narrow]
    square = 0.0
    for low, rows in _rows(site, weight, index):
        square += float(torch.linalg.vector_norm(rows)) ** 2
        for (left, right), total in zip(narrow, inner, strict=True):
            total.addmm_(left[low : low + len(rows)].t(), rows @ right)
    return square, [float(total.square().sum(dtype=torch.float64)) for total in inner]


def _rows(site: Site, weight: Constant, index: int) -> Iterator[tuple[int, torch.Tensor]]:
    """A stored weight as a matrix, in pieces, each with the number of its first row."""
    rows = _evaluation(weight)
    if isinstance(site.kind, ExpertsKind):
        yield 0, rows.rows(index, index + 1)[0]
        return
    for low, high in chunks(weight.spec.shape):
        yield low, rows.rows(low, high).flatten(1)


def _evaluation(constant: Constant) -> Evaluation:
    return Evaluation(_named("value"), {"value": constant})


def _named(name: str) -> fx.Graph:
    """The graph of one constant."""
    build = Builder()
    build.graph.output(build.const(name))
    return graphs.intern(build.graph)
