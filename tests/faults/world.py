"""What the harness disturbs: tiny sources, and a job for every format that peftc writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from blake3 import blake3

import peftc
from tests.talker import sums, talker

LEAVES = "OUT"  # in a command: the target


@dataclass(frozen=True)
class Job:
    """Commands that one after the other write a target.

    Attributes:
        commands: The arguments of `peftc`.
        share: How much of the faults it gets.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    share: float = 1.0

    def calls(self, target: Path) -> list[list[str]]:
        """The arguments for a target."""
        return [[str(target) if a == LEAVES else a for a in given] for given in self.commands]


def world(folder: Path) -> list[Job]:
    """Makes the sources; the jobs."""
    base = talker(folder / "base")
    sharded = folder / "sharded"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(sharded, max_shard_size="20KB")
    for file in base.glob("token*"):
        (sharded / file.name).write_bytes(file.read_bytes())
    adapter, data = _adapter(sharded, folder / "adapter"), sums(folder / "sums.jsonl")
    bottleneck, prompt = peftc.Bottleneck(), peftc.PromptTuning(virtual_tokens=4)
    peftc.apply(base, [bottleneck], folder / "bottleneck")
    peftc.apply(base, [prompt], folder / "prompt")
    attach = peftc.Attach(path=str(adapter))
    peftc.apply(base, [peftc.Nf4(), attach], folder / "quantized")
    home = peftc.export(base, folder / "slots", format="onnx", swap=True, slots="all-linear").path

    def export(source: Path, *options: object) -> tuple[str, ...]:
        return ("export", str(source), "-o", LEAVES, *map(str, options))

    merge = ("--merge", "--adapter", adapter)
    tune = (
        "tune", str(base), "-o", LEAVES, "--data", str(data), "--steps", "12", "--batch-size", "8",
        "--save-steps", "2", "--lr", "5e-3", "--device", "cpu", "lora", "--rank", "4",
    )  # fmt: skip
    plain = ("apply", str(base), "-o", LEAVES, "lora", "--rank", "4")
    start = ("--rank", "4", "--init", "pissa")
    rewritten = ("apply", str(sharded), "-o", LEAVES, "nf4", "lora", *start[:2])
    again = ("--merge", "--merge-base", "dequantized", "--then", "nf4", "--force")
    return [
        Job("apply lora", (plain,)),
        Job("apply nf4 lora", (rewritten,)),
        Job("apply pissa", (("apply", str(sharded), "-o", LEAVES, "lora", *start),)),
        Job("safetensors", (export(sharded, *merge),), 2),
        Job("safetensors nf4", (export(folder / "quantized", *again),)),
        Job("parts, finish", (
            export(sharded, *merge, "--shards", "1/2"),
            export(sharded, *merge, "--shards", "2/2"),
            ("finish", LEAVES),
        ), 2),
        Job("peft", (export(adapter, "--format", "peft"),)),
        Job("peft canonical", (
            export(adapter, "--format", "peft", "--canonical", "--rank", 2),
        )),
        Job("adapterhub", (export(folder / "bottleneck", "--format", "adapterhub"),)),
        Job("cache", (export(folder / "prompt", "--format", "cache", "--merge"),)),
        Job("onnx", (export(base, *merge, "--format", "onnx"),)),
        Job("onnx int4", (export(base, *merge, "--format", "onnx", "--weights", "int4"),)),
        Job("onnx-adapter", (
            export(home, "--format", "onnx-adapter", "--adapter", adapter),
        )),
        Job("tune", (tune,), 2),
        Job("pt2", (export(base, *merge, "--format", "pt2", "--proof", "sites"),), 0.25),
    ]  # fmt: skip


def contents(target: Path) -> dict[str, str]:
    """The hash of every file of a directory, its manifest's too, by its name."""
    files = sorted(path for path in target.rglob("*") if path.is_file())
    return {str(f.relative_to(target)): blake3(f.read_bytes()).hexdigest() for f in files}


def _adapter(base: Path, target: Path) -> Path:
    """A LoRA that changes what the model computes, as PEFT writes it."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(target)
    return target
