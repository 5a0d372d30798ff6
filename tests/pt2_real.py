"""Real models, compiled, and run where neither transformers nor peftc's passes are imported.

SmolLM2-135M merged, with a LoRA to swap in, and in NF4 with a LoRA; all-MiniLM-L6-v2. Each is
compared with eager torch at shapes that neither the export nor its proof had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftc
from peftc import Nf4, Pipeline, capture, materialize
from peftc.calling import Tensors
from peftc.demo_model import demo_checkpoint

from .onnx_families import minilm

SHAPES = [(1, 0, 17), (2, 0, 5), (2, 23, 3), (5, 40, 1), (1, 100, 7), (3, 9, 9)]
TOKENS = 64
KINDS = ("merged", "LoRA swapped in", "NF4, LoRA swapped in")
CODE = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from peftc.runtime import load
path, given, out, shapes, tokens = sys.argv[1:]
runtime, given = load(path), load_file(given)
for name in runtime.adapters:
    runtime.swap(name)
ports = runtime.graphs["model"].inputs
found = {}
def step(ids, mask, past):
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:].contiguous()
    got = runtime.run({"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
    cache = {name: got[name.replace("past_key_values.", "present.")] for name in past}
    return got["logits"], cache
for number, (batch, before, now) in enumerate(json.loads(shapes)):
    ids, mask = given[f"ids.{number}"], given[f"mask.{number}"]
    past = {p.name: p.example({"batch": batch, "past": 0}) for p in ports if "past" in p.dims}
    if before:
        _, past = step(ids[:, :before].contiguous(), mask[:, :before].contiguous(), past)
    found[str(number)], _ = step(ids[:, before:].contiguous(), mask, past)
found["text"] = runtime.generate(given["text"], int(tokens), stop=[])
save_file(found, out)
barred = ("transformers", "peft", "peftc.passes", "peftc.exporters")
sys.exit(", ".join(name for name in barred if name in sys.modules) or 0)
"""


@dataclass(frozen=True)
class Found:
    """A compiled model beside eager torch.

    Attributes:
        relative: The largest difference of logits, over the largest logit of its shape.
        absolute: The largest difference.
        same: How many tokens of a greedy text are equal, from the first on.
    """

    relative: float
    absolute: float
    same: int


def smollm2(kind: str, folder: Path) -> peftc.Artifact:
    """Exports SmolLM2 with a random LoRA on all linear layers."""
    base, adapter = demo_checkpoint("float32"), folder / "adapter"
    if not adapter.exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        wrapped = peft.get_peft_model(model, config)
        torch.manual_seed(0)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        wrapped.save_pretrained(adapter)
    program, out = program_of(kind, base, adapter), folder / kind.replace(" ", "_")
    return peftc.to_pt2(program, out, adapters=None if kind == "merged" else "swap")


def program_of(kind: str, base: Path, adapter: Path) -> peftc.Program:
    """SmolLM2 with the LoRA: merged, or beside the weights or their codes."""
    first = [Nf4()] if kind.startswith("NF4") else []
    last = [peftc.Merge()] if kind == "merged" else []
    return Pipeline([*first, peftc.Attach(path=str(adapter)), *last]).run(capture(base))


def examples(vocabulary: int) -> Tensors:
    """Token ids and masks, padded on the left, of all shapes, and a text to go on with."""
    generator = torch.Generator().manual_seed(8)
    given: Tensors = {}
    for number, (batch, before, now) in enumerate(SHAPES):
        ids = torch.randint(3, vocabulary, (batch, before + now), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, :row] = 0
        given |= {f"ids.{number}": ids, f"mask.{number}": mask}
    given["text"] = torch.tensor([[(7 * i) % 4000 + 20 for i in range(11)]])
    return given


def beside(path: Path, model: Any, folder: Path) -> Found:
    """A compiled causal model, in a process of its own, beside a live one."""
    given, out = examples(model.config.vocab_size), folder / "found.safetensors"
    save_file(given, folder / "given.safetensors")
    shapes = json.dumps(SHAPES)
    command = [sys.executable, "-c", CODE, str(path), str(folder / "given.safetensors"), str(out)]
    done = subprocess.run(
        [*command, shapes, str(TOKENS)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, errors = load_file(out), []
    for number, (_, before, _) in enumerate(SHAPES):
        ids, mask = given[f"ids.{number}"], given[f"mask.{number}"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            all_ = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        errors.append(largest(found[str(number)], all_[:, before:], mask[:, before:].bool()))
    text = given["text"]
    with torch.no_grad():
        want = model.generate(
            input_ids=text, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
        )
    same = (found["text"] == want[:, text.shape[1] :]).long().cumprod(1).sum()
    return Found(max(r for r, _ in errors), max(a for _, a in errors), int(same))


def largest(got: Tensor, want: Tensor, real: Tensor) -> tuple[float, float]:
    """The largest difference where a token is real: over the largest value, and by itself."""
    difference = float((got - want)[real].abs().max())
    return difference / float(want[real].abs().max()), difference


def embedded(folder: Path) -> str:
    """What the table says of all-MiniLM-L6-v2."""
    artifact = peftc.export(minilm(), folder / "out", format="pt2")
    runtime = peftc.runtime.load(artifact.path)
    model = transformers.AutoModel.from_pretrained(minilm()).eval()
    texts = ["A short one.", "And one with several more words in it, so that the other is padded."]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    given = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    with torch.no_grad():
        want = model(**given).last_hidden_state
    taken = {port.name: given[port.name] for port in runtime.graphs["model"].inputs}
    got = runtime.run(taken)["last_hidden_state"]
    relative, absolute = largest(got, want, given["attention_mask"].bool())
    return f"{relative:.0e} ({absolute:.0e}) | "


def row(kind: str, folder: Path) -> str:
    """What the table says of SmolLM2."""
    artifact = smollm2(kind, folder)
    base = demo_checkpoint("float32")
    live = materialize(program_of(kind, base, folder / "adapter"), dtype=torch.float32)
    found = beside(artifact.path, live, folder)
    return f"{found.relative:.0e} ({found.absolute:.0e}) | {found.same} of {TOKENS}"


def main(folder: Path) -> None:
    """Prints the table."""
    print("| | largest error at six new shapes (absolute) | greedy tokens equal |\n|---|---|---|")
    for kind in KINDS:
        print(f"| SmolLM2-135M, {kind} | {row(kind, folder)} |", flush=True)
    print(f"| all-MiniLM-L6-v2 | {embedded(folder)}|", flush=True)
