"""Folding: a site whose output is affine in its input becomes its own plain map again.

Each value of a site's graph is constant, affine in x (x·Wᵀ + b, with W and b constants) or neither.
The rules below say how an operator carries that on; none of them knows a fine-tuning method. W and
b are not computed here: they are written down as graphs over the site's constants, in the order of
operations in which a reader would write them, and evaluated when they are linked.

What is not affine becomes a new input of what follows. So where a nonlinearity stands in the way,
the affine parts before and behind it fold, and the rest stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from peftc import graphs
from peftc.constants import Constant, Initial, cast, derive, widened
from peftc.errors import FoldError
from peftc.graphs import Builder, Spec, aten
from peftc.kinds import EmbeddingKind, Kind
from peftc.layout import transposed
from peftc.program import Program, Unfolded
from peftc.rules import RULES, Affine, Context
from peftc.sites import Site


@dataclass(frozen=True)
class Folded:
    """A folded site: its graph, and a graph for each constant that folding made.

    Attributes:
        graph: The plain graph, or what is left of the old one.
        made: For each constant of the folded graph that is not the site's own, by its local name,
            the graph that gives it; None stands for zeros.
        obstacle: The node that is not affine in x, if one is.
    """

    graph: fx.Graph
    made: Mapping[str, fx.Graph | None]
    obstacle: str | None


def fold_sites(program: Program, partly: bool = False) -> tuple[Program, list[FoldError]]:
    """Rewrites every site that was rewritten to its plain graph over derived constants.

    Args:
        program: What to fold.
        partly: Fold the affine parts of a site that is not affine as a whole.

    Returns:
        The program with all folded that can be, and an error for each site that cannot: it names
        the node that is not affine in x.
    """
    done: list[Site] = []
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
            errors.append(FoldError(error.what, where=fqn, fix=error.fix))
            continue
        if folded.obstacle is not None:
            errors.append(_refusal(program, fqn, folded.obstacle))
            if not partly or not folded.made:
                continue
        if "bias" in folded.made and not site.bias and folded.made["bias"] is not None:
            errors.append(
                FoldError(
                    "folding gives it a bias, and the model has no place for one",
                    where=fqn,
                    fix="keep the adapter unmerged, or train it without a bias of its own",
                )
            )
            continue
        bindings = program.bindings(site)
        kept = {site.name(local) for local in graphs.constant_names(folded.graph)}
        made = {
            site.name(local): _bind(graph, bindings, program, site.name(local))
            for local, graph in folded.made.items()
            if local != "bias" or site.bias
        }
        done.append(replace(site, graph=folded.graph, dropouts=_left(site, folded.graph)))
        if folded.obstacle is None:
            unfolded[fqn] = Unfolded(site, bindings)
        constants |= made
        spent |= {site.name(local) for local in bindings} - kept - stored
        if folded.obstacle is None:
            spent |= {t for t in owned if t.startswith((f"{fqn}.", f"{fqn}_"))}
    after = program.rewrite(done, constants, unfolded={**program.unfolded, **unfolded})
    after = after.without(spent)
    return after if done or len(after.adapters) < len(program.adapters) else program, errors


def _refusal(program: Program, fqn: str, obstacle: str) -> FoldError:
    for adapter in program.adapters.values():
        if fqn in adapter.sites and adapter.method and (reason := adapter.method.apart):
            return FoldError(
                f"the adapter {adapter.name!r} cannot be merged: {reason} (node {obstacle})",
                where=fqn,
                fix="export it as it is (--format peft), or as a constant cache, beside it what "
                "can be merged (--merge --format cache)",
            )
    return FoldError(
        f"node {obstacle} is not affine in the site's input",
        where=fqn,
        fix="keep this branch unmerged, or export it with its adapter",
    )


def _left(site: Site, graph: fx.Graph) -> dict[str, float]:
    """The dropouts that a graph still calls."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    return {name: p for name, p in site.dropouts.items() if name in called}


def _bind(
    graph: fx.Graph | None, bindings: Mapping[str, Constant], program: Program, fqn: str
) -> Constant:
    """The constant that takes the place of a stored one; without a graph, zeros."""
    old = program.constants.get(fqn)
    dtype = old.spec.dtype if old is not None else torch.float32
    if graph is None:
        assert old is not None
        return Initial(fqn, old.spec, "zeros")
    if graphs.output(graph).op == "get_attr":
        return cast(bindings[str(graphs.output(graph).target)], dtype)
    return derive(graph, bindings, dtype)


_folds: dict[Any, Folded | FoldError] = {}


def _fold(site: Site, specs: tuple[tuple[str, Spec], ...]) -> Folded:
    """Folds a graph once for all sites that share it and their constants' shapes."""
    key = site.graph, site.kind, site.shape, specs
    if key not in _folds:
        try:
            _folds[key] = _Folding(site, dict(specs)).run()
        except FoldError as error:
            _folds[key] = error
    result = _folds[key]
    if isinstance(result, FoldError):
        raise result
    return result


def fold_graph(site: Site, tensors: Mapping[str, torch.Tensor]) -> Folded:
    """Folds a graph that is no program's yet, given examples of its constants.

    Raises:
        FoldError: Its output does not depend on its input.
    """
    return _Folding(site, {n: Spec(tuple(t.shape), t.dtype) for n, t in tensors.items()}).run()


class _Folding(Context):
    """The abstract interpretation of one site's graph."""

    def __init__(self, site: Site, specs: dict[str, Spec]) -> None:
        self.site, self.kind = site, site.kind
        self.build = Builder()
        fp32 = {name: widened(spec) for name, spec in specs.items()}
        inputs = site.kind.specs(site.shape, torch.float32)
        self.specs = graphs.propagate(site.graph, fp32, inputs)
        self.values: dict[fx.Node, fx.Node | Affine] = {}
        self.obstacle: str | None = None

    def run(self) -> Folded:
        for node in self.site.graph.nodes:
            if node.op != "output":
                self.values[node] = self._value(node)
        result = self.values[graphs.output(self.site.graph)]
        if not self.kind.opened and not self._given(result):
            raise FoldError(
                f"node {self._nonlinear() or self.obstacle or graphs.output(self.site.graph)} "
                "stands around a module that is not opened",
                fix="keep this adapter unmerged: a module as a whole has no weight to fold into",
            )
        if not isinstance(result, Affine):
            raise FoldError("its output does not depend on its input", where=self.site.fqn)
        if not self.kind.opened:
            return Folded(self.site.plain, {}, None)
        if result.base.op == "placeholder":
            shape = self.site.shape
            stored = self.kind.stored(self.build, self.matrix(result), shape)
            made = {"weight": _extract(settled(self.build, stored, self.kind))}
            bias = None if result.bias is None else _extract(result.bias)
            return Folded(
                self.site.plain, {**made, "bias": bias} if self._biased(bias) else made, None
            )
        return self._rest(result)

    def _nonlinear(self) -> str | None:
        """The first node that no rule carries on, and that the module itself does not have."""
        known = {*RULES, *(node.target for node in self.site.plain.nodes)}
        for node, value in self.values.items():
            broken = isinstance(value, Affine) and value.base is node
            if broken and node.op == "call_function" and node.target not in known:
                return f"{node.name} ({node.target})"
        return None

    def _given(self, result: fx.Node | Affine) -> bool:
        """Whether a result is just what a module that is not opened gives."""
        return isinstance(result, Affine) and result.is_base and result.base.target == "y"

    def _biased(self, bias: fx.Graph | None) -> bool:
        return bias is not None or self.site.bias

    def _value(self, node: fx.Node) -> fx.Node | Affine:
        if node.op == "placeholder":
            return Affine(node)
        if node.op == "get_attr":
            return self.build.const(str(node.target))
        operands = [self._operand(argument) for argument in node.args]
        if node.target is aten.type_as.default:
            return operands[0]  # type: ignore[no-any-return]  # in fp32 a cast is nothing
        if not any(isinstance(self.values[n], Affine) for n in node.all_input_nodes):
            assert callable(node.target)
            return self.build.op(node.target, *operands)
        rule = RULES.get("dropout" if node.op == "call_module" else node.target)
        result = rule(self, node, *operands) if rule else None
        if result is not None:
            return result
        if self.obstacle is None:
            self.obstacle = f"{node.name} ({node.target})"
        return Affine(node)

    def _operand(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [self._operand(item) for item in argument]
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def _rest(self, result: Affine) -> Folded:
        """What is left of a graph with a nonlinearity: each affine part before or behind it."""
        build = Builder()
        done: dict[fx.Node, fx.Node] = {}
        made: dict[str, fx.Graph | None] = {}

        def node_of(old: fx.Node) -> fx.Node:
            value = self.values[old]
            if isinstance(value, Affine):
                return of(value)
            return _copy(value, build)

        def of(value: Affine) -> fx.Node:
            base = at(value.base)
            if value.weight is None and value.bias is None and not value.pre:
                return base
            weight = constant("weight", self.matrix(value))
            bias = None if value.bias is None else constant("bias", value.bias)
            # Casts were left out on the way: parts of several dtypes may meet here.
            bias = None if bias is None else build.type_as(bias, weight)
            if value.base.op != "placeholder":
                return self.kind.mix(build, build.type_as(base, weight), weight, bias)
            counts = isinstance(self.kind, EmbeddingKind)
            x = base if counts else build.type_as(base, weight)
            return self.kind.apply(build, x, weight, bias)

        def constant(role: str, node: fx.Node) -> fx.Node:
            if node.op == "get_attr":
                return build.const(str(node.target))
            graph = _extract(node)
            local = role if role in graphs.constant_names(graph) and role not in made else None
            local = local or f"folded_{len(made)}.{role}"
            stored = node
            if local == "weight":
                stored = settled(
                    self.build, self.kind.stored(self.build, node, self.site.shape), self.kind
                )
            made[local] = _extract(stored)
            const = build.const(local)
            return self.kind.matrix(build, const) if local == "weight" else const

        def at(old: fx.Node) -> fx.Node:
            if old not in done:
                if old.op == "placeholder":
                    done[old] = build.input(str(old.target))
                else:
                    args = fx.node.map_arg(old.args, node_of)
                    done[old] = build.graph.create_node(old.op, old.target, args)
            return done[old]

        build.graph.output(build.type_as(of(result), build.const("weight")))
        return Folded(graphs.intern(build.graph), made, self.obstacle)


def settled(build: Builder, node: fx.Node, kind: Kind) -> fx.Node:
    """A stored weight's graph with transposes at its leaves, so that rows can be had one by one."""
    if node.target is aten.t.default:
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        return transposed(build, inner)
    return node


def _copy(node: fx.Node, build: Builder) -> fx.Node:
    """A constant's node in another graph."""
    if node.op == "get_attr":
        return build.const(str(node.target))
    args = fx.node.map_arg(node.args, lambda n: _copy(n, build))
    return build.graph.create_node(node.op, node.target, args)


def _extract(result: fx.Node) -> fx.Graph:
    """The graph of one result, without what it does not need."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in result.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(env[result])
    return graphs.intern(graph)
