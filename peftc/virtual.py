"""Virtual tokens: a live model that puts ids beyond its vocabulary before its inputs by itself.

What these ids look up is the embedding's affair (see `peftc.passes.prompt_tuning`). Because they
are ids, nothing else has to know of them: no `inputs_embeds` on the way, so that caches, beams,
export and gradient checkpointing work as they do without. In `generate` they exist only between
`prepare_inputs_for_generation` and the model: logits processors, stopping criteria, lengths and
what is returned see the user's ids alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftc.errors import PassError

Positions = Literal["peft", "mask"]
IGNORED = -100  # the label of what has none
DONE = "virtual_tokens_are_there"  # tells forward, as prepare_inputs_for_generation does


@dataclass(frozen=True)
class Numbering:
    """Which position each token gets.

    Attributes:
        by_mask: Pads do not count, as in transformers' `generate`; else all do, as in PEFT.
        explicit: Whether forward is told, rather than left to number by itself.
        start: The first position.
        pads: The position of a pad that does not count.
    """

    by_mask: bool
    explicit: bool
    start: int = 0
    pads: int = 0

    @classmethod
    def of(cls, model: nn.Module, rule: Positions) -> Numbering:
        """A rule for a model.

        PEFT gives a model `inputs_embeds` and no positions. RoBERTa numbers these and ids in two
        ways, and OPT has but one: by the mask.
        """
        takes = "position_ids" in signature(model.forward).parameters
        module: Any
        for module in model.modules():
            if hasattr(module, "create_position_ids_from_inputs_embeds"):
                return cls(rule == "mask", takes, int(module.padding_idx) + 1)
            learned = isinstance(module, nn.Embedding)
            if learned and "attention_mask" in signature(module.forward).parameters:
                return cls(True, takes and rule == "mask", pads=0 if rule == "mask" else -1)
        return cls(rule == "mask", takes and rule == "mask")

    def positions(self, shape: tuple[int, int], mask: Tensor | None, device: Any) -> Tensor:
        """Positions of tokens (batch, length), int64, under a mask of that shape."""
        if self.by_mask and mask is not None:
            counted = mask.long().cumsum(-1) - 1
            return counted.masked_fill(mask == 0, self.pads) + self.start
        return torch.arange(shape[1], device=device).expand(shape) + self.start


@dataclass(frozen=True)
class VirtualTokens:
    """The ids first, first + 1, … that stand before every input.

    Attributes:
        first: The size of the vocabulary.
        count: How many there are.
        numbering: The positions of them and of what follows.
        longest: How many positions there are; None where they are not learned.
    """

    first: int
    count: int
    numbering: Numbering
    longest: int | None = None

    def before(self, ids: Tensor) -> Tensor:
        """Ids (batch, length) with the virtual ones before them.

        Raises:
            PassError: Together they are more than the model has positions.
        """
        if self.longest is not None and ids.shape[1] + self.count > self.longest:
            raise PassError(
                f"{ids.shape[1]} tokens and {self.count} virtual ones are more than "
                f"{self.longest} positions",
                where="input_ids",
                fix="shorten the text, or take fewer virtual tokens",
            )
        new = torch.arange(self.first, self.first + self.count, device=ids.device, dtype=ids.dtype)
        return torch.cat([new.expand(ids.shape[0], -1), ids], 1)

    def filled(self, rows: Tensor, value: int) -> Tensor:
        """A mask, labels or types (batch, length) with one value for every virtual token."""
        return torch.cat([rows.new_full((rows.shape[0], self.count), value), rows], 1)

    def shifted(self, positions: Tensor) -> Tensor:
        """Positions (…, length) of the caller's with those of the virtual tokens before them."""
        own = torch.arange(self.count, device=positions.device, dtype=positions.dtype)
        start = self.numbering.start
        own = own.expand(*positions.shape[:-1], -1) + start
        return torch.cat([own, positions + self.count], -1)

    def extend(self, inputs: Mapping[str, Any], encoder: bool) -> dict[str, Any]:
        """A forward's arguments with the virtual tokens in them.

        Args:
            inputs: By name. Where they bring a filled cache, it has the virtual tokens already.
            encoder: Whether the tokens go into an encoder, and masks and labels are a decoder's.

        Raises:
            PassError: There are no ids to put them before, or a mask of four dimensions.
        """
        given = {key: value for key, value in inputs.items() if value is not None}
        if encoder and "encoder_outputs" in given:
            return dict(inputs)
        if "input_ids" not in given or "inputs_embeds" in given:
            raise PassError(
                "a model with a prompt takes input_ids, and no inputs_embeds",
                where="forward",
                fix="pass the ids; their embeddings and the prompt's are looked up together",
            )
        ids, past = given["input_ids"], _length(given)
        new = dict(inputs) if past else {**inputs, "input_ids": self.before(ids)}
        mask = given.get("attention_mask")
        if mask is not None:
            new["attention_mask"] = mask = self.mask(mask)
        if (types := given.get("token_type_ids")) is not None and not past:
            new["token_type_ids"] = self.filled(types, 0)
        if encoder:
            return new
        labels = given.get("labels")
        if labels is not None and labels.shape == ids.shape and not labels.is_floating_point():
            new["labels"] = self.filled(labels, IGNORED)
        if (positions := given.get("position_ids")) is not None:
            new["position_ids"] = positions + self.count if past else self.shifted(positions)
        elif self.numbering.explicit:
            shape = ids.shape[0], past + new["input_ids"].shape[1]
            numbers = self.numbering.positions(shape, mask, ids.device)
            new["position_ids"] = numbers[:, past:]
        return new

    def mask(self, mask: Tensor) -> Tensor:
        """An attention mask (batch, length) that sees the virtual tokens.

        Raises:
            PassError: It is no such mask.
        """
        if mask.dim() != 2:
            raise PassError(
                f"a model with a prompt takes masks of (batch, length), not {list(mask.shape)}",
                where="attention_mask",
                fix="pass the mask of the tokenizer",
            )
        return self.filled(mask, 1)


def put_before(model: nn.Module, first: int, count: int, rule: Positions) -> None:
    """Makes a live model put virtual tokens before its inputs, in forward and in generate.

    Args:
        model: Its class becomes a subclass of its own; nothing else of it changes.
        first: The first virtual id.
        count: How many.
        rule: `peft` numbers all tokens, as PEFT leaves the model to do; `mask` only those that the
            attention mask sees, as transformers' `generate` does.
    """
    numbering = Numbering.of(model, rule)
    tokens = VirtualTokens(first, count, numbering, longest(model, numbering.start))
    cls: Any = type(model)
    model.__class__ = virtual_class(cls, tokens)


def take_back(model: nn.Module) -> None:
    """Makes a live model put no virtual tokens before its inputs any more."""
    if "virtual_tokens" in vars(type(model)):
        model.__class__ = type(model).__base__  # type: ignore[assignment]


def longest(model: nn.Module, start: int) -> int | None:
    """How many positions a model has learned vectors of, the first of which is at start."""
    config: Any = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    sizes = (table.num_embeddings - int(getattr(table, "offset", 0)) for table in tables)
    return next((size - start for size in sizes if size == limit), None)


@cache
def virtual_class(cls: Any, tokens: VirtualTokens) -> Any:
    """The subclass of a model's class that knows virtual tokens; it has the same name."""
    members: dict[str, Any] = {"forward": _forward(cls, tokens), "virtual_tokens": tokens}
    if hasattr(cls, "prepare_inputs_for_generation"):
        members |= _generation(cls, tokens)

    def reduce(self: Any) -> tuple[Any, ...]:
        return _rebuild, (cls, tokens), self.__dict__

    # transformers looks classes up by these names, and writes them into config.json.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**members, **names, "__reduce__": reduce})


def _forward(cls: Any, tokens: VirtualTokens) -> Callable[..., Any]:
    names = list(signature(cls.forward).parameters)[1:]

    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if not inputs.pop(DONE, False):
            if _encodes(self) and "decoder_input_ids" in names:
                _check_decoder(inputs)
            inputs = tokens.extend(inputs, _encodes(self))
        return cls.forward(self, **inputs)

    return forward


def _generation(cls: Any, tokens: VirtualTokens) -> dict[str, Callable[..., Any]]:
    """What `generate` calls of a model, so that only the model itself sees virtual tokens."""
    numbered = "position_ids" in signature(cls.forward).parameters

    @wraps(cls.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, **given: Any) -> Any:
        if _encodes(self):
            return cls.prepare_inputs_for_generation(self, input_ids, **given)
        if given.get("inputs_embeds") is not None:
            tokens.extend(given, False)  # which says that it takes none
        step, past = given.get("next_sequence_length"), _length(given)
        if step is not None or not past:  # else they are the new ones alone
            input_ids, past = tokens.before(input_ids), 0
        if step is not None and given.get("is_first_iteration"):
            given["next_sequence_length"] = step + tokens.count
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None:
            given["attention_mask"] = mask = tokens.mask(mask)
        if positions is not None:
            given["position_ids"] = tokens.shifted(positions)
        elif numbered:
            shape = input_ids.shape[0], past + input_ids.shape[1]
            given["position_ids"] = tokens.numbering.positions(shape, mask, input_ids.device)
        inputs = cls.prepare_inputs_for_generation(self, input_ids, **given)
        return {**inputs, DONE: True}

    def positions_of(self: Any, inputs: Tensor, given: dict[str, Any]) -> None:
        """None: they are counted at every step, from the mask as it is then."""

    def encode(self: Any, inputs: Tensor, given: dict[str, Any], *rest: Any) -> Any:
        if _encodes(self) and given.get("encoder_outputs") is None:
            if (mask := given.get("attention_mask")) is not None:
                given = {**given, "attention_mask": tokens.mask(mask)}
            inputs = tokens.before(inputs)
        return cls._maybe_prepare_encoder_kwargs_for_generation(self, inputs, given, *rest)

    def cache_of(
        self: Any, config: Any, given: dict[str, Any], mode: Any, batch: int, length: int
    ) -> Any:
        room = length if _encodes(self) else length + tokens.count
        return cls._prepare_cache_for_generation(self, config, given, mode, batch, room)

    return {
        "prepare_inputs_for_generation": prepare_inputs_for_generation,
        "_prepare_position_ids_for_generation": positions_of,
        "_maybe_prepare_encoder_kwargs_for_generation": encode,
        "_prepare_cache_for_generation": cache_of,
    }


def _encodes(model: Any) -> bool:
    """Whether the tokens go into an encoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _check_decoder(inputs: Mapping[str, Any]) -> None:
    """Keeps a model from making its decoder's ids of an encoder's, which hold virtual ones.

    Raises:
        PassError: It is left to do so.
    """
    given = (inputs.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    labels = inputs.get("labels")
    if all(x is None for x in given) and (labels is None or labels.dim() != 2):
        raise PassError(
            "a prompt before an encoder is none of the decoder's, which is given nothing",
            where="forward",
            fix="pass decoder_input_ids, or labels of (batch, length)",
        )


def _length(inputs: Mapping[str, Any]) -> int:
    """How many tokens the inputs' cache holds; of one without attention, whether it holds any."""
    past, state = inputs.get("past_key_values"), inputs.get("cache_params")
    if state is not None:
        return int(state.has_previous_state())
    return 0 if past is None else int(past.get_seq_length())


def _rebuild(cls: Any, tokens: VirtualTokens) -> nn.Module:
    made: type[nn.Module] = virtual_class(cls, tokens)
    return made.__new__(made)
