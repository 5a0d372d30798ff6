"""Rules of what moves, cuts and joins tensors, and of dimensions that are known at run time."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from peftc.exporters.onnx_lowering import SYMBOLIC, Lowering, Rule, dtype_of, shape_of

END = 2**63 - 1


def argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """An argument of a node, by its place or its name."""
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get(name, default)


def _axis(node: fx.Node, axis: Any) -> int:
    rank = len(shape_of(node))
    assert isinstance(axis, int)
    return axis % rank if rank else 0


def _first(node: fx.Node) -> fx.Node:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def size(to: Lowering, node: fx.Node) -> ir.Value:
    source, axis = _first(node), node.args[1]
    assert isinstance(axis, int)
    return to.op("Shape", to.of(source), start=axis, end=axis + 1)


def arithmetic(to: Lowering, node: fx.Node) -> ir.Value:
    return to.op(SYMBOLIC[node.target], *(to.size(item) for item in node.args))


def negative(to: Lowering, node: fx.Node) -> ir.Value:
    return to.op("Neg", to.size(node.args[0]))


def reshape(to: Lowering, node: fx.Node) -> ir.Value:
    """A reshape; 0 copies a dimension and -1 is what is left, so most need no work at run time."""
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    return _reshaped(to, node, list(sizes))


def _reshaped(to: Lowering, node: fx.Node, sizes: list[Any]) -> ir.Value:
    source = _first(node)
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


def flatten(to: Lowering, node: fx.Node) -> ir.Value:
    before = shape_of(_first(node))
    start = _axis(_first(node), argument(node, 1, "start_dim", 0))
    end = _axis(_first(node), argument(node, 2, "end_dim", -1))
    after = [0] * start + [-1] + [d if isinstance(d, int) else None for d in before[end + 1 :]]
    if None in after:
        sizes = to.op("Shape", to.of(_first(node)))
        head = to.op("Slice", sizes, to.constant([0]), to.constant([start]))
        tail = to.op("Slice", sizes, to.constant([end + 1]), to.constant([END]))
        shape = to.op("Concat", head, to.constant([-1]), tail, axis=0)
        return to.op("Reshape", to.of(_first(node)), shape)
    return to.op("Reshape", to.of(_first(node)), to.constant(after))


def unflatten(to: Lowering, node: fx.Node) -> ir.Value:
    axis, sizes = _axis(_first(node), node.args[1]), node.args[2]
    assert isinstance(sizes, (list, tuple))
    behind = shape_of(_first(node))[axis + 1 :]
    if all(isinstance(d, int) for d in behind):
        return to.op("Reshape", to.of(_first(node)), to.sizes([0] * axis + [*sizes, *behind]))
    shape = to.op("Shape", to.of(_first(node)), start=axis + 1)
    joined = to.op("Concat", to.sizes([0] * axis + [*sizes]), shape, axis=0)
    return to.op("Reshape", to.of(_first(node)), joined)


def expand(to: Lowering, node: fx.Node) -> ir.Value:
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    source = _first(node)
    before = shape_of(source)
    lead = len(sizes) - len(before)
    dims: list[Any] = []
    for place, item in enumerate(sizes):
        kept = place >= lead and str(before[place - lead]) == str(shape_of(node)[place])
        dims.append(1 if kept else item)
    return to.op("Expand", to.of(source), to.sizes(dims))


def repeat(to: Lowering, node: fx.Node) -> ir.Value:
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    source, value = _first(node), to.of(node.args[0])
    if (lead := len(sizes) - len(shape_of(source))) > 0:
        value = to.op("Unsqueeze", value, to.constant(list(range(lead))))
    return to.op("Tile", value, to.sizes(sizes))


def transpose(to: Lowering, node: fx.Node) -> ir.Value:
    rank = len(shape_of(node))
    order = list(range(rank))
    a, b = (_axis(node, axis) for axis in (node.args[1:3] or (0, 1)))
    order[a], order[b] = order[b], order[a]
    return to.op("Transpose", to.of(node.args[0]), perm=order)


def permute(to: Lowering, node: fx.Node) -> ir.Value:
    order = node.args[1]
    assert isinstance(order, (list, tuple))
    return to.op("Transpose", to.of(node.args[0]), perm=[_axis(node, axis) for axis in order])


def t(to: Lowering, node: fx.Node) -> ir.Value:
    if len(shape_of(node)) < 2:
        return to.of(node.args[0])
    return to.op("Transpose", to.of(node.args[0]), perm=[1, 0])


def unsqueeze(to: Lowering, node: fx.Node) -> ir.Value:
    return to.op("Unsqueeze", to.of(node.args[0]), to.constant([_axis(node, node.args[1])]))


def squeeze(to: Lowering, node: fx.Node) -> ir.Value:
    axes = argument(node, 1, "dim", None)
    before = shape_of(_first(node))
    places = [axes] if isinstance(axes, int) else axes or range(len(before))
    gone = [_axis(_first(node), place) for place in places]
    gone = [place for place in gone if before[place] == 1]
    return to.op("Squeeze", to.of(node.args[0]), to.constant(gone))


def slice_(to: Lowering, node: fx.Node) -> ir.Value:
    axis = _axis(node, argument(node, 1, "dim", 0))
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


def select(to: Lowering, node: fx.Node) -> ir.Value:
    axis, index = _axis(_first(node), node.args[1]), node.args[2]
    return to.op("Gather", to.of(node.args[0]), to.scalar(index), axis=axis)


def concatenate(to: Lowering, node: fx.Node) -> ir.Value:
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    dtype, axis = dtype_of(node), argument(node, 1, "dim", 0)
    return to.op("Concat", *(to.of(part, dtype) for part in parts), axis=_axis(node, axis))


def stack(to: Lowering, node: fx.Node) -> ir.Value:
    parts, axis = node.args[0], _axis(node, argument(node, 1, "dim", 0))
    assert isinstance(parts, (list, tuple))
    lifted = [to.op("Unsqueeze", to.of(part), to.constant([axis])) for part in parts]
    return to.op("Concat", *lifted, axis=axis)


def split(to: Lowering, node: fx.Node) -> tuple[ir.Value, ...]:
    axis = _axis(_first(node), argument(node, 2, "dim", 0))
    lengths = [value.shape[axis] for value in node.meta["val"]]
    if len(lengths) == 1:
        return (to.of(node.args[0]),)
    sizes = to.constant([int(length) for length in lengths])
    parts: tuple[ir.Value, ...] = to.op(
        "Split", to.of(node.args[0]), sizes, outputs=len(lengths), axis=axis
    )
    return parts


def unbind(to: Lowering, node: fx.Node) -> tuple[ir.Value, ...]:
    axis = _axis(_first(node), argument(node, 1, "dim", 0))
    source = to.of(node.args[0])
    return tuple(
        to.op("Gather", source, to.constant(place), axis=axis)
        for place in range(len(node.meta["val"]))
    )


def arange(to: Lowering, node: fx.Node) -> ir.Value:
    start, end, step = {
        1: lambda a: (0, a[0], 1), 2: lambda a: (a[0], a[1], 1), 3: lambda a: tuple(a),
    }[len(node.args)](node.args)  # fmt: skip
    counted = to.op("Range", *(to.scalar(item) for item in (start, end, step)))
    dtype = dtype_of(node)
    return counted if dtype == torch.int64 else to.cast(counted, dtype)


def full(to: Lowering, node: fx.Node) -> ir.Value:
    sizes, fill = node.args[:2]
    assert isinstance(sizes, (list, tuple))
    return _filled(to, node, list(sizes), fill)


def filled(fill: float, place: int) -> Rule:
    """A tensor of one value, whose shape is an argument of the operator."""

    def rule(to: Lowering, node: fx.Node) -> ir.Value:
        sizes = node.args[place]
        assert isinstance(sizes, (list, tuple))
        return _filled(to, node, list(sizes), fill)

    return rule


def filled_like(fill: float | None) -> Rule:
    """A tensor of one value, in the shape of another."""

    def rule(to: Lowering, node: fx.Node) -> ir.Value:
        item = node.args[1] if fill is None else fill
        shape = to.op("Shape", to.of(node.args[0]))
        return to.op("Expand", to.of(item, dtype_of(node)), shape)

    return rule


def new_full(to: Lowering, node: fx.Node) -> ir.Value:
    sizes, fill = node.args[1:3]
    assert isinstance(sizes, (list, tuple))
    return _filled(to, node, list(sizes), fill)


def _filled(to: Lowering, node: fx.Node, sizes: list[Any], fill: Any) -> ir.Value:
    value = to.of(fill, dtype_of(node))
    return to.op("Expand", value, to.sizes(sizes)) if sizes else value


def index(to: Lowering, node: fx.Node) -> ir.Value:
    """x[i, j, …] with tensors for some leading dimensions, or for one dimension."""
    places = node.args[1]
    assert isinstance(places, (list, tuple))
    given = [(axis, item) for axis, item in enumerate(places) if item is not None]
    if len(given) == 1:
        axis, item = given[0]
        if dtype_of(item) != torch.bool:
            return to.op("Gather", to.of(node.args[0]), to.of(item), axis=axis)
    leading = [axis for axis, _ in given] == list(range(len(given)))
    if not leading or any(dtype_of(item) == torch.bool for _, item in given):
        return unsupported(to, node)
    indices = [to.of(item, torch.int64) for _, item in given]
    shape = to.op("Shape", indices[0])
    total = indices[0]
    for other in indices[1:]:  # a sum has the shape that all broadcast to
        total = to.op("Add", total, other)
    shape = to.op("Shape", total)
    wide = [to.op("Expand", item, shape) for item in indices]
    last = [to.op("Unsqueeze", item, to.constant([-1])) for item in wide]
    return to.op("GatherND", to.of(node.args[0]), to.op("Concat", *last, axis=-1))


def gather(to: Lowering, node: fx.Node) -> ir.Value:
    x, axis, places = node.args[:3]
    return to.op("GatherElements", to.of(x), to.of(places), axis=axis)


def index_select(to: Lowering, node: fx.Node) -> ir.Value:
    x, axis, places = node.args[:3]
    return to.op("Gather", to.of(x), to.of(places), axis=axis)


def triangle(upper: bool) -> Rule:
    """The upper or lower triangle."""

    def rule(to: Lowering, node: fx.Node) -> ir.Value:
        shift = to.constant(argument(node, 1, "diagonal", 0))
        return to.op("Trilu", to.of(node.args[0]), shift, upper=int(upper))

    return rule


def unsupported(to: Lowering, node: fx.Node) -> ir.Value:
    from peftc.errors import CaptureError
    from peftc.normal import operator_of

    raise CaptureError(
        f"peftc has no ONNX operator for such an aten.{operator_of(node)}",
        where=to.module or to.whole.name,
        fix="write the model with --format safetensors",
    )


def pad(to: Lowering, node: fx.Node) -> ir.Value:
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    rank = len(shape_of(node))
    before, behind = [0] * rank, [0] * rank
    for place in range(len(sizes) // 2):
        before[rank - 1 - place], behind[rank - 1 - place] = sizes[2 * place : 2 * place + 2]
    fill = to.of(argument(node, 3, "value", 0) or 0, dtype_of(node))
    return to.op("Pad", to.of(node.args[0]), to.sizes(before + behind), fill)


SHAPES: Mapping[Any, Rule] = {
    "sym_size": size, **dict.fromkeys(SYMBOLIC, arithmetic), operator.neg: negative,
    "view": reshape, "reshape": reshape, "_unsafe_view": reshape, "flatten": flatten,
    "unflatten": unflatten, "expand": expand, "repeat": repeat, "transpose": transpose,
    "permute": permute, "t": t, "unsqueeze": unsqueeze, "squeeze": squeeze, "slice": slice_,
    "select": select, "cat": concatenate, "stack": stack, "split": split,
    "split_with_sizes": split, "chunk": split, "unbind": unbind, "arange": arange, "full": full,
    "ones": filled(1, 0), "zeros": filled(0, 0), "new_ones": filled(1, 1),
    "new_zeros": filled(0, 1), "new_full": new_full, "ones_like": filled_like(1),
    "zeros_like": filled_like(0), "full_like": filled_like(None), "index": index,
    "gather": gather, "index_select": index_select, "triu": triangle(True),
    "tril": triangle(False), "pad": pad, "constant_pad_nd": pad,
}  # fmt: skip
