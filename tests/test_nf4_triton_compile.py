"""The Triton kernels compiled ahead of time, with no GPU: registers, spills, tensor cores."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peftc.kernels import nf4, nf4_triton
from peftc.kernels.nf4_tuning import CARDS, DEFAULT, EXACT, Card, Slim, Tile

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8",
}  # fmt: skip
# The cards that run on each architecture, and what a block may use of its shared memory.
ARCHITECTURES = {
    80: ({"A100": CARDS["A100"], "default": DEFAULT}, 163 << 10),
    90: ({"H200": CARDS["H200"], "default": DEFAULT}, 227 << 10),
}


class Built(NamedTuple):
    """What came of a compilation."""

    ptx: str
    registers: int
    shared: int


Build = Callable[..., Built]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.fixture
def build(tmp_path: Path, request: pytest.FixtureRequest) -> Build:
    """Compiles a kernel as its launch would, and refuses spills."""

    def compiled(kernel: Any, arguments: list[Any], constants: dict[str, Any], arch: int) -> Built:
        options = {k: constants[k] for k in constants if k not in kernel.arg_names}
        fixed = {k: v for k, v in constants.items() if k in kernel.arg_names}
        names = [name for name in kernel.arg_names if name not in fixed]
        assert len(names) == len(arguments)
        types = {name: _type(value) for name, value in zip(names, arguments, strict=True)}
        even = [
            i
            for i, name in enumerate(kernel.arg_names)
            if types.get(name, "").startswith("*") or name in ("N", "K", "count")
        ]
        source = ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in kernel.arg_names},
            fixed,
            {(i,): [["tt.divisibility", 16]] for i in even},
        )
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        text = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", cubin], text=True)
        use = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        assert use["STACK"] == 0 and use["LOCAL"] == 0, text
        for name, count in (("registers", use["REG"]), ("shared", built.metadata.shared)):
            request.node.user_properties.append((name, count))
        return Built(built.asm["ptx"], use["REG"], built.metadata.shared)

    return compiled


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def matrix(block: int = 64, nested: bool = False) -> nf4_triton.Weight:
    codes, absmax = nf4.quantize(torch.ones(64, 4096), block)
    inner, outer, offset = nf4.nest(absmax) if nested else (absmax, None, None)
    return nf4_triton.Weight(codes, inner, outer, offset, 64, 4096, block, "nf4")


def launch(
    shape: Slim | Tile, dtype: torch.dtype, *, full: bool = True, block: int = 64
) -> tuple[Any, list[Any], dict[str, Any]]:
    """A forward kernel, its arguments and constants; `full` is nested, biased and low-rank."""
    rows, weight = torch.ones(3, 4096, dtype=dtype), matrix(block, nested=full)
    update = nf4_triton.Update(rows, torch.ones(64, 16, dtype=dtype), 0.5) if full else None
    arguments, constants = nf4_triton._forward(rows, weight, rows if full else None, update, shape)
    arguments = [*arguments[:-1], rows, *arguments[-1]]
    if isinstance(shape, Slim):
        constants["SLICES"] = shape.slices
        if shape.rows == 1:  # a launch makes a size of one a constant
            del arguments[-4]
            constants["M"] = 1
        return nf4_triton.slim_kernel, arguments, constants
    return nf4_triton.tile_kernel, arguments, {**constants, "SPLITS": 4}


def entries(kind: str) -> Iterator[Any]:
    """Each different shape of the tables, with the architecture that it is for."""
    for arch, (cards, limit) in ARCHITECTURES.items():
        seen: set[Any] = set()
        for name, card in cards.items():
            table: Any = getattr(card, kind)
            for rows, shape in table:
                if shape not in seen:
                    seen.add(shape)
                    yield pytest.param(shape, arch, limit, id=f"sm{arch}-{name}-{rows}")


@pytest.mark.parametrize(("shape", "arch", "limit"), entries("slim"))
@pytest.mark.parametrize("full", [False, True])
def test_slim_keeps_occupancy(shape: Slim, arch: int, limit: int, full: bool, build: Build) -> None:
    built = build(*launch(shape, torch.bfloat16, full=full), arch)
    assert "mma.sync" in built.ptx
    assert built.registers <= 128 and built.shared <= limit // 4  # 4 blocks of 128 threads


@pytest.mark.parametrize(("shape", "arch", "limit"), entries("tiles"))
def test_tiles_use_tensor_cores_of_the_architecture(
    shape: Tile, arch: int, limit: int, build: Build
) -> None:
    built = build(*launch(shape, torch.bfloat16), arch)
    assert ("wgmma.mma_async" if arch == 90 else "mma.sync") in built.ptx
    assert built.registers <= 255 and built.shared <= limit


@pytest.mark.parametrize(("shape", "arch", "limit"), entries("backward"))
def test_backward_uses_tensor_cores(shape: Tile, arch: int, limit: int, build: Build) -> None:
    rows, weight = torch.ones(3, 64, dtype=torch.bfloat16), matrix(nested=True)
    arguments, constants = nf4_triton._backward(rows, weight, shape)
    built = build(
        nf4_triton.backward_kernel, [*arguments[:-1], rows, *arguments[-1]],
        {**constants, "SPLITS": 4}, arch,
    )  # fmt: skip
    assert ("wgmma.mma_async" if arch == 90 and shape.rows >= 64 else "mma.sync") in built.ptx
    assert built.registers <= 255 and built.shared <= limit


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_exact_product_uses_no_tensor_cores(arch: int, build: Build) -> None:
    built = build(*launch(EXACT[1], torch.float32), arch)
    assert "mma" not in built.ptx and "fma.rn.f32" in built.ptx
    assert built.registers <= 168


def test_slim_of_one_row_keeps_occupancy_when_plain(build: Build) -> None:
    built = build(*launch(CARDS["H200"].slim[0][1], torch.bfloat16, full=False), 90)
    assert built.registers <= 80 and built.shared <= 32 << 10  # 6 blocks of 128 threads


@pytest.mark.parametrize("block", [32, 4096])
def test_products_compile_for_extreme_blocks(block: int, build: Build) -> None:
    for _, shape in (CARDS["H200"].slim[0], CARDS["H200"].tiles[-1]):
        build(*launch(shape, torch.float16, block=block), 90)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_stores_sixteen_bytes(dtype: torch.dtype, arch: int, build: Build) -> None:
    weight = matrix(nested=True)
    constants = weight.constants(torch.float32)
    arguments = [*weight.tensors(), torch.ones(1, dtype=dtype), 1]
    options = {"GROUPS": 32, "num_warps": 4, "enable_fp_fusion": False}
    built = build(nf4_triton.dequantize_kernel, arguments, {**constants, **options}, arch)
    assert "st.global.v4.b32" in built.ptx
    assert built.registers <= 64


def test_sum_of_parts_compiles(build: Build) -> None:
    arguments = [torch.ones(1), torch.ones(1, dtype=torch.bfloat16), 1]
    constants = {"SPLITS": 16, "SIZE": 1024, "num_warps": 4, "enable_fp_fusion": True}
    assert build(nf4_triton.sum_kernel, arguments, constants, 90).registers <= 64


def test_every_card_has_rising_limits() -> None:
    cards: list[Card] = [*CARDS.values(), DEFAULT]
    for card in cards:
        forward = [limit for limit, _ in (*card.slim, *card.tiles)]
        assert forward == sorted(set(forward))
