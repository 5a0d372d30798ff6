"""Kinds: how each class of modules keeps a linear map, and how it applies one.

A method and the algebra see every kind alike: a matrix of shape (out, in), which the kind applies
to a site's input (`apply`) or to features that are there already (`mix`). A convolution is a matrix
over patches, an embedding a matrix over one-hot ids, a stack of experts one matrix an expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from peftc import ops  # noqa: F401  # registers the peftc:: operators
from peftc.graphs import Builder, Spec, aten

Shape = tuple[int, ...]
SAMPLES = 4  # of random input per check


@dataclass(frozen=True)
class Kind(ABC):
    """A linear map as a class of modules has it.

    Attributes:
        name: What users call it.
        channels: The dimension of the output that holds the features.
        by_rows: Whether output features can be computed from rows of the stored weight alone.
        opened: Whether the graph computes the module's own map, by its weight; else that is given.
    """

    name: ClassVar[str]
    channels: ClassVar[int] = -1
    by_rows: ClassVar[bool] = False
    opened: ClassVar[bool] = True

    @property
    def transposed(self) -> bool:
        """Whether a stored matrix is (in, out), PEFT's `fan_in_fan_out`."""
        return False

    @abstractmethod
    def sizes(self, shape: Shape) -> tuple[int, int]:
        """In and out features of a stored weight's shape."""

    def matrix(self, build: Builder, weight: fx.Node) -> fx.Node:
        """A stored weight as a matrix (out, in)."""
        return weight

    def stored(self, build: Builder, matrix: fx.Node, shape: Shape) -> fx.Node:
        """A matrix as the weight is stored; the inverse of `matrix`."""
        return matrix

    def apply(
        self, build: Builder, x: fx.Node, matrix: fx.Node, bias: fx.Node | None = None
    ) -> fx.Node:
        """The map of a site's input by a matrix (rows, in)."""
        return build.linear(x, matrix, bias)

    def mix(
        self, build: Builder, h: fx.Node, matrix: fx.Node, bias: fx.Node | None = None
    ) -> fx.Node:
        """The map of features, place by place, by a matrix (rows, features)."""
        return build.linear(h, matrix, bias)

    def along_output(self, build: Builder, vector: fx.Node) -> fx.Node:
        """A vector (out,) so that it multiplies an output feature by feature."""
        return vector

    def along_input(self, build: Builder, vector: fx.Node) -> fx.Node:
        """A vector (in,) so that it multiplies an input feature by feature."""
        return vector

    def down(self, rank: int, shape: Shape) -> Shape:
        """The shape in which PEFT keeps a matrix (rank, in)."""
        return rank, self.sizes(shape)[0]

    def up(self, rank: int, shape: Shape) -> Shape:
        """The shape in which PEFT keeps a matrix (out, rank)."""
        return self.sizes(shape)[1], rank

    def down_matrix(self, build: Builder, parameter: fx.Node, shape: Shape) -> fx.Node:
        """The matrix (rank, in) that a parameter of shape `down` holds."""
        return parameter

    def up_matrix(self, build: Builder, parameter: fx.Node, shape: Shape) -> fx.Node:
        """The matrix (out, rank) that a parameter of shape `up` holds."""
        return parameter

    def plain(self, build: Builder, bias: bool) -> fx.Node:
        """What an untouched module computes, whose graph this is to be."""
        x = build.input("x")
        matrix = self.matrix(build, build.const("weight"))
        return self.apply(build, x, matrix, build.const("bias") if bias else None)

    def example(self, shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random input for a check: the value of each placeholder, fp32 where it is not integer."""
        return {"x": torch.randn(SAMPLES, self.sizes(shape)[0], generator=generator)}

    def specs(self, shape: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        """Shapes and dtypes of typical input, for propagation."""
        return {"x": Spec((2, 3, self.sizes(shape)[0]), dtype)}


@dataclass(frozen=True)
class LinearKind(Kind):
    """`nn.Linear`: the weight is (out, in)."""

    name: ClassVar[str] = "linear"
    by_rows: ClassVar[bool] = True

    def sizes(self, shape: Shape) -> tuple[int, int]:
        return shape[1], shape[0]


@dataclass(frozen=True)
class Conv1DKind(Kind):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is (in, out)."""

    name: ClassVar[str] = "conv1d"
    by_rows: ClassVar[bool] = True

    @property
    def transposed(self) -> bool:
        return True

    def sizes(self, shape: Shape) -> tuple[int, int]:
        return shape[0], shape[1]

    def matrix(self, build: Builder, weight: fx.Node) -> fx.Node:
        return build.t(weight)

    def stored(self, build: Builder, matrix: fx.Node, shape: Shape) -> fx.Node:
        return build.t(matrix)


@dataclass(frozen=True)
class EmbeddingKind(Kind):
    """`nn.Embedding`: the table is (vocabulary, features); its matrix maps one-hot ids.

    Attributes:
        padding: The id whose row receives no gradient; -1 for none.
        scale: What the module multiplies its rows by, as BART's and Gemma's do.
        rounded: Whether it rounds the scale to the weight's dtype first, as Gemma's does.
    """

    name: ClassVar[str] = "embedding"
    padding: int = -1
    scale: float = 1.0
    rounded: bool = False

    def sizes(self, shape: Shape) -> tuple[int, int]:
        return shape[0], shape[1]

    def matrix(self, build: Builder, weight: fx.Node) -> fx.Node:
        return build.t(weight)

    def stored(self, build: Builder, matrix: fx.Node, shape: Shape) -> fx.Node:
        if self.scale == 1:
            return build.t(matrix)
        if matrix.target is aten.mul.Tensor and matrix.args[1] == self.scale:
            inner = matrix.args[0]
            assert isinstance(inner, fx.Node)
            return build.t(inner)
        return build.t(build.op(aten.div.Tensor, matrix, self.scale))

    def apply(
        self, build: Builder, x: fx.Node, matrix: fx.Node, bias: fx.Node | None = None
    ) -> fx.Node:
        rows = build.op(aten.embedding.default, build.t(matrix), x, self.padding)
        rows = rows if self.scale == 1 else build.mul(rows, self.scale)
        return rows if bias is None else build.add(rows, bias)

    def example(self, shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"x": torch.randint(0, shape[0], (SAMPLES,), generator=generator)}

    def specs(self, shape: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        return {"x": Spec((2, 3), torch.int64)}


@dataclass(frozen=True)
class ConvolutionKind(Kind):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`: the weight is (out, in / groups, *kernel)."""

    name: ClassVar[str] = "convolution"
    channels: ClassVar[int] = 1
    extent: Shape  # of the kernel: (in / groups, *kernel)
    stride: Shape
    padding: Shape
    dilation: Shape
    groups: int = 1

    def sizes(self, shape: Shape) -> tuple[int, int]:
        return shape[1] * self.groups, shape[0]

    def matrix(self, build: Builder, weight: fx.Node) -> fx.Node:
        return build.flatten(weight, 1)

    def stored(self, build: Builder, matrix: fx.Node, shape: Shape) -> fx.Node:
        return build.unflatten(matrix, 1, shape[1:])

    def apply(
        self, build: Builder, x: fx.Node, matrix: fx.Node, bias: fx.Node | None = None
    ) -> fx.Node:
        kernel = build.unflatten(matrix, 1, self.extent)
        return build.op(
            aten.convolution.default, x, kernel, bias, list(self.stride), list(self.padding),
            list(self.dilation), False, [0] * len(self.stride), self.groups,
        )  # fmt: skip

    def along_output(self, build: Builder, vector: fx.Node) -> fx.Node:
        return build.unflatten(vector, 0, (-1, *(1 for _ in self.stride)))

    along_input = along_output

    def mix(
        self, build: Builder, h: fx.Node, matrix: fx.Node, bias: fx.Node | None = None
    ) -> fx.Node:
        ones = [1] * len(self.stride)
        zeros = [0] * len(self.stride)
        kernel = build.unflatten(matrix, 1, (-1, *ones))
        return build.op(
            aten.convolution.default, h, kernel, bias, ones, zeros, ones, False, zeros, 1
        )

    def down(self, rank: int, shape: Shape) -> Shape:
        return rank, *shape[1:]

    def up(self, rank: int, shape: Shape) -> Shape:
        return shape[0], rank, *(1 for _ in self.stride)

    def down_matrix(self, build: Builder, parameter: fx.Node, shape: Shape) -> fx.Node:
        return build.flatten(parameter, 1)

    def up_matrix(self, build: Builder, parameter: fx.Node, shape: Shape) -> fx.Node:
        return build.flatten(parameter, 1)

    def _extent(self, shape: Shape) -> Shape:
        kernel = zip(shape[2:], self.dilation, self.stride, strict=True)
        return tuple((k - 1) * d + 1 + s for k, d, s in kernel)

    def example(self, shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
        size = (2, self.sizes(shape)[0], *self._extent(shape))
        return {"x": torch.randn(size, generator=generator)}

    def specs(self, shape: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        return {"x": Spec((2, self.sizes(shape)[0], *self._extent(shape)), dtype)}


@dataclass(frozen=True)
class ExpertsKind(Kind):
    """One parameter of a mixture's fused experts: (experts, out, in), or (experts, in, out).

    Its input is sorted by expert; `ends` says where each expert's rows end.
    """

    name: ClassVar[str] = "experts"
    swapped: bool = False

    @property
    def transposed(self) -> bool:
        return self.swapped

    def sizes(self, shape: Shape) -> tuple[int, int]:
        return (shape[1], shape[2]) if self.swapped else (shape[2], shape[1])

    def matrix(self, build: Builder, weight: fx.Node) -> fx.Node:
        return build.op(aten.transpose.int, weight, 1, 2) if self.swapped else weight

    def stored(self, build: Builder, matrix: fx.Node, shape: Shape) -> fx.Node:
        return build.op(aten.transpose.int, matrix, 1, 2) if self.swapped else matrix

    def apply(
        self, build: Builder, x: fx.Node, matrix: fx.Node, bias: fx.Node | None = None
    ) -> fx.Node:
        assert bias is None
        return build.op(torch.ops.peftc.grouped_linear.default, x, matrix, build.input("ends"))

    def mix(
        self, build: Builder, h: fx.Node, matrix: fx.Node, bias: fx.Node | None = None
    ) -> fx.Node:
        return self.apply(build, h, matrix, bias)

    def down(self, rank: int, shape: Shape) -> Shape:
        return shape[0] * rank, self.sizes(shape)[0]

    def up(self, rank: int, shape: Shape) -> Shape:
        return self.sizes(shape)[1], shape[0] * rank

    def down_matrix(self, build: Builder, parameter: fx.Node, shape: Shape) -> fx.Node:
        return build.unflatten(parameter, 0, (shape[0], -1))  # the expert is slowest

    def up_matrix(self, build: Builder, parameter: fx.Node, shape: Shape) -> fx.Node:
        fastest = build.unflatten(parameter, 1, (-1, shape[0]))  # the expert is fastest
        return build.op(aten.permute.default, fastest, [2, 0, 1])

    def example(self, shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """All samples at one expert, so that only its matrices are read."""
        expert = int(torch.randint(0, shape[0], (), generator=generator))
        return self.routed(shape, expert, generator)

    def routed(
        self, shape: Shape, expert: int, generator: torch.Generator, samples: int = SAMPLES
    ) -> dict[str, torch.Tensor]:
        """Random input that goes to one expert."""
        ends = torch.tensor([0 if e < expert else samples for e in range(shape[0])])
        x = torch.randn(samples, self.sizes(shape)[0], generator=generator)
        return {"x": x, "ends": ends.to(torch.int32)}

    def specs(self, shape: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        return {
            "x": Spec((6, self.sizes(shape)[0]), dtype),
            "ends": Spec((shape[0],), torch.int32),
        }


@dataclass(frozen=True)
class ModuleKind(Kind):
    """Any module, which is not opened: its graph takes x, its first input, and y, its output.

    Of several outputs y is the first. A site of this kind has no weight; its `shape` holds the
    features of y and of x.

    Attributes:
        entry: A module that runs before it in every forward pass, whose first input is the input
            `stream`; it has the features of y.
    """

    name: ClassVar[str] = "module"
    opened: ClassVar[bool] = False
    entry: str = ""

    def sizes(self, shape: Shape) -> tuple[int, int]:
        return shape[1], shape[0]

    def plain(self, build: Builder, bias: bool) -> fx.Node:
        build.input("x")
        return build.input("y")

    def _widths(self, shape: Shape) -> dict[str, int]:
        x, y = self.sizes(shape)
        return {"x": x, "y": y, "stream": y}

    def example(self, shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
        widths = self._widths(shape).items()
        return {n: torch.randn(SAMPLES, width, generator=generator) for n, width in widths}

    def specs(self, shape: Shape, dtype: torch.dtype) -> dict[str, Spec]:
        return {n: Spec((2, 3, width), dtype) for n, width in self._widths(shape).items()}


@dataclass(frozen=True)
class NormKind(ModuleKind):
    """`nn.LayerNorm`, whose graph computes it, so that what it normalizes can be changed."""

    name: ClassVar[str] = "norm"
    width: int = 0
    eps: float = 1e-5

    def sizes(self, shape: Shape) -> tuple[int, int]:
        return self.width, self.width

    def plain(self, build: Builder, bias: bool) -> fx.Node:
        shift = build.const("bias") if bias else None
        return self.normalize(build, build.input("x"), build.const("weight"), shift)

    def normalize(
        self, build: Builder, x: fx.Node, weight: fx.Node, bias: fx.Node | None
    ) -> fx.Node:
        """X normalized over its features, as a module with this weight and bias does it."""
        return build.op(aten.layer_norm.default, x, [self.width], weight, bias, self.eps)


LINEAR, CONV1D = LinearKind(), Conv1DKind()


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module of exactly known class; a subclass may compute something else."""
    cls = type(module)
    if cls is nn.Linear:
        return LINEAR
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return CONV1D
    if isinstance(module, nn.Embedding):
        return _embedding(module)
    if cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        assert isinstance(module, nn.modules.conv._ConvNd)
        return _convolution(module)
    return None


def _embedding(module: nn.Embedding) -> Kind | None:
    cls = type(module)
    padding = -1 if module.padding_idx is None else module.padding_idx
    if module.max_norm is not None:
        return None
    if cls is nn.Embedding:
        return EmbeddingKind(padding)
    rounded = getattr(module, "scalar_embed_scale", None)
    scale = getattr(module, "embed_scale", None) if rounded is None else rounded
    if cls.__name__.endswith("ScaledWordEmbedding") and isinstance(scale, (int, float)):
        return EmbeddingKind(padding, float(scale), rounded is not None)
    return None


def _convolution(module: Any) -> Kind | None:
    padding = module.padding
    if padding == "valid":
        padding = (0,) * len(module.stride)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            return None
        padding = tuple(t // 2 for t in total)
    if module.padding_mode != "zeros":
        return None
    extent = (module.in_channels // module.groups, *module.kernel_size)
    return ConvolutionKind(
        extent, tuple(module.stride), tuple(padding), tuple(module.dilation), module.groups
    )


def expert_kinds(module: nn.Module) -> dict[str, Kind]:
    """The parameters of a module of fused experts, as transformers writes them, and their kind."""
    if not (hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")):
        return {}
    return {
        name: ExpertsKind(bool(module.is_transposed))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


_CLASSES: Mapping[str, type[Kind]] = {
    cls.name: cls for cls in (
        LinearKind, Conv1DKind, EmbeddingKind, ConvolutionKind, ExpertsKind, ModuleKind, NormKind,
    )
}  # fmt: skip


def dump(kind: Kind) -> dict[str, Any]:
    """A kind as plain data."""
    return {"kind": kind.name, **vars(kind)}


def restore(data: Mapping[str, Any]) -> Kind:
    """The kind that `dump` wrote down."""
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in data.items()
        if key != "kind"
    }
    return _CLASSES[str(data["kind"])](**options)
