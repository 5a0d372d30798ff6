"""Lowering: a whole model's fx graph as an ONNX graph, node by node, by a table of rules.

A rule takes the lowering and an fx node and gives the ONNX value, or values, of its result. What is
known of a dimension only at run time is an int64 tensor of one element.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import fx

from peftc.calling import Port
from peftc.errors import CaptureError
from peftc.normal import operator_of, owner
from peftc.whole import Whole

OPSET, RUNTIME = 23, "com.microsoft"
IR_VERSION = 11  # of opset 23
ONNX_TYPES = {
    torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16, torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64, torch.int32: ir.DataType.INT32, torch.bool: ir.DataType.BOOL,
    torch.uint8: ir.DataType.UINT8, torch.int8: ir.DataType.INT8,
}  # fmt: skip
Operand = Any  # an ir.Value, an fx.Node, or a Python number
Rule = Callable[["Lowering", Any], Any]


class Weights(Protocol):
    """Where the lowering finds constants."""

    def name(self, name: str) -> str:
        """The name by which a constant of the model is stored, which tied ones share."""

    def value(self, name: str) -> ir.Value:
        """A fresh initializer of a stored constant, in the dtype that it is stored in."""

    def linear(
        self,
        lowering: Lowering,
        x: ir.Value,
        name: str,
        bias: ir.Value | None,
        turned: bool = False,
    ) -> ir.Value | None:
        """x·Wᵀ + b by an operator of the weight's own, or None where it has none.

        A turned weight is kept as (in, out).
        """

    def linears(
        self, lowering: Lowering, x: ir.Value, names: Sequence[str]
    ) -> tuple[ir.Value, ...] | None:
        """x·Wᵀ for each of several weights by one operator, or None where there is none."""

    def embedding(self, lowering: Lowering, ids: ir.Value, name: str) -> ir.Value | None:
        """Rows of a table by an operator of its own, or None where it has none."""


class Lowering:
    """Builds the ONNX graph of a whole model.

    Args:
        whole: What to lower.
        weights: Its constants.
        table: The rule of each operator, by its ATen name without overload, or by its function.
    """

    def __init__(self, whole: Whole, weights: Weights, table: Mapping[Any, Rule]) -> None:
        self.whole, self.weights, self.table = whole, weights, table
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.values: dict[fx.Node, Any] = {}
        self.module = ""  # that is being lowered
        self._constants: dict[Any, ir.Value] = {}
        self._made: dict[Any, ir.Value] = {}
        self._casts: dict[tuple[ir.Value, torch.dtype], ir.Value] = {}
        self._counts = {port.name: 0 for port in (*whole.inputs, *whole.outputs)}
        self._dtypes = {
            str(n.target): n.meta["val"].dtype for n in whole.graph.nodes if n.op == "get_attr"
        }

    def model(self) -> ir.Model:
        """Lowers the graph.

        Raises:
            CaptureError: The table has no rule for an operator; every such operator is named.
        """
        self._check()
        inputs = [_port(port) for port in self.whole.inputs]
        self.values |= {
            node: value
            for node, value in zip(
                (n for n in self.whole.graph.nodes if n.op == "placeholder"), inputs, strict=True
            )
        }
        outputs: list[ir.Value] = []
        for node in self.whole.graph.nodes:
            if node.op == "call_function":
                self.module = owner(node)
                rule = self._rule(node)
                assert rule is not None
                self.values[node] = rule(self, node)
                self._describe(node)
            elif node.op == "output":
                self.module = ""
                outputs = [self._output(n, p) for n, p in zip(
                    node.args[0], self.whole.outputs, strict=True)]  # fmt: skip
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, RUNTIME: 1},
            name=self.whole.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="peftc")

    def _rule(self, node: fx.Node) -> Rule | None:
        return self.table.get(node.target) or self.table.get(operator_of(node))

    def _check(self) -> None:
        lacking: dict[str, str] = {}
        for node in self.whole.graph.nodes:
            if node.op == "call_function" and self._rule(node) is None:
                lacking.setdefault(operator_of(node), owner(node))
        if lacking:
            name, module = next(iter(lacking.items()))
            more = f" (nor for {', '.join(list(lacking)[1:])})" if len(lacking) > 1 else ""
            raise CaptureError(
                f"peftc has no ONNX operator for aten.{name}{more}",
                where=module or self.whole.name,
                fix="write the model with --format safetensors",
            )

    # What rules use.

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **more: Any) -> ir.Value:
        """Appends a node of one output; returns it. Attributes that are None are left out."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, **more)[0]

    def ops(
        self,
        kind: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Appends a node of several outputs; returns them."""
        given = {name: item for name, item in attributes.items() if item is not None}
        present = list(inputs)
        while present and present[-1] is None:
            present.pop()
        node = ir.node(kind, present, given, domain=domain, num_outputs=outputs)
        node.name = self._unique(f"{self.module}.{kind}" if self.module else kind)
        for index, value in enumerate(node.outputs):
            value.name = node.name if outputs == 1 else f"{node.name}.{index}"
        self.nodes.append(node)
        return tuple(node.outputs)

    def of(self, operand: Operand, dtype: torch.dtype | None = None) -> ir.Value:
        """The ONNX value of an operand: a node's, or a constant; cast where a dtype is asked."""
        if isinstance(operand, ir.Value):
            return operand
        if not isinstance(operand, fx.Node):
            return self.constant(operand, dtype or _dtype_of(operand))
        if operand.op == "get_attr":
            value, has = self.weight(str(operand.target)), operand.meta["val"].dtype
        else:
            value, has = self.values[operand], dtype_of(operand)
        return value if dtype is None or has == dtype else self.cast(value, dtype)

    def weight(self, name: str) -> ir.Value:
        """A constant in the dtype that the graph computes with."""
        if name in self.whole.held:
            return self.held(name, self.whole.held[name])
        value = self.stored(name)
        wanted = self._dtypes[name]
        return value if value.dtype == ONNX_TYPES[wanted] else self.cast(value, wanted)

    def stored(self, name: str) -> ir.Value:
        """A constant as it is stored."""
        name = self.weights.name(name)
        if name not in self.initializers:
            self.initializers[name] = self.weights.value(name)
        return self.initializers[name]

    def held(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """A tensor that goes into the .onnx file itself."""
        if name not in self.initializers:
            array = tensor.detach().contiguous().numpy()
            value = ir.Value(name=name, shape=ir.Shape(array.shape), type=_type(tensor.dtype))
            value.const_value = ir.Tensor(array, name=name)
            self.initializers[name] = value
        return self.initializers[name]

    def constant(self, item: Any, dtype: torch.dtype = torch.int64) -> ir.Value:
        """A number or a list of numbers as an initializer; one of each."""
        key = repr(item), dtype
        if key not in self._constants:
            name = self._unique("constant")
            self._constants[key] = self.held(name, torch.tensor(item, dtype=dtype))
        return self._constants[key]

    def once(self, key: Any, make: Callable[[], ir.Value]) -> ir.Value:
        """A value that is made where it is first asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def input(self, name: str) -> ir.Value:
        """An input of the graph."""
        found = next(node for node in self.values if node.target == name)
        value: ir.Value = self.values[found]
        return value

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """A value in another dtype; cast once."""
        key = value, dtype
        if key not in self._casts:
            self._casts[key] = self.op("Cast", value, to=int(ONNX_TYPES[dtype]))
            self._casts[key].type, self._casts[key].shape = _type(dtype), value.shape
        return self._casts[key]

    def size(self, item: Any) -> ir.Value:
        """A dimension as a tensor of one int64."""
        if isinstance(item, fx.Node):
            value: ir.Value = self.values[item]
            return value
        return self.constant([int(item)])

    def sizes(self, items: Sequence[Any]) -> ir.Value:
        """Dimensions as one int64 tensor."""
        if all(isinstance(item, int) for item in items):
            return self.constant(list(items))
        return self.op("Concat", *(self.size(item) for item in items), axis=0)

    def scalar(self, item: Any) -> ir.Value:
        """A dimension as an int64 without dimensions."""
        if isinstance(item, int):
            return self.constant(item)
        return self.op("Squeeze", self.size(item), self.constant([0]))

    def _unique(self, name: str) -> str:
        count = self._counts[name] = self._counts.get(name, -1) + 1
        return f"{name}.{count}" if count else name

    def _describe(self, node: fx.Node) -> None:
        """Tells the value of a node its type and shape."""
        value, fake = self.values[node], node.meta.get("val")
        if isinstance(value, ir.Value) and isinstance(fake, torch.Tensor):
            if value.is_initializer() or value.is_graph_input() or value.const_value is not None:
                return
            value.type = _type(fake.dtype)
            dims = [d if isinstance(d, int) else None for d in fake.shape]
            value.shape = ir.Shape(dims)

    def _output(self, node: fx.Node, port: Port) -> ir.Value:
        """The value of an output by its name; one that has a name already is handed on."""
        dtype = torch.float32 if port.name == "logits" else port.dtype
        value = self.of(node, dtype)
        if value.producer() is None or value.name in {p.name for p in self.whole.outputs}:
            value = self.op("Identity", value)
        value.name = port.name
        value.type, value.shape = _type(dtype), _shape(port)
        return value


def dtype_of(operand: Any) -> torch.dtype:
    """The dtype of an operand: a node's fake value's, or what torch makes of a number."""
    if isinstance(operand, fx.Node):
        value = operand.meta["val"]
        return value.dtype if isinstance(value, torch.Tensor) else torch.int64
    return _dtype_of(operand)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's fake value."""
    return tuple(node.meta["val"].shape)


def _dtype_of(number: Any) -> torch.dtype:
    return torch.tensor(number).dtype


def _type(dtype: torch.dtype) -> ir.TensorType:
    if dtype not in ONNX_TYPES:
        raise CaptureError(
            f"has values of {dtype}, which ONNX graphs of peftc do not have",
            where="graph",
            fix="write the model with --format safetensors",
        )
    return ir.TensorType(ONNX_TYPES[dtype])


def _shape(port: Port) -> ir.Shape:
    return ir.Shape(list(port.dims))


def _port(port: Port) -> ir.Value:
    return ir.Value(name=port.name, shape=_shape(port), type=_type(port.dtype))


SYMBOLIC: dict[Any, str] = {
    operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "Div",
}  # fmt: skip
