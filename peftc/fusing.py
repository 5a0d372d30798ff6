"""Fusing: graphs over quantized weights, lowered to operators that multiply by what is stored.

In a program a quantized weight is a constant like any other, so that methods, folding and proofs
need not know of it. In a live model it is its codes and absmax: the dequantized matrix never is in
memory where a linear layer alone uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from peftc import graphs
from peftc.constants import Constant, Packed
from peftc.graphs import aten, operator
from peftc.mixing import sums
from peftc.sites import Site


def opened(
    site: Site, bindings: Mapping[str, Constant], lora: bool = False
) -> tuple[fx.Graph, dict[str, Constant]]:
    """A site's graph over the stored tensors of its quantized weights.

    Args:
        site: The site.
        bindings: Its constants, by their names relative to it.
        lora: Fuse a LoRA branch without dropout into the multiplication too.

    Returns:
        The graph, and the constants that it names beside those of the site: the codes have the
        weight's own name, the others are named after it, as `weight_absmax` is.
    """
    packed = {name: c for name, c in bindings.items() if isinstance(c, Packed)}
    if not packed:
        return site.graph, {}
    graph = graphs.copy(site.graph)
    made: dict[str, Constant] = {}
    x = next(node for node in graph.nodes if node.op == "placeholder" and node.target == "x")
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target) in packed:
            made |= _open(graph, node, packed[str(node.target)], x)
    for node in list(graph.nodes):
        if node.target is aten.linear.default:
            _fuse_linear(graph, node)
    if lora:
        for node in list(graph.nodes):
            if node.target is aten.add.Tensor:
                _fuse_lora(graph, node)
    return graphs.intern(graph), made


def _open(graph: fx.Graph, node: fx.Node, weight: Packed, x: fx.Node) -> dict[str, Constant]:
    """Puts the graph of a weight in the place of its name, in the dtype of the input."""
    owner = str(node.target)
    names = {name: owner if name == "codes" else f"{owner}_{name}" for name in weight.inputs}
    env: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        for inner in weight.graph.nodes:
            if inner.op == "get_attr":
                env[inner] = graph.create_node("get_attr", names[str(inner.target)])
            elif inner.op != "output":
                env[inner] = graph.node_copy(inner, env.__getitem__)
        result = env[graphs.output(weight.graph)]
        turned = result.target is aten.t.default
        inner_matrix: Any = result.args[0] if turned else result
        matrix = graph.call_function(aten.type_as.default, (inner_matrix, x))
        whole = graph.call_function(aten.t.default, (matrix,)) if turned else matrix
    for user in list(node.users):
        if turned and user.target is aten.t.default:
            user.replace_all_uses_with(matrix)
    node.replace_all_uses_with(whole)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    return {names[name]: constant for name, constant in weight.inputs.items()}


def _fuse_linear(graph: fx.Graph, node: fx.Node) -> None:
    """x·dequantize(codes)ᵀ + b by one operator."""
    x, matrix, *bias = node.args
    if not isinstance(matrix, fx.Node) or matrix.target is not aten.type_as.default:
        return
    inner = matrix.args[0]
    assert isinstance(inner, fx.Node)
    if str(inner.target) != "peftc.nf4_dequantize.default":
        return
    codes, absmax, shape, size, book = inner.args
    assert isinstance(absmax, fx.Node) and isinstance(shape, (list, tuple))
    nested = str(absmax.target) == "peftc.nf4_unnest.default"
    scales = absmax.args if nested else (absmax, None, None)
    args = (x, codes, *scales, bias[0] if bias else None, shape[0], size, book)
    with graph.inserting_before(node):
        fused = graph.call_function(operator("peftc.nf4_linear.default"), args)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)


def _fuse_lora(graph: fx.Graph, node: fx.Node) -> None:
    """A quantized linear layer plus s·B(A(x)) by one operator."""
    base, branch = node.args
    found = lora_of(branch) if isinstance(branch, fx.Node) else None
    if found is None or not isinstance(base, fx.Node):
        return
    x, a, b, scale = found
    if str(base.target) != "peftc.nf4_linear.default" or base.args[0] is not x:
        return
    *operands, _, size, book = base.args
    with graph.inserting_before(node):
        fused = graph.call_function(
            operator("peftc.nf4_lora.default"), (*operands, a, b, scale, size, book)
        )
    node.replace_all_uses_with(fused)
    for cast in list(base.users):
        if cast.target is aten.type_as.default and cast.args[1] is base:
            cast.replace_input_with(base, x)  # so that the base is not computed for its dtype
    graph.erase_node(node)


def by_rows(graph: fx.Graph) -> fx.Graph:
    """A mixture's graph (see `peftc.mixing`) with its LoRAs without dropout in one operator.

    What is off then is not computed where that can be told.
    """
    new = graphs.copy(graph)
    result: Any = graphs.output(new)
    y: Any = result.args[1] if len(result.args) > 1 else None
    found: list[Any] = []
    for add in sums(result, y) or ():
        term: Any = add.args[1]
        if term.target is not aten.mul.Tensor:
            continue
        branch, gate = term.args
        lora = lora_of(branch)
        if lora is not None and str(getattr(gate, "target", "")) == "peftc.gate.default":
            found.append((add, gate.args, *lora))
    found = [entry for entry in found if entry[2] is found[0][2]]
    if not found:
        return graph
    for add, *_ in found:
        add.replace_all_uses_with(add.args[0])
    mix, x = found[0][1][0], found[0][2]
    a, b, scales = ([entry[i] for entry in found] for i in (3, 4, 5))
    columns = [entry[1][1] for entry in found]
    with new.inserting_before(result):
        args = (x, mix, a, b, scales, columns)
        rows = new.call_function(operator("peftc.lora_rows.default"), args)
        result.args = (new.call_function(aten.add.Tensor, (result.args[0], rows)), y)
    return graphs.intern(new)


def lora_of(branch: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, float] | None:
    """The x, A, B and s of s·B(A(x)), x cast to A's dtype."""
    scale: Any = 1.0
    if branch.target is aten.mul.Tensor and isinstance(branch.args[1], (int, float)):
        branch, scale = branch.args  # type: ignore[assignment]
    factors = []
    for _ in range(2):
        if branch.target is not aten.linear.default or len(branch.args) != 2:
            return None
        branch, factor = branch.args  # type: ignore[assignment]
        factors.append(factor)
    b, a = factors
    x = branch.args[0] if branch.target is aten.type_as.default else branch
    assert isinstance(x, fx.Node) and isinstance(a, fx.Node) and isinstance(b, fx.Node)
    return (x, a, b, float(scale)) if a.op == b.op == "get_attr" else None
