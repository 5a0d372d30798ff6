"""Roles: what each linear map of a model is for, found from the model's own forward pass.

A copy without memory runs once on tiny inputs. Every tensor carries tags that say which linear maps
it comes from and what happened to it since, and the operators that it goes through say the rest:
the operands of a product that reaches a softmax are query and key, what the softmax's result
multiplies is the value, and the next linear map is the attention's output; what a nonlinearity or a
gate makes of a linear map's result goes down through the next one. No name of an architecture or of
a module is looked at.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from peftc.sublayers import Role, Streams, Sublayer

TOKENS = 4  # of text in an example
CPU_ATTENTION = (None, "eager", "sdpa")
LARGEST = 1_000_000_000  # parameters of what is run on the CPU where the meta device cannot

# Tags are pairs of a kind and a linear map's name. A tensor comes FROM it, is a QUERY or KEY in
# scores that a softmax may take, was ACTIVATED by a nonlinearity, or is a part of its WEIGHT.
# Two have no name: what a softmax made of scores, and what that made of values.
FROM, QUERY, KEY, ACTIVATED, WEIGHT = "from", "query", "key", "activated", "weight"
PROBS, ATTENDED = ("probs", ""), ("attended", "")
Tags = frozenset[tuple[str, str]]
NONE: Tags = frozenset()

PRODUCTS = frozenset({
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum",
    "linear", "grouped_mm", "_grouped_mm",
})  # fmt: skip
ADDED = frozenset({"addmm", "addbmm", "baddbmm"})  # products whose first operand is only added
SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
GATES = frozenset({"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"})
# softplus, exp and softmax are not among them: they make steps, decays and weights.
NONLINEAR = frozenset({
    "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh",
    "sigmoid", "sigmoid_", "erf", "glu", "hardswish", "hardsigmoid", "hardtanh", "softsign",
    "prelu", "rrelu", "threshold", "logsigmoid",
})  # fmt: skip
# Operators whose result, for a parameter, is still its weight.
SELECTING = frozenset({
    "__getitem__", "__get__", "transpose", "permute", "t", "contiguous", "to", "index_select",
    "chunk", "unbind", "narrow",
})  # fmt: skip
# Operators after which nothing is known: they mix features by weights of their own.
MIXING = frozenset({
    "conv1d", "conv2d", "conv3d", "multi_head_attention_forward", "_native_multi_head_attention",
})  # fmt: skip
MEDIA = ("pixel_values", "input_features", "input_values")  # what models take besides ids


class Roles(BaseModel):
    """What a model's forward pass shows, as plain data.

    Modules go by each of their names, and stacked weights of fused experts by the parameter's name.

    Attributes:
        called: Every module whose forward ran.
        roles: What linear maps are for: query, key, value, output, up and down.
        unknown: Modules that did not run only because a part of the model could not be run.
        features: The last dimensions of each module's first input, or 0 where that is no numbers,
            and of its first output.
        sublayers: Where the model adds what a block of layers makes, in the order of the pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    called: frozenset[str]
    roles: dict[str, frozenset[str]]
    unknown: frozenset[str] = frozenset()
    features: dict[str, tuple[int, int]] = {}
    sublayers: tuple[Sublayer, ...] = ()

    def may_run(self, name: str) -> bool:
        """Whether a module runs in a forward pass, or is not known not to."""
        return name in self.called or name in self.unknown


def trace(model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> Roles | None:
    """Finds a model's roles; the model itself is neither run nor changed.

    Args:
        model: It may be on any device, the meta device too.
        inputs: What its forward takes, by name; made from its config without them.

    Returns:
        None for a model of which no part can be run.
    """
    names: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    parts = {name: found for name, found in names.items() if name == "" or is_model(found)}
    examples = {name: _examples(part) for name, part in parts.items()}
    if inputs is not None:
        examples[""] = dict(inputs)
    called: set[str] = set()
    roles: dict[str, set[str]] = {}
    ran: set[str] = set()
    features: dict[str, tuple[int, int]] = {}
    sublayers: list[Sublayer] = []
    # Outer parts come first: an inner one runs on its own only where none around it called it.
    for name, part in parts.items():
        if name not in called and (found := _run(part, examples[name])):
            ran.add(name)
            called.update(_inside(name, child) for child in found.called)
            for child, which in found.roles.items():
                roles.setdefault(_inside(name, child), set()).update(which)
            features |= {_inside(name, c): sizes for c, sizes in found.streams.features.items()}
            sublayers += [_moved_into(name, s) for s in found.streams.sublayers()]
    if not ran:
        return None
    # A part that ran without all it takes says nothing of the modules that it did not call.
    whole = set()
    for name in parts.keys() & called:
        wants = (*MEDIA, "encoder_hidden_states") if name in ran and name else MEDIA
        lacks = [
            want for want in wants if want in takes(parts[name]) and want not in examples[name]
        ]
        if not lacks or (name == "" and inputs is not None):
            whole.add(name)
    unknown = {
        name
        for name in names.keys() - called
        if max((part for part in parts if within(part, name)), key=len) not in whole
    }
    return Roles(
        called=frozenset(called),
        roles={name: frozenset(which) for name, which in sorted(roles.items())},
        unknown=frozenset(unknown),
        features=features,
        sublayers=tuple(dict.fromkeys(sublayers)),
    )


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tiny inputs, on the CPU, that a transformers model's config and forward ask for, if any."""
    config, wanted = getattr(model, "config", None), takes(model)
    dtype = next((x.dtype for x in model.parameters() if x.is_floating_point()), torch.float32)

    def get(*names: str) -> Any:
        """The first of these in the config, or in the config of a part."""
        parts = ("text_config", "vision_config", "audio_config", "encoder")
        for found in (config, *(getattr(config, part, None) for part in parts)):
            for name in names:
                if getattr(found, name, None) is not None:
                    return getattr(found, name)
        return None

    examples: dict[str, torch.Tensor] = {}
    for name in ("input_ids", "decoder_input_ids"):
        if name in wanted and (size := get("vocab_size")):
            ids = torch.arange(TOKENS) % size
            if isinstance(end := get("eos_token_id"), int) and 0 <= end < size:
                ids[-1] = end  # where some classifiers look for the text's end
            examples[name] = ids[None]
    # With placeholders among the text, an image's features would have to match their number.
    if "pixel_values" in wanted and get("image_size") and not get("image_token_id"):
        sizes = get("image_size")
        sizes = (sizes, sizes) if isinstance(sizes, int) else tuple(sizes)
        shape = (1, get("num_channels") or 3, *sizes)
        examples["pixel_values"] = torch.zeros(shape, dtype=dtype)
    if "input_features" in wanted and get("num_mel_bins") and get("max_source_positions"):
        shape = (1, get("num_mel_bins"), 2 * get("max_source_positions"))
        examples["input_features"] = torch.zeros(shape, dtype=dtype)
    if "input_values" in wanted:
        examples["input_values"] = torch.zeros(1, 4000, dtype=dtype)  # a quarter second of sound
    if "grid_thw" in wanted and get("patch_size"):  # a tower that takes flat patches
        side, channels = get("spatial_merge_size") or 1, get("in_channels", "in_chans") or 3
        features = channels * (get("temporal_patch_size") or 1) * get("patch_size") ** 2
        patches = torch.zeros(side * side, features, dtype=dtype)
        examples[next(iter(wanted))] = patches
        examples["grid_thw"] = torch.tensor([[1, side, side]])
    return examples


class _Tracer(TorchFunctionMode):
    """Follows tags through every operator of a model that nobody else uses, and hears its calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.roles: dict[str, set[str]] = {}
        self.linear: set[str] = set()
        self.streams = Streams()
        self._tags: MutableMapping[torch.Tensor, Tags] = WeakTensorKeyDictionary()
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            inner = any(outer in self.linear for outer in accumulate(name.split("."), _inside))
            if _is_linear(module) and not inner:  # an adapter's own maps are inside of one
                self.linear.add(name)
            module.register_forward_hook(partial(self._leave, name))
            for child, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and child != "weight":
                    self.linear.add(_inside(name, child))
                    self._tag(parameter, frozenset({(WEIGHT, _inside(name, child))}))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator, then tags its result."""
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        operands = list(_tensors((args, kwargs)))
        if name == "__setitem__":
            self._tag(args[0], self._of(operands))
        elif name in MIXING:
            self._tag(out, NONE)
        elif name == "scaled_dot_product_attention":
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            for role in ("query", "key", "value"):
                self._give(role, self._of([named[role]]), FROM)
            self._tag(out, frozenset({ATTENDED}))
        elif isinstance(out, torch.Tensor | tuple | list) and operands:
            tags = [self._of([x]) for x in operands]
            self._tag(out, self._result(name, tags))
            if name in SUMS and isinstance(out, torch.Tensor):
                self.streams.add(operands, out, [self._maker(own) for own in tags])
        return out

    def _result(self, name: str, operands: list[Tags]) -> Tags:
        """The tags of an operator's result, by those of its operands."""
        union = NONE.union(*operands)
        if name in PRODUCTS:
            first, *others = operands[1:] if name in ADDED else operands
            second = others[0] if others else NONE
            return self._product(first, second, union)
        if name == "softmax" and any(kind in (QUERY, KEY) for kind, _ in union):
            self._give("query", union, QUERY)
            self._give("key", union, KEY)
            return frozenset({PROBS})
        if name in NONLINEAR:
            return _moved(union, FROM, ACTIVATED)
        activated = [any(kind == ACTIVATED for kind, _ in tags) for tags in operands if tags]
        if name in GATES and any(activated):
            return _moved(union, FROM, ACTIVATED)
        if name in SUMS and not all(activated):  # a residual stream is no nonlinearity's result
            union = frozenset(tag for tag in union if tag[0] != ACTIVATED)
        if name not in SELECTING:
            union = frozenset(tag for tag in union if tag[0] != WEIGHT)
        return union

    def _product(self, first: Tags, second: Tags, union: Tags) -> Tags:
        stacks = [stack for kind, stack in union if kind == WEIGHT]
        if stacks:  # experts: a linear map that is no module
            self._consume(stacks[0], union)
            self.called.update(stacks)
            return frozenset((FROM, stack) for stack in stacks)
        if PROBS in union:
            self._give("value", union, FROM)
            return frozenset({ATTENDED})
        if first and second:
            return _moved(_only(first, FROM), FROM, QUERY) | _moved(_only(second, FROM), FROM, KEY)
        return union

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.called.add(name)
        if name in self.linear:
            self._consume(name, self._of(_tensors((args, kwargs))))
        if (x := next(_tensors((args, kwargs)), None)) is not None:
            self.streams.enter(name, module, x, name in self.linear)

    def _leave(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        if name in self.linear:
            self._tag(out, frozenset({(FROM, name)}))
        if (y := next(_tensors(out), None)) is not None:
            self.streams.leave(name, y)

    def _maker(self, tags: Tags) -> Role | None:
        """What makes a tensor, by the roles of the linear maps that it comes from."""
        found: set[str] = set()
        found.update(*(self.roles.get(name, set()) for _, name in _only(tags, FROM)))
        return "attention" if "output" in found else "feed_forward" if "down" in found else None

    def _consume(self, name: str, tags: Tags) -> None:
        """Gives a linear map the role that its input shows."""
        ups = frozenset(tag for tag in tags if tag[0] == ACTIVATED and tag[1] in self.linear)
        if ATTENDED in tags:
            self._give("output", frozenset({(FROM, name)}), FROM)
        elif ups:
            self._give("down", frozenset({(FROM, name)}), FROM)
            self._give("up", ups, ACTIVATED)

    def _give(self, role: str, tags: Tags, kind: str) -> None:
        for _, name in _only(tags, kind):
            if name in self.linear:
                self.roles.setdefault(name, set()).add(role)

    def _of(self, tensors: Iterable[torch.Tensor]) -> Tags:
        return NONE.union(*(self._tags.get(x, NONE) for x in tensors))

    def _tag(self, out: Any, tags: Tags) -> None:
        for tensor in _tensors(out):
            # What a router chose by is no part of a linear map's result.
            if tensor.is_floating_point():
                self._tags[tensor] = tags


def _run(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> _Tracer | None:
    """Runs a copy on fake tensors; where control flow needs values, on real ones."""
    for fake in (True, False):
        try:
            if not fake and sum(x.numel() for x in model.parameters()) > LARGEST:
                return None
            real = {name: _like(x) if x.is_meta else x.cpu() for name, x in inputs.items()}
            # Unlike the meta device, fake tensors are known to transformers, which then asks
            # less of their values.
            with torch.no_grad(), FakeTensorMode() if fake else nullcontext() as mode:
                examples = {name: mode.from_tensor(x) if mode else x for name, x in real.items()}
                copied = twin(model)
                tracer = _Tracer(copied)
                with tracer:
                    copied(**examples)
        except Exception:  # any model code may fail on made-up inputs
            continue
        if not fake:
            _level(tracer, copied)
        _spread(tracer, copied)
        return tracer
    return None


def twin(model: nn.Module) -> nn.Module:
    """A copy for a forward pass on the CPU, whose tensors have one element of memory each."""
    memo: dict[int, Any] = {
        id(x): nn.Parameter(_like(x), requires_grad=False) for x in model.parameters()
    }
    memo |= {id(x): _like(x) for x in model.buffers()}
    made: Any = copy.deepcopy(model, memo).eval()
    for module in made.modules():
        if hasattr(config := getattr(module, "config", object()), "use_cache"):
            config.use_cache = False
    # Other kernels run on GPUs only, and a loop over experts depends on values.
    if getattr(getattr(made, "config", None), "_attn_implementation", "sdpa") not in CPU_ATTENTION:
        made.set_attn_implementation("eager")
    if hasattr(made, "set_experts_implementation"):
        made.set_experts_implementation("batched_mm")
    return cast(nn.Module, made)


def _like(x: torch.Tensor) -> torch.Tensor:
    value = 0.02 if x.is_floating_point() else 0
    return torch.full((), value, dtype=x.dtype, device="cpu").expand(x.shape)


def _level(tracer: _Tracer, model: nn.Module) -> None:
    """Takes the idle entries of a list to do what a busy one does: values chose among experts."""
    names = [name for name, _ in model.named_modules()]
    for path, group in model.named_modules():
        if isinstance(group, nn.ModuleList):
            entries = {_inside(path, child) for child, _ in group.named_children()}
            busy = min(entries & tracer.called, default=None)
            for idle in entries - tracer.called if busy else ():
                for name in names:
                    twin = f"{busy}{name.removeprefix(idle)}"
                    if within(idle, name) and twin in tracer.called:
                        tracer.called.add(name)
                        if twin in tracer.roles:
                            tracer.roles[name] = tracer.roles[twin]


def _spread(tracer: _Tracer, model: nn.Module) -> None:
    """Gives a module that has several names the same findings under each."""
    first = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        if first[id(module)] in tracer.called:
            tracer.called.add(name)
        if first[id(module)] in tracer.roles:
            tracer.roles[name] = tracer.roles[first[id(module)]]
        if first[id(module)] in tracer.streams.features:
            tracer.streams.features[name] = tracer.streams.features[first[id(module)]]


def takes(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a module's forward."""
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


def _examples(model: nn.Module) -> dict[str, torch.Tensor]:
    try:
        return example_inputs(model)
    except Exception:  # a config may hold anything
        return {}


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    matrix = isinstance(weight, torch.Tensor) and weight.ndim == 2
    return matrix and not isinstance(module, nn.Embedding)


def is_model(module: nn.Module) -> bool:
    """Whether it is a transformers model, whole or as a part of another."""
    return hasattr(module, "main_input_name") and hasattr(module, "config")


def _inside(name: str, child: str) -> str:
    return f"{name}.{child}" if name and child else name or child


def _moved_into(part: str, found: Sublayer) -> Sublayer:
    names = {key: getattr(found, key) for key in ("exit", "entry", "norm")}
    return found.model_copy(update={k: n and _inside(part, n) for k, n in names.items()})


def within(part: str, name: str) -> bool:
    """Whether a module is a part or lies within it, by their names."""
    return part in ("", name) or name.startswith(f"{part}.")


def _only(tags: Tags, kind: str) -> Tags:
    return frozenset(tag for tag in tags if tag[0] == kind)


def _moved(tags: Tags, old: str, new: str) -> Tags:
    """The tags with one kind made into another."""
    return frozenset((new if kind == old else kind, name) for kind, name in tags)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
