"""Tracing: subclasses of known modules, which may compute something else than their parents.

Falcon's linear layer computes x·Wᵀ + b in two steps, which rounds differently in bf16 from one. So
a subclass is a site with the graph that it really computes, if that is affine in its own weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from peftc import graphs
from peftc.algebra import fold_graph
from peftc.errors import PeftcError
from peftc.graphs import Builder, aten
from peftc.kinds import LINEAR
from peftc.sites import Site

_TRANSPOSES: dict[Any, Any] = {
    aten.numpy_T.default: (),
    aten.permute.default: ([1, 0],),
    aten.transpose.int: (0, 1),
    aten.t.default: (),
}


def trace_linear(module: nn.Linear) -> fx.Graph | None:
    """The graph of a subclass of `nn.Linear`; None where it is not x·Wᵀ + b of its own W and b."""
    from torch.fx.experimental.proxy_tensor import make_fx

    names = [name for name, _ in module.named_parameters()]

    def call(x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), (x,))

    example = [p.detach().to("meta") for p in module.parameters()]
    x = torch.empty(2, 3, module.in_features, device="meta", dtype=example[0].dtype)
    try:
        with torch.no_grad():
            traced = make_fx(call, pre_dispatch=True)(x, *example).graph
        graph = _in_vocabulary(traced, ["x", *names])
        shape = (module.out_features, module.in_features)
        site = Site("", LINEAR, graph, graph, shape, module.bias is not None)
        folded = fold_graph(site, {name: t for name, t in zip(names, example, strict=True)})
    except (PeftcError, RuntimeError, TypeError, ValueError, KeyError):
        return None
    plain = {name: graphs.output(g).target if g else None for name, g in folded.made.items()}
    return graph if plain == {name: name for name in names} else None


def _in_vocabulary(traced: fx.Graph, names: list[str]) -> fx.Graph:
    """A traced graph with constants by name, transposes as `t`, and no aliases or detachments."""
    build, env = Builder(), dict[fx.Node, Any]()
    inputs = iter(names)
    for node in traced.nodes:
        if node.op == "placeholder":
            name = next(inputs)
            env[node] = build.input("x") if name == "x" else build.const(name)
        elif node.op == "output":
            build.graph.output(env[node.args[0]])
        elif node.target in _TRANSPOSES and _plain(node.args[1:]) == _TRANSPOSES[node.target]:
            env[node] = build.t(env[node.args[0]])
        elif node.target in (aten.alias.default, aten.detach.default):
            env[node] = env[node.args[0]]
        else:
            env[node] = build.graph.create_node(
                node.op, node.target, fx.node.map_arg(node.args, env.__getitem__), node.kwargs
            )
    return graphs.intern(build.graph)


def _plain(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(list(a) if isinstance(a, (list, tuple)) else a for a in args)
