"""SmolLM2-135M with a LoRA merged, as ONNX: peftc beside onnxruntime-genai's builder and torch.

Export: seconds of the whole process, start and imports included, and its peak resident memory.
Speed: onnxruntime-genai on every model in turn, one thread, medians; prefill of 128 tokens, then 32
tokens decoded one by one.

    python benchmarks/onnx_models.py --rounds 3 [--slow]
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

PREFILL, DECODE = 128, 32

ADAPTER = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
wrapped = peft.get_peft_model(model, config)
torch.manual_seed(0)
for name, parameter in wrapped.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.01)
wrapped.save_pretrained(sys.argv[2])
"""
PEFT_MERGE = """
import sys, torch, peft
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""
TORCH_EXPORT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
model.config.use_cache = False
ids = torch.ones(2, 7, dtype=torch.int64)
batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
shapes = {"input_ids": {0: batch, 1: sequence}, "attention_mask": {0: batch, 1: sequence}}
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
torch.onnx.export(
    model, (), sys.argv[2] + "/model.onnx", kwargs=inputs, dynamic_shapes=shapes, dynamo=True
)
"""
SPEED = """
import json, sys, time
import onnxruntime_genai as og
folder, prefill, decode = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = og.Config(folder)
config.overlay(json.dumps(
    {"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}
))
model = og.Model(config)
def once():
    options = og.GeneratorParams(model)
    length = prefill + decode + 1
    options.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, options)
    start = time.perf_counter()
    generator.append_tokens([(7 * i) % 4000 + 20 for i in range(prefill)])
    generator.generate_next_token()
    middle = time.perf_counter()
    for _ in range(decode):
        generator.generate_next_token()
    return middle - start, (time.perf_counter() - middle) / decode
once()
print(json.dumps(once()))
"""


def script(code: str, *args: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, args)]


def chained(*commands: list[str]) -> list[str]:
    """One process that runs commands one after the other; its peak is the largest of theirs."""
    run = "import subprocess, json, sys\nfor c in json.loads(sys.argv[1]):\n    "
    run += "subprocess.run(c, check=True)"
    return script(run, json.dumps(commands))


def size(folder: Path) -> float:
    """Megabytes of graphs and weights."""
    files = (f for f in folder.rglob("*") if ".onnx" in f.name or ".safetensors" in f.name)
    return sum(file.stat().st_size for file in files) / 1e6


def speed(folder: Path) -> list[float]:
    """Seconds of a prefill, and of a token behind it."""
    done = subprocess.run(script(SPEED, folder, PREFILL, DECODE), capture_output=True, check=True)
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--slow", action="store_true", help="torch.onnx.export too (minutes)")
    given = arguments.parse_args()
    from peftc.demo_model import demo_checkpoint

    base = demo_checkpoint("float32")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        adapter, merged = work / "adapter", work / "merged"
        merge.timed(script(ADAPTER, base, adapter), work / "none")
        merging = script(PEFT_MERGE, base, adapter, merged)

        def peftc(*more: str) -> list[str]:
            return [sys.executable, "-m", "peftc", "export", str(base), "--merge", "--adapter",
                    str(adapter), "--format", "onnx", "-q", *more]  # fmt: skip

        def builder(precision: str, out: Path) -> list[str]:
            module = "onnxruntime_genai.models.builder"
            where = ["-i", str(merged), "-o", str(out), "-c", str(work / "cache")]
            build = [sys.executable, "-m", module, *where, "-p", precision, "-e", "cpu"]
            return chained(merging, build)

        outs = {label: work / label.replace(" ", "-") for label in (
            "peftc", "peftc, proven", "builder fp32", "peftc int4", "builder int4")}  # fmt: skip
        jobs = {
            "peftc": [*peftc("--proof", "sites"), "-o", str(outs["peftc"])],
            "peftc, proven": [*peftc(), "-o", str(outs["peftc, proven"])],
            "builder fp32": builder("fp32", outs["builder fp32"]),
            "peftc int4": [*peftc("--weights", "int4", "--proof", "sites"), "-o",
                           str(outs["peftc int4"])],
            "builder int4": builder("int4", outs["builder int4"]),
        }  # fmt: skip
        if given.slow:
            outs["torch.onnx.export"] = work / "torch"
            jobs["torch.onnx.export"] = chained(
                merging, ["mkdir", "-p", str(outs["torch.onnx.export"])],
                script(TORCH_EXPORT, merged, outs["torch.onnx.export"]),
            )  # fmt: skip
        print("| export | seconds | peak GB | MB |\n|---|---|---|---|")
        for label, command in jobs.items():
            rounds = 1 if label.startswith("torch") else given.rounds
            turns = [merge.timed(command, outs[label]) for _ in range(rounds)]
            seconds, peak = (statistics.median(column) for column in zip(*turns, strict=True))
            print(f"| {label} | {seconds:.1f} | {peak:.2f} | {size(outs[label]):.0f} |", flush=True)
        ran = [label for label in jobs if label not in ("peftc, proven", "torch.onnx.export")]
        seen: dict[str, list[list[float]]] = {label: [] for label in ran}
        for _ in range(given.rounds):
            for label in ran:
                seen[label].append(speed(outs[label]))
        print(f"\n| model | prefill of {PREFILL}, tokens/s | decode, tokens/s |\n|---|---|---|")
        for label, turns_ in seen.items():
            prefill, decode = (statistics.median(column) for column in zip(*turns_, strict=True))
            print(f"| {label} | {PREFILL / prefill:.0f} | {1 / decode:.1f} |")


if __name__ == "__main__":
    main()
