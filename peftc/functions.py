"""Functions: a graph as Python code over a module's own tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from peftc import graphs
from peftc.graphs import aten

# Python entry points that cost less per call than the overloads they stand for.
_FAST: dict[Any, Any] = {
    aten.linear.default: torch._C._nn.linear,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.convolution.default: torch.convolution,
    aten.t.default: torch.t,
    aten.type_as.default: torch.Tensor.type_as,
}


def function_of(graph: fx.Graph, prefix: str = "") -> Callable[..., torch.Tensor]:
    """A function of a module, whose tensors the graph names, and of the graph's inputs.

    Args:
        graph: What to compute.
        prefix: Of a parameter of experts: its name, which stands before those of its adapters.
    """
    fast = graphs.copy(graph)
    for node in fast.nodes:
        if node.op == "get_attr" and prefix:
            node.target = prefix if node.target == "weight" else f"{prefix}_{node.target}"
        elif node.op == "call_module" and prefix:
            node.target = f"{prefix}_{node.target}"
        node.target = _FAST.get(node.target) or graphs.eager(node.target)
    code = fast.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    result: Callable[..., torch.Tensor] = namespace["forward"]
    return result
