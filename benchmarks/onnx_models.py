"""SmolLM2-135M with a LoRA merged, as ONNX: peftc beside onnxruntime-genai's builder and torch.

Export: seconds of the whole process, start and imports included, and its peak resident memory.
Answers: of a text's tokens, the logits in plain onnxruntime beside those of peftc's fp32 graph.
Speed: onnxruntime-genai on every model in turn, one thread, medians; a prefill, then tokens decoded
one by one; PEFT unmerged in eager torch likewise.

    python benchmarks/onnx_models.py [--rounds 3] [--exports 1] [--prefill 128] [--slow]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import merge
import numpy as np

TEXT_TOKENS = 256

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


EAGER = """
import json, sys, time, torch, peft
from transformers import AutoModelForCausalLM
base, adapter, prefill, decode = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
model = peft.PeftModel.from_pretrained(model, adapter).eval()
@torch.no_grad()
def once():
    ids = torch.tensor([[(7 * i) % 4000 + 20 for i in range(prefill)]])
    start = time.perf_counter()
    cache = None
    for step in range(decode + 1):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        if step == 0:
            middle = time.perf_counter()
    return middle - start, (time.perf_counter() - middle) / decode
once()
print(json.dumps(once()))
"""
ANSWERS = """
import json, sys
import numpy as np, onnxruntime
from transformers import AutoTokenizer
folder, tokens, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
text = open("docs/architecture.md").read()
ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="np")["input_ids"][:, :tokens]
session = onnxruntime.InferenceSession(folder + "/model.onnx")
heads = json.load(open(folder + "/genai_config.json"))["model"]["decoder"]
given = {"input_ids": ids.astype(np.int64), "attention_mask": np.ones(ids.shape, np.int64)}
for port in session.get_inputs():
    if port.name == "position_ids":
        given[port.name] = np.arange(ids.shape[1])[None]
    elif port.name.startswith("past"):
        shape = 1, heads["num_key_value_heads"], 0, heads["head_size"]
        given[port.name] = np.zeros(shape, np.float32)
np.save(out, session.run(["logits"], given)[0][0])
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


def ran(command: list[str]) -> list[float]:
    """Seconds of a prefill, and of a token behind it."""
    done = subprocess.run(command, capture_output=True, check=True)
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def answers(folder: Path) -> np.ndarray[Any, Any]:
    """Log-probabilities (tokens, vocabulary)."""
    file = folder / "logits.npy"
    subprocess.run(script(ANSWERS, folder, TEXT_TOKENS, file), capture_output=True, check=True)
    logits = np.load(file)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3, help="of the speeds")
    arguments.add_argument("--exports", type=int, default=1, help="rounds of the exports")
    arguments.add_argument("--prefill", type=int, default=128)
    arguments.add_argument("--decode", type=int, default=32)
    arguments.add_argument("--slow", action="store_true", help="torch.onnx.export too (minutes)")
    given = arguments.parse_args()
    from peftc.demo_model import demo_checkpoint

    base = demo_checkpoint("float32")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        adapter, merged, nf4 = work / "adapter", work / "merged", work / "nf4"
        merge.timed(script(ADAPTER, base, adapter), work / "none")
        merging = script(PEFT_MERGE, base, adapter, merged)
        peftc = [sys.executable, "-m", "peftc"]
        export = [*peftc, "export", "--format", "onnx", "-q"]
        ours = [*export, str(base), "--merge", "--adapter", str(adapter)]
        in_nf4 = [*peftc, "apply", str(merged), "-q", "--overwrite", "-o", str(nf4), "nf4"]
        outs: dict[str, Path] = {}
        jobs: dict[str, list[str]] = {}

        def add(label: str, *command: str) -> None:
            outs[label] = work / f"out-{len(outs)}"
            jobs[label] = [*command, "-o", str(outs[label])]

        def build(precision: str) -> list[str]:
            module = "onnxruntime_genai.models.builder"
            where = ["-i", str(merged), "-c", str(work / "cache")]
            return [sys.executable, "-m", module, *where, "-p", precision, "-e", "cpu"]

        sites = "--proof", "sites"
        add("peftc", *ours, *sites)
        add("peftc, proven", *ours)
        add("peftc, cache shared", *ours, *sites, "--cache", "shared")
        add("builder fp32", *build("fp32"))
        add("peftc int8", *ours, *sites, "--weights", "int8")
        add("peftc int4", *ours, *sites, "--weights", "int4")
        quick = "--head-bits", "4", "--cache", "shared"
        add("peftc int4, head 4, shared", *ours, *sites, "--weights", "int4", *quick)
        add("builder int4", *build("int4"))
        add("peftc nf4", *export, str(nf4), *sites)
        add("peftc nf4-int8", *export, str(nf4), *sites, "--weights", "nf4-int8")
        for label in jobs:
            if label.startswith("builder"):
                jobs[label] = chained(merging, jobs[label])
            elif label == "peftc nf4":
                jobs[label] = chained(in_nf4, jobs[label])
        if given.slow:
            outs["torch.onnx.export"] = work / "torch"
            jobs["torch.onnx.export"] = chained(
                merging, ["mkdir", "-p", str(work / "torch")],
                script(TORCH_EXPORT, merged, work / "torch"),
            )  # fmt: skip
        print("| export | seconds | peak GB | MB |\n|---|---|---|---|")
        for label, command in jobs.items():
            rounds = 1 if label.startswith("torch") else given.exports
            turns = [merge.timed(command, outs[label]) for _ in range(rounds)]
            seconds, peak = (statistics.median(column) for column in zip(*turns, strict=True))
            print(f"| {label} | {seconds:.1f} | {peak:.2f} | {size(outs[label]):.0f} |", flush=True)
        models = {k: v for k, v in outs.items() if k not in ("peftc, proven", "torch.onnx.export")}
        commands = {k: script(SPEED, v, given.prefill, given.decode) for k, v in models.items()}
        commands["PEFT, eager"] = script(EAGER, base, adapter, given.prefill, given.decode)
        seen: dict[str, list[list[float]]] = {label: [] for label in commands}
        for _ in range(given.rounds):
            for label, command in commands.items():
                seen[label].append(ran(command))
        speeds = {}
        for label, runs in seen.items():
            prefill, token = (statistics.median(column) for column in zip(*runs, strict=True))
            speeds[label] = given.prefill / prefill, 1 / token
        right = answers(outs["peftc"])
        titles = f"| model | prefill of {given.prefill}, tokens/s | ÷ builder | decode, tokens/s | "
        print(f"\n{titles}÷ builder | KL to fp32 | same token |\n|---|---|---|---|---|---|---|")
        for label, own in speeds.items():
            peer = speeds["builder int4" if "int" in label or "nf4" in label else "builder fp32"]
            line = [f"{mine:.{i}f} | {mine / its:.2f}" for i, (mine, its) in enumerate(
                zip(own, peer, strict=True))]  # fmt: skip
            if label in models:
                got = answers(models[label])
                kl = (np.exp(right) * (right - got)).sum(-1).mean()
                line += [f"{kl:.4f}", f"{(right.argmax(-1) == got.argmax(-1)).mean():.1%}"]
            print(f"| {' | '.join([label, *line])} |", flush=True)


if __name__ == "__main__":
    main()
