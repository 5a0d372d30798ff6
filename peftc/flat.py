"""Operators that see a tensor flat, evaluated piece by piece.

Quantization works on blocks that may cross rows, and packs two elements into a byte. So the rows
asked of its result are asked of its operand as a range of elements, which starts with a block.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peftc.graphs import Spec, operator

Take = Callable[[int, int], torch.Tensor]  # elements low to high of an operand


@dataclass(frozen=True)
class Piece:
    """What is asked of an operator.

    Attributes:
        args: Its arguments; in the place of tensors, `Take`.
        shape: Of its operand.
        result: Shape of its result.
        identity: What the operand is.
        low: The first row of the result.
        high: Behind its last row.
    """

    args: tuple[Any, ...]
    shape: tuple[int, ...]
    result: tuple[int, ...]
    identity: Hashable
    low: int
    high: int

    def blocks(self, start: int, end: int, size: int) -> tuple[int, int]:
        """A range of elements widened to whole blocks."""
        return start // size * size, min(-(-end // size) * size, math.prod(self.shape))


class _LastAbsmax(threading.local):
    """The absmax that quantizing gave beside the codes, for when they are asked next."""

    KEPT = 1024

    def __init__(self) -> None:
        self.pieces: dict[tuple[Hashable, ...], torch.Tensor] = {}

    def keep(self, key: tuple[Hashable, ...], absmax: torch.Tensor) -> None:
        if len(self.pieces) >= self.KEPT:
            del self.pieces[next(iter(self.pieces))]
        self.pieces[key] = absmax


_last = _LastAbsmax()


def _codes(piece: Piece) -> torch.Tensor:
    take, size, codebook = piece.args
    start, end = piece.blocks(2 * piece.low, 2 * piece.high, size)
    codes, absmax = operator("peftc.nf4_quantize.default")(take(start, end), size, codebook)
    _last.keep((piece.identity, size, start, end), absmax)
    result: torch.Tensor = codes[piece.low - start // 2 : piece.high - start // 2]
    return result


def _absmax(piece: Piece) -> torch.Tensor:
    take, size = piece.args
    start, end = piece.blocks(piece.low * size, piece.high * size, size)
    key = piece.identity, size, start, end
    if key not in _last.pieces:
        _last.keep(key, operator("peftc.nf4_absmax.default")(take(start, end), size))
    return _last.pieces[key]


def _dequantized(piece: Piece) -> torch.Tensor:
    codes, absmax, _, size, codebook = piece.args
    width = math.prod(piece.result[1:])
    low, high = piece.low * width, piece.high * width
    start = low // size * size
    end = min(-(-high // size) * size, math.prod(piece.result))
    flat = operator("peftc.nf4_dequantize.default")(
        codes(start // 2, -(-end // 2)),
        absmax(start // size, -(-end // size)),
        [end - start],
        size,
        codebook,
    )
    result: torch.Tensor = flat[low - start : high - start]
    return result.view(piece.high - piece.low, *piece.result[1:])


# Each operator by its name: it is registered where it is first used, not here.
RULES: Mapping[str, Callable[[Piece], torch.Tensor]] = {
    "peftc.nf4_codes.default": _codes,
    "peftc.nf4_absmax.default": _absmax,
    "peftc.nf4_dequantize.default": _dequantized,
}
_PER_ROW: Mapping[str, Callable[[tuple[Any, ...]], int]] = {
    "peftc.nf4_codes.default": lambda args: 2,
    "peftc.nf4_absmax.default": lambda args: int(args[1]),
}


def unit(name: str, args: tuple[Any, ...], operand: Spec) -> tuple[int, int] | None:
    """How results are best asked for, where not row by row.

    Returns:
        How many elements of the operand make one row of the result; and how many rows of the
        operand, at least, end where a row of the result does.
    """
    if name not in _PER_ROW:
        return None
    width = math.prod(operand.shape[1:])
    return _PER_ROW[name](args), args[1] // math.gcd(args[1], max(1, width))
