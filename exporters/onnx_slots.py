"""Slots: where a graph takes a LoRA at run time, beside the linear layers that have one.

Beside y the graph computes y + (x·A)·B. A (in, rank) and B (rank, out) are its inputs, under PEFT's
names, and have initializers of rank 0: without an adapter nothing is added, nor fed. The
rank is a dimension of its own name in every slot, for an adapter may have another rank in each
layer, and onnxruntime gives values whose dimensions are called alike one buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from peftc.errors import CaptureError, PeftcError
from peftc.exporters.onnx_lowering import ONNX_TYPES, Lowering, Rule, dtype_of, shape_of
from peftc.exporters.onnx_table import TABLE

INPUT = {"linear": 0, "addmm": 1, "matmul": 0, "mm": 0}  # which argument of an operator is x
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Slot:
    """One layer's place for a LoRA.

    Attributes:
        site: The layer.
        inputs: Its in features.
        outputs: Its out features.
        dtype: Of A and B: what the graph computes in.
        graphs: The graphs that have it, by their names without `.onnx`.
    """

    site: str
    inputs: int
    outputs: int
    dtype: torch.dtype
    graphs: tuple[str, ...] = ()

    @property
    def down(self) -> str:
        """The graph's input A (in, rank)."""
        return f"{self.site}.lora_A.weight"

    @property
    def up(self) -> str:
        """The graph's input B (rank, out)."""
        return f"{self.site}.lora_B.weight"

    def described(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "A": self.down, "B": self.up, "in": self.inputs, "out": self.outputs,
            "dtype": str(self.dtype).removeprefix("torch."), "graphs": list(self.graphs),
        }  # fmt: skip


def slots_of(report: Mapping[str, Any]) -> dict[str, Slot]:
    """The slots that a manifest describes, by site."""
    return {
        site: Slot(site, one["in"], one["out"], DTYPES[one["dtype"]], tuple(one["graphs"]))
        for site, one in report.items()
    }


class Slots:
    """Has graphs lowered with slots.

    Args:
        names: The sites that are to have one.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.made: dict[str, Slot] = {}

    @property
    def table(self) -> Mapping[Any, Rule]:
        """The rules of lowering, with a slot beside each of these layers."""
        return {**TABLE, **{name: self._beside(TABLE[name], INPUT[name]) for name in INPUT}}

    def _beside(self, rule: Rule, place: int) -> Rule:
        def slotted(to: Lowering, node: Any) -> ir.Value:
            y: ir.Value = rule(to, node)
            if to.module not in self.names:
                return y
            dtype, shape = dtype_of(node), shape_of(node)
            y.type = ir.TensorType(ONNX_TYPES[dtype])  # of the runtime's own operators
            y.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in shape])
            x = node.args[place]
            slot = Slot(to.module, shape_of(x)[-1], shape[-1], dtype)
            graphs = self.made.get(slot.site, slot).graphs
            self.made[slot.site] = replace(
                slot, graphs=tuple(dict.fromkeys((*graphs, to.whole.name)))
            )
            rank = f"{slot.site}.lora_rank"
            down = _input(to, slot.down, (slot.inputs, rank), dtype)
            up = _input(to, slot.up, (rank, slot.outputs), dtype)
            return to.op("Add", y, to.op("MatMul", to.op("MatMul", to.of(x, dtype), down), up))

        return slotted

    def open(self, model: ir.Model) -> ir.Model:
        """Makes inputs of the initializers of a graph's slots."""
        for slot in self.made.values():
            for name in (slot.down, slot.up):
                if name in model.graph.initializers:
                    model.graph.inputs.append(model.graph.initializers[name])
        return model

    def lacking(self) -> list[PeftcError]:
        """An error for each layer beside which no graph has a slot."""
        return [
            CaptureError(
                "has no slot: no graph has it as a linear layer by itself",
                where=name,
                fix="leave it out of the slots, and merge adapters that change it (--merge)",
            )
            for name in sorted(self.names - self.made.keys())
        ]


def _input(to: Lowering, name: str, dims: tuple[int | str, ...], dtype: torch.dtype) -> ir.Value:
    """An input that is nothing unless it is given."""
    if name not in to.initializers:
        kind, shape = ONNX_TYPES[dtype], [dim if isinstance(dim, int) else 0 for dim in dims]
        value = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(kind))
        value.const_value = ir.Tensor(np.zeros(shape, kind.numpy()), name=name)
        to.initializers[name] = value
    return to.initializers[name]
