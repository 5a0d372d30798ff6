"""The Triton kernels against the reference: on the GPU where there is one, else interpreted.

Triton reads TRITON_INTERPRET when it is imported, so the interpreter has a process of its own,
which `test_kernels_equal_reference_when_interpreted` starts on this file.
"""

from __future__ import annotations

import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels need triton")

from peftc.kernels import nf4, nf4_ops, nf4_triton
from peftc.kernels.nf4_tuning import CARDS, Slim, Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if NATIVE else "cpu"
# The interpreter's bf16 products are wrong.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if NATIVE else [])]
runs = pytest.mark.skipif(
    not (INTERPRETED or NATIVE), reason="runs interpreted, in a process apart"
)

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def quantized(
    *shape: int, block: int = 64, book: nf4.Codebook = "nf4", nested: bool = False
) -> tuple[torch.Tensor, State]:
    """A tensor as the reference decodes it, and its state."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)
    codes, absmax = nf4.quantize(weight, block, book)
    state: State = codes, absmax, None, None
    if nested:
        state = codes, *nf4.nest(absmax)
        assert state[2] is not None and state[3] is not None
        absmax = nf4.unnest(state[1], state[2], state[3])
    return nf4.dequantize(codes, absmax, shape, block, book), state


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1 + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_near(got: torch.Tensor, wide: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal to fp64 numbers, as nearly as sums of rounded weights can be."""
    assert got.dtype == dtype and got.shape == wide.shape
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    error = (got.double() - wide).norm() / wide.norm().clamp(min=1e-30)
    assert error < tolerance, float(error)


@pytest.mark.skipif(INTERPRETED or NATIVE, reason="the tests below run in this process")
def test_kernels_equal_reference_when_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]


@runs
@pytest.mark.parametrize("shape", [(1,), (33,), (5, 7), (2, 3, 5), (64, 96), (40, 64)])
@pytest.mark.parametrize("block", [32, 64, 256, 48])
@pytest.mark.parametrize(("book", "nested"), [("nf4", False), ("nf4", True), ("fp4", True)])
def test_dequantize_equals_reference_to_the_bit(
    shape: tuple[int, ...], block: int, book: nf4.Codebook, nested: bool
) -> None:
    wide, state = quantized(*shape, block=block, book=book, nested=nested)
    weight = nf4_triton.Weight(*state, 0, 0, block, book)
    assert torch.equal(nf4_triton._decoded(weight, shape, torch.float32), wide)
    if not nested:
        assert torch.equal(nf4_triton.dequantize(*state[:2], shape, block, book), wide)


@runs
def test_dequantize_keeps_absmax_of_bf16_and_nan() -> None:
    codes, absmax = nf4.quantize(random(6, 64), 64)
    absmax = absmax.bfloat16()
    absmax[2], absmax[4] = float("nan"), float("inf")
    got = nf4_triton.dequantize(codes, absmax, (6, 64), 64, "nf4")
    wide = nf4.dequantize(codes, absmax, (6, 64))
    assert torch.equal(got.nan_to_num(7), wide.nan_to_num(7))
    assert not got[2].isfinite().any() and got[3].isfinite().all()


@runs
def test_dequantize_of_nothing_is_empty() -> None:
    codes = torch.empty(0, 1, dtype=torch.uint8, device=DEVICE)
    got = nf4_triton.dequantize(codes, random(0), (0, 5), 64, "nf4")
    assert got.shape == (0, 5)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 40, 260])
@pytest.mark.parametrize(
    ("outs", "columns", "block", "book", "nested", "biased"),
    [
        (24, 128, 64, "nf4", False, False),
        (33, 192, 32, "nf4", True, True),
        (70, 256, 128, "fp4", False, True),
        (7, 35, 64, "nf4", True, True),  # an odd width
        (5, 96, 64, "nf4", False, True),  # blocks that cross rows
    ],
)
def test_linear_equals_reference(
    rows: int, dtype: torch.dtype, outs: int, columns: int, block: int,
    book: nf4.Codebook, nested: bool, biased: bool,
) -> None:  # fmt: skip
    weight, state = quantized(outs, columns, block=block, book=book, nested=nested)
    x = random(rows, columns, dtype=dtype)
    bias = random(outs, dtype=dtype) if biased else None
    got = nf4_triton.linear(x, *state, bias, outs, block, book)
    wide = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert_near(got, wide, dtype)
    assert_near(got, nf4_ops._linear(x, *state, bias, outs, block, book).double(), dtype)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (4, 3, 128), (0, 128), (2, 0, 128)])
def test_linear_keeps_leading_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, state = quantized(24, 128)
    x = random(*shape, dtype=dtype)
    got = nf4_triton.linear(x, *state, None, 24, 64, "nf4")
    assert_near(got, x.double() @ weight.double().t(), dtype)


@runs
def test_linear_is_not_finite_where_a_block_is_not() -> None:
    _, (codes, absmax, *_) = quantized(24, 128)
    absmax[6] = float("nan")
    got = nf4_triton.linear(random(2, 128), codes, absmax, None, None, None, 24, 64, "nf4")
    assert got[:, 3].isnan().all() and got.isfinite().sum() == 46


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rank", [0, 3, 16])
def test_tiles_equal_reference_when_split(dtype: torch.dtype, splits: int, rank: int) -> None:
    weight, state = quantized(50, 320, nested=True)
    x, bias, a, b = (random(*s, dtype=dtype) for s in ((21, 320), (50,), (rank, 320), (50, rank)))
    matrix = nf4_triton.Weight(*state, 50, 320, 64, "nf4")
    update = nf4_triton.Update(x @ a.t(), b, 0.5) if rank else None
    tile = Tile(outs=32, rows=16, columns=64, warps=4, stages=2)
    got = nf4_triton.tiled(x, matrix, bias, update, tile, splits)
    wide = x.double() @ weight.double().t() + bias.double()
    assert_near(got, wide + 0.5 * (x.double() @ a.double().t()) @ b.double().t(), dtype)
    grad = random(21, 50, dtype=dtype)
    back = nf4_triton.backward(grad, matrix, tile, splits)
    assert_near(back, grad.double() @ weight.double(), dtype)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("rank", [0, 1, 16, 130])
@pytest.mark.parametrize("columns", [128, 35])
def test_lora_equals_reference(dtype: torch.dtype, rows: int, rank: int, columns: int) -> None:
    weight, state = quantized(24, columns)
    x, bias = random(rows, columns, dtype=dtype), random(24, dtype=dtype)
    a, b = random(rank, columns, dtype=dtype), random(24, rank, dtype=dtype)
    got = nf4_triton.lora(x, *state, bias, a, b, 0.25, 64, "nf4")
    wide = x.double() @ weight.double().t() + bias.double()
    assert_near(got, wide + 0.25 * (x.double() @ a.double().t()) @ b.double().t(), dtype)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 40, 300])
@pytest.mark.parametrize(("block", "columns"), [(32, 96), (64, 128), (64, 35)])
def test_linear_backward_equals_reference(
    dtype: torch.dtype, rows: int, block: int, columns: int
) -> None:
    weight, state = quantized(70, columns, block=block, nested=True)
    grad = random(rows, 70, dtype=dtype)
    got = nf4_triton.linear_backward(grad, *state, columns, block, "nf4")
    assert_near(got, grad.double() @ weight.double(), dtype)


@runs
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 20),
    outs=st.integers(1, 40),
    columns=st.integers(1, 4).map(lambda blocks: 32 * blocks) | st.integers(1, 70),
    block=st.sampled_from([32, 64]),
    book=st.sampled_from(nf4.CODEBOOKS),
    nested=st.booleans(),
)
def test_operators_equal_reference_when_sizes_are_any(
    rows: int, outs: int, columns: int, block: int, book: nf4.Codebook, nested: bool
) -> None:
    weight, state = quantized(outs, columns, block=block, book=book, nested=nested)
    x, grad = random(rows, columns), random(rows, outs)
    matrix = nf4_triton.Weight(*state, outs, columns, block, book)
    assert torch.equal(nf4_triton._decoded(matrix, (outs, columns), torch.float32), weight)
    got = nf4_triton.linear(x, *state, None, outs, block, book)
    torch.testing.assert_close(got, x @ weight.t(), rtol=1e-4, atol=1e-4)
    back = nf4_triton.linear_backward(grad, *state, columns, block, book)
    torch.testing.assert_close(back, grad @ weight, rtol=1e-4, atol=1e-4)


@runs
@pytest.mark.parametrize("entry", CARDS.values(), ids=CARDS)
def test_every_tuned_tile_equals_reference(entry: Any) -> None:
    weight, state = quantized(72, 320)
    matrix = nf4_triton.Weight(*state, 72, 320, 64, "nf4")
    for limit, shape in (*entry.slim, *entry.tiles):
        x = random(limit, 320, dtype=torch.float16)
        if isinstance(shape, Slim):
            got = nf4_triton.slim(x, matrix, None, None, shape)
        else:
            got = nf4_triton.tiled(x, matrix, None, None, shape, 2)
        assert_near(got, x.double() @ weight.double().t(), torch.float16)
    for limit, shape in entry.backward:
        grad = random(limit, 72, dtype=torch.float16)
        back = nf4_triton.backward(grad, matrix, shape, 2)
        assert_near(back, grad.double() @ weight.double(), torch.float16)


STEPS: dict[str, Callable[..., int]] = {
    "and.b32": operator.and_,
    "or.b32": operator.or_,
    "shr.u32": operator.rshift,
    "mov.u32": operator.index,
}


def executed(ptx: str, packed: int, outputs: int) -> list[int]:
    """What the look-up's PTX leaves in its outputs: all the instructions that it may use."""
    registers = {f"${outputs}": packed, "%lanemask_lt": (1 << 17) - 1}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in re.findall(r"(?:and|or|shr|mov|prmt)\.\w+ [^;]*", ptx):
        name, rest = line.split(" ", 1)
        target, *sources = (part.strip() for part in rest.split(","))
        values = [value(source) for source in sources]
        if name == "prmt.b32":
            bytes_ = (values[0] | values[1] << 32).to_bytes(8, "little")
            picks = [values[2] >> 4 * i & 15 for i in range(4)]
            assert max(picks) < 8, "bit 3 of a selector asks for signs"
            registers[target] = int.from_bytes(bytes(bytes_[i] for i in picks), "little")
        else:
            registers[target] = STEPS[name](*values)
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("book", nf4.CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lookup_decodes_every_byte_at_every_place(book: nf4.Codebook, dtype: torch.dtype) -> None:
    size = dtype.itemsize
    kind = torch.int32 if size == 4 else torch.int16
    table = [v % (1 << 8 * size) for v in nf4.codebook(book).to(dtype).view(kind).tolist()]
    ptx = nf4_triton.lookup(book, dtype)
    for byte in range(256):
        packed = [byte, byte * 7 + 3 & 255, byte ^ 255, 91]
        words = executed(ptx, int.from_bytes(bytes(packed), "little"), 2 * size)
        stored = b"".join(word.to_bytes(4, "little") for word in words)
        got = [int.from_bytes(stored[i : i + size], "little") for i in range(0, 8 * size, size)]
        assert got == [table[b >> 4] for b in packed] + [table[b & 15] for b in packed]


@pytest.mark.parametrize("name", ["dequantize", "linear", "linear_backward", "lora"])
def test_kernels_take_what_the_operators_do(name: str) -> None:
    kernel, operator_ = getattr(nf4_triton, name), getattr(nf4_ops, f"_{name}")
    assert list(signature(kernel).parameters) == list(signature(operator_).parameters)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peftc::nf4_{name}", "CUDA")
