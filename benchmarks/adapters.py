"""What each method costs a forward pass of a whole model, as in table 1 of the LoRA paper, and what
many adapters on one base do.

For each method and each (batch, length): the base, peftc's live model and PEFT's with the same
weights take turns in one run, in fp32 and without gradients. Medians are taken, those of ratios
within a turn. PEFT's is missing where it has no such method. Only the last token's logits are asked
for.

    python benchmarks/adapters.py                                 a random Llama of 3 M weights
    python benchmarks/adapters.py --model SMOLLM2 --sizes 1x128 --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers.utils import logging

import peftc
from peftc.demo_model import demo_checkpoint

N = 20  # virtual tokens
# peftc's pass, and what is served of it.
METHODS: dict[str, tuple[peftc.Pass, str]] = {
    "LoRA r=8": (peftc.Lora(rank=8), "live"),
    "LoRA r=64": (peftc.Lora(rank=64), "live"),
    "DoRA r=8": (peftc.Dora(rank=8), "live"),
    "VeRA r=256": (peftc.Vera(rank=256), "live"),
    "IA3": (peftc.Ia3(), "live"),
    "bottleneck, Houlsby": (peftc.Bottleneck(preset="houlsby"), "live"),
    "bottleneck, Pfeiffer": (peftc.Bottleneck(preset="pfeiffer"), "live"),
    "bottleneck, parallel": (peftc.Bottleneck(preset="parallel", reduction_factor=16), "live"),
    f"prefix, {N} tokens": (peftc.PrefixTuning(virtual_tokens=N), "live"),
    f"prompt, {N} tokens": (peftc.PromptTuning(virtual_tokens=N), "live"),
    "LoRA r=8, merged": (peftc.Lora(rank=8), "merged"),
    "DoRA r=8, merged": (peftc.Dora(rank=8), "merged"),
    "IA3, merged": (peftc.Ia3(), "merged"),
    f"prefix, {N} tokens, from cache": (peftc.PrefixTuning(virtual_tokens=N), "cache"),
    f"prompt, {N} tokens, from cache": (peftc.PromptTuning(virtual_tokens=N), "cache"),
}
Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Job:
    """What the command line asks for.

    Attributes:
        base: The model's checkpoint.
        sizes: Each (batch, length).
        rounds: At most so many turns of each model.
        seconds: What a method may take at one size; three turns it always has.
        only: The methods whose names have one of these in them.
    """

    base: Path
    sizes: list[tuple[int, int]]
    rounds: int
    seconds: float
    only: list[str]


def forward(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The last token's logits."""
    logits: torch.Tensor = model(**inputs, logits_to_keep=1).logits
    return logits


def plainly(model: Any, **more: Any) -> Run:
    """A model's forward on ids, and nothing that depends on them."""
    return lambda ids: forward(model, {"input_ids": ids, **more})


def randomized(program: peftc.Program) -> tuple[peftc.Program, int]:
    """A program with tensors that are not those of a fresh adapter, and how many are trained."""
    live = peftc.materialize(program)
    generator, count = torch.Generator().manual_seed(0), 0
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.01)
                count += parameter.numel()
    return peftc.absorb(program, live), count


def served(base: Path, program: peftc.Program, form: str, folder: Path) -> dict[str, Run]:
    """peftc's model and PEFT's, where PEFT has one, in the form in which they are served."""
    if form == "cache":
        cache = peftc.ConstantCache.open(peftc.to_cache(program, folder / "cache").path)
        plain = loaded(base)
        return {"peftc": lambda ids: forward(plain, cache.before(plain, ids))}
    shown = peftc.Pipeline([peftc.Merge()]).run(program) if form == "merged" else program
    found = {"peftc": plainly(frozen(peftc.materialize(shown)))}
    if not isinstance(next(iter(program.adapters.values())).method, peftc.Bottleneck):
        peftc.to_peft(program, folder / "adapter")
        theirs: Any = peft.PeftModel.from_pretrained(loaded(base), folder / "adapter")
        found["PEFT"] = plainly(frozen(theirs.merge_and_unload() if form == "merged" else theirs))
    return found


def loaded(base: Path) -> Any:
    return frozen(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))


def frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def times(found: Mapping[str, Run], ids: torch.Tensor, job: Job) -> dict[str, list[float]]:
    """Milliseconds of each model, taking turns; PEFT's numbers must be peftc's."""
    start = time.perf_counter()
    logits = {name: run(ids) for name, run in found.items()}
    once = time.perf_counter() - start
    if (want := logits.get("PEFT")) is not None:
        assert float((logits["peftc"] - want).abs().max() / want.abs().max()) < 1e-3
    rounds = max(3, min(job.rounds, int(job.seconds / once)))
    seen: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, run in found.items():
            start = time.perf_counter()
            run(ids)
            seen[name].append((time.perf_counter() - start) * 1e3)
    return seen


def ratio(ms: Mapping[str, list[float]], name: str) -> str:
    """How many times slower than the base, by the median turn; nothing of what was not run."""
    if name not in ms:
        return ""
    turns = zip(ms[name], ms["base"], strict=True)
    return f"{statistics.median(own / base for own, base in turns):.2f}"


@torch.no_grad()
def methods(job: Job) -> None:
    """Each method by itself, against the base and against PEFT."""
    heads = [f"{b}×{n}: base ms | peftc ÷ base | PEFT ÷ base" for b, n in job.sizes]
    print(f"| method | trained | {' | '.join(heads)} |")
    print(f"|---|---|{'---|' * 3 * len(job.sizes)}", flush=True)
    base = plainly(loaded(job.base))
    generator = torch.Generator().manual_seed(1)
    for name, (method, form) in METHODS.items():
        if job.only and not any(word in name for word in job.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            program, count = randomized(peftc.Pipeline([method]).run(peftc.capture(job.base)))
            found = served(job.base, program, form, Path(folder))
            cells = [name, f"{count:,}"]
            for size in job.sizes:
                ids = torch.randint(4, 1000, size, generator=generator)
                ms = times({"base": base, **found}, ids, job)
                cells += [
                    f"{statistics.median(ms['base']):.1f}",
                    ratio(ms, "peftc"),
                    ratio(ms, "PEFT"),
                ]
        print(f"| {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def many(job: Job) -> None:
    """LoRAs r=8 on one base: one for the whole batch, and one for each row, beside PEFT."""
    heads = [f"{b}×{n}: base ms | peftc ÷ base | PEFT ÷ base" for b, n in job.sizes]
    print(f"| adapters | on | {' | '.join(heads)} |")
    print(f"|---|---|{'---|' * 3 * len(job.sizes)}", flush=True)
    base = plainly(loaded(job.base))
    plain = peftc.capture(job.base)
    generator = torch.Generator().manual_seed(1)
    for count in (1, 4, 16):
        names = [f"a{number}" for number in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                lora = peftc.Lora(rank=8, adapter=name)
                program = randomized(peftc.Pipeline([lora]).run(plain))[0]
                peftc.to_peft(program, Path(folder) / name)
            ours, theirs, adapters = both(job.base, Path(folder), names)
            for rows in (False, True)[: 1 + (count > 1)]:
                cells = [str(count), "a row each" if rows else "one for all"]
                for size in job.sizes:
                    if rows and size[0] == 1:
                        cells += [""] * 3
                        continue
                    chosen = [names[row % count] for row in range(size[0])]
                    adapters.use(chosen if rows else names[-1])
                    theirs.set_adapter(names[-1])
                    ids = torch.randint(4, 1000, size, generator=generator)
                    peer = plainly(theirs, adapter_names=chosen) if rows else plainly(theirs)
                    found = {"base": base, "peftc": plainly(ours), "PEFT": peer}
                    ms = times(found, ids, job)
                    middle = f"{statistics.median(ms['base']):.1f}"
                    cells += [middle, ratio(ms, "peftc"), ratio(ms, "PEFT")]
                print(f"| {' | '.join(cells)} |", flush=True)


def both(base: Path, folder: Path, names: Sequence[str]) -> tuple[Any, Any, peftc.Adapters]:
    """A base with several adapters, as peftc has it and as PEFT has it."""
    plain = peftc.capture(base)
    program = peftc.together(*(
        peftc.Pipeline([peftc.Attach(path=str(folder / name), adapter=name)]).run(plain)
        for name in names
    ))  # fmt: skip
    model = frozen(peftc.materialize(program))
    theirs: Any = None
    for name in names:
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(loaded(base), folder / name, adapter_name=name)
        else:
            theirs.load_adapter(folder / name, adapter_name=name)
    return model, frozen(theirs), peftc.Adapters(model, program)


# What is measured, by name: each prints a table of its own.
SECTIONS: dict[str, Callable[[Job], None]] = {"methods": methods, "many": many}


def random_llama(folder: Path) -> Path:
    """A small Llama of random weights."""
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1024, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    return folder / "base"


def size(text: str) -> tuple[int, int]:
    """`16x256`: batch and length."""
    batch, length = text.split("x")
    return int(batch), int(length)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=size, nargs="+", default=[(1, 128), (16, 256), (32, 512)])
    parser.add_argument("--rounds", type=int, default=30, help="at most, of each model")
    parser.add_argument("--seconds", type=float, default=20, help="a method may take at a size")
    parser.add_argument("--model", help="a checkpoint's directory, or SMOLLM2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", default=[], help="methods with such a name")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft|transformers")
    with tempfile.TemporaryDirectory() as folder:
        places = {None: lambda: random_llama(Path(folder)), "SMOLLM2": demo_checkpoint}
        base = places.get(given.model, lambda: Path(given.model))()
        config = transformers.AutoConfig.from_pretrained(base)
        print(
            f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size} "
            f"features, torch {torch.__version__}, {torch.get_num_threads()} threads, fp32\n"
        )
        job = Job(base, given.sizes, given.rounds, given.seconds, given.only)
        for section in given.sections:
            SECTIONS[section](job)
            print()


if __name__ == "__main__":
    main()
