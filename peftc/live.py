"""Materialization: the live model with its rewritten sites, trainable by any loop.

A site becomes a plain module whose forward is generated from its graph, one class for each distinct
graph. It behaves as the module it replaces: parameters keep their names, and pickle, deepcopy,
train(), state_dict(), gradient checkpointing and torch.compile(fullgraph=True) work on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from peftc import graphs
from peftc.constants import Constant, Held, cast
from peftc.errors import PassError, PeftcError, raise_all
from peftc.evaluate import value
from peftc.graphs import Spec, aten
from peftc.program import Program
from peftc.sites import Site

# Python entry points that cost less per call than the overloads they stand for.
_FAST: dict[Any, Any] = {
    aten.linear.default: torch._C._nn.linear,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.t.default: torch.t,
    aten.type_as.default: torch.Tensor.type_as,
}


SHOWN = 5  # how many of many alike errors are spelled out


class LiveSite(nn.Module):
    """A site as a module; its subclasses' forward is generated from `graph`."""

    graph: fx.Graph
    in_features: int
    out_features: int

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: item for name, item in self.__dict__.items() if name != "graph"}
        return _rebuild, (_rows(self.graph),), state

    def extra_repr(self) -> str:
        names = [name for name, _ in self.named_parameters() if name not in ("weight", "bias")]
        return f"in_features={self.in_features}, out_features={self.out_features}, + {names}"


def materialize(
    program: Program, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """The live model that a program describes, in eval mode.

    Args:
        program: What to build.
        device: Where.
        dtype: Of the base's weights; default: the checkpoint's own. Adapters are fp32 unless the
            base is, as in PEFT, fp64.

    Returns:
        The model. If it carries adapters, only their tensors require gradients.
    """
    model = program.source.instantiate(dtype)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    with torch.no_grad():
        for fqn in program.constants:
            if fqn in tensors and program.touched(fqn):
                tensors[fqn].copy_(value(program.constants[fqn]))
    for site in program.sites.values():
        if not site.is_plain:
            model.set_submodule(site.fqn, _live(program, site, model.get_submodule(site.fqn)))
    if trainable := program.trainable:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name in trainable:
                parameter.requires_grad_(True)
    return model.to(device)


def absorb(program: Program, model: nn.Module) -> Program:
    """The program with the trained tensors of a live model in the place of its own.

    Args:
        program: What the model was materialized from.
        model: The model after training, wrapped or not.

    Raises:
        PassError: The model lacks a tensor that the program trains, or has it in another shape.
    """
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    if not program.trainable & set(state):  # wrapped, as DistributedDataParallel does
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    errors: list[PeftcError] = []
    trained: dict[str, Constant] = {}
    for fqn in sorted(program.trainable):
        old = program.constants[fqn]
        if fqn not in state or tuple(state[fqn].shape) != old.spec.shape:
            got = list(state[fqn].shape) if fqn in state else "nothing"
            errors.append(
                PassError(
                    f"the model has {got}, and {list(old.spec.shape)} is trained",
                    where=fqn,
                    fix="pass the model that this program was materialized to",
                )
            )
            continue
        held: Constant = Held(state[fqn].detach().to("cpu", copy=True))
        if fqn in program.captured:
            held = cast(held, old.spec.dtype)
        trained |= dict.fromkeys(program.names_of(fqn), held)
    raise_all(errors[:SHOWN])
    return program.rewrite(constants=trained)


def _live(program: Program, site: Site, old: nn.Module) -> LiveSite:
    """The module of one rewritten site; the base's own parameters stay the same objects."""
    weight = old.get_parameter("weight")
    state = nn.Module()
    specs = {}
    for local in graphs.constant_names(site.graph):
        if "." not in local and isinstance(getattr(old, local, None), torch.Tensor):
            tensor = getattr(old, local)
            setattr(state, local, tensor)
        else:
            tensor = value(program.constants[f"{site.fqn}.{local}"])
            wide = torch.promote_types(weight.dtype, torch.float32)
            tensor = nn.Parameter(tensor.to(wide).clone())
            _place(state, local, tensor)
        specs[local] = Spec(tuple(tensor.shape), tensor.dtype)
    for local, p in site.dropouts.items():
        _place(state, local, nn.Dropout(p))
    if "bias" not in state._parameters:
        state.register_parameter("bias", None)
    live = _blank(_slim(site.graph, specs, Spec((1, site.in_features), weight.dtype)))
    live.__dict__.update({k: v for k, v in state.__dict__.items() if k != "training"})
    live.in_features, live.out_features = site.in_features, site.out_features
    return live.train(old.training)


def _place(root: nn.Module, path: str, item: nn.Module | nn.Parameter) -> None:
    """Sets `a.b.c` of a module, making the modules on the way."""
    *owners, leaf = path.split(".")
    for name in owners:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    setattr(root, leaf, item)


def _slim(graph: fx.Graph, specs: Mapping[str, Spec], x: Spec) -> fx.Graph:
    """The graph without casts that do nothing for these dtypes."""
    known = graphs.propagate(graph, specs, x)
    slim, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        source, other = (*node.args, None, None)[:2]
        if node.target is aten.type_as.default and known[source].dtype == known[other].dtype:
            env[node] = env[source]
        else:
            env[node] = slim.node_copy(node, env.__getitem__)
    return graphs.intern(slim)


_classes: dict[fx.Graph, type[LiveSite]] = {}


def _blank(graph: fx.Graph) -> LiveSite:
    """A module of the class that computes this graph, without state."""
    if graph not in _classes:
        fast = graphs.copy(graph)
        for node in fast.nodes:
            node.target = _FAST.get(node.target, node.target)
        code = fast.python_code("self")
        namespace = dict(code.globals)
        exec(code.src, namespace)
        _classes[graph] = type("LiveSite", (LiveSite,), {"forward": namespace["forward"]})
    live = _classes[graph].__new__(_classes[graph])
    nn.Module.__init__(live)
    live.graph = graph
    return live


@dataclass(frozen=True)
class _Ref:
    name: str


def _rows(graph: fx.Graph) -> list[tuple[str, str, str, Any]]:
    """A graph as plain data: overloads do not pickle, their names do."""

    def refer(node: fx.Node) -> Any:
        return _Ref(node.name)

    return [(n.op, str(n.target), n.name, fx.node.map_arg(n.args, refer)) for n in graph.nodes]


def _rebuild(rows: list[tuple[str, str, str, Any]]) -> LiveSite:
    graph, env = fx.Graph(), dict[str, fx.Node]()

    def resolve(argument: Any) -> Any:
        if isinstance(argument, _Ref):
            return env[argument.name]
        if isinstance(argument, (list, tuple)):
            return type(argument)(resolve(item) for item in argument)
        return argument

    for op, name, label, args in rows:
        target: Any = name
        if op == "call_function":
            target = torch.ops
            for part in name.split("."):
                target = getattr(target, part)
        env[label] = graph.create_node(op, target, resolve(args), name=label)
    return _blank(graphs.intern(graph))
