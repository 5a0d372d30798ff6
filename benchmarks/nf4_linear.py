"""What a linear layer with a 4-bit weight costs on a CPU: peftc and its peers side by side.

Each shape is out×in features, each time a median in milliseconds. Rounds go from one peer to the
next, with a pause in which the threads of the last one stop to spin. Ratios above 1 are in peftc's
favour. The weight of `fp32` and `bf16` is not quantized at all.

    python benchmarks/nf4_linear.py --shapes 4096x4096
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peftc.kernels import nf4, nf4_native, nf4_ops

SHAPES = ("576x1536", "2048x2048", "4096x4096", "4096x11008")
ROWS = (1, 4, 16, 64, 512)
PEERS = ("peftc", "fp32", "bf16", "bitsandbytes", "onnxruntime")
BLOCK = 64
PAUSE = 0.01

Runs = Mapping[str, Callable[[], object]]


def medians(runs: Runs, seconds: float) -> dict[str, float]:
    """Milliseconds of each, in rounds until the time is up, three at least."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        rounds += 1
        for name, run in runs.items():
            time.sleep(PAUSE)
            run()
            turn = time.perf_counter()
            while True:
                start = time.perf_counter()
                run()
                now = time.perf_counter()
                seen[name].append((now - start) * 1e3)
                if now - turn > PAUSE:
                    break
    return {name: statistics.median(values) for name, values in seen.items()}


def bitsandbytes(weight: Tensor) -> Callable[[Tensor], object]:
    import bitsandbytes as bnb

    codes, state = bnb.functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return lambda x: bnb.matmul_4bit(x, codes.t(), quant_state=state)


def onnxruntime(weight: Tensor) -> Callable[[Tensor], object]:
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    codes, absmax = nf4.quantize(weight, BLOCK)
    n, k = weight.shape
    node = helper.make_node(
        "MatMulBnb4",
        ["x", "codes", "absmax"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        block_size=BLOCK,
        quant_type=1,  # NF4
    )
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", k), ("y", n))
    ]
    constants = [
        numpy_helper.from_array(codes.flatten().numpy(), "codes"),
        numpy_helper.from_array(absmax.numpy(), "absmax"),
    ]
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would spin on, and take a core from whoever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model.SerializeToString(), options)
    return lambda x: session.run(None, {"x": x.numpy()})


def linears(weight: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """The layer in every form that can be had here."""
    form = (weight.shape[0], BLOCK, "nf4")
    codes, absmax = torch.ops.peftc.nf4_quantize(weight, *form[1:])
    narrow = weight.bfloat16()
    found: dict[str, Callable[[Tensor], Any]] = {
        "peftc": lambda x: nf4_ops.linear(x, codes, absmax, None, None, None, *form),
        "fp32": lambda x: functional.linear(x, weight),
        "bf16": lambda x: functional.linear(x.bfloat16(), narrow),
    }
    for name, make in {"bitsandbytes": bitsandbytes, "onnxruntime": onnxruntime}.items():
        with contextlib.suppress(ImportError):
            found[name] = make(weight)
    return found


def row(shape: str, rows: int, layers: Mapping[str, Callable[[Tensor], Any]], time: float) -> str:
    x = torch.randn(rows, int(shape.split("x")[1]))
    found = medians({name: lambda f=layer: f(x) for name, layer in layers.items()}, time)
    times = [f"{found[name]:.3f}" if name in found else "-" for name in PEERS]
    ratios = [f"{found[p] / found['peftc']:.2f}" if p in found else "-" for p in PEERS[1:]]
    return f"| {' | '.join([shape.replace('x', '×'), str(rows), *times, *ratios])} |"


def rates(weight: Tensor, seconds: float) -> str:
    """Gigabytes of fp32 weight a second, there and back."""
    codes, absmax = nf4.quantize(weight, BLOCK)
    out = torch.empty_like(weight)
    runs: dict[str, Callable[[], object]] = {
        "quantize": lambda: torch.ops.peftc.nf4_quantize(weight, BLOCK, "nf4"),
        "decode": lambda: nf4_native.decode(codes, absmax, 0, out, BLOCK, "nf4"),
        "dequantize": lambda: torch.ops.peftc.nf4_dequantize(
            codes, absmax, weight.shape, BLOCK, "nf4"
        ),
    }
    with contextlib.suppress(ImportError):
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        theirs, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        runs["bitsandbytes quantize_4bit"] = lambda: quantize_4bit(
            weight, blocksize=BLOCK, quant_type="nf4"
        )
        runs["dequantize_4bit"] = lambda: dequantize_4bit(theirs, state)
    size = weight.numel() * weight.element_size() / 1e6
    found = medians(runs, seconds)
    return ", ".join(f"{name} {size / value:.2f}" for name, value in found.items())


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN")
    arguments = parser.parse_args()
    seconds = 0.3 if arguments.quick else 2.0
    isa = nf4_native.use() if nf4_native.available() else "plain torch"
    threads = torch.get_num_threads()
    print(f"{processor()}, {threads} threads, kernels: {isa}, torch {torch.__version__}\n")
    print(f"| out×in | rows | {' | '.join(PEERS)} | {' | '.join(f'÷ {p}' for p in PEERS[1:])} |")
    print("|---" * (1 + 2 * len(PEERS)) + "|", flush=True)
    missing: set[str] = set()
    for shape in arguments.shapes:
        out_features, in_features = map(int, shape.split("x"))
        layers = linears(torch.randn(out_features, in_features))
        missing |= set(PEERS) - set(layers)
        for rows in ROWS:
            print(row(shape, rows, layers, seconds), flush=True)
    if missing:
        print(f"\n-: {', '.join(sorted(missing))} cannot be imported")
    if nf4_native.available():
        print(f"\nGB/s of fp32 at 4096×4096: {rates(torch.randn(4096, 4096), seconds)}")


if __name__ == "__main__":
    main()
