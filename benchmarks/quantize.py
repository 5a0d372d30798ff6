"""Quantizing a sharded bf16 checkpoint to NF4 while it streams, beside `cp` + fsync.

Makes a Llama-shaped checkpoint of random weights on the spot and prints wall time (of the whole
process, start and imports included), the rate over the bytes read, peak resident memory, and how
many bytes of the written codes differ from the reference's.

    python benchmarks/quantize.py --sizes 4 8 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import merge
import torch
from safetensors import safe_open

CHECKED = 3  # layers whose codes are compared


def wrong_bytes(base: Path, written: Path) -> tuple[int, int]:
    """How many bytes of codes differ from the reference's, of some layers; and of how many."""
    from peftc.kernels import nf4

    wrong = total = 0
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as old, safe_open(written / file.name, "pt") as new:
            names = [name for name in old.keys() if "_proj" in name]  # noqa: SIM118
            for name in names[:CHECKED]:
                codes, absmax = nf4.quantize(old.get_tensor(name))
                got = new.get_tensor(name)
                wrong += int((got != codes).sum())
                if new.get_tensor(f"{name}.absmax").dtype == torch.float32:
                    wrong += int((new.get_tensor(f"{name}.absmax") != absmax).sum())
                total += codes.numel()
    return wrong, total


def measure(work: Path, size: float, rounds: int) -> None:
    base, out = work / "base", work / "out"
    merge.apart("make", {"base": str(base), "size": size, "adapters": {}})
    copy = f"mkdir '{out}' && cp --reflink=never '{base}'/* '{out}' && sync '{out}'/*"
    peftc = [sys.executable, "-m", "peftc", "apply", str(base), "-o", str(out), "-q", "nf4"]
    jobs = {"cp + fsync": ["sh", "-c", copy], "peftc nf4": peftc,
            "peftc nf4 --double-quant": [*peftc, "--double-quant"]}  # fmt: skip
    nbytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    checked: dict[str, list[int]] = {}
    for turn in range(rounds):
        for name, command in jobs.items():
            seen[name].append(merge.timed(command, out))
            if turn == 0 and name.startswith("peftc"):
                check = [sys.executable, __file__, "--check", str(base), str(out / "base")]
                done = subprocess.run(check, stdout=subprocess.PIPE, check=True)
                checked[name] = json.loads(done.stdout)
    copied = statistics.median(seconds for seconds, _ in seen["cp + fsync"])
    for name, runs in seen.items():
        seconds = statistics.median(seconds for seconds, _ in runs)
        peak = max(peak for _, peak in runs)
        wrong = "{:,} of {:,}".format(*checked[name]) if name in checked else ""
        print(f"| {nbytes / 1e9:.2f} GB | {name} | {seconds:.1f} | {nbytes / 1e9 / seconds:.2f} | "
              f"{seconds / copied:.2f} | {peak:.2f} | {wrong} |", flush=True)  # fmt: skip
    shutil.rmtree(base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[4, 8], help="GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary")
    parser.add_argument("--check", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:  # in a process of its own, whose memory is not counted
        print(json.dumps(wrong_bytes(*args.check)))
        return
    print(f"{merge.processor()}, {os.cpu_count()} cores, torch {torch.__version__}, medians of "
          f"{args.rounds} rounds\n")  # fmt: skip
    print("| checkpoint | job | seconds | GB/s read | × cp | peak GB | wrong bytes |")
    print("|---|---|---|---|---|---|---|", flush=True)
    work = Path(tempfile.mkdtemp(prefix="peftc-bench-", dir=args.dir))
    try:
        for size in args.sizes:
            measure(work, size, args.rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
