"""Rules of what moves, cuts and joins tensors, and of dimensions that are known at run time."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from peftc.errors import CaptureError
from peftc.exporters.onnx_lowering import (
    SYMBOLIC,
    Lowering,
    Rule,
    dtype_of,
    shape_of,
)
from peftc.normal import operator_of

END = 2**63 - 1


def argument(node: Any, place: int, name: str, default: Any) -> Any:
    """An argument of a node, by its place or its name."""
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get(name, default)


def axis_of(node: Any, axis: Any) -> int:
    """An axis of a node's value, counted from the front."""
    rank = len(shape_of(node))
    return axis % rank if rank else 0


def _size(to: Lowering, node: Any) -> ir.Value:
    source, axis = node.args[0], node.args[1]
    return to.op("Shape", to.of(source), start=axis, end=axis + 1)


def _arithmetic(to: Lowering, node: Any) -> ir.Value:
    return to.op(SYMBOLIC[node.target], *(to.size(item) for item in node.args))


def _negative(to: Lowering, node: Any) -> ir.Value:
    return to.op("Neg", to.size(node.args[0]))


def _reshape(to: Lowering, node: Any) -> ir.Value:
    """A reshape; 0 copies a dimension and -1 is what is left, so most need no work at run time."""
    sizes = node.args[1]
    return _reshaped(to, node, list(sizes))


def _reshaped(to: Lowering, node: Any, sizes: list[Any]) -> ir.Value:
    source = node.args[0]
    before, after = shape_of(source), shape_of(node)
    dims: list[Any] = []
    for place, item in enumerate(sizes):
        if isinstance(item, fx.Node):
            copied = place < len(before) and str(before[place]) == str(after[place])
            dims.append(0 if copied else item)
        else:
            dims.append(item)
    varying = [place for place, item in enumerate(dims) if isinstance(item, fx.Node)]
    if len(varying) == 1 and -1 not in dims:
        dims[varying[0]] = -1
    return to.op("Reshape", to.of(source), to.sizes(dims))


def _flatten(to: Lowering, node: Any) -> ir.Value:
    before = shape_of(node.args[0])
    start = axis_of(node.args[0], argument(node, 1, "start_dim", 0))
    end = axis_of(node.args[0], argument(node, 2, "end_dim", -1))
    after = [0] * start + [-1] + [d if isinstance(d, int) else None for d in before[end + 1 :]]
    if None in after:
        sizes = to.op("Shape", to.of(node.args[0]))
        head = to.op("Slice", sizes, to.constant([0]), to.constant([start]))
        tail = to.op("Slice", sizes, to.constant([end + 1]), to.constant([END]))
        shape = to.op("Concat", head, to.constant([-1]), tail, axis=0)
        return to.op("Reshape", to.of(node.args[0]), shape)
    return to.op("Reshape", to.of(node.args[0]), to.constant(after))


def _unflatten(to: Lowering, node: Any) -> ir.Value:
    axis, sizes = axis_of(node.args[0], node.args[1]), node.args[2]
    behind = shape_of(node.args[0])[axis + 1 :]
    if all(isinstance(d, int) for d in behind):
        return to.op("Reshape", to.of(node.args[0]), to.sizes([0] * axis + [*sizes, *behind]))
    shape = to.op("Shape", to.of(node.args[0]), start=axis + 1)
    joined = to.op("Concat", to.sizes([0] * axis + [*sizes]), shape, axis=0)
    return to.op("Reshape", to.of(node.args[0]), joined)


def _expand(to: Lowering, node: Any) -> ir.Value:
    sizes = node.args[1]
    source = node.args[0]
    before = shape_of(source)
    lead = len(sizes) - len(before)
    dims: list[Any] = []
    for place, item in enumerate(sizes):
        kept = place >= lead and str(before[place - lead]) == str(shape_of(node)[place])
        dims.append(1 if kept else item)
    return to.op("Expand", to.of(source), to.sizes(dims))


def _repeat(to: Lowering, node: Any) -> ir.Value:
    sizes = node.args[1]
    source, value = node.args[0], to.of(node.args[0])
    if (lead := len(sizes) - len(shape_of(source))) > 0:
        value = to.op("Unsqueeze", value, to.constant(list(range(lead))))
    return to.op("Tile", value, to.sizes(sizes))


def _transpose(to: Lowering, node: Any) -> ir.Value:
    rank = len(shape_of(node))
    order = list(range(rank))
    a, b = (axis_of(node, axis) for axis in (node.args[1:3] or (0, 1)))
    order[a], order[b] = order[b], order[a]
    return to.op("Transpose", to.of(node.args[0]), perm=order)


def _permute(to: Lowering, node: Any) -> ir.Value:
    order = node.args[1]
    return to.op("Transpose", to.of(node.args[0]), perm=[axis_of(node, axis) for axis in order])


def _t(to: Lowering, node: Any) -> ir.Value:
    if len(shape_of(node)) < 2:
        return to.of(node.args[0])
    return to.op("Transpose", to.of(node.args[0]), perm=[1, 0])


def _unsqueeze(to: Lowering, node: Any) -> ir.Value:
    return to.op("Unsqueeze", to.of(node.args[0]), to.constant([axis_of(node, node.args[1])]))


def _squeeze(to: Lowering, node: Any) -> ir.Value:
    axes = argument(node, 1, "dim", None)
    before = shape_of(node.args[0])
    places = [axes] if isinstance(axes, int) else axes or range(len(before))
    gone = [axis_of(node.args[0], place) for place in places]
    gone = [place for place in gone if before[place] == 1]
    return to.op("Squeeze", to.of(node.args[0]), to.constant(gone))


def _slice(to: Lowering, node: Any) -> ir.Value:
    axis = axis_of(node, argument(node, 1, "dim", 0))
    start, end = argument(node, 2, "start", 0), argument(node, 3, "end", END)
    step = argument(node, 4, "step", 1)
    return to.op(
        "Slice",
        to.of(node.args[0]),
        to.size(0 if start is None else start),
        to.size(END if end is None else end),
        to.constant([axis]),
        to.size(step),
    )


def _select(to: Lowering, node: Any) -> ir.Value:
    axis, index = axis_of(node.args[0], node.args[1]), node.args[2]
    return to.op("Gather", to.of(node.args[0]), to.scalar(index), axis=axis)


def _concatenate(to: Lowering, node: Any) -> ir.Value:
    parts = node.args[0]
    dtype, axis = dtype_of(node), argument(node, 1, "dim", 0)
    return to.op("Concat", *(to.of(part, dtype) for part in parts), axis=axis_of(node, axis))


def _stack(to: Lowering, node: Any) -> ir.Value:
    parts, axis = node.args[0], axis_of(node, argument(node, 1, "dim", 0))
    lifted = [to.op("Unsqueeze", to.of(part), to.constant([axis])) for part in parts]
    return to.op("Concat", *lifted, axis=axis)


def _split(to: Lowering, node: Any) -> tuple[ir.Value, ...]:
    axis = axis_of(node.args[0], argument(node, 2, "dim", 0))
    lengths = [value.shape[axis] for value in node.meta["val"]]
    if len(lengths) == 1:
        return (to.of(node.args[0]),)
    sizes = to.constant([int(length) for length in lengths])
    return to.ops("Split", to.of(node.args[0]), sizes, outputs=len(lengths), axis=axis)


def _unbind(to: Lowering, node: Any) -> tuple[ir.Value, ...]:
    axis = axis_of(node.args[0], argument(node, 1, "dim", 0))
    source = to.of(node.args[0])
    return tuple(
        to.op("Gather", source, to.constant(place), axis=axis)
        for place in range(len(node.meta["val"]))
    )


def _arange(to: Lowering, node: Any) -> ir.Value:
    start, end, step = {1: (0, *node.args, 1), 2: (*node.args, 1), 3: node.args}[len(node.args)]
    counted = to.op("Range", *(to.scalar(item) for item in (start, end, step)))
    dtype = dtype_of(node)
    return counted if dtype == torch.int64 else to.cast(counted, dtype)


def _full(to: Lowering, node: Any) -> ir.Value:
    sizes, fill = node.args[:2]
    return _filled(to, node, list(sizes), fill)


def filled(fill: float, place: int) -> Rule:
    """A tensor of one value, whose shape is an argument of the operator."""

    def rule(to: Lowering, node: Any) -> ir.Value:
        sizes = node.args[place]
        return _filled(to, node, list(sizes), fill)

    return rule


def filled_like(fill: float | None) -> Rule:
    """A tensor of one value, in the shape of another."""

    def rule(to: Lowering, node: Any) -> ir.Value:
        item = node.args[1] if fill is None else fill
        shape = to.op("Shape", to.of(node.args[0]))
        return to.op("Expand", to.of(item, dtype_of(node)), shape)

    return rule


def _new_full(to: Lowering, node: Any) -> ir.Value:
    sizes, fill = node.args[1:3]
    return _filled(to, node, list(sizes), fill)


def _filled(to: Lowering, node: Any, sizes: list[Any], fill: Any) -> ir.Value:
    value = to.of(fill, dtype_of(node))
    return to.op("Expand", value, to.sizes(sizes)) if sizes else value


def _index(to: Lowering, node: Any) -> ir.Value:
    """x[i, j, …] with tensors for some leading dimensions, or for one dimension."""
    places = node.args[1]
    given = [(axis, item) for axis, item in enumerate(places) if item is not None]
    if len(given) == 1:
        axis, item = given[0]
        if dtype_of(item) != torch.bool:
            return to.op("Gather", to.of(node.args[0]), to.of(item), axis=axis)
    leading = [axis for axis, _ in given] == list(range(len(given)))
    if not leading or any(dtype_of(item) == torch.bool for _, item in given):
        return _unsupported(to, node)
    indices = [to.of(item, torch.int64) for _, item in given]
    shape = to.op("Shape", indices[0])
    total = indices[0]
    for other in indices[1:]:  # a sum has the shape that all broadcast to
        total = to.op("Add", total, other)
    shape = to.op("Shape", total)
    wide = [to.op("Expand", item, shape) for item in indices]
    last = [to.op("Unsqueeze", item, to.constant([-1])) for item in wide]
    return to.op("GatherND", to.of(node.args[0]), to.op("Concat", *last, axis=-1))


def _gather(to: Lowering, node: Any) -> ir.Value:
    x, axis, places = node.args[:3]
    return to.op("GatherElements", to.of(x), to.of(places), axis=axis)


def _index_select(to: Lowering, node: Any) -> ir.Value:
    x, axis, places = node.args[:3]
    return to.op("Gather", to.of(x), to.of(places), axis=axis)


def triangle(upper: bool) -> Rule:
    """The upper or lower triangle."""

    def rule(to: Lowering, node: Any) -> ir.Value:
        shift = to.constant(argument(node, 1, "diagonal", 0))
        return to.op("Trilu", to.of(node.args[0]), shift, upper=int(upper))

    return rule


def _unsupported(to: Lowering, node: Any) -> ir.Value:
    raise CaptureError(
        f"peftc has no ONNX operator for such an aten.{operator_of(node)}",
        where=to.module or to.whole.name,
        fix="write the model with --format safetensors",
    )


def _pad(to: Lowering, node: Any) -> ir.Value:
    sizes = node.args[1]
    rank = len(shape_of(node))
    before, behind = [0] * rank, [0] * rank
    for place in range(len(sizes) // 2):
        before[rank - 1 - place], behind[rank - 1 - place] = sizes[2 * place : 2 * place + 2]
    fill = to.of(argument(node, 3, "value", 0) or 0, dtype_of(node))
    return to.op("Pad", to.of(node.args[0]), to.sizes(before + behind), fill)


SHAPES: Mapping[Any, Rule] = {
    "sym_size": _size, **dict.fromkeys(SYMBOLIC, _arithmetic), operator.neg: _negative,
    "view": _reshape, "reshape": _reshape, "_unsafe_view": _reshape, "flatten": _flatten,
    "unflatten": _unflatten, "expand": _expand, "repeat": _repeat, "transpose": _transpose,
    "permute": _permute, "t": _t, "numpy_T": _t, "unsqueeze": _unsqueeze, "squeeze": _squeeze,
    "slice": _slice,
    "select": _select, "cat": _concatenate, "stack": _stack, "split": _split,
    "split_with_sizes": _split, "chunk": _split, "unbind": _unbind, "arange": _arange,
    "full": _full,
    "ones": filled(1, 0), "zeros": filled(0, 0), "new_ones": filled(1, 1),
    "new_zeros": filled(0, 1), "new_full": _new_full, "ones_like": filled_like(1),
    "zeros_like": filled_like(0), "full_like": filled_like(None), "index": _index,
    "gather": _gather, "index_select": _index_select, "triu": triangle(True),
    "tril": triangle(False), "pad": _pad, "constant_pad_nd": _pad,
}  # fmt: skip
