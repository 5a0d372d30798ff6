"""The operators over 4-bit codes: their numbers, gradients, and torch's rules for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

from peftc.graphs import operator
from peftc.kernels import nf4, nf4_ops  # noqa: F401  # registers the operators

from .conftest import distance

pytestmark = pytest.mark.filterwarnings("ignore")

ops: Any = torch.ops.peftc


def state(
    out: int, columns: int, block: int = 64, book: Any = "nf4", scales: str = "fp32"
) -> tuple[tuple[Any, ...], Tensor]:
    """What an operator takes for a random matrix (codes, absmax, outer, offset), and its values."""
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(out * columns))
    codes, absmax = nf4.quantize(weight, block, book)
    parts: tuple[Any, ...] = absmax.bfloat16() if scales == "bf16" else absmax, None, None
    if scales == "nested":
        parts = nf4.nest(absmax)
        absmax = nf4.unnest(*parts)
    elif scales == "bf16":
        absmax = parts[0].float()
    return (codes, *parts), nf4.dequantize(codes, absmax, (out, columns), block, book)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 40),
    columns=st.sampled_from([1, 7, 48, 64, 65, 96, 128, 129, 192, 576]),
    batch=st.sampled_from([(), (1,), (3,), (2, 5), (40,)]),
    block=st.sampled_from([32, 64, 128, 4096]),
    book=st.sampled_from(nf4.CODEBOOKS),
    scales=st.sampled_from(["fp32", "bf16", "nested"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    biased=st.booleans(),
)
def test_linear_and_lora_equal_those_of_the_dequantized_weight(
    out: int, columns: int, batch: tuple[int, ...], block: int, book: Any, scales: str,
    dtype: torch.dtype, biased: bool,
) -> None:  # fmt: skip
    stored, weight = state(out, columns, block, book, scales)
    x, bias = torch.randn(*batch, columns).to(dtype), torch.randn(out) if biased else None
    a, b = torch.randn(3, columns), torch.randn(out, 3)
    wide = x.double()
    want = linear(wide, weight.double(), None if bias is None else bias.double())
    more = want + 0.5 * linear(linear(wide, a.double()), b.double())
    got = ops.nf4_linear(x, *stored, bias, out, block, book)
    fused = ops.nf4_lora(x, *stored, bias, a, b, 0.5, block, book)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for y, expected in ((got, want), (fused, more)):
        assert y.dtype == dtype and y.shape == expected.shape
        slack = 1e-5 * float(expected.abs().max())
        assert bool(((y - expected).abs() <= rounding * expected.abs() + slack).all())


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_linear_and_lora_of_no_rows_are_empty(batch: tuple[int, ...]) -> None:
    stored, _ = state(33, 96)
    x, a, b = torch.randn(*batch, 96), torch.randn(4, 96), torch.randn(33, 4)
    assert ops.nf4_linear(x, *stored, None, 33, 64, "nf4").shape == (*batch, 33)
    assert ops.nf4_lora(x, *stored, None, a, b, 1.0, 64, "nf4").shape == (*batch, 33)


@pytest.mark.parametrize("book", nf4.CODEBOOKS)
@pytest.mark.parametrize(("out", "columns"), [(5, 7), (33, 96), (1, 1)])
def test_quantize_and_dequantize_equal_the_reference(out: int, columns: int, book: Any) -> None:
    weight = torch.randn(out, columns)
    codes, absmax = nf4.quantize(weight, 32, book)
    got = ops.nf4_quantize(weight, 32, book)
    assert torch.equal(got[0], codes) and torch.equal(got[1], absmax)
    assert torch.equal(ops.nf4_codes(weight, 32, book), codes)
    assert torch.equal(ops.nf4_absmax(weight, 32), absmax)
    want = nf4.dequantize(codes, absmax, (out, columns), 32, book)
    assert torch.equal(ops.nf4_dequantize(codes, absmax, [out, columns], 32, book), want)


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments for each operator that has gradients or fakes of its own."""
    stored, _ = state(33, 96)
    nested, _ = state(33, 96, scales="nested")
    x = torch.randn(2, 3, 96, requires_grad=True)
    low = x.detach().bfloat16().requires_grad_()
    bias, a, b = (torch.randn(*n, requires_grad=True) for n in ((33,), (4, 96), (33, 4)))
    return {
        "nf4_quantize": (torch.randn(5, 7), 32, "fp4"),
        "nf4_dequantize": (*stored[:2], [33, 96], 64, "nf4"),
        "nf4_linear": (x, *stored, bias, 33, 64, "nf4"),
        "nf4_linear nested": (low, *nested, None, 33, 64, "nf4"),
        "nf4_lora": (low, *stored, None, a, b, 0.5, 64, "nf4"),
        "nf4_lora nested": (x, *nested, bias, a, b, 0.5, 64, "nf4"),
        "nf4_linear_backward": (torch.randn(2, 33), *stored, 96, 64, "nf4"),
    }


@pytest.mark.parametrize("name", calls())
def test_operator_keeps_torchs_rules(name: str) -> None:
    op = operator(f"peftc.{name.split()[0]}.default")
    assert set(torch.library.opcheck(op, calls()[name]).values()) == {"SUCCESS"}


def formula(x: Tensor, weight: Tensor, bias: Any, a: Tensor, b: Tensor) -> Tensor:
    y = linear(x, weight, bias)
    return y + (0.5 * linear(linear(x.to(a.dtype), a), b)).to(y.dtype)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("out", "columns", "scales"), [(33, 96, "fp32"), (5, 7, "nested"), (64, 128, "bf16")]
)
def test_gradients_equal_those_through_the_dequantized_weight(
    out: int, columns: int, scales: str, dtype: torch.dtype, fused: bool
) -> None:
    stored, weight = state(out, columns, scales=scales)
    given_ = {
        "x": torch.randn(2, 3, columns).to(dtype), "bias": torch.randn(out).to(dtype),
        "a": torch.randn(4, columns), "b": torch.randn(out, 4),
    }  # fmt: skip
    back = torch.randn(2, 3, out).to(dtype)

    def gradients(compute: Callable[..., Tensor], wide: bool) -> list[Tensor]:
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in given_.values()]
        y = compute(*leaves)
        return list(torch.autograd.grad(y, leaves, back.to(y.dtype)))

    def ours(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if fused:
            y: Tensor = ops.nf4_lora(x, *stored, bias, a, b, 0.5, 64, "nf4")
            return y
        y = ops.nf4_linear(x, *stored, bias, out, 64, "nf4")
        return y + (0.5 * linear(linear(x.to(a.dtype), a), b)).to(y.dtype)

    want = gradients(lambda x, bias, a, b: formula(x, weight.double(), bias, a, b), True)
    got = gradients(ours, False)
    assert [g.dtype for g in got] == [t.dtype for t in given_.values()]
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert max(map(distance, got, want)) <= bound


class Layer(nn.Module):
    """A quantized layer with a LoRA, by both operators."""

    def __init__(self) -> None:
        super().__init__()
        parts, _ = state(33, 96, scales="nested")
        for name, part in zip(("codes", "absmax", "outer", "offset"), parts, strict=True):
            self.register_buffer(name, part)
        torch.manual_seed(0)
        self.bias, self.a, self.b = (
            nn.Parameter(torch.randn(*n)) for n in ((33,), (4, 96), (33, 4))
        )

    def forward(self, x: Tensor) -> Tensor:
        stored = self.codes, self.absmax, self.outer, self.offset
        y = ops.nf4_lora(x, *stored, self.bias, self.a, self.b, 0.5, 64, "nf4")
        result: Tensor = y + ops.nf4_linear(x, *stored, None, 33, 64, "nf4").relu()
        return result


def test_operators_compile_to_one_graph_each_way() -> None:
    layer, x = Layer(), torch.randn(2, 96)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    found = []
    for model in (layer, compiled):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    assert counter.frame_count == 1
    assert all(map(torch.equal, *found))


def test_operators_export_and_load_again(tmp_path: Path) -> None:
    layer, x = Layer(), torch.randn(5, 96)
    batch = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    exported = torch.export.export(layer, (torch.randn(2, 96),), dynamic_shapes=batch)
    torch.export.save(exported, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    called = {str(node.target) for node in loaded.graph.nodes}
    assert {"peftc.nf4_lora.default", "peftc.nf4_linear.default"} <= called
    assert torch.equal(loaded.module()(x), layer(x))
