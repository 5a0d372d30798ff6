"""Shared fixtures: tiny random checkpoints of five architectures, PEFT adapters, the real model."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.utils import logging

from peftc.cli import main

from .helpers import Ran

logging.disable_progress_bar()
logging.set_verbosity_error()
torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 97, "max_position_embeddings": 64,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 64,
}  # fmt: skip
OPT: dict[str, Any] = {
    "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 97, "max_position_embeddings": 64, "word_embed_proj_dim": 48,
}  # fmt: skip
# Each with the class, its configuration and linear layers by their names.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**SMALL, "num_key_value_heads": 2}),
    "bert": ("BertForMaskedLM", "BertConfig", SMALL),
}

MakeCheckpoint = Callable[..., Path]
Tied = Callable[..., Path]
MakeAdapter = Callable[..., Path]
Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `peftc …` in this process, as the entry point does."""

    def call(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["peftc", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Ran(int(stop.value.code or 0), *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Makes, once for each of its arguments, a tiny random checkpoint.

    `shards=True` splits it into several files.
    """
    made: dict[Any, Path] = {}

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, shards: bool = False) -> Path:
        key = name, dtype, shards
        if key not in made:
            cls, config, options = ARCHITECTURES[name]
            torch.manual_seed(7)
            model = getattr(transformers, cls)(getattr(transformers, config)(**options))
            for parameter in model.parameters():  # biases start at zero, which would hide them
                torch.nn.init.normal_(parameter, std=0.1)
            path = tmp_path_factory.mktemp(f"{name}-{str(dtype).rpartition('.')[2]}")
            model.to(dtype).save_pretrained(path, max_shard_size="40KB" if shards else "1GB")
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Tied:
    """Makes, once for each of its arguments, a tiny checkpoint whose head is the embedding."""
    made: dict[Any, Path] = {}

    def make(
        name: str = "llama", dtype: torch.dtype = torch.float32, shards: bool = False, **more: Any
    ) -> Path:
        key = name, dtype, shards, repr(more)
        if key not in made:
            cls, config, options = ARCHITECTURES[name]
            options = {**options, "tie_word_embeddings": True, **more}
            torch.manual_seed(11)
            model = getattr(transformers, cls)(getattr(transformers, config)(**options))
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.1)
            made[key] = tmp_path_factory.mktemp(f"tied-{name}")
            model.to(dtype).save_pretrained(made[key], max_shard_size="40KB" if shards else "1GB")
        return made[key]

    return make


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """Makes, once for each of its arguments, a PEFT LoRA adapter with non-zero weights."""
    made: dict[Any, Path] = {}

    def make(base: Path, seed: int = 0, **options: Any) -> Path:
        key = base, seed, repr(sorted(options.items()))
        if key not in made:
            options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
            model = auto(base)
            wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
            torch.manual_seed(100 + seed)
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
                elif parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
            path = tmp_path_factory.mktemp("adapter")
            wrapped.save_pretrained(path)
            made[key] = path
        return made[key]

    return make


def auto(path: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of a checkpoint, loaded by transformers, in eval mode."""
    config = transformers.AutoConfig.from_pretrained(path)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(path, dtype=dtype or "auto").eval()


def with_peft(path: Path, *adapters: Path, dtype: torch.dtype | None = None) -> Any:
    """The model with adapters, all active, loaded by PEFT."""
    model = peft.PeftModel.from_pretrained(auto(path, dtype), adapters[0], adapter_name="a0")
    for i, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=f"a{i}")
    model.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
    return model.eval()


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The model's first output on fixed token ids."""
    if ids is None:
        ids = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        first: torch.Tensor = model(input_ids=ids)[0]
    return first


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference over the largest absolute value of the second."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())
