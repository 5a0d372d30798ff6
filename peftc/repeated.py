"""Repeated layers: two of each kind are captured, and the second stands for all others.

Layers are of one kind if their modules have the same classes, options, shapes and buffers. What
the capture makes of the two of a kind must then be the same, node by node, but for the layer's
number in names, and for the hidden state that each takes from the layer before; only so may one
stand for the others. Where it is not so every layer is captured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftc.calling import Port
from peftc.normal import owner

NUMBERED = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index"})
PLAIN = (bool, int, float, str, type(None), torch.dtype)
BEFORE, BEHIND = -1, -2  # the places of nodes outside of all layers


class Unlike(Exception):
    """Layers of one kind are captured as different graphs."""


@dataclass(frozen=True)
class Stack:
    """A list of layers of which some were left out.

    Attributes:
        path: Its name in the model.
        kept: The numbers of the layers that are there still.
        stands: For each layer of the whole model, the place in `kept` of what stands for it.
        alike: Of each kind of which some are gone, the places in `kept` of the others.
    """

    path: str
    kept: tuple[int, ...]
    stands: tuple[int, ...]
    alike: tuple[tuple[int, ...], ...]


def shorten(model: nn.Module, first: int = 2, last: bool = False) -> list[Stack]:
    """Takes out of a model's lists of layers those that others can stand for.

    Args:
        model: Its tensors may be without data.
        first: How many of the first of a kind stay; the last of them stands for the others.
        last: Whether the last of a kind stays too.
    """
    stacks: list[Stack] = []
    for path, layers in list(model.named_modules()):
        if not isinstance(layers, nn.ModuleList) or any(
            path.startswith(f"{stack.path}.") for stack in stacks
        ):
            continue
        stack = _stack(path, [_kind(layer) for layer in layers], first, last)
        if len(stack.kept) == len(layers):
            continue
        place, _, name = path.rpartition(".")
        parent = model.get_submodule(place)
        _number(layers, stack.kept)
        setattr(parent, name, nn.ModuleList(layers[i] for i in stack.kept))
        _select_options(model, len(layers), stack.kept)
        stacks.append(stack)
    return stacks


def _stack(path: str, kinds: Sequence[Any], first: int, last: bool) -> Stack:
    places: dict[Any, list[int]] = {}
    for number, kind in enumerate(kinds):
        places.setdefault(kind, []).append(number)
    staying = {
        kind: numbers[:first] + (numbers[first:][-1:] if last else [])
        for kind, numbers in places.items()
    }
    kept = tuple(sorted(number for numbers in staying.values() for number in numbers))
    standing = {kind: kept.index(numbers[:first][-1]) for kind, numbers in places.items()}
    stands = tuple(
        kept.index(number) if number in kept else standing[kind]
        for number, kind in enumerate(kinds)
    )
    alike = tuple(
        tuple(map(kept.index, numbers))
        for kind, numbers in staying.items()
        if len(numbers) < len(places[kind])
    )
    return Stack(path, kept, stands, alike)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What must agree of layers of one kind."""
    return tuple(
        (
            name,
            type(module),
            tuple(sorted((k, repr(v)) for k, v in _options(module))),
            tuple(
                (k, p.shape, p.dtype, p.requires_grad)
                for k, p in module._parameters.items()
                if p is not None
            ),
            tuple((k, _values(b)) for k, b in module._buffers.items() if b is not None),
            id(getattr(module, "graph", None)),  # of a rewritten site
        )
        for name, module in layer.named_modules()
    )


def _options(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name in NUMBERED or name.startswith("_"):
            continue
        if isinstance(value, PLAIN) or (
            isinstance(value, (tuple, list)) and all(isinstance(item, PLAIN) for item in value)
        ):
            yield name, value


def _values(buffer: torch.Tensor) -> Any:
    if buffer.is_meta or isinstance(buffer, FakeTensor):
        return tuple(buffer.shape), buffer.dtype
    return tuple(buffer.shape), buffer.dtype, buffer.flatten().tolist()


def _number(layers: nn.ModuleList, kept: Sequence[int]) -> None:
    """Gives the layers that stay the numbers by which they find their part of the cache."""
    for place, number in enumerate(kept):
        for module in layers[number].modules():
            for name in NUMBERED & vars(module).keys():
                if getattr(module, name) == number:
                    setattr(module, name, place)


def _select_options(model: nn.Module, count: int, kept: Sequence[int]) -> None:
    """Takes out of the configs' lists what belongs to a layer that is gone."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == count:
                config.__dict__[name] = [value[number] for number in kept]


def lengthen(
    graph: fx.Graph, inputs: list[Port], outputs: list[str], stack: Stack
) -> tuple[fx.Graph, list[Port], list[str]]:
    """Puts the layers back that `shorten` took out.

    Args:
        graph: In normal form, of the shortened model.
        inputs: Its placeholders' ports; those of a layer's cache have its place in their names.
        outputs: The names of what it returns.
        stack: What was taken out. A graph without any of its layers stays as it is.

    Returns:
        The same of the whole model.

    Raises:
        Unlike: Layers of one kind are not captured alike.
    """
    return _Regions(graph, stack, outputs).whole(inputs, outputs)


class _Regions:
    """The nodes of a graph by the layer that they belong to."""

    def __init__(self, graph: fx.Graph, stack: Stack, outputs: Sequence[str]) -> None:
        self.graph, self.stack = graph, stack
        self.returned = next(n for n in reversed(graph.nodes) if n.op == "output")
        self.results = {
            node for name, node in zip(outputs, self.returned.args[0], strict=True)
            if not is_of_cache(name)
        }  # fmt: skip
        self.pattern = re.compile(rf"^{re.escape(stack.path)}\.(\d+)(\.|$)")
        self.place: dict[fx.Node, int] = {}
        self.members: list[list[fx.Node]] = [[] for _ in stack.kept]
        for node in graph.nodes:
            found = self.pattern.match(owner(node)) if node.op == "call_function" else None
            if found:
                self.place[node] = int(found[1])
                self.members[int(found[1])].append(node)
            else:
                behind = any(self.place.get(n, BEFORE) != BEFORE for n in node.all_input_nodes)
                self.place[node] = BEHIND if behind else BEFORE
        self.between = any(
            self.place[n] == BEHIND for nodes in self.members for m in nodes
            for n in m.all_input_nodes
        )  # fmt: skip

    def whole(
        self, inputs: list[Port], outputs: list[str]
    ) -> tuple[fx.Graph, list[Port], list[str]]:
        """The graph with all layers."""
        if not any(self.members):
            return self.graph, inputs, outputs
        if not all(self.members) or self.between:
            raise Unlike
        self.carried = [self._carried(place) for place in range(len(self.members))]
        for first, second in self.stack.alike:
            self._compare(first, second)
        return self._rebuilt(inputs, outputs)

    def _carried(self, place: int) -> fx.Node:
        """The one value that a layer gives to the next, or the last to what is behind it."""
        last = place == len(self.members) - 1
        found = []
        for node in self.members[place]:
            users = {self.place[user] for user in node.users if user.op != "output"}
            beyond = (users | ({BEHIND} if node in self.results else set())) - {place}
            if beyond == {BEHIND if last else place + 1}:
                found.append(node)
            elif beyond and (place != 0 or BEHIND in beyond):
                raise Unlike  # only the first may work out what all others use
        if len(found) != 1:
            raise Unlike
        return found[0]

    def _compare(self, first: int, second: int) -> None:
        """Checks that two layers are the same but for their numbers and their hidden states."""
        ours, theirs = self.members[first], self.members[second]
        if len(ours) != len(theirs):
            raise Unlike
        matched = dict(zip(ours, theirs, strict=True))
        if first > 0:
            matched[self.carried[first - 1]] = self.carried[second - 1]

        def same(mine: Any, other: Any) -> bool:
            if isinstance(mine, fx.Node) and isinstance(other, fx.Node):
                if mine in matched:
                    return matched[mine] is other
                if mine.op in ("get_attr", "placeholder") and mine.op == other.op:
                    return self.renamed(str(mine.target), first, second) == str(other.target)
                if first == 0 and other is self.carried[second - 1]:
                    return matched.setdefault(mine, other) is other
                return mine is other
            if isinstance(mine, (list, tuple)):
                return (
                    isinstance(other, (list, tuple))
                    and len(mine) == len(other)
                    and all(map(same, mine, other))
                )
            return type(mine) is type(other) and mine == other

        for mine, other in matched.copy().items():
            if mine not in ours:
                continue
            alike = mine.target == other.target and same(mine.args, other.args)
            pairs = [(value, other.kwargs.get(key)) for key, value in mine.kwargs.items()]
            if not alike or not all(same(a, b) for a, b in pairs):
                raise Unlike
        if matched[self.carried[first]] is not self.carried[second]:
            raise Unlike

    def _rebuilt(
        self, inputs: list[Port], outputs: list[str]
    ) -> tuple[fx.Graph, list[Port], list[str]]:
        ports = [port for port in inputs if not is_of_cache(port.name)]
        originals = [port.name for port in ports]
        for number, place in enumerate(self.stack.stands):
            for port in inputs:
                if is_of_cache(port.name) and int(port.name.split(".")[1]) == place:
                    ports.append(replace(port, name=self.renamed(port.name, place, number)))
                    originals.append(port.name)
        build = _Copy(self, [port.name for port in ports], originals)
        build.nodes(self._outside(BEFORE), -1, -1)
        common = dict(build.env)
        present: dict[str, fx.Node] = {}
        hidden: fx.Node | None = None
        for number, place in enumerate(self.stack.stands):
            build.env = dict(common)
            if hidden is not None and place > 0:
                build.env[self.carried[place - 1]] = hidden
            build.nodes(self.members[place], place, number)
            if number == 0:
                common |= build.env
            hidden = build.env[self.carried[place]]
            for name, node in zip(outputs, self.returned.args[0], strict=True):
                if is_of_cache(name) and int(name.split(".")[1]) == place:
                    present[self.renamed(name, place, number)] = build.taken(node, place, number)
        assert hidden is not None
        build.env = {**common, self.carried[-1]: hidden}
        build.nodes(self._outside(BEHIND), -1, -1)
        results = {
            name: build.taken(node, -1, -1)
            for name, node in zip(outputs, self.returned.args[0], strict=True)
            if not is_of_cache(name)
        }
        results |= present
        build.graph.output(tuple(results.values())).meta = {}
        return build.graph, ports, list(results)

    def _outside(self, where: int) -> list[fx.Node]:
        return [n for n, place in self.place.items() if place == where and n.op == "call_function"]

    def renamed(self, name: str, place: int, number: int) -> str:
        """A tensor's or port's name within a layer, as another layer has it."""
        if is_of_cache(name):
            kind, found, rest = name.split(".", 2)
            return f"{kind}.{number}.{rest}" if int(found) == place else name
        path = self.stack.path
        return name.replace(f"{path}.{place}.", f"{path}.{number}.", 1)


class _Copy:
    """A graph under construction of copies of another's nodes.

    Args:
        regions: The other graph.
        inputs: The names of its placeholders.
        originals: For each the name of the placeholder that it is a copy of.
    """

    def __init__(self, regions: _Regions, inputs: list[str], originals: list[str]) -> None:
        self.regions, self.graph = regions, fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self._named: dict[str, fx.Node] = {}
        old = {node.target: node for node in regions.graph.nodes if node.op == "placeholder"}
        for name, original in zip(inputs, originals, strict=True):
            self._named[name] = self.graph.placeholder(name)
            self._named[name].meta = dict(old[original].meta)

    def taken(self, node: fx.Node, place: int, number: int) -> fx.Node:
        """What stands for a node in the copy of the layer at a place as another one."""
        if node.op not in ("placeholder", "get_attr"):
            return self.env[node]
        name = self.regions.renamed(str(node.target), place, number)
        if name not in self._named:
            self._named[name] = self.graph.create_node("get_attr", name)
            self._named[name].meta = dict(node.meta)
        return self._named[name]

    def nodes(self, nodes: Sequence[fx.Node], place: int, number: int) -> None:
        """Appends copies of nodes, those of a layer for the layer of another number."""
        for node in nodes:
            new = self.graph.node_copy(node, lambda n: self.taken(n, place, number))
            module = self.regions.renamed(f"{owner(node)}.", place, number)[:-1]
            new.meta = {**node.meta, "module": module}
            self.env[node] = new


def is_of_cache(name: str) -> bool:
    """Whether a port has keys or values of a layer."""
    return name.startswith(("past_key_values.", "present."))
