"""Prompts in live models: PEFT's logits, losses and tokens, and what it cannot do."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from peftc import (
    PromptTuning,
    materialize,
    to_peft,
)
from peftc.errors import PassError

from .conftest import MakeCheckpoint, auto, distance
from .prompting import (
    DECODERS,
    MODELS,
    PADDINGS,
    MakeModel,
    N,
    attached,
    batch,
    checkpoint_of,
    generated,
    injected,
    labelled,
    prompted,
    task,
)


@pytest.fixture(scope="session")
def model(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Makes, once for each name, a tiny random checkpoint."""
    folder = tmp_path_factory.mktemp
    return lambda name: checkpoint_of(name, folder) if name in MODELS else checkpoint(name)


@pytest.fixture
def llama(model: MakeModel) -> Path:
    return model("llama")


@pytest.fixture
def ours(llama: Path) -> Any:
    return materialize(injected(llama, PromptTuning(virtual_tokens=N)))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", [*DECODERS, *MODELS])
def test_output_and_loss_equal_pefts(
    name: str, padding: str, model: MakeModel, tmp_path: Path
) -> None:
    base = model(name)
    theirs = prompted(base, tmp_path, task(name))
    ours = materialize(attached(base, tmp_path))
    inputs = labelled(name, batch(padding))
    with torch.no_grad():
        want, got = theirs(**inputs), ours(**inputs)
    key = "start_logits" if name == "answers" else "logits"
    assert got[key].shape == want[key].shape
    assert distance(got[key], want[key]) <= 1e-6
    assert want.loss is None or abs(got.loss - want.loss) <= 1e-6 * want.loss


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", [*DECODERS, "gemma2", "t5", "bart"])
def test_generated_tokens_equal_pefts(
    name: str, padding: str, model: MakeModel, tmp_path: Path
) -> None:
    base = model(name)
    theirs = prompted(base, tmp_path, task(name))
    ours = materialize(attached(base, tmp_path))
    inputs = batch(padding)
    for options in ({}, {"num_beams": 2}, {"repetition_penalty": 1.4}):
        want = generated(theirs, inputs, **options)
        got = generated(ours, inputs, **options)
        assert torch.equal(got, want), options
        still = generated(ours, inputs, cache_implementation="static", **options)
        assert torch.equal(still, want), options
        assert torch.equal(generated(ours, inputs, use_cache=False, **options), want), options


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta", "bart"])
def test_text_is_refused_when_it_leaves_no_positions(name: str, model: MakeModel) -> None:
    live: Any = materialize(injected(model(name), PromptTuning(virtual_tokens=N)))
    room = (62 if name == "roberta" else 64) - N  # two of RoBERTa's positions are no token's
    ids = torch.full((1, room + 1), 3)
    more = {"decoder_input_ids": ids[:, :2]} if name == "bart" else {}
    assert live(input_ids=ids[:, 1:], **more)[0].isfinite().all()
    jobs: list[Any] = [lambda: live(input_ids=ids, **more)]
    if name in ("gpt2", "opt"):
        jobs.append(lambda: generated(live, {"input_ids": ids[:, 2:]}, eos_token_id=None))
    for job in jobs:
        with pytest.raises(PassError, match=f"{room + 1} tokens and 5 virtual ones are more than"):
            job()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_decoder_is_never_given_virtual_tokens(name: str, model: MakeModel) -> None:
    live: Any = materialize(injected(model(name), PromptTuning(virtual_tokens=N)))
    for more in ({}, {"labels": torch.tensor([0, 1])}):
        with pytest.raises(PassError, match="pass decoder_input_ids"):
            live(**batch(), **more)
    assert live(**batch(), decoder_input_ids=batch()["input_ids"]).logits.shape == (2, 9, 97)


def test_lengths_mean_what_the_caller_means(ours: Any) -> None:
    inputs = batch()
    assert generated(ours, inputs, max_new_tokens=3).shape[1] == 9 + 3
    assert generated(ours, inputs, max_new_tokens=None, max_length=14).shape[1] == 14
    sampled = generated(ours, inputs, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (6, 9 + 7)
    assert int(sampled.max()) < 97
    assert torch.equal(sampled[::3, :9], inputs["input_ids"])


@pytest.mark.parametrize("rule", ["peft", "mask"])
def test_decoding_by_hand_equals_generate(rule: Any, llama: Path) -> None:
    live: Any = materialize(injected(llama, PromptTuning(virtual_tokens=N, positions=rule)))
    inputs = batch("left")
    ids, mask, past = inputs["input_ids"], inputs["attention_mask"], None
    step = ids
    with torch.no_grad():
        for _ in range(4):
            out = live(input_ids=step, attention_mask=mask, past_key_values=past, use_cache=True)
            past, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, step], 1), torch.cat([mask, mask[:, -1:]], 1)
    assert torch.equal(ids, generated(live, inputs, max_new_tokens=4))


def test_pads_change_nothing_when_positions_go_by_the_mask(model: MakeModel) -> None:
    live: Any = materialize(
        injected(model("gpt2"), PromptTuning(virtual_tokens=N, positions="mask"))
    )
    inputs = batch("left")
    with torch.no_grad():
        padded = live(**inputs).logits[0, N + 4 :]
        alone = live(input_ids=inputs["input_ids"][:1, 4:]).logits[0, N:]
    assert distance(padded, alone) <= 1e-6


def test_positions_by_the_mask_survive_their_directory(llama: Path, tmp_path: Path) -> None:
    program = injected(llama, PromptTuning(virtual_tokens=N, positions="mask"))
    to_peft(program, tmp_path / "out")
    again = attached(llama, tmp_path / "out")
    with torch.no_grad():
        want, got = (materialize(p)(**batch("left")).logits for p in (program, again))
    assert torch.equal(want, got)


def test_own_positions_are_moved_behind_the_prompt(ours: Any) -> None:
    ids = batch()["input_ids"]
    with torch.no_grad():
        told = ours(input_ids=ids, position_ids=torch.arange(9).expand(2, -1)).logits
        assert torch.equal(told, ours(input_ids=ids).logits)


def test_live_model_survives_what_models_are_put_through(ours: Any, llama: Path) -> None:
    inputs = batch("left")
    with torch.no_grad():
        want = ours(**inputs).logits
        for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert torch.equal(other(**inputs).logits, want)
            assert torch.equal(generated(other, inputs), generated(ours, inputs))
        assert torch.equal(ours(inputs["input_ids"], inputs["attention_mask"]).logits, want)
        compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
        assert distance(compiled(**inputs).logits, want) <= 1e-6
    plain = auto(llama)
    assert inspect.signature(ours.forward) == inspect.signature(plain.forward)
    assert type(ours).__name__ == type(plain).__name__ and isinstance(ours, type(plain))


def test_trainer_trains_a_prompt(ours: Any, tmp_path: Path) -> None:
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in batch()["input_ids"]]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no",
        gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(ours, arguments, train_dataset=rows).train()
    moved = [n for n, p in ours.named_parameters() if not torch.equal(p, before[n])]
    assert moved == ["model.embed_tokens.prompt_encoder.default.embedding.weight"]


def test_prompt_is_rounded_to_the_embeddings_dtype(llama: Path, tmp_path: Path) -> None:
    prompted(llama, tmp_path)
    ours = materialize(attached(llama, tmp_path), dtype=torch.bfloat16)
    theirs = peft.PeftModel.from_pretrained(auto(llama, torch.bfloat16), tmp_path)
    with torch.no_grad():
        assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)


def test_own_labels_of_token_classes_are_ignored_at_the_prompt(
    model: MakeModel, tmp_path: Path
) -> None:
    theirs = prompted(model("tokens"), tmp_path, "TOKEN_CLS")
    ours: Any = materialize(attached(model("tokens"), tmp_path))
    inputs = {**batch(), "labels": batch()["input_ids"] % 2}
    with pytest.raises(ValueError):  # in PEFT the labels are too few
        theirs(**inputs)
    out = ours(**inputs)
    want = nn.functional.cross_entropy(out.logits[:, N:].flatten(0, 1), inputs["labels"].flatten())
    assert torch.allclose(out.loss, want)
