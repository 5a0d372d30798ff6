"""In what tiles each card multiplies by a 4-bit weight, by the number of rows of x.

Every entry is estimated until it is measured: chosen from registers and instruction counts alone.
`benchmarks/nf4_cuda.py --tune` prints the lines to put here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slim:
    """A tile of `outs` × `rows` results, whose columns are shared out among the warps.

    So few rows give few tiles, and it is the warps within one that fill the card.
    """

    outs: int
    rows: int
    columns: int  # of weights in a slice, at most a block
    slices: int  # side by side; a warp has a whole number of them
    warps: int
    stages: int


@dataclass(frozen=True)
class Tile:
    """A tile of `outs` × `rows` results; backward, `outs` is what one step contracts."""

    outs: int
    rows: int
    columns: int  # of weights in one step, at most a block
    warps: int
    stages: int


@dataclass(frozen=True)
class Card:
    """The tile for up to each number of rows; above the last, torch multiplies what was decoded.

    Contractions are split until there are about `programs` programs.
    """

    slim: tuple[tuple[int, Slim], ...]
    tiles: tuple[tuple[int, Tile], ...]
    backward: tuple[tuple[int, Tile], ...]
    programs: int


EXACT = (
    16,
    Slim(outs=16, rows=16, columns=32, slices=4, warps=4, stages=2),
)  # fp32: no tensor core

# By a part of the card's name. All estimated.
CARDS = {
    "H200": Card(
        slim=(
            (1, Slim(outs=16, rows=1, columns=64, slices=8, warps=4, stages=4)),
            (4, Slim(outs=16, rows=4, columns=64, slices=8, warps=4, stages=4)),
            (8, Slim(outs=16, rows=8, columns=64, slices=8, warps=4, stages=3)),
            (16, Slim(outs=32, rows=16, columns=64, slices=4, warps=4, stages=3)),
        ),
        tiles=(
            (32, Tile(outs=64, rows=32, columns=64, warps=4, stages=4)),
            (64, Tile(outs=64, rows=64, columns=64, warps=4, stages=4)),
            (256, Tile(outs=128, rows=128, columns=64, warps=8, stages=4)),
        ),
        backward=(
            (16, Tile(outs=64, rows=16, columns=64, warps=4, stages=4)),
            (128, Tile(outs=64, rows=64, columns=64, warps=4, stages=4)),
        ),
        programs=528,
    ),
    "A100": Card(
        slim=(
            (1, Slim(outs=16, rows=1, columns=64, slices=8, warps=4, stages=4)),
            (8, Slim(outs=16, rows=8, columns=64, slices=4, warps=4, stages=4)),
            (16, Slim(outs=32, rows=16, columns=64, slices=4, warps=4, stages=3)),
        ),
        tiles=(
            (32, Tile(outs=64, rows=32, columns=64, warps=4, stages=4)),
            (128, Tile(outs=64, rows=64, columns=64, warps=4, stages=3)),
        ),
        backward=((64, Tile(outs=64, rows=32, columns=64, warps=4, stages=3)),),
        programs=432,
    ),
}
# Any other card: small enough for 96 KiB of shared memory.
DEFAULT = Card(
    slim=(
        (1, Slim(outs=16, rows=1, columns=64, slices=4, warps=4, stages=3)),
        (8, Slim(outs=16, rows=8, columns=64, slices=4, warps=4, stages=3)),
        (16, Slim(outs=32, rows=16, columns=64, slices=4, warps=4, stages=3)),
    ),
    tiles=((64, Tile(outs=64, rows=64, columns=64, warps=4, stages=3)),),
    backward=((64, Tile(outs=64, rows=32, columns=64, warps=4, stages=3)),),
    programs=320,
)


def card(name: str) -> Card:
    """The entry of a card, by the name that CUDA gives it."""
    return next((entry for part, entry in CARDS.items() if part in name), DEFAULT)
