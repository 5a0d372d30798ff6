"""Whole-model graphs: what exporters lower that need more than sites.

The model that a program's config describes is built without memory and exported by torch.export,
late, over what passes made of it. Of layers that are alike only two are captured, and the others
are clones of the second (see `peftc.repeated`). The graph names the program's constants, which are
never read for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.config
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from peftc.calling import CONSTANT, Call, Port, Tensors, calls
from peftc.capturing import CheckpointSource
from peftc.errors import CaptureError, PeftcError
from peftc.normal import mutates, normalize, owner
from peftc.outline import skeleton
from peftc.program import Program
from peftc.repeated import Stack, Unlike, lengthen, shorten

IMPLEMENTATION = "peftc_whole"  # of attention and of experts: what exports well


@dataclass(frozen=True)
class Whole:
    """One graph of a model.

    Attributes:
        name: See `peftc.calling.Call`.
        graph: Placeholders are the inputs by their ports' names; `get_attr` nodes name constants of
            the program or what is `held`. A node's `meta` has its fake value as `val`, and as
            `module` the name of the module that it comes from.
        inputs: Its placeholders, in order.
        outputs: What it returns, in order.
        held: Values that no file has, such as frequencies of rotary embeddings.
        captured: How many layers of how many were captured, by the name of their list.
    """

    name: str
    graph: fx.Graph
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    held: Mapping[str, torch.Tensor]
    captured: Mapping[str, tuple[int, int]]

    @property
    def takes_past(self) -> bool:
        """Whether it goes on from keys and values of tokens before."""
        return any("past" in port.dims for port in self.inputs)


def capture_whole(program: Program, dtype: torch.dtype = torch.float32) -> list[Whole]:
    """Captures a program's model as graphs of its own operators, in eval mode.

    Args:
        program: Its adapters must be merged.
        dtype: Of the weights, as the graph is to compute with them.

    Returns:
        One graph, or an encoder's and a decoder's.

    Raises:
        CaptureError: The model cannot be captured; it names the module.
    """
    try:
        return _capture(program, dtype, short=True)
    except Unlike:  # layers that seemed alike and are not
        return _capture(program, dtype, short=False)


def _capture(program: Program, dtype: torch.dtype, short: bool) -> list[Whole]:
    model = _prepared(program)
    _fill_buffers(model)
    stacks = shorten(model) if short else []
    held = _unsaved(model)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    _fake(model, mode, dtype)
    with mode, torch.no_grad(), _blaming(model):
        found = calls(model)
    return [_exported(program, model, call, stacks, held, mode) for call in found]


def _prepared(program: Program) -> nn.Module:
    """The model on the meta device, with an attention that exports as one operator."""
    source = program.source
    if not isinstance(source, CheckpointSource):
        raise CaptureError(
            "is a live module, and only a checkpoint says how its model is called",
            where="capture",
            fix="save it (save_pretrained), and export the checkpoint",
        )
    model: Any = skeleton(source.checkpoint)
    _register()
    if model._supports_sdpa:
        model.set_attn_implementation(IMPLEMENTATION)
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation(IMPLEMENTATION)
    for fqn, constant in program.constants.items():
        place, _, name = fqn.rpartition(".")
        if name in CONSTANT:
            empty = torch.empty(constant.spec.shape, dtype=constant.spec.dtype, device="meta")
            model.get_submodule(place).register_parameter(name, nn.Parameter(empty, False))
    module: nn.Module = model.eval()
    return module


def _fill_buffers(model: Any) -> None:
    """Has transformers work out the values of the buffers of a model on the meta device."""
    for module in model.modules():
        for name, old in module._buffers.items():
            if old is not None and old.is_meta:
                fill = float("nan") if old.is_floating_point() else 0
                module._buffers[name] = torch.full(old.shape, fill, dtype=old.dtype)
    model.initialize_weights()  # parameters have no memory yet


def _unsaved(model: nn.Module) -> Tensors:
    """The buffers that no file has.

    Raises:
        CaptureError: The values of one are not known.
    """
    stored = set(model.state_dict())
    buffers = dict(model.named_buffers(remove_duplicate=False))
    held = {name: buffer for name, buffer in buffers.items() if name not in stored}
    for name, buffer in held.items():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise CaptureError(
                "is a buffer that no file has, and transformers does not say how to compute it",
                where=name,
                fix="write the model with --format safetensors",
            )
    return held


def _fake(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Gives a model fake parameters on the CPU; tied ones stay tied."""
    shared: dict[int, nn.Parameter] = {}
    with mode:
        for module in model.modules():
            for name, old in module._parameters.items():
                if old is None:
                    continue
                if id(old) not in shared:
                    wanted = dtype if old.is_floating_point() else old.dtype
                    new = torch.empty(old.shape, dtype=wanted, device="cpu")
                    shared[id(old)] = nn.Parameter(new, requires_grad=False)
                module._parameters[name] = shared[id(old)]


class _Flat(nn.Module):
    """A model as `call` has it, over a dictionary of tensors."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, given: Tensors) -> Tensors:
        return self.call.run(self.model, given)


def _exported(
    program: Program,
    model: nn.Module,
    call: Call,
    stacks: list[Stack],
    held: Tensors,
    mode: FakeTensorMode,
) -> Whole:
    with mode:
        example = {port.name: port.example() for port in call.inputs}
    dynamic = {
        port.name: {
            axis: torch.export.Dim.DYNAMIC
            for axis, dim in enumerate(port.dims)
            if isinstance(dim, str)
        }
        for port in call.inputs
    }
    flat = _Flat(model, call).eval()
    with torch.no_grad(), _quick(), _blaming(model):
        exported = torch.export.export(
            flat, (example,), dynamic_shapes={"given": dynamic}, strict=False
        )
    outputs = list(_output_names(exported))
    if any(mutates(node) for node in exported.graph.nodes):
        exported = exported.run_decompositions({})  # as functions, and nothing else
    names = _dimensions(exported, call.inputs)
    graph, values = normalize(exported, call.inputs)
    values = {**held, **values}
    inputs, ports = list(call.inputs), outputs
    for stack in stacks:
        graph, inputs, ports = lengthen(graph, inputs, ports, stack)
    named = {node.target for node in graph.nodes if node.op == "get_attr"}
    kept = {name: x for name, x in values.items() if name in named}
    if lacking := sorted(map(str, named - kept.keys() - program.constants.keys())):
        raise CaptureError(
            "is no tensor of the checkpoint", where=lacking[0], fix="save the checkpoint again"
        )
    node = next(n for n in reversed(graph.nodes) if n.op == "output")
    returned = tuple(
        Port(name, _dims(value.meta["val"], names), value.meta["val"].dtype)
        for name, value in zip(ports, node.args[0], strict=True)
    )
    counts = {
        stack.path: (len(stack.kept), len(stack.stands))
        for stack in stacks
        if any(owner(n).startswith(f"{stack.path}.") for n in graph.nodes)
    }
    return Whole(call.name, graph, tuple(inputs), returned, kept, counts)


def _output_names(exported: Any) -> Iterator[str]:
    """The keys of the dictionary that the exported forward returns."""
    spec = exported.call_spec.out_spec
    assert spec is not None
    yield from spec.context


def _dimensions(exported: Any, inputs: Sequence[Port]) -> dict[str, str]:
    """The name of each dimension that varies, by torch's symbol for it."""
    names: dict[str, str] = {}
    given = exported.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.name in given}
    for name, port in zip(given, inputs, strict=True):
        for size, dim in zip(values[name].shape, port.dims, strict=True):
            if isinstance(dim, str):
                names.setdefault(str(size), dim)
    return names


def _dims(value: torch.Tensor, names: Mapping[str, str]) -> tuple[int | str, ...]:
    """A tensor's dimensions by their names; what comes of two is a sum of theirs."""
    dims: list[int | str] = []
    sizes: tuple[Any, ...] = tuple(value.shape)
    for size in sizes:
        if isinstance(size, int):
            dims.append(size)
            continue
        parts = sorted(names.get(part.strip(), part) for part in str(size).split("+"))
        dims.append(" + ".join(parts))
    return tuple(dims)


@contextmanager
def _quick() -> Iterator[None]:
    """Without the source lines of every node, which take a third of the time."""
    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


@contextmanager
def _blaming(model: nn.Module) -> Iterator[None]:
    """Makes of whatever torch or the model's own code raises an error that names the module."""
    try:
        yield
    except PeftcError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture it: {_first_line(error)}",
            where=_blamed(error) or type(model).__name__,
            fix="write the model with --format safetensors; the module's own code is in the way",
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def _blamed(error: BaseException) -> str | None:
    """The innermost module whose forward an error went through, by its class."""
    found, trace = None, error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and trace.tb_frame.f_code.co_name == "forward":
            found = type(module).__name__
        trace = trace.tb_next
    return found


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as one operator, to which keys and values go as they are in the cache.

    Args:
        module: The attention module.
        query: (batch, heads, queries, size).
        key: (batch, key heads, keys, size).
        value: Likewise.
        attention_mask: (batch, 1, queries, keys), true where a key is seen.
        scaling: Of the scores.
        is_causal: Whether the future is hidden where there is no mask.
        position_bias: What is added to the scores, (1, heads, queries, keys).
        options: What is of no consequence in eval mode.
    """
    if options.get("softcap") is not None:
        raise CaptureError(
            "its scores are capped by a hyperbolic tangent, for which attention has no operator",
            where=type(module).__name__,
            fix="write the model with --format safetensors",
        )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if position_bias is not None:
        from transformers.integrations.sdpa_attention import create_position_bias_mask

        causal = is_causal and attention_mask is None
        attention_mask = create_position_bias_mask(
            position_bias, attention_mask, causal, query, key
        )
    result = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
        is_causal=is_causal and attention_mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result.transpose(1, 2), None


def _experts(
    experts: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Fused experts, each of which sees every token: no weight is copied, as choosing them would.

    Args:
        experts: The module.
        hidden: (tokens, features).
        index: (tokens, experts per token): the chosen experts.
        weights: (tokens, experts per token): their weights.
    """
    chosen = index.unsqueeze(-1) == torch.arange(experts.num_experts, device=index.device)
    share = (chosen * weights.unsqueeze(-1)).sum(1)  # (tokens, experts)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(experts, name)
        y = torch.matmul(x, weight if experts.is_transposed else weight.transpose(1, 2))
        return y + getattr(experts, f"{name}_bias").unsqueeze(1) if experts.has_bias else y

    inner = linear("gate_up_proj" if experts.has_gate else "up_proj", hidden.unsqueeze(0))
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    outer = linear("down_proj", inner)
    if experts.has_post_expert_norm:
        outer = experts.post_expert_norm(outer)
    result: torch.Tensor = (outer * share.t().unsqueeze(-1)).sum(0).to(hidden.dtype)
    return result


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
