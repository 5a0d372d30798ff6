"""SmolLM2-135M with a LoRA of rank 16 on all linear layers: peftc's compiled models beside PEFT.

Each contender is a process of its own in every round: seconds from its start to the first token of
a prompt, then prefill and decode of the same prompt again, and its peak resident memory.

    python benchmarks/compiled.py --rounds 3 [--threads 1] [--compile] [--keep DIR]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import merge
from onnx_models import ADAPTER, script

PREFILL, DECODE = 128, 32

COMMON = """
import time
begun = time.perf_counter()
import json, resource, sys
from pathlib import Path
import torch
folder, adapter, prefill, decode, threads = sys.argv[1:6]
torch.set_num_threads(int(threads))
prefill, decode = int(prefill), int(decode)
ids = torch.tensor([[(7 * i) % 4000 + 20 for i in range(prefill)]])
"""
EAGER = """
@torch.no_grad()
def tokens():
    out = model(input_ids=ids, use_cache=True)
    while True:
        now = out.logits[:, -1:].argmax(-1)
        yield now
        out = model(input_ids=now, past_key_values=out.past_key_values, use_cache=True)
"""
MODELS = {
    "eager PEFT": """
import peft, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
model = peft.PeftModel.from_pretrained(model, adapter).eval()
""" + EAGER,
    "torch.compile of PEFT": """
import peft, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
model = peft.PeftModel.from_pretrained(model, adapter).eval()
model = torch.compile(model, dynamic=True)
""" + EAGER,
    "peftc eager": """
import peftc
program = peftc.Pipeline([peftc.Attach(path=adapter)]).run(peftc.capture(folder))
model = peftc.materialize(program)
""" + EAGER,
    "peftc eager, merged": """
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
""" + EAGER,
    "peftc pt2": """
import peftc.runtime
runtime = peftc.runtime.load(folder)
if adapter != "None":
    runtime.swap(adapter)
def tokens():
    return runtime.stream(ids, decode + 1, stop=[])
""",
}  # fmt: skip
MEASURE = """
def once():
    start = time.perf_counter()
    made = tokens()
    seen = [int(next(made))]
    middle = time.perf_counter()
    for _ in range(decode):
        seen.append(int(next(made)))
    return seen, middle - start, (time.perf_counter() - middle) / decode
next(tokens())
first = time.perf_counter() - begun
once()
seen, before, each = once()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps([first, before, each, peak, seen]))
"""


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    arguments.add_argument("--keep", type=Path, help="where compiled models are, or are to be")
    given = arguments.parse_args()
    from peftc.demo_model import demo_checkpoint

    base = demo_checkpoint("float32")
    with tempfile.TemporaryDirectory() as name:
        work = given.keep or Path(name)
        adapter, merged, swapped = work / "adapter", work / "merged", work / "swapped"
        work.mkdir(exist_ok=True)
        if not adapter.exists():
            merge.timed(script(ADAPTER, base, adapter), work / "none")
        export = [sys.executable, "-m", "peftc", "export", str(base), "--adapter", str(adapter),
                  "--format", "pt2", "--proof", "sites", "-q", "-o"]  # fmt: skip
        for out, option in ((merged, ["--merge"]), (swapped, ["--adapters", "swap"])):
            if not out.exists():
                subprocess.run([*export, str(out), *option], check=True)
        contenders = [
            ("eager PEFT", "eager PEFT", base, adapter),
            ("peftc eager", "peftc eager", base, adapter),
            ("peftc pt2, adapter swapped in", "peftc pt2", swapped, adapter),
            ("peftc eager, merged", "peftc eager, merged", merged, None),
            ("peftc pt2, merged", "peftc pt2", merged, None),
        ]
        if given.compile:
            contenders.insert(1, ("torch.compile of PEFT",) * 2 + (base, adapter))
        found: dict[str, list[list[float]]] = {label: [] for label, *_ in contenders}
        texts: dict[str, list[int]] = {}
        for _ in range(given.rounds):
            for label, kind, folder, lora in contenders:
                code = COMMON + MODELS[kind] + MEASURE
                command = script(code, folder, lora, PREFILL, DECODE, given.threads)
                done = subprocess.run(command, capture_output=True, check=True, text=True)
                *figures, texts[label] = json.loads(done.stdout.splitlines()[-1])
                found[label].append(figures)
    reference = [statistics.median(column) for column in zip(*found["eager PEFT"], strict=True)]
    print(f"{given.threads} threads, medians of {given.rounds} rounds\n")
    print("| | first token s | prefill tok/s | × | decode tok/s | × | peak GB | same text |")
    print("|---|---|---|---|---|---|---|---|")
    for label, rows in found.items():
        first, before, each, peak = (statistics.median(c) for c in zip(*rows, strict=True))
        print(
            f"| {label} | {first:.1f} | {PREFILL / before:.0f} | {reference[1] / before:.2f} | "
            f"{1 / each:.1f} | {reference[2] / each:.2f} | {peak:.2f} | "
            f"{texts[label] == texts['eager PEFT']} |"
        )


if __name__ == "__main__":
    main()
