"""The 4-bit operators, over plain tensors: with fakes, gradients, for torch.compile and export.

`codes`, `absmax`, `block_size` and `codebook` are as in `nf4`. `absmax` is fp32, bf16, or nested:
uint8, with `outer` and `offset` as `nf4.nest` gives them. Each operator has one meaning, that of
the reference, and runs on the fastest kernel there is: the C library on a CPU, Triton on CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftc.kernels import nf4, nf4_native

# What is dequantized at once where torch multiplies: x is read again for each tile.
TILE_ROWS, TILE_BYTES = 1024, 64 << 20

_library: Any = torch.library.Library("peftc", "FRAGMENT")  # type: ignore[no-untyped-call]
_STATE = "Tensor codes, Tensor absmax, Tensor? outer, Tensor? offset"
_FORMAT = "int block_size, str codebook"
_SCHEMAS = {
    "nf4_quantize": f"(Tensor weight, {_FORMAT}) -> (Tensor, Tensor)",
    "nf4_codes": f"(Tensor weight, {_FORMAT}) -> Tensor",
    "nf4_absmax": "(Tensor weight, int block_size) -> Tensor",
    "nf4_nest_codes": "(Tensor absmax) -> Tensor",
    "nf4_nest_absmax": "(Tensor absmax) -> Tensor",
    "nf4_unnest": "(Tensor absmax, Tensor outer, Tensor offset) -> Tensor",
    "nf4_map": "(str name) -> Tensor",
    "nf4_state": "(Tensor offset, str text, int size) -> Tensor",
    "nf4_dequantize": f"(Tensor codes, Tensor absmax, SymInt[] shape, {_FORMAT}) -> Tensor",
    "nf4_linear": f"(Tensor x, {_STATE}, Tensor? bias, SymInt out_features, {_FORMAT}) -> Tensor",
    "nf4_linear_backward": f"(Tensor grad, {_STATE}, SymInt in_features, {_FORMAT}) -> Tensor",
    "nf4_lora": (
        f"(Tensor x, {_STATE}, Tensor? bias, Tensor a, Tensor b, float scale, {_FORMAT}) -> Tensor"
    ),
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)


def _quantize(weight: Tensor, block_size: int, codebook: nf4.Codebook) -> tuple[Tensor, Tensor]:
    if weight.device.type == "cpu" and nf4_native.available():
        return nf4_native.quantize(weight, block_size, codebook)
    return nf4.quantize(weight, block_size, codebook)


def _codes(weight: Tensor, block_size: int, codebook: nf4.Codebook) -> Tensor:
    return _quantize(weight, block_size, codebook)[0]


def _absmax(weight: Tensor, block_size: int) -> Tensor:
    return _quantize(weight, block_size, "nf4")[1]


def _nest_codes(absmax: Tensor) -> Tensor:
    return nf4.nest(absmax)[0]


def _nest_absmax(absmax: Tensor) -> Tensor:
    return nf4.outer(absmax)[0]


def _map(name: str) -> Tensor:
    """The values of a codebook's codes, or of the `dynamic` 8-bit ones."""
    return nf4.dynamic_map() if name == "dynamic" else nf4.codebook(name)


def _state(offset: Tensor, text: str, size: int) -> Tensor:
    """A quant state's JSON bytes with the offset in it, filled up with spaces."""
    content = text.replace("OFFSET", repr(offset.item())).encode()
    return torch.tensor(list(content.ljust(size)), dtype=torch.uint8)


def scales(absmax: Tensor, outer: Tensor | None, offset: Tensor | None) -> Tensor:
    """The absmax in fp32, whichever way it is stored."""
    if outer is None:
        return absmax.float()
    assert offset is not None
    if absmax.device.type == "cpu" and nf4_native.available():
        return nf4_native.unnest(absmax, outer, offset)
    return nf4.unnest(absmax, outer, offset)


def _dequantize(
    codes: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    block_size: int,
    codebook: nf4.Codebook,
) -> Tensor:
    if codes.device.type == "cpu" and nf4_native.available():
        result = torch.empty(shape)
        nf4_native.decode(codes, absmax.float(), 0, result, block_size, codebook)
        return result
    return nf4.dequantize(codes, absmax, shape, block_size, codebook)


class _Tiles:
    """A quantized matrix (out, in), some rows of which are dequantized at a time."""

    def __init__(
        self, codes: Tensor, absmax: Tensor, columns: int, block_size: int, codebook: nf4.Codebook
    ) -> None:
        self.codes, self.absmax, self.columns = codes, absmax, columns
        self.block_size, self.codebook = block_size, codebook
        # A tile starts with a block, so that its codes and absmax are slices.
        unit = block_size // math.gcd(block_size, max(1, columns))
        rows = min(TILE_ROWS, TILE_BYTES // 4 // max(1, columns))
        self.step = max(unit, rows // unit * unit)

    def __call__(self, low: int, high: int) -> Tensor:
        """Rows low to high in fp32; valid until the next call on this thread."""
        start, end = low * self.columns, high * self.columns
        if self.codes.device.type == "cpu" and nf4_native.available():
            tile = nf4_native.scratch(end - start)
            nf4_native.decode(self.codes, self.absmax, start, tile, self.block_size, self.codebook)
            return tile.view(high - low, self.columns)
        codes = self.codes.reshape(-1)[start // 2 : -(-end // 2)]
        absmax = self.absmax[start // self.block_size : nf4.blocks(end, self.block_size)]
        shape = (high - low, self.columns)
        return nf4.dequantize(codes, absmax, shape, self.block_size, self.codebook)


def _linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    outer: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
    codebook: nf4.Codebook,
) -> Tensor:
    absmax = scales(absmax, outer, offset)
    columns = x.shape[-1]
    rows = x.reshape(-1, columns).float()
    if (
        x.device.type == "cpu"
        and rows.shape[0] <= nf4_native.FEW_ROWS
        and columns % block_size == 0
        and block_size in nf4.BLOCK_SIZES
        and nf4_native.available()
    ):
        y = nf4_native.multiply(rows, codes, absmax, out_features, block_size, codebook)
    else:
        y = rows.new_empty(rows.shape[0], out_features)
        tiles = _Tiles(codes, absmax, columns, block_size, codebook)
        for low in range(0, out_features, tiles.step):
            high = min(low + tiles.step, out_features)
            torch.mm(rows, tiles(low, high).t(), out=y[:, low:high])
    if bias is not None:
        y += bias
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)


def linear(x: Tensor, *args: Any) -> Tensor:
    """`peftc::nf4_linear`; past the dispatcher, which takes half of a small layer's time.

    So it is where nobody needs to see the operator: without gradients, compilation or tracing.
    """
    seen = torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor
    if seen or x.device.type != "cpu":
        result: Tensor = torch.ops.peftc.nf4_linear.default(x, *args)
        return result
    return _linear(x, *args)


def _linear_backward(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    outer: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    block_size: int,
    codebook: nf4.Codebook,
) -> Tensor:
    absmax = scales(absmax, outer, offset)
    out_features = grad.shape[-1]
    rows = grad.reshape(-1, out_features).float()
    result = rows.new_zeros(rows.shape[0], in_features)
    tiles = _Tiles(codes, absmax, in_features, block_size, codebook)
    for low in range(0, out_features, tiles.step):
        high = min(low + tiles.step, out_features)
        result.addmm_(rows[:, low:high], tiles(low, high))
    return result.to(grad.dtype).reshape(*grad.shape[:-1], in_features)


def _lora(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    outer: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    block_size: int,
    codebook: nf4.Codebook,
) -> Tensor:
    wide = x.float()
    y = _linear(wide, codes, absmax, outer, offset, bias, b.shape[0], block_size, codebook)
    flat = y.view(-1, b.shape[0])
    flat.addmm_((wide @ a.float().t()).view(-1, a.shape[0]), b.float().t(), alpha=scale)
    return y.to(x.dtype)


_KERNELS = {
    "nf4_quantize": _quantize,
    "nf4_codes": _codes,
    "nf4_absmax": _absmax,
    "nf4_nest_codes": _nest_codes,
    "nf4_nest_absmax": _nest_absmax,
    "nf4_unnest": scales,
    "nf4_map": _map,
    "nf4_state": _state,
    "nf4_dequantize": _dequantize,
    "nf4_linear": _linear,
    "nf4_linear_backward": _linear_backward,
    "nf4_lora": _lora,
}
for _name, _kernel in _KERNELS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


def _fake_codes(weight: Tensor, block_size: int, codebook: str) -> Tensor:
    return weight.new_empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)


def _fake_absmax(weight: Tensor, block_size: int) -> Tensor:
    return weight.new_empty(-(-weight.numel() // block_size), dtype=torch.float32)


_FAKES: dict[str, Any] = {
    "nf4_quantize": lambda w, block, book: (_fake_codes(w, block, book), _fake_absmax(w, block)),
    "nf4_codes": _fake_codes,
    "nf4_absmax": _fake_absmax,
    "nf4_nest_codes": lambda absmax: absmax.new_empty(absmax.shape, dtype=torch.uint8),
    "nf4_nest_absmax": lambda absmax: absmax.new_empty(-(-absmax.numel() // nf4.NESTED_BLOCK_SIZE)),
    "nf4_unnest": lambda absmax, outer, offset: outer.new_empty(absmax.shape),
    "nf4_state": lambda offset, text, size: offset.new_empty(size, dtype=torch.uint8),
    "nf4_dequantize": lambda codes, absmax, shape, *_: codes.new_empty(shape, dtype=torch.float32),
    "nf4_linear": lambda x, codes, absmax, outer, offset, bias, out_features, *_: x.new_empty(
        *x.shape[:-1], out_features
    ),
    "nf4_linear_backward": lambda grad, codes, absmax, outer, offset, columns, *_: grad.new_empty(
        *grad.shape[:-1], columns
    ),
    "nf4_lora": lambda x, codes, absmax, outer, offset, bias, a, b, *_: x.new_empty(
        *x.shape[:-1], b.shape[0]
    ),
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"peftc::{_name}", _fake, lib=_library)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, absmax, outer, offset, bias, _, *ctx.format = inputs
    ctx.save_for_backward(codes, absmax, outer, offset)
    ctx.in_features, ctx.biased = x.shape[-1], bias is not None


def _linear_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x and the bias; the quantized weight has none."""
    x = bias = None
    if ctx.needs_input_grad[0]:
        x = torch.ops.peftc.nf4_linear_backward(
            grad, *ctx.saved_tensors, ctx.in_features, *ctx.format
        )
    if ctx.biased and ctx.needs_input_grad[5]:
        bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return x, None, None, None, None, bias, None, None, None


def _save_lora(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, absmax, outer, offset, bias, a, b, ctx.scale, *ctx.format = inputs
    ctx.save_for_backward(x, codes, absmax, outer, offset, a, b)
    ctx.biased = bias is not None


def _lora_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, the bias and the two factors."""
    x, codes, absmax, outer, offset, a, b = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    inner = (rows.to(b.dtype) @ b) * ctx.scale
    to_x = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.peftc.nf4_linear_backward(
            grad, codes, absmax, outer, offset, x.shape[-1], *ctx.format
        )
        to_x = to_x + (inner @ a).to(x.dtype).view(x.shape)
    flat = x.reshape(-1, x.shape[-1]).to(a.dtype)
    to_a = inner.t() @ flat
    to_b = (rows.to(b.dtype).t() @ (flat @ a.t())) * ctx.scale
    bias = rows.sum(0) if ctx.biased and ctx.needs_input_grad[5] else None
    return to_x, None, None, None, None, bias, to_a, to_b, None, None, None


torch.library.register_autograd(
    "peftc::nf4_linear", _linear_gradients, setup_context=_save_linear, lib=_library
)
torch.library.register_autograd(
    "peftc::nf4_lora", _lora_gradients, setup_context=_save_lora, lib=_library
)


def _on_cuda(name: str, kernel: Any) -> Any:
    """The Triton kernel of a name, imported when it first runs; torch's without Triton."""

    def run(*args: Any) -> Tensor:
        try:
            from peftc.kernels import nf4_triton
        except ImportError:
            result: Tensor = kernel(*args)
        else:
            with torch.cuda.device(args[1].device):
                result = getattr(nf4_triton, name)(*args)
        return result

    return run


for _name in ("dequantize", "linear", "linear_backward", "lora"):
    _library.impl(f"nf4_{_name}", _on_cuda(_name, _KERNELS[f"nf4_{_name}"]), "CUDA")

EAGER = {torch.ops.peftc.nf4_linear.default: linear}
