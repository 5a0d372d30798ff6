"""How long a first token takes: the base, its virtual tokens from a constant cache, and run anew.

A prompt and a prefix of SmolLM2-135M, exported by `peftc export --merge --format cache`; the plain
model of transformers starts from them by `ConstantCache.before`, whose time counts. Beside it the
live model of peftc, and PEFT with the same weights. Each time is of `generate` for one token; all
of them take turns in one run, and medians are taken, those of ratios within a turn.

    python benchmarks/first_token.py --virtual 20 100 --lengths 8 64 --rounds 15
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import peftc
from peftc.demo_model import demo_checkpoint

METHODS: dict[str, Callable[[int], peftc.Method]] = {
    "prompt": lambda n: peftc.PromptTuning(virtual_tokens=n, init="vocabulary"),
    "prefix": lambda n: peftc.PrefixTuning(virtual_tokens=n),
}
Answer = Callable[[torch.Tensor], torch.Tensor]


def first(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Ids with one token more."""
    made: torch.Tensor = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return made


def ways(base: Path, folder: Path, program: peftc.Program) -> dict[str, Answer]:
    """Ways to come to a first token, by name."""
    peftc.to_peft(program, folder / "adapter")
    out = peftc.export(base, folder / "out", merge=True, adapters=[(str(folder / "adapter"), 1.0)],
                       format="cache").path  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    cache = peftc.ConstantCache.open(out)
    live: Any = peftc.materialize(program)
    theirs = AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.PeftModel.from_pretrained(theirs, folder / "adapter").eval()
    models = {"virtual": live, "PEFT": wrapped}

    def whole(model: Any) -> Answer:
        return lambda ids: first(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    return {
        "base": whole(plain),
        "cache": lambda ids: first(plain, cache.before(plain, ids)),
        **{name: whole(model) for name, model in models.items()},
    }


def times(found: Mapping[str, Answer], ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way, taking turns."""
    seen: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 2):  # two to warm up
        for name, answer in found.items():
            start = time.perf_counter()
            answer(ids)
            if number > 1:
                seen[name].append((time.perf_counter() - start) * 1e3)
    return seen


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--virtual", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", type=Path, help="a checkpoint; default: SmolLM2-135M in fp32")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = given.model or demo_checkpoint("float32")
    print(
        f"{base.name}, torch {torch.__version__}, {torch.get_num_threads()} threads, batch 1, "
        f"ms to the first token, medians of {given.rounds} rounds\n\n"
        "| method | virtual tokens | text | base | from cache | virtual tokens run | PEFT | "
        "cache ÷ base | run ÷ base | PEFT ÷ base |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for method, make in METHODS.items():
        for count in given.virtual:
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                program = peftc.Pipeline([make(count)]).run(peftc.capture(base))
                found = ways(base, Path(folder), program)
                for length in given.lengths:
                    ids = torch.randint(4, 1000, (1, length))
                    want = found["virtual"](ids)
                    assert torch.equal(found["cache"](ids), want), "another first token"
                    ms = times(found, ids, given.rounds)
                    cells = [f"{statistics.median(own):.1f}" for own in ms.values()]
                    for name in ("cache", "virtual", "PEFT"):
                        turns = zip(ms[name], ms["base"], strict=True)
                        cells.append(f"{statistics.median(own / base for own, base in turns):.2f}")
                    print(f"| {method} | {count} | {length} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
