"""Constants: tensors with a shape and a dtype whose values are not computed until they are linked.

A constant is a leaf (bytes of a file), held (a tensor in memory), initial (a distribution and a
seed) or derived (a graph over other constants). Derived constants are evaluated in fp32 and rounded
once, to their own dtype, when they are written: a derived constant over a derived constant is not
rounded in between.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import fx

from peftc import graphs
from peftc.errors import CheckpointError
from peftc.graphs import Spec
from peftc.safetensors_file import TensorRef

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Distribution = Literal["zeros", "full", "values", "kaiming_uniform", "gaussian", "stream"]


@dataclass(frozen=True, slots=True)  # of which large mixtures have a hundred thousand
class Leaf:
    """A tensor that lies in a file."""

    ref: TensorRef

    @property
    def spec(self) -> Spec:
        if self.ref.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {self.ref.name!r} has dtype {self.ref.dtype}, which torch cannot hold",
                where=str(self.ref.file),
                fix="convert the checkpoint to a dtype that torch has",
            )
        return _spec(self.ref.shape, self.ref.dtype)

    @property
    def key(self) -> str:
        """What the value depends on, as text."""
        return f"leaf {self.ref.file} {self.ref.start} {self.ref.dtype} {self.ref.shape}"


@lru_cache(maxsize=4096)
def _spec(shape: tuple[int, ...], dtype: str) -> Spec:
    """One for all tensors that are alike."""
    return Spec(shape, DTYPES[dtype])


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that is in memory already, of a live module, just trained or just worked out.

    Attributes:
        origin: What it was worked out from, as text, where that determines it.
    """

    tensor: torch.Tensor
    origin: str | None = None

    @cached_property
    def spec(self) -> Spec:
        return Spec(tuple(self.tensor.shape), self.tensor.dtype)

    @property
    def key(self) -> str:
        return f"held {self.origin or id(self.tensor)} {self.tensor._version}"


@dataclass(frozen=True)
class Initial:
    """Start values that depend on the seed and the name only, never on the order.

    `kaiming_uniform` has a = √5, as `torch.nn.Linear` and PEFT's `lora_A` have: uniform within
    ±1/√fan_in, times `scale`. `gaussian` is normal with standard deviation `scale`; `full` has the
    value `scale` everywhere, and `values` has those given. `stream` is uniform within ±scale, drawn
    from the seed alone, after the first `skip` numbers: as PEFT draws projections that it need not
    save.
    """

    name: str
    spec: Spec
    distribution: Distribution
    seed: int = 0
    scale: float = 1.0
    values: tuple[int, ...] = ()
    skip: int = 0

    @property
    def key(self) -> str:
        rest = f"{self.distribution} {self.seed} {self.scale} {self.values} {self.skip}"
        return f"initial {self.name} {self.spec} {rest}"

    def sample(self) -> torch.Tensor:
        """The values, fp32 where they do not count."""
        if self.distribution == "values":
            return torch.tensor(self.values, dtype=self.spec.dtype).reshape(self.spec.shape)
        if self.distribution == "zeros":
            return torch.zeros(self.spec.shape)
        if self.distribution == "full":
            return torch.full(self.spec.shape, self.scale)
        if self.distribution == "stream":
            return _stream(self.spec.shape, self.seed, self.scale, self.skip)
        digest = hashlib.sha256(f"{self.seed}:{self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.empty(self.spec.shape)
        if self.distribution == "gaussian":
            return values.normal_(0.0, self.scale, generator=generator)
        bound = self.scale / math.sqrt(math.prod(self.spec.shape[1:]))
        return values.uniform_(-bound, bound, generator=generator)


@lru_cache(maxsize=4)
def _stream(shape: tuple[int, ...], seed: int, bound: float, skip: int) -> torch.Tensor:
    """What every site of an adapter shares, so that it is not drawn again for each."""
    generator = torch.Generator().manual_seed(seed)
    torch.empty(skip).uniform_(generator=generator)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True, eq=False)
class Derived:
    """A graph over other constants, which its `get_attr` nodes name."""

    graph: fx.Graph
    inputs: Mapping[str, Constant]
    spec: Spec

    @cached_property
    def key(self) -> str:
        inputs = " ".join(f"{name}=({self.inputs[name].key})" for name in sorted(self.inputs))
        return _short("derived", f"{graphs.text(self.graph)} {self.spec} {inputs}")


@dataclass(frozen=True, eq=False)
class Packed(Derived):
    """A derived constant that is stored as the parts it is made of, such as a quantized weight.

    Attributes:
        parts: What is stored, by what is added to its name.
        format: How, as its format's module describes it.
    """

    parts: Mapping[str, Constant]
    format: Any

    @cached_property
    def key(self) -> str:
        parts = " ".join(f"{suffix}=({part.key})" for suffix, part in self.parts.items())
        return _short("packed", f"{graphs.text(self.graph)} {self.spec} {parts}")


def _short(kind: str, text: str) -> str:
    """A key that does not grow with all that a constant is made of."""
    return f"{kind} {hashlib.sha256(text.encode()).hexdigest()}"


Constant = Leaf | Held | Initial | Derived


def widened(spec: Spec) -> Spec:
    """What a constant is in evaluation: fp32, unless it counts."""
    return Spec(spec.shape, torch.float32 if spec.dtype.is_floating_point else spec.dtype)


def derive(graph: fx.Graph, constants: Mapping[str, Constant], dtype: torch.dtype) -> Derived:
    """Binds a graph's names to constants.

    Raises:
        RuntimeError: The shapes do not go together.
    """
    graph = graphs.intern(graph)
    inputs = {name: constants[name] for name in graphs.constant_names(graph)}
    specs = {n: widened(c.spec) for n, c in inputs.items()}
    shape = _derived_shape(graph, tuple(sorted(specs.items())))
    return Derived(graph, inputs, Spec(shape, dtype))


def cast(constant: Constant, dtype: torch.dtype) -> Constant:
    """A constant in another dtype, rounded once; itself where it has that dtype."""
    if constant.spec.dtype == dtype:
        return constant
    graph = fx.Graph()
    graph.output(graph.create_node("get_attr", "value"))
    return derive(graph, {"value": constant}, dtype)


_shapes: dict[tuple[fx.Graph, tuple[tuple[str, Spec], ...]], tuple[int, ...]] = {}


def _derived_shape(graph: fx.Graph, specs: tuple[tuple[str, Spec], ...]) -> tuple[int, ...]:
    key = graph, specs
    if key not in _shapes:
        _shapes[key] = graphs.propagate(graph, dict(specs))[graphs.output(graph)].shape
    return _shapes[key]
