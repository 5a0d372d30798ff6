"""The 4-bit operators in Triton, for CUDA: each takes and returns what its twin in `nf4_ops` does.

Both products compute weight·xᵀ, so that the weights are the operand that tensor cores take from
registers. A byte's two codes are kept apart: high·x_evenᵀ + low·x_oddᵀ needs no shuffle of weights.
The absmax multiplies a block's fp32 sums rather than its weights, as exact as it is cheap.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from peftc.kernels import nf4
from peftc.kernels.nf4_tuning import EXACT, Card, Slim, Tile, card

MAX_RANK = 128  # of a low-rank update within a product
_NATIVE = os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None


@cache
def lookup(book: nf4.Codebook, dtype: torch.dtype) -> str:
    """PTX that decodes four bytes: of the codes in $n, the high ones' values to $0…, then the low.

    Codes are selectors of `prmt`, which takes four bytes of eight: each plane of the values' bytes
    is looked up in both halves of the codebook, and bit 3 of the code picks the half. That is 2.6
    instructions a 16-bit value, where a chain of selects takes 30.
    """
    size = dtype.itemsize
    bits = torch.int32 if size == 4 else torch.int16
    table = nf4.codebook(book).to(dtype).view(bits).tolist()

    def word(plane: int, first: int) -> str:
        values = [table[first + i] >> 8 * plane & 255 for i in range(4)]
        return f"{int.from_bytes(bytes(values), 'little'):#010x}"

    packed = f"${2 * size}"
    lines = [
        ".reg .b32 s, m, p, q, z, a<4>, w<8>",
        f"and.b32 s, {packed}, 0x77777777",
        f"shr.u32 m, {packed}, 1",
        "and.b32 m, m, 0x44444444",
        "or.b32 m, m, 0x32103210",
        # A zero that ptxas cannot know to be one keeps the words in registers; it would copy them
        # from uniform ones at each use.
        "mov.u32 z, %lanemask_lt",
        "shr.u32 z, z, 31",
    ]
    for plane in range(size):
        lines += [f"or.b32 w{2 * plane + i}, z, {word(plane, 8 * i)}" for i in range(2)]
    for half in range(2):
        lines += ["shr.u32 s, s, 16", "shr.u32 m, m, 16"] * half
        for plane in range(size):
            lines += [
                f"prmt.b32 p, w{2 * plane}, {word(plane, 4)}, s",
                f"prmt.b32 q, w{2 * plane + 1}, {word(plane, 12)}, s",
                f"prmt.b32 a{plane}, p, q, m",
            ]
        for low, pick in enumerate(("0x7351", "0x6240")):
            at = size * low + size // 2 * half
            lines.append(f"prmt.b32 {'p' if size == 4 else f'${at}'}, a0, a1, {pick}")
            if size == 4:
                lines.append(f"prmt.b32 q, a2, a3, {pick}")
                lines += [f"prmt.b32 ${at + i}, p, q, {('0x5410', '0x7632')[i]}" for i in (0, 1)]
    return "{ " + ";\n".join(lines) + "; }"


@triton.jit
def _decode(packed, ASM: tl.constexpr, TABLE: tl.constexpr, dtype: tl.constexpr):
    """The values of the high and of the low codes; by selects where there is no PTX."""
    if ASM == "":
        first, second = (packed >> 4).to(tl.int32), (packed & 15).to(tl.int32)
        high = tl.full(packed.shape, TABLE[0], tl.float32)
        low = high
        for i in tl.static_range(1, 16):
            high = tl.where(first == i, TABLE[i], high)
            low = tl.where(second == i, TABLE[i], low)
        return high.to(dtype), low.to(dtype)
    elif dtype == tl.float32:
        return tl.inline_asm_elementwise(
            ASM, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [packed], (tl.float32, tl.float32), True, 4
        )
    else:
        high, low = tl.inline_asm_elementwise(
            ASM, "=&r,=&r,=&r,=&r,r", [packed], (tl.int16, tl.int16), True, 4
        )
        return high.to(dtype, bitcast=True), low.to(dtype, bitcast=True)


@triton.jit
def _scales(absmax, outer, offset, values, index, mask, NESTED: tl.constexpr):
    """The absmax at an index, whichever way it is stored."""
    if NESTED:
        code = tl.load(absmax + index, mask, 0).to(tl.int32)
        within = tl.load(outer + index // 256, mask, 0.0)
        return tl.load(values + code) * within + tl.load(offset)
    else:
        return tl.load(absmax + index, mask, 0.0).to(tl.float32)


@triton.jit
def _lowrank(h, b, m, n, M, N, dtype: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr):
    """B·hᵀ, for the update of a tile."""
    r = tl.arange(0, PADDED)
    inner = tl.load(h + m[:, None] * RANK + r, (m < M)[:, None] & (r < RANK), 0.0)
    up = tl.load(b + n[:, None] * RANK + r, (n < N)[:, None] & (r < RANK), 0.0)
    return tl.dot(up.to(dtype), tl.trans(inner.to(dtype)), input_precision="ieee")


@triton.jit
def dequantize_kernel(
    codes, absmax, outer, offset, values, out, count,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ASM: tl.constexpr, TABLE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """So many groups of 32 elements; four bytes a thread make stores of 16 bytes side by side."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    byte = group[:, None] * 16 + tl.arange(0, 16)
    packed = tl.load(codes + byte, byte * 2 < count, 0)
    high, low = _decode(packed, ASM, TABLE, tl.float32)
    inside = group * 32 < count
    scale = _scales(absmax, outer, offset, values, group * 32 // BLOCK, inside, NESTED)[:, None]
    pairs = tl.reshape(tl.join(high * scale, low * scale), GROUPS, 32)
    element = group[:, None] * 32 + tl.arange(0, 32)
    tl.store(out + element, pairs.to(out.dtype.element_ty), element < count)


@triton.jit
def slim_kernel(
    x, codes, absmax, outer, offset, values, bias, h, b, y, M, N, K, scale,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ASM: tl.constexpr, TABLE: tl.constexpr,
    BIASED: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, OUTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Few rows: a batched product, whose batch is the slices of the columns, one warp's each."""
    dtype: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = tl.arange(0, SLICES)[:, None] * COLUMNS
    x += m[None, :, None].to(tl.int64) * K
    codes += n[None, :, None].to(tl.int64) * (K // 2)
    acc = tl.zeros((SLICES, OUTS, ROWS), tl.float32)
    for start in tl.range(0, K, SLICES * COLUMNS, num_stages=STAGES):
        column = start + first
        k = (column + tl.arange(0, COLUMNS))[:, None]
        byte = (column // 2 + tl.arange(0, COLUMNS // 2))[:, None]
        # Counted in groups of 32, which shows that 16 bytes are within or without together.
        packed = tl.load(codes + byte, (n < N)[None, :, None] & (byte // 16 < K // 32), 0)
        rows = tl.load(x + k, (m < M)[None, :, None] & (k // 32 < K // 32), 0.0)
        even, odd = tl.split(tl.reshape(rows, SLICES, ROWS, COLUMNS // 2, 2))
        high, low = _decode(packed, ASM, TABLE, dtype)
        total = tl.dot(high, tl.permute(even, 0, 2, 1), input_precision="ieee")
        total = tl.dot(low, tl.permute(odd, 0, 2, 1), total, input_precision="ieee")
        block = n * (K // BLOCK) + column // BLOCK
        inside = (n < N) & (column < K)
        blocks = _scales(absmax, outer, offset, values, block, inside, NESTED)
        acc += total * blocks[:, :, None]
    result = tl.sum(acc, 0)
    if BIASED:
        result += tl.load(bias + n, n < N, 0.0).to(tl.float32)[:, None]
    if RANK > 0:
        result += scale * _lowrank(h, b, m, n, M, N, dtype, RANK, PADDED)
    at = m[None].to(tl.int64) * N + n[:, None]
    tl.store(y + at, result.to(y.dtype.element_ty), (n < N)[:, None] & (m < M))


@triton.jit
def tile_kernel(
    x, codes, absmax, outer, offset, values, bias, h, b, y, M, N, K, scale,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ASM: tl.constexpr, TABLE: tl.constexpr,
    BIASED: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, OUTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """More rows: tiles large enough for warp groups, and every SPLITS-th step of the columns."""
    dtype: tl.constexpr = x.dtype.element_ty
    across = tl.cdiv(M, ROWS)  # programs of one tile of weights are neighbours, which share the L2
    n = tl.program_id(0) // across * OUTS + tl.arange(0, OUTS)
    m = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    x += m[:, None].to(tl.int64) * K
    codes += n[:, None].to(tl.int64) * (K // 2)
    acc = tl.zeros((OUTS, ROWS), tl.float32)
    for start in tl.range(part * COLUMNS, K, SPLITS * COLUMNS, num_stages=STAGES):
        k = start + tl.arange(0, COLUMNS)
        byte = start // 2 + tl.arange(0, COLUMNS // 2)
        packed = tl.load(codes + byte, (n < N)[:, None], 0)
        rows = tl.load(x + k, (m < M)[:, None], 0.0)
        even, odd = tl.split(tl.reshape(rows, ROWS, COLUMNS // 2, 2))
        high, low = _decode(packed, ASM, TABLE, dtype)
        total = tl.dot(high, tl.trans(even), input_precision="ieee")
        total = tl.dot(low, tl.trans(odd), total, input_precision="ieee")
        block = n * (K // BLOCK) + start // BLOCK
        acc += total * _scales(absmax, outer, offset, values, block, n < N, NESTED)[:, None]
    if part == 0:
        if BIASED:
            acc += tl.load(bias + n, n < N, 0.0).to(tl.float32)[:, None]
        if RANK > 0:
            acc += scale * _lowrank(h, b, m, n, M, N, dtype, RANK, PADDED)
    at = (part * M + m)[None].to(tl.int64) * N + n[:, None]
    tl.store(y + at, acc.to(y.dtype.element_ty), (n < N)[:, None] & (m < M))


@triton.jit
def backward_kernel(
    grad, codes, absmax, outer, offset, values, out, M, N, K,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ASM: tl.constexpr, TABLE: tl.constexpr,
    WIDE: tl.constexpr, OUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grad·weight. It contracts what the absmax differs in, so that multiplies the weights."""
    dtype: tl.constexpr = grad.dtype.element_ty
    across = tl.cdiv(M, ROWS)
    start = tl.program_id(0) // across * COLUMNS
    m = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    grad += m[:, None].to(tl.int64) * N
    codes += start // 2 + tl.arange(0, COLUMNS // 2)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(part * OUTS, N, SPLITS * OUTS, num_stages=STAGES):
        n = first + tl.arange(0, OUTS)
        packed = tl.load(codes + n[:, None].to(tl.int64) * (K // 2), (n < N)[:, None], 0)
        rows = tl.load(grad + n, (m < M)[:, None] & (n < N), 0.0)
        block = n * (K // BLOCK) + start // BLOCK
        scale = _scales(absmax, outer, offset, values, block, n < N, NESTED)[:, None]
        high, low = _decode(packed, ASM, TABLE, WIDE)
        high, low = (high.to(tl.float32) * scale).to(dtype), (low.to(tl.float32) * scale).to(dtype)
        weight = tl.reshape(tl.join(high, low), OUTS, COLUMNS)
        acc = tl.dot(rows, weight, acc, input_precision="ieee")
    at = (part * M + m)[:, None].to(tl.int64) * K + start + tl.arange(0, COLUMNS)
    tl.store(out + at, acc.to(out.dtype.element_ty), (m < M)[:, None])


@triton.jit
def sum_kernel(parts, out, count, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """The sum of a split contraction's parts, always in one order."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(parts + part * count + i, i < count, 0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), i < count)


class Weight(NamedTuple):
    """A quantized matrix."""

    codes: Tensor
    absmax: Tensor
    outer: Tensor | None
    offset: Tensor | None
    outs: int
    columns: int
    block_size: int
    codebook: nf4.Codebook

    def tensors(self) -> tuple[Tensor, ...]:
        """What every kernel takes; any tensor stands in for one that is not read."""
        if self.outer is None or self.offset is None:
            return self.codes, self.absmax, self.codes, self.codes, self.codes
        values = nf4.dynamic_map(self.codes.device)
        return self.codes, self.absmax, self.outer, self.offset, values

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """What every kernel is compiled for, to decode to a dtype."""
        return {
            "BLOCK": self.block_size,
            "NESTED": self.outer is not None,
            "ASM": lookup(self.codebook, dtype) if _NATIVE else "",
            "TABLE": () if _NATIVE else tuple(nf4.codebook(self.codebook).tolist()),
        }

    def fits(self) -> bool:
        """Whether a step of a product lies within one block of one row."""
        return self.block_size in nf4.BLOCK_SIZES and self.columns % self.block_size == 0


class Update(NamedTuple):
    """A low-rank update of a product: scale·h·bᵀ, where h is x·aᵀ."""

    h: Tensor
    b: Tensor
    scale: float


def _decoded(weight: Weight, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    codes = weight.codes
    if weight.block_size % 32:
        scales = weight.absmax
        if weight.outer is not None and weight.offset is not None:
            scales = nf4.unnest(scales, weight.outer, weight.offset)
        return nf4.dequantize(codes, scales, shape, weight.block_size, weight.codebook).to(dtype)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    if out.numel():
        constants = weight.constants(torch.float32)
        # Not fused to multiply-adds, so that nested absmax are the reference's to the bit.
        dequantize_kernel[(triton.cdiv(out.numel(), 1024),)](
            *weight.tensors(), out, out.numel(), **constants, GROUPS=32, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def slim(
    rows: Tensor, weight: Weight, bias: Tensor | None, update: Update | None, shape: Slim
) -> Tensor:
    """rows·weightᵀ by the kernel for few rows."""
    y = rows.new_empty(rows.shape[0], weight.outs)
    grid = triton.cdiv(weight.outs, shape.outs), triton.cdiv(rows.shape[0], shape.rows)
    arguments, constants = _forward(rows, weight, bias, update, shape)
    slim_kernel[grid](*arguments[:-1], y, *arguments[-1], **constants, SLICES=shape.slices)
    return y


def tiled(
    rows: Tensor,
    weight: Weight,
    bias: Tensor | None,
    update: Update | None,
    shape: Tile,
    splits: int,
) -> Tensor:
    """rows·weightᵀ by the kernel for more rows."""
    parts = _parts(rows, weight.outs, splits)
    grid = triton.cdiv(weight.outs, shape.outs) * triton.cdiv(rows.shape[0], shape.rows), splits
    arguments, constants = _forward(rows, weight, bias, update, shape)
    tile_kernel[grid](*arguments[:-1], parts, *arguments[-1], **constants, SPLITS=splits)
    return _summed(parts, rows.dtype)


def backward(rows: Tensor, weight: Weight, shape: Tile, splits: int) -> Tensor:
    """rows·weight by the kernel for few rows."""
    parts = _parts(rows, weight.columns, splits)
    arguments, constants = _backward(rows, weight, shape)
    tiles = weight.columns // constants["COLUMNS"] * triton.cdiv(rows.shape[0], shape.rows)
    launch = backward_kernel[tiles, splits]
    launch(*arguments[:-1], parts, *arguments[-1], **constants, SPLITS=splits)
    return _summed(parts, rows.dtype)


def _forward(
    rows: Tensor, weight: Weight, bias: Tensor | None, update: Update | None, shape: Slim | Tile
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments and constants that both forward kernels take, the sizes as one last argument."""
    h, b, scale = update or (weight.codes, weight.codes, 0.0)
    rank = b.shape[1] if update else 0
    sizes = rows.shape[0], weight.outs, weight.columns, scale
    arguments = [rows, *weight.tensors(), weight.codes if bias is None else bias, h, b, sizes]
    return arguments, {
        **weight.constants(rows.dtype),
        **_shape(weight, shape),
        "BIASED": bias is not None,
        "RANK": rank,
        "PADDED": max(16, triton.next_power_of_2(rank)),
    }


def _backward(rows: Tensor, weight: Weight, shape: Tile) -> tuple[list[Any], dict[str, Any]]:
    """The same of the backward kernel."""
    sizes = rows.shape[0], weight.outs, weight.columns
    wide = rows.dtype == torch.float32
    return [rows, *weight.tensors(), sizes], {
        **weight.constants(torch.float32 if wide else torch.float16),
        **_shape(weight, shape),
        "WIDE": tl.float32 if wide else tl.float16,
    }


def _shape(weight: Weight, shape: Slim | Tile) -> dict[str, Any]:
    """The constants and options of a tile; its columns lie within a block."""
    return {
        "OUTS": shape.outs,
        "ROWS": shape.rows,
        "COLUMNS": min(shape.columns, weight.block_size),
        "STAGES": shape.stages,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        "enable_fp_fusion": True,
    }


def _parts(rows: Tensor, width: int, splits: int) -> Tensor:
    """Room for the parts of a contraction; one part is the result itself."""
    dtype = rows.dtype if splits == 1 else torch.float32
    return torch.empty(splits, rows.shape[0], width, dtype=dtype, device=rows.device)


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    out = torch.empty_like(parts[0], dtype=dtype)
    sum_kernel[(triton.cdiv(out.numel(), 1024),)](
        parts, out, out.numel(), SPLITS=len(parts), SIZE=1024, num_warps=4, enable_fp_fusion=True
    )
    return out


@cache
def _card(device: torch.device) -> Card:
    return card(torch.cuda.get_device_name(device) if device.type == "cuda" else "")


def _splits(programs: int, tiles: int, steps: int) -> int:
    """Into how many parts a contraction of so many steps is split; a part has at least eight."""
    return max(1, min(programs // tiles, steps // 8, 16))


def _product(
    x: Tensor, weight: Weight, bias: Tensor | None, update: tuple[Tensor, Tensor, float] | None
) -> Tensor:
    """The product by the kernel that the card's table names for so many rows."""
    dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
    rows = x.reshape(-1, weight.columns).to(dtype).contiguous()
    count, table = rows.shape[0], _card(x.device)
    inner = None
    if update is not None:
        a, b, scale = update
        inner = Update(rows @ a.to(dtype).t(), b.to(dtype).contiguous(), scale)
    fused = inner if inner is not None and 0 < inner.b.shape[1] <= MAX_RANK else None
    y = None
    if count and weight.outs and weight.columns and weight.fits():
        few, many = ((EXACT,), ()) if dtype == torch.float32 else (table.slim, table.tiles)
        if thin := _at(few, count):
            y = slim(rows, weight, bias, fused, thin)
        elif tile := _at(many, count):
            tiles = triton.cdiv(weight.outs, tile.outs) * triton.cdiv(count, tile.rows)
            splits = _splits(table.programs, tiles, weight.columns // tile.columns)
            y = tiled(rows, weight, bias, fused, tile, splits)
    if y is None:
        y = functional.linear(
            rows, _decoded(weight, weight[4:6], dtype), None if bias is None else bias.to(dtype)
        )
        fused = None
    if inner is not None and fused is None:
        y.addmm_(inner.h, inner.b.t(), alpha=inner.scale)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.outs)


def _at(table: Sequence[tuple[int, Any]], count: int) -> Any:
    """The first entry that takes so many rows."""
    return next((entry for limit, entry in table if count <= limit), None)


def dequantize(
    codes: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int, codebook: nf4.Codebook
) -> Tensor:
    """The tensor that the codes stand for, fp32."""
    weight = Weight(codes, absmax, None, None, 0, 0, block_size, codebook)
    return _decoded(weight, shape, torch.float32)


def linear(
    x: Tensor, codes: Tensor, absmax: Tensor, outer: Tensor | None, offset: Tensor | None,
    bias: Tensor | None, out_features: int, block_size: int, codebook: nf4.Codebook,
) -> Tensor:  # fmt: skip
    """x·weightᵀ + bias."""
    columns = x.shape[-1]
    weight = Weight(codes, absmax, outer, offset, out_features, columns, block_size, codebook)
    return _product(x, weight, bias, None)


def linear_backward(
    grad: Tensor, codes: Tensor, absmax: Tensor, outer: Tensor | None, offset: Tensor | None,
    in_features: int, block_size: int, codebook: nf4.Codebook,
) -> Tensor:  # fmt: skip
    """grad·weight."""
    outs = grad.shape[-1]
    weight = Weight(codes, absmax, outer, offset, outs, in_features, block_size, codebook)
    dtype = torch.float32 if grad.dtype == torch.float64 else grad.dtype
    rows = grad.reshape(-1, outs).to(dtype).contiguous()
    count, table = rows.shape[0], _card(grad.device)
    tile = None
    if count and outs and in_features and weight.fits() and dtype != torch.float32:
        tile = _at(table.backward, count)
    if tile:
        tiles = in_features // min(tile.columns, block_size) * triton.cdiv(count, tile.rows)
        splits = _splits(table.programs, tiles, outs // tile.outs)
        result = backward(rows, weight, tile, splits)
    else:
        result = rows @ _decoded(weight, weight[4:6], dtype)
    return result.to(grad.dtype).reshape(*grad.shape[:-1], in_features)


def lora(
    x: Tensor, codes: Tensor, absmax: Tensor, outer: Tensor | None, offset: Tensor | None,
    bias: Tensor | None, a: Tensor, b: Tensor, scale: float, block_size: int,
    codebook: nf4.Codebook,
) -> Tensor:  # fmt: skip
    """x·weightᵀ + bias + scale·(x·aᵀ)·bᵀ."""
    outs, columns = b.shape[0], x.shape[-1]
    weight = Weight(codes, absmax, outer, offset, outs, columns, block_size, codebook)
    return _product(x, weight, bias, (a, b, scale))
