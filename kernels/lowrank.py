"""The best approximation of a matrix by factors of a rank (Eckart and Young 1936), in fp64.

Matrices may be stacked, as those of experts are; a rank is then that of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRank:
    """B·A, with the singular values shared evenly between B and A.

    Attributes:
        up: B (out, rank), fp32.
        down: A (rank, in), fp32.
        error: ‖M − B·A‖_F / ‖M‖_F.
        wanted: The rank that the tolerance asks for, where that is above the limit.
    """

    up: torch.Tensor
    down: torch.Tensor
    error: float
    wanted: int | None = None


def of_matrix(
    matrix: torch.Tensor, rank: int | None = None, tolerance: float = 0.0, limit: int | None = None
) -> LowRank:
    """Approximates a matrix.

    It is projected on the leading eigenvectors of its Gram matrix on the smaller side: in fp64 that
    finds what is above 1e-8 of the largest singular value, several times faster than an SVD.

    Args:
        matrix: (…, out, in).
        rank: At most this rank.
        tolerance: Without a rank, the smallest rank whose error is at most this.
        limit: Without a rank, at most this one.
    """
    wide = matrix.double()
    tall = wide.shape[-2] > wide.shape[-1]
    values, vectors = torch.linalg.eigh(wide.mT @ wide if tall else wide @ wide.mT)
    squares, basis = values.clamp(min=0).flip(-1), vectors.flip(-1)
    chosen, wanted = _rank(squares, rank, tolerance, limit)
    basis = basis[..., :chosen]
    share = squares[..., :chosen].pow(0.25)
    inverse = torch.where(share > 0, 1 / share, 0.0)
    if tall:
        up, down = (wide @ basis) * inverse[..., None, :], basis.mT * share[..., None]
    else:
        up, down = basis * share[..., None, :], (basis.mT @ wide) * inverse[..., None]
    return LowRank(up.float(), down.float(), _error(squares, chosen), wanted)


def of_product(
    up: torch.Tensor, down: torch.Tensor, rank: int | None = None, tolerance: float = 0.0
) -> LowRank:
    """Approximates a product B·A without forming it: an SVD of the small core between two QR."""
    left, core_left = torch.linalg.qr(up.double())
    right, core_right = torch.linalg.qr(down.double().mT)
    u, s, vh = torch.linalg.svd(core_left @ core_right.mT, full_matrices=False)
    squares = s.square()
    chosen, _ = _rank(squares, rank, tolerance, None)
    share = s[..., :chosen].sqrt()
    up = (left @ u[..., :chosen]) * share[..., None, :]
    down = share[..., None] * (vh[..., :chosen, :] @ right.mT)
    return LowRank(up.float(), down.float(), _error(squares, chosen))


def _rank(
    squares: torch.Tensor, rank: int | None, tolerance: float, limit: int | None
) -> tuple[int, int | None]:
    """The rank to take, and the one that the tolerance asks for where that is too high."""
    if rank is not None:
        return min(rank, squares.shape[-1]), None
    spectrum = squares.reshape(-1, squares.shape[-1]).sum(0)
    # What is left behind each rank, summed from the small end, where no digit is lost.
    tails = torch.cat([spectrum.flip(0).cumsum(0).flip(0), spectrum.new_zeros(1)])
    needed = int((tails > tolerance**2 * tails[0]).sum())
    if limit is not None and needed > limit:
        return limit, needed
    return needed, None


def _error(squares: torch.Tensor, rank: int) -> float:
    total = float(squares.sum())
    return math.sqrt(float(squares[..., rank:].sum()) / total) if total else 0.0
