"""What several operators compute that ONNX has one for: normalization, rotation, attention.

A pattern is replaced only where every node of it is as it must be; what differs stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from peftc.graphs import aten
from peftc.normal import operator_of

END = 2**62
CASTS = "to", "_to_copy"


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int | None = None
) -> torch.Tensor:
    """Rotary embedding of x (batch, heads, sequence, size), whose halves are the coordinates.

    Args:
        x: With `heads`, (batch, sequence, heads · size).
        cos: (batch, sequence, size / 2).
        sin: Likewise.
        heads: How many lie beside one another.
    """
    if heads is not None:
        wide = x.view(*x.shape[:2], heads, -1).transpose(1, 2)
        return rotate(wide, cos, sin).transpose(1, 2).flatten(2)
    c, s = cos[:, None], sin[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    heads: tuple[int, int],
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention that adds keys and values to a cache; the result, and the cache's two halves.

    Args:
        query: (batch, sequence, heads · size).
        key: (batch, sequence, key heads · size).
        value: Likewise.
        mask: As `scaled_dot_product_attention` takes it, over the cache and the sequence.
        past_key: (batch, key heads, past, size).
        past_value: Likewise.
        heads: How many the query has, and how many the keys.
        scale: Of the scores; None for 1 / √size.
    """
    q, k, v = (
        x.view(*x.shape[:2], count, -1).transpose(1, 2)
        for x, count in zip((query, key, value), (heads[0], heads[1], heads[1]), strict=True)
    )
    keys, values = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    y = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, mask, scale=scale, enable_gqa=heads[0] != heads[1]
    )
    return y.transpose(1, 2).flatten(2), keys, values


def fuse(graph: fx.Graph) -> None:
    """Replaces the patterns in a graph in normal form."""
    halves: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if operator_of(node) == "mul":
            _normalization(graph, node)
        elif operator_of(node) == "add":
            _rotation(graph, node, halves)
        elif operator_of(node) == "scaled_dot_product_attention":
            _attention(graph, node)
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
        factors = _operands(_uncast(inner), "mul")
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
        x = _uncast(x)  # what ONNX computes in fp32 whatever x is
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


def _attention(graph: fx.Graph, node: Any) -> None:
    """Attention over a cache and what is added to it, heads before the sequence only for it."""
    query, key, value, mask, *more = (*node.args, None)[: max(4, len(node.args))]
    if any(more) or set(node.kwargs) - {"scale", "enable_gqa"}:
        return
    grown = [_grown(node, x) for x in (key, value)]
    turned: Any = next(iter(node.users)) if len(node.users) == 1 else None
    if None in grown or not _swaps_heads(turned):
        return
    (past_key, new_key), (past_value, new_value) = (x for x in grown if x)
    with graph.inserting_before(node):
        flat = [_flat(graph, x) for x in (query, new_key, new_value)]
        if None in flat:
            return
        heads = tuple(x.meta["val"].shape[1] for x in (query, key))
        given = (*flat, mask, past_key, past_value, heads, node.kwargs.get("scale"))
        attended = graph.call_function(attend, given)
        parts = [graph.call_function(operator.getitem, (attended, i)) for i in range(3)]
    values = turned.meta["val"].flatten(2), key.meta["val"], value.meta["val"]
    for part, val in zip(parts, values, strict=True):
        part.meta = {"val": val, "module": node.meta.get("module")}
    attended.meta = {"val": values, "module": node.meta.get("module")}
    for old, part in zip((key, value), parts[1:], strict=True):
        old.replace_all_uses_with(part, lambda user: user is not node)
    for user in list(turned.users):
        if _operands(user, "reshape") and _sizes(user) == _sizes(parts[0]):
            user.replace_all_uses_with(parts[0])
            graph.erase_node(user)
    with graph.inserting_before(turned):
        size = tuple(turned.meta["val"].shape[2:])
        _take_place(turned, graph.call_function(aten.unflatten.int, (parts[0], 2, size)))


def _grown(user: fx.Node, node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The cache and the new part of which a node is made, if nothing needs it before its user."""
    parts, axis = (*_operands(node, "cat"), 0, 0)[:2]
    if not (isinstance(parts, (list, tuple)) and len(parts) == 2 and axis in (-2, 2)):
        return None
    first = parts[0].op == "placeholder"
    early = any(other is not user and other < user for other in node.users)
    return (parts[0], parts[1]) if first and not early else None


def _flat(graph: fx.Graph, node: Any) -> fx.Node | None:
    """What has heads beside one another where a node (batch, heads, sequence, size) has not."""
    if node.target is rotate and len(node.args) == 3:
        x, cos, sin = node.args
        assert isinstance(x, fx.Node)
        inner = _flat(graph, x)
        if inner is None:
            return None
        made = graph.call_function(rotate, (inner, cos, sin, node.meta["val"].shape[1]))
        made.meta = {**node.meta, "val": inner.meta["val"]}
        return made
    if not _swaps_heads(node):
        return None
    beside = node.args[0]
    assert isinstance(beside, fx.Node)
    val = beside.meta["val"].flatten(2)
    source = (_operands(beside, "view") or (None,))[0]
    if isinstance(source, fx.Node) and _sizes(source) == [str(d) for d in val.shape]:
        return source
    made = graph.call_function(aten.flatten.using_ints, (beside, 2, 3))
    made.meta = {**node.meta, "val": val}
    return made


def _swaps_heads(node: Any) -> bool:
    """Whether a node exchanges heads and the sequence."""
    given = _operands(node, "transpose")
    return bool(given) and len(node.meta["val"].shape) == 4 and sorted(given[1:3]) == [1, 2]


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _table(node: Any, function: str, shape: Any) -> fx.Node | None:
    """The table (batch, sequence, size) of which a factor is made, if its halves are the same."""
    source, axis = (*_operands(node, "unsqueeze"), None, None)[:2]
    if not isinstance(source, fx.Node) or axis not in (1, -3):
        return None
    found = source.meta["val"].shape
    if len(found) != 3 or [str(d) for d in found] != [str(shape[i]) for i in (0, 2, 3)]:
        return None
    inner: Any = _uncast(source)
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


def _uncast(node: Any) -> Any:
    """What a node is a cast of; itself if it is none."""
    while casts := next((args for name in CASTS if (args := _operands(node, name))), ()):
        node = casts[0]
    return node


def _is_vector(node: Any) -> bool:
    return isinstance(node, fx.Node) and len(getattr(node.meta.get("val"), "shape", ())) == 1


def _is_number(item: Any) -> bool:
    return isinstance(item, (int, float))


def _take_place(node: fx.Node, new: fx.Node) -> None:
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


__all__ = ["attend", "fuse", "rotate"]
