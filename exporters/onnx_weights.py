"""Where an ONNX graph's constants lie: in the merged safetensors files beside it.

An initializer may name any range of bytes of a file in the .onnx file's folder as its data
(ONNX's external data), so it names the tensor in the safetensors file that transformers loads too:
offset = 8 + length of the header + data_offsets[0]. Nothing is written twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from peftc.constants import Constant
from peftc.exporters.onnx_lowering import ONNX_TYPES, Lowering
from peftc.graphs import Spec
from peftc.link import Shard, plan, shard_of
from peftc.program import Program

OWN_FILE = "onnx.safetensors"  # of tensors that the checkpoint has in another form


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie."""

    file: str
    offset: int
    nbytes: int
    spec: Spec


class StoredWeights:
    """The constants of a program as its files have them.

    Args:
        program: What is written.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.places: dict[str, Place] = {}
        for shard in plan(program):
            for entry in shard.entries:
                fqn = program.stored.get(entry.key)
                if fqn is not None and entry.key not in program.parts:
                    self.places[fqn] = _place(shard, entry.key)
        self.own: dict[str, Constant] = {}  # what no file of the checkpoint has as it is needed
        self._values: list[ir.Value] = []

    def name(self, name: str) -> str:
        owner = self.program.aliases.get(name, name)
        return owner if owner in self.places or name not in self.places else name

    def value(self, name: str) -> ir.Value:
        constant = self.program.constants[name]
        spec = constant.spec
        if name not in self.places:
            self.own[name] = constant
        shape, kind = ir.Shape(spec.shape), ir.TensorType(ONNX_TYPES[spec.dtype])
        self._values.append(ir.Value(name=name, shape=shape, type=kind))
        return self._values[-1]

    def linear(
        self, lowering: Lowering, x: ir.Value, name: str, bias: ir.Value | None
    ) -> ir.Value | None:
        return None

    def own_shards(self) -> list[Shard]:
        """The file of what the checkpoint has in another form, if there is any."""
        return [shard_of(OWN_FILE, self.own)] if self.own else []

    def bind(self) -> None:
        """Tells every initializer where its bytes are."""
        for shard in self.own_shards():
            self.places |= {entry.key: _place(shard, entry.key) for entry in shard.entries}
        for value in self._values:
            place = self.places[str(value.name)]
            value.const_value = ir.ExternalTensor(
                place.file,
                place.offset,
                place.nbytes,
                ONNX_TYPES[place.spec.dtype],
                shape=ir.Shape(place.spec.shape),
                name=str(value.name),
            )


def _place(shard: Shard, key: str) -> Place:
    entry = next(entry for entry in shard.entries if entry.key == key)
    return Place(shard.name, entry.start, entry.nbytes, entry.constant.spec)
