"""AdaLoRA's budget in training: beside PEFT's, in a loop, in transformers' Trainer, and resumed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

import peftc
from peftc import Attach, Pass, Pipeline, Program, absorb, capture, materialize, to_peft
from peftc.callbacks import STATE
from peftc.errors import AdapterError, CheckpointError, PassError
from peftc.passes.adalora import AdaLora
from peftc.passes.budget import Budget, RankSchedule
from peftc.passes.nf4 import Nf4
from tests.conftest import MakeCheckpoint, auto, distance, logits, with_peft
from tests.helpers import alone

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 12
WORLD = (("WORLD_SIZE", "1"), ("RANK", "0"))
SHORT: dict[str, Any] = {"init_r": 6, "target_r": 3, "targets": "all-linear"}
IDS = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(1))


def make(base: Path, *before: Pass, **options: Any) -> Program:
    return Pipeline([*before, AdaLora(**{**SHORT, **options})]).run(capture(base))


def scheduled(program: Program, model: nn.Module, steps: int = STEPS) -> RankSchedule:
    found = peftc.schedule(program, model, steps).by_adapter["default"]
    assert isinstance(found, RankSchedule)
    return found


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(
    model: Any, schedule: RankSchedule, optimizer: torch.optim.Optimizer, *numbers: int
) -> float:
    loss = torch.zeros(())
    for number in numbers:
        loss = model(input_ids=IDS, labels=IDS).loss
        (loss + schedule.loss(model)).backward()
        optimizer.step()
        schedule.step(model, number)
        optimizer.zero_grad()
    return float(loss.detach())


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """E of each site."""
    return {n: p.detach() for n, p in model.named_parameters() if "lora_E" in n}


@given(
    start=st.integers(2, 500), less=st.integers(1, 499), first=st.integers(0, 50),
    length=st.integers(1, 100), every=st.integers(1, 9),
)  # fmt: skip
def test_budget_falls_from_start_to_target_between_first_and_last(
    start: int, less: int, first: int, length: int, every: int
) -> None:
    target = max(1, start - less)
    budget = Budget(start, target, first, first + length, every)
    curve = [budget.at(step) for step in range(first + length + 5)]
    assert curve[: first + 1] == [start] * (first + 1)
    assert curve[first + length :] == [target] * 5
    assert curve == sorted(curve, reverse=True)
    assert budget.prunes(first + length) and not budget.prunes(first)
    assert not budget.prunes(first + length + 1)  # the choice is final


@pytest.mark.parametrize("every", [1, 3])
def test_ranks_and_losses_are_peft_s_at_every_step(every: int, checkpoint: MakeCheckpoint) -> None:
    base, times = checkpoint("llama"), {"total_step": STEPS, "tinit": 2, "tfinal": 3}
    theirs = peft.get_peft_model(
        auto(base),
        peft.AdaLoraConfig(
            init_r=6, target_r=3, lora_alpha=6, deltaT=every, target_modules="all-linear",
            task_type="CAUSAL_LM", **times,  # without a task PEFT leaves out the regularizer
        ),
    )  # fmt: skip
    program = make(base, alpha=6, delta_t=every, **times)
    model: Any = materialize(program)
    started = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(started.get(name, parameter))
    schedule, mine, other = scheduled(program, model), adamw(model), adamw(theirs)
    chosen = 0
    for number in range(1, STEPS + 1):
        theirs_loss = theirs(input_ids=IDS, labels=IDS).loss
        theirs_loss.backward()
        other.step()
        theirs.base_model.update_and_allocate(number)
        other.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss + schedule.loss(model)
        loss.backward()
        mine.step()
        schedule.step(model, number)
        mine.zero_grad()
        assert abs(float(loss) - float(theirs_loss)) < 1e-5
        pattern = theirs.peft_config["default"].rank_pattern
        if schedule.kept is not None:
            left = zip(schedule.sites, schedule.kept, strict=True)
            ours = {f"{fqn}.lora_E.default": mask.view(-1).tolist() for fqn, mask in left}
            assert ours == {n.removeprefix("base_model.model."): p for n, p in pattern.items()}
            chosen += 1
    assert chosen == {1: 10, 3: 10}[every] and sum(schedule.ranks.values()) == 3 * 14
    assert distance(logits(model.eval()), logits(theirs.eval())) < 1e-4


def test_times_follow_from_the_training_by_default(checkpoint: MakeCheckpoint) -> None:
    program = make(checkpoint("llama"))
    budget = scheduled(program, materialize(program), 2000).budget
    assert budget == Budget(6 * 14, 3 * 14, 200, 1000, 4)
    assert AdaLora().final_r == 8 and AdaLora(init_r=3).final_r == 2


@pytest.mark.parametrize("kind", ["plain", "nf4", "fp16"])
def test_budget_is_kept_exactly_and_the_loss_falls_on_any_base(
    kind: str, checkpoint: MakeCheckpoint
) -> None:
    base = checkpoint("llama", torch.float16 if kind == "fp16" else torch.float32)
    program = make(base, *([Nf4()] if kind == "nf4" else []))
    model = materialize(program)
    schedule, optimizer = scheduled(program, model), adamw(model)
    before = train(model, schedule, optimizer, 1)
    after = train(model, schedule, optimizer, *range(2, STEPS + 1))
    assert after < before
    assert schedule.history == {n: schedule.budget.at(n) for n in range(2, 7)}
    assert schedule.history[6] == 3 * 14 == sum(schedule.ranks.values())
    counts = {n: int(e.count_nonzero()) for n, e in values(model).items()}
    assert counts == {f"{n}.lora_E.default": rank for n, rank in schedule.ranks.items()}
    assert len(set(counts.values())) > 1, "sites differ in what they need"


def test_tied_scores_prune_no_more_than_the_budget_says(checkpoint: MakeCheckpoint) -> None:
    program = make(checkpoint("llama"), total_step=3, tinit=0, tfinal=2)
    model = materialize(program)
    schedule = scheduled(program, model, 3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    schedule.step(model, 1)
    assert sum(schedule.ranks.values()) == 3 * 14


def test_overflowed_gradients_leave_no_trace(checkpoint: MakeCheckpoint) -> None:
    program = make(checkpoint("llama"))
    model = materialize(program)
    schedule, optimizer = scheduled(program, model), adamw(model)
    train(model, schedule, optimizer, 1)
    before = schedule.state_dict()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    schedule.step(model, 2)
    after = schedule.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items() if n.endswith("sensitivity"))


@pytest.mark.parametrize(
    ("options", "steps", "words"),
    [
        ({"total_step": 20}, 12, "12 steps"),
        ({"tinit": 9, "tfinal": 5}, 12, "from step 9 to step 7"),
        ({}, 0, "0 steps"),
    ],
)
def test_training_too_short_to_prune_is_refused(
    options: dict[str, Any], steps: int, words: str, checkpoint: MakeCheckpoint
) -> None:
    program = make(checkpoint("llama"), **options)
    with pytest.raises(PassError, match=words):
        scheduled(program, materialize(program), steps)


def test_budget_that_would_prune_nothing_is_refused(checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(PassError, match="no rank would be pruned"):
        make(checkpoint("llama"), init_r=4, target_r=4)


def test_pruned_adapter_trains_on_with_the_ranks_it_has(checkpoint: MakeCheckpoint) -> None:
    place = "model.layers.0.self_attn.{}_proj"
    pattern = {place.format("q"): [True, False, True, False], place.format("k"): [False] * 4}
    program = make(
        checkpoint("llama"), init_r=4, target_r=3, targets=list(pattern), rank_pattern=pattern
    )
    model = materialize(program)
    schedule = scheduled(program, model)
    train(model, schedule, adamw(model), *range(1, STEPS + 1))
    assert schedule.ranks == {place.format("q"): 2, place.format("k"): 0}


def test_step_without_gradients_or_begun_late_is_refused(checkpoint: MakeCheckpoint) -> None:
    program = make(checkpoint("llama"))
    model = materialize(program)
    with pytest.raises(PassError, match="no gradients"):
        scheduled(program, model).step(model, 1)
    with pytest.raises(PassError, match="first step seen is 11"):
        scheduled(program, model).step(model, 11)
    with pytest.raises(PassError, match="lacks 42 tensors"):
        scheduled(program, nn.Linear(2, 2))
    with pytest.raises(PassError, match="sharded"):
        scheduled(program, nn.ModuleDict({"_fsdp_wrapped_module": nn.Linear(2, 2)}))


def test_options_left_to_the_training_survive_peft_s_config(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    for i, options in enumerate(({}, {"tinit": 3}, {"total_step": 40, "delta_t": 2})):
        program = make(base, **options)
        path = to_peft(program, tmp_path / str(i)).path
        again = Pipeline([Attach(path=str(path))]).run(capture(base)).adapters["default"].method
        assert isinstance(again, AdaLora)
        if "total_step" in options:  # PEFT would not work the others out
            options = {"tinit": 4, "tfinal": 20, **options}
        for field in ("tinit", "tfinal", "delta_t", "total_step"):
            assert getattr(again, field) == options.get(field), field
        assert distance(logits(with_peft(base, path)), logits(auto(base))) < 1e-6  # PEFT takes it


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = IDS[i % 4].roll(i)
        return {"input_ids": ids, "labels": ids}


def trainer(program: Program, folder: Path, **options: Any) -> Trainer:
    options = {"max_steps": STEPS, "save_steps": 5, "learning_rate": 1e-2, **options}
    arguments = TrainingArguments(
        str(folder), report_to=[], per_device_train_batch_size=options.pop("batch", 4),
        use_cpu=True, disable_tqdm=True, seed=3, logging_steps=100, **options,
    )  # fmt: skip
    model = materialize(program)
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=[peftc.callback(program)])


def main(base: str, out: str) -> None:
    """One of several processes that train together; each keeps what it ends with."""
    program = make(Path(base))
    world, rank = (int(os.environ.get(name, default)) for name, default in WORLD)
    several = {"ddp_backend": "gloo"} if world > 1 else {}
    run = trainer(program, Path(out), batch=4 // world, save_strategy="no", **several)
    run.train()
    save_file(trained(run), Path(out) / f"{rank}-of-{world}.safetensors")


def test_two_processes_end_as_one_does(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    main(str(checkpoint("llama")), str(tmp_path))
    ran = alone(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m",
        "tests.test_adalora", checkpoint("llama"), tmp_path, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert ran.code == 0, ran.err[-2000:]
    whole, first, second = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("0-of-1", "0-of-2", "1-of-2")
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert torch.allclose(tensor, whole[name], atol=1e-4)
        if "lora_E" in name:
            assert torch.equal(tensor == 0, whole[name] == 0), "the same ranks are left"


def trained(run: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad}


def test_resumed_trainer_ends_as_an_unbroken_one(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    program = make(checkpoint("llama"))
    whole = trainer(program, tmp_path / "one")
    whole.train()
    assert sum(int(e.count_nonzero()) for e in values(whole.model).values()) == 3 * 14
    first = tmp_path / "one" / "checkpoint-5"
    assert (first / STATE).is_file()
    again = trainer(program, tmp_path / "one")
    again.train(resume_from_checkpoint=str(first))
    assert all(torch.equal(t, trained(whole)[name]) for name, t in trained(again).items())
    (first / STATE).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainer(program, tmp_path / "one").train(resume_from_checkpoint=str(first))
    learned = absorb(program, again.model)
    assert distance(logits(materialize(learned)), logits(again.model.eval())) < 1e-6


def test_regularizer_counts_once_whatever_the_accumulation(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    program = make(checkpoint("llama"), orth_reg_weight=5.0)
    options = {"max_steps": 3, "max_grad_norm": 1e9, "optim": "sgd"}
    one = trainer(program, tmp_path / "one", **options)
    two = trainer(program, tmp_path / "two", batch=2, gradient_accumulation_steps=2, **options)
    one.train()
    two.train()
    for name, tensor in trained(one).items():
        assert distance(trained(two)[name], tensor) < 1e-4, name


def test_regularizer_is_scaled_as_fp16_scales_the_loss(checkpoint: MakeCheckpoint) -> None:
    program = make(checkpoint("llama"))
    model = materialize(program)
    callback, state = peftc.callback(program), SimpleNamespace(max_steps=STEPS, global_step=0)
    callback.on_train_begin(None, state, None, model=model)
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=8.0)):
        optimizer = SimpleNamespace(scaler=scaler)
        callback.on_step_begin(None, state, None, model=model, optimizer=optimizer)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(found[0]) == 28 and all(map(torch.equal, found[1], [8 * g for g in found[0]]))


def test_callback_does_nothing_for_other_methods(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    program = Pipeline([peftc.Lora(rank=2, targets="all-linear")]).run(capture(checkpoint("llama")))
    run = trainer(program, tmp_path, max_steps=5)
    run.train()
    assert not (tmp_path / "checkpoint-5" / STATE).exists()


def test_state_of_another_adapter_is_refused(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    program = make(checkpoint("llama"))
    model = materialize(program)
    schedule, optimizer = scheduled(program, model), adamw(model)
    train(model, schedule, optimizer, 1, 2, 3)
    state = schedule.state_dict()
    fresh = scheduled(program, model)
    fresh.load_state_dict(state)
    assert fresh.history == schedule.history and fresh.ranks == schedule.ranks
    other = make(checkpoint("llama"), init_r=5)
    with pytest.raises(AdapterError, match="not the state"):
        scheduled(other, materialize(other)).load_state_dict(state)
    with pytest.raises(AdapterError, match="not the state"):
        fresh.load_state_dict({n: t for n, t in state.items() if "q_proj.kept" not in n})


if __name__ == "__main__":
    main(*sys.argv[1:])
