"""The algebra: what is affine in x folds to one linear layer, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from safetensors.torch import load_file
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

import peftc
from peftc import Effect, Fold, Lora, Merge, Method, Pipeline, Program, graphs
from peftc.algebra import fold_sites
from peftc.constants import Constant, Derived, Held
from peftc.errors import FoldError, PassError, PeftcError
from peftc.evaluate import Evaluation, value
from peftc.graphs import Builder, aten
from peftc.sites import SiteEditor
from tests.conftest import MakeCheckpoint, auto, distance, logits

Inject = Callable[[SiteEditor], None]
SUB, DIV = aten.sub.Tensor, aten.div.Tensor

few = settings(max_examples=150, deadline=None, database=None, derandomize=True)
NUMBERS = st.sampled_from([-2, -0.5, 0.3, 1.5, 3])
WIDTHS = st.integers(1, 6)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random values of a magnitude between 0.5 and 1.5: a divisor among them does no harm."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return signs * (torch.rand(shape, generator=generator) + 0.5)


def capture(kind: str, inputs: int, outputs: int, bias: bool = True) -> Program:
    """A program of one site, `m`."""
    layer = Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs, bias)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = values(*parameter.shape, seed=i)
    return peftc.capture(nn.ModuleDict({"m": layer}))


def rewrite(program: Program, inject: Inject, adapter: str = "a") -> Program:
    """The program with what a function adds to its site, new constants all random."""
    editor = SiteEditor(program.sites["m"], adapter)
    inject(editor)
    site = editor.finish()
    created = {
        f"m.{name}": Held(values(*editor.created[name].spec.shape, seed=i))
        for i, name in enumerate(graphs.constant_names(site.graph), len(program.constants))
        if name in editor.created
    }
    return program.rewrite([site], created)


def plain(
    graph: fx.Graph, constants: Mapping[str, Constant], x: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """A graph's output by torch in fp64, and the largest value on the way to it."""
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            assert x is not None
            env[node] = x.double()
        elif node.op == "get_attr":
            constant = constants[str(node.target)]
            if isinstance(constant, Derived):
                env[node] = plain(constant.graph, constant.inputs)[0]
            else:
                assert isinstance(constant, Held)
                env[node] = constant.tensor.detach().double()
        elif node.op == "call_module":  # dropout, at rest
            env[node] = env[node.args[0]]
        elif node.op == "call_function":
            args = fx.node.map_arg(node.args, env.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
            env[node] = node.target(*args, **kwargs).double()
    return env[graphs.output(graph)], max(float(v.abs().max()) for v in env.values())


def run(program: Program, x: torch.Tensor) -> torch.Tensor:
    """What the live site computes."""
    with torch.no_grad():
        y: torch.Tensor = peftc.materialize(program).eval().get_submodule("m")(x)
    return y


def broad(size: int) -> st.SearchStrategy[int]:
    """That size, or one element that is spread over it."""
    return st.sampled_from([size, 1])


def grow(data: DataObject, site: SiteEditor, shifts: bool) -> None:
    """Adds random branches, each affine in x, one on top of another or side by side."""
    width = {site.x: site.site.in_features, site.y: site.site.out_features}

    def fresh(*shape: int) -> fx.Node:
        return site.parameter(f"c{len(site.created)}.t", shape)

    def to(x: fx.Node, size: int, bias: bool = False) -> fx.Node:
        node = site.linear(x, fresh(size, width[x]), fresh(size) if bias else None)
        width[node] = size
        return node

    def low_rank(x: fx.Node, size: int, rank: int) -> fx.Node:
        return site.linear(x, site.mm(fresh(size, rank), fresh(rank, width[x])))

    operators = ["linear", "mm", "matmul", "number", "scalar", "vector", "sum", "neg", "nothing"]
    for _ in range(data.draw(st.integers(1, 7))):
        x = data.draw(st.sampled_from(list(width)))
        size, flip = width[x], data.draw(st.booleans())
        factor = data.draw(st.sampled_from([aten.mul.Tensor, DIV]))
        term = data.draw(st.sampled_from([aten.add.Tensor, SUB]))
        match data.draw(st.sampled_from([*operators, *["shift"] * shifts])):
            case "linear":
                node = to(x, size := data.draw(WIDTHS), shifts and flip)
            case "mm":
                node = low_rank(x, size := data.draw(WIDTHS), data.draw(st.integers(1, 3)))
            case "matmul":
                size = data.draw(WIDTHS)
                node = site.op(aten.matmul.default, x, fresh(width[x], size))
            case "number":
                node = site.op(factor, x, data.draw(NUMBERS))
            case "scalar" | "vector" as kind:
                constant = fresh() if kind == "scalar" else fresh(data.draw(broad(size)))
                node = site.mul(constant, x) if flip else site.op(factor, x, constant)
            case "shift":
                constant = fresh(data.draw(broad(size)))
                node = site.op(term, constant, x) if flip else site.op(term, x, constant)
            case "sum":
                other = data.draw(st.sampled_from([v for v in width if width[v] in (size, 1)]))
                node = site.op(term, other, x) if flip else site.op(term, x, other)
            case "neg":
                node = site.op(aten.neg.default, x)
            case _:
                node = site.type_as(site.dropout(f"d{len(width)}.t", 0.5, x), site.x)
        width[node] = size
    last = list(width)[-1]
    if width[last] not in (1, site.site.out_features):
        last = to(last, site.site.out_features)
    site.y = site.add(site.y, last) if data.draw(st.booleans()) else site.op(SUB, last, site.y)


def sites(data: DataObject) -> tuple[Program, Program, torch.Tensor]:
    """A program of one site, the same with two stacked random rewrites, and input for it."""
    kind = data.draw(st.sampled_from(["linear", "conv1d"]))
    bias = kind == "conv1d" or data.draw(st.booleans())
    inputs, outputs = data.draw(WIDTHS), data.draw(WIDTHS)
    program = rewritten = capture(kind, inputs, outputs, bias)
    for adapter in "ab"[: data.draw(st.integers(1, 2))]:
        rewritten = rewrite(rewritten, lambda site: grow(data, site, bias), adapter)
    return program, rewritten, values(data.draw(st.integers(1, 4)), inputs, seed=99)


@few
@given(st.data())
def test_affine_graphs_fold_to_the_same_layer(data: DataObject) -> None:
    program, rewritten, x = sites(data)
    site = rewritten.sites["m"]
    want, scale = plain(site.graph, rewritten.bindings(site), x)
    folded, errors = fold_sites(rewritten)
    assert not errors
    assert folded.sites["m"].is_plain
    assert folded.constants.keys() == program.constants.keys()
    for got in (run(rewritten, x), run(folded, x)):
        assert float((got - want).abs().max()) <= 1e-5 * scale


@few
@given(st.data())
def test_rows_equal_the_whole_in_any_split(data: DataObject) -> None:
    _, rewritten, x = sites(data)
    site = rewritten.sites["m"]
    bound: list[tuple[fx.Graph, Mapping[str, Constant], torch.Tensor | None]]
    bound = [(site.graph, rewritten.bindings(site), x)]
    for constant in fold_sites(rewritten)[0].constants.values():
        if isinstance(constant, Derived):
            bound.append((constant.graph, constant.inputs, None))
    for graph, constants, given_x in bound:
        want, scale = plain(graph, constants, given_x)
        evaluation = Evaluation(graph, constants, None if given_x is None else {"x": given_x})
        size, dim = evaluation.size, 0 if given_x is None else -1
        assert size == want.shape[dim]
        edges = [0, *sorted(data.draw(st.sets(st.integers(1, max(1, size - 1))))), size]
        spans = [span for span in pairwise(edges) if span[0] < span[1]]
        for _ in range(2):  # what one call computes must not disturb the next
            rows = torch.cat([evaluation.rows(*span) for span in spans], dim)
            whole = evaluation.whole()
            assert rows.shape == whole.shape == want.shape
            assert float((rows - whole).abs().max()) <= 1e-6 * scale
            assert float((whole - want).abs().max()) <= 1e-5 * scale


def keyword(site: SiteEditor) -> None:
    branch = site.linear(site.x, site.parameter("w.t", (6, 4)))
    site.y = site.graph.call_function(aten.add.Tensor, (site.y, branch), {"alpha": 3})


def new_weight(site: SiteEditor) -> None:
    site.y = site.linear(site.x, site.parameter("w.t", (6, 4)), site.const("bias"))


def no_bias(site: SiteEditor) -> None:
    site.y = site.linear(site.x, site.const("weight"))


def scaled_input(site: SiteEditor) -> None:
    scaled = site.mul(site.x, site.parameter("l.t", (4,)))
    site.y = site.linear(scaled, site.const("weight"), site.const("bias"))


def wide_shift(site: SiteEditor) -> None:
    low = site.linear(site.x, site.parameter("a.t", (2, 4)))
    shifted = site.add(low, site.parameter("c.t", (1,)))
    site.y = site.add(site.y, site.linear(shifted, site.parameter("b.t", (6, 2))))


def number_first(site: SiteEditor) -> None:
    site.y = site.op(SUB, site.op(aten.mul.Tensor, 2.0, site.y), site.parameter("c.t", (6,)))


def check(inject: Inject, may_refuse: bool) -> None:
    """A rewrite does live what its graph says, and merges to just that."""
    x, rewritten = values(3, 4, seed=7), rewrite(capture("linear", 4, 6), inject)
    site = rewritten.sites["m"]
    want = plain(site.graph, rewritten.bindings(site), x)[0]
    assert distance(run(rewritten, x), want) <= 1e-5
    with suppress(*[PeftcError] * may_refuse):
        assert distance(run(Pipeline([Merge()]).run(rewritten), x), want) <= 1e-5


@pytest.mark.parametrize("inject", [new_weight, scaled_input, wide_shift, number_first])
def test_affine_rewrite_merges_to_what_it_computes(inject: Inject) -> None:
    check(inject, may_refuse=False)


def test_rewrite_without_the_bias_is_refused_or_merges_to_what_it_computes() -> None:
    check(no_bias, may_refuse=True)


def test_rewrite_with_keyword_arguments_is_refused() -> None:
    with pytest.raises(PassError, match=r"keyword arguments \{'alpha': 3\}"):
        check(keyword, may_refuse=True)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 7), (7, 1), (5, 3)])
def test_odd_shapes_merge_and_are_written(
    tmp_path: Path, kind: str, inputs: int, outputs: int
) -> None:
    program = capture(kind, inputs, outputs)
    rewritten = rewrite(program, Lora(rank=1, alpha=3, adapter="a").inject)
    x = values(1, inputs, seed=9)
    want = run(rewritten, x)
    assert distance(want, run(program, x)) > 1e-2
    merged = Pipeline([Merge()]).run(rewritten)
    assert distance(run(merged, x), want) <= 1e-6
    out = peftc.to_safetensors(merged, tmp_path / "out").path
    for key, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, value(merged.constants[key]))


def test_rows_equal_the_whole_when_x_is_multiplied_by_mm() -> None:
    build = Builder()
    build.graph.output(build.mm(build.graph.placeholder("x"), build.const("m")))
    x, matrix = values(3, 4), values(4, 6, seed=1)
    evaluation = Evaluation(graphs.intern(build.graph), {"m": Held(matrix)}, {"x": x})
    assert torch.equal(evaluation.whole(), x @ matrix)
    assert distance(evaluation.rows(1, 4), (x @ matrix)[:, 1:4]) <= 1e-6


NONLINEAR: dict[str, Callable[[SiteEditor, fx.Node], fx.Node]] = {
    "gelu_default": lambda site, h: site.op(aten.gelu.default, h),
    "relu_default": lambda site, h: site.op(aten.relu.default, h),
    "softmax_int": lambda site, h: site.op(aten.softmax.int, h, -1),
    "mul_tensor": lambda site, h: site.mul(h, h),
    "div_tensor": lambda site, h: site.op(DIV, site.parameter("c.t", (2,), "gaussian"), h),
}


class Bottleneck(Method):
    """A branch through one nonlinear node."""

    effect: ClassVar[Effect] = Effect.CHANGES
    node: str

    def inject(self, site: SiteEditor) -> None:
        low = site.linear(site.x, site.parameter("a.t", (2, site.site.in_features), "gaussian"))
        up = site.parameter("b.t", (site.site.out_features, 2), "gaussian")
        site.y = site.add(site.y, site.linear(NONLINEAR[self.node](site, low), up))


@pytest.mark.parametrize("node", NONLINEAR)
def test_nonlinear_node_is_named_by_merge_and_left_alone_by_fold(node: str) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 4))
    x = values(3, 4)
    steps = [Bottleneck(node=node, targets=["0"], adapter="bent"), Lora(rank=2, targets=["1"])]
    program = Pipeline(steps).run(peftc.capture(net))
    want = peftc.materialize(program)(x).detach()
    assert distance(want, net(x).detach()) > 1e-3
    with pytest.raises(FoldError, match=rf"^0: node {node} "):
        Pipeline([Merge()]).run(program)
    folded = Pipeline([Fold()]).run(program)
    assert folded.sites["0"] is program.sites["0"]
    assert folded.sites["1"].is_plain
    assert list(folded.adapters) == ["bent"]
    assert torch.equal(peftc.materialize(folded)(x), want)
    again = Pipeline([Fold()]).run(folded)
    assert not again.journal[-1].modified
    assert again.sites == folded.sites


class Rotated(Method):
    """Low-rank update of the rotated input with a gain for each output; unknown to peftc."""

    def inject(self, site: SiteEditor) -> None:
        n, out, rotated = site.site.in_features, site.site.out_features, site.x
        for i in range(2):  # a rotation is two reflections: x − 2(x·v)v / |v|²
            v = site.parameter(f"mirror{i}.weight", (1, n), "gaussian")
            along = site.linear(site.linear(rotated, v), site.t(v))
            size = site.op(aten.sum.default, site.mul(v, v))
            twice = site.mul(site.op(DIV, along, size), 2)
            rotated = site.op(SUB, rotated, twice)
        low = site.linear(rotated, site.parameter("down.weight", (3, n), "kaiming_uniform"))
        high = site.linear(low, site.parameter("up.weight", (out, 3), "gaussian"))
        gained = site.mul(high, site.parameter("gain.weight", (out,)))
        site.y = site.type_as(site.add(site.y, gained), site.y)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unknown_method_trains_merges_and_exports(
    checkpoint: MakeCheckpoint, tmp_path: Path, name: str
) -> None:
    program = Pipeline([Rotated()]).run(peftc.capture(checkpoint(name)))
    live: Any = peftc.materialize(program)
    assert torch.equal(logits(live), logits(auto(checkpoint(name))))
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        live(input_ids=torch.arange(20).view(2, 10)).logits.square().mean().backward()
        optimizer.step()
    want = logits(live)
    assert distance(want, logits(auto(checkpoint(name)))) > 1e-2
    merged = Pipeline([Merge()]).run(peftc.absorb(program, live))
    out = peftc.to_safetensors(merged, tmp_path / "out", proof="whole")
    assert distance(logits(auto(out.path)), want) <= 1e-5
    assert out.manifest["proof"]["whole"]["relative_error"] <= 1e-5


class BentBranch(Method):
    """A low-rank update, and beside it a bottleneck with a nonlinearity and a gain behind it."""

    effect: ClassVar[Effect] = Effect.CHANGES

    def inject(self, site: SiteEditor) -> None:
        a = site.down("low_A.weight", 2, "gaussian")
        b = site.up("low_B.weight", 2, "gaussian")
        x = site.cast_input(a)
        site.add_to_output(site.mul(site.mix(site.apply(a, x), b), 0.5))
        down = site.down("down.weight", 3, "gaussian")
        up = site.up("up.weight", 3, "gaussian")
        gain = site.parameter("gain.weight", (site.out_features,), "gaussian")
        bent = site.op(aten.gelu.default, site.mul(site.apply(down, x), 2.0))
        site.add_to_output(site.scale_output(site.mix(bent, up), gain))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_folds_the_affine_parts_and_keeps_the_rest_when_a_nonlinearity_is_in_the_way(
    checkpoint: MakeCheckpoint, name: str, dtype: torch.dtype
) -> None:
    program = Pipeline([BentBranch()]).run(peftc.capture(checkpoint(name, dtype=dtype)))
    folded = Pipeline([Fold()]).run(program)
    fqn, site = next((f, s) for f, s in folded.sites.items() if not s.is_plain)
    names = set(graphs.constant_names(site.graph))
    assert not [n for n in names if n.startswith("low_")]  # merged into the weight
    assert [n for n in names if n.startswith("folded_")]  # the 2.0 and the gain, in their layers
    assert isinstance(folded.constants[f"{fqn}.weight"], Derived)
    assert "gelu" in folded.journal[-1].measured["kept"][fqn]
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        want, got = (peftc.materialize(p)(ids).logits.float() for p in (program, folded))
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert float((got - want).abs().max() / want.abs().max()) <= bound
