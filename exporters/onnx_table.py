"""The table: for each ATen operator, what it is in ONNX."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from peftc.exporters.onnx_fusing import rotate
from peftc.exporters.onnx_lowering import ONNX_TYPES, RUNTIME, Lowering, Rule, dtype_of, shape_of
from peftc.exporters.onnx_shapes import SHAPES, argument


def unary(kind: str, **attributes: Any) -> Rule:
    """An operator of one operand."""

    def rule(to: Lowering, node: fx.Node) -> ir.Value:
        return to.op(kind, to.of(node.args[0], _result(node)), **attributes)

    return rule


def binary(kind: str) -> Rule:
    """An operator of two operands, both in the dtype of its result."""

    def rule(to: Lowering, node: fx.Node) -> ir.Value:
        dtype = _result(node)
        a, b = (to.of(x, dtype) for x in node.args[:2])
        if (alpha := argument(node, 2, "alpha", 1)) != 1:
            b = to.op("Mul", b, to.of(alpha, dtype))
        return to.op(kind, a, b)

    return rule


def reverse(kind: str) -> Rule:
    """The same with its operands exchanged."""

    def rule(to: Lowering, node: fx.Node) -> ir.Value:
        dtype = _result(node)
        return to.op(kind, to.of(node.args[1], dtype), to.of(node.args[0], dtype))

    return rule


def compare(kind: str, negated: bool = False) -> Rule:
    """A comparison, both operands in the dtype that torch compares them in."""

    def rule(to: Lowering, node: fx.Node) -> ir.Value:
        a, b = node.args[:2]
        dtype = torch.result_type(_sample(a), _sample(b))
        result = to.op(kind, to.of(a, dtype), to.of(b, dtype))
        return to.op("Not", result) if negated else result

    return rule


def logical(kind: str) -> Rule:
    """And, or, exclusive or; of whole numbers bit by bit."""

    def rule(to: Lowering, node: fx.Node) -> ir.Value:
        dtype = _result(node)
        name = kind if dtype == torch.bool else f"Bitwise{kind}"
        return to.op(name, *(to.of(x, dtype) for x in node.args[:2]))

    return rule


def reduction(kind: str) -> Rule:
    """A reduction over some dimensions, or all."""

    def rule(to: Lowering, node: fx.Node) -> ir.Value:
        axes = argument(node, 1, "dim", None)
        axes = [axes] if isinstance(axes, int) else axes
        keep = argument(node, 2, "keepdim", False)
        given = to.constant(list(axes)) if axes else None
        return to.op(kind, to.of(node.args[0], _result(node)), given, keepdims=int(keep))

    return rule


def rsqrt(to: Lowering, node: fx.Node) -> ir.Value:
    return to.op("Reciprocal", to.op("Sqrt", to.of(node.args[0])))


def silu(to: Lowering, node: fx.Node) -> ir.Value:
    x = to.of(node.args[0])
    return to.op("Mul", x, to.op("Sigmoid", x))


def gelu(to: Lowering, node: fx.Node) -> ir.Value:
    return to.op("Gelu", to.of(node.args[0]), approximate=argument(node, 1, "approximate", "none"))


def softmax(to: Lowering, node: fx.Node) -> ir.Value:
    return to.op("Softmax", to.of(node.args[0], _result(node)), axis=node.args[1])


def clamp(to: Lowering, node: fx.Node) -> ir.Value:
    dtype = _result(node)
    low, high = argument(node, 1, "min", None), argument(node, 2, "max", None)
    bounds = [None if bound is None else to.of(bound, dtype) for bound in (low, high)]
    return to.op("Clip", to.of(node.args[0], dtype), *bounds)


def where(to: Lowering, node: fx.Node) -> ir.Value:
    dtype, (mask, a, b) = _result(node), node.args
    return to.op("Where", to.of(mask), to.of(a, dtype), to.of(b, dtype))


def masked_fill(to: Lowering, node: fx.Node) -> ir.Value:
    dtype, (x, mask, fill) = _result(node), node.args
    return to.op("Where", to.of(mask), to.of(fill, dtype), to.of(x, dtype))


def cumsum(to: Lowering, node: fx.Node) -> ir.Value:
    return to.op("CumSum", to.of(node.args[0], _result(node)), to.constant(node.args[1]))


def cast(to: Lowering, node: fx.Node) -> ir.Value:
    return to.of(node.args[0], _result(node))


def same(to: Lowering, node: fx.Node) -> ir.Value:
    return to.of(node.args[0])


def embedding(to: Lowering, node: fx.Node) -> ir.Value:
    table, ids = node.args[:2]
    assert isinstance(table, fx.Node)
    if table.op == "get_attr" and table.target not in to.whole.held:
        rows = to.op("Gather", to.stored(str(table.target)), to.of(ids))  # few, then cast
        return rows if rows_match(to, table) else to.cast(rows, _result(node))
    return to.op("Gather", to.of(table), to.of(ids))


def rows_match(to: Lowering, table: fx.Node) -> bool:
    """Whether a table is stored in the dtype that the graph computes with."""
    return bool(to.stored(str(table.target)).dtype == ONNX_TYPES[table.meta["val"].dtype])


def linear(to: Lowering, node: fx.Node) -> ir.Value:
    x, weight, bias = (*node.args, None)[:3]
    given = to.of(x)
    assert isinstance(weight, fx.Node)
    b = None if bias is None else to.of(bias)
    if weight.op == "get_attr":
        found = to.weights.linear(to, given, str(weight.target), b)
        if found is not None:
            return found
    y = to.op("FusedMatMul", given, to.of(weight), domain=RUNTIME, transB=1)
    if b is None:
        return y
    y.type, y.shape = ir.TensorType(ONNX_TYPES[_result(node)]), ir.Shape(_static(node))
    return to.op("Add", y, b)


def addmm(to: Lowering, node: fx.Node) -> ir.Value:
    bias, a, b = node.args[:3]
    return to.op("Gemm", to.of(a), to.of(b), to.of(bias))


def matmul(to: Lowering, node: fx.Node) -> ir.Value:
    dtype = _result(node)
    return to.op("MatMul", *(to.of(x, dtype) for x in node.args[:2]))


def layer_norm(to: Lowering, node: fx.Node) -> ir.Value:
    x, dims = node.args[:2]
    weight, bias = argument(node, 2, "weight", None), argument(node, 3, "bias", None)
    assert isinstance(dims, (list, tuple))
    scale = to.constant([1.0] * dims[-1], _result(node)) if weight is None else to.of(weight)
    shift = None if bias is None else to.of(bias)
    eps = argument(node, 4, "eps", 1e-5)
    return to.op("LayerNormalization", to.of(x), scale, shift, axis=-len(dims), epsilon=eps)


def rms_norm(to: Lowering, node: fx.Node) -> ir.Value:
    x, dims, weight, eps = node.args
    assert isinstance(dims, (list, tuple))
    return to.op("RMSNormalization", to.of(x), to.of(weight), axis=-len(dims), epsilon=eps)


def rotary(to: Lowering, node: fx.Node) -> ir.Value:
    x, cos, sin = (to.of(given) for given in node.args)
    return to.op("RotaryEmbedding", x, cos, sin)


def attention(to: Lowering, node: fx.Node) -> ir.Value:
    query, key, value = (to.of(x) for x in node.args[:3])
    mask = argument(node, 3, "attn_mask", None)
    scale = argument(node, 6, "scale", None)
    if scale is None:
        assert isinstance(node.args[0], fx.Node)
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


def convolution(to: Lowering, node: fx.Node) -> ir.Value:
    x, weight = node.args[:2]
    assert isinstance(weight, fx.Node)
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


def topk(to: Lowering, node: fx.Node) -> tuple[ir.Value, ...]:
    found: tuple[ir.Value, ...] = to.op(
        "TopK", to.of(node.args[0]), to.size(node.args[1]), outputs=2,
        axis=argument(node, 2, "dim", -1), largest=int(argument(node, 3, "largest", True)),
        sorted=int(argument(node, 4, "sorted", True)),
    )  # fmt: skip
    return found


def argmax(to: Lowering, node: fx.Node) -> ir.Value:
    return to.op(
        "ArgMax", to.of(node.args[0]), axis=argument(node, 1, "dim", 0),
        keepdims=int(argument(node, 2, "keepdim", False)),
    )  # fmt: skip


def _per_axis(item: Any, rank: int) -> list[int]:
    sizes = [item] * rank if isinstance(item, int) else list(item)
    return sizes * rank if len(sizes) < rank else sizes


def _result(node: fx.Node) -> torch.dtype:
    return dtype_of(node)


def _static(node: fx.Node) -> list[int | None]:
    return [dim if isinstance(dim, int) else None for dim in shape_of(node)]


def _sample(operand: Any) -> Any:
    """What stands for an operand when dtypes are compared: its fake value or the number."""
    if not isinstance(operand, fx.Node):
        return operand
    value = operand.meta["val"]
    return value if isinstance(value, torch.Tensor) else 0


TABLE: Mapping[Any, Rule] = {
    # element by element
    "add": binary("Add"), "sub": binary("Sub"), "mul": binary("Mul"), "div": binary("Div"),
    "rsub": reverse("Sub"), "pow": binary("Pow"), "minimum": binary("Min"),
    "maximum": binary("Max"), "add_": binary("Add"), "mul_": binary("Mul"),
    "neg": unary("Neg"), "abs": unary("Abs"), "exp": unary("Exp"), "log": unary("Log"),
    "sqrt": unary("Sqrt"), "rsqrt": rsqrt, "reciprocal": unary("Reciprocal"),
    "sin": unary("Sin"), "cos": unary("Cos"), "tanh": unary("Tanh"), "sigmoid": unary("Sigmoid"),
    "relu": unary("Relu"), "erf": unary("Erf"), "gelu": gelu, "silu": silu, "floor": unary("Floor"),
    "softplus": unary("Softplus"), "hardswish": unary("HardSwish"), "clamp": clamp,
    "where": where, "masked_fill": masked_fill,
    # comparisons and logic
    "eq": compare("Equal"), "ne": compare("Equal", True), "lt": compare("Less"),
    "le": compare("LessOrEqual"), "gt": compare("Greater"), "ge": compare("GreaterOrEqual"),
    "__and__": logical("And"), "__or__": logical("Or"), "bitwise_and": logical("And"),
    "bitwise_or": logical("Or"), "logical_and": logical("And"), "logical_or": logical("Or"),
    "logical_not": unary("Not"), "bitwise_not": unary("Not"),
    # reductions
    "mean": reduction("ReduceMean"), "sum": reduction("ReduceSum"), "amax": reduction("ReduceMax"),
    "amin": reduction("ReduceMin"), "cumsum": cumsum, "argmax": argmax, "topk": topk,
    "softmax": softmax, "_softmax": softmax,
    # dtypes
    "to": cast, "_to_copy": cast, "type_as": cast, "clone": same, "contiguous": same,
    "detach": same, "detach_": same, "alias": same, "lift_fresh_copy": same, "dropout": same,
    # layers
    "embedding": embedding, "linear": linear, "addmm": addmm, "matmul": matmul, "mm": matmul,
    "bmm": matmul, "layer_norm": layer_norm, "rms_norm": rms_norm, rotate: rotary,
    "scaled_dot_product_attention": attention, "conv1d": convolution, "conv2d": convolution,
    "conv3d": convolution, "convolution": convolution,
    # what is known of dimensions at run time
    operator.getitem: lambda to, node: to.values[node.args[0]][node.args[1]],  # type: ignore
    **SHAPES,
}  # fmt: skip
