"""LoRAs chosen by the rows of a batch: `peftc::lora_rows`, by one operator a layer.

Which adapters are on stands in a table that is read when the operator runs. On a CPU those that are
off cost nothing, and each row costs one adapter however many there are; elsewhere, where reading
the table would stop the device, all are computed and weighed. To torch.compile it is one node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

Part = tuple[int, slice | Tensor, float | Tensor]


@torch.library.custom_op("peftc::lora_rows", mutates_args=())
def lora_rows(
    x: Tensor,
    mix: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    columns: Sequence[int],
) -> Tensor:
    """Σₖ mₖ·sₖ·Bₖ(Aₖ x), with weights m of each row.

    Args:
        x: (batch, …, in), cast to the dtype of A.
        mix: (1 or batch, adapters): the weights; where the batch's rows lie behind each other in
            one dimension, each of its rows stands for as many of these.
        a: Of each LoRA A (rank, in); ranks may differ.
        b: Of each LoRA B (out, rank).
        scales: Of each its s.
        columns: Of each its column of the table.

    Returns:
        (batch, …, out), in the dtype of A.
    """
    return _forward(x, mix, a, b, scales, columns)


@lora_rows.register_fake
def _(x: Tensor, mix: Tensor, a: Any, b: Any, scales: Any, columns: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], b[0].shape[0], dtype=a[0].dtype)


def _forward(
    x: Tensor, mix: Tensor, a: Any, b: Any, scales: Sequence[float], columns: Sequence[int]
) -> Tensor:
    flat = x.reshape(mix.shape[0], -1, x.shape[-1])
    result: Tensor | None = None
    for k, rows, weight in _parts(mix, columns):
        down, up = a[k], b[k]
        piece = linear(linear(flat[rows].to(down.dtype), down), up).mul_(weight * scales[k])
        if result is None and len(piece) == len(flat):
            result = piece
            continue
        if result is None:
            result = piece.new_zeros(*flat.shape[:2], piece.shape[-1])
        _add(result, rows, piece)
    if result is None:
        result = flat.new_zeros(*flat.shape[:2], b[0].shape[0], dtype=a[0].dtype)
    return result.reshape(*x.shape[:-1], -1)


def _parts(mix: Tensor, columns: Sequence[int]) -> Iterator[Part]:
    """What is on: of each LoRA its number, its rows, and their weights; of a device all of it."""
    if mix.device.type != "cpu":
        yield from ((k, slice(None), mix[:, c, None, None]) for k, c in enumerate(columns))
        return
    table = mix.tolist()
    for k, column in enumerate(columns):
        on = [row for row, weights in enumerate(table) if weights[column]]
        if not on:
            continue
        first, last = on[0], on[-1]
        neighbours = last - first + 1 == len(on)
        rows = slice(first, last + 1) if neighbours else torch.tensor(on)
        weights = [table[row][column] for row in on]
        alike = all(weight == weights[0] for weight in weights)
        yield k, rows, weights[0] if alike else torch.tensor(weights)[:, None, None]


def _add(total: Tensor, rows: slice | Tensor, piece: Tensor) -> None:
    if isinstance(rows, slice):
        total[rows] += piece
    else:
        total.index_add_(0, rows, piece)


@torch.library.custom_op("peftc::lora_rows_backward", mutates_args=())
def lora_rows_backward(
    grad: Tensor,
    x: Tensor,
    mix: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    columns: Sequence[int],
) -> list[Tensor]:
    """The gradients of `lora_rows` by x, by every A and by every B, one after the other."""
    flat = x.reshape(mix.shape[0], -1, x.shape[-1])
    above = grad.reshape(*flat.shape[:2], -1)
    to_x = torch.zeros_like(flat, dtype=a[0].dtype)
    to_a, to_b = ([torch.zeros_like(factor) for factor in factors] for factors in (a, b))
    for k, rows, weight in _parts(mix, columns):
        down, up = a[k], b[k]
        given, pulled = flat[rows].to(down.dtype), above[rows] * (weight * scales[k])
        inner = pulled @ up
        _add(to_x, rows, inner @ down)
        to_a[k] += inner.flatten(0, 1).mT @ given.flatten(0, 1)
        to_b[k] += pulled.flatten(0, 1).mT @ linear(given, down).flatten(0, 1)
    return [to_x.to(x.dtype).reshape(x.shape), *to_a, *to_b]


@lora_rows_backward.register_fake
def _(
    grad: Tensor, x: Tensor, mix: Tensor, a: Any, b: Any, scales: Any, columns: Any
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (x.contiguous(), *a, *b)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mix, a, b, ctx.scales, ctx.columns = inputs
    ctx.count = len(a)
    ctx.save_for_backward(x, mix, *a, *b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, mix, *factors = ctx.saved_tensors
    a, b = factors[: ctx.count], factors[ctx.count :]
    to_x, *rest = lora_rows_backward(grad, x, mix, a, b, ctx.scales, ctx.columns)
    return to_x, None, rest[: ctx.count], rest[ctx.count :], None, None


lora_rows.register_autograd(_backward, setup_context=_save)


def _eager(x: Tensor, mix: Tensor, *args: Any) -> Tensor:
    """`peftc::lora_rows`; past the dispatcher where nobody needs to see the operator."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor:
        result: Tensor = torch.ops.peftc.lora_rows.default(x, mix, *args)
        return result
    return _forward(x, mix, *args)


EAGER = {torch.ops.peftc.lora_rows.default: _eager}
