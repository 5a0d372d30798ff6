"""What reads strangers' files: each reader takes the bytes of one file, the others being sound."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc import Attach, Pipeline, Program, capture
from peftc.adapter import AdapterDirectory
from peftc.artifact import Artifact
from peftc.checkpoint import Checkpoint
from peftc.recipe import Recipe
from peftc.safetensors_file import read_header


@dataclass(frozen=True)
class Reader:
    """One of peftc's readers.

    Attributes:
        name: Of it, in reports and in the corpus.
        file: The file that is hostile.
        others: What lies beside it.
        read: Reads the folder, or raises a PeftcError.
        seeds: Sound files to begin from.
        share: Of the inputs, against the others: less where one takes long.
    """

    name: str
    file: str
    others: dict[str, bytes]
    read: Callable[[Path], Any]
    seeds: tuple[bytes, ...]
    share: float = 1.0

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder in memory with the other files in it."""
        cache = os.environ.get("PEFTC_CACHE")
        memory = Path("/dev/shm")
        base = memory if os.access(memory, os.W_OK) else None
        root = Path(tempfile.mkdtemp(prefix="peftc-fuzz-", dir=base))
        try:
            for name, data in self.others.items():
                (root / name).write_bytes(data)
            os.environ["PEFTC_CACHE"] = str(root / "cache")
            yield root
        finally:
            os.environ.pop("PEFTC_CACHE") if cache is None else os.environ.update(PEFTC_CACHE=cache)
            shutil.rmtree(root, ignore_errors=True)

    def feed(self, root: Path, data: bytes) -> None:
        """Reads `data`; whatever comes of it but a PeftcError is for the caller to report."""
        (root / self.file).write_bytes(data)
        self.read(root)


def safetensors(tensors: dict[str, Any], size: int, **more: Any) -> bytes:
    """A safetensors file of zeros with such a header."""
    text = json.dumps({**tensors, **more}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def tensor(dtype: str, shape: list[int], low: int, high: int) -> dict[str, Any]:
    """A header's entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [low, high]}


def as_bytes(value: Any) -> bytes:
    """JSON."""
    return json.dumps(value).encode()


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
MANIFEST = {
    "peftc": 1, "kind": "model", "source": {"path": "/base"}, "adapters": {}, "inputs": {},
    "journal": [{"title": "lora", "options": {"rank": 2}}],
    "files": {"config.json": {"size": 2, "blake3": "00"}, "a/b.json": {"size": 2, "blake3": "00"}},
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

    return external_data(root)


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
    return Artifact.open(root).damage()


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


def zeros(**shapes: list[int]) -> bytes:
    """A file of fp32 zeros; `__` in a name is a dot."""
    table, position = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        table[name.replace("__", ".")] = tensor("F32", shape, position, position + size)
        position += size
    return safetensors(table, position)


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
        Reader("header", "x", {}, lambda root: read_header(root / "x"), (TWO, ONE)),
        Reader(
            "index", "model.safetensors.index.json",
            {"config.json": config, "x.safetensors": TWO}, Checkpoint.open,
            (as_bytes(INDEX), as_bytes({"weight_map": {"a.weight": "../x.safetensors"}})),
        ),
        Reader("config", "config.json", weights, Checkpoint.open, (config,)),
        Reader(
            "adapter", "adapter_config.json", adapter, AdapterDirectory.open,
            (as_bytes(LORA), as_bytes(HUB)),
        ),
        Reader("manifest", "peftc.json", {"config.json": b"{}"}, manifest, (as_bytes(MANIFEST),)),
        Reader("recipe", "r.yaml", {}, lambda root: Recipe.load(root / "r.yaml"), (RECIPE, BOMB)),
        Reader("attach", "adapter_config.json", {"adapter_model.safetensors": LORA_WEIGHTS},
               attached, (as_bytes(LORA), as_bytes(RICH))),
        Reader("capture", "config.json", {"model.safetensors": LLAMA_WEIGHTS}, captured,
               (as_bytes(LLAMA),), share=0.01),
        Reader(
            "onnx", "model.onnx", {"x.safetensors": TWO}, onnx_data,
            (onnx_seed("x.safetensors"), onnx_seed("../x"), onnx_seed("x.safetensors", 9, 2**62)),
        ),
    ]  # fmt: skip
    return {reader.name: reader for reader in found}
