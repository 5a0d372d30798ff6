"""Merging LoRA into a sharded bf16 checkpoint: `cp` + fsync, PEFT and peftc, side by side.

Makes Llama-shaped checkpoints of random weights on the spot, merges a rank-16 adapter on q and v
and one on all linears, and prints wall time (of the whole process, start and imports included),
peak resident memory, ratios, and how many elements differ from the fp32 result rounded once.

    python benchmarks/merge.py --sizes 4 8 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

HIDDEN, INTER, VOCAB, RANK = 4096, 11008, 32000, 16
SHARD = 2 << 30
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTER, HIDDEN), "mlp.up_proj": (INTER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTER),
}  # fmt: skip
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def make_checkpoint(path: Path, gigabytes: float) -> int:
    """Writes a checkpoint of about that size; returns its number of layers."""
    per_layer = sum(a * b for a, b in LINEARS.values()) * 2
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / per_layer))
    path.mkdir(parents=True)
    pool = torch.randn(INTER * HIDDEN * 2, generator=torch.Generator().manual_seed(0)) * 0.02
    pool = pool.bfloat16()
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN),
              "model.norm.weight": (HIDDEN,)}  # fmt: skip
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LINEARS.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (HIDDEN,)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if filled + size > SHARD:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    weight_map, total = {}, 0
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name in names:
            count, start = torch.Size(shapes[name]).numel(), 4099 * (len(weight_map) % 997)
            values = pool if start + count <= len(pool) else pool.repeat(2)
            tensors[name] = values[start : start + count].view(shapes[name]).clone()
            weight_map[name], total = file, total + 2 * count
        save_file(tensors, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTER, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": VOCAB, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return layers


def make_adapter(path: Path, base: Path, layers: int, targets: list[str]) -> None:
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for i in range(layers):
        for name in targets:
            out, inner = LINEARS[name]
            key = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32,
              "target_modules": sorted({t.rsplit(".", 1)[-1] for t in targets}),
              "base_model_name_or_path": str(base)}  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))


def timed(command: list[str], out: Path) -> tuple[float, float]:
    """Wall seconds and peak resident GB of a process that writes `out`."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{command[:4]} failed:\n{errors.decode()[-2000:]}")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def wrong_elements(base: Path, adapter: Path, merged: Path) -> tuple[int, int]:
    """How many merged elements are not W + 2·B·A in fp32, rounded once; and of how many."""
    wrong = total = 0
    with safe_open(adapter / "adapter_model.safetensors", "pt") as lora:
        names = set(lora.keys())
        for file in sorted(base.glob("*.safetensors")):
            with safe_open(file, "pt") as old, safe_open(merged / file.name, "pt") as new:
                for name in old.keys():  # noqa: SIM118
                    want = old.get_tensor(name)
                    key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
                    if f"{key}A.weight" in names:
                        a, b = (lora.get_tensor(f"{key}{part}.weight") for part in "AB")
                        want = (want.float() + (b @ a) * 2.0).bfloat16()
                    got = new.get_tensor(name)
                    wrong += int((got.view(torch.int16) != want.view(torch.int16)).sum())
                    total += want.numel()
    return wrong, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[4, 8], help="GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peft-rounds", type=int, default=1)
    parser.add_argument(
        "--dir", type=Path, default=None, help="where to work; default: a temporary"
    )
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="peftc-bench-", dir=args.dir))
    print(f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, medians of "
          f"{args.rounds} rounds (PEFT: {args.peft_rounds})\n")  # fmt: skip
    print("| checkpoint | job | seconds | × cp | peak GB | wrong elements |")
    print("|---|---|---|---|---|---|", flush=True)
    try:
        for size in args.sizes:
            measure(work, size, args.rounds, args.peft_rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def apart(job: str, arguments: Any) -> Any:
    """Runs a memory-hungry job in a process of its own.

    A child's peak memory counts what its parent held at the fork, so this process must stay small.
    """
    command = [sys.executable, __file__, f"--job-{job}", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def work_apart(job: str, arguments: Any) -> None:
    """The other side of `apart`."""
    if job == "--job-make":
        layers = make_checkpoint(Path(arguments["base"]), arguments["size"])
        for path, targets in arguments["adapters"].items():
            make_adapter(Path(path), Path(arguments["base"]), layers, targets)
        print(layers)
    else:
        print(json.dumps(wrong_elements(*map(Path, arguments))))


def measure(work: Path, size: float, rounds: int, peft_rounds: int) -> None:
    base, out = work / "base", work / "out"
    chosen = {"q,v": ["self_attn.q_proj", "self_attn.v_proj"], "all linears": list(LINEARS)}
    adapters = {str(work / name): targets for name, targets in chosen.items()}
    apart("make", {"base": str(base), "size": size, "adapters": adapters})
    copy = f"mkdir '{out}' && cp --reflink=never '{base}'/* '{out}' && sync '{out}'/*"
    peftc = [sys.executable, "-m", "peftc", "export", str(base), "-o", str(out), "--merge", "-q"]
    jobs = {"cp + fsync": (["sh", "-c", copy], rounds)}
    for name in chosen:
        jobs[f"peftc, {name}"] = ([*peftc, "--adapter", str(work / name)], rounds)
    for name in chosen:
        merge = shlex.join([sys.executable, "-c", PEFT, str(base), str(work / name), str(out)])
        jobs[f"PEFT + fsync, {name}"] = (["sh", "-c", f"{merge} && sync '{out}'/*"], peft_rounds)
    jobs["peftc inspect"] = ([sys.executable, "-m", "peftc", "inspect", str(base)], rounds)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    checked = {}
    for turn in range(max(rounds, peft_rounds)):
        for name, (command, count) in jobs.items():
            if turn < count:
                seen[name].append(timed(command, out))
                if turn == 0 and name.startswith("peftc,"):
                    adapter = work / name.split(", ")[1]
                    wrong, total = apart("check", [str(base), str(adapter), str(out)])
                    checked[name] = f"{wrong} of {total:,}"
    bytes_ = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    reference = statistics.median(s for s, _ in seen["cp + fsync"])
    for name, figures in seen.items():
        if not figures:
            continue
        seconds = statistics.median(s for s, _ in figures)
        peak = max(p for _, p in figures)
        print(f"| {bytes_ / 1e9:.2f} GB | {name} | {seconds:.1f} | {seconds / reference:.2f} | "
              f"{peak:.2f} | {checked.get(name, '')} |", flush=True)  # fmt: skip
    shutil.rmtree(base)
    for name in chosen:
        shutil.rmtree(work / name)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].startswith("--job-"):
        work_apart(sys.argv[1], json.loads(sys.argv[2]))
    else:
        main()
