"""Operators of the vocabulary that ATen lacks, over plain tensors, compiled and differentiated.

`peftc::grouped_linear` is a linear layer per expert. It is one opaque node to torch.compile and
torch.export, whatever the number of tokens each expert gets. `peftc::rotate` is a block-diagonal
matrix; torch takes it apart into ATen.
"""

from __future__ import annotations

from typing import Any

import torch

_library: Any = torch.library.Library("peftc", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("rotate(Tensor x, Tensor blocks) -> Tensor")


def _rotate(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x·diag(R₁, R₂, …): x is (…, n·b) and blocks is (n, b, b)."""
    count, size, _ = blocks.shape
    parts = x.reshape(*x.shape[:-1], count, 1, size)
    return torch.matmul(parts, blocks).flatten(-3)


_library.impl("rotate", _rotate, "CompositeImplicitAutograd")


@torch.library.custom_op("peftc::grouped_linear", mutates_args=())
def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x·W_eᵀ for the rows of each expert e.

    Args:
        x: (rows, in), sorted by expert.
        weight: (experts, out, in).
        ends: (experts,), int32: where each expert's rows end. Rows beyond the last are zero.
    """
    y = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[expert].t(), out=y[start:end])
        start = end
    return y


@grouped_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("peftc::grouped_outer", mutates_args=())
def grouped_outer(y: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """yᵀ·x for the rows of each expert: the gradient of `grouped_linear`'s weight.

    Args:
        y: (rows, out).
        x: (rows, in).
        ends: As for `grouped_linear`.

    Returns:
        (experts, out, in).
    """
    result = x.new_zeros(ends.shape[0], y.shape[1], x.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(y[start:end].t(), x[start:end], out=result[expert])
        start = end
    return result


@grouped_outer.register_fake
def _(y: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(ends.shape[0], y.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    to_x = grouped_linear(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    to_weight = grouped_outer(grad, x, ends) if ctx.needs_input_grad[1] else None
    return to_x, to_weight, None


grouped_linear.register_autograd(_backward, setup_context=_save)
