"""Materialization: the live model with its rewritten sites, trainable by any loop.

A site becomes a plain module whose forward is generated from its graph, one class for each distinct
graph. It behaves as the module it replaces: parameters keep their names, and pickle, deepcopy,
train(), state_dict(), gradient checkpointing and torch.compile(fullgraph=True) work on it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftc import graphs
from peftc.constants import Constant, Held, Packed, cast
from peftc.errors import PassError, PeftcError, raise_all
from peftc.evaluate import value
from peftc.functions import function_of
from peftc.fusing import by_rows, opened
from peftc.graphs import Spec, aten
from peftc.kinds import EmbeddingKind, ExpertsKind, Kind, ModuleKind, expert_kinds
from peftc.mixing import Mix
from peftc.ops import grouped_linear
from peftc.program import MIX, Program
from peftc.sites import Site
from peftc.surrounding import listen, surround

SHOWN = 5  # how many of many alike errors are spelled out


class LiveSite(nn.Module):
    """A site as a module; its subclasses' forward is generated from `graph`.

    Attributes:
        graph: What it computes.
        exact: Buffers that no cast reaches: the codes and absmax of a quantized weight.
    """

    graph: fx.Graph
    exact: tuple[str, ...] = ()
    in_features: int
    out_features: int

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: item for name, item in self.__dict__.items() if name != "graph"}
        return _rebuild, (graphs.dump(self.graph),), state

    def _apply(self, fn: Any, recurse: bool = True) -> LiveSite:
        """As for any module, but that what a quantized weight is stored as keeps its dtype."""
        before = {name: self._buffers[name] for name in self.exact}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

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
    return _built(program, program.source.instantiate(dtype), value, device).to(device)


def hollow(program: Program, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """The live model as `materialize` gives it, with shapes and dtypes and no values.

    Args:
        program: What to build; no weight of it is read.
        mode: Where its tensors, which seem to be on the CPU, can be computed with.
        dtype: As for `materialize`.
    """
    model = program.source.skeleton()
    made: dict[int, Any] = {}
    with mode:
        for name, tensor in _named(model).items():
            known = program.constants.get(name)
            kept = known.spec.dtype if known is not None else tensor.dtype
            kind = (dtype or kept) if tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=kind)
            made[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
        copied: nn.Module = copy.deepcopy(model, made)
        for module in copied.modules():
            if expert_kinds(module):  # torch's own product of groups has a fake for bf16 only
                module.__class__ = experts_class(type(module), {})
        return _built(program, copied.eval(), _empty, "cpu")


def _empty(constant: Constant) -> torch.Tensor:
    return torch.empty(constant.spec.shape, dtype=constant.spec.dtype)


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    """All of a model's tensors, tied ones by each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


Values = Callable[[Constant], torch.Tensor]


def _built(
    program: Program, model: nn.Module, value: Values, device: str | torch.device
) -> nn.Module:
    """A plain model with all that the program says of it; constants have their values so."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = _named(model)
    packed = program.packed
    stored = {program.sites[fqn].name("weight") for fqn in packed}
    for fqn in tensors.keys() & program.constants.keys() - stored:
        if program.touched(fqn) or isinstance(program.constants[fqn], Packed):
            # Not into the old one, which takes no memory where the source has 4 bits.
            old = tensors[fqn]
            old.data = old.new_empty(old.shape).copy_(value(program.constants[fqn]))
    dtypes = (p.dtype for p in parameters.values() if p.is_floating_point())
    live = _Live(program, device, next(dtypes, torch.float32), value)
    experts: dict[str, list[Site]] = {}
    for site in program.sites.values():
        if site.is_plain and site.fqn not in packed:
            continue
        if isinstance(site.kind, ExpertsKind):
            experts.setdefault(site.fqn.rpartition(".")[0], []).append(site)
        elif isinstance(site.kind, ModuleKind):
            live.around(site, model)
        else:
            model.set_submodule(site.fqn, live.module(site, model.get_submodule(site.fqn)))
    for owner, members in experts.items():
        live.experts(members, model.get_submodule(owner))
    for adapter in reversed([*program.adapters.values()]):
        if adapter.method is not None:
            wide = torch.promote_types(next(iter(parameters.values())).dtype, torch.float32)
            tensors = {name: live.tensor(fqn, wide) for name, fqn in adapter.prompts.items()}
            adapter.method.enliven(model, tensors)
            if adapter.name in program.mixed[1:]:  # at first the first is on
                adapter.method.withdraw(model)
    if trainable := program.trainable:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name in trainable:
                parameter.requires_grad_(True)
    return model


def absorb(program: Program, model: nn.Module | Mapping[str, torch.Tensor]) -> Program:
    """The program with the trained tensors of a live model in the place of its own.

    Args:
        program: What the model was materialized from.
        model: The model after training, wrapped or not, or its state_dict.

    Raises:
        PassError: The model lacks a tensor that the program trains, or has it in another shape.
    """
    found = model.state_dict() if isinstance(model, nn.Module) else model
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()}
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


class _Live:
    """Builds the modules of rewritten sites; what sites share is one tensor."""

    def __init__(
        self,
        program: Program,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
        value: Values = value,
    ) -> None:
        self.program, self.device, self.dtype, self.value = program, device, dtype, value
        self.frozen = {fqn for a in program.adapters.values() for fqn in a.frozen}
        self._mix: Mix | None = None
        self._shared: dict[Constant, torch.Tensor] = {}
        self._trained: dict[str, torch.Tensor] = {}  # by the first of the names of tied ones

    def module(self, site: Site, old: nn.Module) -> LiveSite:
        """The module of one rewritten site; the base's own parameters stay the same objects."""
        state = nn.Module()
        graph = self.state(site, old, state)
        exact = tuple(name for name, b in state._buffers.items() if name.startswith("weight"))
        if "bias" not in state._parameters:
            state.register_parameter("bias", None)
        live = _blank(graph)
        plain = {k: v for k, v in old.__dict__.items() if not k.startswith("_") and k != "training"}
        live.__dict__.update(plain)
        live.__dict__.update({k: v for k, v in state.__dict__.items() if k != "training"})
        live.in_features, live.out_features = site.in_features, site.out_features
        live.exact = exact
        return live.train(old.training)

    def experts(self, sites: Sequence[Site], old: nn.Module) -> nn.Module:
        """A module of fused experts, some of whose parameters are rewritten sites."""
        rows = {}
        for site in sites:
            rows[site.fqn.rpartition(".")[2]] = graphs.dump(self.state(site, old, old))
        old.__class__ = experts_class(type(old), rows)
        return old

    def around(self, site: Site, model: nn.Module) -> None:
        """Has a module that is not opened, and the one whose input it asks for, compute a site."""
        old, kind = model.get_submodule(site.fqn), site.kind
        assert isinstance(kind, ModuleKind)
        graph = self.state(site, old, old)
        surround(old, graph)
        if kind.entry and any(node.target == "stream" for node in graph.nodes):
            listen(model.get_submodule(kind.entry), old)

    def state(self, site: Site, old: nn.Module, state: nn.Module) -> fx.Graph:
        """Places a site's tensors and dropouts in a module; returns the graph over them."""
        owner = site.name("weight").rpartition(".")[0]
        dtype = self.dtype
        if site.kind.opened:
            dtype = old.get_parameter(site.name("weight").removeprefix(f"{owner}.")).dtype
        opened_graph, stored = opened(
            site, self.program.bindings(site), site.fqn in self.program.fused
        )
        if self.program.mixed:
            opened_graph = by_rows(opened_graph)
        specs = {}
        for local in graphs.constant_names(opened_graph):
            if local in stored:
                part = self.value(stored[local])
                if local.endswith("_absmax") and torch.device(self.device).type != "cpu":
                    part = _small(part)
                part = part.to(self.device)
                state.register_buffer(local, part)
                specs[local] = Spec(tuple(part.shape), part.dtype)
                continue
            fqn = site.name(local)
            path = fqn.removeprefix(f"{owner}.")
            if local == MIX:
                self._mix = self._mix or Mix(
                    self.value(self.program.constants[fqn]).to(self.device)
                )
                state.__dict__[path.rpartition(".")[0]] = self._mix
                specs[local] = self.program.constants[fqn].spec
                continue
            tensor = getattr(old, path, None) if "." not in path else None
            if not isinstance(tensor, torch.Tensor):
                tensor = self.tensor(fqn, torch.promote_types(dtype, torch.float32))
            if state is not old or path not in old._parameters:
                place(state, path, tensor)
            specs[local] = Spec(tuple(tensor.shape), tensor.dtype)
        for local, p in site.dropouts.items():
            dropout = nn.Dropout(p).train(old.training)
            place(state, site.name(local).removeprefix(f"{owner}."), dropout)
        if not site.kind.opened:  # what its inputs' dtypes are, only a run can tell
            return opened_graph
        graph = _rounded(opened_graph, site.kind, dtype)
        return _slim(graph, specs, site.kind.specs(site.shape, dtype))

    def tensor(self, fqn: str, dtype: torch.dtype) -> torch.Tensor:
        """A constant as a tensor of the model: a parameter, unless it is frozen."""
        constant = self.program.constants[fqn]
        if fqn in self.frozen:
            if constant not in self._shared:
                self._shared[constant] = _wide(self.value(constant), dtype).to(self.device)
            return self._shared[constant]
        owner = self.program.aliases.get(fqn, fqn)
        if owner not in self._trained:
            tensor = _wide(self.value(constant), dtype).clone()
            self._trained[owner] = nn.Parameter(tensor) if tensor.is_floating_point() else tensor
        return self._trained[owner]


def _small(tensor: torch.Tensor) -> torch.Tensor:
    """Absmax in bf16, where they are such numbers: those of bf16 weights are."""
    half = tensor.bfloat16()
    return half if tensor.is_floating_point() and torch.equal(half.float(), tensor) else tensor


def _rounded(graph: fx.Graph, kind: Kind, dtype: torch.dtype) -> fx.Graph:
    """The graph of an embedding that rounds its scale to the weight's dtype, for that dtype."""
    if not isinstance(kind, EmbeddingKind) or not kind.rounded:
        return graph
    copy = graphs.copy(graph)
    for node in copy.nodes:
        if node.target is aten.mul.Tensor and node.args[1] == kind.scale:
            node.args = (node.args[0], torch.tensor(kind.scale, dtype=dtype).item())
    return graphs.intern(copy)


def _wide(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def place(root: nn.Module, path: str, item: nn.Module | torch.Tensor) -> None:
    """Sets `a.b.c` of a module, making the modules on the way; a plain tensor is a buffer."""
    *owners, leaf = path.split(".")
    for name in owners:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    if isinstance(item, (nn.Module, nn.Parameter)):
        setattr(root, leaf, item)
    else:
        root.register_buffer(leaf, item, persistent=False)


def _slim(graph: fx.Graph, specs: Mapping[str, Spec], x: Mapping[str, Spec]) -> fx.Graph:
    """The graph without casts that do nothing for these dtypes, worked out once for alike sites."""
    key = graph, tuple(sorted(specs.items())), tuple(sorted(x.items()))
    if key not in _slimmed:
        _slimmed[key] = _without_casts(graph, specs, x)
    return _slimmed[key]


def _without_casts(graph: fx.Graph, specs: Mapping[str, Spec], x: Mapping[str, Spec]) -> fx.Graph:
    known = graphs.propagate(graph, specs, x)
    slim, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        source, other = (*node.args, None, None)[:2]
        if node.target is aten.type_as.default and known[source].dtype == known[other].dtype:
            env[node] = env[source]
        else:
            env[node] = slim.node_copy(node, env.__getitem__)
    return graphs.intern(slim)


_slimmed: dict[Any, fx.Graph] = {}
_classes: dict[fx.Graph, type[LiveSite]] = {}


def _blank(graph: fx.Graph) -> LiveSite:
    """A module of the class that computes this graph, without state."""
    if graph not in _classes:
        _classes[graph] = type("LiveSite", (LiveSite,), {"forward": function_of(graph)})
    live = _classes[graph].__new__(_classes[graph])
    nn.Module.__init__(live)
    live.graph = graph
    return live


_experts: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def experts_class(cls: type[nn.Module], rows: Mapping[str, list[Any]]) -> type[nn.Module]:
    """A subclass of a class of fused experts, with graphs in the place of its linear layers."""
    key = cls, json.dumps(rows, sort_keys=True)
    if key not in _experts:
        functions = {name: function_of(graphs.restore(graph), name) for name, graph in rows.items()}

        def linear(self: Any, name: str, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            if name in functions:
                return functions[name](self, x, ends)
            weight = getattr(self, name)
            matrix = weight.transpose(1, 2) if self.is_transposed else weight
            result: torch.Tensor = grouped_linear(x, matrix, ends)
            return result

        def forward(
            self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            return run_experts(self, linear, hidden, index, weights)

        def reduce(self: Any) -> tuple[Any, ...]:
            return _rebuild_experts, (cls, rows), self.__dict__

        members = {"forward": forward, "__reduce__": reduce}
        _experts[key] = type(cls.__name__, (cls,), members)
    return _experts[key]


def run_experts(
    experts: Any,
    linear: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """What transformers' fused experts compute, through another linear layer per expert.

    Args:
        experts: The module.
        linear: Of the module, a parameter's name, rows sorted by expert, and each expert's end.
        hidden: (tokens, features).
        index: (tokens, experts per token): the chosen experts.
        weights: (tokens, experts per token): their weights.
    """
    chosen = index.shape[-1]
    flat, order = torch.sort(index.reshape(-1))
    counts = torch.nn.functional.one_hot(flat, experts.num_experts).sum(0)
    ends = counts.cumsum(0, dtype=torch.int32)

    def biased(name: str, x: torch.Tensor) -> torch.Tensor:
        y = linear(experts, name, x, ends)
        return y + getattr(experts, f"{name}_bias")[flat] if experts.has_bias else y

    inner = biased("gate_up_proj" if experts.has_gate else "up_proj", hidden[order // chosen])
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    outer = biased("down_proj", inner)
    if experts.has_post_expert_norm:
        outer = experts.post_expert_norm(outer)
    outer = outer * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    result: torch.Tensor = outer[back].view(*index.shape, -1).sum(1).to(hidden.dtype)
    return result


def _rebuild_experts(cls: type[nn.Module], rows: Mapping[str, list[Any]]) -> nn.Module:
    made = experts_class(cls, rows)
    return made.__new__(made)


def _rebuild(rows: list[Any]) -> LiveSite:
    return _blank(graphs.restore(rows))
