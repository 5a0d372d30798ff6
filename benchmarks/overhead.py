"""What each method costs per site and forward pass: PEFT and peftc side by side, in one run.

A stack of linear layers carries one adapter; rounds of PEFT and peftc alternate, and medians are
taken. `small` is one token at 64 features, where calls from Python cost most; `large` is 512 tokens
at 512 features, where the arithmetic does. `merged` is the plain layer that peftc folds it to.

    python benchmarks/overhead.py --rounds 15
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from torch import nn

import peftc
from peftc.passes.attach import Attach
from peftc.passes.lora import Lora
from peftc.passes.merge import Merge
from peftc.pipeline import Pipeline

DEPTH = 12
SIZES = {"small": (64, (1, 1)), "large": (512, (4, 128))}
# PEFT's configuration of each method.
METHODS: dict[str, Callable[..., Any]] = {
    "LoRA": lambda **k: peft.LoraConfig(r=8, **k),
    "rsLoRA": lambda **k: peft.LoraConfig(r=8, use_rslora=True, **k),
    "DoRA": lambda **k: peft.LoraConfig(r=8, use_dora=True, **k),
    "VeRA": lambda **k: peft.VeraConfig(r=8, **k),
    "LoHa": lambda **k: peft.LoHaConfig(r=8, **k),
    "LoKr": lambda **k: peft.LoKrConfig(r=8, **k),
    "IA3": lambda **k: peft.IA3Config(feedforward_modules=[], **k),
    "AdaLoRA": lambda **k: peft.AdaLoraConfig(init_r=8, total_step=100, **k),
    "OFT": lambda **k: peft.OFTConfig(oft_block_size=16, r=0, **k),
}


class Stack(nn.Module):
    """Linear layers one after another."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(features, features) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def forms(base: Stack, config: Any) -> dict[str, nn.Module]:
    """The same trained adapter in PEFT, in peftc, and merged by peftc."""
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.02)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        program = Pipeline([Attach(path=folder)]).run(peftc.capture(base))
        live, merged = (peftc.materialize(p) for p in (program, Pipeline([Merge()]).run(program)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in live.parameters():
        parameter.requires_grad_(False)
    return {"PEFT": model, "peftc": live, "merged": merged}


def times(models: Mapping[str, nn.Module], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median microseconds per site and call, rounds alternating between the models."""
    seen: dict[str, list[float]] = {name: [] for name in models}
    calls = max(1, 4000 // x.numel())
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(calls):
                model(x)
            seen[name].append((time.perf_counter() - start) / calls / DEPTH * 1e6)
    return {name: statistics.median(values) for name, values in seen.items()}


def injection() -> str:
    """Milliseconds per site for injecting LoRA into a model of a thousand linear layers."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(1000)))
    program = peftc.capture(model)
    names = list(program.sites)
    Lora(rank=8).pick(program)  # the sample run that tells what is called is done once a model
    start = time.perf_counter()
    injected = program.inject(Lora(rank=8), names)
    middle = time.perf_counter()
    Pipeline([Lora(rank=8)]).run(program)
    checked = time.perf_counter()
    peftc.materialize(injected)
    live = time.perf_counter()
    peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=names))
    end = time.perf_counter()
    return (
        f"Injecting LoRA at 1,000 sites, ms a site: inject {middle - start:.2f}, the pass with its "
        f"checks {checked - middle:.2f}, materialize {live - checked:.2f}; PEFT {end - live:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, medians of {rounds} rounds, µs a site\n")
    print("| method | size | base | PEFT | peftc | peftc / PEFT | merged |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for method, config in METHODS.items():
        for size, (features, batch) in SIZES.items():
            torch.manual_seed(0)
            base = Stack(features).eval()
            x = torch.randn(*batch, features)
            with torch.no_grad():
                models = {"base": base, **forms(base, config(target_modules=r"layers\.\d+"))}
                times(models, x, 2)
                found = times(models, x, rounds)
            print(
                f"| {method} | {size} | {found['base']:.1f} | {found['PEFT']:.1f} | "
                f"{found['peftc']:.1f} | {found['peftc'] / found['PEFT']:.2f} | "
                f"{found['merged']:.1f} |",
                flush=True,
            )
    print(f"\n{injection()}")


if __name__ == "__main__":
    main()
