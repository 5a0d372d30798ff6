"""Moving transposes and selections of a constant to its leaves, where they cost nothing.

The rows of t(W + s·B·A) are the rows of t(W) + s·t(A)·t(B); expert e of a stack is its e-th member.
So a constant stays what can be had by rows, and nothing that is not asked for is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from peftc.graphs import Builder, aten

_POINTWISE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def transposed(build: Builder, node: fx.Node) -> fx.Node:
    """The transpose of a matrix, moved to its leaves."""
    args: Any = node.args
    if node.target is aten.t.default:
        return args[0]  # type: ignore[no-any-return]
    if node.target is aten.mm.default:
        return build.mm(transposed(build, args[1]), transposed(build, args[0]))
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        assert callable(node.target)
        return build.op(node.target, transposed(build, args[0]), transposed(build, args[1]))
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and not isinstance(args[1], fx.Node):
        assert callable(node.target)
        return build.op(node.target, transposed(build, args[0]), args[1])
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and _is_column(args[1]):
        assert callable(node.target)
        row = build.op(aten.unsqueeze.default, args[1].args[0], 0)
        return build.op(node.target, transposed(build, args[0]), row)
    return build.t(node)


def _is_column(node: fx.Node) -> bool:
    """Whether a node is a vector with one factor for each row."""
    return node.target is aten.unsqueeze.default and node.args[1:] == (1,)


def element(build: Builder, node: fx.Node, index: int) -> fx.Node:
    """The index-th matrix of a stack of matrices."""
    args: Any = node.args
    if node.target is aten.stack.default:
        return args[0][index]  # type: ignore[no-any-return]
    if node.target is aten.bmm.default:
        return build.mm(element(build, args[0], index), element(build, args[1], index))
    if node.target is aten.transpose.int and set(args[1:]) == {1, 2}:
        return transposed(build, element(build, args[0], index))
    if node.target in _POINTWISE:
        return _each(build, node, lambda a: element(build, a, index))
    if node.target is aten.cat.default and args[1] > 0:
        parts = [element(build, part, index) for part in args[0]]
        return build.op(aten.cat.default, parts, args[1] - 1)
    return build.op(aten.select.int, node, 0, index)


def rows(
    build: Builder, node: fx.Node, low: int, high: int, length: Callable[[fx.Node], int]
) -> fx.Node:
    """Rows low to high of a matrix.

    Args:
        build: Of the node's graph.
        node: The matrix.
        low: The first row.
        high: Behind the last row.
        length: How many rows a node has.
    """
    args: Any = node.args
    if (low, high) == (0, length(node)):
        return node
    if node.target is aten.mm.default:
        return build.mm(rows(build, args[0], low, high, length), args[1])
    if node.target in _POINTWISE and all(
        not isinstance(a, fx.Node) or length(a) == length(node) for a in args
    ):
        return _each(build, node, lambda a: rows(build, a, low, high, length))
    if node.target is aten.cat.default and args[1] == 0:
        start = 0
        for part in args[0]:
            end = start + length(part)
            if start <= low and high <= end:
                return rows(build, part, low - start, high - start, length)
            start = end
    return build.op(aten.slice.Tensor, node, 0, low, high)


def _each(build: Builder, node: fx.Node, move: Callable[[fx.Node], fx.Node]) -> fx.Node:
    assert callable(node.target)
    return build.op(node.target, *(move(a) if isinstance(a, fx.Node) else a for a in node.args))
