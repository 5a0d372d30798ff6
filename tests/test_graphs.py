"""Shape propagation: the vocabulary's own rules say what torch says."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftc.graphs import _RULES, Builder, Spec, _by_meta, aten, intern, output, propagate

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64])
SPECS = st.builds(Spec, st.lists(st.integers(0, 3), max_size=3).map(tuple), DTYPES)
PARTS = st.lists(SPECS, min_size=1, max_size=3) | st.builds(lambda s, n: [s] * n, SPECS, st.just(3))
OPERANDS: dict[Any, list[st.SearchStrategy[Any]]] = {
    aten.linear.default: [SPECS, SPECS, st.none() | SPECS],
    aten.mm.default: [SPECS, SPECS],
    aten.t.default: [SPECS],
    aten.type_as.default: [SPECS, SPECS],
    aten.add.Tensor: [SPECS, SPECS],
    aten.sub.Tensor: [SPECS, SPECS],
    aten.mul.Tensor: [SPECS, SPECS | st.floats(-2, 2)],
    aten.cat.default: [PARTS, st.integers(-1, 1)],
    aten.stack.default: [PARTS, st.integers(-1, 1)],
}


def test_every_rule_is_compared() -> None:
    assert set(OPERANDS) == set(_RULES)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_rule_gives_torch_s_shape_and_dtype_or_leaves_it_to_torch(data: st.DataObject) -> None:
    op = data.draw(st.sampled_from(list(OPERANDS)))
    args = tuple(data.draw(strategy) for strategy in OPERANDS[op])
    found = _RULES[op](*args)
    try:
        wanted = _by_meta(op, args)
    except (RuntimeError, IndexError):
        assert found is None, f"{op} accepts {args}"
        return
    assert found in (None, wanted)


def test_rules_cover_the_usual_operands() -> None:
    x, w = Spec((2, 5, 4), torch.bfloat16), Spec((3, 4), torch.bfloat16)
    assert _RULES[aten.linear.default](x, w) == Spec((2, 5, 3), torch.bfloat16)
    low = Spec((2, 5, 3), torch.float32)
    assert _RULES[aten.add.Tensor](_RULES[aten.linear.default](x, w), low) == low


def test_propagation_names_what_does_not_go_together() -> None:
    build = Builder()
    build.graph.output(build.mm(build.const("a"), build.const("b")))
    graph = intern(build.graph)
    good = {"a": Spec((2, 3), torch.float32), "b": Spec((3, 4), torch.float32)}
    assert propagate(graph, good)[output(graph)].shape == (2, 4)
    try:
        propagate(graph, {**good, "b": Spec((5, 4), torch.float32)})
    except RuntimeError as error:
        assert "3" in str(error) and "5" in str(error)
    else:
        raise AssertionError("shapes that do not fit went through")
