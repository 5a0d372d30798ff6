"""Attention by the runtime's `GroupQueryAttention`, into whose cache onnxruntime-genai writes.

Past and present may be one buffer, longer than what it holds, so that no token copies the cache.
The operator hides the future and what is behind the end; which of the others are seen, padding on
the left too, it is told by the model's own mask as a bias, which is made once for all layers. It
takes several texts only at their start or token by token.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from peftc.calling import MASK
from peftc.errors import ArtifactError
from peftc.exporters.onnx_fusing import attend
from peftc.exporters.onnx_lowering import RUNTIME, Lowering, dtype_of, shape_of
from peftc.exporters.onnx_shapes import SHAPES
from peftc.normal import operator_of, owner
from peftc.whole import Whole

EIGHT = 8  # of which the operator wants multiples
FIX = "leave the cache to grow (cache='grown', --cache grown)"


def check(whole: Whole) -> None:
    """Refuses a graph some of whose keys and values do not go into a cache as they are.

    Raises:
        ArtifactError: It names the module.
    """
    others = [
        node for node in whole.graph.nodes if operator_of(node) == "scaled_dot_product_attention"
    ]
    if others or all(port.name != MASK for port in whole.inputs):
        raise ArtifactError(
            "attends to more than one cache of keys and values, which the runtime cannot keep",
            where=owner(others[0]) if others else whole.name,
            fix=FIX,
        )
    sizes = {port.dims[-1] for port in whole.inputs if "past" in port.dims}
    if uneven := [size for size in sizes if int(size) % EIGHT]:
        raise ArtifactError(
            f"its heads have {uneven[0]} features, and GroupQueryAttention takes multiples of 8",
            where=whole.name,
            fix=FIX,
        )
    returned = next(n for n in reversed(whole.graph.nodes) if n.op == "output").args[0]
    for port, node in zip(whole.outputs, returned, strict=True):
        if port.name.startswith("present.") and not _is_cache(node):
            raise ArtifactError(
                "changes its cache behind attention, so that the runtime cannot keep it",
                where=port.name,
                fix=FIX,
            )


def _is_cache(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target is attend


def _attend(to: Lowering, node: Any) -> tuple[ir.Value, ...]:
    query, key, value, mask, *past, (heads, key_heads), scale = node.args
    total = to.once("total", lambda: _total(to))
    return to.ops(
        "GroupQueryAttention",
        *(to.of(x) for x in (query, key, value, *past)),
        to.once("ends", lambda: _ends(to)),
        to.once("whole", lambda: to.cast(to.op("Squeeze", total, to.constant([0])), torch.int32)),
        None, None, None,
        None if mask is None else to.once(mask, lambda: _bias(to, mask, dtype_of(query))),
        outputs=3, domain=RUNTIME, num_heads=heads, kv_num_heads=key_heads,
        scale=float(scale or 1 / math.sqrt(shape_of(past[0])[-1])),
    )  # fmt: skip


def _total(to: Lowering) -> ir.Value:
    """How many tokens there are with those before."""
    return to.op("Shape", to.input(MASK), start=1, end=2)


def _ends(to: Lowering) -> ir.Value:
    """The place of the last token of each text: padding is on the left, and seen by no one."""
    total, batch = to.once("total", lambda: _total(to)), to.op("Shape", to.input(MASK), end=1)
    last = to.op("Sub", total, to.constant([1]))
    return to.cast(to.op("Expand", last, batch), torch.int32)


def _bias(to: Lowering, mask: Any, dtype: torch.dtype) -> ir.Value:
    if dtype_of(mask) != torch.bool:
        return to.of(mask, dtype)
    lowest = torch.finfo(dtype).min
    return to.op("Where", to.of(mask), to.of(0.0, dtype), to.of(lowest, dtype))


def _size(to: Lowering, node: Any) -> ir.Value:
    """A dimension; the past's from the mask, for a buffer is longer."""
    source, axis = node.args
    port = next((port for port in to.whole.inputs if port.name == source.target), None)
    if port is None or port.dims[axis] != "past":
        plain: ir.Value = SHAPES["sym_size"](to, node)
        return plain
    now = to.op("Shape", to.input("input_ids"), start=1, end=2)
    return to.op("Sub", to.once("total", lambda: _total(to)), now)


GROUPED = {attend: _attend, "sym_size": _size}
