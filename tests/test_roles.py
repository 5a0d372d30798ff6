"""Roles and calls that a model's own forward pass shows, per architecture."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from peftc.roles import Roles, example_inputs, trace

SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 97, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
IMAGES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
PAIR: dict[str, Any] = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "vocab_size": 97,
}  # fmt: skip
T5: dict[str, Any] = {
    "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4, "vocab_size": 97,
    "decoder_start_token_id": 0,
}  # fmt: skip
FALCON: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    **GROUPED, "head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 48, "intermediate_size": 80, "num_heads": 4, "out_hidden_size": 48,
    "patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}

LLAMA = {
    "query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj",
    "up": "gate_proj up_proj", "down": "down_proj",
}  # fmt: skip
MIXTURE = {**LLAMA, "up": "experts.gate_up_proj", "down": "experts.down_proj"}
FULLY_NAMED = {**LLAMA, "output": "out_proj", "up": "fc1", "down": "fc2"}
PACKED = {
    "query": "query_key_value", "key": "query_key_value", "value": "query_key_value",
    "output": "self_attention.dense", "up": "dense_h_to_4h", "down": "dense_4h_to_h",
}  # fmt: skip
BERT = {
    "query": "self.query", "key": "self.key", "value": "self.value",
    "output": "attention.output.dense", "up": "intermediate.dense transform.dense",
    "down": "layer.*.output.dense predictions.decoder",
}  # fmt: skip
# Each with its class's name before "Config", its configuration, and the suffixes of every role.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], dict[str, str]]] = {
    "llama": ("LlamaForCausalLM", "Llama", GROUPED, LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2", GROUPED, LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3", {**GROUPED, "head_dim": 12}, LLAMA),
    "gemma": ("GemmaForCausalLM", "Gemma", {**GROUPED, "head_dim": 12}, LLAMA),
    "phi3": (
        "Phi3ForCausalLM", "Phi3", {**GROUPED, "pad_token_id": 0},
        {"query": "qkv_proj", "key": "qkv_proj", "value": "qkv_proj", "output": "o_proj",
         "up": "gate_up_proj", "down": "down_proj"},
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2",
        {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 64},
        {"query": "c_attn", "key": "c_attn", "value": "c_attn", "output": "attn.c_proj",
         "up": "c_fc", "down": "mlp.c_proj"},
    ),
    "opt": (
        "OPTForCausalLM", "OPT",
        {**FALCON, "ffn_dim": 80, "max_position_embeddings": 64, "word_embed_proj_dim": 48},
        FULLY_NAMED,
    ),
    "bloom": (
        "BloomForCausalLM", "Bloom",
        {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 97}, PACKED,
    ),
    "falcon": ("FalconForCausalLM", "Falcon", FALCON, PACKED),
    "falcon with alibi": ("FalconForCausalLM", "Falcon", {**FALCON, "alibi": True}, PACKED),
    "bert": ("BertForMaskedLM", "Bert", SMALL, BERT),
    "roberta": (
        "RobertaForMaskedLM", "Roberta", SMALL,
        {**BERT, "up": "intermediate.dense lm_head.dense",
         "down": "layer.*.output.dense lm_head.decoder"},
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5", T5,
        {"query": "q", "key": "k", "value": "v", "output": "o", "up": "wi", "down": "wo"},
    ),
    "t5 with gates": (
        "T5ForConditionalGeneration", "T5", {**T5, "feed_forward_proj": "gated-gelu"},
        {"query": "q", "key": "k", "value": "v", "output": "o", "up": "wi_0 wi_1", "down": "wo"},
    ),
    "bart": (
        "BartForConditionalGeneration", "Bart", {**PAIR, "max_position_embeddings": 64},
        FULLY_NAMED,
    ),
    "vit": (
        "ViTForImageClassification", "ViT", IMAGES, {**LLAMA, "up": "fc1", "down": "fc2"},
    ),
    "clip": (
        "CLIPModel", "CLIP", {"text_config": SMALL, "vision_config": IMAGES}, FULLY_NAMED,
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "Whisper",
        {**PAIR, "max_source_positions": 20, "max_target_positions": 20, "num_mel_bins": 8,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        FULLY_NAMED,
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VL",
        {"text_config": {**GROUPED, "rope_parameters": ROPE}, "vision_config": VISION},
        {"query": "q_proj attn.qkv", "key": "k_proj attn.qkv", "value": "v_proj attn.qkv",
         "output": "o_proj attn.proj", "up": "gate_proj up_proj merger.mlp.0",
         "down": "down_proj merger.mlp.2"},
    ),
    "mixtral": ("MixtralForCausalLM", "Mixtral", {**GROUPED, "num_local_experts": 4}, MIXTURE),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3Moe", EXPERTS, MIXTURE),
    "mamba": (
        "MambaForCausalLM", "Mamba",
        {"hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 97, "state_size": 8},
        {"up": "in_proj", "down": "out_proj"},
    ),
}  # fmt: skip
Build = Callable[[str], nn.Module]


@pytest.fixture
def build() -> Build:
    """Builds an architecture on the meta device."""

    def made(name: str, device: str = "meta") -> nn.Module:
        cls, config, options, _ = ARCHITECTURES[name]
        with torch.device(device):
            model: nn.Module = getattr(transformers, cls)(
                getattr(transformers, f"{config}Config")(**options)
            )
        return model

    return made


class Block(nn.Module):
    """An attention of torch's own, a feed-forward, and a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide = nn.Linear(8, 16)
        self.narrow = nn.Linear(16, 8)
        self.idle = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x)[0]
        x = x + self.narrow(torch.relu(self.wide(x)))
        return x


class Mixture(nn.Module):
    """Experts in a list, of which the input's values choose."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(3)
        )
        self.idle = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for expert in choice.unique().tolist():
            out[choice == expert] = self.experts[expert](x[choice == expert])
        return out


class Broken(nn.Module):
    """Whatever it is given, it fails."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError


def found(model: nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> Roles:
    """The roles of a model that has some."""
    roles = trace(model, inputs)
    assert roles is not None
    return roles


def idle_maps(model: nn.Module, roles: Roles) -> set[str]:
    """The linear maps that were never called, each named as in a block."""
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if name not in roles.called and getattr(module, "weight", None) is not None
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_roles_are_those_of_the_architecture(name: str, build: Build) -> None:
    model, expected = build(name), ARCHITECTURES[name][3]
    roles = found(model)
    names = [name for name, _ in model.named_modules()] + [
        name for name, _ in model.named_parameters()
    ]
    for role in ("query", "key", "value", "output", "up", "down"):
        ends = [re.escape(end).replace(r"\*", r"\d+") for end in expected.get(role, "").split()]
        wanted = {name for name in names for end in ends if re.fullmatch(rf"(.*\.)?{end}", name)}
        assert {name for name, which in roles.roles.items() if role in which} == wanted, role
    assert not roles.unknown


@pytest.mark.parametrize(
    ("name", "idle"),
    [
        ("llama", set()),
        ("gpt2", set()),
        ("qwen2.5-vl", set()),
        ("mixtral", set()),
        ("bart", {"shared"}),  # its encoder and decoder have embeddings of their own, tied to it
        ("mamba", {"dt_proj", "conv1d"}),  # whose weights are read
    ],
)
def test_calls_leave_out_modules_of_which_only_the_weight_is_read(
    name: str, idle: set[str], build: Build
) -> None:
    model = build(name)
    assert idle_maps(model, found(model)) == idle


def test_calls_leave_out_what_a_plain_module_does_not_call() -> None:
    model = Block()
    roles = found(model, {"x": torch.randn(2, 3, 8)})
    assert idle_maps(model, roles) == {"out_proj", "idle"}
    assert roles.roles == {"wide": {"up"}, "narrow": {"down"}}


def test_calls_include_every_expert_when_values_choose_among_them() -> None:
    model = Mixture()
    roles = found(model, {"x": torch.randn(5, 4)})
    assert idle_maps(model, roles) == {"idle"}
    assert {name for name, which in roles.roles.items() if "down" in which} == {
        f"experts.{expert}.2" for expert in range(3)
    }


def test_parts_are_unknown_when_they_take_what_no_example_has() -> None:
    config = transformers.LlavaConfig(
        text_config={**GROUPED, "model_type": "llama"},
        vision_config={**IMAGES, "model_type": "clip_vision_model"},
        image_token_id=96,
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    roles = found(model)
    assert {name.split(".")[1] for name in roles.unknown} == {"multi_modal_projector"}
    assert "model.vision_tower" in roles.called


@pytest.mark.parametrize("inputs", [None, {}, {"x": torch.ones(1, 4)}])
def test_trace_is_none_when_the_forward_fails(inputs: dict[str, torch.Tensor] | None) -> None:
    assert trace(Broken(), inputs) is None


def test_trace_leaves_a_live_model_as_it_was(build: Callable[..., nn.Module]) -> None:
    model = build("llama", "cpu").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = str(model.config)
    assert found(model) == found(build("llama"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and str(model.config) == config
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_roles_are_the_same_when_attention_is_eager(build: Build) -> None:
    model: Any = build("llama")
    fused = found(model)
    model.set_attn_implementation("eager")
    assert found(model) == fused


def test_roles_survive_json(build: Build) -> None:
    roles = found(build("gpt2"))
    assert Roles.model_validate_json(roles.model_dump_json()) == roles


def test_example_inputs_are_none_for_a_module_without_a_config() -> None:
    assert example_inputs(Block()) == {}
