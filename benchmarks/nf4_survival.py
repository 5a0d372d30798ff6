"""What is left of a LoRA that is merged into a 4-bit base, by each way of merging.

Each way is a base to merge into and what is written: `D + Δ` onto the dequantized weights, `W + Δ`
onto the original ones, in 16 bits or quantized again, `q(…)`. Of each: the share of the update that
is left, and the error of the output against what was trained, D + Δ, on white input. The updates
are random, of rank 16, and of a norm relative to the weight's.

    python benchmarks/nf4_survival.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import peftc
from peftc.constants import Constant, Held
from peftc.demo_model import demo_checkpoint
from peftc.evaluate import value
from peftc.merging import MergeBase, Then, merge
from peftc.passes.lora import Lora
from peftc.passes.nf4 import Nf4
from peftc.pipeline import Pipeline
from peftc.program import Program

RANK = 16
NORMS = (0.01, 0.03, 0.05, 0.1)
FORMS: dict[str, dict[str, Any]] = {"nf4": {}, "nf4, double quant": {"double_quant": True}}
WAYS: dict[str, tuple[MergeBase, Then]] = {
    "D + Δ": ("dequantized", "none"),
    "q(D + Δ)": ("dequantized", "nf4"),
    "W + Δ": ("original", "none"),
    "q(W + Δ)": ("original", "nf4"),
}
LAYERS = "0,14,29"  # of SmolLM2's 30


def gaussian() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 256, bias=False) for _ in range(4)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.bfloat16()


def trained(program: Program, relative: float) -> Program:
    """The program with random updates of a norm relative to each weight's."""
    generator = torch.Generator().manual_seed(1)
    factors: dict[str, Constant] = {}
    for name in sorted(n for n in program.trainable if ".lora_A." in n):
        site, other = name.partition(".lora_A.")[0], name.replace("lora_A", "lora_B")
        a, b = (
            torch.randn(program.constants[n].spec.shape, generator=generator) for n in (name, other)
        )
        weight = value(program.constants[f"{site}.weight"]).float()
        factors[name] = Held(a)
        factors[other] = Held(b * (relative * weight.norm() / (b @ a).norm()))
    return program.rewrite(constants=factors)


def figures(program: Program, relative: float) -> list[str]:
    """Share and error of each way."""
    found = []
    for base, then in WAYS.values():
        _, report = merge(trained(program, relative), base, then, force=True)
        assert report is not None
        found.append(f"{report['share']:.1%}, {report['output_error']:.1%}")
    return found


def main() -> None:
    weights: dict[str, tuple[Program, dict[str, Any]]] = {
        "Gaussian, 4 × 256×512": (peftc.capture(gaussian()), {}),
        f"SmolLM2-135M, layers {LAYERS}": (
            peftc.capture(demo_checkpoint("bfloat16")),
            {"layers": LAYERS},
        ),
    }
    print(f"Share of the update that is left, and output error; rank {RANK}, bf16 weights\n")
    print(f"| weights | format | norm | {' | '.join(WAYS)} |")
    print(f"|---|---|---|{'---|' * len(WAYS)}", flush=True)
    for name, (plain, which) in weights.items():
        for form, options in FORMS.items():
            passes = [Nf4(**options, **which), Lora(rank=RANK, alpha=RANK, **which)]
            program = Pipeline(passes).run(plain)
            for relative in NORMS:
                cells = " | ".join(figures(program, relative))
                print(f"| {name} | {form} | {relative:.0%} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
