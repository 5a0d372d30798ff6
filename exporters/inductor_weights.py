"""Where a compiled model's constants lie: in the safetensors files beside it, each by its name."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import fx

from peftc.constants import Constant, Held, Packed, cast, derive
from peftc.graphs import Builder, Spec, aten, operator
from peftc.kernels.nf4 import codebook
from peftc.link import Shard, plan, shard_of
from peftc.program import Program
from peftc.whole import Whole

OWN_FILE = "pt2.safetensors"  # of tensors that the checkpoint has in another form
Weights = Literal["stored", "fp32"]
FourBit = Literal["kernel", "aten"]


class Table:
    """The constants of a program's graphs, and their places.

    Args:
        program: What is written.
        kind: `stored` refers to the checkpoint's tensors; `fp32` has all in a file of its own.

    Attributes:
        places: For each constant its file, its name there, and the dtype and shape in which the
            libraries take it.
        own: What is in the file of its own.
        cast: The dtypes that are cast when the files are loaded.
    """

    def __init__(self, program: Program, kind: Weights = "stored") -> None:
        self.program, self.kind = program, kind
        self.stored: dict[str, tuple[str, str, torch.dtype]] = {}
        for shard in plan(program) if kind == "stored" else []:
            for entry in shard.entries:
                if entry.key not in program.parts:
                    live = program.stored.get(entry.key, entry.key)
                    dtype = entry.constant.spec.dtype
                    self.stored[live] = shard.name, entry.key, dtype
        self.places: dict[str, tuple[str, str, str, list[int]]] = {}
        self.own: dict[str, Constant] = {}
        self.cast: set[str] = set()

    def fill(self, whole: Whole) -> None:
        """Finds a place for every constant of a graph; one that is there already stays."""
        for node in whole.graph.nodes:
            name = str(node.target)
            if node.op == "get_attr" and not node.meta.get("slot") and name not in self.places:
                self._place(name, node.meta["val"], whole)

    def quantized(self, graph: fx.Graph, how: FourBit = "kernel") -> int:
        """Has linear layers over quantized weights compute from their codes; returns how many.

        Args:
            graph: Of a whole model.
            how: `kernel` multiplies by `peftc::nf4_linear`; `aten` decodes by torch's operators.
        """
        packed = {n: c for n, c in self.program.constants.items() if isinstance(c, Packed)}
        count = 0
        for node in list(graph.nodes):
            weight = node.args[1] if node.target is aten.linear.default else None
            name = str(getattr(weight, "target", ""))
            if weight is None or name not in packed or self.kind == "fp32":
                continue
            constant = packed[name]
            form, (rows, _) = constant.format, constant.spec.shape
            absmax = self._expanded(name, constant)
            size = constant.inputs["codes"].spec.nbytes
            with graph.inserting_before(node):
                codes = graph.create_node("get_attr", name)
                codes.meta = {"val": Spec((size,), torch.uint8)}
                scales = graph.create_node("get_attr", absmax)
                scales.meta = {"val": Spec(self._spec(absmax).shape, torch.float32)}
                if how == "aten":
                    weight = self._decoded(graph, node, codes, scales, constant)
                    node.args = (node.args[0], weight, *node.args[2:])
                else:
                    bias = node.args[2] if len(node.args) > 2 else None
                    node.target = operator("peftc.nf4_linear.default")
                    node.args = (node.args[0], codes, scales, None, None, bias, rows,
                                 form.block_size, form.codebook)  # fmt: skip
            count += 1
        graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        return count

    def _decoded(
        self, graph: fx.Graph, node: fx.Node, codes: fx.Node, scales: fx.Node, packed: Packed
    ) -> fx.Node:
        """What codes stand for, as `peftc.kernels.nf4.dequantize` has it."""
        form, count = packed.format, torch.Size(packed.spec.shape).numel()
        name = f"{form.codebook} codebook"
        self.own[name] = Held(codebook(form.codebook))
        values = graph.create_node("get_attr", name)
        values.meta = {"val": self.own[name].spec}

        def op(target: Any, *args: Any) -> fx.Node:
            made = graph.call_function(target, args)
            made.meta = dict(node.meta)
            return made

        halves = op(aten.__rshift__.Scalar, codes, 4), op(aten.bitwise_and.Scalar, codes, 15)
        index = op(aten.reshape.default, op(aten.stack.default, list(halves), 1), [-1])
        each = op(aten.repeat_interleave.self_int, scales, form.block_size)
        index, each = (op(aten.slice.Tensor, flat, 0, 0, count) for flat in (index, each))
        index = op(aten.to.dtype, index, torch.int64)
        weight = op(aten.mul.Tensor, op(aten.index.Tensor, values, [index]), each)
        return op(aten.reshape.default, weight, [*packed.spec.shape])

    def shards(self) -> list[Shard]:
        """The file of its own, if there is any."""
        return [shard_of(OWN_FILE, self.own)] if self.own else []

    def _place(self, name: str, taken: Spec | torch.Tensor, whole: Whole) -> None:
        dtype = str(taken.dtype).removeprefix("torch.")
        shape = [int(size) for size in taken.shape]
        owner = self.program.aliases.get(name, name)
        owner = owner if owner in self.stored or name not in self.stored else name
        if owner in self.stored:
            file, key, has = self.stored[owner]
            if has != taken.dtype:
                self.cast.add(str(has).removeprefix("torch."))
        else:
            file, key = OWN_FILE, owner
            if owner not in self.own:
                held = whole.held.get(name)
                self.own[owner] = cast(
                    self.program.constants[name] if held is None else Held(held), taken.dtype
                )
        self.places[name] = file, key, dtype, shape

    def _expanded(self, name: str, packed: Packed) -> str:
        """The name of a weight's absmax as fp32, which under double quantization no file has."""
        scales = f"{name}.absmax"
        if packed.format.nested:
            scales = f"{name}.absmax (expanded)"
            build = Builder()
            names = ("absmax", "outer", "offset")
            unnest = operator("peftc.nf4_unnest.default")
            build.graph.output(build.op(unnest, *(build.const(part) for part in names)))
            self.own[scales] = derive(build.graph, packed.inputs, torch.float32)
        elif scales not in self.stored:
            self.own[scales] = packed.inputs["absmax"]
        return scales

    def _spec(self, scales: str) -> Spec:
        if scales in self.own:
            return self.own[scales].spec
        name = scales.removesuffix(".absmax")
        packed = self.program.constants[name]
        assert isinstance(packed, Packed)
        return packed.inputs["absmax"].spec
