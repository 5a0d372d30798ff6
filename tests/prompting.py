"""What tests of prompts share: tiny models of every task, PEFT's prompts for them, inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from peftc import Attach, Pass, Pipeline, Program, capture

from .conftest import SMALL, auto

MakeModel = Callable[[str], Path]
N = 5  # virtual tokens
HALF = {"layers": 2, "ffn_dim": 80, "attention_heads": 4}
HALVES = {f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in HALF.items()}
T5 = {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4}
GEMMA = {**SMALL, "num_key_value_heads": 2, "head_dim": 12}
# Each with the class, its configuration and PEFT's name of the task.
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA, "CAUSAL_LM"),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {**T5, "vocab_size": 97, "decoder_start_token_id": 0}, "SEQ_2_SEQ_LM"),
    "bart": ("BartForConditionalGeneration", "BartConfig",
             {**HALVES, "d_model": 48, "vocab_size": 97, "max_position_embeddings": 64},
             "SEQ_2_SEQ_LM"),
    "bert": ("BertForSequenceClassification", "BertConfig", SMALL, "SEQ_CLS"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", SMALL, "SEQ_CLS"),
    "tokens": ("BertForTokenClassification", "BertConfig", SMALL, "TOKEN_CLS"),
    "answers": ("BertForQuestionAnswering", "BertConfig", SMALL, "QUESTION_ANS"),
}  # fmt: skip
DECODERS = ("llama", "gpt2", "qwen2", "opt")
PADDINGS = ("none", "left", "right")


_made: dict[str, Path] = {}


def checkpoint_of(name: str, folder: Callable[[str], Path]) -> Path:
    """A tiny random checkpoint, made once for each name."""
    if name not in _made:
        cls, config, options, _ = MODELS[name]
        torch.manual_seed(7)
        built = getattr(transformers, cls)(getattr(transformers, config)(**options))
        for parameter in built.parameters():
            nn.init.normal_(parameter, std=0.1)
        _made[name] = folder(name)
        built.save_pretrained(_made[name])
    return _made[name]


def task(name: str) -> str:
    return MODELS[name][3] if name in MODELS else "CAUSAL_LM"


def prompted(base: Path, folder: Path, kind: str = "CAUSAL_LM", **options: Any) -> Any:
    """The model with a random prompt of PEFT's, saved too."""
    torch.manual_seed(3)
    config = peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=N, **options)
    wrapped = peft.get_peft_model(auto(base), config).eval()
    wrapped.save_pretrained(folder)
    return wrapped


def attached(base: Path, folder: Path) -> Program:
    return Pipeline([Attach(path=str(folder))]).run(capture(base))


def injected(base: Path, *passes: Pass) -> Program:
    return Pipeline(passes).run(capture(base))


def batch(padding: str = "none", length: int = 9) -> dict[str, Any]:
    ids = torch.randint(4, 97, (2, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padding == "none":
        return {"input_ids": ids}
    mask[0, : 4 if padding == "left" else None] = 0
    if padding == "right":
        mask[0] = torch.tensor([1] * (length - 4) + [0] * 4)
    return {"input_ids": ids, "attention_mask": mask}


def labelled(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with what a loss is of; PEFT cannot give one of a token classifier's."""
    ids = inputs["input_ids"]
    match task(name):
        case "SEQ_CLS":
            return {**inputs, "labels": torch.tensor([0, 1])}
        case "QUESTION_ANS":
            return {**inputs, "start_positions": ids[:, 0] % 7, "end_positions": ids[:, 1] % 7}
        case "SEQ_2_SEQ_LM":
            return {**inputs, "labels": ids[:, :6].contiguous()}
        case "TOKEN_CLS":
            return inputs
        case _:
            return {**inputs, "labels": ids}


@torch.no_grad()
def generated(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    found: Tensor = model.generate(**{"max_new_tokens": 7, "do_sample": False, **inputs, **options})
    return found
