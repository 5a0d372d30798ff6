"""Combining adapters: against dense arithmetic on ΔW, and against PEFT where PEFT is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftc
from peftc import Combine, Lora, Merge, Method, Pipeline, Program
from peftc.constants import Held
from peftc.contract import ALL_KINDS
from peftc.deltas import alone
from peftc.errors import PeftcError, Violations
from peftc.evaluate import value
from peftc.graphs import aten
from peftc.kernels.lowrank import of_matrix, of_product
from peftc.sites import SiteEditor

from .conftest import SMALL, distance

few = settings(max_examples=60, deadline=None, database=None, derandomize=True)
Dense = Callable[[list[torch.Tensor], list[float], float], torch.Tensor]
DENSITY = 0.4


class Model(nn.Module):
    """A site of each kind but experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.wide = nn.Linear(6, 10)
        self.turned = Conv1D(7, 10)

    def forward(self, ids: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids) + self.conv(picture).mean((2, 3))
        y: torch.Tensor = self.turned(self.wide(h))
        return y


class Crooked(Method):
    """Add a branch with a bend in it."""

    def inject(self, site: SiteEditor) -> None:
        a = site.parameter("bend.weight", (site.out_features, site.in_features))
        site.add_to_output(site.op(aten.relu.default, site.apply(a)))


class Gated(Method):
    """Add the product of two low-rank matrices, element by element (LoHa)."""

    kinds = ALL_KINDS

    def inject(self, site: SiteEditor) -> None:
        parts = [
            site.mm(site.up(f"up{i}.weight", 2), site.down(f"down{i}.weight", 2)) for i in (1, 2)
        ]
        site.add_to_output(site.apply(site.mul(parts[0], parts[1])))


def trained(program: Program, seed: int = 0) -> Program:
    """The program with random values in every tensor that training changes."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        fqn: Held(torch.randn(program.constants[fqn].spec.shape, generator=generator) * 0.3)
        for fqn in sorted(program.trainable)
    }
    return program.rewrite(constants=made)


def carrying(*methods: Method, model: nn.Module | None = None) -> Program:
    torch.manual_seed(1)
    return trained(Pipeline(methods).run(peftc.capture(model or Model())))


def mixture(folder: Path) -> Program:
    """Two LoRAs of other ranks on the experts of a tiny mixture."""
    config = transformers.Qwen3MoeConfig(
        **SMALL, num_key_value_heads=2, moe_intermediate_size=20, num_experts=4,
        num_experts_per_tok=2, head_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    methods = [
        Lora(adapter=n, rank=r, targets=[], parameters=names) for n, r in (("a", 2), ("b", 3))
    ]
    return Pipeline(methods).run(peftc.capture(folder / "base"))


def lora(name: str, rank: int = 2, **options: Any) -> Lora:
    given = {"targets": ["embed", "conv", "wide", "turned"], "alpha": 3 * rank, **options}
    return Lora(adapter=name, rank=rank, **given)


def combined(program: Program, **options: Any) -> Program:
    return Pipeline([Combine(**options)]).run(program)


def weights_of(program: Program) -> dict[str, torch.Tensor]:
    """Every stored weight after merging."""
    merged = Pipeline([Merge()]).run(program)
    return {fqn: value(merged.constants[fqn]) for fqn in merged.captured}


def added(program: Program) -> dict[str, torch.Tensor]:
    """What merging adds to each stored weight that it changes."""
    base = {fqn: value(c) for fqn, c in program.captured.items()}
    after = weights_of(program)
    return {fqn: after[fqn] - base[fqn] for fqn in base if not torch.equal(after[fqn], base[fqn])}


def each(program: Program) -> dict[str, dict[str, torch.Tensor]]:
    """What each adapter adds by itself, by the adapter's and the tensor's name."""
    return {name: added(alone(program, [name])) for name in program.adapters}


def run(program: Program) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 17, (4,), generator=generator)
    picture = torch.randn(4, 3, 5, 5, generator=generator)
    with torch.no_grad():
        result: torch.Tensor = peftc.materialize(program)(ids, picture)
    return result


def refusals(program: Program, **options: Any) -> str:
    with pytest.raises(PeftcError) as caught:
        combined(program, **options)
    found = caught.value
    errors = found.errors if isinstance(found, Violations) else (found,)
    assert all(error.what and error.fix and error.where for error in errors)
    return str(found)


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    order = delta.abs().flatten().sort(descending=True, stable=True).indices
    kept = order[: int(density * delta.numel() + 1e-6)]
    result = torch.zeros(delta.numel())
    result[kept] = delta.flatten()[kept]
    return result.view_as(delta)


def voted(deltas: list[torch.Tensor], frequency: bool = False, mean: bool = True) -> torch.Tensor:
    stack = torch.stack(deltas)
    elected = (stack.sign() if frequency else stack).sum(0).sign()
    elected[elected == 0] = 1
    agree = stack.sign() == elected
    total = (stack * agree).sum(0)
    return total / agree.sum(0).clamp(min=1) if mean else total


def dense_ties(deltas: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    return voted([w * trimmed(d, density) for d, w in zip(deltas, weights, strict=True)])


def dense_prune(deltas: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    return sum((w * trimmed(d, density) for d, w in zip(deltas, weights, strict=True)),
               torch.zeros_like(deltas[0]))  # fmt: skip


def dense_sum(deltas: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    return sum((w * d for d, w in zip(deltas, weights, strict=True)), torch.zeros_like(deltas[0]))


EXACT: dict[str, dict[str, Any]] = {
    "sum": {"method": "sum"}, "cat": {"method": "cat"}, "svd": {"method": "svd", "rank": 5},
}  # fmt: skip


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_combined_loras_add_their_weighted_sum_when_the_rank_suffices(
    options: dict[str, Any],
) -> None:
    program = carrying(lora("a", 2), lora("b", 3, rslora=True))
    parts = each(program)
    after = combined(program, weights={"a": 0.7, "b": -0.4}, **options)
    assert list(after.adapters) == ["combined"]
    for fqn, got in added(after).items():
        want = 0.7 * parts["a"][fqn] - 0.4 * parts["b"][fqn]
        assert torch.allclose(got, want, atol=2e-6), fqn
    assert set(added(after)) == {f"{s}.weight" for s in ("embed", "conv", "wide", "turned")}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_live_model_is_unchanged_when_all_weights_are_one(options: dict[str, Any]) -> None:
    program = carrying(lora("a", 2), lora("b", 3))
    assert distance(run(combined(program, **options)), run(program)) < 1e-5


def test_live_model_equals_its_merge_when_the_site_is_of_any_kind() -> None:
    for options in ({"method": "sum"}, {"method": "ties", "density": DENSITY}):
        for methods in ((lora("a"), lora("b")), (lora("a"), Gated(adapter="b", targets="wide"))):
            after = combined(carrying(*methods), **options)
            assert distance(run(Pipeline([Merge()]).run(after)), run(after)) < 1e-5


def test_sites_that_one_adapter_lacks_keep_the_others_part() -> None:
    program = carrying(lora("a"), lora("b", 3, targets="wide"))
    parts = each(program)
    after = combined(program, weights={"a": 2, "b": -1}, method="cat")
    got = added(after)
    assert torch.allclose(got["turned.weight"], 2 * parts["a"]["turned.weight"], atol=1e-6)
    want = 2 * parts["a"]["wide.weight"] - parts["b"]["wide.weight"]
    assert torch.allclose(got["wide.weight"], want, atol=1e-6)


@few
@given(
    ranks=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    weights=st.lists(st.sampled_from([-1.5, -0.2, 0.0, 0.3, 1.0]), min_size=4, max_size=4),
    method=st.sampled_from(["sum", "cat"]),
)
def test_weighted_sum_is_exact_when_ranks_and_weights_are_any(
    ranks: list[int], weights: list[float], method: str
) -> None:
    names = "abcd"[: len(ranks)]
    chosen = dict(zip(names, weights, strict=False))
    program = carrying(*(lora(n, r, targets="wide") for n, r in zip(names, ranks, strict=True)))
    after = combined(program, weights=chosen, method=method)
    base = value(program.captured["wide.weight"])
    want = base.clone()
    for name, rank in zip(names, ranks, strict=True):
        a, b = (value(program.constants[f"wide.lora_{x}.{name}.weight"]) for x in "AB")
        want += chosen[name] * 3 * (b @ a)
        assert a.shape == (rank, 6)
    assert torch.allclose(weights_of(after)["wide.weight"], want, atol=1e-5)
    measured = after.journal[-1].measured["deviation_from_weighted_sum"]
    assert set(measured) == {"wide"} and measured["wide"] < 1e-6


@few
@given(
    values=st.lists(
        st.lists(st.integers(-3, 3), min_size=12, max_size=12), min_size=2, max_size=4
    ),  # small integers, so that magnitudes tie
    weights=st.lists(st.sampled_from([-1.0, -0.25, 0.0, 0.5, 1.0]), min_size=4, max_size=4),
    density=st.floats(0.01, 1.0),
    frequency=st.booleans(),
    mean=st.booleans(),
    method=st.sampled_from(["ties", "magnitude_prune"]),
)
def test_ties_and_prune_are_what_the_paper_says_when_magnitudes_tie(
    values: list[list[int]], weights: list[float], density: float, frequency: bool, mean: bool,
    method: str,
) -> None:  # fmt: skip
    names = "abcd"[: len(values)]
    program = Pipeline([lora(n, 3, targets="0") for n in names]).run(
        peftc.capture(nn.Sequential(nn.Linear(3, 4, bias=False)))
    )
    given_: list[torch.Tensor] = []
    made = {"0.weight": Held(torch.zeros(4, 3))}
    for name, numbers in zip(names, values, strict=True):
        delta = torch.tensor(numbers).float().view(4, 3)
        made |= {f"0.lora_B.{name}.weight": Held(delta / 3)} | {
            f"0.lora_A.{name}.weight": Held(torch.eye(3))
        }
        given_.append(3 * (delta / 3))
    program = program.rewrite(constants=made)
    chosen = [float(w) for w in weights[: len(names)]]
    after = combined(
        program, weights=dict(zip(names, chosen, strict=True)), method=method, density=density,
        majority_sign_method="frequency" if frequency else "total",
        disjoint="mean" if mean else "sum",
    )  # fmt: skip
    pruned = [w * trimmed(d, density) for d, w in zip(given_, chosen, strict=True)]
    want = voted(pruned, frequency, mean) if method == "ties" else torch.stack(pruned).sum(0)
    got = value(Pipeline([Merge()]).run(after).constants["0.weight"])
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "dense"), [("ties", dense_ties), ("magnitude_prune", dense_prune)]
)
def test_sparse_methods_work_on_the_deltas_when_sites_are_of_any_kind(
    method: str, dense: Dense
) -> None:
    program = carrying(lora("a", 2), lora("b", 3), Gated(adapter="c", targets="wide"))
    parts = each(program)
    weights = {"a": 0.5, "b": 1.5, "c": -1.0}
    after = combined(program, weights=weights, method=method, density=DENSITY)
    for fqn, got in added(after).items():
        turned = fqn in ("embed.weight", "turned.weight")  # kept as (in, out)
        have = {name: part[fqn] for name, part in parts.items() if fqn in part}
        matrices = [part.t() if turned else part for part in have.values()]
        want = dense(matrices, [weights[name] for name in have], DENSITY)
        assert float(((got.t() if turned else got) - want).abs().max()) < 1e-5, fqn


def test_ties_equals_peft_on_deltas_when_weights_are_equal() -> None:
    from peft.utils.merge_utils import ties

    program = carrying(lora("a", 2), lora("b", 3))
    parts = each(program)
    after = combined(program, weights={"a": 0.5, "b": 0.5}, method="ties", density=0.5)
    want = ties([p["wide.weight"] for p in parts.values()], torch.tensor([0.5, 0.5]), 0.5)
    assert torch.allclose(added(after)["wide.weight"], want, atol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_the_same_when_the_adapters_come_in_another_order(method: str) -> None:
    def made(first: str, second: str, seed: int = 0) -> torch.Tensor:
        program = carrying(lora(first), lora(second))
        fixed = {
            fqn: Held(torch.randn(c.spec.shape, generator=torch.Generator().manual_seed(len(fqn)
                      + 7 * (".b." in fqn))))
            for fqn, c in program.constants.items() if ".lora_" in fqn
        }  # fmt: skip
        program = program.rewrite(constants=fixed)
        return added(combined(program, method=method, density=0.5, seed=seed))["wide.weight"]

    assert torch.equal(made("a", "b"), made("b", "a"))
    assert not torch.equal(made("a", "b"), made("a", "b", seed=1))


def test_dare_is_the_sum_on_average_and_drops_a_share() -> None:
    program = carrying(lora("a", targets="wide"), lora("b", targets="wide"))
    exact = added(combined(program))["wide.weight"]
    runs = [
        added(combined(program, method="dare_linear", density=0.5, seed=seed))["wide.weight"]
        for seed in range(150)
    ]
    assert distance(torch.stack(runs).mean(0), exact) < 0.25
    one = carrying(lora("a", targets="wide"), lora("b", targets="wide"))
    single = added(combined(one, weights={"a": 1, "b": 0}, method="dare_linear", density=0.5))
    share = float((single["wide.weight"].abs() < 1e-6).float().mean())
    assert 0.3 < share < 0.7


@pytest.mark.parametrize("rank", [1, 3, 5, 6])
def test_svd_is_the_best_of_its_rank_and_says_its_error(rank: int) -> None:
    program = carrying(lora("a", 2), lora("b", 4))
    exact, entry = added(combined(program)), combined(program, method="svd", rank=rank).journal[-1]
    after = added(combined(program, method="svd", rank=rank))
    for site in ("wide", "conv", "turned", "embed"):
        want = exact[f"{site}.weight"].flatten(1)
        u, s, v = torch.linalg.svd(want, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        error = float(s[rank:].norm() / s.norm())
        assert torch.allclose(after[f"{site}.weight"].flatten(1), best, atol=1e-4)
        for figure in ("truncation_error", "deviation_from_weighted_sum"):
            assert entry.measured[figure][site] == pytest.approx(error, abs=1e-5)


def test_sparse_delta_is_truncated_to_a_lora_when_a_rank_is_given() -> None:
    program = carrying(lora("a"), lora("b"))
    full = combined(program, method="ties", density=DENSITY)
    cut = combined(program, method="ties", density=DENSITY, rank=2)
    assert cut.adapters["combined"].config["r"] == 2
    want = added(full)["wide.weight"]
    u, s, v = torch.linalg.svd(want, full_matrices=False)
    best = (u[:, :2] * s[:2]) @ v[:2]
    assert torch.allclose(added(cut)["wide.weight"], best, atol=1e-4)
    error = float(s[2:].norm() / s.norm())
    assert cut.journal[-1].measured["truncation_error"]["wide"] == pytest.approx(error, abs=1e-5)


@few
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), inner=st.integers(1, 6),
    rank=st.integers(1, 9), stack=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_low_rank_is_what_the_svd_says_when_shapes_are_any(
    rows: int, columns: int, inner: int, rank: int, stack: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lead = (2,) if stack else ()
    up = torch.randn(*lead, rows, inner, generator=generator)
    down = torch.randn(*lead, inner, columns, generator=generator)
    u, s, v = torch.linalg.svd((up @ down).double(), full_matrices=False)
    best = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    error = float(s[..., rank:].norm() / s.norm())
    for found in (of_matrix(up @ down, rank), of_product(up, down, rank)):
        assert torch.allclose((found.up @ found.down).double(), best, atol=1e-4)
        assert found.error == pytest.approx(error, abs=1e-6)


def test_smallest_rank_within_the_tolerance_is_found() -> None:
    matrix = torch.randn(20, 3) @ torch.randn(3, 30)
    found = of_matrix(matrix, tolerance=1e-6, limit=256)
    assert found.up.shape == (20, 3) and found.wanted is None and found.error < 1e-6
    full = of_matrix(torch.randn(20, 30), tolerance=1e-6, limit=8)
    assert (full.up.shape[1], full.wanted) == (8, 20) and full.error > 0.1
