"""Witnesses: each compares one folded site with what it was, from its weight as written.

They see the weight piece by piece, as rounded, and compare what it makes of random input with what
the site made of it before it was folded. Any wrong weight shows in any Gaussian sample.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from peftc.evaluate import Evaluation, value
from peftc.kinds import ConvolutionKind, EmbeddingKind, ExpertsKind
from peftc.program import Part, Program

SAMPLES = 1


class Witness:
    """Of a linear layer: each piece of rows gives some of the output features."""

    def __init__(self, program: Program, fqn: str, part: Part | None) -> None:
        old = program.unfolded[fqn]
        self.site, self.constants, self.part = old.site, old.constants, part
        seed = int.from_bytes(hashlib.sha256(f"proof {fqn}".encode()).digest()[:7], "little")
        self.generator = torch.Generator().manual_seed(seed)
        bias = program.constants.get(self.site.name("bias")) if self.site.bias else None
        self.bias = None if bias is None else value(bias).float()
        self.error, self.largest = 0.0, 0.0
        self.start()

    def start(self) -> None:
        """Draws the input."""
        self.x = torch.randn(SAMPLES, self.site.in_features, generator=self.generator)
        self.want = self.before({"x": self.x})

    def see(self, low: int, high: int, rows: torch.Tensor) -> None:
        """Takes rows low to high of the stored weight."""
        bias = None if self.bias is None else self.bias[low:high]
        got = nn.functional.linear(self.x, rows.float(), bias)
        self.compare(got, self.want.rows(low, high))

    def end(self) -> None:
        """Compares what could not be compared piece by piece."""

    def result(self) -> dict[str, float]:
        """The largest difference, and the largest value that it is to be seen against."""
        self.end()
        return {"error": self.error, "largest": self.largest}

    def before(self, inputs: dict[str, torch.Tensor]) -> Evaluation:
        """The site as it was before folding, on some input."""
        return Evaluation(self.site.graph, self.constants, inputs)

    def compare(self, got: torch.Tensor, want: torch.Tensor) -> None:
        """Keeps the largest difference; a NaN must not be lost in a maximum."""
        difference = float((got - want).abs().max())
        self.error = max(self.error, difference if difference == difference else float("inf"))
        self.largest = max(self.largest, float(want.abs().max()))


class TransposedWitness(Witness):
    """Of a `Conv1D`: rows are input features, so that the output is a sum over the pieces."""

    def start(self) -> None:
        super().start()
        self.sum = torch.zeros(SAMPLES, self.site.out_features)

    def see(self, low: int, high: int, rows: torch.Tensor) -> None:
        self.sum += self.x[:, low:high] @ rows.float()

    def end(self) -> None:
        self.compare(self.sum if self.bias is None else self.sum + self.bias, self.want.whole())


class TableWitness(Witness):
    """Of an embedding: some row of each piece."""

    def start(self) -> None:
        pass

    def see(self, low: int, high: int, rows: torch.Tensor) -> None:
        pick = torch.randint(0, high - low, (SAMPLES,), generator=self.generator)
        self.compare(rows[pick].float(), self.before({"x": pick + low}).whole())


class KernelWitness(Witness):
    """Of a convolution, whose weight is small."""

    def start(self) -> None:
        self.pieces: list[torch.Tensor] = []

    def see(self, low: int, high: int, rows: torch.Tensor) -> None:
        self.pieces.append(rows.float())

    def end(self) -> None:
        kind = self.site.kind
        assert isinstance(kind, ConvolutionKind)
        inputs = kind.example(self.site.shape, self.generator)
        kernel = torch.cat(self.pieces)
        zeros = [0] * len(kind.stride)
        got = torch.convolution(
            inputs["x"], kernel, self.bias, kind.stride, kind.padding, kind.dilation, False,
            zeros, kind.groups,
        )  # fmt: skip
        self.compare(got, self.before(inputs).whole())


class ExpertWitness(Witness):
    """Of fused experts: one expert's matrix, or an expert of each piece of the stack."""

    def start(self) -> None:
        if self.part is not None and self.part.index is not None:
            self.route(self.part.index)

    def route(self, expert: int) -> None:
        kind = self.site.kind
        assert isinstance(kind, ExpertsKind)
        inputs = kind.routed(self.site.shape, expert, self.generator, SAMPLES)
        self.x, self.whole = inputs["x"], self.before(inputs).whole()

    def see(self, low: int, high: int, rows: torch.Tensor) -> None:
        if self.part is None or self.part.index is None:
            self.route(low)
            matrix = rows[0].float()
            swapped = self.site.kind.transposed
            self.compare(self.x @ (matrix if swapped else matrix.t()), self.whole)
            return
        first = self.part.low
        want = self.whole[:, first + low : first + high]
        self.compare(self.x @ rows.float().t(), want)


def witness(program: Program, fqn: str, part: Part | None) -> Witness:
    """The witness of a folded site, or of the part of it that one stored tensor holds."""
    kind = program.unfolded[fqn].site.kind
    for known, cls in (
        (EmbeddingKind, TableWitness),
        (ConvolutionKind, KernelWitness),
        (ExpertsKind, ExpertWitness),
    ):
        if isinstance(kind, known):
            return cls(program, fqn, part)
    return (TransposedWitness if kind.transposed else Witness)(program, fqn, part)
