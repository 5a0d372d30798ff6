"""Time and memory on checkpoints that are larger than this machine.

Makes a dense checkpoint of 405 billion parameters and a mixture of experts of a trillion (headers
real, data a hole in the file), and a LoRA for each, and prints what `inspect`, `plan` and a dry run
of an export take. With --real, merges checkpoints of these sizes on the disk, and checks samples of
what was written against W + s·B·A in fp32, rounded once.

    python -m benchmarks.scale
    python -m benchmarks.scale --real 4 16
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]
RANK, SEEN = 16, 64  # rows of each tensor that are no hole, with --real


def write(path: Path, names: Mapping[str, tuple[int, ...]], config: Any, per: int) -> int:
    """Writes a sparse checkpoint of so many tensors a shard; returns its bytes."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    keys, places, total = list(names), {}, 0
    shards = -(-len(keys) // per)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        chosen = {key: names[key] for key in keys[i * per : (i + 1) * per]}
        total += sparse(path / file, chosen)
        places |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def sparse(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """A safetensors file in bf16 whose data is a hole; returns the data's bytes."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        out.truncate(8 + len(raw) + end)
    return end


def model(
    kind: tuple[str, str], layers: int, hidden: int, vocab: int, inner: Shapes, **config: Any
) -> tuple[Shapes, dict[str, Any]]:
    """The shapes and the config of a decoder whose layers have these tensors."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in inner.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return shapes, {
        "architectures": [kind[0]], "model_type": kind[1], "hidden_size": hidden,
        "num_hidden_layers": layers, "vocab_size": vocab, "tie_word_embeddings": False,
        "dtype": "bfloat16", **config,
    }  # fmt: skip


def dense() -> tuple[Shapes, dict[str, Any], int]:
    """405 billion parameters in 190 shards, as Llama 3.1 has them."""
    hidden, inter = 16384, 53248
    inner: Shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (1024, hidden),
        "self_attn.v_proj": (1024, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }  # fmt: skip
    kind = ("LlamaForCausalLM", "llama")
    return *model(
        kind, 126, hidden, 128256, inner, intermediate_size=inter, num_attention_heads=128,
        num_key_value_heads=8, max_position_embeddings=131072,
    ), 6  # fmt: skip


def mixture() -> tuple[Shapes, dict[str, Any], int]:
    """1.3 trillion parameters: 88 layers of 384 experts, stored one by one, in 10,218 shards."""
    hidden, inter, experts = 6144, 2048, 384
    inner: Shapes = {
        "self_attn.q_proj": (8192, hidden), "self_attn.k_proj": (1024, hidden),
        "self_attn.v_proj": (1024, hidden), "self_attn.o_proj": (hidden, 8192),
        "self_attn.q_norm": (128,), "self_attn.k_norm": (128,), "mlp.gate": (experts, hidden),
    }  # fmt: skip
    for e in range(experts):
        inner[f"mlp.experts.{e}.gate_proj"] = inner[f"mlp.experts.{e}.up_proj"] = (inter, hidden)
        inner[f"mlp.experts.{e}.down_proj"] = (hidden, inter)
    kind = ("Qwen3MoeForCausalLM", "qwen3_moe")
    return *model(
        kind, 88, hidden, 151936, inner, intermediate_size=inter, moe_intermediate_size=inter,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, num_experts=experts,
        num_experts_per_tok=8,
    ), 10  # fmt: skip


def sparse_adapter(path: Path, base: Path, shapes: Shapes) -> None:
    """A LoRA on query and value that is a hole, too."""
    path.mkdir(parents=True)
    found: Shapes = {}
    for key, shape in shapes.items():
        if key.endswith(("q_proj.weight", "v_proj.weight")):
            name = "base_model.model." + key.removesuffix(".weight")
            found[f"{name}.lora_A.weight"] = (RANK, shape[1])
            found[f"{name}.lora_B.weight"] = (shape[0], RANK)
    sparse(path / "adapter_model.safetensors", found)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32,
              "target_modules": ["q_proj", "v_proj"],
              "base_model_name_or_path": str(base)}  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))


def timed(*command: object, dry: bool = False) -> tuple[float, float, float]:
    """Seconds of the wall clock and of the processor, and peak resident MB, of a peftc command.

    A child's peak counts what its parent held at the fork, so this process must stay small.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "peftc", *map(str, command)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) not in ((0, 1) if dry else (0,)):  # 1: it does not fit
        sys.exit(f"{command} failed:\n{errors.decode()[-2000:]}")
    spent = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - start, spent, usage.ru_maxrss * 1024 / 1e6


def on_paper(work: Path, only: list[str]) -> None:
    print("| checkpoint | command | seconds | of the processor | peak MB |")
    print("|---|---|---|---|---|", flush=True)
    makers: dict[str, Callable[[], Any]] = {"405B dense": dense, "1.3T mixture": mixture}
    for name, make in makers.items():
        shapes, config, per = make()
        base, adapter = work / "base", work / "adapter"
        size = write(base, shapes, config, per)
        files = len(list(base.glob("*.safetensors")))
        sparse_adapter(adapter, base, shapes)
        label = f"{name}, {size / 1e12:.2f} TB, {files:,} shards, {len(shapes):,} tensors"
        jobs: dict[str, list[object]] = {
            "inspect": ["inspect", base],
            "plan": ["plan", base, "-q"],
            "export": ["export", base, "-o", work / "out", "--merge", "--adapter", adapter,
                       "--dry-run", "-q"],
        }  # fmt: skip
        for job, command in jobs.items():
            if only and job not in only:
                continue
            for extra in ([], ["--json"]):
                shown = " ".join([job, *(["--dry-run"] if job == "export" else []), *extra])
                wall, spent, peak = timed(*command, *extra, dry=job == "export")
                print(
                    f"| {label} | `{shown}` | {wall:.1f} | {spent:.1f} | {peak:.0f} |", flush=True
                )
        shutil.rmtree(base)
        shutil.rmtree(adapter)


def real(work: Path, sizes: list[float]) -> None:
    import torch

    from benchmarks.merge import HIDDEN, INTER, LINEARS, VOCAB, make_adapter

    print("| merged | files | seconds | cores at work | peak MB | samples that differ |")
    print("|---|---|---|---|---|---|", flush=True)
    for size in sizes:
        base, adapter, out = work / "base", work / "adapter", work / "out"
        per_layer = sum(a * b for a, b in LINEARS.values()) * 2
        layers = max(1, round((size * 1e9 - 4 * VOCAB * HIDDEN) / per_layer))
        shapes, config = model(
            ("LlamaForCausalLM", "llama"), layers, HIDDEN, VOCAB, dict(LINEARS),
            intermediate_size=INTER, num_attention_heads=32,
            num_key_value_heads=32,
        )  # fmt: skip
        written = write(base, shapes, config, 36)
        touch(base)
        make_adapter(adapter, base, layers, list(LINEARS))
        command = ["export", base, "-o", out, "--merge", "--adapter", adapter, "-q"]
        wall, spent, peak = timed(*command)
        files = len(list(out.glob("*.safetensors")))
        differ = sampled(base, adapter, out)
        cells = (f"{written / 1e9:.2f} GB", files, f"{wall:.1f}", f"{spent / wall:.2f}",
                 f"{peak:.0f}", differ)  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        for folder in (base, adapter, out):
            shutil.rmtree(folder)
    print(f"\ntorch {torch.__version__}")


def touch(base: Path) -> None:
    """Fills some rows of every matrix, each at another place, with random numbers."""
    import torch

    from peftc.checkpoint import Checkpoint

    generator = torch.Generator().manual_seed(0)
    for ref in Checkpoint.open(base).tensors.values():
        if len(ref.shape) == 2:
            low = place(ref.name, ref.shape[0])
            rows = torch.randn(SEEN, ref.shape[1], generator=generator).mul_(0.02).bfloat16()
            with ref.file.open("r+b") as file:
                file.seek(ref.start + low * 2 * ref.shape[1])
                file.write(rows.view(torch.uint8).numpy().tobytes())


def place(name: str, rows: int) -> int:
    """The first of a tensor's rows that are no hole."""
    return sum(name.encode()) * 7919 % (rows - SEEN)


def sampled(base: Path, adapter: Path, out: Path) -> str:
    """How many elements of the sampled rows are not what they should be."""
    import torch
    from safetensors.torch import load_file

    from peftc.checkpoint import Checkpoint
    from peftc.constants import Leaf
    from peftc.reading import read

    old, new = Checkpoint.open(base).tensors, Checkpoint.open(out).tensors
    lora = load_file(adapter / "adapter_model.safetensors")
    wrong = total = 0
    for name, ref in old.items():
        if len(ref.shape) < 2:
            continue
        for low in (0, place(name, ref.shape[0]), ref.shape[0] - SEEN):
            want = read(Leaf(ref), low, low + SEEN)
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{key}A.weight" in lora:
                a, b = lora[f"{key}A.weight"], lora[f"{key}B.weight"][low : low + SEEN]
                want = (want.float() + (b @ a) * 2.0).bfloat16()
            got = read(Leaf(new[name]), low, low + SEEN)
            wrong += int((got.view(torch.int16) != want.view(torch.int16)).sum())
            total += want.numel()
    return f"{wrong} of {total:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=float, nargs="+", metavar="GB", help="merge these instead")
    parser.add_argument("--only", nargs="+", default=[], choices=["inspect", "plan", "export"])
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="peftc-scale-", dir=args.dir))
    os.environ["PEFTC_CACHE"] = str(work / "cache")  # so that no outline is known before
    print(f"{os.cpu_count()} cores\n")
    try:
        if args.real:
            real(work, args.real)
        else:
            on_paper(work, args.only)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
