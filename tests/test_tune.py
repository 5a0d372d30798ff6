"""Training: what is learned is PEFT's, whatever happens to the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import peftc
from peftc import Artifact, Lora, Tuning, registry, tune
from peftc.errors import ArtifactError, Interrupted, MissingDependency, TrainingError
from peftc.examples import read_examples
from peftc.progress import Progress
from peftc.token_rows import Rows, collate, token_rows
from peftc.tuner import Order, Tuner

from .conftest import auto, distance, logits, with_peft
from .helpers import ROOT, refuse
from .talker import LORA, sums, talker, tuning

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sums(tmp_path_factory.mktemp("data") / "sums.jsonl")


@pytest.fixture(scope="module")
def unbroken(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The run that every broken one must end like: dropout, three epochs, accumulation."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    return tune(base, settings(data), out, [LORA])


def settings(data: Path, **options: Any) -> Tuning:
    return tuning(data, steps=12, micro_batch=4, save_steps=4, **options)


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(artifact.path / "adapter/adapter_model.safetensors")
    return found


def losses(artifact: Artifact) -> list[float]:
    text = (artifact.path / "training/metrics.jsonl").read_text()
    return [line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line]


def same(one: Artifact, other: Artifact) -> bool:
    a, b = weights(one), weights(other)
    equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return equal and losses(one) == losses(other)


def rows_of(base: Path, data: Path) -> Rows:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    how = tuning(data)
    return token_rows(read_examples(how, str(data), tokenizer), how, tokenizer, 128)


def test_tuned_adapter_is_what_apply_writes_and_peft_loads(base: Path, unbroken: Artifact) -> None:
    figures = unbroken.manifest["training"]
    assert unbroken.manifest["kind"] == "apply" and not unbroken.damage()
    assert figures["steps"] == 12 and figures["examples"] == 40
    assert figures["last_loss"] < figures["first_loss"]
    assert figures["settings"]["lr"] == 5e-3 and len(losses(unbroken)) == 12
    live = peftc.materialize(peftc.load(unbroken.path))
    assert distance(logits(live), logits(auto(base))) > 1e-2
    assert distance(logits(live), logits(with_peft(base, unbroken.path / "adapter"))) <= 1e-5
    assert peftc.verify(unbroken.path)["adapters"] == ["default"]
    assert not list(unbroken.path.parent.glob(".*"))


def test_losses_equal_peft_s_in_transformers_trainer(
    base: Path, data: Path, tmp_path: Path
) -> None:
    lora = Lora(rank=4, alpha=8)
    peftc.apply(base, [lora], tmp_path / "fresh")
    how = tuning(data, steps=20, clip=0.5, weight_decay=0.01)
    ours = tune(tmp_path / "fresh", how, tmp_path / "out")
    rows = rows_of(base, data)
    model = peft.PeftModel.from_pretrained(
        auto(base), tmp_path / "fresh/adapter", is_trainable=True
    )
    arguments = transformers.TrainingArguments(
        tmp_path / "theirs", max_steps=20, per_device_train_batch_size=8, learning_rate=5e-3,
        warmup_steps=1, max_grad_norm=0.5, weight_decay=0.01, logging_steps=1, seed=0,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip

    class Theirs(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Order:
            return Order(len(rows), 8, 0)

    theirs = Theirs(model, arguments, partial(collate, pad=1), train_dataset=rows)
    theirs.train()
    want = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert losses(ours) == pytest.approx(want, abs=1e-4)
    assert want[-1] < want[0] - 0.3


def test_accumulated_gradients_give_the_losses_of_whole_batches(
    base: Path, data: Path, tmp_path: Path
) -> None:
    lora = Lora(rank=4)
    whole = tune(base, tuning(data), tmp_path / "whole", [lora])
    parts = tune(base, tuning(data, micro_batch=2), tmp_path / "parts", [lora])
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)


def test_packed_rows_give_the_losses_of_separate_ones(base: Path, tmp_path: Path) -> None:
    data = sums(tmp_path / "sums.jsonl", 48)
    lora = Lora(rank=4)
    # Every step sees all examples, so that their order does not matter.
    plain = tune(base, tuning(data, batch_size=48, steps=4), tmp_path / "plain", [lora])
    rows = len(rows_of(base, data).pack(64))
    how = tuning(data, batch_size=rows, steps=4, pack=True, max_length=64)
    packed = tune(base, how, tmp_path / "packed", [lora])
    assert rows < 12
    assert losses(packed) == pytest.approx(losses(plain), abs=1e-4)


def test_gradient_checkpointing_changes_no_loss(
    base: Path, data: Path, unbroken: Artifact, tmp_path: Path
) -> None:
    again = tune(base, settings(data, gradient_checkpointing=True), tmp_path / "out", [LORA])
    assert losses(again) == pytest.approx(losses(unbroken), abs=1e-5)


def test_mixed_precision_and_narrow_weights_come_close(
    base: Path, data: Path, tmp_path: Path
) -> None:
    lora = [Lora(rank=4)]
    want = losses(tune(base, tuning(data), tmp_path / "fp32", lora))
    for name, how in (
        ("mixed", {"precision": "bf16"}), ("narrow", {"dtype": "bfloat16"}), ("plain", {}),
    ):  # fmt: skip
        got = losses(tune(base, tuning(data, **how), tmp_path / name, lora))
        assert got == pytest.approx(want, rel=1e-2)
        assert (got == want) == (not how)


def test_precision_of_the_launch_is_the_settings(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(TrainingError, match="is none, and accelerate was launched with bf16"):
        tune(base, tuning(data), tmp_path / "out", [LORA])


@pytest.mark.parametrize(
    "steps", [["nf4", "lora"], ["full"], ["dora"], ["prompt_tuning"], ["adalora"]]
)
def test_every_kind_of_method_trains_and_loads(
    base: Path, data: Path, tmp_path: Path, steps: list[str]
) -> None:
    options: dict[str, Any] = {
        "full": {"targets": ["o_proj"]},
        "prompt_tuning": {"virtual_tokens": 4},
    }
    passes = [registry.load(name)(**options.get(name, {})) for name in steps]
    artifact = tune(base, tuning(data, steps=6, batch_size=40), tmp_path / "out", passes)
    assert losses(artifact)[-1] < losses(artifact)[0]
    live = peftc.materialize(peftc.load(artifact.path))
    assert distance(logits(live)[:, -11:], logits(auto(base))) > 1e-4


def test_larger_rate_for_b_is_lora_plus(base: Path, data: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Spy(Progress):
        def step(self, done: int, total: int, remark: str) -> None:
            seen.append({"done": done, "total": total})

    how = tuning(data, lr=1e-3, lr_ratio=16, steps=2, schedule="constant", warmup=0)
    artifact = tune(base, how, tmp_path / "out", [Lora(rank=4)], progress=Spy())
    plain = tune(
        base,
        tuning(data, lr=1e-3, steps=2, schedule="constant", warmup=0),
        tmp_path / "p",
        [Lora(rank=4)],
    )
    b = next(name for name in weights(artifact) if "lora_B" in name)
    assert float(weights(artifact)[b].abs().mean()) > 8 * float(weights(plain)[b].abs().mean())
    assert seen[-1] == {"done": 2, "total": 2}


def go(base: Path, data: Path, out: Path, **options: Any) -> Artifact:
    return tune(base, settings(data, **options), out, [LORA])


def command(base: Path, data: Path, out: Path) -> list[str]:
    """The same training by the command line."""
    how = (
        "--steps 12 --batch-size 8 --micro-batch 4 --save-steps 4 --lr 5e-3 --device cpu --no-plot"
    )
    return [
        sys.executable, "-m", "peftc", "tune", str(base), "--data", str(data), "-o", str(out),
        *how.split(), "lora", "--rank", "4", "--dropout", "0.1",
    ]  # fmt: skip


def stop_at(
    step: int,
    job: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    moment: str = "training_step",
) -> None:
    """Has something happen once in a training, behind so many steps."""
    plain, done = getattr(Tuner, moment), list[bool]()

    def wrapped(self: Any, *args: Any, **more: Any) -> Any:
        if self.state.global_step == step and not done:
            done.append(True)
            job()
        return plain(self, *args, **more)

    monkeypatch.setattr(Tuner, moment, wrapped)


@pytest.mark.parametrize("step", [4, 6, 11])
def test_broken_run_goes_on_to_the_same_weights_and_losses(
    base: Path, data: Path, unbroken: Artifact, tmp_path: Path, step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def crash() -> None:
        raise ZeroDivisionError

    stop_at(step, crash, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        go(base, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    after = go(base, data, tmp_path / "out")
    assert after.manifest["training"]["went_on_at_step"] == step // 4 * 4
    assert same(after, unbroken)
    assert not list(tmp_path.glob(".*"))


def test_broken_adalora_goes_on_with_its_budget(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftc.passes.adalora import AdaLora

    method = AdaLora(init_r=6, target_r=2)
    whole = tune(base, settings(data), tmp_path / "whole", [method])
    stop_at(6, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    with pytest.raises(Interrupted):
        tune(base, settings(data), tmp_path / "out", [method])
    assert same(tune(base, settings(data), tmp_path / "out", [method]), whole)


def test_killed_process_goes_on_by_the_same_command(
    base: Path, data: Path, unbroken: Artifact, tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = partial(
        subprocess.Popen, command(base, data, tmp_path / "out"), cwd=ROOT, env=environment
    )
    with call(stderr=subprocess.PIPE) as process:
        seal = tmp_path / ".out.peftc-training/checkpoint-4/sealed"
        while not seal.exists() and process.poll() is None:
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with call(stderr=subprocess.PIPE, text=True) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    after = Artifact.open(tmp_path / "out")
    assert any(f"went on at step {step};" in err for step in (4, 8, 12)), err
    assert same(after, unbroken)


def test_interrupt_saves_the_step_at_hand(
    base: Path, data: Path, unbroken: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    stop_at(6, lambda: os.kill(os.getpid(), signal.SIGINT), monkeypatch)
    with pytest.raises(Interrupted, match="SIGINT behind step 7") as caught:
        go(base, data, tmp_path / "out")
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    after = go(base, data, tmp_path / "out")
    assert after.manifest["training"]["went_on_at_step"] == 7
    assert same(after, unbroken)


@pytest.mark.parametrize("what", ["torch.save", "peftc.tuner.save_file", "os.fsync"])
def test_full_disk_leaves_the_last_checkpoint(
    base: Path, data: Path, unbroken: Artifact, tmp_path: Path, what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        stop_at(7, lambda: patch.setattr(what, full), patch)
        with pytest.raises(ArtifactError, match=r"No space left on device[^$]*from step 4"):
            go(base, data, tmp_path / "out")
    assert [path.name for path in (tmp_path / ".out.peftc-training").glob("checkpoint-*")] == [
        "checkpoint-4"
    ]
    assert same(go(base, data, tmp_path / "out"), unbroken)


def test_kill_before_publication_repeats_no_step(
    base: Path, data: Path, unbroken: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("peftc.artifact.Staging.publish", full)
        with pytest.raises(ArtifactError, match="No space"):
            go(base, data, tmp_path / "out")
        patch.setattr(Tuner, "training_step", None)  # would fail
        patch.undo()
        after = go(base, data, tmp_path / "out")
    assert after.manifest["training"]["went_on_at_step"] == 12
    assert same(after, unbroken)


def test_other_settings_do_not_go_on(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(6, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    with pytest.raises(Interrupted):
        go(base, data, tmp_path / "out")
    more = sums(tmp_path / "more.jsonl", 41)
    for words, job in (
        ("lr was 0.005 and is 0.1", partial(go, base, data, tmp_path / "out", lr=0.1)),
        ("the data is another", partial(go, base, more, tmp_path / "out")),
        (
            "the model is another",
            partial(tune, base, settings(data), tmp_path / "out", [Lora(rank=2)]),
        ),
    ):
        with pytest.raises(TrainingError, match=words):
            job()
    fresh = tune(base, settings(data, lr=0.1), tmp_path / "out", [LORA], restart=True)
    assert fresh.manifest["training"]["went_on_at_step"] is None


def test_two_runs_do_not_share_a_target(base: Path, data: Path, tmp_path: Path) -> None:
    from peftc.runs import working

    with working(tmp_path / "out", claim=True), pytest.raises(ArtifactError, match="another run"):
        go(base, data, tmp_path / "out")


def test_old_checkpoints_go_and_the_best_stays(base: Path, data: Path, tmp_path: Path) -> None:
    held = sums(tmp_path / "held.jsonl", 8)
    seen: list[set[str]] = []

    class Spy(Progress):
        def step(self, done: int, total: int, remark: str) -> None:
            seen.append({path.name for path in tmp_path.glob(".out.*/checkpoint-*")})

    # A rate that soon leads away again.
    how = tuning(
        data, steps=60, lr=0.5, warmup=6, save_steps=4, eval_data=str(held), eval_steps=2,
        patience=3, keep=1,
    )  # fmt: skip
    artifact = tune(base, how, tmp_path / "out", [Lora(rank=4)], progress=Spy())
    figures = artifact.manifest["training"]
    evaluation = figures["evaluation"]
    assert figures["steps"] == evaluation["best_step"] + 6 < 60
    assert evaluation["after"] < evaluation["before"]
    assert f"checkpoint-{evaluation['best_step']}" in seen[-1] and len(seen[-1]) <= 2
    scores = peftc.score([artifact.path], peftc.Evaluation(data=str(held), device="cpu"))
    assert scores[0].loss == pytest.approx(evaluation["after"], abs=1e-5)


def test_loss_that_is_no_number_ends_the_run(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the loss of step 2 is nan"):
        tune(base, tuning(data, lr=1e30, warmup=0, clip=0), tmp_path / "out", [Lora(rank=4)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "paged_adamw_8bit"}, ["paged_adamw_8bit", "GPU", "--optimizer adamw"]),
        ({"optimizer": "lion_8bit", "precision": "fp16"}, ["lion_8bit", "fp16", "bf16"]),
        ({"batch_size": 64}, ["40 rows", "--batch-size 40"]),
        ({"batch_size": 8, "micro_batch": 3}, ["8 rows", "3 rows on each of 1"]),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(
    base: Path, data: Path, tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    refuse(
        tmp_path,
        TrainingError,
        lambda out: tune(base, tuning(data, **options), out, [LORA]),
        *words,
    )


def test_what_cannot_be_trained_is_refused(
    base: Path, data: Path, tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    refuse(tmp_path, TrainingError, lambda out: tune(base, tuning(data), out), "lora --rank 8")
    bert = checkpoint("bert")
    refuse(
        tmp_path,
        TrainingError,
        lambda out: tune(bert, tuning(data), out, [Lora()]),
        "BertForMaskedLM",
    )
    bare = checkpoint("llama")
    refuse(
        tmp_path, TrainingError, lambda out: tune(bare, tuning(data), out, [Lora()]), "tokenizer"
    )


def test_target_that_exists_is_refused_before_training(
    base: Path, data: Path, tmp_path: Path, unbroken: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tuner, "train", None)
    with pytest.raises(ArtifactError, match="exists already"):
        go(base, data, unbroken.path)


def test_missing_library_is_named_with_its_extra(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    job = lambda out: tune(base, tuning(data, plot=True), out, [LORA])  # noqa: E731
    refuse(tmp_path, MissingDependency, job, "matplotlib", "pip install 'peftc[train]'")


def test_curve_is_drawn(base: Path, data: Path, tmp_path: Path) -> None:
    artifact = tune(
        base, tuning(data, plot=True, steps=2, eval_share=0.2), tmp_path / "out", [LORA]
    )
    assert (artifact.path / "training/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "training/loss.png" in artifact.manifest["files"]
