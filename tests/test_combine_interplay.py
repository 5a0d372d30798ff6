"""Combined adapters beside PEFT's, with other methods and passes; and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc import Attach, Combine, Fold, Merge, Method, Pipeline, Program, registry
from peftc.algebra import fold_sites
from peftc.deltas import deltas
from peftc.evaluate import value
from peftc.graphs import aten
from peftc.sites import SiteEditor

from .conftest import MakeAdapter, MakeCheckpoint, distance, logits, with_peft
from .test_combine import (
    DENSITY,
    Crooked,
    Gated,
    added,
    carrying,
    combined,
    each,
    lora,
    mixture,
    refusals,
    run,
    trained,
    trimmed,
)  # fmt: skip


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
    program = trained(mixture(tmp_path))
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
