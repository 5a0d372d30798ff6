"""The normal form of a whole model's graph: what torch.export wrote, without what does nothing.

Parameters and buffers become `get_attr` nodes of their names in the model, inputs placeholders of
their ports' names; assertions, copies, casts to the same dtype, whole slices and empty operands are
gone; every varying dimension is read at one place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from peftc.calling import Port
from peftc.graphs import aten

ROOT = "model"  # what the exported module calls the model
WHOLE = 2**62  # an end from which on a slice is to the end
CASTS = frozenset({
    "to", "_to_copy", "contiguous", "clone", "detach", "detach_", "alias", "lift_fresh_copy",
    "lift_fresh", "type_as", "float", "expand", "view", "reshape", "dropout", "_unsafe_view",
})  # fmt: skip
NOTHING = frozenset({"_assert_tensor_metadata", "sym_constrain_range", "_assert_scalar"})


def owner(node: fx.Node) -> str:
    """The name of the module whose forward a node comes from."""
    return str(node.meta.get("module", ""))


def operator_of(node: fx.Node) -> str:
    """The name of a node's ATen operator without its overload; of others, what Python calls it."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet or node.target, "__name__", node.target))


def mutates(node: fx.Node) -> bool:
    """Whether a node changes a tensor that others may see."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable and operator_of(node) != "detach_")


def normalize(
    exported: torch.export.ExportedProgram, inputs: Sequence[Port]
) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """The graph of an exported program, and its lifted constants by their names in it."""
    signature = exported.graph_signature
    state = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    ports = dict(zip(signature.user_inputs, inputs, strict=True))
    names = {node: _lifted_name(exported.constants[name]) for node, name in lifted.items()}
    held = {names[node]: _real(exported.constants[name]) for node, name in lifted.items()}
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in exported.graph.nodes:  # first, so that a place for dimensions is behind them
        if node.op == "placeholder" and node.name in ports:
            env[node] = graph.placeholder(ports[node.name].name)
            env[node].meta = {"val": node.meta["val"]}
    dims = _Dims(graph, {env[n]: ports[n.name] for n in env})
    for node in exported.graph.nodes:
        if node in env or (node.op == "placeholder" and not node.users):
            continue
        if node.op == "placeholder":
            name = state.get(node.name, node.name).removeprefix(f"{ROOT}.")
            env[node] = graph.create_node("get_attr", names.get(node.name, name))
            env[node].meta = {"val": node.meta["val"]}
        elif operator_of(node) in NOTHING:
            continue
        elif node.target is aten.sym_size.int and (found := dims.of(env[node.args[0]], node)):
            env[node] = found
        elif (same := _unchanged(node)) is not None:
            env[node] = env[same]
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
            stack = node.meta.get("nn_module_stack") or {}
            path = next((v[0] for v in reversed(stack.values()) if v[0].startswith(ROOT)), "")
            env[node].meta = {
                "val": node.meta.get("val"),
                "module": path.removeprefix(ROOT).removeprefix("."),
            }
    _drop_empty(graph)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return graph, held


def _lifted_name(tensor: Any) -> str:
    """The name of a constant of the model's code, the same for equal ones."""
    data = _real(tensor).cpu().contiguous()
    raw = f"{data.dtype} {tuple(data.shape)} {data.flatten().tolist()}"
    return f"lifted.{hashlib.sha256(raw.encode()).hexdigest()[:12]}"


def _real(tensor: Any) -> torch.Tensor:
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach()


class _Dims:
    """Reads every varying dimension at the first input that has it."""

    def __init__(self, graph: fx.Graph, ports: dict[fx.Node, Port]) -> None:
        self.graph, self.ports = graph, ports
        self.known: dict[str, fx.Node] = {}

    def of(self, tensor: fx.Node, node: fx.Node) -> fx.Node | None:
        """The node of a dimension of an input, or None of another tensor."""
        axis = node.args[1]
        if tensor not in self.ports or not isinstance(axis, int):
            return None
        dim = self.ports[tensor].dims[axis]
        assert isinstance(dim, str)
        if dim not in self.known:
            first = next((n, p) for n, p in self.ports.items() if dim in p.dims)
            read = self.graph.call_function(aten.sym_size.int, (first[0], first[1].dims.index(dim)))
            read.meta = {"val": node.meta["val"], "module": ""}
            self.known[dim] = read
        return self.known[dim]


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The operand that a node gives on as it is, if so."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    name, source = operator_of(node), node.args[0]
    before, after = source.meta.get("val"), node.meta.get("val")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return None
    if name == "slice":
        start, end = (*node.args[2:4], None, None)[:2] if len(node.args) > 2 else (None, None)
        step = node.args[4] if len(node.args) > 4 else 1
        to_end = end is None or (isinstance(end, int) and end >= WHOLE)
        return source if start in (None, 0) and to_end and step == 1 else None
    if name == "dropout":
        return source if node.args[2] is False else None
    if name not in CASTS or before.dtype != after.dtype:
        return None
    return source if [str(d) for d in before.shape] == [str(d) for d in after.shape] else None


def _drop_empty(graph: fx.Graph) -> None:
    """Concatenation with the nothing that a cache starts from."""
    for node in list(graph.nodes):
        if operator_of(node) != "cat" or not isinstance(node.args[0], (list, tuple)):
            continue
        kept = [n for n in node.args[0] if tuple(n.meta["val"].shape) != (0,)]
        if len(kept) == 1:
            node.replace_all_uses_with(kept[0])
            graph.erase_node(node)
        elif len(kept) < len(node.args[0]):
            node.args = (kept, *node.args[1:])
