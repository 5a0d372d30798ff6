"""Repeated layers: two of each kind are captured, and the second stands for all others.

Layers are of one kind if their modules have the same classes, options, shapes and buffers. What
the capture makes of the two of a kind must then be the same, node by node, but for the layer's
number in names, and for the hidden state that each takes from the layer before; only so may one
stand for the others. Where it is not so every layer is captured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

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
        pairs: Places in `kept` of layers of the same kind.
    """

    path: str
    kept: tuple[int, ...]
    stands: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]


def shorten(model: nn.Module) -> list[Stack]:
    """Takes out of a model's lists of layers those that others can stand for."""
    stacks = []
    for path, layers in list(model.named_modules()):
        if not isinstance(layers, nn.ModuleList) or any(
            path.startswith(f"{stack.path}.") for stack in stacks
        ):
            continue
        stack = _stack(path, [_kind(layer) for layer in layers])
        if len(stack.kept) == len(layers):
            continue
        place, _, name = path.rpartition(".")
        parent = model.get_submodule(place)
        _number(layers, stack.kept)
        setattr(parent, name, nn.ModuleList(layers[i] for i in stack.kept))
        _select_options(model, len(layers), stack.kept)
        stacks.append(stack)
    return stacks


def _stack(path: str, kinds: Sequence[Any]) -> Stack:
    places: dict[Any, list[int]] = {}
    for number, kind in enumerate(kinds):
        places.setdefault(kind, []).append(number)
    kept = tuple(sorted(number for numbers in places.values() for number in numbers[:2]))
    last = {kind: kept.index(numbers[:2][-1]) for kind, numbers in places.items()}
    stands = tuple(
        kept.index(number) if number in kept else last[kind] for number, kind in enumerate(kinds)
    )
    pairs = tuple(
        (kept.index(numbers[0]), kept.index(numbers[1]))
        for numbers in places.values()
        if len(numbers) > 2
    )
    return Stack(path, kept, stands, pairs)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What must agree of layers of one kind."""
    return tuple(
        (
            name,
            type(module),
            tuple(sorted((k, repr(v)) for k, v in _options(module))),
            tuple((k, p.shape, p.dtype) for k, p in module._parameters.items() if p is not None),
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
    if buffer.is_meta:
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


def shortened_name(name: str, path: str, place: int, number: int) -> str:
    """A name within the layer at one place, for the layer of another number."""
    return name.replace(f"{path}.{place}.", f"{path}.{number}.", 1)


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
    return _Regions(graph, stack).whole(inputs, outputs)


class _Regions:
    """The nodes of a graph by the layer that they belong to."""

    def __init__(self, graph: fx.Graph, stack: Stack) -> None:
        self.graph, self.stack = graph, stack
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

    def whole(
        self, inputs: list[Port], outputs: list[str]
    ) -> tuple[fx.Graph, list[Port], list[str]]:
        """The graph with all layers."""
        if not any(self.members):
            return self.graph, inputs, outputs
        if not all(self.members):
            raise Unlike
        self.carried = [self._carried(place) for place in range(len(self.members))]
        for first, second in self.stack.pairs:
            self._compare(first, second)
        return self._rebuilt(inputs, outputs)

    def _carried(self, place: int) -> fx.Node:
        """The one value that a layer gives to the next, or the last to what is behind it."""
        last = place == len(self.members) - 1
        found = []
        for node in self.members[place]:
            users = {self.place[user] for user in node.users if user.op != "output"}
            beyond = users - {place}
            if beyond == {BEHIND if last else place + 1}:
                found.append(node)
            elif beyond and place != 0:  # the first may work out what all others use
                raise Unlike
            elif beyond and BEHIND in beyond:
                raise Unlike
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
                    return self._renamed(str(mine.target), first, second) == str(other.target)
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

    def _renamed(self, name: str, place: int, number: int) -> str:
        """A tensor's or port's name within a layer, as another layer has it."""
        if self._is_port(name):
            kind, found, rest = name.split(".", 2)
            return f"{kind}.{number}.{rest}" if int(found) == place else name
        return shortened_name(name, self.stack.path, place, number)

    @staticmethod
    def _is_port(name: str) -> bool:
        return name.startswith(("past_key_values.", "present."))

    def _rebuilt(
        self, inputs: list[Port], outputs: list[str]
    ) -> tuple[fx.Graph, list[Port], list[str]]:
        graph, shared = fx.Graph(), dict[fx.Node, fx.Node]()
        stands, stack = self.stack.stands, self.stack
        ports: list[Port] = []
        for port in inputs:
            if not self._is_port(port.name):
                ports.append(port)
        of_layer = [[p for p in inputs if p.name.startswith(f"past_key_values.{place}.")]
                    for place in range(len(self.members))]  # fmt: skip
        for number, place in enumerate(stands):
            ports += [
                Port(self._renamed(port.name, place, number), port.dims, port.dtype)
                for port in of_layer[place]
            ]
        old = {node.target: node for node in self.graph.nodes if node.op == "placeholder"}
        given: dict[str, fx.Node] = {}
        for port in ports:
            given[port.name] = graph.placeholder(port.name)
            source = old.get(port.name) or next(iter(old.values()))
            given[port.name].meta = dict(source.meta)
        for number, place in enumerate(stands):
            for port in of_layer[place]:
                name = self._renamed(port.name, place, number)
                given[name].meta = dict(old[port.name].meta)
        names: dict[str, fx.Node] = {}

        def taken(node: fx.Node, env: dict[fx.Node, fx.Node], place: int, number: int) -> fx.Node:
            if node in env:
                return env[node]
            if node.op == "placeholder":
                return given[self._renamed(str(node.target), place, number)]
            if node.op == "get_attr":
                name = self._renamed(str(node.target), place, number)
                if name not in names:
                    names[name] = graph.create_node("get_attr", name)
                    names[name].meta = dict(node.meta)
                return names[name]
            return shared[node]

        def copied(node: fx.Node, env: dict[fx.Node, fx.Node], place: int, number: int) -> fx.Node:
            new = graph.node_copy(node, lambda n: taken(n, env, place, number))
            module = owner(node)
            if place >= 0:
                module = shortened_name(f"{module}.", stack.path, place, number)[:-1]
            new.meta = {**node.meta, "module": module}
            return new

        for node in self.graph.nodes:
            if self.place[node] == BEFORE and node.op == "call_function":
                shared[node] = copied(node, shared, -1, -1)
        present: dict[str, fx.Node] = {}
        returned = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        hidden: fx.Node | None = None
        for number, place in enumerate(stands):
            env: dict[fx.Node, fx.Node] = {}
            if place > 0 and hidden is not None:
                env[self.carried[place - 1]] = hidden
            for node in self.members[place]:
                env[node] = copied(node, env, place, number)
            if number == 0:
                shared.update(env)
            hidden = env[self.carried[place]]
            for name, node in zip(outputs, returned.args[0], strict=True):
                if name.startswith(f"present.{place}."):
                    renamed = self._renamed(name, place, number)
                    present[renamed] = env[node] if node in env else given_of(node, given)
        assert hidden is not None
        last = {**shared, self.carried[-1]: hidden}
        for node in self.graph.nodes:
            if self.place[node] == BEHIND and node.op == "call_function":
                last[node] = copied(node, last, -1, -1)
        results, returns = [], []
        for name, node in zip(outputs, returned.args[0], strict=True):
            if not name.startswith("present."):
                results.append(name)
                returns.append(taken(node, last, -1, -1))
        results += list(present)
        returns += list(present.values())
        graph.output(tuple(returns)).meta = {}
        return graph, ports, results


def given_of(node: fx.Node, given: dict[str, fx.Node]) -> fx.Node:
    """The placeholder that a returned value is."""
    return given[str(node.target)]
