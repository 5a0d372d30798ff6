"""Small fx graphs in one vocabulary, ATen: built, compared, shared and propagated.

A graph names constants by `get_attr` nodes; its placeholders are its site's input, `x`, and what
else the site's kind takes. Graphs are never changed once they are interned: a rewrite copies. So
equal structure means the same object, and whatever is worked out for one graph is worked out for
all sites that share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from peftc.errors import PassError

aten = torch.ops.aten

# Who registers the operators whose names begin so, as strings: core imports no kernels.
_PROVIDERS = {"nf4_": "peftc.kernels.nf4_ops", "lora_rows": "peftc.kernels.lora_rows"}
_interned: dict[str, fx.Graph] = {}
_texts: dict[fx.Graph, str] = {}


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype of a tensor that need not exist."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The size of the tensor's values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

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

    def input(self, name: str) -> fx.Node:
        """The graph's input of that name, made where it is not there yet."""
        last = None
        for node in self.graph.nodes:
            if node.op != "placeholder":
                break
            if node.target == name:
                assert isinstance(node, fx.Node)
                return node
            last = node
        first = next(iter(self.graph.nodes), None)
        if first is None:
            return self.graph.placeholder(name)
        with (
            self.graph.inserting_before(first) if last is None else self.graph.inserting_after(last)
        ):
            return self.graph.placeholder(name)

    def t(self, a: fx.Node) -> fx.Node:
        """The transpose of a matrix; the matrix itself of a transpose."""
        return _undone(a, aten.t.default) or self.op(aten.t.default, a)

    def flatten(self, a: fx.Node, start: int) -> fx.Node:
        """The dimensions from `start` on as one."""
        undone = _undone(a, aten.unflatten.int)
        if undone is not None and a.args[1] == start:
            return undone
        return self.op(aten.flatten.using_ints, a, start)

    def unflatten(self, a: fx.Node, dim: int, sizes: tuple[int, ...]) -> fx.Node:
        """One dimension as several, of which one size may be -1."""
        undone = _undone(a, aten.flatten.using_ints)
        if undone is not None and a.args[1] == dim:
            return undone  # a site's matrices are flattened only to be unflattened so
        return self.op(aten.unflatten.int, a, dim, list(sizes))

    def add(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """The sum a + b."""
        return self.op(aten.add.Tensor, a, b)

    def mul(self, a: fx.Node, b: fx.Node | float) -> fx.Node:
        """The product a · b, element by element."""
        return self.op(aten.mul.Tensor, a, b)

    def type_as(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """`a` in the dtype of `b`; nothing where they agree already."""
        return self.op(aten.type_as.default, a, b)


def _undone(node: fx.Node, target: Any) -> fx.Node | None:
    inner = node.args[0] if node.target is target else None
    return inner if isinstance(inner, fx.Node) else None


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
    """The one graph that stands for all of this structure, dead nodes removed.

    Raises:
        PassError: A node carries keyword arguments, which the vocabulary does not have.
    """
    if graph in _texts:
        return graph
    for node in graph.nodes:
        if node.kwargs:
            raise PassError(
                f"node {node.name} ({node.target}) carries keyword arguments {dict(node.kwargs)}",
                where="site graph",
                fix="say it with positional arguments, such as mul and add for alpha",
            )
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


def dump(graph: fx.Graph) -> list[Any]:
    """A graph as plain data: overloads do not pickle, their names do."""

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return [[n.op, str(n.target), n.name, plain(n.args)] for n in graph.nodes]


def restore(rows: Iterable[Any]) -> fx.Graph:
    """The graph that `dump` wrote down."""
    graph, env = fx.Graph(), dict[str, fx.Node]()

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            return env[value["node"]]
        return [resolve(item) for item in value] if isinstance(value, list) else value

    for op, name, label, args in rows:
        target: Any = name
        if op == "call_function":
            target = operator(name)
        env[label] = graph.create_node(op, target, tuple(resolve(args)), name=label)
    return intern(graph)


@cache
def operator(name: str) -> Any:
    """An overload by its name, such as `aten.mm.default`; a kernel's module is imported for it."""
    _provider(name)
    found = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found


def eager(target: Any) -> Any:
    """What a live model calls for an operator: what its kernels name for that, else itself."""
    provider = _provider(str(target))
    return getattr(provider, "EAGER", {}).get(target, target)


def _provider(name: str) -> Any:
    """The module that registers an operator, imported; None for torch's and core's own."""
    own = (module for prefix, module in _PROVIDERS.items() if name.startswith(f"peftc.{prefix}"))
    module = next(own, None)
    return import_module(module) if module else None


def propagate(
    graph: fx.Graph, constants: Mapping[str, Spec], inputs: Mapping[str, Spec] | None = None
) -> dict[fx.Node, Spec]:
    """Shape and dtype of every node.

    Raises:
        RuntimeError: The shapes or dtypes do not go together.
    """
    specs: dict[fx.Node, Spec] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            assert inputs is not None
            specs[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            specs[node] = constants[str(node.target)]
        elif node.op == "call_module":  # dropout, the one module in the vocabulary
            specs[node] = specs[node.args[0]]
        elif node.op != "output":
            args = tree_map_only(fx.Node, specs.__getitem__, node.args)
            rule = _RULES.get(node.target) or _NAMED_RULES.get(str(node.target))
            specs[node] = (rule(*args) if rule else None) or _by_meta(node.target, args)
    return specs


def _by_meta(target: Callable[..., Any], args: tuple[Any, ...]) -> Spec:
    """What torch says of any operator. Its first use imports much of torch, a second's worth."""
    result = target(*tree_map_only(Spec, Spec.meta, args))
    return Spec(tuple(result.shape), result.dtype)


def _linear_spec(x: Spec, weight: Spec, bias: Spec | None = None) -> Spec | None:
    given = (x, weight) if bias is None else (x, weight, bias)
    fits = x.shape and len(weight.shape) == 2 and x.shape[-1] == weight.shape[1]
    if not fits or len({spec.dtype for spec in given}) > 1:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return Spec((*x.shape[:-1], weight.shape[0]), x.dtype)


def _mm_spec(a: Spec, b: Spec) -> Spec | None:
    if len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype:
        return Spec((a.shape[0], b.shape[1]), a.dtype)
    return None


def _pointwise_spec(a: Spec | float, b: Spec | float) -> Spec | None:
    if not isinstance(a, Spec):
        return None
    if not isinstance(b, Spec):
        return a if a.dtype.is_floating_point else None
    if not a.shape or not b.shape:
        return None
    try:
        shape = np.broadcast_shapes(a.shape, b.shape)
        return Spec(shape, torch.promote_types(a.dtype, b.dtype))
    except ValueError:
        return None


def _cat_spec(parts: Sequence[Spec], dim: int = 0) -> Spec | None:
    kinds = {(len(part.shape), part.shape[1:], part.dtype) for part in parts}
    if dim != 0 or len(kinds) != 1 or not parts[0].shape:
        return None
    rows = sum(part.shape[0] for part in parts)
    return Spec((rows, *parts[0].shape[1:]), parts[0].dtype)


def _stack_spec(parts: Sequence[Spec], dim: int = 0) -> Spec | None:
    alike = dim == 0 and len({*parts}) == 1
    return Spec((len(parts), *parts[0].shape), parts[0].dtype) if alike else None


# The vocabulary's commonest operators, where operands are as they should be; torch judges the rest.
_RULES: dict[Any, Callable[..., Spec | None]] = {
    aten.linear.default: _linear_spec,
    aten.mm.default: _mm_spec,
    aten.t.default: lambda a: Spec(a.shape[::-1], a.dtype) if len(a.shape) <= 2 else None,
    aten.add.Tensor: _pointwise_spec,
    aten.sub.Tensor: _pointwise_spec,
    aten.mul.Tensor: _pointwise_spec,
    aten.type_as.default: lambda a, b: Spec(a.shape, b.dtype),
    aten.cat.default: _cat_spec,
    aten.stack.default: _stack_spec,
}
# Of operators that kernels register, by name.
_NAMED_RULES: dict[str, Callable[..., Spec | None]] = {
    "peftc.nf4_codes.default": lambda w, *_: Spec((-(-math.prod(w.shape) // 2), 1), torch.uint8),
    "peftc.nf4_absmax.default": lambda w, size: Spec(
        (-(-math.prod(w.shape) // size),), torch.float32
    ),
    "peftc.nf4_nest_codes.default": lambda a: Spec(a.shape, torch.uint8),
    "peftc.nf4_nest_absmax.default": lambda a: Spec((-(-a.shape[0] // 256),), torch.float32),
    "peftc.nf4_unnest.default": lambda a, *_: Spec(a.shape, torch.float32),
    "peftc.nf4_map.default": lambda name: Spec((256 if name == "dynamic" else 16,), torch.float32),
    "peftc.nf4_state.default": lambda _, text, size: Spec((size,), torch.uint8),
    "peftc.nf4_dequantize.default": lambda c, a, shape, *_: Spec(tuple(shape), torch.float32),
    "peftc.nf4_linear.default": lambda x, *args: Spec((*x.shape[:-1], args[5]), x.dtype),
    "peftc.nf4_lora.default": lambda x, *args: Spec((*x.shape[:-1], args[6].shape[0]), x.dtype),
    "aten.mean.default": lambda a: Spec((), a.dtype),
}
