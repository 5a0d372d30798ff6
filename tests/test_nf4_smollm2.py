"""Four bits on the real model: transformers with bitsandbytes loads it, and it still knows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftc
from peftc.demo_model import demo_checkpoint
from peftc.passes.nf4 import Nf4

TEXT = (
    "The capital of France is Paris, and the capital of Italy is Rome. Water boils at one hundred "
    "degrees Celsius. A week has seven days, and a year has twelve months."
)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "nested"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nf4") / "out"
    artifact = peftc.apply(demo_checkpoint("bfloat16"), [Nf4(double_quant=request.param)], out)
    bits = artifact.manifest["journal"][0]["measured"]["bits_per_weight"]
    assert bits == pytest.approx(4.13 if request.param else 4.5, abs=0.01)
    return out / "base"


def perplexity(path: Path) -> float:
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    model = peftc.materialize(peftc.capture(path), dtype=torch.float32)
    with torch.no_grad():
        return math.exp(float(model(input_ids=ids, labels=ids).loss))


def test_perplexity_rises_by_less_than_a_third_when_quantized(small: Path) -> None:
    before, after = perplexity(demo_checkpoint("bfloat16")), perplexity(small)
    assert before < after < 1.33 * before


def test_bitsandbytes_answers_from_what_was_written(small: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(small)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    tokenizer: Any = AutoTokenizer.from_pretrained(small)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    given = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**given, max_new_tokens=7, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, given["input_ids"].shape[1] :])


def test_verify_passes_for_what_was_written(small: Path) -> None:
    assert peftc.verify(small.parent)["files"] >= 4
