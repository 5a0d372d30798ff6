"""How each operator carries on what is affine: the whole knowledge of merging, and of no method.

A rule gets the values of its operands: an `Affine`, a node of the constants' graph, or a number. It
returns the result, or None where that is not affine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from peftc.graphs import Builder, Spec, aten
from peftc.kinds import ConvolutionKind, EmbeddingKind, ExpertsKind, Kind
from peftc.layout import transposed

rotate, grouped = torch.ops.peftc.rotate.default, torch.ops.peftc.grouped_linear.default


@dataclass(frozen=True)
class Affine:
    """base·Wᵀ + b, with W and b nodes of the constants' graph; None stands for identity and zero.

    Attributes:
        base: The node of the site's graph that it is affine in: the site's input, or the result of
            an operator that is not affine.
        pre: While W is the identity, what the base was scaled or rotated by, in that order; it
            moves into the first W.
    """

    base: fx.Node
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    pre: tuple[tuple[Any, fx.Node | float], ...] = ()

    @property
    def is_base(self) -> bool:
        """Whether this is the base itself."""
        return self.weight is None and self.bias is None and not self.pre


class Context:
    """What a rule may ask of the interpretation that it is part of."""

    kind: Kind
    build: Builder
    specs: dict[fx.Node, Spec]

    def matrix(self, value: Affine) -> fx.Node:
        """W, with the identity written out."""
        if value.weight is not None:
            return value.weight
        size = self.specs[value.base].shape[self.kind.channels]
        return self.absorb(self.build.op(aten.eye.default, size), value)

    def has_matrix(self, value: Affine) -> bool:
        """Whether W can be written down: the identity of patches, ids or experts cannot."""
        plain = not isinstance(self.kind, (ConvolutionKind, EmbeddingKind, ExpertsKind))
        return value.weight is not None or plain

    def absorb(self, matrix: fx.Node, value: Affine) -> fx.Node:
        """A matrix applied to a base, with the base's scales and rotations moved into it."""
        for op, by in reversed(value.pre):
            if op is rotate:
                by = self.build.op(aten.transpose.int, by, 1, 2)
            matrix = self.build.op(op, matrix, by)
        return matrix

    def is_input(self, value: Affine) -> bool:
        """Whether a value is the site's input, but for scales and rotations."""
        return value.weight is None and value.bias is None and value.base.op == "placeholder"

    def vector(self, argument: Any, constant: Any) -> tuple[int, Any] | None:
        """A constant operand as a number or scalar (0) or a vector over the features (1)."""
        if not isinstance(argument, fx.Node):
            return 0, constant
        shape = self.specs[argument].shape
        if not shape:
            return 0, constant
        if not isinstance(self.kind, ConvolutionKind):
            return (1, constant) if len(shape) == 1 else None
        rank = len(self.kind.stride)
        batched = len(shape) == rank + 2 and shape[0] == 1  # as PEFT keeps such vectors
        if (batched or len(shape) == rank + 1) and set(shape[-rank:]) <= {1}:
            return 1, self.build.flatten(constant, 0)
        return None

    def keeps(self, node: fx.Node, argument: Any) -> bool:
        """Whether a pointwise result has the shape of the operand that is not `argument`."""
        a, b = node.args[:2]
        other = b if argument is a else a
        assert isinstance(other, fx.Node)
        return self.specs[node].shape == self.specs[other].shape

    def widened(self, bias: fx.Node | None, node: fx.Node) -> fx.Node | None:
        """A bias that may be of one element, as wide as the value that it belongs to."""
        width = self.specs[node].shape[self.kind.channels]
        narrow = (
            any(self.specs[a].shape[-1:] != (width,) for a in node.all_input_nodes)
            and self.kind.channels == -1
        )
        return self.build.op(aten.expand.default, bias, [width]) if bias and narrow else bias

    def compose(self, matrix: fx.Node, value: Affine) -> fx.Node:
        """The matrix of a map that follows a value's."""
        if value.weight is None:
            return self.absorb(matrix, value)
        if isinstance(self.kind, ExpertsKind):
            return self.build.op(aten.bmm.default, matrix, value.weight)
        return self.build.mm(matrix, value.weight)


def _linear(
    c: Context, node: fx.Node, x: Any, weight: Any, bias: fx.Node | None = None
) -> Affine | None:
    if not isinstance(x, Affine) or isinstance(weight, Affine) or isinstance(bias, Affine):
        return None
    if c.kind.channels != -1 or isinstance(c.kind, ExpertsKind):
        return None
    if c.is_input(x) and isinstance(c.kind, EmbeddingKind):
        return None
    shift = bias if x.bias is None else c.build.linear(x.bias, weight, bias)
    return Affine(x.base, c.compose(weight, x), shift)


def _matmul(c: Context, node: fx.Node, x: Any, matrix: Any) -> Affine | None:
    argument = node.args[1]
    if isinstance(matrix, Affine) or not isinstance(argument, fx.Node):
        return None
    if len(c.specs[argument].shape) != 2:
        return None
    return _linear(c, node, x, transposed(c.build, matrix))


def _addmm(c: Context, node: fx.Node, bias: Any, x: Any, matrix: Any) -> Affine | None:
    if isinstance(bias, Affine) or isinstance(matrix, Affine):
        return None
    return _linear(c, node, x, transposed(c.build, matrix), bias)


def _embedding(c: Context, node: fx.Node, table: Any, ids: Any, *rest: Any) -> Affine | None:
    if not isinstance(ids, Affine) or not c.is_input(ids) or ids.pre or isinstance(table, Affine):
        return None
    return Affine(ids.base, c.build.t(table)) if isinstance(c.kind, EmbeddingKind) else None


def _convolution(
    c: Context, node: fx.Node, x: Any, kernel: Any, bias: Any, *geometry: Any
) -> Affine | None:
    kind = c.kind
    if not isinstance(kind, ConvolutionKind) or not isinstance(x, Affine):
        return None
    if isinstance(kernel, Affine) or isinstance(bias, Affine):
        return None
    stride, padding, dilation, transposing, _, groups = (_plain(g) for g in geometry)
    own = (list(kind.stride), list(kind.padding), list(kind.dilation), False, kind.groups)
    if x.base.op == "placeholder" and x.weight is None and x.bias is None:
        if (stride, padding, dilation, transposing, groups) != own:
            return None
        if any(op is rotate for op, _ in x.pre) or (x.pre and kind.groups > 1):
            return None
        return Affine(x.base, c.build.flatten(c.absorb(kernel, x), 1), bias)
    argument = node.args[1]
    assert isinstance(argument, fx.Node)
    pointwise = set(c.specs[argument].shape[2:]) <= {1} and set(stride) == {1}
    if not pointwise or set(padding) != {0} or transposing or groups != 1 or kind.groups > 1:
        return None  # what mixes several groups' features is no grouped convolution
    matrix = c.build.flatten(kernel, 1)
    shift = bias if x.bias is None else c.build.linear(x.bias, matrix, bias)
    return Affine(x.base, c.compose(matrix, x), shift)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _grouped(c: Context, node: fx.Node, x: Any, weight: Any, ends: Any) -> Affine | None:
    if not isinstance(x, Affine) or isinstance(weight, Affine) or not isinstance(ends, Affine):
        return None
    if not isinstance(c.kind, ExpertsKind) or x.bias is not None or not ends.is_base:
        return None
    return Affine(x.base, c.compose(weight, x))


def _rotate(c: Context, node: fx.Node, x: Any, blocks: Any) -> Affine | None:
    if not isinstance(x, Affine) or isinstance(blocks, Affine):
        return None
    if x.weight is None and x.bias is None:
        return replace(x, pre=(*x.pre, (rotate, blocks)))
    shift = None if x.bias is None else c.build.op(rotate, x.bias, blocks)
    turned = c.build.op(rotate, c.build.t(c.matrix(x)), blocks)
    return Affine(x.base, c.build.t(turned), shift)


def _add(c: Context, node: fx.Node, a: Any, b: Any) -> Affine | None:
    if isinstance(a, Affine) and isinstance(b, Affine):
        if a.base is not b.base or not (c.has_matrix(a) and c.has_matrix(b)):
            return None
        weight = c.build.add(c.matrix(a), c.matrix(b))
        bias = c.build.add(a.bias, b.bias) if a.bias and b.bias else a.bias or b.bias
        return Affine(a.base, weight, c.widened(bias, node))
    (value, constant), argument = ((a, b), node.args[1]) if isinstance(a, Affine) else (
        (b, a), node.args[0])  # fmt: skip
    found = c.vector(argument, constant)
    if found is None or found[0] != 1 or not c.keeps(node, argument):
        return None
    bias = found[1] if value.bias is None else c.build.add(value.bias, found[1])
    return replace(value, bias=c.widened(bias, node))


def _sub(c: Context, node: fx.Node, a: Any, b: Any) -> Affine | None:
    minus = _scaled(c, b, -1.0) if isinstance(b, Affine) else c.build.mul(b, -1.0)
    return _add(c, node, a, minus)


def _mul(c: Context, node: fx.Node, a: Any, b: Any) -> Affine | None:
    if isinstance(a, Affine) and isinstance(b, Affine):
        return None
    value, factor, argument = (a, b, node.args[1]) if isinstance(a, Affine) else (
        b, a, node.args[0])  # fmt: skip
    return _scale(c, node, value, factor, argument, aten.mul.Tensor)


def _div(c: Context, node: fx.Node, a: Any, b: Any) -> Affine | None:
    if isinstance(b, Affine):
        return None
    return _scale(c, node, a, b, node.args[1], aten.div.Tensor)


def _neg(c: Context, node: fx.Node, a: Any) -> Affine | None:
    return _scaled(c, a, -1.0)


def _same(c: Context, node: fx.Node, a: Any) -> Affine | None:
    return a if isinstance(a, Affine) else None


def _scaled(c: Context, value: Affine, factor: float) -> Affine:
    bias = None if value.bias is None else c.build.mul(value.bias, factor)
    if value.weight is None:
        return replace(value, pre=(*value.pre, (aten.mul.Tensor, factor)), bias=bias)
    return Affine(value.base, c.build.mul(value.weight, factor), bias)


def _scale(
    c: Context, node: fx.Node, value: Affine, factor: Any, argument: Any, op: Any
) -> Affine | None:
    """Scales by a number, a scalar or one factor per feature."""
    found = c.vector(argument, factor)
    if found is None or not c.keeps(node, argument):
        return None
    rank, vector = found
    if (
        value.base.op == "placeholder"
        and isinstance(c.kind, EmbeddingKind)
        and (value.weight is None)
    ):
        return None  # ids are no numbers
    bias = None if value.bias is None else c.build.op(op, value.bias, vector)
    if value.weight is None:
        return replace(value, pre=(*value.pre, (op, factor)), bias=bias)
    rows = c.build.op(aten.unsqueeze.default, vector, 1) if rank == 1 else vector
    return Affine(value.base, c.build.op(op, value.weight, rows), bias)


Rule = Callable[..., Affine | None]
RULES: dict[Any, Rule] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.embedding.default: _embedding,
    aten.convolution.default: _convolution,
    grouped: _grouped,
    rotate: _rotate,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.neg.default: _neg,
    aten.detach.default: _same,
    "dropout": _same,
}
