"""Prefixes on the live model: keys and values of virtual positions before the sequence's own.

Each attention module holds a reference to the prefix, and an attention function registered with
transformers puts it before the keys and values that the module made or took from its cache. So the
cache never sees it: dynamic and static caches, beams and gradient checkpointing work as they are.
What numbers positions is told to start behind the prefix. Importing this module registers the
functions, so that a pickled model finds them.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftc.attention import Attention
from peftc.errors import PassError
from peftc.live import place

MARK = "peftc_prefix_"  # before the name of an attention implementation that puts a prefix first
PERCEPTRON = (
    "embedding.weight", "transform.0.weight", "transform.0.bias",
    "transform.2.weight", "transform.2.bias",
)  # fmt: skip
Attended = tuple[torch.Tensor, torch.Tensor | None]  # the result, and the weights if there are any
SERVED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


class Prefix(nn.Module):
    """Keys and values of n virtual positions in every layer.

    Its tensors are `prompt_embeddings` (n, layers · 2 · heads · size), as PEFT stores it; or the
    start (n, heads · size) and the two layers of a perceptron that makes it.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        for name, tensor in tensors.items():
            place(self, name, nn.Parameter(tensor))

    @property
    def length(self) -> int:
        """How many virtual positions there are."""
        return int(next(self.parameters()).shape[0])

    def forward(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each (heads, n, size); nothing is made for the others."""
        width = 2 * self.heads * self.size
        mine = slice(layer * width, (layer + 1) * width)
        if "prompt_embeddings" in self._parameters:
            rows = self.get_parameter("prompt_embeddings")[:, mine]
        else:
            start, w, b, wide, bias = map(self.get_parameter, PERCEPTRON)
            rows = linear(linear(start, w, b).tanh(), wide[mine], bias[mine])
        both = rows.view(self.length, 2, self.heads, self.size).permute(1, 2, 0, 3)
        return both[0], both[1]


@dataclass(frozen=True)
class Slot:
    """What an attention module holds: its layer of the prefix, which is no submodule of it."""

    prefix: Prefix
    layer: int


@dataclass(frozen=True)
class Shift:
    """A hook by which a module numbers positions from behind the prefix."""

    by: int
    argument: str | int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.argument, int):
            moved = self.moved(module, args[self.argument])
            return (*args[: self.argument], moved, *args[self.argument + 1 :]), kwargs
        return args, {**kwargs, self.argument: self.moved(module, kwargs[self.argument])}

    def moved(self, module: nn.Module, positions: torch.Tensor | int) -> torch.Tensor | int:
        """Positions behind the prefix; a negative one is padding's, and stays.

        A module may be given but how many tokens came before, as M2M100's is.
        """
        if isinstance(positions, int):
            return positions + self.by
        if isinstance(module, nn.Embedding):
            size = module.num_embeddings - int(getattr(module, "offset", 0))
            if (length := positions.shape[-1]) + self.by > size:
                raise PassError(
                    f"{length} tokens and {self.by} virtual ones are more than {size} positions",
                    where=type(module).__name__,
                    fix="shorten the text, or take fewer virtual tokens",
                )
        return torch.where(positions < 0, positions, positions + self.by)


def install(
    model: nn.Module, attention: Attention, adapter: str, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Gives a live model a prefix, which it keeps as `prompt_encoder.ADAPTER`.

    Args:
        model: It is changed.
        attention: Where it attends.
        adapter: The adapter's name.
        tensors: Of the prefix, by their names in it.

    Raises:
        PassError: The model's attention implementation cannot take a prefix.
    """
    path = f"prompt_encoder.{adapter}"
    names = {name for name, _ in model.named_modules()}
    prefix: Any = model.get_submodule(path) if path in names else None
    if prefix is None:
        prefix = Prefix(tensors, attention.heads, attention.key_size)
        place(model, path, prefix)
    modules = [model.get_submodule(name) for name in attention.modules]
    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    for config in configs.values():
        config._attn_implementation_internal = served(config._attn_implementation)
    for number, module in enumerate(modules):
        # PEFT counts two submodules of an encoder-decoder: layer 1 has the columns of layer 2 of a
        # decoder alone, and behind half of the layers it begins anew.
        layer = number * attention.submodules % len(modules)
        module.peftc_prefix = Slot(prefix, layer)  # type: ignore[assignment]
        module.register_forward_pre_hook(_guard)
        if hasattr(module, "compute_bias"):
            shifted: Any = partial(_shifted_bias, module, prefix.length)
            module.compute_bias = shifted
    for name, argument in attention.positions.items():
        shift = Shift(prefix.length, argument)
        model.get_submodule(name).register_forward_pre_hook(shift, with_kwargs=True)


def remove(model: nn.Module, attention: Attention) -> None:
    """Takes the prefix away from where a live model attends; it stays among the parameters."""
    modules: list[Any] = [model.get_submodule(name) for name in attention.modules]
    for config in {id(module.config): module.config for module in modules}.values():
        name = config._attn_implementation.removeprefix(MARK)
        config._attn_implementation_internal = name
    for module in (*modules, *(model.get_submodule(name) for name in attention.positions)):
        module.__dict__.pop("peftc_prefix", None)
        module.__dict__.pop("compute_bias", None)
        hooks = module._forward_pre_hooks
        for number in [n for n, hook in hooks.items() if hook is _guard or isinstance(hook, Shift)]:
            del hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)


def keys_and_values(model: nn.Module) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """A live model's prefix, for each layer (1, heads, n, size) twice; nothing if it has none."""
    found = (getattr(module, "peftc_prefix", None) for module in model.modules())
    slots = sorted((slot for slot in found if isinstance(slot, Slot)), key=lambda slot: slot.layer)
    pairs = (slot.prefix(slot.layer) for slot in slots)
    return tuple((keys[None], values[None]) for keys, values in pairs)


def served(implementation: str) -> str:
    """The name of an attention implementation with a prefix.

    Raises:
        PassError: It cannot take one.
    """
    if implementation.startswith(MARK):
        return implementation
    if implementation not in SERVED:
        raise PassError(
            f"the attention implementation {implementation!r} cannot take a prefix",
            where="attn_implementation",
            fix=f"load the model with one that can: {', '.join(SERVED)}",
        )
    return MARK + implementation


def _guard(module: Any, args: Any) -> None:
    """Keeps a prefix from being ignored by an implementation that was set later."""
    name = module.config._attn_implementation
    if not name.startswith(MARK):
        raise PassError(
            f"the attention implementation {name!r} would ignore the prefix",
            where="set_attn_implementation",
            fix=f"set one of {', '.join(MARK + served for served in SERVED)}",
        )


def _shifted_bias(
    module: Any, n: int, query_length: int, key_length: int, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Relative position bias (1, heads, queries, n + keys), as of a sequence with n more before."""
    cls, past = type(module), kwargs.pop("past_seen_tokens", 0)
    bias: torch.Tensor = cls.compute_bias(
        module, query_length, key_length + n, *args, past_seen_tokens=past + n, **kwargs
    )
    return bias


def shifts_bias(cls: type[nn.Module]) -> bool:
    """Whether a class of attention has no relative bias, or one that can be told of a prefix."""
    bias = getattr(cls, "compute_bias", None)
    return bias is None or "past_seen_tokens" in inspect.signature(bias).parameters


def _attend(
    name: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> Attended:
    """An attention function of transformers, with the module's prefix before keys and values.

    Args:
        name: Of the implementation.
        module: The attention module; one without a prefix attends as ever.
        query: (batch, heads, queries, size).
        key: (batch, key heads, keys, size), those from the cache too.
        value: Likewise.
        attention_mask: Over the keys: (batch, 1, queries, keys) or, for flash attention,
            (batch, keys); None where nothing is masked, or nothing but the future.
        options: What the implementation takes.
    """
    inner: Callable[..., Attended] = _inner(name, module)
    slot: Slot | None = getattr(module, "peftc_prefix", None)
    if slot is None:
        return inner(module, query, key, value, attention_mask, **options)
    keys, values = slot.prefix(slot.layer)
    n, length = keys.shape[1], query.shape[2]
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if name.startswith("flash") and options.get("sliding_window") is not None:
        raise PassError(
            f"{name} with a sliding window would let the prefix slide out of it",
            where=type(module).__name__,
            fix="load the model with the attention implementation sdpa or eager",
        )
    if attention_mask is not None:
        seen = 0.0 if attention_mask.is_floating_point() else 1
        attention_mask = pad(attention_mask, (n, 0), value=seen)
    elif name == "sdpa" and causal and length > 1:
        # Without a mask queries and keys begin together; behind them a static cache is empty.
        key, value = key[:, :, :length], value[:, :, :length]
        every = torch.ones(length, n + length, dtype=torch.bool, device=query.device)
        attention_mask = every.tril(n)[None, None]
    key, value = (
        torch.cat([first.to(rest.dtype).expand(rest.shape[0], -1, -1, -1), rest], 2)
        for first, rest in ((keys, key), (values, value))
    )
    if options.get("position_bias") is not None:
        options["position_bias"] = options["position_bias"][..., : key.shape[2]]
    shown = _As(module, name) if name.startswith("flash") else module
    return inner(shown, query, key, value, attention_mask, **options)


class _As:
    """A module as flash attention sees it: it looks up its kernel by the config's name for it."""

    def __init__(self, module: Any, implementation: str) -> None:
        self._module = module
        self.config = copy.copy(module.config)
        self.config._attn_implementation_internal = implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _inner(name: str, module: nn.Module) -> Callable[..., Any]:
    """The function itself; each of transformers' models has an eager one of its own."""
    if name == "eager":
        function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return function
    return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]


for _name in SERVED:
    AttentionInterface.register(MARK + _name, partial(_attend, _name))
    AttentionMaskInterface.register(MARK + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
