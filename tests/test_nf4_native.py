"""The C kernels of the 4-bit format, on every instruction set that this machine can run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftc.kernels import nf4, nf4_native, nf4_ops

built = pytest.mark.skipif(
    not nf4_native.available(), reason="the C extension is not built: pip install -e ."
)


def _isas() -> list[str]:
    """Those that run here."""
    found = []
    for name in ("scalar", "neon", "avx2", "avx512") if nf4_native.available() else ():
        try:
            found.append(nf4_native.use(name))
        except ValueError:
            continue
    if found:
        nf4_native.use()
    return found


@pytest.fixture(params=_isas() or ["none"], scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield nf4_native.use(request.param)
    nf4_native.use()


FORMATS = st.tuples(
    st.sampled_from([2, 6, 32, 64, 66, 100, 128, 256, 512, 1024, 2048, 4096]),
    st.sampled_from(nf4.CODEBOOKS),
)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
ODD = (
    0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 1.1754944e-38, 1e-38, 3.4e38, -3.4e38, 6e-8, 65504.0,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Random numbers of one magnitude, some replaced by odd ones, now and then blocks of zeros."""
    count = draw(st.integers(1, 700) | st.integers(1, 9000))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(count, generator=generator) * 10.0 ** draw(st.integers(-44, 37))
    for odd in draw(st.lists(st.sampled_from(ODD), max_size=3)):
        values[torch.randint(count, (draw(st.integers(1, 9)),), generator=generator)] = odd
    if draw(st.booleans()):
        values[draw(st.integers(0, count)) :][: draw(st.integers(0, 500))] = 0
    return values.to(draw(DTYPES))


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit, but that any NaN equals any other."""
    nan = expected.isnan()
    same = found.view(torch.int32) == expected.view(torch.int32)
    return found.shape == expected.shape and bool((same | nan & found.isnan()).all())


def _check_quantize(weight: torch.Tensor, block_size: int, codebook: nf4.Codebook) -> None:
    codes, absmax = nf4_native.quantize(weight, block_size, codebook)
    expected_codes, expected_absmax = nf4.quantize(weight, block_size, codebook)
    assert torch.equal(codes, expected_codes)
    assert _same(absmax, expected_absmax)


@built
@settings(max_examples=200, deadline=None)
@given(weights(), FORMATS)
def test_quantize_equals_the_reference_to_the_bit(
    isa: str, weight: torch.Tensor, form: tuple[int, nf4.Codebook]
) -> None:
    _check_quantize(weight, *form)


@built
@pytest.mark.parametrize("codebook", nf4.CODEBOOKS)
@pytest.mark.parametrize("absmax", [1.0, 0.125, 3.7, 1e-38, 1e-40, 2.0**100])
def test_quantize_takes_the_lower_code_when_a_value_is_a_tie(
    isa: str, codebook: nf4.Codebook, absmax: float
) -> None:
    middle = nf4.thresholds(codebook)
    near = [middle.nextafter(torch.tensor(limit)) for limit in (-2.0, 2.0)]
    block = torch.cat([torch.tensor([1.0]), middle, *near, -middle, torch.zeros(3)])
    assert block.numel() == 64
    weight = torch.cat([block, block[:33], torch.zeros(1)]) * absmax
    _check_quantize(weight, 64, codebook)
    _check_quantize(weight[:97], 64, codebook)


@built
def test_quantize_equals_the_reference_when_fp16_takes_every_value(isa: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    finite = every[every.isfinite()]
    for block_size in (2, 64):
        _check_quantize(every, block_size, "nf4")
        _check_quantize(finite, block_size, "nf4")
        _check_quantize(every.view(torch.bfloat16), block_size, "nf4")


@built
def test_quantize_equals_the_reference_when_the_weight_is_strided_or_fp64(isa: str) -> None:
    weight = torch.randn(96, 64)
    _check_quantize(weight.t(), 64, "nf4")
    _check_quantize(weight[:, ::3], 64, "fp4")
    _check_quantize(weight.double(), 64, "nf4")
    _check_quantize(weight[:0], 64, "nf4")


@built
@settings(max_examples=200, deadline=None)
@given(weights(), FORMATS, st.integers(0, 9000), st.integers(0, 9000))
def test_decode_equals_the_reference_to_the_bit(
    isa: str, weight: torch.Tensor, form: tuple[int, nf4.Codebook], start: int, count: int
) -> None:
    codes, absmax = nf4.quantize(weight, *form)
    expected = nf4.dequantize(codes, absmax, weight.shape, *form)
    start = start % weight.numel() // 2 * 2
    count = min(count, weight.numel() - start)
    found = torch.full((count + 1,), 7.0)
    nf4_native.decode(codes, absmax, start, found[:count], *form)
    assert _same(found[:count], expected[start : start + count])
    assert found[count] == 7  # nothing was written beyond


@built
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2**32))
def test_unnest_equals_the_reference_to_the_bit(isa: str, count: int, seed: int) -> None:
    absmax = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    codes, outer, offset = nf4.nest(absmax)
    expected = nf4.unnest(codes, outer, offset)
    assert _same(nf4_native.unnest(codes, outer, offset), expected)


def _case(
    rows: int, outputs: int, columns: int, form: tuple[int, nf4.Codebook], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, codes, absmax and the product in fp64."""
    generator = torch.Generator().manual_seed(seed)
    codes, absmax = nf4.quantize(torch.randn(outputs, columns, generator=generator), *form)
    x = torch.randn(rows, columns, generator=generator)
    weight = nf4.dequantize(codes, absmax, (outputs, columns), *form)
    return x, codes, absmax, x.double() @ weight.double().t()


@built
@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 9) | st.integers(1, 140),
    outputs=st.integers(1, 9),
    blocks=st.integers(1, 13),
    block_size=st.sampled_from(nf4.BLOCK_SIZES),
    codebook=st.sampled_from(nf4.CODEBOOKS),
    seed=st.integers(0, 2**32),
)
def test_multiply_equals_the_reference_within_rounding(
    isa: str,
    rows: int,
    outputs: int,
    blocks: int,
    block_size: int,
    codebook: nf4.Codebook,
    seed: int,
) -> None:
    columns = block_size * (blocks if block_size < 1024 else blocks % 3 + 1)
    form = (block_size, codebook)
    x, codes, absmax, expected = _case(rows, outputs, columns, form, seed)
    found = nf4_native.multiply(x, codes, absmax, outputs, *form)
    # The sum of the products' magnitudes is at most about 0.8·columns: errors stay far below.
    assert (found - expected).abs().max() <= 2e-6 * columns**0.5 + 1e-7 * columns


@built
def test_multiply_keeps_rows_apart_when_one_is_not_finite(isa: str) -> None:
    x, codes, absmax, expected = _case(3, 4, 96, (32, "nf4"), 0)
    absmax[5] = float("nan")  # the last third of the second output
    x[1] = float("inf")
    found = nf4_native.multiply(x, codes, absmax, 4, 32, "nf4")
    assert found[:, 1].isnan().all()
    assert not found[1].isfinite().any()
    assert torch.allclose(found[::2, [0, 2, 3]].double(), expected[::2, [0, 2, 3]], atol=1e-5)


@built
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_kernel_gives_the_same_when_threads_share_the_work(threads: int) -> None:
    x, codes, absmax, expected = _case(20, 300, 512, (64, "nf4"), 0)
    weight = torch.randn(301, 513)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _check_quantize(weight, 64, "nf4")
        found = nf4_native.multiply(x, codes, absmax, 300, 64, "nf4")
        assert torch.allclose(found.double(), expected, atol=1e-4)
        values = torch.empty(300 * 512 - 2)
        nf4_native.decode(codes, absmax, 2, values, 64, "nf4")
        assert _same(values, nf4.dequantize(codes, absmax, (300 * 512,), 64)[2:])
        nested = nf4.nest(torch.rand(70000))
        assert _same(nf4_native.unnest(*nested), nf4.unnest(*nested))
    finally:
        torch.set_num_threads(before)


@built
def test_kernels_start_no_thread_when_torch_has_one() -> None:
    code = """
import os, threading, torch
torch.set_num_threads(1)
from peftc.kernels import nf4_native
before = len(os.listdir("/proc/self/task"))
def work():
    torch.set_num_threads(1)
    weight = torch.randn(512, 512)
    codes, absmax = nf4_native.quantize(weight, 64, "nf4")
    nf4_native.decode(codes, absmax, 0, weight, 64, "nf4")
    nf4_native.multiply(weight[:4], codes, absmax, 512, 64, "nf4")
    seen.append(len(os.listdir("/proc/self/task")))
seen = []
worker = threading.Thread(target=work)
work(); worker.start(); worker.join()
assert seen == [before, before + 1], (before, seen)
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted in /proc")
    _python(code)


@built
def test_only_one_openmp_runtime_is_loaded() -> None:
    code = """
import torch
torch.set_num_threads(2)
from peftc.kernels import nf4_native
torch.mm(torch.randn(300, 300), torch.randn(300, 300))
nf4_native.quantize(torch.randn(512, 512), 64, "nf4")
with open("/proc/self/maps") as maps:
    loaded = {line.split()[-1] for line in maps if "omp" in line.split("/")[-1]}
assert len(loaded) <= 1, loaded
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("libraries are listed in /proc")
    _python(code)


@built
def test_the_environment_chooses_the_instruction_set() -> None:
    code = "from peftc.kernels import nf4_native; assert nf4_native.use() == 'scalar'"
    _python(code, PEFTC_NF4_ISA="scalar")
    with pytest.raises(subprocess.CalledProcessError):
        _python(code, PEFTC_NF4_ISA="abacus")
    with pytest.raises(ValueError, match="abacus"):
        nf4_native.use("abacus")


@built
def test_scratch_is_the_same_memory_at_each_call_of_a_thread() -> None:
    first = nf4_native.scratch(1000).data_ptr()
    assert nf4_native.scratch(10).data_ptr() == first
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(nf4_native.scratch(10).data_ptr()))
    thread.start()
    thread.join()
    assert seen != [first]


def test_operators_run_on_torch_and_warn_once_when_the_extension_is_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent() -> None:
        raise ImportError("not built")

    x, codes, absmax, expected = _case(2, 10, 128, (64, "nf4"), 0)
    weight = torch.randn(10, 128)
    nf4_native._library.cache_clear()
    try:
        monkeypatch.setattr(nf4_native, "_load", absent)
        with pytest.warns(RuntimeWarning, match="C compiler") as caught:
            found = torch.ops.peftc.nf4_quantize(weight, 64, "nf4")
            y = torch.ops.peftc.nf4_linear(x, codes, absmax, None, None, None, 10, 64, "nf4")
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not nf4_native.available()
        for one, other in zip(found, nf4.quantize(weight), strict=True):
            assert torch.equal(one, other)
        assert torch.allclose(y.double(), expected, atol=1e-4)
    finally:
        nf4_native._library.cache_clear()


@built
@pytest.mark.parametrize("rows", [1, 5, nf4_native.FEW_ROWS, nf4_native.FEW_ROWS + 1])
@pytest.mark.parametrize(("columns", "block_size"), [(128, 64), (96, 64), (144, 48), (7, 64)])
def test_linear_equals_the_reference_when_rows_and_columns_vary(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, block_size: int
) -> None:
    monkeypatch.setattr(nf4_ops, "TILE_BYTES", 1 << 14)
    x, codes, absmax, expected = _case(rows, 100, columns, (block_size, "nf4"), 0)
    bias = torch.randn(100)
    y = torch.ops.peftc.nf4_linear(x, codes, absmax, None, None, bias, 100, block_size, "nf4")
    assert torch.allclose(y.double(), expected + bias, atol=1e-4)


def _python(code: str, **environment: str) -> None:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    subprocess.run(command, check=True, env={**os.environ, **environment}, capture_output=True)
