"""Where models of many architectures attend and number positions, and that a prefix fits there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from peftc import Pipeline, capture, materialize
from peftc.attention import Attention, find
from peftc.passes.prefix_tuning import PrefixTuning

from . import zoo
from .conftest import distance
from .families.specimen import IDS

# The first attention module, the heads of its keys, and what takes the positions.
FOUND: dict[str, tuple[str, int, set[str]]] = {
    "llama": ("model.layers.0.self_attn", 2, {"model.rotary_emb"}),
    "qwen3": ("model.layers.0.self_attn", 2, {"model.rotary_emb"}),
    "gemma": ("model.layers.0.self_attn", 2, {"model.rotary_emb"}),
    "phi3": ("model.layers.0.self_attn", 2, {"model.rotary_emb"}),
    "gpt2": ("transformer.h.0.attn", 4, {"transformer.wpe"}),
    "opt": ("model.decoder.layers.0.self_attn", 4, {"model.decoder.embed_positions"}),
    "mixtral": ("model.layers.0.self_attn", 2, {"model.rotary_emb"}),
    "qwen3_moe": ("model.layers.0.self_attn", 2, {"model.rotary_emb"}),
    "bert": ("bert.encoder.layer.0.attention.self", 4, {"bert.embeddings.position_embeddings"}),
    "roberta": (
        "roberta.encoder.layer.0.attention.self", 4, {"roberta.embeddings.position_embeddings"},
    ),
    "t5": ("decoder.block.0.layer.0.SelfAttention", 4, set()),
    "bart": ("model.decoder.layers.0.self_attn", 4, {"model.decoder.embed_positions"}),
    "whisper": ("model.decoder.layers.0.self_attn", 4, {"model.decoder.embed_positions"}),
    "clip": (
        "text_model.encoder.layers.0.self_attn", 4, {"text_model.embeddings.position_embedding"},
    ),
    "qwen2_5_vl": (
        "model.language_model.layers.0.self_attn", 2, {"model.language_model.rotary_emb"},
    ),
}  # fmt: skip
DECODERS = ["llama", "qwen3", "gemma", "phi3", "gpt2", "opt", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("name", FOUND)
def test_attention_is_found_by_running_the_model(name: str) -> None:
    module, heads, positions = FOUND[name]
    found = find(zoo.SPECIMENS[name].build())
    assert found == Attention(
        modules=(module, module.replace(".0.", ".1.", 1)),
        heads=heads,
        key_size=8,
        value_size=8,
        alike=True,
        positions=found.positions if found else {},
        numbered=True,
        longest=None if name in ("t5", "whisper") else 32,
        submodules=2 if name in ("t5", "bart", "whisper") else 1,
    )
    assert found.positions.keys() == positions


@pytest.mark.parametrize("name", ["bloom", "falcon", "vit", "mamba", "plain"])
def test_nothing_is_found_when_no_text_is_attended_to_by_the_interface(name: str) -> None:
    assert find(zoo.SPECIMENS[name].build()) is None


def test_finding_leaves_the_model_alone() -> None:
    model = zoo.SPECIMENS["llama"].build()
    before = model.config._attn_implementation
    find(model)
    assert model.config._attn_implementation == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", FOUND)
def test_prefix_is_seen_by_every_layer(name: str) -> None:
    specimen = zoo.SPECIMENS[name]
    plain = specimen.build()
    live: Any = materialize(Pipeline([PrefixTuning(virtual_tokens=3)]).run(capture(plain)))
    inputs = specimen.inputs()
    out: Any = specimen.output(live(**inputs))
    with torch.no_grad():
        assert distance(out, specimen.output(plain(**inputs))) > 1e-3
    out.square().sum().backward()
    table = live.get_parameter("prompt_encoder.default.prompt_embeddings").grad
    layers = table.view(3, 2, -1).abs().amax((0, 2))
    idle = name in ("t5", "bart", "whisper")  # whose two layers share columns, as PEFT has them
    assert (layers > 0).tolist() == [True, not idle]


@pytest.mark.parametrize("name", DECODERS)
def test_prefix_equals_a_cache_that_holds_it(name: str) -> None:
    plain = zoo.SPECIMENS[name].build()
    live: Any = materialize(Pipeline([PrefixTuning(virtual_tokens=3)]).run(capture(plain)))
    prefix, ids = live.prompt_encoder.default, torch.tensor(IDS)
    layers = [tuple(x.repeat(2, 1, 1, 1) for x in prefix(layer)) for layer in range(2)]
    with torch.no_grad():
        want = plain(input_ids=ids, past_key_values=DynamicCache(layers)).logits
        assert distance(live(input_ids=ids).logits, want) < 1e-6
