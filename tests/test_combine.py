"""Combining adapters: against dense arithmetic on ΔW, and against PEFT where PEFT is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
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
from peftc import Attach, Combine, Fold, Lora, Merge, Method, Pipeline, Program, registry
from peftc.algebra import fold_sites
from peftc.constants import Held
from peftc.contract import ALL_KINDS
from peftc.deltas import alone, deltas
from peftc.errors import PeftcError, Violations
from peftc.evaluate import value
from peftc.graphs import aten
from peftc.kernels.lowrank import of_matrix, of_product
from peftc.sites import SiteEditor

from .conftest import SMALL, MakeAdapter, MakeCheckpoint, distance, logits, with_peft

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


# ----------------------------------------------------------- dense arithmetic, written for reading


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


# --------------------------------------------------------------------------------- exact methods


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


# --------------------------------------------------------- ties, dare, pruning: sparse ones


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


# ---------------------------------------------------------------------------------- truncation


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


# ------------------------------------------------------------------------------ against PEFT


@pytest.fixture
def pair(checkpoint: MakeCheckpoint, adapter: MakeAdapter) -> tuple[Path, Path, Path]:
    base = checkpoint("llama")
    return base, adapter(base, r=3), adapter(base, 1, r=5, lora_alpha=20)


def attached(base: Path, a: Path, b: Path) -> Program:
    steps = [Attach(path=str(a), adapter="a"), Attach(path=str(b), adapter="b")]
    return Pipeline(steps).run(peftc.capture(base))


def peft_combined(base: Path, a: Path, b: Path, **options: Any) -> torch.Tensor:
    model = with_peft(base, a, b)
    model.base_model.add_weighted_adapter(["a0", "a1"], [0.7, 0.3], "both", **options)
    model.base_model.set_adapter("both")
    return logits(model)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "cat"}, {"combination_type": "cat"}),
        ({"method": "svd", "rank": 8}, {"combination_type": "svd", "svd_rank": 8}),
        ({"method": "sum"}, {"combination_type": "cat"}),
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_combined_adapter_equals_peft_where_peft_is_right(
    pair: tuple[Path, Path, Path], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    after = combined(attached(*pair), weights={"a": 0.7, "b": 0.3}, **ours)
    assert distance(logits(peftc.materialize(after)), peft_combined(*pair, **theirs)) < 1e-5


def test_peft_linear_is_wrong_and_ours_is_the_sum(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter
) -> None:
    # (Σ√wᵢ·Bᵢ)·(Σ√wᵢ·Aᵢ) has the cross terms Bᵢ·Aⱼ, which belong to no adapter.
    base = checkpoint("llama")
    a, b = adapter(base, r=4), adapter(base, 1, r=4)
    model = with_peft(base, a, b)
    model.base_model.add_weighted_adapter(
        ["a0", "a1"], [0.7, 0.3], "both", combination_type="linear"
    )
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = 0.7 * layer.get_delta_weight("a0") + 0.3 * layer.get_delta_weight("a1")
    wrong = float((layer.get_delta_weight("both") - exact).norm() / exact.norm())
    assert 0.5 < wrong < 2  # 1.0 on average
    after = combined(attached(base, a, b), weights={"a": 0.7, "b": 0.3})
    found = deltas(after)[0]["model.layers.0.self_attn.q_proj"]
    assert torch.allclose(value(found.matrix), exact, atol=1e-6)


def test_combined_adapter_loads_in_peft_when_it_is_full_rank(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    after = combined(attached(*pair), method="ties", density=0.3)
    peftc.to_peft(after, tmp_path / "out")
    want = logits(peftc.materialize(after))
    assert distance(logits(with_peft(pair[0], tmp_path / "out")), want) < 1e-5
    again = Pipeline([Attach(path=str(tmp_path / "out"))]).run(peftc.capture(pair[0]))
    assert distance(logits(peftc.materialize(again)), want) < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_combined_adapter_loads_in_peft_when_ranks_differ_by_site(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path, kind: str
) -> None:
    base = checkpoint(kind)
    names = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "fc1"]
    a, b = adapter(base, r=3, target_modules=names), adapter(base, 1, r=5, target_modules=names[:1])
    after = combined(attached(base, a, b), method="cat")
    peftc.to_peft(after, tmp_path / "out")
    want = logits(peftc.materialize(after))
    assert distance(logits(with_peft(base, tmp_path / "out")), want) < 1e-5
    assert distance(want, logits(with_peft(base, a, b))) < 1e-5


# ------------------------------------------------------------------- other methods, other passes


SMALL_RANK = {"rank": 2, "init_r": 2}


def other(known: str, name: str) -> Method:
    """A registered method, with a small rank where it has one."""
    cls = registry.load(known)
    assert issubclass(cls, Method)
    small = {field: rank for field, rank in SMALL_RANK.items() if field in cls.model_fields}
    targets = "wide,turned" if "conv1d" in cls.kinds else "wide"
    return cls(adapter=name, targets=targets, **small)


OTHERS = [m for m in ("dora", "ia3", "vera", "adalora", "loha", "lokr") if m in registry.PASSES]
METHODS: Mapping[str, Callable[[str], Method]] = {
    "gated": lambda name: Gated(adapter=name, targets=["conv", "wide", "turned"]),
    **{known: partial(other, known) for known in OTHERS},
}


@pytest.mark.parametrize("name", METHODS)
def test_sum_is_exact_when_an_adapter_is_no_lora(name: str) -> None:
    program = carrying(lora("a"), METHODS[name]("b"))
    parts = each(program)
    after = combined(program, weights={"a": -0.5, "b": 2.0})
    for fqn, got in added(after).items():
        want = sum((w * parts[n][fqn] for n, w in (("a", -0.5), ("b", 2.0)) if fqn in parts[n]),
                   torch.zeros_like(got))  # fmt: skip
        assert torch.allclose(got, want, atol=1e-5), fqn
    assert distance(run(Pipeline([Merge()]).run(after)), run(after)) < 1e-5


@pytest.mark.parametrize("name", sorted(METHODS.keys() & {"vera", "adalora"}))
def test_cat_is_exact_when_a_method_is_low_rank_in_disguise(name: str) -> None:
    program = carrying(lora("a"), METHODS[name]("b"))
    after = combined(program, method="cat")
    assert after.journal[-1].measured["deviation_from_weighted_sum"]["wide"] < 1e-6
    assert after.adapters["combined"].config["r"] == 4


def test_stacks_of_experts_are_combined_each_by_itself(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        **SMALL, num_key_value_heads=2, moe_intermediate_size=20, num_experts=4,
        num_experts_per_tok=2, head_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    methods = [
        Lora(adapter=n, rank=r, targets=[], parameters=names) for n, r in (("a", 2), ("b", 3))
    ]
    program = trained(Pipeline(methods).run(peftc.capture(tmp_path / "base")))
    parts, site = each(program), "model.layers.1.mlp.experts.down_proj"
    want = 0.5 * parts["a"][site] - 2 * parts["b"][site]
    for options in ({"method": "cat"}, {"method": "svd", "rank": 5}):
        after = combined(program, weights={"a": 0.5, "b": -2}, **options)
        assert distance(added(after)[site], want) < 1e-5
    cut = combined(program, weights={"a": 0.5, "b": -2}, method="svd", rank=2)
    s = torch.linalg.svdvals(want)
    error = cut.journal[-1].measured["truncation_error"][site]
    assert error == pytest.approx(float(s[:, 2:].norm() / s.norm()), abs=1e-5)
    for after in (cut, combined(program, method="ties", density=DENSITY)):
        peftc.to_peft(after, out := tmp_path / str(id(after)))
        live = logits(peftc.materialize(after))
        assert distance(logits(peftc.materialize(Pipeline([Merge()]).run(after))), live) < 1e-5
        assert distance(logits(with_peft(tmp_path / "base", out)), live) < 1e-5


def test_other_adapters_stay_where_they_were() -> None:
    program = carrying(lora("a"), lora("b", 3), other("ia3", "c"))
    after = combined(program, adapters="a,b", name="ab")
    assert list(after.adapters) == ["ab", "c"]
    assert distance(run(after), run(program)) < 1e-5
    assert not any(".a." in fqn or ".b." in fqn for fqn in after.constants)


def test_combined_name_may_be_that_of_a_combined_adapter() -> None:
    program = carrying(lora("a"), lora("b", 3))
    after = combined(program, name="a", weights={"a": 0.5, "b": 2})
    assert list(after.adapters) == ["a"]
    again = combined(program, weights={"a": 0.5, "b": 2})
    assert torch.equal(run(after), run(again))


def test_combined_adapters_combine_again() -> None:
    program = carrying(lora("a"), lora("b"), lora("c"))
    two = combined(program, adapters="a,b", method="ties", density=DENSITY, name="ab")
    three = combined(two, weights={"ab": 2, "c": -1})
    for fqn, got in added(three).items():
        want = 2 * each(two)["ab"][fqn] - each(two)["c"][fqn]
        assert torch.allclose(got, want, atol=1e-5)


def test_export_proves_and_verifies_a_combined_adapter(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    steps = [
        Attach(path=str(pair[1]), adapter="a"), Attach(path=str(pair[2]), adapter="b"),
        Combine(method="dare_ties", density=0.5, weights={"a": 0.7, "b": 0.3}),
    ]  # fmt: skip
    applied = peftc.apply(pair[0], steps, tmp_path / "applied")
    measured = applied.manifest["journal"][-1]["measured"]
    assert len(measured["deviation_from_weighted_sum"]) == 14
    peftc.export(tmp_path / "applied", tmp_path / "merged", merge=True)
    assert peftc.verify(tmp_path / "merged")["site"]["sites"] == 14
    program = Pipeline([*steps, Merge()]).run(peftc.capture(pair[0]))
    peftc.to_safetensors(program, tmp_path / "direct")
    assert peftc.verify(tmp_path / "direct")["site"]["sites"] == 14
    want = logits(peftc.materialize(program))
    got = logits(peftc.materialize(peftc.capture(tmp_path / "merged")))
    assert distance(got, want) < 1e-5


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapters": "math"}, ("no adapter 'math'", "did you mean maths")),
        ({"adapters": "maths"}, ("1 adapter,", "two")),
        ({"adapters": "maths,maths"}, ("twice",)),
        ({"weights": {"maths": 1, "codes": 2}}, ("'codes'", "did you mean code")),
        ({"weights": {"maths": 1}}, ("'code' has no weight", "code=1")),
        ({"name": "third", "adapters": "maths,code"}, ("named 'third' already",)),
        ({"method": "ties"}, ("needs a density",)),
        ({"method": "sum", "density": 0.5}, ("no density",)),
        ({"method": "svd"}, ("needs a rank",)),
        ({"method": "cat", "rank": 4}, ("exact",)),
    ],
)
def test_options_are_refused_when_they_do_not_fit(
    options: dict[str, Any], words: tuple[str, ...]
) -> None:
    program = carrying(lora("maths"), lora("code"), lora("third"))
    if "weights" in options:
        options = {**options, "adapters": "maths,code"}
    found = refusals(program, **options)
    assert all(word in found for word in words), found


@pytest.mark.parametrize(
    "options",
    [{"density": 0}, {"density": 1.1}, {"density": -1}, {"density": float("nan")}, {"rank": 0},
     {"weights": {"a": float("inf")}}, {"method": "linear"}, {"name": "a/b"}],
)  # fmt: skip
def test_options_are_refused_when_they_are_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Combine(**options)


def test_combine_is_refused_when_the_adapters_are_merged() -> None:
    merged = Pipeline([Merge()]).run(carrying(lora("a"), lora("b")))
    assert "in the weights" in (found := refusals(merged)) and "and then merge" in found


def test_combine_is_refused_when_an_adapter_does_not_merge() -> None:
    program = carrying(lora("a"), Crooked(adapter="b", targets="wide"))
    found = refusals(program)
    assert "wide" in found and "relu" in found and "'b'" in found


def test_combine_is_refused_after_a_partial_fold() -> None:
    class Bent(Method):
        """Add a scaled low-rank map with a bend behind it."""

        def inject(self, site: SiteEditor) -> None:
            h = site.mul(site.apply(site.down("bent.weight", 2, "gaussian")), 2.0)
            bent = site.op(aten.relu.default, h)
            site.add_to_output(site.mix(bent, site.up("back.weight", 2)))

    program = carrying(
        lora("a", targets="turned"), lora("b", targets="wide"), Bent(adapter="c", targets="wide")
    )
    pair = [lora("d", targets="embed"), lora("e", targets="embed")]
    partly = Pipeline(pair).run(fold_sites(program, partly=True)[0])
    assert "wide: was rewritten" in refusals(partly, adapters="d,e")
    both = carrying(lora("a", targets="turned,wide"), Bent(adapter="c", targets="wide"), *pair)
    folded = Pipeline([Fold()]).run(both)  # of a's two sites, one
    assert "fold" in refusals(Pipeline(pair).run(folded), adapters="d,e")


def test_cat_is_refused_when_a_delta_has_no_factors() -> None:
    found = refusals(carrying(lora("a"), Gated(adapter="b", targets="wide")), method="cat")
    assert "wide" in found and "'b'" in found and "sum" in found


def test_combine_is_refused_when_an_adapter_trains_biases() -> None:
    found = refusals(carrying(lora("a"), lora("b", bias="lora_only", targets="wide")))
    assert "wide.bias" in found and "bias='none'" in found


def test_biases_are_combined_when_adapters_have_their_own() -> None:
    program = carrying(lora("a", lora_bias=True, targets="wide,conv"), lora("b"))
    parts = each(program)
    for options in ({"method": "cat"}, {"method": "sum"}, {"method": "svd", "rank": 4}):
        after = combined(program, weights={"a": -0.5, "b": 2}, **options)
        assert torch.allclose(added(after)["wide.bias"], -0.5 * parts["a"]["wide.bias"], atol=1e-6)
        assert distance(run(Pipeline([Merge()]).run(after)), run(after)) < 1e-5
        assert after.adapters["combined"].config["lora_bias"]
    pruned = combined(program, method="magnitude_prune", density=0.5)
    want = trimmed(parts["a"]["wide.bias"], 0.5)
    assert torch.allclose(added(pruned)["wide.bias"], want, atol=1e-6)


def test_new_adapter_of_factors_can_be_trained_on() -> None:
    after = combined(carrying(lora("a"), lora("b")), method="cat")
    model = peftc.materialize(after)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(learning) == sorted(after.trainable) and learning
    assert isinstance(peftc.absorb(after, model), Program)
