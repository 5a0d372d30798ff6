"""Perplexity of SmolLM2-135M on the demo's text, in bf16 and in 4 bits.

Quantizes the real model by `peftc apply`, asks it by peftc's own operators, and prints its size,
bits a weight, perplexity of the demo's prompts and answers, and what it says of France.

    python benchmarks/nf4_perplexity.py
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoTokenizer

import peftc
from peftc.demo_model import demo_checkpoint
from peftc.passes.nf4 import Nf4
from peftc.terminal import hush

QUESTION = "What is the capital of France?"
FORMS = {
    "bf16": None, "nf4": Nf4(), "nf4, double quantization": Nf4(double_quant=True),
    "nf4, block 32": Nf4(block_size=32), "nf4, block 256": Nf4(block_size=256),
    "fp4": Nf4(codebook="fp4"),
}  # fmt: skip


def main() -> None:
    hush()
    base = demo_checkpoint("bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = (files("peftc") / "data" / "lesson.jsonl").read_text().splitlines()
    texts = ["\n".join(json.loads(line).values()) for line in lines]
    work = Path(tempfile.mkdtemp(prefix="peftc-bench-"))
    print("| weights | MB | bits a weight | perplexity | answer |")
    print("|---|---|---|---|---|", flush=True)
    try:
        for name, form in FORMS.items():
            path, bits = base, 16.0
            if form is not None:
                artifact = peftc.apply(base, [form], work / name, overwrite=True)
                path = work / name / "base"
                bits = artifact.manifest["journal"][-1]["measured"]["bits_per_weight"]
            model = peftc.materialize(peftc.capture(path), dtype=torch.float32)
            size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e6
            with torch.no_grad():
                figures = f"{bits:.2f} | {perplexity(model, tokenizer, texts):.2f}"
                said = answer(model, tokenizer)
            print(f"| {name} | {size:.0f} | {figures} | {said} |", flush=True)
    finally:
        shutil.rmtree(work)


def perplexity(model: torch.nn.Module, tokenizer: object, texts: list[str]) -> float:
    """The exponential of the mean loss a token, over all texts."""
    total = count = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(total / count)


def answer(model: torch.nn.Module, tokenizer: object) -> str:
    """What the model says to the question, greedily."""
    chat = [{"role": "user", "content": QUESTION}]
    given = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**given, max_new_tokens=12, do_sample=False)
    text: str = tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip().splitlines()[0]


if __name__ == "__main__":
    main()
