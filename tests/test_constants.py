"""Constants and the graphs over them: shared, lazy, rounded once, read by rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import fx

import peftc
from peftc import Lora, Merge, Pipeline, graphs
from peftc.constants import Derived, Held, Initial, Leaf, derive
from peftc.errors import CheckpointError
from peftc.evaluate import chunks, value
from peftc.graphs import Builder, Spec
from peftc.reading import read
from peftc.safetensors_file import read_header
from tests.conftest import MakeCheckpoint


def scaled(factor: float, dead: bool = False) -> fx.Graph:
    """The graph of a·factor, perhaps with a node that nothing uses."""
    build = Builder()
    node = build.mul(build.const("a"), factor)
    if dead:
        build.t(build.const("b"))
    build.graph.output(node)
    return build.graph


def test_equal_graphs_are_one_object() -> None:
    shared = graphs.intern(scaled(2.5))
    assert graphs.intern(scaled(2.5)) is shared
    assert graphs.intern(scaled(2.5, dead=True)) is shared
    assert graphs.intern(scaled(2.25)) is not shared
    assert graphs.constant_names(shared) == ["a"]


def test_copy_is_rewritten_without_its_original() -> None:
    shared = graphs.intern(scaled(7.0))
    before, editable = str(shared), graphs.copy(shared)
    build = Builder(editable)
    end = next(node for node in editable.nodes if node.op == "output")
    editable.inserting_before(end)
    end.args = (build.add(graphs.output(editable), build.const("a")),)
    assert str(shared) == before
    assert graphs.intern(editable) is not shared


def test_sites_and_merged_weights_share_their_graphs(checkpoint: MakeCheckpoint) -> None:
    lora = Lora(rank=4, alpha=6, rank_pattern={"q_proj": 2})
    program = Pipeline([lora]).run(peftc.capture(checkpoint("llama")))
    rewritten = [site for site in program.sites.values() if not site.is_plain]
    assert len(rewritten) == 14
    assert len({id(site.graph) for site in rewritten}) == 2  # one for each scale
    merged = Pipeline([Merge()]).run(program).constants.values()
    assert len({id(constant.graph) for constant in merged if isinstance(constant, Derived)}) == 2


def initial(name: str = "a", seed: int = 0, dtype: torch.dtype = torch.float32) -> Initial:
    return Initial(name, Spec((40, 60), dtype), "gaussian", seed, 0.5)


def test_initial_depends_on_name_and_seed_only() -> None:
    want = value(initial())
    torch.manual_seed(1)
    torch.rand(3)
    assert torch.equal(value(initial()), want)
    assert torch.equal(value(initial(dtype=torch.bfloat16)), want.bfloat16())
    assert not torch.equal(value(initial(name="b")), want)
    assert not torch.equal(value(initial(seed=1)), want)
    assert len({initial().key, initial("b").key, initial(seed=1).key}) == 3


def test_held_is_detached_and_its_key_follows_its_values() -> None:
    tensor = torch.ones(3, requires_grad=True)
    held = Held(tensor)
    assert not value(held).requires_grad
    before = held.key
    with torch.no_grad():
        tensor.mul_(2)
    assert held.key != before


def test_derived_is_rounded_once_and_not_in_between() -> None:
    tensor = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) + 1
    third = derive(scaled(1 / 3), {"a": Held(tensor)}, torch.bfloat16)
    assert third.spec == Spec((5, 4), torch.bfloat16)
    assert torch.equal(value(third), (tensor * (1 / 3)).bfloat16())
    again = value(derive(scaled(3.0), {"a": third, "unused": third}, torch.float32))
    assert torch.equal(again, tensor * (1 / 3) * 3.0)
    assert not torch.equal(again, value(third).float() * 3.0)


TENSORS = {
    "matrix": torch.arange(12.0).view(4, 3),
    "half": torch.arange(10.0, dtype=torch.bfloat16).view(5, 2),
    "cube": torch.arange(24, dtype=torch.int64).view(4, 3, 2),
    "bits": torch.tensor([True, False, True, True]),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "narrow": torch.empty(4, 0),
}


@pytest.mark.parametrize("name", TENSORS)
def test_leaf_is_read_whole_and_by_rows(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / "t.safetensors")
    want, leaf = TENSORS[name], Leaf(read_header(tmp_path / "t.safetensors").tensors[name])
    assert leaf.spec == Spec(tuple(want.shape), want.dtype)
    assert torch.equal(value(leaf), want)
    for low, high in [(0, 1), (1, 3), (2, 4)] if want.dim() and len(want) else []:
        assert torch.equal(read(leaf, low, high), want[low:high])


def test_leaf_is_refused_when_its_file_shrank(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(100)}, path)
    leaf = Leaf(read_header(path).tensors["a"])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        value(leaf)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(0, 40), max_size=3).map(tuple), st.integers(1, 100))
def test_chunks_cover_every_row_once_in_order(shape: tuple[int, ...], elements: int) -> None:
    spans = chunks(shape, elements)
    rows = [row for low, high in spans for row in range(low, high)]
    assert rows == list(range(shape[0] if shape else 1))
    width = max(1, torch.Size(shape[1:]).numel())
    # Sixteen rows at a time, as many as fit, and no small rest: BLAS rounds few rows differently.
    least = 16 if len(shape) < 3 else 1
    step = max(least, elements // width // least * least)
    assert all(high - low == step for low, high in spans[:-1])
    if len(spans) > 1:
        assert least <= spans[-1][1] - spans[-1][0] < step + least
