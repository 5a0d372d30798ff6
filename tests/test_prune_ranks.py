"""Pruned ranks: gone for real, chosen as the SVD of every ΔW says, and plain LoRA for PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peftc
from peftc import Lora, Merge, Method, Pipeline, Program, capture, materialize
from peftc.cli import cli
from peftc.constants import Held
from peftc.deltas import deltas
from peftc.errors import PassError, PeftcError
from peftc.evaluate import value
from peftc.passes.adalora import AdaLora
from peftc.passes.bitfit import BitFit
from peftc.passes.ia3 import Ia3
from peftc.passes.prune_ranks import PruneRanks, total_error

from .conftest import MakeAdapter, MakeCheckpoint, distance, logits, with_peft
from .test_canonical import engine_rules
from .test_combine import Crooked, Gated, carrying, few, lora, mixture, run, trained


def pruned(program: Program, **options: Any) -> Program:
    return Pipeline([PruneRanks(**options)]).run(program)


def count(program: Program) -> int:
    """How many numbers training changes."""
    return sum(math.prod(program.constants[fqn].spec.shape) for fqn in program.trainable)


def dense(program: Program) -> dict[str, torch.Tensor]:
    """ΔW of each site, in fp64."""
    return {fqn: value(delta.matrix).double() for fqn, delta in deltas(program)[0].items()}


def masked(base: Path, ranks: dict[str, list[int]]) -> Program:
    """A trained AdaLoRA of rank 4 that has, at the sites named, only some ranks, elsewhere none."""
    program = trained(Pipeline([AdaLora(init_r=4, targets="all-linear")]).run(capture(base)))
    held = {}
    for fqn, constant in program.constants.items():
        if fqn.endswith("lora_E.default"):
            kept = ranks.get(fqn.removesuffix(".lora_E.default"), [])
            mask = torch.tensor([[float(i in kept)] for i in range(4)])
            held[fqn] = Held(value(constant) * mask)
    return program.rewrite(constants=held)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_masked_adalora_leaves_as_a_smaller_lora_that_peft_loads(
    kind: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint(kind)
    first, second = {
        "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
        "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
    }[kind]
    program = masked(base, {first: [0, 2, 3], second: [1]})
    want = logits(materialize(program))
    after = pruned(program)
    adapter = after.adapters["default"]
    assert adapter.sites == (first, second)  # sites of rank 0 are gone
    assert all(site.is_plain for fqn, site in after.sites.items() if fqn not in adapter.sites)
    assert isinstance(method := adapter.method, Lora)
    assert [method.rank_at(fqn) for fqn in adapter.sites] == [3, 1]
    assert distance(logits(materialize(after)), want) < 1e-5
    assert after.journal[-1].effect == "equal" and after.journal[-1].measured["ranks_left"] == 4
    peftc.to_peft(after, tmp_path / "plain")
    peftc.to_peft(after, tmp_path / "canonical", canonical=True)
    assert not engine_rules(tmp_path / "canonical", set(after.modules))
    for name in ("plain", "canonical"):
        assert distance(logits(with_peft(base, tmp_path / name)), want) < 1e-5
    merged = Pipeline([Merge()]).run(after)
    assert distance(logits(materialize(merged)), want) < 1e-5


def shapes() -> st.SearchStrategy[list[tuple[int, int, int]]]:
    sizes = st.integers(1, 12)
    return st.lists(st.tuples(sizes, sizes, st.integers(1, 5)), min_size=1, max_size=4)


@few
@given(shapes(), st.integers(1, 16), st.integers(0, 99))
def test_choice_is_the_best_there_is_for_a_budget(
    sizes: list[tuple[int, int, int]], budget: int, seed: int
) -> None:
    model = nn.ModuleList([nn.Linear(i, o, bias=False) for i, o, _ in sizes])
    ranks = {f"^{n}$": min(r, i, o) for n, (i, o, r) in enumerate(sizes)}
    targets = [str(n) for n in range(len(sizes))]
    method = Lora(targets=targets, rank_pattern=ranks, alpha=3, rank=1)
    program = trained(Pipeline([method]).run(capture(model)), seed)
    before = dense(program)
    told = {one.site: one for one in PruneRanks(budget=budget).outlook(program)}
    after = dense(pruned(program, budget=budget))
    spectra = {fqn: torch.linalg.svdvals(matrix) for fqn, matrix in before.items()}
    every = torch.cat([s[: told[fqn].rank] for fqn, s in spectra.items()]).sort(descending=True)
    lost = {fqn: (m - after.get(fqn, torch.zeros_like(m))).norm() for fqn, m in before.items()}
    least = every.values[budget:].norm()
    assert torch.stack(list(lost.values())).norm() <= least * (1 + 1e-4) + 1e-5
    assert sum(one.left for one in told.values()) == min(budget, len(every.values))
    for fqn, matrix in before.items():
        assert abs(lost[fqn] / matrix.norm() - told[fqn].error) < 1e-4
    total = torch.stack([m.norm() for m in before.values()]).norm()
    assert abs(least / total - total_error(list(told.values()))) < 1e-4


def test_sites_of_every_kind_are_pruned(tmp_path: Path) -> None:
    program = carrying(lora("a", 3))
    assert len(PruneRanks(budget=7).outlook(program)) == 4
    after = pruned(program, budget=7)
    assert count(after) < count(program)
    errors = after.journal[-1].measured["pruning_error"]
    for fqn, matrix in dense(program).items():
        now = dense(after).get(fqn, torch.zeros_like(matrix))
        assert abs(float((matrix - now).norm() / matrix.norm()) - errors[fqn]) < 1e-5
    assert distance(run(pruned(program, budget=12)), run(program)) < 1e-6


def test_experts_are_pruned_alike_and_by_their_sum(tmp_path: Path) -> None:
    program = trained(mixture(tmp_path))
    after = pruned(program, budget=6, adapters="b")
    left = {fqn: value(delta.matrix) for fqn, delta in deltas(after)[0].items()}
    for fqn, matrix in dense(program).items():
        assert distance(left[fqn], matrix.float()) < 1.0
    told = PruneRanks(budget=6, adapters="b").outlook(program)
    assert sum(one.left for one in told) == 6 and {one.rank for one in told} == {3}
    assert list(after.adapters) == ["a", "b"]


def test_budget_is_shared_by_adapters_that_keep_their_order() -> None:
    program = carrying(lora("a", 2), lora("b", 3, targets=["wide"]), lora("c", 1))
    after = pruned(program, budget=5, adapters=["a", "b"])
    assert list(after.adapters)[-1] == "c"
    assert after.adapters["c"].sites == program.adapters["c"].sites
    measured = after.journal[-1].measured
    assert (measured["ranks_before"], measured["ranks_left"]) == (4 * 2 + 3, 5)
    assert "wide (b)" in measured["pruning_error"]


def test_low_rank_method_in_disguise_becomes_a_lora() -> None:
    program = carrying(AdaLora(init_r=3, targets=["wide", "turned"]))
    after = pruned(program, budget=4)
    assert type(after.adapters["default"].method) is Lora
    assert count(after) < count(program)


def test_head_and_biases_that_were_trained_too_stay_with_the_adapter(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("bert")
    method = AdaLora(init_r=4, modules_to_save="cls", bias="all")
    program = trained(Pipeline([method]).run(capture(base)))
    before = program.adapters["default"]
    own = {key for key, fqn in before.tensors.items() if fqn in program.captured}
    after = pruned(program, budget=30)
    assert own == {k for k, f in after.adapters["default"].tensors.items() if f in after.captured}
    assert len(own) > 10
    peftc.to_peft(after, tmp_path / "out")
    want = logits(materialize(after))
    assert distance(logits(with_peft(base, tmp_path / "out")), want) < 1e-5
    assert distance(logits(materialize(pruned(program))), logits(materialize(program))) < 1e-5


def test_lora_without_a_rank_to_lose_stays_as_it_is() -> None:
    program = carrying(lora("a", 2))
    result = PruneRanks().run(program)
    assert not result.modified and result.program is program


@pytest.mark.parametrize(
    ("methods", "options", "words"),
    [
        ([lora("a")], {"adapters": "b"}, "no adapter 'b'"),
        ([], {}, "no adapter"),
        ([Crooked(targets=["wide"])], {}, "not affine"),
        ([Gated(targets=["wide"])], {"budget": 3}, "no product of two small matrices"),
        ([Lora(rank=2, targets=["wide"], lora_bias=True)], {}, "changes the bias too"),
        ([Lora(rank=2, targets=["wide"], bias="lora_only")], {}, "base's own tensors"),
        ([BitFit()], {}, "base's own tensors"),
        ([Ia3(targets=["wide"])], {"budget": 2}, "bias|no product"),
    ],
)
def test_what_has_no_ranks_is_refused(
    methods: list[Method], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(PeftcError, match=words):
        pruned(carrying(*methods), **options)


def test_fresh_adapter_is_refused(checkpoint: MakeCheckpoint) -> None:
    program = Pipeline([AdaLora(init_r=4)]).run(capture(checkpoint("llama")))
    with pytest.raises(PassError, match="'default' adds nothing"):
        pruned(program)


def test_inspect_shows_the_error_before_the_pass_makes_it(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    path, png = adapter(base), tmp_path / "ranks.png"
    look = ["inspect", str(path), "--prune", "20", "--json", "-q", "--plot", str(png)]
    found = json.loads(CliRunner().invoke(cli, look).stdout)
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert (found["ranks"], found["left"]) == (4 * 14, 20)
    do = ["apply", str(path), "-o", str(tmp_path / "out"), "--json", "-q"]
    done = json.loads(CliRunner().invoke(cli, [*do, "prune_ranks", "--budget", "20"]).stdout)
    errors = done["journal"][-1]["measured"]["pruning_error"]
    assert {one["site"]: one["error"] for one in found["sites"]} == errors
    want = logits(materialize(peftc.load(tmp_path / "out")))
    assert distance(logits(with_peft(base, tmp_path / "out" / "adapter")), want) < 1e-5
