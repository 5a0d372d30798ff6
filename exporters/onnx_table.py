"""The table: for each ATen operator, what it is in ONNX."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from peftc.exporters.onnx_fusing import attend, rotate
from peftc.exporters.onnx_lowering import ONNX_TYPES, RUNTIME, Lowering, Rule, dtype_of, shape_of
from peftc.exporters.onnx_shapes import SHAPES, argument, axis_of
from peftc.normal import operator_of


def unary(kind: str, **attributes: Any) -> Rule:
    """An operator of one operand."""

    def rule(to: Lowering, node: Any) -> ir.Value:
        return to.op(kind, to.of(node.args[0], _result(node)), **attributes)

    return rule


def binary(kind: str) -> Rule:
    """An operator of two operands, both in the dtype of its result."""

    def rule(to: Lowering, node: Any) -> ir.Value:
        dtype = _result(node)
        a, b = (to.of(x, dtype) for x in node.args[:2])
        if (alpha := argument(node, 2, "alpha", 1)) != 1:
            b = to.op("Mul", b, to.of(alpha, dtype))
        return to.op(kind, a, b)

    return rule


def reverse(kind: str) -> Rule:
    """The same with its operands exchanged."""

    def rule(to: Lowering, node: Any) -> ir.Value:
        dtype = _result(node)
        return to.op(kind, to.of(node.args[1], dtype), to.of(node.args[0], dtype))

    return rule


def compare(kind: str, negated: bool = False) -> Rule:
    """A comparison, both operands in the dtype that torch compares them in."""

    def rule(to: Lowering, node: Any) -> ir.Value:
        a, b = node.args[:2]
        dtype = torch.result_type(_sample(a), _sample(b))
        result = to.op(kind, to.of(a, dtype), to.of(b, dtype))
        return to.op("Not", result) if negated else result

    return rule


def logical(kind: str) -> Rule:
    """And, or, exclusive or; of whole numbers bit by bit."""

    def rule(to: Lowering, node: Any) -> ir.Value:
        dtype = _result(node)
        name = kind if dtype == torch.bool else f"Bitwise{kind}"
        return to.op(name, *(to.of(x, dtype) for x in node.args[:2]))

    return rule


def _floor_divide(to: Lowering, node: Any) -> ir.Value:
    dtype = _result(node)
    quotient = to.op("Div", *(to.of(x, torch.float64) for x in node.args[:2]))
    return to.cast(to.op("Floor", quotient), dtype)


def reduction(kind: str) -> Rule:
    """A reduction over some dimensions, or all."""

    def rule(to: Lowering, node: Any) -> ir.Value:
        axes = argument(node, 1, "dim", None)
        axes = [axes] if isinstance(axes, int) else axes
        keep = argument(node, 2, "keepdim", False)
        given = to.constant(list(axes)) if axes else None
        return to.op(kind, to.of(node.args[0], _result(node)), given, keepdims=int(keep))

    return rule


def _rsqrt(to: Lowering, node: Any) -> ir.Value:
    return to.op("Reciprocal", to.op("Sqrt", to.of(node.args[0])))


def _silu(to: Lowering, node: Any) -> ir.Value:
    x = to.of(node.args[0])
    return to.op("Mul", x, to.op("Sigmoid", x))


def _gelu(to: Lowering, node: Any) -> ir.Value:
    return to.op("Gelu", to.of(node.args[0]), approximate=argument(node, 1, "approximate", "none"))


def _softmax(to: Lowering, node: Any) -> ir.Value:
    return to.op("Softmax", to.of(node.args[0], _result(node)), axis=node.args[1])


def extreme(kind: str) -> Rule:
    """The smaller or larger of two, element by element, or of all along dimensions."""

    def rule(to: Lowering, node: Any) -> Any:
        if isinstance(argument(node, 1, "other", None), fx.Node):
            return binary(kind)(to, node)
        if isinstance(node.meta["val"], torch.Tensor):
            return reduction(f"Reduce{kind}")(to, node)
        axis, keep = argument(node, 1, "dim", 0), int(argument(node, 2, "keepdim", False))
        given = to.of(node.args[0])
        values = to.op(f"Reduce{kind}", given, to.constant([axis]), keepdims=keep)
        return values, to.op(f"Arg{kind}", given, axis=axis, keepdims=keep)

    return rule


def _clamp(to: Lowering, node: Any) -> ir.Value:
    dtype = _result(node)
    low, high = argument(node, 1, "min", None), argument(node, 2, "max", None)
    bounds = [None if bound is None else to.of(bound, dtype) for bound in (low, high)]
    return to.op("Clip", to.of(node.args[0], dtype), *bounds)


def _where(to: Lowering, node: Any) -> ir.Value:
    dtype, (mask, a, b) = _result(node), node.args
    return to.op("Where", to.of(mask), to.of(a, dtype), to.of(b, dtype))


def _masked_fill(to: Lowering, node: Any) -> ir.Value:
    dtype, (x, mask, fill) = _result(node), node.args
    return to.op("Where", to.of(mask), to.of(fill, dtype), to.of(x, dtype))


def _cumsum(to: Lowering, node: Any) -> ir.Value:
    return to.op("CumSum", to.of(node.args[0], _result(node)), to.constant(node.args[1]))


def _cast(to: Lowering, node: Any) -> ir.Value:
    return to.of(node.args[0], _result(node))


def _same(to: Lowering, node: Any) -> ir.Value:
    return to.of(node.args[0])


def _embedding(to: Lowering, node: Any) -> ir.Value:
    table, ids = node.args[:2]
    if table.op == "get_attr" and table.target not in to.whole.held:
        found = to.weights.embedding(to, to.of(ids), str(table.target))
        if found is not None:
            return found
        rows = to.op("Gather", to.stored(str(table.target)), to.of(ids))  # few, then cast
        return rows if rows_match(to, table) else to.cast(rows, _result(node))
    return to.op("Gather", to.of(table), to.of(ids))


def rows_match(to: Lowering, table: fx.Node) -> bool:
    """Whether a table is stored in the dtype that the graph computes with."""
    return bool(to.stored(str(table.target)).dtype == ONNX_TYPES[table.meta["val"].dtype])


def _linear(to: Lowering, node: Any) -> ir.Value:
    x, weight, bias = (*node.args, None)[:3]
    given = to.of(x)
    b = None if bias is None else to.of(bias)
    if weight.op == "get_attr":
        if (beside := _beside(to, node)) is not None:
            return beside
        found = to.weights.linear(to, given, str(weight.target), b)
        if found is not None:
            return found
    y = to.op("FusedMatMul", given, to.of(weight), domain=RUNTIME, transB=1)
    if b is None:
        return y
    y.type, y.shape = ir.TensorType(ONNX_TYPES[_result(node)]), ir.Shape(_static(node))
    return to.op("Add", y, b)


def _beside(to: Lowering, node: Any) -> ir.Value | None:
    """A product that is one of several of the same x by one operator, such as q, k and v.

    Small products cost more for being called than for what they compute.
    """
    if node not in to.values:
        group = _siblings(node)
        names = [str(other.args[1].target) for other in group]
        found = to.weights.linears(to, to.of(node.args[0]), names) if len(group) > 2 else None
        to.values |= dict(zip(group, found or (), strict=False))
    return to.values.get(node)


def _siblings(node: Any) -> list[Any]:
    """The products, without a bias, of the same x with weights of modules of the same parent."""
    named = {
        other: str(other.args[1].target)
        for other in node.args[0].users
        if operator_of(other) == "linear"
        and other.args[1].op == "get_attr"
        and not any(other.args[2:])
    }
    path = str(node.args[1].target).rpartition(".")[0].rpartition(".")[0]
    group = [other for other, name in named.items() if name.startswith(f"{path}.")]
    return group if node in group else []


def _addmm(to: Lowering, node: Any) -> ir.Value:
    bias, a, b = node.args[:3]
    if b.op == "get_attr":
        found = to.weights.linear(to, to.of(a), str(b.target), to.of(bias), turned=True)
        if found is not None:
            return found
    return to.op("Gemm", to.of(a), to.of(b), to.of(bias))


def _matmul(to: Lowering, node: Any) -> ir.Value:
    dtype, (a, b) = _result(node), node.args[:2]
    if (weight := _turned(b)) is not None:
        return to.op("FusedMatMul", to.of(a, dtype), to.of(weight), domain=RUNTIME, transB=1)
    return to.op("MatMul", to.of(a, dtype), to.of(b, dtype))


def _turned(node: Any) -> fx.Node | None:
    """The stored weight of which a node is the transpose, matrix by matrix."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    source, name = node.args[0], operator_of(node)
    if name == "transpose":
        rank = len(shape_of(node))
        if {axis_of(node, axis) for axis in node.args[1:3]} != {rank - 1, rank - 2}:
            return None
    elif not (name in ("t", "numpy_T") and len(shape_of(node)) == 2):
        return None
    return source if isinstance(source, fx.Node) and source.op == "get_attr" else None


def _baddbmm(to: Lowering, node: Any) -> ir.Value:
    dtype = _result(node)
    added, a, b = (to.of(x, dtype) for x in node.args[:3])
    product = _scaled(to, to.op("MatMul", a, b), argument(node, 4, "alpha", 1), dtype)
    return to.op("Add", _scaled(to, added, argument(node, 3, "beta", 1), dtype), product)


def _scaled(to: Lowering, value: ir.Value, factor: float, dtype: torch.dtype) -> ir.Value:
    return value if factor == 1 else to.op("Mul", value, to.of(factor, dtype))


def _divide(to: Lowering, node: Any) -> ir.Value:
    rounding, dtype = argument(node, 2, "rounding_mode", None), _result(node)
    if rounding is None:
        return to.op("Div", *(to.of(x, dtype) for x in node.args[:2]))
    wide = torch.float64 if not dtype.is_floating_point else dtype
    quotient = to.op("Div", *(to.of(x, wide) for x in node.args[:2]))
    if rounding == "floor":
        return to.cast(to.op("Floor", quotient), dtype)
    return to.cast(to.cast(quotient, torch.int64), dtype)


def _layer_norm(to: Lowering, node: Any) -> ir.Value:
    x, dims = node.args[:2]
    weight, bias = argument(node, 2, "weight", None), argument(node, 3, "bias", None)
    scale = to.constant([1.0] * dims[-1], _result(node)) if weight is None else to.of(weight)
    shift = None if bias is None else to.of(bias)
    eps = argument(node, 4, "eps", 1e-5)
    return to.op("LayerNormalization", to.of(x), scale, shift, axis=-len(dims), epsilon=eps)


def _rms_norm(to: Lowering, node: Any) -> ir.Value:
    x, dims, weight, eps = node.args
    return to.op("RMSNormalization", to.of(x), to.of(weight), axis=-len(dims), epsilon=eps)


def _rotary(to: Lowering, node: Any) -> ir.Value:
    x, cos, sin = (to.of(given) for given in node.args[:3])
    return to.op("RotaryEmbedding", x, cos, sin, num_heads=argument(node, 3, "heads", None))


def _attention(to: Lowering, node: Any) -> ir.Value:
    query, key, value = (to.of(x) for x in node.args[:3])
    mask = argument(node, 3, "attn_mask", None)
    scale = argument(node, 6, "scale", None)
    if scale is None:
        scale = 1 / math.sqrt(shape_of(node.args[0])[-1])
    return to.op(
        "Attention",
        query,
        key,
        value,
        None if mask is None else to.of(mask),
        scale=float(scale),
        is_causal=int(argument(node, 5, "is_causal", False)),
    )


def _attention_with_cache(to: Lowering, node: Any) -> tuple[ir.Value, ...]:
    *tensors, (heads, key_heads), scale = node.args
    given = [None if x is None else to.of(x) for x in tensors]
    if scale is None:
        scale = 1 / math.sqrt(shape_of(tensors[-1])[-1])
    return to.ops(
        "Attention", *given, outputs=3, q_num_heads=heads, kv_num_heads=key_heads,
        scale=float(scale),
    )  # fmt: skip


def _convolution(to: Lowering, node: Any) -> ir.Value:
    x, weight = node.args[:2]
    rank = len(shape_of(weight)) - 2
    bias = argument(node, 2, "bias", None)
    stride, padding, dilation = (
        _per_axis(argument(node, place, name, default), rank)
        for place, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    last = 8 if len(node.args) > 7 else 6
    return to.op(
        "Conv", to.of(x), to.of(weight), None if bias is None else to.of(bias),
        strides=stride, pads=padding * 2, dilations=dilation,
        group=argument(node, last, "groups", 1),
    )  # fmt: skip


def _topk(to: Lowering, node: Any) -> tuple[ir.Value, ...]:
    return to.ops(
        "TopK", to.of(node.args[0]), to.size(node.args[1]), outputs=2,
        axis=argument(node, 2, "dim", -1), largest=int(argument(node, 3, "largest", True)),
        sorted=int(argument(node, 4, "sorted", True)),
    )  # fmt: skip


def _argmax(to: Lowering, node: Any) -> ir.Value:
    return to.op(
        "ArgMax", to.of(node.args[0]), axis=argument(node, 1, "dim", 0),
        keepdims=int(argument(node, 2, "keepdim", False)),
    )  # fmt: skip


def _per_axis(item: Any, rank: int) -> list[int]:
    sizes = [item] * rank if isinstance(item, int) else list(item)
    return sizes * rank if len(sizes) < rank else sizes


def _result(node: Any) -> torch.dtype:
    return dtype_of(node)


def _static(node: Any) -> list[int | None]:
    return [dim if isinstance(dim, int) else None for dim in shape_of(node)]


def _sample(operand: Any) -> Any:
    """What stands for an operand when dtypes are compared: its fake value or the number."""
    if not isinstance(operand, fx.Node):
        return operand
    value = operand.meta["val"]
    return value if isinstance(value, torch.Tensor) else 0


TABLE: Mapping[Any, Rule] = {
    # element by element
    "add": binary("Add"), "sub": binary("Sub"), "mul": binary("Mul"), "div": _divide,
    "floor_divide": _floor_divide,
    "rsub": reverse("Sub"), "pow": binary("Pow"), "minimum": binary("Min"),
    "maximum": binary("Max"),
    "neg": unary("Neg"), "abs": unary("Abs"), "exp": unary("Exp"), "log": unary("Log"),
    "sqrt": unary("Sqrt"), "rsqrt": _rsqrt, "reciprocal": unary("Reciprocal"),
    "sin": unary("Sin"), "cos": unary("Cos"), "tanh": unary("Tanh"), "sigmoid": unary("Sigmoid"),
    "relu": unary("Relu"), "erf": unary("Erf"), "gelu": _gelu, "silu": _silu,
    "floor": unary("Floor"),
    "softplus": unary("Softplus"), "hardswish": unary("HardSwish"), "clamp": _clamp,
    "where": _where, "masked_fill": _masked_fill,
    # comparisons and logic
    "eq": compare("Equal"), "ne": compare("Equal", True), "lt": compare("Less"),
    "le": compare("LessOrEqual"), "gt": compare("Greater"), "ge": compare("GreaterOrEqual"),
    "min": extreme("Min"), "max": extreme("Max"), "__and__": logical("And"),
    "__or__": logical("Or"), "__xor__": logical("Xor"), "bitwise_and": logical("And"),
    "bitwise_or": logical("Or"), "logical_and": logical("And"), "logical_or": logical("Or"),
    "logical_not": unary("Not"), "bitwise_not": unary("Not"),
    # reductions
    "mean": reduction("ReduceMean"), "sum": reduction("ReduceSum"), "amax": reduction("ReduceMax"),
    "amin": reduction("ReduceMin"), "cumsum": _cumsum, "argmax": _argmax, "topk": _topk,
    "softmax": _softmax, "_softmax": _softmax,
    # dtypes
    "to": _cast, "_to_copy": _cast, "type_as": _cast, "clone": _same, "contiguous": _same,
    "detach": _same, "detach_": _same, "alias": _same, "lift_fresh_copy": _same, "dropout": _same,
    # layers
    "embedding": _embedding, "linear": _linear, "addmm": _addmm, "matmul": _matmul, "mm": _matmul,
    "bmm": _matmul, "baddbmm": _baddbmm, "layer_norm": _layer_norm, "rms_norm": _rms_norm,
    rotate: _rotary, attend: _attention_with_cache,
    "scaled_dot_product_attention": _attention, "conv1d": _convolution, "conv2d": _convolution,
    "conv3d": _convolution, "convolution": _convolution,
    # what is known of dimensions at run time
    operator.getitem: lambda to, node: to.values[node.args[0]][node.args[1]],
    **SHAPES,
}  # fmt: skip
