"""SmolLM2-135M as one ONNX base that takes LoRAs at run time, beside graphs without slots.

Export: seconds of the whole process and its peak memory. Speed: plain onnxruntime, one thread, CPU
time; in every round each graph has its turn, of two runs the second, and a ratio is the median of
the rounds' ratios.

    python benchmarks/onnx_swap.py --rounds 30
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import merge
import numpy as np
import onnx_models
import onnxruntime

RANKS = (4, 8, 16)
PREFILL, PAST = 128, 128
Arrays = dict[str, np.ndarray[Any, Any]]

ADAPTER = onnx_models.ADAPTER.replace("r=16, lora_alpha=32", "r=int(sys.argv[3]), lora_alpha=32")


def session(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options)


def loaded(file: Path) -> Any:
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(file))
    return adapter


def tokens(graph: Any, past: int, now: int) -> Arrays:
    """Input of one text."""
    cache = {
        i.name: np.zeros((1, i.shape[1], past, i.shape[3]), np.float32)
        for i in graph.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    positions = np.arange(past, past + now, dtype=np.int64)[None]
    ids, mask = (7 * positions) % 4000 + 20, np.ones((1, past + now), np.int64)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}


def run(graph: Any, adapter: Any, given: Arrays) -> float:
    """Seconds of CPU time."""
    options = onnxruntime.RunOptions()
    if adapter is not None:
        options.add_active_adapter(adapter)
    start = time.process_time()
    graph.run(None, given, options)
    return time.process_time() - start


def speed(plain: Path, slots: Path, files: dict[int, Path], rounds: int) -> None:
    """Prints a table: without slots, with none taken, with each adapter."""
    bare, graph = session(plain), session(slots)
    turns: dict[str, tuple[Any, Any]] = {
        "no slots": (bare, None),
        "slots, no adapter": (graph, None),
    }
    turns |= {f"rank {rank}": (graph, loaded(file)) for rank, file in files.items()}
    print("| | decode, ms | ratio | prefill, ms | ratio |\n|---|---|---|---|---|")
    columns: dict[str, list[str]] = {label: [] for label in turns}
    for past, now, count in ((PAST, 1, rounds), (0, PREFILL, max(3, rounds // 4))):
        inputs = {id(one): tokens(one, past, now) for one in (bare, graph)}
        seen: dict[str, list[float]] = {label: [] for label in turns}
        for _ in range(count):
            for label, (one, adapter) in turns.items():
                run(one, adapter, inputs[id(one)])  # or the caches would be those of another graph
                seen[label].append(run(one, adapter, inputs[id(one)]))
        for label, seconds in seen.items():
            ratios = (a / b for a, b in zip(seconds, seen["no slots"], strict=True))
            columns[label] += [
                f"{1e3 * statistics.median(seconds):.1f}", f"{statistics.median(ratios):.3f}"
            ]  # fmt: skip
    for label, cells in columns.items():
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


def clocked(job: Any, argument: Any, rounds: int) -> float:
    """The median wall time of a call."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        job(argument)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=30)
    rounds: int = arguments.parse_args().rounds
    from peftc.demo_model import demo_checkpoint

    base = demo_checkpoint("float32")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        adapters = {rank: work / f"adapter-{rank}" for rank in RANKS}
        for rank, folder in adapters.items():
            merge.timed(onnx_models.script(ADAPTER, base, folder, rank), work / "none")
        outs = {label: work / label.replace(" ", "-") for label in (
            "base", "base with slots", "base, int4", "base with slots, int4", "merged, rank 16",
            *(f"adapter, rank {rank}" for rank in RANKS))}  # fmt: skip

        def export(label: str, source: Path, *more: object) -> list[str]:
            words = ["export", source, "-o", outs[label], "--proof", "sites", "-q", *more]
            return [sys.executable, "-m", "peftc", *map(str, words)]

        swap, int4 = ("--adapters", "swap"), ("--weights", "int4")
        onnx = "--format", "onnx"
        jobs = {
            "base": export("base", base, *onnx),
            "base with slots": export("base with slots", base, *onnx, *swap),
            "base, int4": export("base, int4", base, *onnx, *int4),
            "base with slots, int4": export("base with slots, int4", base, *onnx, *swap, *int4),
            "merged, rank 16": export(
                "merged, rank 16", base, *onnx, "--merge", "--adapter", adapters[16]
            ),
        }
        for rank, folder in adapters.items():
            label = f"adapter, rank {rank}"
            jobs[label] = export(
                label, outs["base with slots"], "--adapter", folder, "--format", "onnx-adapter"
            )
        print("| export | seconds | peak GB | MB |\n|---|---|---|---|")
        for label, command in jobs.items():
            seconds, peak = merge.timed(command, outs[label])
            size = onnx_models.size(outs[label])
            print(f"| {label} | {seconds:.1f} | {peak:.2f} | {size:.1f} |", flush=True)
        files = {rank: outs[f"adapter, rank {rank}"] / "adapter.onnx_adapter" for rank in RANKS}
        for bits in ("", ", int4"):
            print(f"\nSmolLM2{bits or ', fp32'}\n")
            speed(outs[f"base{bits}"], outs[f"base with slots{bits}"], files, rounds)
        load = clocked(loaded, files[16], 5) * 1e3
        other = clocked(session, outs["merged, rank 16"], 3) * 1e3
        print(f"\nto another adapter of rank 16: {load:.1f} ms; to a merged model: {other:.0f} ms")


if __name__ == "__main__":
    main()
