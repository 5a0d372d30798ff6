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

from peftc.constants import Derived, Held, Initial, Leaf
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
    """The absmax that quantizing gave beside the codes, for when they are asked next.

    Only those of one constant are kept, as it is: a file or a tensor in memory may change.
    """

    def __init__(self) -> None:
        self.state: Hashable = None
        self.pieces: dict[tuple[int, int, int], torch.Tensor] = {}

    def of(self, identity: Hashable) -> dict[tuple[int, int, int], torch.Tensor]:
        """Those of an operand, by block size, start and end; it may be no constant."""
        state = _state(identity)
        if state is None or state != self.state:
            self.state, self.pieces = state, {}
        return self.pieces


def _state(identity: Hashable) -> Hashable:
    """What a constant's value depends on at this moment; None for what is no constant."""
    if isinstance(identity, Leaf):
        return identity.ref, identity.ref.file.stat().st_mtime_ns
    if isinstance(identity, Held):
        return identity, identity.tensor._version
    if isinstance(identity, Derived):
        return identity, *map(_state, identity.inputs.values())
    return identity if isinstance(identity, Initial) else None


_last = _LastAbsmax()


def _codes(piece: Piece) -> torch.Tensor:
    take, size, codebook = piece.args
    start, end = piece.blocks(2 * piece.low, 2 * piece.high, size)
    codes, absmax = operator("peftc.nf4_quantize.default")(take(start, end), size, codebook)
    _last.of(piece.identity)[size, start, end] = absmax
    result: torch.Tensor = codes[piece.low - start // 2 : piece.high - start // 2]
    return result


def _absmax(piece: Piece) -> torch.Tensor:
    take, size = piece.args
    start, end = piece.blocks(piece.low * size, piece.high * size, size)
    known, key = _last.of(piece.identity), (size, start, end)
    if key not in known:
        known[key] = operator("peftc.nf4_absmax.default")(take(start, end), size)
    return known[key]


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
