"""Where an ONNX graph's constants lie: in the merged safetensors files beside it.

An initializer may name any range of bytes of a file in the .onnx file's folder as its data
(ONNX's external data), so it names the tensor in the safetensors file that transformers loads too:
offset = 8 + length of the header + data_offsets[0]. Nothing is written twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from peftc.constants import Constant, Packed, derive
from peftc.exporters.onnx_lowering import ONNX_TYPES, RUNTIME, Lowering
from peftc.four_bit import FourBit
from peftc.graphs import Builder, Spec, operator
from peftc.link import Entry, Shard, plan, shard_of
from peftc.program import Program

OWN_FILE = "onnx.safetensors"  # of tensors that the checkpoint has in another form
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUANT_TYPES = {"fp4": 0, "nf4": 1}  # as MatMulBnb4 numbers the codebooks


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie."""

    file: str
    offset: int
    nbytes: int
    spec: Spec


class StoredWeights:
    """The constants of a program as its files have them.

    A weight in NF4 or FP4 is multiplied by `MatMulBnb4`, from bitsandbytes' bytes.

    Args:
        program: What is written.
        dtype: The float type that the graph computes in.
    """

    def __init__(self, program: Program, dtype: torch.dtype = torch.float32) -> None:
        self.program, self.dtype = program, dtype
        self.places: dict[str, Place] = {}
        for shard in plan(program):
            for entry in shard.entries:
                if entry.key not in program.parts:
                    self.places[self._live(entry.key)] = _place(shard, entry)
        self.own: dict[str, Constant] = {}  # what no file of the checkpoint has as it is needed
        self._values: list[ir.Value] = []
        self._views: dict[str, str] = {}

    def _live(self, key: str) -> str:
        """The name in the model of a stored tensor, or of a part of a quantized one."""
        return self.program.stored.get(key, key)

    def name(self, name: str) -> str:
        owner = self.program.aliases.get(name, name)
        return owner if owner in self.places or name not in self.places else name

    def value(self, name: str) -> ir.Value:
        constant = self.program.constants[name]
        if name not in self.places or isinstance(constant, Packed):
            return self.kept(name, constant)
        return self._value(name, self.places[name].spec)

    def linear(
        self,
        lowering: Lowering,
        x: ir.Value,
        name: str,
        bias: ir.Value | None,
        turned: bool = False,
    ) -> ir.Value | None:
        packed = self.program.constants[name]
        if not isinstance(packed, Packed) or name not in self.places:
            return None
        form: FourBit = packed.format
        codes = self._value(name, Spec((self.places[name].nbytes,), torch.uint8))
        lowering.initializers[name] = codes
        scales = f"{name}.absmax"
        if form.nested:
            scales = f"{name}.absmax (expanded)"
            absmax = self.kept(scales, expanded(packed))
        else:
            absmax = self._value(scales, self.places[scales].spec)
        lowering.initializers[scales] = absmax
        if self.dtype != torch.float32:
            absmax = lowering.cast(absmax, self.dtype)
        outputs, inputs = site_shape(self.program, name)
        y = lowering.op(
            "MatMulBnb4", x, codes, absmax, domain=RUNTIME, K=inputs, N=outputs,
            block_size=form.block_size, quant_type=QUANT_TYPES[form.codebook],
        )  # fmt: skip
        return y if bias is None else lowering.op("Add", y, bias)

    def linears(
        self, lowering: Lowering, x: ir.Value, names: Sequence[str]
    ) -> tuple[ir.Value, ...] | None:
        return None

    def embedding(self, lowering: Lowering, ids: ir.Value, name: str) -> ir.Value | None:
        return None

    def kept(self, name: str, constant: Constant) -> ir.Value:
        """The initializer of a constant that goes into the graph's own file."""
        self.own[name] = constant
        return self._value(name, constant.spec)

    def view(self, name: str, of: str, spec: Spec) -> ir.Value:
        """Another initializer over the bytes of one."""
        self._views[name] = of
        return self._value(name, spec)

    def _value(self, name: str, spec: Spec) -> ir.Value:
        kind = ir.TensorType(ONNX_TYPES[spec.dtype])
        self._values.append(ir.Value(name=name, shape=ir.Shape(spec.shape), type=kind))
        return self._values[-1]

    @property
    def report(self) -> dict[str, Any]:
        """What the manifest says of the weights."""
        return {"weights": "stored", **self.computes}

    @property
    def computes(self) -> dict[str, str]:
        """What the manifest says of the graph's float type."""
        return {"compute": next(name for name, dtype in FLOATS.items() if dtype == self.dtype)}

    def own_shards(self) -> list[Shard]:
        """The file of what the checkpoint has in another form, if there is any."""
        return [shard_of(OWN_FILE, self.own)] if self.own else []

    def bind(self) -> None:
        """Tells every initializer where its bytes are."""
        for shard in self.own_shards():
            self.places |= {entry.key: _place(shard, entry) for entry in shard.entries}
        for value in self._values:
            name = str(value.name)
            place = self.places[self._views.get(name, name)]
            assert value.dtype is not None and value.shape is not None
            value.const_value = ir.ExternalTensor(
                place.file,
                place.offset,
                place.nbytes,
                value.dtype,
                shape=value.shape,
                name=name,
            )


def site_shape(program: Program, weight: str) -> tuple[int, int]:
    """The out and in features of the linear layer that has a weight."""
    site = next(site for site in program.sites.values() if site.name("weight") == weight)
    return site.out_features, site.in_features


def expanded(packed: Packed) -> Constant:
    """The absmax of a weight under double quantization as numbers, fp32."""
    build = Builder()
    names = ("absmax", "outer", "offset")
    unnest = operator("peftc.nf4_unnest.default")
    build.graph.output(build.op(unnest, *(build.const(name) for name in names)))
    return derive(build.graph, packed.inputs, torch.float32)


def _place(shard: Shard, entry: Entry) -> Place:
    return Place(shard.name, entry.start, entry.nbytes, entry.constant.spec)
