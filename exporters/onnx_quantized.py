"""Weights of a graph's own: widened to fp32, or linear layers in 8 or 4 bits.

Nothing refers to the merged checkpoint, which is not written: the directory holds what the runtime
needs. Linear layers are ONNX Runtime's `MatMulNBits`: blocks of a row in evenly spaced steps, each
block with one fp32 step and no zero point, made from the merged weights and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch

from peftc.constants import Constant, Derived, Leaf, cast, derive
from peftc.errors import ProofError
from peftc.evaluate import Evaluation, value
from peftc.exporters.onnx_lowering import RUNTIME, Lowering
from peftc.exporters.onnx_weights import OWN_FILE, StoredWeights
from peftc.graphs import Builder, operator
from peftc.program import Program
from peftc.reading import read
from peftc.safetensors_file import read_header

Weights = Literal["stored", "fp32", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}
HEAD_BITS = 8  # an output head decides between tokens, and is read once a token
SAMPLED = 16  # rows of each weight that are compared
CODES, STEPS = ".codes", ".steps"


@dataclass(frozen=True)
class Uniform:
    """How linear layers are quantized.

    Attributes:
        bits: Of a weight.
        block: Neighbours of a row that share a step.
        accuracy: MatMulNBits' accuracy_level: 4 lets it multiply in int8, 1 in fp32.
    """

    bits: int
    block: int = 32
    accuracy: int = 4


class OwnWeights(StoredWeights):
    """The constants of a program in a file of the graph's own.

    Args:
        program: What is written.
        form: How to quantize linear layers; None for fp32.
    """

    def __init__(self, program: Program, form: Uniform | None) -> None:
        super().__init__(program)
        self.places, self.form = {}, form
        self.quantized: dict[str, tuple[Constant, int]] = {}  # matrices (out, in), and their bits

    def name(self, name: str) -> str:
        return self.program.aliases.get(name, name)

    def value(self, name: str) -> ir.Value:
        constant = self.program.constants[name]
        widen = self.form is None and constant.spec.dtype.is_floating_point
        return self.kept(name, cast(constant, torch.float32) if widen else constant)

    def linear(
        self,
        lowering: Lowering,
        x: ir.Value,
        name: str,
        bias: ir.Value | None,
        turned: bool = False,
    ) -> ir.Value | None:
        constant = self.program.constants[name]
        if self.form is None or len(constant.spec.shape) != 2:
            return None
        head = name.removesuffix(".weight") == self.program.head
        bits = max(self.form.bits, HEAD_BITS) if head else self.form.bits
        if turned:
            build = Builder()
            build.graph.output(build.t(build.const("weight")))
            constant = derive(build.graph, {"weight": constant}, torch.float32)
        base = self.name(name)
        self.quantized[base] = constant, bits
        for suffix in (CODES, STEPS):
            if base + suffix not in lowering.initializers:
                lowering.initializers[base + suffix] = self._part(base, suffix)
        given = [lowering.initializers[base + suffix] for suffix in (CODES, STEPS)]
        outputs, inputs = constant.spec.shape
        y = lowering.op(
            "MatMulNBits", x, *given, domain=RUNTIME, K=inputs, N=outputs, bits=bits,
            block_size=self.form.block, accuracy_level=self.form.accuracy,
        )  # fmt: skip
        return y if bias is None else lowering.op("Add", y, bias)

    def _part(self, name: str, suffix: str) -> ir.Value:
        matrix, bits = self.quantized[name]
        assert self.form is not None
        kind = "codes" if suffix == CODES else "scales"
        build = Builder()
        made = operator(f"peftc.uniform_{kind}.default")
        build.graph.output(build.op(made, build.const("matrix"), bits, self.form.block))
        dtype = torch.uint8 if suffix == CODES else torch.float32
        return self.kept(name + suffix, derive(build.graph, {"matrix": matrix}, dtype))

    @property
    def report(self) -> dict[str, Any]:
        if self.form is None:
            return {"weights": "fp32"}
        head = [bits for _, bits in self.quantized.values() if bits != self.form.bits]
        return {
            "weights": f"int{self.form.bits}",
            "block_size": self.form.block,
            "accuracy_level": self.form.accuracy,
            "quantized_layers": len(self.quantized),
            **({"head_bits": HEAD_BITS} if head else {}),
        }

    def check(self, path: Path) -> dict[str, Any]:
        """Compares the first rows of every quantized weight with what was written of them.

        Raises:
            ProofError: A weight is further than a step from what its code stands for.
        """
        file = read_header(path / OWN_FILE)
        squares, total, worst, at = 0.0, 0.0, 0.0, None
        for name, (matrix, bits) in self.quantized.items():
            codes, steps = (Leaf(file.tensors[name + suffix]) for suffix in (CODES, STEPS))
            count = min(SAMPLED, matrix.spec.shape[0])
            step = read(steps, 0, count).unsqueeze(-1)
            got = dequantized(read(codes, 0, count), step, bits)
            want = blocks(_rows(matrix, count), got.shape[-1])
            difference = got - want
            if not bool((difference.abs() <= step.abs() * 1.001).all()):
                raise ProofError(
                    "is further than a step from what its codes stand for",
                    where=name,
                    fix="nothing was published; look for a NaN or an infinity in the weight",
                )
            error, size = float(difference.square().sum()), float(want.square().sum())
            squares, total = squares + error, total + size
            if size and (error / size) ** 0.5 > worst:
                worst, at = (error / size) ** 0.5, name
        relative = (squares / total) ** 0.5 if total else 0.0
        return {"relative_error": relative, "worst": worst, "at": at, "rows": SAMPLED}


def dequantized(codes: torch.Tensor, steps: torch.Tensor, bits: int) -> torch.Tensor:
    """What codes (out, blocks, bytes) and steps (out, blocks, 1) stand for: (out, blocks, size)."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return torch.mul(codes.float() - 2 ** (bits - 1), steps)


def blocks(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """Rows as blocks (out, blocks, size), the last filled up with zeros."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size))
    return padded.reshape(len(matrix), -1, size)


def _rows(constant: Constant, count: int) -> torch.Tensor:
    if isinstance(constant, Derived):
        return Evaluation(constant.graph, constant.inputs).rows(0, count)
    whole = read(constant, 0, count) if isinstance(constant, Leaf) else value(constant)[:count]
    return whole.float()


def weights_of(program: Program, kind: Weights) -> StoredWeights:
    """The constants of a program as a graph is to have them."""
    if kind == "stored":
        return StoredWeights(program)
    return OwnWeights(program, Uniform(BITS[kind]) if kind in BITS else None)
