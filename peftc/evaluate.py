"""Evaluation of graphs by rows, in fp32, on demand.

A weight is written, checked and proved some rows at a time, so that what is worked on stays in the
processor's cache and a few tensors' memory suffices for any model. The rows asked of a graph's
output are asked of its inputs in turn: the rows of W + s·B·A are rows of W and of B, and all of A.
For a value that depends on x, its "rows" are its features, the last dimension: the features of
x·Wᵀ are rows of W. An operator that is not in the table is evaluated whole, once.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any

import torch
from torch import fx

from peftc import flat, graphs, ops  # noqa: F401  # registers the peftc:: operators
from peftc.constants import Constant, Derived, Held, Initial, Leaf, widened
from peftc.devices import CPU
from peftc.graphs import Spec, aten
from peftc.reading import read, recent, wide

CHUNK_ELEMENTS = 1 << 19  # 2 MiB of fp32: in the caches still, and few calls from Python
_POINTWISE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default}
_IN_PLACE: dict[Any, Any] = {
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
}
_SHORT_SUM = 128
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Operators that keep the first dimension while they work on one behind it.
_INNER = {aten.flatten.using_ints, aten.unflatten.int}
# Which argument is a table of which few rows are needed.
_TABLES = {aten.embedding.default: 0, torch.ops.peftc.grouped_linear.default: 1}
# Operators each of whose rows is made of the row of their first argument.
_BY_ROWS = {
    torch.ops.peftc.rotate.default,
    torch.ops.peftc.uniform_codes.default,
    torch.ops.peftc.uniform_scales.default,
}
_FRESH = {aten.mm.default, aten.linear.default, *_IN_PLACE}  # whose results are no views


@contextmanager
def single_threaded() -> Iterator[None]:
    """Runs torch on one thread: on pieces this small, its threads cost more than they gain.

    And sums and decompositions depend in their last bits on how many there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed: each fresh buffer costs its page faults again."""
    with suppress(AttributeError, OSError):  # glibc's own; other libraries have no such knob
        mallopt = ctypes.CDLL(None).mallopt
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(option, 256 << 20)


def chunks(
    shape: tuple[int, ...], elements: int = CHUNK_ELEMENTS, unit: int = 1
) -> list[tuple[int, int]]:
    """Ranges of rows that hold about `elements` elements each.

    All but the last are of a multiple of 16 rows, and none of a larger matrix is smaller: matrix
    products of very few rows take another path in BLAS, whose sums round differently. They are of a
    multiple of `unit` rows too.
    """
    if not shape or not shape[0]:
        return [] if shape else [(0, 1)]
    width = max(1, math.prod(shape[1:]))
    least = math.lcm(16 if len(shape) < 3 else 1, unit)
    step = max(least, elements // width // least * least)
    starts = list(range(0, shape[0], step))
    if len(starts) > 1 and shape[0] - starts[-1] < least:
        starts.pop()
    return list(zip(starts, [*starts[1:], shape[0]], strict=True))


def value(constant: Constant) -> torch.Tensor:
    """A whole constant in its own dtype, rounded once."""
    if isinstance(constant, Leaf):
        return read(constant)
    if isinstance(constant, Held):
        return constant.tensor.detach()
    if isinstance(constant, Initial):
        return constant.sample().to(constant.spec.dtype)
    return Evaluation(constant.graph, constant.inputs).whole().to(constant.spec.dtype)


class Evaluation:
    """A graph bound to its constants and, where it has one, its input.

    Args:
        graph: An interned graph.
        constants: What its `get_attr` nodes name.
        inputs: The value of each placeholder, fp32 or integer, such as x of shape (samples, in).
        device: Where it is computed; the inputs are there.
    """

    def __init__(
        self,
        graph: fx.Graph,
        constants: Mapping[str, Constant],
        inputs: Mapping[str, torch.Tensor] | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.graph, self.inputs = graph, inputs or {}
        self.constants, self.device = constants, device
        shapes = {n: widened(constants[n].spec) for n in _names(graph)}
        given = {name: Spec(tuple(t.shape), t.dtype) for name, t in self.inputs.items()}
        self.plan = _plan(graph, tuple(sorted(shapes.items())), tuple(sorted(given.items())))
        self._whole: dict[fx.Node, torch.Tensor] = {}
        self._nested: dict[str, Evaluation] = {}

    @property
    def size(self) -> int:
        """How many rows (or, with an input, features) the output has."""
        return self.plan.size

    def spans(self) -> list[tuple[int, int]]:
        """Ranges of rows by which the output is best had."""
        return self._spans(graphs.output(self.graph))

    def whole(self) -> torch.Tensor:
        """The whole output, fp32."""
        return self._value(graphs.output(self.graph))

    def rows(self, low: int, high: int) -> torch.Tensor:
        """Rows low to high of the output, fp32; features where the graph has an input."""
        return self._slice(graphs.output(self.graph), {}, low, high)

    def _slice(
        self, node: fx.Node, done: dict[fx.Node, torch.Tensor], low: int, high: int
    ) -> torch.Tensor:
        if node in done:
            return done[node]
        if node not in self.plan.sliced:
            whole = self._value(node)
            if node in self.plan.activations:
                return whole[..., low:high]
            return whole[low:high] if whole.dim() else whole
        if node.op == "get_attr":
            result = self._constant(str(node.target), (low, high))
        elif node in self.plan.products:
            result = self._product(node, done, low, high)
        elif str(node.target) in flat.RULES:
            result = self._flat(node, low, high)
        elif node.target is aten.index_copy.default:
            result = self._patched(node, done, low, high)
        elif node.target is aten.cat.default:
            result = self._joined(node, low, high)
        elif node.target is aten.stack.default:
            members: Any = node.args[0]
            result = torch.stack([self._value(member) for member in members[low:high]])
        else:
            which = self.plan.sliced[node]
            args = [
                self._slice(a, done, low, high) if i in which else self._argument(a)
                for i, a in enumerate(_operands(node))
            ]
            result = self._call(node, args)
        done[node] = result
        return result

    def _product(
        self, node: fx.Node, done: dict[fx.Node, torch.Tensor], low: int, high: int
    ) -> torch.Tensor:
        """W + s·B·A in one call."""
        product, scale = self.plan.products[node]
        base, (b, a) = node.args[0], product.args
        assert isinstance(base, fx.Node) and isinstance(a, fx.Node) and isinstance(b, fx.Node)
        onto = self._slice(base, done, low, high)
        spare = onto if self._is_spare(node, base) else None
        rows = self._slice(b, done, low, high)
        return torch.addmm(onto, rows, self._value(a), alpha=scale, out=spare)

    def _flat(self, node: fx.Node, low: int, high: int) -> torch.Tensor:
        """Rows of a result that is made of its operand's elements, whatever their rows."""
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        args = tuple(partial(self._elements, a) if isinstance(a, fx.Node) else a for a in node.args)
        named = operand.op == "get_attr"
        identity = self.constants[str(operand.target)] if named else (self, operand)
        shape, result = (self.plan.specs[n].shape for n in (operand, node))
        return flat.RULES[str(node.target)](flat.Piece(args, shape, result, identity, low, high))

    def _elements(self, node: fx.Node, start: int, end: int) -> torch.Tensor:
        """Elements of a tensor that is seen flat; of a leaf in its own dtype, which costs less."""
        width = math.prod(self.plan.specs[node].shape[1:])
        first, last = start // width, -(-end // width)
        leaf = self.constants[str(node.target)] if node.op == "get_attr" else None
        whole = read(leaf, first, last, self.device) if isinstance(leaf, Leaf) else None
        rows = (self._slice(node, {}, first, last) if whole is None else whole).reshape(-1)
        return rows[start - first * width : end - first * width]

    def _spans(self, node: fx.Node) -> list[tuple[int, int]]:
        shape = self.plan.specs[node].shape
        operands = [self.plan.specs[n] for n in node.all_input_nodes[:1]]
        if node.op == "get_attr":
            constant = self.constants[str(node.target)]
            if isinstance(constant, Derived):
                return self._inner(str(node.target), constant).spans()
        if node.target in _BY_ROWS:  # of a result that may be far smaller
            return self._spans(node.all_input_nodes[0])
        unit = flat.unit(str(node.target), node.args, operands[0]) if operands else None
        if unit is None:
            return chunks(shape)
        per, least = unit
        ranges = chunks(operands[0].shape, unit=least)
        width = math.prod(operands[0].shape[1:])
        ends = [-(-high * width // per) for _, high in ranges]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def _patched(
        self, node: fx.Node, done: dict[fx.Node, torch.Tensor], low: int, high: int
    ) -> torch.Tensor:
        """Rows of a table of which some rows are replaced."""
        table, _, index, rows = node.args
        assert isinstance(table, fx.Node)
        ids = self._argument(index)
        inside = (ids >= low) & (ids < high)
        old = self._slice(table, done, low, high)
        return old.index_copy(0, ids[inside] - low, self._argument(rows)[inside])

    def _joined(self, node: fx.Node, low: int, high: int) -> torch.Tensor:
        """Rows of tensors that stand one behind the other."""
        start, pieces = 0, []
        parts: Any = node.args[0]
        for part in parts:
            end = start + self.plan.specs[part].shape[0]
            if low < end and start < high:
                inner = max(low, start) - start, min(high, end) - start
                pieces.append(self._slice(part, {}, *inner))
            start = end
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _mean(self, node: fx.Node) -> torch.Tensor:
        """The mean of all rows, which are summed in fp64, a few at a time."""
        table = node.args[0]
        assert isinstance(table, fx.Node)
        shape = self.plan.specs[table].shape
        total = torch.zeros(1, *shape[1:], dtype=torch.float64, device=self.device)
        for low, high in chunks(shape):
            total += self._slice(table, {}, low, high).sum(0, keepdim=True, dtype=torch.float64)
        return (total / shape[0]).float()

    def _value(self, node: fx.Node) -> torch.Tensor:
        if node not in self._whole:
            if node.op == "placeholder":
                self._whole[node] = self.inputs[str(node.target)]
            elif node.op == "get_attr":
                self._whole[node] = self._constant(str(node.target), None)
            elif node in self.plan.gathers:
                self._whole[node] = self._gather(node)
            elif _is_mean(node) and node not in self.plan.activations:
                self._whole[node] = self._mean(node)
            elif str(node.target) in flat.RULES:
                pieces = [self._flat(node, *span) for span in self._spans(node)]
                self._whole[node] = torch.cat(pieces)
            else:
                self._whole[node] = self._call(node, [self._argument(a) for a in _operands(node)])
        return self._whole[node]

    def _gather(self, node: fx.Node) -> torch.Tensor:
        """An operator that needs few rows of its table: the ids', or the busy experts'."""
        if node.target is aten.embedding.default:
            table, ids = node.args[:2]
            assert isinstance(table, fx.Node)
            index = self._argument(ids)
            rows = [self._slice(table, {}, i, i + 1) for i in index.reshape(-1).tolist()]
            return torch.cat(rows).reshape(*index.shape, -1)
        x, weight, ends = self._argument(node.args[0]), node.args[1], self._argument(node.args[2])
        assert isinstance(weight, fx.Node)
        start, parts = 0, []
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                matrix = self._slice(weight, {}, expert, expert + 1)[0]
                parts.append(x[start:end] @ matrix.t())
            start = max(start, end)
        return torch.cat(parts)

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [self._argument(item) for item in argument]
        return self._value(argument) if isinstance(argument, fx.Node) else argument

    def _call(self, node: fx.Node, args: list[Any]) -> torch.Tensor:
        if _is_nothing(node):
            result: torch.Tensor = args[0]
            return result
        assert callable(node.target)
        spare = self._spare(node, args) if node.target in _IN_PLACE else None
        into = {} if spare is None else {"out": spare}
        compute = node.target if spare is None else _IN_PLACE[node.target]
        result = compute(*args, **into)
        return result

    def _spare(self, node: fx.Node, args: list[Any]) -> torch.Tensor | None:
        """An argument computed here for this node alone, whose memory the result may take."""
        for argument, tensor in zip(node.args, args, strict=True):
            if isinstance(argument, fx.Node) and self._is_spare(node, argument):
                assert isinstance(tensor, torch.Tensor)
                return tensor
        return None

    def _is_spare(self, node: fx.Node, argument: fx.Node) -> bool:
        return (
            argument in self.plan.sliced
            and len(argument.users) == 1
            and argument.target in _FRESH
            and self.plan.specs[argument].shape == self.plan.specs[node].shape
        )

    def _inner(self, name: str, constant: Derived) -> Evaluation:
        """The evaluation of a constant that is derived."""
        if name not in self._nested:
            self._nested[name] = Evaluation(constant.graph, constant.inputs, device=self.device)
        return self._nested[name]

    def _constant(self, name: str, rows: tuple[int, int] | None) -> torch.Tensor:
        constant = self.constants[name]
        if isinstance(constant, Leaf):
            if rows is None or self.device != CPU:
                low, high = rows or (0, None)
                return wide(read(constant, low, high, self.device))
            return recent(constant, *rows)
        if isinstance(constant, Derived):
            inner = self._inner(name, constant)
            return inner.whole() if rows is None else inner.rows(*rows)
        tensor = constant.sample() if isinstance(constant, Initial) else constant.tensor.detach()
        part = tensor if rows is None or not tensor.dim() else tensor[rows[0] : rows[1]]
        return wide(part.to(self.device))


class _Plan:
    """For each node that can be had by rows, which of its arguments are asked by rows too."""

    def __init__(self, graph: fx.Graph, specs: dict[str, Spec], inputs: dict[str, Spec]) -> None:
        self.activations = graphs.depends_on_input(graph)
        self.specs = graphs.propagate(graph, specs, inputs)
        self.gathers: set[fx.Node] = set()
        self.sliced: dict[fx.Node, frozenset[int]] = {}
        whole: set[fx.Node] = set()
        out = graphs.output(graph)
        demanded = {out}
        for node in reversed(graph.nodes):
            if node not in demanded and node not in whole:
                continue
            rule = None if node in whole or not self.specs[node].shape else self._rule(node)
            if rule is None:
                whole.add(node)
                table = _TABLES.get(node.target) if node in self.activations else None
                if table is not None and node.args[table] not in self.activations:
                    self.gathers.add(node)
                mean = _is_mean(node) and node not in self.activations
                for argument in _operand_nodes(node):
                    rows = node in self.gathers and argument is node.args[table or 0]
                    (demanded if rows or mean else whole).add(argument)
                continue
            self.sliced[node] = rule
            for i, argument in enumerate(_operands(node)):
                if isinstance(argument, fx.Node):
                    (demanded if i in rule else whole).add(argument)
                elif isinstance(argument, (list, tuple)):
                    by_rows = node.target is aten.cat.default
                    (demanded if by_rows else whole).update(
                        a for a in argument if isinstance(a, fx.Node)
                    )
        shape = self.specs[out].shape or (1,)
        self.size = shape[-1 if out in self.activations else 0]
        found = {node: self._product(node) for node in self.sliced}
        self.products = {node: product for node, product in found.items() if product}

    def _product(self, node: fx.Node) -> tuple[fx.Node, float] | None:
        """The B·A and s of a sum W + s·B·A that one `addmm` computes to the same bits.

        So it is for a power of two, whose product is exact, and for a sum over few terms, which
        BLAS forms before it adds them to W.
        """
        if node.target is not aten.add.Tensor or node in self.activations:
            return None
        term, scale = node.args[1], 1.0
        if isinstance(term, fx.Node) and term.target is aten.mul.Tensor and len(term.users) == 1:
            term, factor = term.args
            scale = factor if isinstance(factor, (int, float)) else 0.0
        if not isinstance(term, fx.Node) or term.target is not aten.mm.default:
            return None
        inner = self.specs[term.args[1]].shape[0]  # type: ignore[index]
        exact = abs(math.frexp(scale)[0]) == 0.5 and inner <= _SHORT_SUM
        shapes = {self.specs[n].shape for n in (node, node.args[0], term)}  # type: ignore[index]
        return (term, scale) if exact and len(shapes) == len(term.users) == 1 else None

    def _rule(self, node: fx.Node) -> frozenset[int] | None:
        if node.op == "get_attr":
            return frozenset()
        if str(node.target) in flat.RULES:
            return frozenset({0, 1})
        if _is_nothing(node):
            return frozenset({0})
        if node.target is aten.index_copy.default and node.args[1] == 0:
            return frozenset({0})
        if node.target is aten.stack.default and node.args[1:] in ((), (0,)):
            return frozenset()
        if node.target is aten.cat.default and node.args[1:] in ((), (0,)):
            return None if node in self.activations else frozenset()
        if node.target is aten.mm.default and node not in self.activations:
            return frozenset({0})
        if node.target is aten.bmm.default and node not in self.activations:
            return frozenset({0, 1})
        if node.target in _INNER and node not in self.activations and node.args[1] != 0:
            return frozenset({0})
        if node.target in _BY_ROWS and node not in self.activations:
            return frozenset({0})
        if (
            node.target is aten.transpose.int
            and node not in self.activations
            and 0 not in node.args[1:]
        ):
            return frozenset({0})
        if (
            (node.target is aten.unsqueeze.default and node.args[1] == 1)
            or (node.target is aten.linalg_vector_norm.default and node.args[2:3] == ([1],))
        ) and node not in self.activations:
            return frozenset({0})
        if node.target is aten.linear.default and node.args[1] not in self.activations:
            if node not in self.activations and len(self.specs[_operand_nodes(node)[0]].shape) > 1:
                return frozenset({0})
            return frozenset(range(1, len(node.args)))
        if node.target in _POINTWISE:
            return frozenset(i for i, a in enumerate(node.args) if self._follows(node, a))
        return None

    def _follows(self, node: fx.Node, argument: Any) -> bool:
        """Whether a pointwise operand has the rows of the result, rather than being broadcast."""
        if not isinstance(argument, fx.Node):
            return False
        shape, result = self.specs[argument].shape, self.specs[node].shape
        if argument in self.activations:
            return shape[-1] == result[-1]
        if node in self.activations:
            return len(shape) == 1 and shape[0] == result[-1]
        return len(shape) == len(result) and shape[0] == result[0]


def _is_nothing(node: fx.Node) -> bool:
    """In fp32 throughout, a cast is nothing; dropout is not for evaluation."""
    return node.op == "call_module" or node.target in (aten.type_as.default, aten.detach.default)


def _is_mean(node: fx.Node) -> bool:
    """Whether a node is the mean of a constant's rows, one row."""
    return node.target is aten.mean.dim and node.args[1:] == ([0], True)


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """The arguments whose values are needed; of a cast, not the one that gives the dtype."""
    return node.args[:1] if _is_nothing(node) else node.args


def _operand_nodes(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(_operands(node), found.append)
    return found


_plans: dict[Any, _Plan] = {}


def _plan(
    graph: fx.Graph, specs: tuple[tuple[str, Spec], ...], inputs: tuple[tuple[str, Spec], ...]
) -> _Plan:
    key = graph, specs, inputs
    if key not in _plans:
        _plans[key] = _Plan(graph, dict(specs), dict(inputs))
    return _plans[key]


@lru_cache(maxsize=4096)
def _names(graph: fx.Graph) -> tuple[str, ...]:
    return tuple(graphs.constant_names(graph))
