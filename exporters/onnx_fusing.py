"""What several operators compute that ONNX has one for: RMS normalization and rotary embedding.

A pattern is replaced only where every node of it is as it must be; what differs stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from peftc.graphs import aten
from peftc.normal import operator_of

END = 2**62


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (batch, heads, sequence, size).

    Args:
        x: Its halves are the two coordinates.
        cos: (batch, sequence, size / 2).
        sin: Likewise.
    """
    c, s = cos[:, None], sin[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def fuse(graph: fx.Graph) -> None:
    """Replaces the patterns in a graph in normal form."""
    halves: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if operator_of(node) == "mul":
            _normalization(graph, node)
        elif operator_of(node) == "add":
            _rotation(graph, node, halves)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _operands(node: Any, name: str) -> tuple[Any, ...]:
    """A node's operands where it is of this operator; else none."""
    if isinstance(node, fx.Node) and node.op == "call_function" and operator_of(node) == name:
        return tuple(node.args)
    return ()


def _normalization(graph: fx.Graph, node: fx.Node) -> None:
    """Weight · (x · rsqrt(mean(x²) + eps)), the weight a vector."""
    operands: tuple[Any, ...] = node.args
    for weight, inner in (operands, reversed(operands)):
        factors = _operands(inner, "mul")
        if not (factors and _is_vector(weight)):
            continue
        x, scale = factors
        (total,) = _operands(scale, "rsqrt") or (None,)
        mean, eps = _operands(total, "add") or (None, None)
        square, axes, keep = (_operands(mean, "mean") or (None, None, None))[:3]
        base, power = (_operands(square, "pow") or (None, None))[:2]
        if (
            base is not x
            or power != 2
            or list(axes or ()) != [-1]
            or not (keep and _is_number(eps))
        ):
            continue
        given, vector = x.meta["val"], weight.meta["val"]
        if vector.shape == given.shape[-1:] and vector.dtype == given.dtype:
            with graph.inserting_before(node):
                args = x, [given.shape[-1]], weight, eps
                new = graph.call_function(aten.rms_norm.default, args)
            _take_place(node, new)
            return


def _rotation(graph: fx.Graph, node: fx.Node, halves: dict[fx.Node, fx.Node]) -> None:
    """x·cos + [-b, a]·sin, where x is [a, b] and the halves of cos and of sin are the same."""
    left, right = (*node.args, None)[:2]
    x, cos = _operands(left, "mul")[:2] or (None, None)
    turned, sin = _operands(right, "mul")[:2] or (None, None)
    parts, axis = (*_operands(turned, "cat"), 0, 0)[:2]
    if not (isinstance(parts, (list, tuple)) and len(parts) == 2 and isinstance(x, fx.Node)):
        return
    shape = x.meta["val"].shape
    if len(shape) != 4 or not isinstance(shape[-1], int) or axis not in (-1, 3):
        return
    half = shape[-1] // 2
    (b,) = _operands(parts[0], "neg") or (None,)
    if not (_is_slice(b, x, half, None) and _is_slice(parts[1], x, 0, half)):
        return
    tables = [_table(cos, "cos", shape), _table(sin, "sin", shape)]
    if not all(tables):
        return
    for table in tables:
        assert table is not None
        if table not in halves:
            with graph.inserting_after(table):
                cut = graph.call_function(aten.slice.Tensor, (table, -1, 0, half))
            cut.meta = {"val": table.meta["val"][..., :half], "module": table.meta.get("module")}
            halves[table] = cut
    with graph.inserting_before(node):
        given = (x, *(halves[table] for table in tables if table is not None))
        _take_place(node, graph.call_function(rotate, given))


def _table(node: Any, function: str, shape: Any) -> fx.Node | None:
    """The table (batch, sequence, size) of which a factor is made, if its halves are the same."""
    source, axis = (*_operands(node, "unsqueeze"), None, None)[:2]
    if not isinstance(source, fx.Node) or axis not in (1, -3):
        return None
    found = source.meta["val"].shape
    if len(found) != 3 or [str(d) for d in found] != [str(shape[i]) for i in (0, 2, 3)]:
        return None
    inner: Any = source
    while (factors := _operands(inner, "mul")) and _is_number(factors[1]):
        inner = factors[0]
    (angle,) = _operands(inner, function) or (None,)
    parts, last = (*_operands(angle, "cat"), 0, 0)[:2]
    twice = isinstance(parts, (list, tuple)) and len(parts) == 2 and parts[0] is parts[1]
    return source if twice and last in (-1, 2) else None


def _is_slice(node: Any, source: fx.Node, start: int, end: int | None) -> bool:
    args = _operands(node, "slice")
    if len(args) < 4 or args[0] is not source or args[1] not in (-1, 3):
        return False
    to_end = isinstance(args[3], int) and (args[3] >= END if end is None else args[3] == end)
    return bool(args[2] == start and to_end and (len(args) < 5 or args[4] == 1))


def _is_vector(node: Any) -> bool:
    return isinstance(node, fx.Node) and len(getattr(node.meta.get("val"), "shape", ())) == 1


def _is_number(item: Any) -> bool:
    return isinstance(item, (int, float))


def _take_place(node: fx.Node, new: fx.Node) -> None:
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


__all__ = ["fuse", "rotate"]
