"""Where a model attends and where it numbers positions, found from its own forward pass.

A copy without memory runs once, with an attention function of our own that notes who calls it and
with which shapes. The position ids carry a tag through the operators, and the modules that take
them are noted too. No name of an architecture or of a module is looked at; what is found is what a
prefix has to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from peftc.roles import example_inputs, is_model, takes, twin, within

NAME = "peftc_probe"
IDS = ("decoder_input_ids", "input_ids")  # whose sequence a prefix goes before: the first there is
PAST = "past_key_values_length"  # by which some modules number positions themselves


@dataclass(frozen=True)
class Attention:
    """Self-attention over a model's text, through transformers' AttentionInterface.

    Attributes:
        modules: The names of the attention modules, in the order in which they run.
        heads: How many heads keys and values have; fewer than queries, where they are grouped.
        key_size: Features of a key per head.
        value_size: Features of a value per head.
        alike: Whether all of the modules have these shapes.
        positions: For each module that takes position ids, which argument that is: its name, or
            its number.
        numbered: Whether all that depends on absolute positions is among these.
        longest: How many positions there are; None where that is not limited.
        submodules: 2 of an encoder and a decoder, as PEFT counts.
    """

    modules: tuple[str, ...]
    heads: int
    key_size: int
    value_size: int
    alike: bool
    positions: Mapping[str, str | int]
    numbered: bool
    longest: int | None
    submodules: int

    @property
    def width(self) -> int:
        """Features of all heads' keys."""
        return self.heads * self.key_size


def find(model: nn.Module) -> Attention | None:
    """Finds a model's attention; the model itself is neither run nor changed.

    Args:
        model: A transformers model, on any device, the meta device too.

    Returns:
        None where the model cannot be run on tensors without data, or where none of its modules
        attends to the text through the AttentionInterface.
    """
    config = getattr(model, "config", None)
    try:
        with torch.no_grad(), FakeTensorMode() as mode:
            examples = {k: mode.from_tensor(x) for k, x in _examples(model).items()}
            copy = twin(model)
            for module in copy.modules():
                if hasattr(own := getattr(module, "config", None), "_attn_implementation"):
                    own._attn_implementation_internal = NAME  # type: ignore[union-attr]
            found = _Positions(copy, examples.get("position_ids"))
            with _listening() as heard, found:
                copy(**examples)
    except Exception:  # any model code may fail on made-up inputs
        return None
    names = {id(module): name for name, module in copy.named_modules()}
    calls = [call for call in heard if id(call.module) in names]
    ids = next((examples[name] for name in IDS if name in examples), None)
    own = {
        names[id(call.module)]: call
        for call in calls
        if ids is not None and call.query[2] == call.key[2] == ids.shape[1]
    }
    if not own:
        return None
    first = next(iter(own.values()))
    models = [name for name, part in copy.named_modules() if is_model(part)]
    owner = max((name for name in models if all(within(name, m) for m in own)), key=len, default="")
    attending = {names[id(call.module)] for call in calls}
    inside = {n for n in found.taken.keys() | found.hidden if any(within(a, n) for a in attending)}
    positions = {
        name: which
        for name, which in found.innermost().items()
        if within(owner, name)
        and name not in inside
        and not any(within(name, a) for a in attending)
    }
    hidden = {name for name in found.hidden - inside if within(owner, name)}
    parts = (config, getattr(config, "text_config", None))
    limits = [getattr(part, "max_position_embeddings", None) for part in parts]
    return Attention(
        modules=tuple(own),
        heads=first.key[1],
        key_size=first.key[3],
        value_size=first.value[3],
        alike=all((c.key, c.value) == (first.key, first.value) for c in own.values()),
        positions=positions,
        numbered=not hidden and ("position_ids" not in examples or bool(positions)),
        longest=next((limit for limit in limits if isinstance(limit, int)), None),
        submodules=2 if IDS[0] in examples else 1,
    )


def _examples(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tiny inputs; a decoder's text is shorter than the encoder's, by which the two are told."""
    examples = example_inputs(model)
    if IDS[0] in examples:
        examples[IDS[0]] = examples[IDS[0]][:, :-1]
    elif "input_ids" in examples and "position_ids" in takes(model):
        examples["position_ids"] = torch.arange(examples["input_ids"].shape[1])[None]
    return examples


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    query: torch.Size
    key: torch.Size
    value: torch.Size


_heard: ContextVar[list[_Call] | None] = ContextVar("heard", default=None)


@contextmanager
def _listening() -> Iterator[list[_Call]]:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _note)
    calls: list[_Call] = []
    token = _heard.set(calls)
    try:
        yield calls
    finally:
        _heard.reset(token)


def _note(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function that notes who called it, and returns zeros of the right shape."""
    if (heard := _heard.get()) is not None:
        heard.append(_Call(module, query.shape, key.shape, value.shape))
    batch, heads, length, _ = query.shape
    return value.new_zeros(batch, length, heads, value.shape[3]), None


@dataclass
class _Positions(TorchFunctionMode):
    """Follows position ids through a model that nobody else uses, to the modules that take them."""

    model: nn.Module
    given: torch.Tensor | None
    taken: dict[str, str | int] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self._inside: list[str] = []
        self._tagged: MutableMapping[torch.Tensor, bool] = WeakTensorKeyDictionary()
        if self.given is not None:
            self._tagged[self.given] = True
        for name, module in self.model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            module.register_forward_hook(self._leave)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        # Where there are no position ids to give, a model counts for itself.
        counts = name == "arange" and self.given is None
        if isinstance(out, torch.Tensor) and not (
            out.is_floating_point() or out.dtype == torch.bool
        ):
            # What is only looked up by position, such as token types, is none itself.
            if counts or (args and self._is(args[0])):
                self._tagged[out] = True
        elif name == "embedding" and args and self._is(args[0]):
            self.hidden.update({*self._inside[-1:]} - self.taken.keys())
        return out

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside.append(name)
        given = {**dict(enumerate(args)), **kwargs}
        if (which := next((k for k, x in given.items() if self._is(x)), None)) is not None:
            self.taken[name] = which
        elif isinstance(given.get(PAST), int):
            self.taken[name] = PAST
        elif PAST in (names := list(takes(module))) and names.index(PAST) in given:
            self.taken[name] = names.index(PAST)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._inside.pop()

    def _is(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value in self._tagged

    def innermost(self) -> dict[str, str | int]:
        """The modules that take positions and do not hand them on to others within them."""
        return {
            name: which
            for name, which in self.taken.items()
            if not any(other != name and within(name, other) for other in self.taken)
        }
