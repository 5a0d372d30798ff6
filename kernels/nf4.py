"""The 4-bit formats of bitsandbytes in plain torch: the golden reference of every kernel.

A tensor is taken flat, row-major, in blocks of `block_size` elements that may cross rows. A block
is stored as its largest absolute value, the absmax, and one 4-bit code an element: the index of the
codebook's entry nearest to element/absmax. Codes are packed two a byte, the first in the high half.
`nf4` is the normal float of QLoRA (Dettmers et al. 2023, appendix E), `fp4` a 4-bit float.

The numbers, to the bit: element·(1/absmax) in fp32, divided instead in a short last block; a value
half way between two entries takes the lower. A block of zeros has absmax 0. A block that holds a
NaN or an infinity has that absmax and decodes to NaN and infinity throughout, never to numbers.

Double quantization stores the absmax in turn: less their mean, as 8-bit codes of a signed dynamic
map (Dettmers et al. 2022), in blocks of 256 with an absmax of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, get_args

import torch
from torch.nn.functional import pad

Codebook = Literal["nf4", "fp4"]
CODEBOOKS: tuple[Codebook, ...] = get_args(Codebook)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
_TINIEST = 1e-38  # what an absmax is clamped to before the reciprocal

_VALUES: dict[Codebook, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5,
        0.1666666716337204, 0.25, 0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
        -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}  # fmt: skip
# The codes in the order of their values.
_ORDER: dict[Codebook, tuple[int, ...]] = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}


@cache
def codebook(name: Codebook, device: torch.device | str = "cpu") -> torch.Tensor:
    """The value of each of the 16 codes, fp32."""
    return torch.tensor(_VALUES[name], device=device)


@cache
def thresholds(name: Codebook, device: torch.device | str = "cpu") -> torch.Tensor:
    """The 15 midpoints of neighbouring values, fp32, ascending."""
    values = codebook(name, device)[list(_ORDER[name])]
    return (values[1:] + values[:-1]) / 2


@cache
def order(name: Codebook, device: torch.device | str = "cpu") -> torch.Tensor:
    """The codes in ascending order of their values, uint8."""
    return torch.tensor(_ORDER[name], dtype=torch.uint8, device=device)


@cache
def dynamic_map(device: torch.device | str = "cpu") -> torch.Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending, fp32."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), device=device)


def blocks(count: int, block_size: int) -> int:
    """How many blocks hold so many elements."""
    return -(-count // block_size)


def quantize(
    weight: torch.Tensor, block_size: int = 64, name: Codebook = "nf4"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax of a tensor.

    Args:
        weight: Any shape; fp32, fp16 or bf16.
        block_size: Elements that share an absmax, an even number.
        name: The codebook.

    Returns:
        Codes, uint8 (⌈n/2⌉, 1), the half behind an odd count that of zero, and absmax, fp32
        (blocks,).
    """
    flat = weight.reshape(-1).float()
    scaled, absmax = _scaled(flat, block_size)
    scaled = pad(scaled, (0, scaled.numel() % 2))
    index = torch.bucketize(scaled, thresholds(name, flat.device), out_int32=True)
    codes = order(name, flat.device)[index]
    return (codes[::2] << 4 | codes[1::2])[:, None], absmax


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    block_size: int = 64,
    name: Codebook = "nf4",
) -> torch.Tensor:
    """The tensor that codes and absmax stand for: codebook[code]·absmax, fp32.

    Args:
        codes: uint8, ⌈n/2⌉ of them in any shape.
        absmax: (blocks,), fp32, or bf16 where that was lossless.
        shape: Of the tensor.
        block_size: As it was quantized with.
        name: The codebook.
    """
    count = torch.Size(shape).numel()
    packed = codes.reshape(-1)
    index = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[:count].int()
    values = codebook(name, codes.device)[index]
    scales = absmax.float().repeat_interleave(block_size)[:count]
    return (values * scales).reshape(*shape)


def nest(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Absmax quantized in turn.

    Returns:
        Codes, uint8 (blocks,); their own absmax, fp32 (⌈blocks/256⌉,); and the mean, fp32 ().
    """
    offset = absmax.mean()
    scaled, scales = _scaled(absmax - offset, NESTED_BLOCK_SIZE)
    values = dynamic_map(absmax.device)
    middle = (values[1:] + values[:-1]) / 2
    return torch.bucketize(scaled, middle, out_int32=True).to(torch.uint8), scales, offset


def outer(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `nest` gives beside the codes, which take longest: their absmax, and the mean."""
    offset = absmax.mean()
    return _scaled(absmax - offset, NESTED_BLOCK_SIZE)[1], offset


def unnest(codes: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The absmax that nested ones stand for: map[code]·absmax + offset, fp32 (blocks,)."""
    scales = absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    return dynamic_map(codes.device)[codes.int()] * scales + offset


def _scaled(flat: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements over their block's absmax, within ±1, and the absmax."""
    count = flat.numel()
    whole = count - count % block_size
    absmax = pad(flat.abs(), (0, -count % block_size)).reshape(-1, block_size).amax(1)
    least = absmax.clamp(min=_TINIEST)
    inner = flat[:whole].reshape(-1, block_size) * (1.0 / least[: whole // block_size, None])
    scaled = torch.cat([inner.reshape(-1), flat[whole:] / least[-1:]])
    return scaled.clamp(-1, 1), absmax
