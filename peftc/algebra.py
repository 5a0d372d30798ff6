"""Folding: a site whose output is affine in its input becomes one linear over derived constants.

Each value of a site's graph is constant, affine in x (x·Wᵀ + b, with W and b constants) or neither.
The rules below say how an operator carries that on; none of them knows a fine-tuning method. W and
b are not computed here: they are written down as graphs over the site's constants, in the order of
operations in which a reader would write them, and evaluated when they are linked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from peftc import graphs
from peftc.constants import Constant, Initial, cast, derive
from peftc.errors import FoldError, PeftcError
from peftc.graphs import Builder, Spec, aten
from peftc.program import Program, Unfolded
from peftc.sites import Site


@dataclass(frozen=True)
class Affine:
    """x·Wᵀ + b, with W and b nodes of the constants' graph; None stands for identity and zero."""

    weight: fx.Node | None
    bias: fx.Node | None


@dataclass(frozen=True)
class Folded:
    """The graphs of a folded site's stored weight and bias."""

    weight: fx.Graph
    bias: fx.Graph | None


def fold_sites(program: Program) -> tuple[Program, list[FoldError]]:
    """Rewrites every site that was rewritten to its template over derived constants.

    Returns:
        The program with all folded that can be, and an error for each site that cannot: it names
        the node that is not affine in x.
    """
    plain: list[Site] = []
    constants: dict[str, Constant] = {}
    unfolded: dict[str, Unfolded] = {}
    spent: set[str] = set()
    errors: list[FoldError] = []
    stored = set(program.stored.values())
    owned = [t for a in program.adapters.values() for t in a.tensors.values() if t not in stored]
    for fqn, site in program.sites.items():
        if site.is_plain:
            continue
        try:
            folded = _fold(site, tuple(sorted(program.specs(site).items())))
        except FoldError as error:
            errors.append(error)
            continue
        if folded.bias is not None and not site.bias:
            errors.append(
                FoldError(
                    "folding gives it a bias, and the model has no place for one",
                    where=fqn,
                    fix="keep the adapter unmerged, or train it without a bias of its own",
                )
            )
            continue
        bindings = program.bindings(site)
        made = {f"{fqn}.weight": _bind(folded.weight, bindings, program, f"{fqn}.weight")}
        if site.bias:
            made[f"{fqn}.bias"] = _bind(folded.bias, bindings, program, f"{fqn}.bias")
        plain.append(replace(site, graph=site.plain, dropouts={}))
        unfolded[fqn] = Unfolded(site, bindings)
        constants |= made
        spent |= {f"{fqn}.{name}" for name in bindings} - set(made)
        spent |= {tensor for tensor in owned if tensor.startswith(f"{fqn}.")}
    if not plain:
        return program, errors
    done = program.rewrite(plain, constants, unfolded={**program.unfolded, **unfolded})
    return done.without(spent), errors


def _bind(
    graph: fx.Graph | None, bindings: Mapping[str, Constant], program: Program, fqn: str
) -> Constant:
    """The constant that takes the place of a stored one; without a graph, zeros."""
    old = program.constants[fqn]
    if graph is None:
        return Initial(fqn, old.spec, "zeros")
    if graphs.output(graph).op == "get_attr":
        return cast(bindings[str(graphs.output(graph).target)], old.spec.dtype)
    return derive(graph, bindings, old.spec.dtype)


_folds: dict[Any, Folded | PeftcError] = {}


def _fold(site: Site, specs: tuple[tuple[str, Spec], ...]) -> Folded:
    """Folds a graph once for all sites that share it and their constants' shapes."""
    key = site.graph, site.kind, specs
    if key not in _folds:
        try:
            _folds[key] = _Folding(site, dict(specs)).run()
        except FoldError as error:
            _folds[key] = error
    result = _folds[key]
    if isinstance(result, PeftcError):
        raise FoldError(result.what, where=site.fqn, fix=result.fix)
    return result


class _Folding:
    """The abstract interpretation of one site's graph."""

    def __init__(self, site: Site, specs: dict[str, Spec]) -> None:
        self.site = site
        x = Spec((2, site.in_features), torch.float32)
        fp32 = {name: Spec(spec.shape, torch.float32) for name, spec in specs.items()}
        self.specs = graphs.propagate(site.graph, fp32, x)
        self.build = Builder()
        self.values: dict[fx.Node, fx.Node | Affine] = {}

    def run(self) -> Folded:
        for node in self.site.graph.nodes:
            if node.op == "output":
                break
            self.values[node] = self._value(node)
        result = self.values[graphs.output(self.site.graph)]
        if not isinstance(result, Affine):
            raise FoldError("its output does not depend on its input", where=self.site.fqn)
        weight = self._matrix(result)
        if self.site.kind.transposed:
            weight = transposed(self.build, weight)
        bias = None if result.bias is None else _extract(result.bias)
        return Folded(_extract(weight), bias)

    def _value(self, node: fx.Node) -> fx.Node | Affine:
        if node.op == "placeholder":
            return Affine(None, None)
        if node.op == "get_attr":
            return self.build.const(str(node.target))
        operands = [self.values[a] if isinstance(a, fx.Node) else a for a in node.args]
        if node.target is aten.type_as.default:
            return operands[0]  # type: ignore[return-value]  # in fp32 a cast is nothing
        if not any(isinstance(operand, Affine) for operand in operands):
            assert callable(node.target)
            return self.build.op(node.target, *operands)
        rule = RULES.get("dropout" if node.op == "call_module" else node.target)
        result = rule(self, node, *operands) if rule else None
        if result is None:
            raise FoldError(
                f"node {node.name} ({node.target}) is not affine in the site's input",
                where=self.site.fqn,
                fix="keep this branch unmerged, or export it with its adapter",
            )
        return result

    def _matrix(self, value: Affine) -> fx.Node:
        """W, with the identity written out."""
        if value.weight is not None:
            return value.weight
        return self.build.op(aten.eye.default, self.site.in_features)

    def _wide(self, bias: fx.Node | None, node: fx.Node) -> fx.Node | None:
        """A bias that may be of one element, as wide as the value that it belongs to."""
        width = self.specs[node].shape[-1]
        narrow = any(self.specs[a].shape[-1:] != (width,) for a in node.all_input_nodes)
        return self.build.op(aten.expand.default, bias, [width]) if bias and narrow else bias

    def _rank(self, node: Any) -> int:
        """The number of dimensions of an operand; a number has none."""
        return len(self.specs[node].shape) if isinstance(node, fx.Node) else 0


def _linear(
    f: _Folding, node: fx.Node, x: Any, weight: Any, bias: fx.Node | None = None
) -> Affine | None:
    if not isinstance(x, Affine) or isinstance(weight, Affine) or isinstance(bias, Affine):
        return None
    matrix = weight if x.weight is None else f.build.mm(weight, x.weight)
    return Affine(matrix, bias if x.bias is None else f.build.linear(x.bias, weight, bias))


def _matmul(f: _Folding, node: fx.Node, x: Any, matrix: Any) -> Affine | None:
    if isinstance(matrix, Affine) or f._rank(node.args[1]) != 2:
        return None
    return _linear(f, node, x, transposed(f.build, matrix))


def _add(f: _Folding, node: fx.Node, a: Any, b: Any) -> Affine | None:
    if isinstance(a, Affine) and isinstance(b, Affine):
        weight = f.build.add(f._matrix(a), f._matrix(b))
        bias = f.build.add(a.bias, b.bias) if a.bias and b.bias else a.bias or b.bias
        return Affine(weight, f._wide(bias, node))
    (value, constant), argument = ((a, b), node.args[1]) if isinstance(a, Affine) else (
        (b, a), node.args[0])  # fmt: skip
    if f._rank(argument) != 1 or f.specs[node].shape != f.specs[_other(node, argument)].shape:
        return None
    bias = constant if value.bias is None else f.build.add(value.bias, constant)
    return Affine(value.weight, f._wide(bias, node))


def _sub(f: _Folding, node: fx.Node, a: Any, b: Any) -> Affine | None:
    minus = _scaled(f, b, -1.0) if isinstance(b, Affine) else f.build.mul(b, -1.0)
    return _add(f, node, a, minus)


def _mul(f: _Folding, node: fx.Node, a: Any, b: Any) -> Affine | None:
    if isinstance(a, Affine) and isinstance(b, Affine):
        return None
    value, factor, argument = (a, b, node.args[1]) if isinstance(a, Affine) else (
        b, a, node.args[0])  # fmt: skip
    return _scale(f, node, value, factor, argument, aten.mul.Tensor)


def _div(f: _Folding, node: fx.Node, a: Any, b: Any) -> Affine | None:
    if isinstance(b, Affine):
        return None
    return _scale(f, node, a, b, node.args[1], aten.div.Tensor)


def _neg(f: _Folding, node: fx.Node, a: Any) -> Affine | None:
    return _scaled(f, a, -1.0)


def _dropout(f: _Folding, node: fx.Node, a: Any) -> Affine | None:
    return a if isinstance(a, Affine) else None


def _scaled(f: _Folding, value: Affine, factor: float) -> Affine:
    bias = None if value.bias is None else f.build.mul(value.bias, factor)
    return Affine(f.build.mul(f._matrix(value), factor), bias)


def _scale(
    f: _Folding, node: fx.Node, value: Affine, factor: Any, argument: Any, op: Any
) -> Affine | None:
    """Scales by a number, a scalar or one factor per output feature."""
    rank = f._rank(argument)
    if rank > 1 or f.specs[node].shape != f.specs[_other(node, argument)].shape:
        return None
    rows = f.build.op(aten.unsqueeze.default, factor, 1) if rank == 1 else factor
    bias = None if value.bias is None else f.build.op(op, value.bias, factor)
    return Affine(f.build.op(op, f._matrix(value), rows), bias)


def _other(node: fx.Node, argument: Any) -> fx.Node:
    a, b = node.args[:2]
    other = b if argument is a else a
    assert isinstance(other, fx.Node)
    return other


Rule = Callable[..., Affine | None]
RULES: dict[Any, Rule] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.neg.default: _neg,
    "dropout": _dropout,
}


def transposed(build: Builder, node: fx.Node) -> fx.Node:
    """The transpose of a matrix, moved to its leaves so that its rows can be had one by one."""
    if node.target is aten.t.default:
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        return inner
    if node.target is aten.mm.default:
        a, b = node.args
        assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
        return build.mm(transposed(build, b), transposed(build, a))
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        a, b = node.args
        assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
        assert callable(node.target)
        return build.op(node.target, transposed(build, a), transposed(build, b))
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and not isinstance(node.args[1], fx.Node):
        a, number = node.args
        assert isinstance(a, fx.Node) and callable(node.target)
        return build.op(node.target, transposed(build, a), number)
    return build.t(node)


def _extract(result: fx.Node) -> fx.Graph:
    """The graph of one result, without what it does not need."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in result.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(env[result])
    return graphs.intern(graph)
