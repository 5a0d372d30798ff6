"""Weights of a graph's own: in another float type, or linear layers in 8 or 4 bits.

Nothing refers to the merged checkpoint, which is not written: the directory holds what the runtime
needs. Linear layers are ONNX Runtime's `MatMulNBits`: blocks of a row in evenly spaced steps, each
block with one step and no zero point, made from the merged weights and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch

from peftc.constants import Constant, Derived, Leaf, Packed, cast, derive
from peftc.errors import ArtifactError, ProofError
from peftc.evaluate import Evaluation, value
from peftc.exporters.onnx_lowering import RUNTIME, Lowering
from peftc.exporters.onnx_weights import FLOATS, OWN_FILE, StoredWeights
from peftc.graphs import Builder, Spec, operator
from peftc.program import Program
from peftc.reading import read
from peftc.safetensors_file import read_header

Weights = Literal["stored", "fp32", "fp16", "bf16", "int8", "int4", "nf4-int8"]
Compute = Literal["fp32", "fp16", "bf16"]
Cache = Literal["grown", "shared"]
BITS = {"int8": 8, "int4": 4, "nf4-int8": 8}
HEAD_BITS = (8, 4)
BLOCK, LARGEST_BLOCK = 32, 128
SAMPLED = 16  # rows of each weight that are compared
ACCURACY = 4  # MatMulNBits' accuracy_level: it may multiply in int8
CODES, STEPS, ROWS = ".codes", ".steps", ".codes (by rows)"


@dataclass(frozen=True)
class Form:
    """What the weights of a graph are, and what it computes in.

    Attributes:
        weights: `stored` refers to the checkpoint's; see `to_onnx` for the others.
        compute: The float type of the graph's values; None for that of the weights, where they have
            one of their own, else fp32.
        head_bits: Of an output head, where linear layers are quantized: it decides between tokens,
            and is read once a token.
        cache: Whether keys and values are copied into a longer cache at every run, or kept by the
            runtime (see `onnx_grouped`).
    """

    weights: Weights = "stored"
    compute: Compute | None = None
    head_bits: int = HEAD_BITS[0]
    cache: Cache = "grown"

    @property
    def dtype(self) -> torch.dtype:
        """What the graph computes in."""
        return FLOATS[self.compute or (self.weights if self.weights in FLOATS else "fp32")]

    @property
    def approximate(self) -> bool:
        """Whether weights are others than the program's, by more than a rounding."""
        return self.weights in BITS

    def check(self, program: Program) -> None:
        """Refuses what does not go together.

        Raises:
            ArtifactError: Such as two float types.
        """
        what, fix = None, ""
        if self.weights in FLOATS and self.compute not in (None, self.weights):
            what = f"weights of its own in {self.weights}, in a graph that computes in "
            what += f"{self.compute}, would be held twice"
            fix = f"leave one of them out: weights={self.compute!r} is both"
        elif self.head_bits not in HEAD_BITS:
            what, fix = f"an output head has 8 or 4 bits, not {self.head_bits}", "choose one"
        elif self.weights == "nf4-int8" and not any(
            isinstance(constant, Packed) for constant in program.constants.values()
        ):
            what = "no layer is in NF4, whose codes weights='nf4-int8' writes in 8 bits"
            fix = "quantize first (peftc apply BASE -o OUT nf4), or write weights='int8'"
        if what:
            raise ArtifactError(what, where="weights", fix=fix)


@dataclass(frozen=True)
class Matrix:
    """A quantized weight, or several that are multiplied at once.

    Attributes:
        constant: (out, in).
        bits: Of a weight.
        block: Neighbours of a row that share a step.
        reach: How far codes go, as `peftc::uniform_scales` has it.
        starts: The first row of each that it is made of.
    """

    constant: Constant
    bits: int
    block: int
    reach: str
    starts: tuple[int, ...] = (0,)

    def part(self, kind: str, dtype: torch.dtype) -> Constant:
        """Its `codes` or `scales`."""
        build = Builder()
        made = operator(f"peftc.uniform_{kind}.default")
        given = build.const("matrix"), self.bits, self.block, self.reach
        build.graph.output(build.op(made, *given))
        return derive(build.graph, {"matrix": self.constant}, dtype)


class OwnWeights(StoredWeights):
    """The constants of a program in a file of the graph's own.

    Args:
        program: What is written.
        form: Its weights are not `stored`.
    """

    def __init__(self, program: Program, form: Form) -> None:
        super().__init__(program, form.dtype)
        self.places, self.form = {}, form
        self.quantized: dict[str, Matrix] = {}

    def name(self, name: str) -> str:
        return self.program.aliases.get(name, name)

    def value(self, name: str) -> ir.Value:
        constant = self.program.constants[name]
        floats = self.form.weights in FLOATS and constant.spec.dtype.is_floating_point
        return self.kept(name, cast(constant, self.dtype) if floats else constant)

    def linear(
        self,
        lowering: Lowering,
        x: ir.Value,
        name: str,
        bias: ir.Value | None,
        turned: bool = False,
    ) -> ir.Value | None:
        matrix = self._matrix(name, turned)
        if matrix is None:
            return None
        y = self._product(lowering, x, self.name(name), matrix)
        return y if bias is None else lowering.op("Add", y, bias)

    def linears(
        self, lowering: Lowering, x: ir.Value, names: Sequence[str]
    ) -> tuple[ir.Value, ...] | None:
        found = [matrix for name in names if (matrix := self._matrix(name, False))]
        named = [self.name(name) for name in names]
        alike = len({(m.bits, m.block, m.reach) for m in found}) == 1
        if len(found) < len(names) or not alike or (name := joint_name(named)) is None:
            return None
        build, first = Builder(), found[0]
        weights = {f"part_{i}": matrix.constant for i, matrix in enumerate(found)}
        parts = [build.const(key) for key in weights]
        build.graph.output(build.op(operator("aten.cat.default"), parts))
        counts = [matrix.constant.spec.shape[0] for matrix in found]
        joined = Matrix(
            derive(build.graph, weights, torch.float32), first.bits, first.block, first.reach,
            tuple(accumulate(counts[:-1], initial=0)),
        )  # fmt: skip
        y = self._product(lowering, x, name, joined)
        sizes = lowering.constant(counts)
        return lowering.ops("Split", y, sizes, outputs=len(counts), axis=-1)

    def embedding(self, lowering: Lowering, ids: ir.Value, name: str) -> ir.Value | None:
        """Rows of a table that is the output head too, from its codes."""
        table = self.name(name)
        if table != self.name(f"{self.program.head}.weight"):
            return None
        matrix = self._matrix(name, False)
        if matrix is None or matrix.constant.spec.shape[1] % matrix.block:
            return None
        rows, width = matrix.constant.spec.shape
        _, steps = self._initializers(lowering, table, matrix)
        codes = lowering.initializers.setdefault(
            table + ROWS,
            self.view(table + ROWS, table + CODES,
                      Spec((rows, width * matrix.bits // 8), torch.uint8)),
        )  # fmt: skip
        return lowering.op(
            "GatherBlockQuantized", codes, ids, steps, domain=RUNTIME, bits=matrix.bits,
            block_size=matrix.block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def _matrix(self, name: str, turned: bool) -> Matrix | None:
        """How a weight is quantized; None if it is not."""
        constant, kind = self.program.constants[self.name(name)], self.form.weights
        if kind not in BITS or len(constant.spec.shape) != 2:
            return None
        head = self.name(name) == self.name(f"{self.program.head}.weight")
        bits = max(BITS[kind], self.form.head_bits) if head else BITS[kind]
        # A head's largest values matter most: with fitted steps it answers worse.
        block, reach = BLOCK, "fitted" if bits == 4 and not head else "full"
        if kind == "nf4-int8":
            if not isinstance(constant, Packed):
                return None
            block, reach = min(constant.format.block_size, LARGEST_BLOCK), "even"
        if turned:
            build = Builder()
            build.graph.output(build.t(build.const("weight")))
            constant = derive(build.graph, {"weight": constant}, torch.float32)
        return Matrix(constant, bits, block, reach)

    def _initializers(
        self, lowering: Lowering, name: str, matrix: Matrix
    ) -> tuple[ir.Value, ir.Value]:
        """A matrix' codes and steps."""
        self.quantized.setdefault(name, matrix)
        known = lowering.initializers
        for suffix, kind, dtype in (
            (CODES, "codes", torch.uint8), (STEPS, "scales", self.dtype)
        ):  # fmt: skip
            if name + suffix not in known:
                known[name + suffix] = self.kept(name + suffix, matrix.part(kind, dtype))
        return known[name + CODES], known[name + STEPS]

    def _product(self, lowering: Lowering, x: ir.Value, name: str, matrix: Matrix) -> ir.Value:
        given = self._initializers(lowering, name, matrix)
        outputs, inputs = matrix.constant.spec.shape
        return lowering.op(
            "MatMulNBits", x, *given, domain=RUNTIME, K=inputs, N=outputs, bits=matrix.bits,
            block_size=matrix.block, accuracy_level=ACCURACY,
        )  # fmt: skip

    @property
    def report(self) -> dict[str, Any]:
        if not self.form.approximate:
            return {"weights": self.form.weights, **self.computes}
        head = self.quantized.get(self.name(f"{self.program.head}.weight"))
        return {
            "weights": self.form.weights,
            **self.computes,
            "approximation": True,
            "block_size": sorted({matrix.block for matrix in self.quantized.values()}),
            "accuracy_level": ACCURACY,
            "quantized_layers": sum(len(matrix.starts) for matrix in self.quantized.values()),
            **({"head_bits": head.bits} if head else {}),
        }

    def check(self, path: Path) -> dict[str, Any]:
        """Compares some rows of every quantized weight with what was written of them.

        Raises:
            ProofError: A weight is further than a step from what its code stands for.
        """
        squares, total, worst, at = 0.0, 0.0, 0.0, None
        for name, error, size in self._errors(path):
            squares, total = squares + error, total + size
            if size and (error / size) ** 0.5 > worst:
                worst, at = (error / size) ** 0.5, name
        relative = (squares / total) ** 0.5 if total else 0.0
        return {"relative_error": relative, "worst": worst, "at": at, "rows": SAMPLED}

    def _errors(self, path: Path) -> Iterator[tuple[str, float, float]]:
        """The sums of squares of the errors and of the weights, by weight."""
        file = read_header(path / OWN_FILE)
        for name, matrix in self.quantized.items():
            codes, steps = (Leaf(file.tensors[name + suffix]) for suffix in (CODES, STEPS))
            ends = (*matrix.starts[1:], matrix.constant.spec.shape[0])
            for start, end in zip(matrix.starts, ends, strict=True):
                rows = start, min(start + SAMPLED, end)
                step = read(steps, *rows).float().unsqueeze(-1)
                got = dequantized(read(codes, *rows), step, matrix.bits)
                want = blocks(_rows(matrix.constant, *rows), got.shape[-1])
                half, difference = 2 ** (matrix.bits - 1), got - want
                reach = (half - 1) * step.abs()
                away = (got - want.clamp(-half * step.abs(), half * step.abs())).abs()
                fits = reach <= want.abs().amax(-1, keepdim=True) * 1.01
                if not bool((fits & (away <= 1.01 * step.abs())).all()):
                    raise ProofError(
                        "is further than a step from what its codes stand for",
                        where=name,
                        fix="nothing was published; look for a NaN or an infinity in the weight",
                    )
                yield name, float(difference.square().sum()), float(want.square().sum())


def joint_name(names: Sequence[str]) -> str | None:
    """The name of weights of one module, such as attn.q+k+v.weight; None if they are not."""
    paths = [name.split(".") for name in names]
    if any(len(path) < 3 or path[:-2] != paths[0][:-2] for path in paths):
        return None
    return ".".join([*paths[0][:-2], "+".join(path[-2] for path in paths), "weight"])


def dequantized(codes: torch.Tensor, steps: torch.Tensor, bits: int) -> torch.Tensor:
    """What codes (out, blocks, bytes) and steps (out, blocks, 1) stand for: (out, blocks, size)."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return torch.mul(codes.float() - 2 ** (bits - 1), steps)


def blocks(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """Rows as blocks (out, blocks, size), the last filled up with zeros."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size))
    return padded.reshape(len(matrix), -1, size)


def _rows(constant: Constant, low: int, high: int) -> torch.Tensor:
    if isinstance(constant, Derived):
        return Evaluation(constant.graph, constant.inputs).rows(low, high)
    whole = read(constant, low, high) if isinstance(constant, Leaf) else value(constant)[low:high]
    return whole.float()


def weights_of(program: Program, form: Form) -> StoredWeights:
    """The constants of a program as a graph is to have them."""
    if form.weights == "stored":
        return StoredWeights(program, form.dtype)
    return OwnWeights(program, form)
