"""The 4-bit products on a GPU: checked against the reference, then timed beside the alternatives.

Calls are captured in one CUDA graph and rotate over copies of the weight that overflow the L2, so a
time is a call's own, with no launch overhead and a cold cache, as between the layers of a model. It
needs torch and triton, and nothing else of peftc's dependencies:

    PYTHONPATH=. python benchmarks/nf4_cuda.py
    PYTHONPATH=. python benchmarks/nf4_cuda.py --tune --rows 1 8 64
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
import triton
from torch.nn import functional

from peftc.kernels import nf4, nf4_ops, nf4_triton
from peftc.kernels.nf4_tuning import Slim, Tile

bitsandbytes: Any = None
with suppress(ImportError):
    bitsandbytes = importlib.import_module("bitsandbytes")

SHAPES = ((576, 1536), (2048, 2048), (4096, 4096), (4096, 11008), (11008, 4096))
ROWS = (1, 4, 8, 16, 32, 64, 128, 512, 2048)
BLOCK = 64
RANK = 16
COLD = 200 << 20  # bytes of weight that one graph reads, four times an H200's L2
OPS = torch.ops.peftc

Call = Callable[[], Any]
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def quantized(outs: int, columns: int, block: int = BLOCK, nested: bool = False) -> State:
    codes, absmax = nf4.quantize(torch.randn(outs, columns, device="cuda") / 50, block)
    return (codes, *nf4.nest(absmax)) if nested else (codes, absmax, None, None)


def size(tensors: Sequence[torch.Tensor | None]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors if t is not None)


def copies(tensors: Sequence[torch.Tensor | None]) -> list[list[Any]]:
    """The tensors so many times that they overflow the L2."""
    count = max(4, min(256, COLD // size(tensors)))
    return [[None if t is None else t.clone() for t in tensors] for _ in range(count)]


def microseconds(calls: Sequence[Call]) -> float:
    """The median time of one of the calls, which are captured as one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i > 2:
            times.append(float(start.elapsed_time(end)) * 1000 / len(calls))
    return statistics.median(times)


def check() -> None:
    """Every operator against fp64 products of the reference's weights; exits where one is off."""
    worst: dict[str, float] = {}
    limits = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    for (outs, columns, block), nested, dtype, rows in itertools.product(
        ((576, 1536, 64), (2048, 2048, 64), (300, 512, 32), (130, 1000, 64), (33, 35, 64)),
        (False, True), limits, (1, 3, 8, 16, 33, 100, 300),
    ):  # fmt: skip
        state = quantized(outs, columns, block, nested)
        absmax = nf4_ops.scales(*state[1:])
        plain = nf4.dequantize(state[0], absmax, (outs, columns), block)
        decoded = OPS.nf4_dequantize(state[0], absmax, (outs, columns), block, "nf4")
        assert torch.equal(decoded, plain), "dequantize is not the reference's to the bit"
        wide = plain.double()
        x, a, b, bias, grad = (
            torch.randn(*shape, device="cuda", dtype=dtype)
            for shape in ((rows, columns), (RANK, columns), (outs, RANK), (outs,), (rows, outs))
        )
        base = x.double() @ wide.t() + bias.double()
        lora = base + 0.5 * (x.double() @ a.double().t()) @ b.double().t()
        results = {
            "linear": (OPS.nf4_linear(x, *state, bias, outs, block, "nf4"), base),
            "lora": (OPS.nf4_lora(x, *state, bias, a, b, 0.5, block, "nf4"), lora),
            "backward": (
                OPS.nf4_linear_backward(grad, *state, columns, block, "nf4"),
                grad.double() @ wide,
            ),
        }
        for name, (got, expected) in results.items():
            error = float((got.double() - expected).norm() / expected.norm())
            key = f"{name} {str(dtype).rpartition('.')[2]}"
            worst[key] = max(worst.get(key, 0.0), error)
            assert error < limits[dtype], (key, outs, columns, block, nested, rows, error)
    print("relative error at worst:", ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))


def matrices(outs: int, columns: int) -> list[nf4_triton.Weight]:
    """Copies of one quantized matrix."""
    state = copies(quantized(outs, columns))
    return [nf4_triton.Weight(*one, outs, columns, BLOCK, "nf4") for one in state]  # type: ignore


def methods(outs: int, columns: int, rows: int) -> Iterator[tuple[str, Sequence[Call]]]:
    """Each way to multiply, as calls on copies of the weight."""
    x, a, b, full = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((rows, columns), (RANK, columns), (outs, RANK), (outs, columns))
    )
    weights = matrices(outs, columns)

    def dense(weight: nf4_triton.Weight) -> torch.Tensor:
        return functional.linear(x, nf4_triton._decoded(weight, (outs, columns), torch.bfloat16))

    tail = BLOCK, "nf4"
    yield "fused", [partial(OPS.nf4_linear, x, *w[:4], None, outs, *tail) for w in weights]
    yield "LoRA", [partial(OPS.nf4_lora, x, *w[:4], None, a, b, 0.5, *tail) for w in weights]
    yield "dequantize", [partial(dense, w) for w in weights]
    yield "bf16", [partial(functional.linear, x, w) for (w,) in copies([full])]
    if bitsandbytes is not None:
        quantize = bitsandbytes.functional.quantize_4bit
        packed, state = quantize(full, blocksize=BLOCK, quant_type="nf4")
        multiply = partial(bitsandbytes.matmul_4bit, x, quant_state=state)
        yield "bitsandbytes", [partial(multiply, p.t()) for (p,) in copies([packed])]


def table() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print("microseconds a call; bf16, block 64; LoRA of rank 16")
    print("| N×K | M | fused | GB/s | dequantize + cuBLAS | bf16 | bitsandbytes | LoRA |")
    print("|---|---|---|---|---|---|---|---|")
    for (outs, columns), rows in itertools.product(SHAPES, ROWS):
        times: dict[str, float] = {}
        for name, calls in methods(outs, columns, rows):
            try:
                times[name] = microseconds(calls)
            except RuntimeError as error:  # the table goes on without it
                print(f"# {name}: {error}")
                times[name] = float("nan")
        rate = outs * columns * (0.5 + 4 / BLOCK) / times["fused"] / 1e3
        cells = [f"{outs}×{columns}", rows, f"{times['fused']:.1f}", f"{rate:.0f}"]
        cells += [f"{times[n]:.1f}" for n in ("dequantize", "bf16")]
        cells += [f"{times['bitsandbytes']:.1f}" if "bitsandbytes" in times else "-"]
        cells += [f"{times['LoRA'] / times['fused'] - 1:+.0%}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def candidates(rows: int) -> Iterator[tuple[Slim | Tile, int]]:
    """Shapes to try for so many rows, and in how many parts."""
    if rows <= 16:
        for outs, slices, warps, stages in itertools.product(
            (16, 32), (4, 8, 16), (2, 4, 8), (2, 3, 4, 6)
        ):
            if warps <= slices:
                yield Slim(outs, rows, 64, slices, warps, stages), 1
        return
    for outs, wide, stages, splits in itertools.product(
        (64, 128), (16, 32, 64, 128, 256), (2, 3, 4), (1, 2, 4, 8)
    ):
        if wide <= 2 * rows and outs * wide <= 128 * 256:
            yield Tile(outs, wide, 64, 8 if outs * wide > 64 * 128 else 4, stages), splits


def tune(counts: Sequence[int], outs: int, columns: int) -> None:
    """Prints the fastest shapes for each number of rows, as lines of the table."""
    weights = matrices(outs, columns)
    for rows in counts:
        x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        found: list[tuple[float, Any, int]] = []
        for entry, splits in candidates(rows):
            kernel = nf4_triton.slim if isinstance(entry, Slim) else nf4_triton.tiled
            rest = (entry,) if isinstance(entry, Slim) else (entry, splits)
            try:
                time = microseconds([partial(kernel, x, w, None, None, *rest) for w in weights])
            except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
                print("#", entry, type(error).__name__)
                continue
            found.append((time, entry, splits))
        for time, entry, splits in sorted(found, key=lambda one: one[0])[:3]:
            tiles = triton.cdiv(outs, entry.outs) * triton.cdiv(rows, entry.rows)
            fields = ", ".join(
                f"{name}={value}"
                for name, value in zip(entry.__dataclass_fields__, astuple(entry), strict=True)
            )
            print(
                f"({rows}, {type(entry).__name__}({fields})),  # {time:.1f} µs at {outs}×{columns},"
                f" {splits} parts: programs={tiles * splits}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="sweep tiles instead")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 256])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("N", "K"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.tune:
        tune(arguments.rows, *arguments.shape)
    else:
        check()
        table()


if __name__ == "__main__":
    main()
