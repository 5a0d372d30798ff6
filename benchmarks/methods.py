"""Methods side by side: what they train, what a step takes, what they learn, what they cost to run.

For each method, by peftc and by PEFT where that has it, in a process of its own: the share of
parameters that is trained, the peak of the process's memory, seconds a step, and the loss before
the first step and behind the last, from the same start values (but for virtual tokens) on the same
rows of a real text (`pydoc_data.topics` of Python's own library). PEFT's loss of AdaLoRA has the
regularizer in it. Then the latency of a forward pass against the base, unmerged and merged, at the
sizes of table 1 of the LoRA paper.

    python benchmarks/methods.py                              SmolLM2-135M, 10 steps, an hour or so
    python benchmarks/methods.py --steps 3 --only "r=8" IA3 --sizes 1x128
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from adapters import Job, frozen, loaded, plainly, randomized, ratio, size, times
from transformers.utils import logging

import peftc
from peftc.demo_model import demo_checkpoint
from peftc.memory import peak, reset_peak

BATCH, LENGTH = 4, 128
# The passes of each method; what comes before its own is done to the base.
METHODS: dict[str, list[peftc.Pass]] = {
    "full fine-tuning": [peftc.Full(targets=".*")],
    "LoRA r=8": [peftc.Lora(rank=8)],
    "LoRA r=64": [peftc.Lora(rank=64)],
    "QLoRA r=64": [peftc.Nf4(), peftc.Lora(rank=64)],
    "AdaLoRA r=12→8": [peftc.AdaLora()],
    "bottleneck, Houlsby": [peftc.Bottleneck(preset="houlsby")],
    "bottleneck, Pfeiffer": [peftc.Bottleneck(preset="pfeiffer")],
    "prefix, 20 tokens": [peftc.PrefixTuning()],
    "prompt, 20 tokens": [peftc.PromptTuning()],
    "P-tuning, 20 tokens": [peftc.PTuning()],
    "BitFit": [peftc.BitFit()],
}
OURS_ALONE = ("full", "bottleneck", "BitFit")  # what PEFT does not have, by the names' beginnings


def rows(base: Path, steps: int) -> torch.Tensor:
    """A real text as token ids (steps, batch, length)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    text = "\n".join(pydoc_data.topics.topics.values())
    need = steps * BATCH * LENGTH
    ids = tokenizer(text[: 12 * need], return_tensors="pt")["input_ids"][0]
    return ids[:need].view(steps, BATCH, LENGTH)


def live(by: str, base: Path, applied: Path, name: str, steps: int) -> tuple[Any, Any]:
    """A model to train, and what its method does beside each step, if anything."""
    if by == "peftc":  # not from the directory, which has no encoder of P-tuning any more
        program = peftc.Pipeline(METHODS[name]).run(peftc.capture(base))
        model = peftc.materialize(program)
        return model, peftc.schedule(program, model, steps)
    if by == "base":
        return loaded(base).requires_grad_(True), None
    own = applied / "base"
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        own if own.is_dir() else base, dtype=torch.float32
    )
    config = peft.PeftConfig.from_pretrained(applied / "adapter")
    if config.is_prompt_learning:  # which PEFT does not train once it is saved: from its own start
        config.inference_mode = False
        return peft.get_peft_model(plain, config), None
    return peft.PeftModel.from_pretrained(plain, applied / "adapter", is_trainable=True), None


def child(by: str, base: Path, applied: Path, name: str, steps: int) -> dict[str, Any]:
    """Trains, and tells what that took."""
    model, extra = live(by, base, applied, name, steps)
    model.train()
    model.config.use_cache = False
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4 if by == "base" else 1e-3)
    losses, seconds = [], []
    data = rows(base, steps)
    reset_peak()
    for number, ids in enumerate(data, 1):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        added = extra.loss(model) if extra is not None else None
        (loss if added is None else loss + added).backward()
        optimizer.step()
        if extra is not None:
            extra.step(model, number)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    most = peak(torch.device("cpu"))
    model.eval()
    with torch.no_grad():
        behind = float(model(input_ids=data[0], labels=data[0]).loss)
    return {
        "trained": sum(p.numel() for p in trained),
        "peak": most,
        "step": statistics.median(seconds[1:] or seconds),
        "before": losses[0],
        "behind": behind,
    }


def training(base: Path, steps: int, only: Sequence[str]) -> None:
    """The first table: trained share, memory, time and loss."""
    total = sum(p.numel() for p in loaded(base).parameters())
    print(f"| method | by | trained | peak MB | s a step | loss before | behind {steps} steps |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, passes in METHODS.items():
        if only and not any(word in name for word in only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            applied = Path(folder) / "applied"
            whole = name.startswith("full")
            try:
                if not whole:
                    peftc.apply(base, passes, applied)
            except peftc.PeftcError as error:
                print(f"| {name} | peftc | {str(error).splitlines()[0]} | | | | |", flush=True)
                continue
            sides = ["base"] if whole else ["peftc", "PEFT"]
            for by in sides[: 1 if name.startswith(OURS_ALONE) else None]:
                command = [sys.executable, __file__, "--child", by, str(base), str(applied), name]
                done = subprocess.run(
                    [*command, "--steps", str(steps)], stdout=subprocess.PIPE, text=True, check=True
                )
                seen = json.loads(done.stdout.splitlines()[-1])
                cells = [
                    name,
                    "torch" if whole else by,
                    f"{seen['trained'] / total:.3%}",
                    f"{seen['peak'] / 1e6:,.0f}",
                    f"{seen['step']:.2f}",
                    f"{seen['before']:.3f}",
                    f"{seen['behind']:.3f}",
                ]
                print(f"| {' | '.join(cells)} |", flush=True)
    print()


@torch.no_grad()
def latency(job: Job) -> None:
    """The second table: a forward pass against the base's."""
    heads = [f"{b}×{n}: base ms | unmerged ÷ | merged ÷ | PEFT ÷" for b, n in job.sizes]
    print(f"| method | {' | '.join(heads)} |")
    print(f"|---|{'---|' * 4 * len(job.sizes)}", flush=True)
    base = plainly(loaded(job.base))
    generator = torch.Generator().manual_seed(1)
    for name, passes in METHODS.items():
        if name.startswith("full") or (job.only and not any(word in name for word in job.only)):
            continue
        try:
            program, _ = randomized(peftc.Pipeline(passes).run(peftc.capture(job.base)))
        except peftc.PeftcError:
            continue  # which the first table tells
        found = {"base": base, "peftc": plainly(frozen(peftc.materialize(program)))}
        try:
            merged = peftc.Pipeline([peftc.Merge()]).run(program)
            found["merged"] = plainly(frozen(peftc.materialize(merged)))
        except peftc.PeftcError:
            pass  # it does not merge
        with tempfile.TemporaryDirectory() as folder:
            if not name.startswith((*OURS_ALONE, "QLoRA")):
                peftc.to_peft(program, Path(folder) / "adapter")
                theirs: Any = peft.PeftModel.from_pretrained(
                    loaded(job.base), Path(folder) / "adapter"
                )
                found["PEFT"] = plainly(frozen(theirs))
            cells = [name]
            for extent in job.sizes:
                ms = times(found, torch.randint(4, 1000, extent, generator=generator), job)
                cells.append(f"{statistics.median(ms['base']):.1f}")
                cells += [ratio(ms, side) for side in ("peftc", "merged", "PEFT")]
        print(f"| {' | '.join(cells)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint's directory; default: SmolLM2")
    parser.add_argument("--steps", type=int, default=10, help="0: latency alone")
    parser.add_argument("--only", nargs="+", default=[], help="methods with such a name")
    parser.add_argument("--sizes", type=size, nargs="*", default=[(1, 128), (16, 256), (32, 512)])
    parser.add_argument("--rounds", type=int, default=10, help="at most, of each model")
    parser.add_argument("--seconds", type=float, default=20, help="a method may take at a size")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    if given.child:
        by, base, applied, name = given.child
        torch.manual_seed(0)
        print(json.dumps(child(by, Path(base), Path(applied), name, given.steps)))
        return
    base = given.model or demo_checkpoint()
    print(
        f"{base.name}, rows of {BATCH}×{LENGTH} tokens, fp32, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads\n"
    )
    if given.steps:
        training(base, given.steps, given.only)
    if given.sizes:
        latency(Job(base, given.sizes, given.rounds, given.seconds, given.only))


if __name__ == "__main__":
    main()
