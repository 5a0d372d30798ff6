"""Small fx graphs in one vocabulary, ATen: built, compared, shared and propagated.

A graph names constants by `get_attr` nodes and has at most one placeholder, `x`. Graphs are never
changed once they are interned: a rewrite copies. So equal structure means the same object, and
whatever is worked out for one graph is worked out for all sites that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_interned: dict[str, fx.Graph] = {}
_texts: dict[fx.Graph, str] = {}


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype of a tensor that need not exist."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def meta(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Builder:
    """Appends nodes of the vocabulary to a graph."""

    def __init__(self, graph: fx.Graph | None = None) -> None:
        self.graph = fx.Graph() if graph is None else graph

    def const(self, name: str) -> fx.Node:
        """The constant `name`; one node however often it is named."""
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                assert isinstance(node, fx.Node)
                return node
        return self.graph.create_node("get_attr", name)

    def op(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Any ATen overload."""
        return self.graph.call_function(target, args)

    def linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
        """x·Wᵀ + b with W of shape (out, in)."""
        return self.op(aten.linear.default, x, weight, *(() if bias is None else (bias,)))

    def mm(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """The product of two matrices."""
        return self.op(aten.mm.default, a, b)

    def t(self, a: fx.Node) -> fx.Node:
        """The transpose of a matrix."""
        return self.op(aten.t.default, a)

    def add(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """The sum a + b."""
        return self.op(aten.add.Tensor, a, b)

    def mul(self, a: fx.Node, b: fx.Node | float) -> fx.Node:
        """The product a · b, element by element."""
        return self.op(aten.mul.Tensor, a, b)

    def type_as(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """`a` in the dtype of `b`; nothing where they agree already."""
        return self.op(aten.type_as.default, a, b)


def text(graph: fx.Graph) -> str:
    """The graph's structure as text, the same for graphs that compute the same way."""
    if graph in _texts:
        return _texts[graph]
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}

    def show(value: Any) -> str:
        return repr(fx.node.map_arg(value, lambda node: _Name(number[node])))

    lines = []
    for node in graph.nodes:
        target = "" if node.op in ("output", "placeholder") else str(node.target)
        lines.append(
            f"{node.op} {target}{show(node.args)}{show(node.kwargs) if node.kwargs else ''}"
        )
    return "\n".join(lines)


class _Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def intern(graph: fx.Graph) -> fx.Graph:
    """The one graph that stands for all of this structure, dead nodes removed."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    key = text(graph)
    shared = _interned.setdefault(key, graph)
    _texts[shared] = key
    return shared


def constant_names(graph: fx.Graph) -> list[str]:
    """The constants a graph names."""
    return [str(node.target) for node in graph.nodes if node.op == "get_attr"]


def copy(graph: fx.Graph) -> fx.Graph:
    """A copy that may be rewritten."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = new.node_copy(node, env.__getitem__)
    return new


def depends_on_input(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on the placeholder; all others are derived constants."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def output(graph: fx.Graph) -> fx.Node:
    """The node whose value the graph returns."""
    node = next(n for n in reversed(graph.nodes) if n.op == "output")
    result = node.args[0]
    assert isinstance(result, fx.Node)
    return result


def propagate(
    graph: fx.Graph, constants: Mapping[str, Spec], x: Spec | None = None
) -> dict[fx.Node, Spec]:
    """Shape and dtype of every node, by running the graph on the meta device.

    Raises:
        RuntimeError: The shapes or dtypes do not go together (torch's own message).
    """
    values: dict[fx.Node, torch.Tensor] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            assert x is not None
            values[node] = x.meta()
        elif node.op == "get_attr":
            values[node] = constants[str(node.target)].meta()
        elif node.op != "output":
            args = fx.node.map_arg(node.args, values.__getitem__)
            # Dropout, the one module in the vocabulary, keeps shape and dtype.
            values[node] = args[0] if node.op == "call_module" else node.target(*args)
    return {node: Spec(tuple(v.shape), v.dtype) for node, v in values.items()}
