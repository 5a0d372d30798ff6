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

OUT = "OUT"  # in a command: the target


@dataclass(frozen=True)
class Job:
    """Commands that one after the other write a target.

    Attributes:
        commands: The arguments of `peftc`.
        share: How much of the faults it gets.
        keeps: An interrupted run leaves what another one goes on from.
        placed: What it writes names its place: adapters name the base beside them.
        trains: What it computes depends in its last bits on the number of threads.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    share: float = 1.0
    keeps: bool = False
    placed: bool = False
    trains: bool = False

    def calls(self, target: Path) -> list[list[str]]:
        """The arguments for a target."""
        return [[str(target) if a == OUT else a for a in given] for given in self.commands]


def make(folder: Path, slots: bool = True) -> None:
    """Makes the sources of the jobs, an ONNX base with slots too."""
    base, sharded = talker(folder / "base"), folder / "sharded"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(sharded, max_shard_size="20KB")
    for file in base.glob("token*"):
        (sharded / file.name).write_bytes(file.read_bytes())
    sums(folder / "sums.jsonl")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.peft_config["default"].base_model_name_or_path = str(sharded)
    wrapped.save_pretrained(folder / "adapter")
    attach = peftc.Attach(path=str(folder / "adapter"))
    peftc.apply(base, [peftc.Bottleneck()], folder / "bottleneck")
    peftc.apply(base, [peftc.PromptTuning(virtual_tokens=4)], folder / "prompt")
    peftc.apply(base, [peftc.Nf4(), attach], folder / "quantized")
    if slots:
        how: Any = {"format": "onnx", "swap": True, "slots": "all-linear", "proof": "sites"}
        peftc.export(base, folder / "slots", **how)


def jobs(folder: Path) -> list[Job]:
    """Every command that writes, in every format."""
    base, sharded, adapter = (str(folder / name) for name in ("base", "sharded", "adapter"))

    def export(source: str, *options: str) -> tuple[str, ...]:
        return ("export", source, "-o", OUT, *options)

    def apply(source: str, *passes: str) -> tuple[str, ...]:
        return ("apply", source, "-o", OUT, *passes)

    merge = ("--merge", "--adapter", adapter, "--proof", "sites")
    again = (*merge[:1], "--merge-base", "dequantized", "--then", "nf4", "--force", *merge[-2:])
    tune = (
        "tune", base, "-o", OUT, "--data", str(folder / "sums.jsonl"), "--steps", "12",
        "--batch-size", "8", "--save-steps", "2", "--lr", "5e-3", "--device", "cpu",
        "lora", "--rank", "4", "--dropout", "0.1",
    )  # fmt: skip
    parts = (
        export(sharded, *merge, "--shards", "1/2"),
        export(sharded, *merge, "--shards", "2/2"),
        ("finish", OUT),
    )
    onnx, peft_ = ("--format", "onnx"), ("--format", "peft")
    slotted = export(str(folder / "slots"), "--format", "onnx-adapter", "--adapter", adapter)
    pissa = ("lora", "--rank", "4", "--init", "pissa")
    return [
        Job("apply lora", (apply(base, "lora", "--rank", "4"),)),
        Job("apply nf4 lora", (apply(sharded, "nf4", "lora", "--rank", "4"),), placed=True),
        Job("apply lora (PiSSA)", (apply(sharded, *pissa),), placed=True),
        Job("export: safetensors", (export(sharded, *merge),), 3),
        Job("export: safetensors, NF4", (export(str(folder / "quantized"), *again),)),
        Job("export in parts, finish", parts, 3, keeps=True),
        Job("export: peft", (export(adapter, *peft_),)),
        Job("export: peft, canonical", (export(adapter, *peft_, "--canonical", "--rank", "2"),)),
        Job("export: adapterhub", (export(str(folder / "bottleneck"), "--format", "adapterhub"),)),
        Job("export: cache", (export(str(folder / "prompt"), "--format", "cache", "--merge"),)),
        Job("export: onnx", (export(base, *merge, *onnx),), 0.5),
        Job("export: onnx, int4", (export(base, *merge, *onnx, "--weights", "int4"),), 0.5),
        Job("export: onnx-adapter", (slotted,), 0.5),
        Job("export: pt2", (export(base, *merge, "--format", "pt2"),), 0.1),
        Job("tune", (tune,), 1.5, keeps=True, trains=True),
    ]


def contents(target: Path) -> dict[str, str]:
    """The hash of every file of a directory, its manifest's too, by its name."""
    files = sorted(path for path in target.rglob("*") if path.is_file())
    return {str(f.relative_to(target)): blake3(f.read_bytes()).hexdigest() for f in files}
