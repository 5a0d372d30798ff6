"""Conversions: the parts that arrange() finds, put together, are what transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    GroupWeightRename,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from peftc.conversion import (
    Arrangement,
    Conversion,
    Place,
    arrange,
    conversion_of,
    conversions_of,
)

TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 31, "max_position_embeddings": 32, "head_dim": 8,
}  # fmt: skip
MOE: dict[str, Any] = {
    **TEXT, "num_experts": 12, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
QWEN_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "out_hidden_size": 16,
    "patch_size": 4,
}  # fmt: skip
T5: dict[str, Any] = {
    "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 31,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
# Each with its class, what its configuration is made of, and whether it has fused tensors.
MODELS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 12}, True),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", MOE, True),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE, True),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
        {"text_config": {**MOE, "rope_parameters": ROPE}, "vision_config": QWEN_VISION}, False,
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"text_config": {**TEXT, "rope_parameters": ROPE}, "vision_config": QWEN_VISION}, False,
    ),
    "llava": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
        False,
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, False),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT, False),
}  # fmt: skip


def make(name: str) -> Any:
    cls, config, options, _ = MODELS[name]
    torch.manual_seed(1)
    model = getattr(transformers, cls)(getattr(transformers, config)(**options))
    for parameter in model.parameters():  # so that no two are equal by chance
        torch.nn.init.normal_(parameter)
    return model


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def arranged(tensors: dict[str, torch.Tensor], model: Any) -> Arrangement:
    # Through JSON, in which they are cached.
    conversions = [
        Conversion.model_validate_json(conversion.model_dump_json())
        for conversion in conversions_of(model)
    ]
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return arrange(shapes_of(tensors), conversions, shapes_of(model.state_dict()), prefix)


def rebuilt(tensors: dict[str, torch.Tensor], found: Arrangement) -> dict[str, torch.Tensor]:
    live = {name: tensors[key] for key, name in found.stored.items() if key not in found.places}
    for name, matrices in found.fused.items():
        made = [torch.cat([tensors[key] for key in keys]) for keys in matrices]
        stacked = found.places[matrices[0][0]].index is not None
        live[name] = torch.stack(made) if stacked else made[0]
    return live


def check(tensors: dict[str, torch.Tensor], model: Any) -> Arrangement:
    """All keys are placed, and what is made of them is the model."""
    found, state = arranged(tensors, model), model.state_dict()
    assert found.stored.keys() == tensors.keys() and not found.unread
    live = rebuilt(tensors, found)
    tied = getattr(model, "all_tied_weights_keys", {})
    assert state.keys() - live.keys() <= tied.keys() | set(tied.values())
    assert all(torch.equal(tensor, state[name]) for name, tensor in live.items())
    for key, place in found.places.items():
        tensor = state[place.fqn] if place.index is None else state[place.fqn][place.index]
        assert torch.equal(tensor[place.low : place.high], tensors[key])
        assert found.stored[key] == place.fqn
    return found


def saved(model: Any, path: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(path)
    tensors: dict[str, torch.Tensor] = load_file(path / "model.safetensors")
    return tensors


@pytest.mark.parametrize("name", MODELS)
def test_saved_checkpoint_is_the_model(name: str, tmp_path: Path) -> None:
    model = make(name)
    tensors = saved(model, tmp_path)
    assert bool(check(tensors, model).fused) == MODELS[name][3]
    assert (tensors.keys() <= model.state_dict().keys()) == (name in {"qwen3_vl_moe", "t5", "bert"})


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_checkpoint_is_the_model(name: str) -> None:
    model = make(name)
    found = check(model.state_dict(), model)
    assert not found.fused and all(key == fqn for key, fqn in found.stored.items())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "bert"])
def test_headless_checkpoint_is_the_base_of_the_model(name: str, tmp_path: Path) -> None:
    base = make(name).base_model
    base.save_pretrained(tmp_path)
    model = getattr(transformers, MODELS[name][0]).from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    found = arranged(tensors, model)
    state = model.state_dict()
    live = rebuilt(tensors, found)
    assert live and live.keys() == {f"{model.base_model_prefix}.{k}" for k in base.state_dict()}
    assert all(torch.equal(tensor, state[key]) for key, tensor in live.items())


def test_checkpoint_with_a_head_is_the_base_model(tmp_path: Path) -> None:
    model = make("mixtral")
    found = arranged(saved(model, tmp_path), model.model)
    assert set(found.stored.values()) == {*model.model.state_dict(), "lm_head.weight"}


def test_legacy_names_are_renamed() -> None:
    model = make("bert")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        tail = next((tail for tail in old if name.endswith(tail)), "")
        tensors[name.removesuffix(tail) + old.get(tail, "")] = tensor
    assert "bert.embeddings.LayerNorm.gamma" in tensors
    check(tensors, model)


def test_expert_is_behind_the_one_with_the_number_before(tmp_path: Path) -> None:
    model = make("mixtral")
    found = arranged(saved(model, tmp_path), model)
    key = "model.layers.1.block_sparse_moe.experts.10.w3.weight"
    assert found.places[key] == Place("model.layers.1.mlp.experts.gate_up_proj", 10, 24, 48)
    assert found.fused["model.layers.1.mlp.experts.gate_up_proj"][10] == [
        key.replace("w3", "w1"),
        key,
    ]


@pytest.mark.parametrize("damage", ["missing", "narrow", "scalar", "short"])
def test_parts_are_unread_when_they_are_not_whole(damage: str, tmp_path: Path) -> None:
    model = make("mixtral")
    tensors = saved(model, tmp_path)
    stem = "model.layers.0.block_sparse_moe.experts.3."
    part = tensors.pop(f"{stem}w1.weight")
    made = {"narrow": part[:, :3], "scalar": part[0, 0], "short": part[:3]}
    tensors |= {f"{stem}w1.weight": made[damage]} if damage in made else {}
    found = arranged(tensors, model)
    fqn = "model.layers.0.mlp.experts.gate_up_proj"
    assert set(found.unread.values()) == {fqn} and len(found.unread) == 24 - (damage == "missing")
    assert fqn not in found.fused and fqn not in found.stored.values()
    assert found.stored[f"{stem}w3.weight"] == f"{stem}w3.weight"
    assert "model.layers.1.mlp.experts.gate_up_proj" in found.fused


def test_key_of_nothing_is_its_own(tmp_path: Path) -> None:
    model = make("mixtral")
    extra = {"model.layers.9.block_sparse_moe.gate.weight": torch.ones(1), "foo": torch.ones(2)}
    found = arranged({**saved(model, tmp_path), **extra}, model)
    assert {key: found.stored[key] for key in extra} == {key: key for key in extra}
    assert not found.unread


def test_first_of_two_names_is_read_as_by_transformers(tmp_path: Path) -> None:
    model = make("bert")
    tensors = saved(model, tmp_path)
    old, new = (f"bert.embeddings.LayerNorm.{name}" for name in ("gamma", "weight"))
    tensors[old] = torch.full_like(tensors[new], 7)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.state_dict()[new], tensors[old])
    found = arranged(tensors, model)
    assert found.stored[old] == new and found.unread == {new: new}


def test_transposed_tensors_are_unread() -> None:
    conversion = conversion_of(WeightConverter("a.weight", "a.weight", [Transpose(0, 1)]))
    found = arrange({"a.weight": (2, 2)}, [conversion], {"a.weight": (2, 2)}, "")
    assert found.stored == found.unread == {"a.weight": "a.weight"}


def test_experts_are_unread_when_they_have_to_be_transposed() -> None:
    model = make("qwen3_vl_moe")
    stored = {
        name: tensor.mT if "experts" in name else tensor
        for name, tensor in model.state_dict().items()
    }
    found = arranged(stored, model)
    assert set(found.unread) == {name for name in stored if "mlp.experts." in name}


@pytest.mark.parametrize("first", [True, False])
def test_group_is_renamed_when_its_first_is_there(first: bool) -> None:
    group = GroupWeightRename([r"(\d+).norm0", r"(\d+).norm1"], [r"\1.norm1", r"\1.norm2"])
    names = ["1.norm0", "1.norm1"] if first else ["1.norm1", "1.norm2"]
    live = {"1.norm1": (2,), "1.norm2": (2,)}
    found = arrange(dict.fromkeys(names, (2,)), [conversion_of(group)], live, "")
    assert list(found.stored.values()) == list(live)


def test_rows_are_concatenated_in_the_order_of_the_sources() -> None:
    conversion = conversion_of(WeightConverter(["a.q", "a.k"], "a.qk", [Concatenate(0)]))
    found = arrange({"a.k": (1, 3), "a.q": (2, 3)}, [conversion], {"a.qk": (3, 3)}, "")
    assert found.fused == {"a.qk": [["a.q", "a.k"]]}
    assert found.places == {"a.q": Place("a.qk", None, 0, 2), "a.k": Place("a.qk", None, 2, 3)}


def test_renaming_is_that_of_transformers() -> None:
    registered = conversion_mapping._build_checkpoint_conversion_mapping()
    for kind, transforms in registered.items():
        for scope in (None, "sub"):
            for transform in transforms:
                transform.scope_prefix, transform.base_model_prefix = scope, "base"
                conversion = conversion_of(transform)
                renaming = isinstance(transform, WeightRenaming)
                for stem in transform._original_source_patterns:
                    plain = stem.replace("*", "3").replace(r"(\d+)", "7").replace("\\", "")
                    for key in (plain, f"layers.1.{plain}.weight", f"base.sub.{plain.strip('^')}"):
                        lists = ([transform], []) if renaming else ([], [transform])
                        if type(transform).__name__.startswith("Inkling2Index"):
                            continue
                        renamed = conversion.rename(key)
                        theirs = rename_source_key(key, *lists)[0]
                        assert (renamed[0] if renamed else key) == theirs, (kind, key)
