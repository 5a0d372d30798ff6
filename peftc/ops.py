"""Operators of the vocabulary that ATen lacks, over plain tensors, compiled and differentiated.

`peftc::grouped_linear` is a linear layer per expert. It is one opaque node to torch.compile and
torch.export, whatever the number of tokens each expert gets. `peftc::rotate` is a block-diagonal
matrix, `peftc::skew` and `peftc::cayley` make its blocks, `peftc::lstm` is a layer of an LSTM, and
`peftc::gate` weighs the rows of a batch and `peftc::route` adapters by the input; torch takes them
apart into ATen.
`peftc::start` gives the factors that PiSSA and OLoRA take out of a weight. `peftc::uniform_codes`
and `peftc::uniform_scales` are a matrix in evenly spaced steps, block by block.
"""

from __future__ import annotations

from typing import Any

import torch

CUT = 0.87  # of the largest value of a block, what fitted steps may reach

_library: Any = torch.library.Library("peftc", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("rotate(Tensor x, Tensor blocks) -> Tensor")
_library.define("skew(Tensor entries, int size) -> Tensor")
_library.define("gate(Tensor mix, int column, Tensor like) -> Tensor")
_library.define("route(Tensor logits, int? top, int dim) -> Tensor")
_library.define("lstm(Tensor x, Tensor[] weights) -> Tensor")
_library.define("cayley(Tensor skew, int terms) -> Tensor")
_library.define("uniform_codes(Tensor matrix, int bits, int block, str reach) -> Tensor")
_library.define("uniform_scales(Tensor matrix, int bits, int block, str reach) -> Tensor")


def _rotate(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x·diag(R₁, R₂, …): x is (…, n·b) and blocks is (n, b, b)."""
    count, size, _ = blocks.shape
    # One product a block, with all rows at once: a product a row would be many small ones.
    parts = x.reshape(-1, count, size).transpose(0, 1)
    return torch.bmm(parts, blocks).transpose(0, 1).reshape(x.shape)


def _skew(entries: torch.Tensor, size: int) -> torch.Tensor:
    """Skew-symmetric matrices (n, size, size) from what is above their diagonals, row by row."""
    above = torch.ones(size, size, dtype=torch.bool, device=entries.device).triu(1)
    upper = entries.new_zeros(entries.shape[0], size, size).masked_scatter(above, entries)
    return upper - upper.transpose(1, 2)


def _cayley(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """Orthogonal matrices from skew-symmetric ones Q, as PEFT makes them.

    Without terms it is (I − Q)(I + Q)⁻¹. With them it is the Neumann series of the inverse of that,
    (I + Q)(I − Q)⁻¹ = I + 2Q + 2Q² + …, of which PEFT takes the last term but once.
    """
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    if not terms:
        exact: torch.Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
        return exact
    weights = [2.0] * (terms - 1 if terms < 3 else max(terms, 4) - 2) + [1.0] * (terms > 2)
    result = power = one.expand_as(skew)
    for weight in weights:
        power = torch.bmm(power, skew)
        result = result + weight * power
    return result


def _gate(mix: torch.Tensor, column: int, like: torch.Tensor) -> torch.Tensor:
    """A column of a table (rows, columns), so that it multiplies `like` (batch, …) row by row.

    One row stands for the whole batch; else each stands for as many neighbours, such as the beams
    of a text or, where these are one dimension, its tokens.
    """
    weights = mix.select(1, column)
    if mix.shape[0] > 1:
        weights = weights.repeat_interleave(like.shape[0] // mix.shape[0])
    return weights.view(-1, *(1 for _ in like.shape[1:]))


def _route(logits: torch.Tensor, top: int | None, dim: int) -> torch.Tensor:
    """Weights that sum to one along `dim`: softmax, over the `top` largest alone if that is given.

    As in Shazeer et al. 2017, arXiv:1701.06538, eq. 3–5, without the noise.
    """
    if top is not None:
        kept = torch.zeros_like(logits, dtype=torch.bool)
        kept = kept.scatter(dim, logits.topk(top, dim).indices, True)
        logits = logits.masked_fill(~kept, float("-inf"))
    return logits.softmax(dim)


def _lstm(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """A layer of an LSTM that reads x (length, in) both ways; (length, 2·hidden).

    The weights are (4·hidden, in), (4·hidden, hidden) and two biases, for each way, as torch's.
    """
    zeros = x.new_zeros(2, 1, weights[1].shape[1])
    # As if in training, for without it cuDNN has no backward; there is no dropout in it.
    return torch.lstm(x[None], (zeros, zeros), weights, True, 1, 0.0, True, True, True)[0][0]


def _blocks(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """Rows as blocks (out, blocks, size), the last filled up with zeros."""
    rows, lacking = matrix.float(), -matrix.shape[1] % size
    if lacking:
        rows = torch.nn.functional.pad(rows, (0, lacking))
    return rows.reshape(matrix.shape[0], -1, size)


def _uniform_scales(matrix: torch.Tensor, bits: int, block: int, reach: str) -> torch.Tensor:
    """The step of each block (out, blocks), fp32.

    Args:
        matrix: (out, in).
        bits: Of a code.
        block: Neighbours of a row that share a step.
        reach: `full` makes the value that is largest by size the lowest code, of which there is one
            more than on the other side of 0, so that a step may be negative; `even` leaves that
            code out, so that both ends of a block are met; `fitted` takes, of the full step and one
            that cuts the largest values off, the closer one, made to fit its codes best.
    """
    blocks, half = _blocks(matrix, block), 2 ** (bits - 1)
    high, low = blocks.amax(2), blocks.amin(2)
    if reach == "even":
        return torch.maximum(high, -low).div_(half - 1)
    steps = torch.where(high > -low, high, low).div_(-half)
    if reach == "full":
        return steps
    whole, cut = (_fitted(blocks, steps * factor, half) for factor in (1.0, CUT))
    return torch.where(cut[1] > whole[1], cut[0], whole[0])


def _fitted(
    blocks: torch.Tensor, steps: torch.Tensor, half: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps by least squares, for the codes that given ones lead to; what they explain of w·w."""
    codes = _rounded(blocks, steps, half)
    squares = (codes * codes).sum(2)
    both = codes.mul_(blocks).sum(2)
    fitted = torch.where(squares == 0, steps, both / squares)
    return fitted, both * fitted


def _rounded(blocks: torch.Tensor, steps: torch.Tensor, half: int) -> torch.Tensor:
    """The nearest whole number of steps, as fp32."""
    inverse = torch.where(steps == 0, 0.0, 1 / steps).unsqueeze(-1)
    return (blocks * inverse).round_().clamp_(-half, half - 1)


def _uniform_codes(matrix: torch.Tensor, bits: int, block: int, reach: str) -> torch.Tensor:
    """The codes of each block (out, blocks, bytes): steps plus half their number, low bits first.

    They are what ONNX Runtime's MatMulNBits reads; without zero points it takes half for 0.
    """
    half, steps = 2 ** (bits - 1), _uniform_scales(matrix, bits, block, reach)
    whole = _rounded(_blocks(matrix, block), steps, half).add_(half).to(torch.uint8)
    if bits == 8:
        return whole
    pairs = whole.view(torch.int16)  # two neighbours, the first in the low byte
    return (pairs | pairs >> 4).to(torch.uint8)


_library.impl("uniform_codes", _uniform_codes, "CompositeImplicitAutograd")
_library.impl("uniform_scales", _uniform_scales, "CompositeImplicitAutograd")
_library.impl("rotate", _rotate, "CompositeImplicitAutograd")
_library.impl("skew", _skew, "CompositeImplicitAutograd")
_library.impl("cayley", _cayley, "CompositeImplicitAutograd")
_library.impl("gate", _gate, "CompositeImplicitAutograd")
_library.impl("route", _route, "CompositeImplicitAutograd")
_library.impl("lstm", _lstm, "CompositeImplicitAutograd")


@torch.library.custom_op("peftc::start", mutates_args=())
def start(matrix: torch.Tensor, rank: int, init: str, seed: int) -> torch.Tensor:
    """Factors B (out, rank) over Aᵀ (in, rank) of a part B·A of a matrix (out, in).

    Args:
        matrix: The weight.
        rank: Of the part.
        init: `pissa` for its largest singular values, by an exact decomposition, or
            `pissa_niter_N` by N subspace iterations; `olora` for its first columns.
        seed: Of the iterations' start.
    """
    if init == "olora":
        q, r = torch.linalg.qr(matrix)
        return torch.cat([q[:, :rank], r[:rank].t()])
    if init == "pissa":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], vh[:rank].t()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(matrix, rank, niter=int(init.rpartition("_")[2]))
    result: torch.Tensor = torch.cat([u, v]) * s.sqrt()
    return result


@start.register_fake
def _(matrix: torch.Tensor, rank: int, init: str, seed: int) -> torch.Tensor:
    return matrix.new_empty(sum(matrix.shape), rank)


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
