"""Taking a folded weight apart: what it adds to the base's matrix, and the factors of that.

A folded weight is a graph, mostly a sum W + Σ s·B·A. The sum without W is ΔW, with no digit lost to
cancellation, and where each of its terms is a product over a small inner dimension, B and A are its
factors, whatever method wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc import graphs
from peftc.constants import Constant, Derived, derive, widened
from peftc.graphs import Builder, aten
from peftc.kinds import ConvolutionKind, EmbeddingKind, ExpertsKind, Kind
from peftc.layout import transposed
from peftc.sites import Site, local_name

_NEGLIGIBLE = 1e-12  # of a coefficient such as s·(1/s) − 1
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Delta:
    """What is added to one site's matrix (out, in); of experts, to each one's.

    Attributes:
        matrix: ΔW, fp32 and lazy.
        factors: B (out, r) and A (r, in) with ΔW = B·A, where the graph shows them.
        bias: Δb, where the bias is changed too, as by a factor on the output.
    """

    matrix: Constant
    factors: tuple[Constant, Constant] | None
    bias: Constant | None = None


def delta_of(
    site: Site, before: Mapping[str, Constant], after: Mapping[str, Constant]
) -> Delta | None:
    """What folding adds to a site's weight and bias; None where that is nothing.

    Args:
        site: The site.
        before: Its weight and, where it has one, its bias.
        after: The same, folded.
    """
    bias = None
    if "bias" in before and after["bias"] is not before["bias"]:
        difference = _Difference(None, "bias", before["bias"], after["bias"])
        bias = difference.matrix() if difference.left else None
    if after["weight"] is not before["weight"]:
        difference = _Difference(site.kind, "weight", before["weight"], after["weight"])
        if difference.left:
            return Delta(matrix := difference.matrix(), difference.factors(matrix), bias)
    if bias is None:
        return None
    build = Builder()
    build.graph.output(build.mul(site.kind.matrix(build, build.const("weight")), 0.0))
    return Delta(derive(build.graph, before, torch.float32), None, bias)


class _Difference:
    """A folded constant less the constant of the base, as a sum of terms."""

    def __init__(self, kind: Kind | None, name: str, before: Constant, after: Constant) -> None:
        self.build, self.inputs = Builder(), {name: before}
        if isinstance(after, Derived):
            self.build = Builder(graphs.copy(after.graph))
            self.inputs |= after.inputs
            output = next(node for node in self.build.graph.nodes if node.op == "output")
            node = output.args[0]
            assert isinstance(node, fx.Node)
            self.build.graph.erase_node(output)
        else:
            node, self.inputs["after"] = self.build.const("after"), after
        base = self.build.const(name)
        terms = _Terms(self.build, kind)
        terms.add(terms.matrix(node), 1.0)
        terms.add(base if kind is None else kind.matrix(self.build, base), -1.0)
        self.left = [(term, c) for term, c in terms.found.values() if abs(c) > _NEGLIGIBLE]

    def matrix(self) -> Constant:
        """The difference."""
        build = self.build
        total: fx.Node | None = None
        for term, c in self.left:
            part = term if c == 1 else build.mul(term, c)
            total = part if total is None else build.add(total, part)
        assert total is not None
        return self._bound(total)

    def factors(self, matrix: Constant) -> tuple[Constant, Constant] | None:
        """Factors of the difference, where each of its terms has some."""
        build, below = self.build, min(matrix.spec.shape[-2:])
        shape = _shapes(build, self.inputs)
        pairs = [(_factors(build, term, shape, below), c) for term, c in self.left]
        if any(pair is None for pair, _ in pairs):
            return None
        ups = [p[0] if c == 1 else build.mul(p[0], c) for p, c in pairs if p is not None]
        downs = [p[1] for p, _ in pairs if p is not None]
        up = ups[0] if len(ups) == 1 else build.op(aten.cat.default, ups, -1)
        down = downs[0] if len(downs) == 1 else build.op(aten.cat.default, downs, -2)
        return self._bound(up), self._bound(down)

    def _bound(self, node: fx.Node) -> Derived:
        graph = graphs.copy(self.build.graph)
        same = dict(zip(self.build.graph.nodes, graph.nodes, strict=True))
        graph.output(same[node])
        return derive(graph, self.inputs, torch.float32)


class _Terms:
    """A sum taken apart: each distinct term with its coefficient."""

    def __init__(self, build: Builder, kind: Kind | None) -> None:
        self.build, self.kind = build, kind
        self.found: dict[str, tuple[fx.Node, float]] = {}

    def matrix(self, stored: fx.Node) -> fx.Node:
        """A stored weight's graph as that of the matrix, the transposes moved to its leaves."""
        if self.kind is None:
            return stored
        if isinstance(self.kind, EmbeddingKind) or self.kind.name == "conv1d":
            return transposed(self.build, stored)
        if stored.target is aten.transpose.int and isinstance(self.kind, ExpertsKind):
            inner = stored.args[0]
            assert isinstance(inner, fx.Node)
            return inner
        return self.kind.matrix(self.build, stored)

    def add(self, node: fx.Node, c: float) -> None:
        args: Any = node.args
        if node.target in (aten.add.Tensor, aten.sub.Tensor):
            self.add(args[0], c)
            self.add(args[1], c if node.target is aten.add.Tensor else -c)
        elif node.target is aten.mul.Tensor and isinstance(args[1], (int, float)):
            self.add(args[0], c * args[1])
        elif node.target is aten.div.Tensor and isinstance(args[1], (int, float)):
            self.add(args[0], c / args[1])
        elif node.target is aten.neg.default:
            self.add(args[0], -c)
        else:
            key = _text(node)
            self.found[key] = node, c + self.found.get(key, (node, 0.0))[1]


def _text(node: fx.Node) -> str:
    if node.op == "get_attr":
        return str(node.target)
    return f"{node.target}({fx.node.map_arg(node.args, _Quoted)})"


class _Quoted(str):
    __slots__ = ()

    def __new__(cls, node: fx.Node) -> _Quoted:
        return str.__new__(cls, _text(node))

    def __repr__(self) -> str:
        return str(self)


def _shapes(build: Builder, inputs: Mapping[str, Constant]) -> Callable[[fx.Node], Shape]:
    specs = {name: widened(constant.spec) for name, constant in inputs.items()}
    known: dict[fx.Node, Shape] = {}

    def shape(node: fx.Node) -> Shape:
        if node not in known:
            known.update({n: s.shape for n, s in graphs.propagate(build.graph, specs).items()})
        return known[node]

    return shape


def _factors(
    build: Builder, node: fx.Node, shape: Callable[[fx.Node], Shape], below: int
) -> tuple[fx.Node, fx.Node] | None:
    """Matrices L and R with node = L·R, whose inner dimension is mostly below a bound."""
    args: Any = node.args
    if node.target in (aten.mm.default, aten.bmm.default):
        # A LoRA may have a higher rank than its layer; a rotated weight is no pair of factors.
        if shape(args[0])[-1] < below or not _uses_weight(node):
            return args[0], args[1]
        if (inner := _factors(build, args[0], shape, below)) is not None:
            return inner[0], build.op(_op(node), inner[1], args[1])
        if (inner := _factors(build, args[1], shape, below)) is not None:
            return build.op(_op(node), args[0], inner[0]), inner[1]
        return None
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        inner = _factors(build, args[0], shape, below)
        if inner is None:
            return None
        by = args[1]
        size = (1,) if not isinstance(by, fx.Node) else (shape(by) or (1,))
        op: Any = node.target
        if math.prod(size) == 1 or (len(size) > 1 and size[-1] == 1):  # one factor a row, or one
            return build.op(op, inner[0], by), inner[1]
        if math.prod(size) == size[-1]:
            return inner[0], build.op(op, inner[1], by)
    if node.target is aten.detach.default:
        return _factors(build, args[0], shape, below)
    if node.target is aten.t.default:
        inner = _factors(build, args[0], shape, below)
        return None if inner is None else (build.t(inner[1]), build.t(inner[0]))
    return None


def _op(node: fx.Node) -> Any:
    return node.target


def _uses_weight(node: fx.Node) -> bool:
    return node.target == "weight" or any(map(_uses_weight, node.all_input_nodes))


def stored_down(build: Builder, kind: Kind, matrix: fx.Node, shape: Shape) -> fx.Node:
    """A matrix (rank, in) as PEFT keeps it; the inverse of the kind's `down_matrix`."""
    if isinstance(kind, ConvolutionKind):
        return build.unflatten(matrix, 1, shape[1:])
    if isinstance(kind, ExpertsKind):
        return build.op(aten.flatten.using_ints, matrix, 0, 1)
    return matrix


def stored_up(build: Builder, kind: Kind, matrix: fx.Node, shape: Shape) -> fx.Node:
    """A matrix (out, rank) as PEFT keeps it; the inverse of the kind's `up_matrix`."""
    if isinstance(kind, ConvolutionKind):
        return build.unflatten(matrix, 1, (-1, *(1 for _ in kind.stride)))
    if isinstance(kind, ExpertsKind):
        fastest = build.op(aten.permute.default, matrix, [1, 2, 0])
        return build.op(aten.flatten.using_ints, fastest, 1)
    return matrix


def product(up: Constant, down: Constant) -> Derived:
    """B·A of two factors."""
    build = Builder()
    op = aten.mm.default if len(up.spec.shape) == 2 else aten.bmm.default
    build.graph.output(build.op(op, build.const("up"), build.const("down")))
    return derive(build.graph, {"up": up, "down": down}, torch.float32)


def weighted_sum(terms: Sequence[tuple[Constant, float]]) -> Derived:
    """Σ wᵢ·cᵢ."""
    build = Builder()
    total: fx.Node | None = None
    for i, (_, weight) in enumerate(terms):
        term = build.mul(build.const(f"c{i}"), weight)
        total = term if total is None else build.add(total, term)
    assert total is not None
    build.graph.output(total)
    return derive(build.graph, {f"c{i}": c for i, (c, _) in enumerate(terms)}, torch.float32)


def joined(parts: Sequence[tuple[tuple[Constant, Constant], float]]) -> tuple[Derived, Derived]:
    """Factors of Σ wᵢ·Bᵢ·Aᵢ: the B, each times its weight, side by side; the A stacked."""
    up, down = Builder(), Builder()
    ups = [up.mul(up.const(f"c{i}"), weight) for i, (_, weight) in enumerate(parts)]
    downs = [down.const(f"c{i}") for i in range(len(parts))]
    up.graph.output(up.op(aten.cat.default, ups, -1))
    down.graph.output(down.op(aten.cat.default, downs, -2))
    left = {f"c{i}": factors[0] for i, (factors, _) in enumerate(parts)}
    right = {f"c{i}": factors[1] for i, (factors, _) in enumerate(parts)}
    return derive(up.graph, left, torch.float32), derive(down.graph, right, torch.float32)


def with_identity(matrix: Constant) -> tuple[Constant, Constant]:
    """Factors of a matrix: itself, and an identity on its smaller side."""
    *stack, rows, columns = matrix.spec.shape
    build = Builder()
    eye = build.op(aten.eye.default, min(rows, columns))
    build.graph.output(build.op(aten.expand.default, eye, [*stack, -1, -1]) if stack else eye)
    identity = derive(build.graph, {}, torch.float32)
    return (identity, matrix) if rows <= columns else (matrix, identity)


def peft_parameters(
    site: Site, name: str, factors: tuple[Constant, Constant]
) -> dict[str, Constant]:
    """B and A as PEFT keeps a LoRA's at this kind of site, by their names there."""
    stored: dict[str, Constant] = {}
    embedding = isinstance(site.kind, EmbeddingKind)
    for letter, constant, form in zip("BA", factors, (stored_up, stored_down), strict=True):
        build = Builder()
        build.graph.output(form(build, site.kind, build.const("value"), site.shape))
        key = f"lora_embedding_{letter}" if embedding else f"lora_{letter}.weight"
        stored[local_name(key, name)] = derive(build.graph, {"value": constant}, torch.float32)
    return stored
