"""What happens to task vectors before they are summed: trimmed, dropped at random, outvoted.

Operators over plain tensors, so that a constant's graph can hold them: `peftc::trim`, `peftc::drop`
(DARE, arXiv:2311.03099, eq. 4) and `peftc::elect` (TIES, arXiv:2306.01708, §3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_PIECE = 1 << 16  # elements that stay in the cache with all that is made of them


@torch.library.custom_op("peftc::trim", mutates_args=())
def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The largest values by magnitude, as large a share as `density`; the others are zero.

    Of values of one magnitude at the edge the first stay, so that the count is exact and the result
    the same everywhere.
    """
    size = delta.abs().flatten()
    keep = int(density * size.numel() + 1e-6)
    if keep == 0:
        return torch.zeros_like(delta)
    edge = _kth_largest(size, keep)
    stays = size >= edge
    if int(stays.sum()) > keep:  # a draw at the edge
        above, at = size > edge, size == edge
        stays = above | (at & (at.cumsum(0) <= keep - above.sum()))
    return torch.where(stays.view_as(delta), delta, 0.0)


def _kth_largest(size: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest of numbers that are not negative; a radix select, as kthvalue is slow.

    The bits of such floats are ordered as they are: a count of their upper halves leaves few.
    """
    if size.dtype != torch.float32:
        return size.kthvalue(size.numel() - k + 1).values
    upper = size.view(torch.int32) >> 16
    above = upper.bincount(minlength=1 << 15).flip(0).cumsum(0)
    place = int(torch.searchsorted(above, k))
    among = size[upper == above.numel() - 1 - place]
    larger = int(above[place]) - among.numel()
    return among.kthvalue(among.numel() - (k - larger) + 1).values


@torch.library.custom_op("peftc::drop", mutates_args=())
def drop(delta: torch.Tensor, density: float, seed: int) -> torch.Tensor:
    """Values kept at random with the probability `density`, divided by it; the others are zero."""
    generator = torch.Generator(delta.device).manual_seed(seed)
    stays = torch.rand(delta.shape, generator=generator, device=delta.device) < density
    return torch.where(stays, delta / density, 0.0)


@torch.library.custom_op("peftc::elect", mutates_args=())
def elect(deltas: Sequence[torch.Tensor], sign: str, join: str) -> torch.Tensor:
    """The mean or sum of those values that have the elected sign, element by element.

    Args:
        deltas: Of one shape, weighted.
        sign: `total` elects the sign of their sum, `frequency` that of most; a draw is positive.
        join: `mean` or `sum`. Zeros have no sign, and do not count in the mean.
    """
    result = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    flat = [torch.split(delta.reshape(-1), _PIECE) for delta in deltas]
    for out, *parts in zip(torch.split(result.view(-1), _PIECE), *flat, strict=True):
        votes = parts if sign == "total" else [part.sign() for part in parts]
        elected = torch.where(sum(votes[1:], votes[0]) >= 0, 1.0, -1.0)
        agree = [part * elected > 0 for part in parts]
        torch.mul(parts[0], agree[0], out=out)
        for part, agrees in zip(parts[1:], agree[1:], strict=True):
            out += part * agrees
        if join == "mean":
            count = sum((agrees.to(out.dtype) for agrees in agree[1:]), agree[0].to(out.dtype))
            out /= count.clamp_(min=1.0)
    return result


@trim.register_fake
def _(delta: torch.Tensor, density: float) -> torch.Tensor:
    return torch.empty_like(delta)


@drop.register_fake
def _(delta: torch.Tensor, density: float, seed: int) -> torch.Tensor:
    return torch.empty_like(delta)


@elect.register_fake
def _(deltas: Sequence[torch.Tensor], sign: str, join: str) -> torch.Tensor:
    return torch.empty_like(deltas[0])
