"""`peftc::lora_rows`: each row of a batch through the LoRAs that its weights name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftc.kernels.lora_rows import lora_rows

from .conftest import distance

WEIGHTS = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, -2.0])


def case(
    ranks: list[int], table: list[list[float]], shape: tuple[int, ...], seed: int = 0
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    a, b = [random(rank, 6) for rank in ranks], [random(5, rank) for rank in ranks]
    scales = [1.0 + i for i in range(len(ranks))]
    # The table's columns in another order than the LoRAs.
    columns = [*range(len(ranks))][::-1]
    return random(*shape, 6), torch.tensor(table), a, b, scales, columns


def reference(x: Tensor, mix: Tensor, a: Any, b: Any, scales: Any, columns: Any) -> Tensor:
    """Every row by itself."""
    flat = x.reshape(mix.shape[0], -1, x.shape[-1])
    rows = []
    for row, weights in zip(flat, mix, strict=True):
        terms = zip(a, b, scales, columns, strict=True)
        rows.append(sum(weights[c] * s * (row @ down.T @ up.T) for down, up, s, c in terms))
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rows_equal_each_row_by_itself(data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    rows = data.draw(st.sampled_from([1, 2, 5]))
    line = st.lists(WEIGHTS, min_size=len(ranks), max_size=len(ranks))
    table = data.draw(st.lists(line, min_size=rows, max_size=rows))
    shape = data.draw(st.sampled_from([(rows,), (rows, 3), (rows * 2, 3), (rows, 2, 3)]))
    args = case(ranks, table, shape)
    want = reference(*args)
    assert (lora_rows(*args) - want).abs().max() <= 1e-5 * (1 + want.abs().max())


@pytest.mark.parametrize("table", [[[1.0, 0.0]], [[1.0, 0.0], [0.5, 2.0]], [[0.0, 0.0]]])
def test_gradients_equal_each_row_by_itself(table: list[list[float]]) -> None:
    results = []
    for function in (lora_rows, reference):
        x, mix, a, b, *rest = case([2, 3], table, (2, 4))
        leaves = [tensor.requires_grad_() for tensor in (x, *a, *b)]
        function(x, mix, a, b, *rest).square().sum().backward()
        results.append([leaf.grad if leaf.grad is not None else leaf * 0 for leaf in leaves])
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def test_operator_keeps_torch_s_rules() -> None:
    x, mix, a, b, *rest = case([2, 3], [[1.0, 0.0], [0.5, 2.0]], (2, 4))
    for tensor in (x, *a, *b):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.peftc.lora_rows.default, (x, mix, a, b, *rest))


def test_result_has_the_dtype_of_a_when_x_is_bf16() -> None:
    x, *rest = case([2], [[1.0]], (2, 3))
    got = lora_rows(x.bfloat16(), *rest)
    assert got.dtype == torch.float32
    assert distance(got, reference(x.bfloat16().float(), *rest)) < 1e-6


def test_device_s_way_equals_the_cpu_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table cannot be read without stopping, all rows of all adapters are weighed."""
    from peftc.kernels import lora_rows as module

    args = case([2, 3], [[1.0, 0.0], [0.5, 2.0]], (2, 4))
    want = lora_rows(*args)
    every = ((k, slice(None), args[1][:, c, None, None]) for k, c in enumerate(args[-1]))
    monkeypatch.setattr(module, "_parts", lambda mix, columns: every)
    assert distance(module._forward(*args), want) < 1e-6
