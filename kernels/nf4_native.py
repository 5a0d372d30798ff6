"""The C kernels of `nf4_cpu.c`, where the extension was built."""

from __future__ import annotations

import torch
from torch import Tensor

from peftc.kernels.nf4 import Codebook

FEW_ROWS = 8


def available() -> bool:
    return False


def quantize(weight: Tensor, block_size: int, codebook: Codebook) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def decode(
    codes: Tensor, absmax: Tensor, start: int, out: Tensor, block_size: int, codebook: Codebook
) -> None:
    raise NotImplementedError


def multiply(
    x: Tensor, codes: Tensor, absmax: Tensor, out_features: int, block_size: int, codebook: Codebook
) -> Tensor:
    raise NotImplementedError


def unnest(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    raise NotImplementedError


def scratch(count: int) -> Tensor:
    raise NotImplementedError
