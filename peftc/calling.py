"""How a whole model is called on flat tensors: the inputs and outputs of each of its graphs.

A decoder takes its past keys and values and gives the present ones, so that one graph serves
prefill and decoding; an encoder-decoder is two graphs; whatever else is called on what its forward
takes. Names are those that optimum, onnxruntime-genai and transformers.js know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftc.errors import CaptureError

Tensors = dict[str, torch.Tensor]
# Sizes of examples: distinct, so that no two dimensions are taken for one, and none 1, which torch
# would take for a constant.
SIZES = {
    "batch": 2, "sequence": 3, "past": 5, "past + sequence": 8, "encoder_sequence": 7, "images": 4,
}  # fmt: skip
MASK, POSITIONS, ENCODED = "attention_mask", "position_ids", "encoder_hidden_states"
# What an attention module has before the keys and values of every text: (1, heads, tokens, size).
CONSTANT = ("constant_key", "constant_value")


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        name: As the runtime is given it.
        dims: Sizes; those that vary have names, which are the same wherever they must agree.
        dtype: Of its values.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: torch.dtype

    def example(self, sizes: Mapping[str, int] = SIZES) -> torch.Tensor:
        """Zeros of its shape."""
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in self.dims]
        return torch.zeros(shape, dtype=self.dtype)


@dataclass(frozen=True)
class Call:
    """One graph of a model.

    Attributes:
        name: Of the graph: `model`, or `encoder_model` and `decoder_model`.
        inputs: What it takes, in order.
        run: Calls the model on them; what it gives, in order.
        past: The part of the past's names between a layer's number and key or value.
    """

    name: str
    inputs: tuple[Port, ...]
    run: Callable[[Any, Tensors], Tensors]
    past: str | None = None


def cached(kind: str, layer: int, which: str, infix: str = "") -> str:
    """The name of a layer's keys or values: kind is `past_key_values` or `present`."""
    return f"{kind}.{layer}.{infix}{which}"


def calls(model: nn.Module) -> list[Call]:
    """How to call a transformers model, whose tensors may be fake.

    Raises:
        CaptureError: It is none that peftc knows how to call.
    """
    takes = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    if config is None:
        raise CaptureError(
            "is no model of transformers, so that nothing says what it takes",
            where=type(model).__name__,
            fix="export a checkpoint",
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        return [_encoder(model), _decoder(model)]
    generates = getattr(model, "can_generate", lambda: False)()
    if generates and "past_key_values" in takes and "input_ids" in takes:
        return [_causal(model)]
    inputs = tuple(_plain_inputs(model))
    if not inputs:
        raise CaptureError(
            f"takes {', '.join(takes)}, and peftc does not know what to give it",
            where=type(model).__name__,
            fix="say in an issue which model it is",
        )
    return [Call("model", inputs, _plain)]


def _plain_inputs(model: nn.Module) -> Iterator[Port]:
    takes, config = inspect.signature(model.forward).parameters, getattr(model, "config", None)
    text = ("batch", "sequence")
    for name in ("input_ids", MASK, "token_type_ids"):
        if name in takes and ("input_ids" in takes):
            yield Port(name, text, torch.int64)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if "pixel_values" in takes and size is not None:
        count = "images" if "input_ids" in takes else "batch"
        sides = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
        yield Port("pixel_values", (count, channels, *sides), dtype)
    if "input_features" in takes and hasattr(config, "num_mel_bins"):
        assert config is not None
        length = 2 * config.max_source_positions
        yield Port("input_features", ("batch", config.num_mel_bins, length), dtype)


def _plain(model: Any, given: Tensors) -> Tensors:
    more = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
    output = model(**given, **more, return_dict=True)
    return {name: x for name, x in output.items() if isinstance(x, torch.Tensor)}


def _causal(model: nn.Module) -> Call:
    if getattr(model, "_is_stateful", False):
        raise _stateful(model)
    takes = inspect.signature(model.forward).parameters
    inputs = [
        Port("input_ids", ("batch", "sequence"), torch.int64),
        Port(MASK, ("batch", "past + sequence"), torch.int64),
    ]
    if POSITIONS in takes:
        inputs.append(Port(POSITIONS, ("batch", "sequence"), torch.int64))

    def run(model: Any, given: Tensors) -> Tensors:
        from transformers import DynamicCache

        past, rest = _split(given)
        if constant := _constant(model):
            from peftc.constant_layer import constant_cache

            rest, cache = _behind(constant[0][0].shape[2], rest), constant_cache(constant, past)
        else:
            cache = DynamicCache(past) if past else DynamicCache()
        output = model(**rest, past_key_values=cache, use_cache=True)
        return {"logits": output[0], **_present(output.past_key_values)}

    past = _past_ports(model, run, inputs, "")
    return Call("model", (*inputs, *past), run, "")


def _constant(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The constant keys and values of a model's layers, if it has any."""
    key, value = CONSTANT
    own = (module._parameters for module in model.modules())
    return [(p[key], p[value]) for p in own if p.get(key) is not None]  # type: ignore[misc]


def _behind(tokens: int, given: Tensors) -> Tensors:
    """Inputs as they are behind so many more tokens, which all see."""
    mask = given[MASK]
    moved = {MASK: torch.cat([mask.new_ones(mask.shape[0], tokens), mask], 1)}
    if POSITIONS in given:
        moved[POSITIONS] = given[POSITIONS] + tokens
    return {**given, **moved}


def _encoder(model: Any) -> Call:
    encoder = model.get_encoder()
    return Call("encoder_model", tuple(_plain_inputs(encoder)), _encode)


def _encode(model: Any, given: Tensors) -> Tensors:
    return _plain(model.get_encoder(), given)


def _decoder(model: Any) -> Call:
    config = model.config
    encoder = list(_plain_inputs(model.get_encoder()))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    masked = any(port.name == MASK for port in encoder)
    length: int | str = "encoder_sequence" if masked else config.max_source_positions
    inputs = [
        Port("input_ids", ("batch", "sequence"), torch.int64),
        Port(ENCODED, ("batch", length, _width(config)), dtype),
    ]
    if masked:
        inputs.append(Port("encoder_attention_mask", ("batch", length), torch.int64))

    def run(model: Any, given: Tensors) -> Tensors:
        from transformers import DynamicCache, EncoderDecoderCache

        past, rest = _split(given)
        cache = DynamicCache(past) if past else DynamicCache()
        cross = EncoderDecoderCache(cache, DynamicCache())
        more = {"attention_mask": rest["encoder_attention_mask"]} if masked else {}
        output = model(
            encoder_outputs=(rest[ENCODED],),
            decoder_input_ids=rest["input_ids"],
            past_key_values=cross,
            use_cache=True,
            **more,
        )
        present = _present(output.past_key_values.self_attention_cache, "decoder.")
        return {"logits": output[0], **present}

    past = _past_ports(model, run, inputs, "decoder.")
    return Call("decoder_model", (*inputs, *past), run, "decoder.")


def _width(config: Any) -> int:
    return int(getattr(config, "d_model", None) or config.hidden_size)


def _split(given: Tensors) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Tensors]:
    """The past as pairs by layer, and what else is given."""
    past = [x for name, x in given.items() if name.startswith("past_key_values.")]
    rest = {name: x for name, x in given.items() if not name.startswith("past_key_values.")}
    return list(zip(past[::2], past[1::2], strict=True)), rest


def _present(cache: Any, infix: str = "") -> Tensors:
    return {
        cached("present", i, which, infix): tensor
        for i, layer in enumerate(cache.layers)
        for which, tensor in (("key", layer.keys), ("value", layer.values))
    }


def _past_ports(
    model: nn.Module, run: Callable[[Any, Tensors], Tensors], inputs: list[Port], infix: str
) -> list[Port]:
    """What a run without a past leaves in the cache, of which every layer has its own shape."""
    sizes = {**SIZES, "past + sequence": SIZES["sequence"]}
    with torch.no_grad():
        left = run(model, {port.name: port.example(sizes) for port in inputs})
    ports = []
    for name, x in left.items():
        if name.startswith("present."):
            if not isinstance(x, torch.Tensor) or x.dim() != 4:
                raise _stateful(model)
            dims = ("batch", x.shape[1], "past", x.shape[3])
            ports.append(Port(name.replace("present.", "past_key_values."), dims, x.dtype))
    return ports


def _stateful(model: nn.Module) -> CaptureError:
    return CaptureError(
        "its state is more than keys and values",
        where=type(model).__name__,
        fix="write it with --format safetensors",
    )
