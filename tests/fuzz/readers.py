"""What reads strangers' files: each reader takes the bytes of one file, the others being sound."""

from __future__ import annotations

import functools
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import nn

from peftc import Attach, Pipeline, Program, capture
from peftc.adapter import AdapterDirectory
from peftc.artifact import Artifact
from peftc.checkpoint import Checkpoint
from peftc.errors import raise_all
from peftc.recipe import Recipe
from peftc.safetensors_file import read_header
from peftc.terminal import Terminal
from tests.fuzz.reader import Reader, as_bytes, safetensors, tensor, zeros
from tests.fuzz.running_readers import running_readers

TWO = safetensors(
    {"a.weight": tensor("F32", [2, 3], 0, 24), "b.weight": tensor("BF16", [4], 24, 32)}, 32,
    __metadata__={"format": "pt"},
)  # fmt: skip
ONE = safetensors({"b.weight": tensor("U8", [0, 5], 0, 0), "c": tensor("I64", [], 0, 8)}, 8)
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
RICH = {
    **LORA, "target_modules": "^.*(q|v)_proj$", "rank_pattern": {"q_proj": 2}, "use_rslora": False,
    "alpha_pattern": {"^v_proj": 8}, "lora_dropout": 0.1, "bias": "none", "init_lora_weights": True,
    "layers_to_transform": None, "exclude_modules": ["x"], "use_dora": False,
    "fan_in_fan_out": False, "modules_to_save": None, "base_model_name_or_path": "x",
    "task_type": None, "inference_mode": True,
}  # fmt: skip
HUB = {"version": "1.0", "model_class": "BertAdapterModel", "config": {"architecture": None}}
INDEX = {"metadata": {"total_size": 32}, "weight_map": {"a.weight": "x.safetensors"}}
EMPTY = {"size": 2, "blake3": blake3(b"{}").hexdigest()}
MANIFEST = {
    "peftc": 1, "kind": "model", "source": {"path": "/base"}, "adapters": {}, "inputs": {},
    "journal": [{"title": "lora", "options": {"rank": 2}, "effect": "identity"}],
    "files": {"config.json": EMPTY, "a/b.json": EMPTY},
}  # fmt: skip
RECIPE = b"""peftc: 1
passes:
  - lora: {rank: 4, targets: [q_proj, v_proj], layers: "0-3"}
  - merge
tune: {data: x.jsonl, epochs: 1}
"""
BOMB = b"peftc: 1\na: &a [x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c]\n" % (i + 1, i + 1, *[i] * 8)
    for i in range(97, 110)
) + b"passes: [lora: {targets: *n}]\n"  # fmt: skip


def onnx_data(root: Path) -> Any:
    """Where a graph's external data lies."""
    from peftc.exporters.to_onnx import external_data

    raise_all(external_data(root))


def onnx_seed(location: str, offset: int = 0, length: int = 24) -> bytes:
    """A graph whose one initializer is in another file."""
    import onnx

    data = onnx.TensorProto(name="w", data_type=1, dims=[2, 3], data_location=1)
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        data.external_data.add(key=key, value=str(value))
    graph = onnx.helper.make_graph([], "g", [], [], [data])
    return bytes(onnx.helper.make_model(graph).SerializeToString())


def manifest(root: Path) -> Any:
    """A manifest, and whether its files are sound."""
    raise_all(Artifact.open(root).damage())


def shown(root: Path) -> Any:
    """What `peftc inspect` says of a folder, in whatever it holds."""
    from peftc.inspection import inspect

    with redirect_stdout(io.StringIO()):
        return inspect(str(root), Terminal(as_json=True, quiet=True))


def header(root: Path) -> Any:
    """A header that the library safetensors has to read too, where we do."""
    from safetensors import safe_open

    read_header(root / "x")
    with safe_open(root / "x", "np") as opened:
        return list(opened.keys())


class Block(nn.Module):
    """What adapters are attached to."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.v_proj(self.q_proj(x)))


@functools.cache
def program() -> Program:
    """Two linear layers."""
    return capture(Block())


def attached(root: Path) -> Any:
    """An adapter whose weights are sound."""
    return Pipeline([Attach(path=str(root))]).run(program())


def captured(root: Path) -> Any:
    """A checkpoint as a program."""
    return capture(root)


LORA_WEIGHTS = zeros(**{
    f"base_model__model__{name}__lora_{part}__weight": shape
    for name in ("q_proj", "v_proj") for part, shape in {"A": [2, 6], "B": [6, 2]}.items()
})  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "vocab_size": 5,
    "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4,
    "num_key_value_heads": 1, "tie_word_embeddings": True, "dtype": "float32", "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "max_position_embeddings": 16, "rope_theta": 1e4,
    "attention_bias": False, "pad_token_id": 0,
}  # fmt: skip
LLAMA_WEIGHTS = zeros(
    model__embed_tokens__weight=[5, 8], model__norm__weight=[8],
    model__layers__0__self_attn__q_proj__weight=[8, 8],
    model__layers__0__self_attn__k_proj__weight=[4, 8],
    model__layers__0__self_attn__v_proj__weight=[4, 8],
    model__layers__0__self_attn__o_proj__weight=[8, 8],
    model__layers__0__mlp__gate_proj__weight=[6, 8],
    model__layers__0__mlp__up_proj__weight=[6, 8],
    model__layers__0__mlp__down_proj__weight=[8, 6],
    model__layers__0__input_layernorm__weight=[8],
    model__layers__0__post_attention_layernorm__weight=[8],
)  # fmt: skip


def readers() -> dict[str, Reader]:
    """All of them, by name."""
    config, weights = as_bytes(CONFIG), {"model.safetensors": TWO}
    adapter = {"adapter_model.safetensors": TWO}
    found = [
        Reader("header", "x", {}, header, (TWO, ONE), share=6),
        Reader(
            "index", "model.safetensors.index.json",
            {"config.json": config, "x.safetensors": TWO}, Checkpoint.open,
            (as_bytes(INDEX), as_bytes({"weight_map": {"a.weight": "../x.safetensors"}})),
        ),
        Reader("config", "config.json", weights, Checkpoint.open, (config,), share=2),
        Reader(
            "adapter", "adapter_config.json", adapter, AdapterDirectory.open,
            (as_bytes(LORA), as_bytes(HUB)), share=2,
        ),
        Reader("manifest", "peftc.json", {"config.json": b"{}", "a/b.json": b"{}"}, manifest,
               (as_bytes(MANIFEST),), share=3),
        Reader("recipe", "r.yaml", {}, lambda root: Recipe.load(root / "r.yaml"), (RECIPE, BOMB),
               share=0.3),
        Reader("attach", "adapter_config.json", {"adapter_model.safetensors": LORA_WEIGHTS},
               attached, (as_bytes(LORA), as_bytes(RICH)), share=0.2),
        Reader("capture", "config.json", {"model.safetensors": LLAMA_WEIGHTS}, captured,
               (as_bytes(LLAMA),), share=0.015),
        Reader(
            "onnx", "model.onnx", {"x.safetensors": TWO}, onnx_data,
            (onnx_seed("x.safetensors"), onnx_seed("../x"), onnx_seed("x.safetensors", 9, 2**62)),
        ),
        Reader("inspect", "peftc.json", {**weights, "config.json": config}, shown,
               (as_bytes({**MANIFEST, "proof": {"site": {"relative_error": 1, "bound": 1}}}),)),
        Reader("inspect_adapter", "adapter_config.json", {**adapter, "adapter.safetensors": TWO},
               shown, (as_bytes(RICH), as_bytes(HUB)), share=0.5),
        Reader("inspect_config", "config.json", weights, shown, (as_bytes(LLAMA),), share=0.5),
        *running_readers(),
    ]  # fmt: skip
    return {reader.name: reader for reader in found}
