"""A whole-model graph cut at its layers: few distinct pieces, and the steps that run them in turn.

Layers that compute alike become one piece, which each step calls with the tensors of its own layer:
weights are a piece's inputs. So what compiles a graph has one layer to compile, however many the
model has, and whoever runs it may give other tensors at any call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from peftc.errors import CaptureError
from peftc.graphs import aten
from peftc.normal import owner
from peftc.whole import Whole

LAYER = re.compile(r"^(.*?\.\d+)(\.|$)")
# What sizes are likely, for who must choose by them (such as how many threads a loop is worth).
LIKELY = {
    "batch": 2, "sequence": 48, "past": 336, "encoder_sequence": 80, "images": 3, "rank": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A part of a model as a function of tensors alone.

    Attributes:
        name: Of the piece, within its whole.
        module: Its graph; it returns a tuple.
        examples: Fake tensors for its inputs, whose varying sizes are symbols.
        form: What makes two pieces the same, of other models too: its code and its examples.
    """

    name: str
    module: fx.GraphModule
    examples: tuple[torch.Tensor, ...]
    form: str


@dataclass(frozen=True)
class Step:
    """One call of a piece.

    Attributes:
        piece: Its name.
        takes: What it is given: names of the whole's inputs, of constants, or of what a step gave.
        gives: The names of what it returns: of the whole's outputs, or `%N`.
    """

    piece: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """A whole as pieces.

    Attributes:
        pieces: Each distinct one, by name.
        steps: What to call, in order.
        constants: The shape and dtype of each constant that a step takes, as an example.
        mode: In which the examples are fake.
    """

    pieces: Mapping[str, Piece]
    steps: tuple[Step, ...]
    constants: Mapping[str, torch.Tensor]
    mode: FakeTensorMode


def cut(whole: Whole, context: int | None = None, device: str = "cpu", least: float = 2) -> Cut:
    """Cuts a whole-model graph where a layer ends or begins.

    Args:
        whole: The graph; a constant's `val` says its shape and dtype.
        context: How many positions the model has, if that is known.
        device: Where it is to run.
        least: How often a piece must be called on average, else nothing is cut: of few layers
            more time goes into several libraries than into one graph.
    """
    runs = list(regions(whole.graph))
    found = _Cutter(whole, context or 2**20, device).run(runs)
    if len(found.steps) > least * len(found.pieces):
        return found
    return _Cutter(whole, context or 2**20, device).run([[n for run in runs for n in run]])


def layer_of(node: fx.Node) -> str | None:
    """The layer that a node comes from, by its module's name."""
    found = LAYER.match(owner(node))
    return found[1] if found else None


def regions(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The computing nodes of a graph in runs, each of one layer or of none."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and not _is_size(n)]
    last = {layer: i for i, n in enumerate(nodes) if (layer := layer_of(n)) is not None}
    run: list[fx.Node] = []
    here: str | None = None
    for i, node in enumerate(nodes):
        layer = layer_of(node)
        inside = here is not None and i < last[here]
        if run and (layer is not None or not inside) and layer != here:
            yield run
            run = []
        if not run:
            here = layer
        run.append(node)
    if run:
        yield run


def _is_size(node: fx.Node) -> bool:
    """Whether a node's value is a number, such as a size."""
    return node.op == "call_function" and not isinstance(
        node.meta.get("val"), (torch.Tensor, list, tuple)
    )


def _leaves(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether anything beyond these nodes needs the value of one of them, or a size of it."""
    return any(
        _leaves(user, inside) if _is_size(user) else user not in inside for user in node.users
    )


class _Cutter:
    """Cuts one graph."""

    def __init__(self, whole: Whole, context: int, device: str) -> None:
        self.whole, self.device = whole, device
        fits = {"sequence": context // 4, "past": context // 2}  # together within the positions
        self.likely = {name: min(n, fits.get(name, n)) for name, n in LIKELY.items()}
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.pieces: dict[str, Piece] = {}
        self.known: dict[str, tuple[Piece, tuple[torch.Tensor, ...]]] = {}
        self.names: dict[fx.Node, str] = {}
        self.values: dict[str, torch.Tensor] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.steps: list[Step] = []

    def run(self, runs: Sequence[list[fx.Node]]) -> Cut:
        self._name()
        for nodes in runs:
            self._step(nodes)
        return Cut(self.pieces, tuple(self.steps), self.constants, self.mode)

    def _name(self) -> None:
        """Names what pieces may take or give, and makes examples of inputs and constants."""
        graph = self.whole.graph
        returned = next(n for n in reversed(graph.nodes) if n.op == "output")
        sizes = _symbols(self.mode, {d for p in self.whole.inputs for d in p.dims}, self.likely)
        with self.mode:
            for port in self.whole.inputs:
                shape = [sizes[d] if isinstance(d, str) else d for d in port.dims]
                made = torch.empty(shape, dtype=port.dtype, device=self.device)
                self.values[port.name] = made
            for node in graph.nodes:
                if node.op == "get_attr":
                    like = node.meta["val"]
                    shape = [sizes.get(s, s) if isinstance(s, str) else s for s in like.shape]
                    made = torch.empty(shape, dtype=like.dtype, device=self.device)
                    self.constants[str(node.target)] = made
        for number, node in enumerate(graph.nodes):
            plain = node.op in ("get_attr", "placeholder")
            self.names[node] = str(node.target) if plain else f"%{number}"
        for port, node in zip(self.whole.outputs, returned.args[0], strict=True):
            self.names[node] = port.name
        self.values |= self.constants

    def _step(self, nodes: Sequence[fx.Node]) -> None:
        inside = set(nodes)
        left = [node for node in nodes if _leaves(node, inside)]
        build = _Build()
        for node in nodes:
            build.add(node)
        results = [build.env[n] for n in left]
        takes = tuple(self.names[n] for n in build.taken)
        given = tuple(self.values[name] for name in takes)
        key = f"{build.form()} -> {[r.name for r in results]} of {[_spec(x) for x in given]}"
        if key not in self.known:
            self.known[key] = self._piece(build, results, given, f"{key} at {self.likely}")
        piece, values = self.known[key]
        gives = tuple(self.names[n] for n in left)
        self.values |= dict(zip(gives, values, strict=True))
        self.steps.append(Step(piece.name, takes, gives))

    def _piece(
        self, build: _Build, results: list[fx.Node], given: tuple[torch.Tensor, ...], form: str
    ) -> tuple[Piece, tuple[torch.Tensor, ...]]:
        build.graph.output(tuple(results)).meta = {}
        module = fx.GraphModule(torch.nn.Module(), build.graph)
        name = f"{self.whole.name}_{len(self.pieces)}"
        try:
            with self.mode, torch.no_grad():
                values = fx.Interpreter(module).run(*given)
                if not all(value.is_contiguous() for value in values):
                    module = _contiguous(module, values)
                    values = fx.Interpreter(module).run(*given)
        except Exception as error:  # of any operator
            raise CaptureError(
                f"does not fit other sizes than it was captured with: {str(error).splitlines()[0]}",
                where=name,
                fix="write the model with --format safetensors, and report it",
            ) from error
        piece = Piece(name, module, given, f"{form} on {self.device}")
        self.pieces[piece.name] = piece
        return piece, tuple(values)


@dataclass
class _Build:
    """A piece under construction; what it does not compute itself, it takes."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)
    taken: list[fx.Node] = field(default_factory=list)

    def add(self, node: fx.Node) -> None:
        """Appends a node's copy, and before it the inputs and sizes that it needs."""
        self.env[node] = self.graph.node_copy(node, self._found)
        self.env[node].meta = {}
        self.env[node].name = f"n{len(self.env)}"

    def _found(self, node: fx.Node) -> fx.Node:
        if node in self.env:
            return self.env[node]
        if _is_size(node):  # of every piece its own: pieces exchange tensors
            self.add(node)
            return self.env[node]
        last = self.env[self.taken[-1]] if self.taken else self.graph._root
        with self.graph.inserting_after(last):
            self.env[node] = self.graph.placeholder(f"x{len(self.taken)}")
        self.taken.append(node)
        return self.env[node]

    def form(self) -> str:
        """What makes two pieces the same."""
        return "; ".join(f"{n.name}={n.target}{n.args}{n.kwargs}" for n in self.graph.nodes)


def _symbols(
    mode: FakeTensorMode, dims: set[int | str], likely: Mapping[str, int]
) -> dict[str, Any]:
    """A symbol for each size that varies; a sum of two is no symbol of its own."""
    env = mode.shape_env
    assert env is not None
    names = {part for dim in dims if isinstance(dim, str) for part in dim.split(" + ")}
    sizes: dict[str, Any] = {}
    for name in sorted(names | {"rank"}):
        source = ConstantSource(name)
        symbol = env.create_symbol(likely[name], source, DimDynamic.DYNAMIC, None)
        sizes[name] = env.create_symintnode(symbol, hint=likely[name], source=source)
    for dim in dims - names:
        if isinstance(dim, str):
            sizes[dim] = sum(sizes[part] for part in dim.split(" + "))
    return sizes


def _spec(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}{[str(size) for size in tensor.shape]}"


def _contiguous(module: fx.GraphModule, values: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The module with results that lie in memory as their shapes say: no library checks strides."""
    graph = module.graph
    returned = next(n for n in reversed(graph.nodes) if n.op == "output")
    kept = list(returned.args[0])
    with graph.inserting_before(returned):
        for i, value in enumerate(values):
            if not value.is_contiguous():
                form: dict[str, Any] = {"memory_format": torch.contiguous_format}
                kept[i] = graph.call_function(aten.clone.default, (kept[i],), form)
    returned.args = (tuple(kept),)
    module.recompile()
    return module
