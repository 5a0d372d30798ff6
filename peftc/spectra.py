"""Singular values and vectors of what an adapter adds, and the figures made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

EXACT = 1024  # up to this smaller dimension, a matrix without factors gets all its singular values
KEPT = 64  # singular values of a larger one
TOP = 16  # directions that count, where a matrix has no rank of its own
SHARE = 0.99  # of the energy
GRID = 64  # up to which φ(i, j) is kept
_OVERSAMPLED = 16
_COLUMNS = 1 << 14  # that are in fp64 at a time
_NOISE = 1e-6  # of the largest singular value: below it is what fp32 leaves of a zero

How = Literal["factors", "eigen", "randomized"]


@dataclass(frozen=True)
class Change:
    """What one adapter adds to one site; None stands for what is not defined or not known.

    Of fused experts, norms are over the stack, `singular_values` are root mean squares over the
    experts, `effective_rank` is their mean, and the other ranks are those of the largest.

    Attributes:
        adapter: Its name.
        rank: The inner dimension of its factors; None where ΔW is no product of two thin matrices.
        norm: ‖ΔW‖_F.
        relative: ‖ΔW‖_F / ‖W‖_F.
        singular_values: Of ΔW, the largest first; the first 64 where `how` is `randomized`.
        effective_rank: exp(−Σ pᵢ·ln pᵢ) with pᵢ = σᵢ / Σσ (Roy and Vetterli, EUSIPCO 2007).
        rank_99: How many singular values hold 99 % of ‖ΔW‖²_F.
        amplification: ‖ΔW‖_F / ‖Uᵀ·W·V‖_F, with U and V the first singular vectors of ΔW
            (arXiv:2106.09685 §7.3): by how much it strengthens what W already does there.
        directions: How many singular vectors that is: all that are not zero, or the first 16 of a
            ΔW without factors.
        how: As for `Spectrum`.
        obstacle: Why there is no ΔW.
        remark: What the adapter changes here beside the weight.
    """

    adapter: str
    rank: int | None = None
    norm: float | None = None
    relative: float | None = None
    singular_values: tuple[float, ...] = ()
    effective_rank: float | None = None
    rank_99: int | None = None
    amplification: float | None = None
    directions: int = 0
    how: How | None = None
    obstacle: str | None = None
    remark: str | None = None

    @classmethod
    def nothing(cls, adapter: str, obstacle: str | None, remark: str | None) -> Change:
        """A weight that stays as it is, or, with an obstacle, of which nothing is known."""
        if obstacle is not None:
            return cls(adapter, obstacle=obstacle, remark=remark)
        return cls(adapter, None, 0.0, 0.0, (), 0.0, 0, remark=remark)


@dataclass(frozen=True)
class Pair:
    """What two adapters add to one site, compared.

    Attributes:
        adapters: Their names.
        cosine: ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖·‖Δ₂‖): 1 for the same, 0 for unrelated, −1 for opposite changes.
        similarity: φ(i, j) = ‖V₁ⁱᵀ·V₂ʲ‖²_F / min(i, j), with Vⁱ the first i right singular vectors
            of a ΔW (arXiv:2106.09685 §7.2, eq. 4), for i and j up to 64; of experts the mean.
        overlap: φ of all directions.
        chance: What `overlap` is, on average, for directions drawn at random: max(i, j) / in.
    """

    adapters: tuple[str, str]
    cosine: float | None = None
    similarity: tuple[tuple[float, ...], ...] = ()
    overlap: float | None = None
    chance: float | None = None


@dataclass(frozen=True)
class Spectrum:
    """A matrix (out, in) by its singular values and its first singular vectors, in fp64.

    Attributes:
        u: Its left vectors (out, k), none of a singular value that is zero.
        values: Its singular values, the largest first: all, or the first 64.
        v: Its right vectors (in, k).
        energy: ‖·‖²_F.
        how: `factors`, exact from thin factors; `eigen`, exact to 1e-8·σ₁ from the matrix times its
            transpose; `randomized`, a range finder with two power iterations (arXiv:0909.4061).
        dense: The matrix itself, where it has no factors; else U·diag(σ)·Vᵀ is all of it.
    """

    u: torch.Tensor
    values: torch.Tensor
    v: torch.Tensor
    energy: float
    how: How
    dense: torch.Tensor | None = None

    @property
    def directions(self) -> int:
        """How many singular vectors are kept."""
        return self.u.shape[1]

    def effective_rank(self) -> float | None:
        """exp(−Σ pᵢ·ln pᵢ), pᵢ = σᵢ / Σσ (Roy and Vetterli, EUSIPCO 2007)."""
        if self.how == "randomized":
            return None
        if not self.directions:
            return 0.0
        p = self.values / self.values.sum()
        return float(torch.special.entr(p).sum().exp())

    def rank_of(self, share: float) -> int | None:
        """How many singular values hold a share of the energy; None where more than are known."""
        if not self.energy:
            return 0
        short = self.values.square().cumsum(0) < share * self.energy
        count = int(short.sum()) + 1
        return count if count <= len(self.values) else None

    def dot(self, other: Spectrum) -> float:
        """The sum of the products of two matrices' elements, from whatever forms are at hand."""
        if self.dense is not None and other.dense is not None:
            return float((self.dense * other.dense).sum(dtype=torch.float64))
        if self.dense is not None:
            return other.dot(self)
        left = self.u * self.values[: self.directions]
        if other.dense is not None:
            return float((left * (other.dense @ self.v.float()).double()).sum())
        right = other.v * other.values[: other.directions]
        return float(((left.t() @ other.u) * (self.v.t() @ right)).sum())

    def similarity(self, other: Spectrum) -> torch.Tensor:
        """φ(i, j) = ‖V₁ⁱᵀ·V₂ʲ‖²_F / min(i, j) for all i and j (arXiv:2106.09685 §7.2, eq. 4)."""
        squares = (self.v.t() @ other.v).square()
        i, j = (torch.arange(1, n + 1).double() for n in squares.shape)
        return squares.cumsum(0).cumsum(1) / torch.minimum(i[:, None], j)


def of_product(b: torch.Tensor, a: torch.Tensor) -> Spectrum:
    """The spectrum of B·A for B (out, r) and A (r, in): that of R_B·R_Aᵀ, which is (r, r).

    With B = Q_B·R_B and Aᵀ = Q_A·R_A it takes O((out + in)·r²) operations, and no matrix of B·A's
    size.
    """
    (qb, rb), (qa, ra) = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().t())
    u, values, vh = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
    k = _significant(values)
    energy = float(values.square().sum())
    return Spectrum(qb @ u[:, :k], values, qa @ vh[:k].t(), energy, "factors")


def of_dense(matrix: torch.Tensor) -> Spectrum:
    """The spectrum of any matrix, and its first 16 directions; from 64 values if it is large."""
    if min(matrix.shape) > EXACT:
        return _randomized(matrix)
    tall = matrix.shape[0] > matrix.shape[1]
    pieces = torch.split(matrix.t() if tall else matrix, _COLUMNS, dim=1)
    # Several times faster than an SVD, and in fp64 a σ above √eps·σ₁ = 1e-8·σ₁ loses nothing.
    gram = torch.zeros(min(matrix.shape), min(matrix.shape), dtype=torch.float64)
    for piece in pieces:
        gram.addmm_(wide := piece.double(), wide.t())
    squares, vectors = torch.linalg.eigh(gram)
    values, vectors = squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    k = min(TOP, _significant(values))
    left = vectors[:, :k]
    right = torch.cat([p.double().t() @ left for p in pieces]) / values[:k]
    u, v = (right, left) if tall else (left, right)
    return Spectrum(u, values, v, float(values.square().sum()), "eigen", matrix)


def _randomized(matrix: torch.Tensor) -> Spectrum:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same figures each time, and no one else's numbers are drawn
        u, values, v = torch.svd_lowrank(matrix, KEPT + _OVERSAMPLED, niter=2)
    k = min(TOP, _significant(values))
    energy = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    return Spectrum(
        u[:, :k].double(), values[:KEPT].double(), v[:, :k].double(), energy, "randomized", matrix
    )


def _significant(values: torch.Tensor) -> int:
    return int((values > _NOISE * values[:1]).sum())


class Figures:
    """What becomes a Change, gathered over a site's matrices."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank
        self.energy = self.kept = 0.0
        self.squares: torch.Tensor | float = 0.0
        self.effective: list[float | None] = []
        self.shares: list[int | None] = []
        self.directions: list[int] = []
        self.how: How | None = None

    def see(self, spectrum: Spectrum, kept: float) -> None:
        """Takes one matrix, and ‖Uᵀ·W·V‖²_F of the base's."""
        self.energy += spectrum.energy
        self.kept += kept
        self.squares = self.squares + spectrum.values.square()
        self.effective.append(spectrum.effective_rank())
        self.shares.append(spectrum.rank_of(SHARE))
        self.directions.append(spectrum.directions)
        self.how = spectrum.how

    def change(self, name: str, square: float, remark: str | None) -> Change:
        """The figures, for a base of ‖W‖²_F = `square`."""
        count = len(self.directions)
        effective = [e for e in self.effective if e is not None]
        shares = [s for s in self.shares if s is not None]
        assert isinstance(self.squares, torch.Tensor)
        return Change(
            name,
            self.rank,
            math.sqrt(self.energy),
            math.sqrt(self.energy / square) if square else None,
            tuple((self.squares / count).sqrt().tolist()),
            sum(effective) / count if len(effective) == count else None,
            max(shares) if len(shares) == count else None,
            math.sqrt(self.energy / self.kept) if self.kept else None,
            max(self.directions),
            self.how,
            remark=remark,
        )


class Comparison:
    """What becomes a Pair, gathered over a site's matrices."""

    def __init__(self) -> None:
        self.dot = 0.0
        self.grids: list[torch.Tensor] = []
        self.chance = 0.0

    def see(self, one: Spectrum, other: Spectrum) -> None:
        """Takes one matrix of each."""
        self.dot += one.dot(other)
        self.grids.append(one.similarity(other))
        self.chance = max(one.directions, other.directions) / len(one.v)

    def pair(self, names: tuple[str, str], energies: float) -> Pair:
        """The figures, for the product of the two ‖ΔW‖²_F."""
        cosine = self.dot / math.sqrt(energies) if energies else None
        i, j = (min(grid.shape[d] for grid in self.grids) for d in (0, 1))
        if not (i and j):
            return Pair(names, cosine)
        mean = torch.stack([grid[:i, :j] for grid in self.grids]).mean(0)
        overlap = sum(float(grid[-1, -1]) for grid in self.grids) / len(self.grids)
        grid = tuple(map(tuple, mean[:GRID, :GRID].tolist()))
        return Pair(names, cosine, grid, overlap, self.chance)
