"""AdaLoRA on SmolLM2-135M: the budget as planned, and ranks that differ; at the end plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import peftc
from peftc import Lora, Pipeline, Program, absorb, capture, materialize, plot_ranks, to_peft
from peftc.demo_model import demo_checkpoint
from peftc.passes.adalora import AdaLora
from peftc.passes.budget import RankSchedule
from peftc.passes.prune_ranks import PruneRanks

from .conftest import distance, logits, with_peft

STEPS = 10
TEXT = (
    "peftc is a compiler. It captures a model as small graphs, rewrites them, and proves the rest."
)


@dataclass(frozen=True)
class Run:
    base: Path
    ids: torch.Tensor
    program: Program
    schedule: RankSchedule
    losses: list[float]


@pytest.fixture(scope="module")
def run() -> Run:
    base = demo_checkpoint("float32")
    ids: torch.Tensor = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids
    method = AdaLora(init_r=6, target_r=4, targets="all-linear")
    program = Pipeline([method]).run(capture(base))
    model: Any = materialize(program).train()
    schedule = peftc.schedule(program, model, STEPS).by_adapter["default"]
    assert isinstance(schedule, RankSchedule)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for number in range(1, STEPS + 1):
        loss = model(input_ids=ids, labels=ids).loss
        (loss + schedule.loss(model)).backward()
        optimizer.step()
        schedule.step(model, number)
        optimizer.zero_grad()
        losses.append(loss.item())
    return Run(base, ids, absorb(program, model), schedule, losses)


def test_budget_is_as_planned_and_sites_differ(run: Run, tmp_path: Path) -> None:
    assert run.losses[-1] < run.losses[0] - 0.3
    assert run.schedule.history == {2: 1017, 3: 892, 4: 846, 5: 840}  # 840 + 420·(1 − (t−1)/4)³
    ranks = run.schedule.ranks
    assert len(ranks) == 210 and sum(ranks.values()) == 4 * 210
    assert 0 in ranks.values() and 6 in ranks.values()
    plot_ranks(ranks, tmp_path / "ranks.png", run.schedule.history)
    assert (tmp_path / "ranks.png").read_bytes()[:4] == b"\x89PNG"


def test_pruned_lora_is_smaller_equal_and_loads_in_peft(run: Run, tmp_path: Path) -> None:
    want = logits(materialize(run.program), run.ids)
    after = Pipeline([PruneRanks()]).run(run.program)
    method = after.adapters["default"].method
    assert isinstance(method, Lora)
    ranks = {fqn: rank for fqn, rank in run.schedule.ranks.items() if rank}
    assert {fqn: method.rank_at(fqn) for fqn in after.adapters["default"].sites} == ranks
    before, left = (
        sum(p.constants[fqn].spec.nbytes for fqn in p.trainable) for p in (run.program, after)
    )
    assert left < 0.75 * before
    assert distance(logits(materialize(after), run.ids), want) < 1e-5
    to_peft(after, tmp_path / "lora")
    assert distance(logits(with_peft(run.base, tmp_path / "lora"), run.ids), want) < 1e-5
