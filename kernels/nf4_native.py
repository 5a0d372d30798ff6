"""The C kernels of `nf4_cpu.c`, where the extension was built.

Where it was not, `available` says so, warning once, and the callers take the plain torch of `nf4`.
The best instruction set of the machine is used; PEFTC_NF4_ISA names another: avx512, avx2, neon or
scalar. Inputs are on the CPU and as `nf4` describes them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
import warnings
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from peftc.kernels import nf4
from peftc.kernels.nf4 import Codebook

FEW_ROWS = 64  # up to which `multiply` beats dequantizing for torch to multiply
_EXTENSION = "peftc.kernels._nf4_cpu"
_STEP = 128  # weights that the widest vectors take at once
_MAX_ROWS = 64  # of x that are arranged at once
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_local = threading.local()


def available() -> bool:
    """Whether there is a C library to call."""
    return _library() is not None


def use(isa: str | None = None) -> str:
    """Takes an instruction set for every thread: the named one, PEFTC_NF4_ISA's, or the best.

    Returns:
        Its name.

    Raises:
        ValueError: The machine, or this build, has not got it.
    """
    library = _library()
    assert library is not None
    return _use(library, isa)


def quantize(weight: Tensor, block_size: int, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """As `nf4.quantize`, to the bit."""
    if weight.dtype not in _TYPES:
        weight = weight.float()
    count = weight.numel()
    codes = torch.empty(-(-count // 2), 1, dtype=torch.uint8)
    absmax = torch.empty(nf4.blocks(count, block_size))
    thresholds, order = nf4.thresholds(codebook), _order(codebook)
    kind = _TYPES[weight.dtype]
    _run("quantize", weight, kind, count, block_size, thresholds, order, codes, absmax)
    return codes, absmax


def decode(
    codes: Tensor, absmax: Tensor, start: int, out: Tensor, block_size: int, codebook: Codebook
) -> None:
    """Dequantizes as many elements as `out` has, beginning with `start`.

    Args:
        codes: Of the whole tensor.
        absmax: Of the whole tensor, fp32.
        start: The first element's number, an even one.
        out: Where to, fp32 and contiguous.
        block_size: As it was quantized with.
        codebook: As it was quantized with.
    """
    values = nf4.codebook(codebook)
    _run("decode", codes, absmax, values, out, start, out.numel(), block_size)


def multiply(
    x: Tensor, codes: Tensor, absmax: Tensor, out_features: int, block_size: int, codebook: Codebook
) -> Tensor:
    """The product of x and a quantized matrix's transpose, fast for few rows.

    Args:
        x: (rows, columns), fp32; a row is whole blocks.
        codes: Of a matrix (out_features, columns).
        absmax: Likewise, fp32.
        out_features: The rows of the matrix.
        block_size: One of `nf4.BLOCK_SIZES`.
        codebook: As it was quantized with.

    Returns:
        (rows, out_features), summed in fp32.
    """
    rows, columns = x.shape
    result = torch.empty(rows, out_features)
    arranged = scratch(min(rows, _MAX_ROWS) * -(-columns // _STEP) * _STEP)
    values, sizes = nf4.codebook(codebook), (rows, columns, out_features, block_size)
    _run("multiply", x, codes, absmax, values, arranged, result, *sizes)
    return result


def unnest(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """As `nf4.unnest`, to the bit."""
    result = torch.empty(codes.shape)
    _run("unnest", codes, nf4.dynamic_map(), absmax, offset, result, codes.numel())
    return result


def scratch(count: int) -> Tensor:
    """A buffer of fp32, the same at each call of a thread: fresh pages would cost more than it."""
    buffer: Tensor | None = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < count:
        with torch.inference_mode(False):
            buffer = _local.buffer = torch.empty(count)
    return buffer[:count]


@cache
def _order(codebook: Codebook) -> Tensor | None:
    """From pairs of ordinals to pairs of codes, unless they are the same."""
    order = nf4.order(codebook)
    pairs = (order[:, None] << 4 | order).flatten()
    return None if pairs.tolist() == list(range(256)) else pairs


def _run(name: str, *arguments: Tensor | int | None) -> None:
    """Calls the library, with torch's number of threads; tensors go by address."""
    library = _library()
    assert library is not None
    kept = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in kept]
    getattr(library, f"nf4_{name}")(*plain, torch.get_num_threads())


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = _load()
    except (ImportError, OSError) as error:
        warnings.warn(
            f"The C kernels for 4-bit weights are not there ({error}); plain torch, several times "
            "slower, does their work. With a C compiler, build them by `pip install --no-binary "
            "peftc peftc`, or `pip install -e .` in a clone.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    signatures: dict[str, list[type]] = {
        "use": [ctypes.c_char_p],
        "openmp": [pointer] * 3,
        "quantize": [pointer, number, count, count, *[pointer] * 4, number],
        "decode": [*[pointer] * 4, *[count] * 3, number],
        "multiply": [*[pointer] * 6, *[count] * 4, number],
        "unnest": [*[pointer] * 5, count, number],
    }
    for name, types in signatures.items():
        function = getattr(library, f"nf4_{name}")
        function.argtypes, function.restype = types, None
    library.nf4_use.restype = ctypes.c_char_p
    library.nf4_openmp(*_openmp())
    _use(library, None)
    return library


def _use(library: ctypes.CDLL, isa: str | None) -> str:
    isa = isa or os.environ.get("PEFTC_NF4_ISA")
    name: bytes | None = library.nf4_use(isa and isa.encode())
    if name is None:
        raise ValueError(f"there are no 4-bit kernels for {isa!r} on this machine")
    return name.decode()


def _load() -> ctypes.CDLL:
    spec = importlib.util.find_spec(_EXTENSION)
    if spec is None or spec.origin is None:
        raise ImportError(f"{_EXTENSION} was not built")
    return ctypes.CDLL(spec.origin)


def _openmp() -> list[ctypes.c_void_p]:
    """What starts threads: in torch's own OpenMP, which all can see, else in the system's."""
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    for path in (None, "libgomp.so.1"):
        with suppress(OSError, AttributeError, TypeError):  # Windows has no None
            runtime = ctypes.CDLL(path)
            return [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names]
    return [ctypes.c_void_p()] * 3
