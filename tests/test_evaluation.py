"""Evaluation: losses are transformers', completions are compared, models stand side by side."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peftc
from peftc import Evaluation, Lora, Scores, score, tune
from peftc.errors import DataError, MissingDependency

from .conftest import auto
from .helpers import refuse
from .talker import lines, sums, talker, tuning

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = [("red", "rot"), ("blue", "blau"), ("green as grass", "gruen")]
    records = ({"prompt": f"{a}=", "completion": b} for a, b in pairs)
    return lines(tmp_path_factory.mktemp("data") / "words.jsonl", records)


@pytest.fixture(scope="module")
def tuned(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    how = tuning(data, batch_size=3, steps=60, lr=2e-2, schedule="constant")
    return tune(base, how, out, [Lora(rank=16, alpha=32)]).path


def evaluation(data: Path, **options: Any) -> Evaluation:
    return Evaluation(data=str(data), device="cpu", **options)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_loss_is_that_of_every_learned_token(base: Path, tmp_path: Path, batch: int) -> None:
    texts = ["a", "longer than that", "bc", "x" * 40]
    file = lines(tmp_path / "a.jsonl", ({"text": text} for text in texts))
    model, tokenizer = auto(base), transformers.AutoTokenizer.from_pretrained(base)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= float(scores.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    found = score([base], evaluation(file, batch_size=batch))[0]
    assert (found.examples, found.tokens) == (4, count)
    assert found.loss == pytest.approx(total / count, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bleu is None and found.read_ms > 0 and found.peak_memory > 1e7


def test_before_adapter_and_merged_stand_side_by_side(base: Path, data: Path, tuned: Path) -> None:
    found = score([tuned], evaluation(data, compare=True, generate=3, max_new_tokens=8))
    before, adapter, merged = found
    assert [scores.name for scores in found] == [f"{tuned}, before", f"{tuned}", f"{tuned}, merged"]
    assert before.loss == pytest.approx(score([base], evaluation(data))[0].loss, abs=1e-6)
    assert adapter.loss < before.loss - 0.3  # the tiny model's logits are small
    assert merged.loss == pytest.approx(adapter.loss, rel=1e-4)
    assert adapter.written == merged.written == ["rot", "blau", "gruen"]
    assert adapter.rouge_l == merged.rouge_l == pytest.approx(100)
    assert before.rouge_l is not None and before.rouge_l < 50
    assert adapter.write_ms is not None and adapter.write_ms > 0


def test_exported_merge_keeps_the_gain(data: Path, tuned: Path, tmp_path: Path) -> None:
    peftc.export(tuned, tmp_path / "merged", merge=True)
    adapter, merged = score([tuned, tmp_path / "merged"], evaluation(data))
    assert merged.loss == pytest.approx(adapter.loss, rel=1e-4)


def test_bleu_and_rouge_are_their_libraries(data: Path, base: Path) -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    found: Scores = score([base], evaluation(data, generate=2, max_new_tokens=5, limit=2))[0]
    assert found.examples == 2
    assert found.bleu == corpus_bleu(found.written, [["rot", "blau"]]).score
    scorer = RougeScorer(["rougeL"])
    pairs = zip(["rot", "blau"], found.written, strict=True)
    want = [scorer.score(*pair)["rougeL"].fmeasure for pair in pairs]
    assert found.rouge_l == pytest.approx(50 * sum(want))


def test_completions_of_a_batch_are_those_of_single_prompts(data: Path, tuned: Path) -> None:
    one, many = (
        score([tuned], evaluation(data, generate=3, batch_size=n, max_new_tokens=6))[0]
        for n in (1, 3)
    )
    assert one.written == many.written


def test_text_asks_for_nothing(base: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", [{"text": "abc"}])
    job = lambda _: score([base], evaluation(file, generate=1))  # noqa: E731
    refuse(tmp_path, DataError, job, "asks for nothing", "messages")


def test_missing_library_is_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    file = sums(tmp_path / "a.jsonl", 2)
    job = lambda _: score([base], evaluation(file, generate=1))  # noqa: E731
    refuse(tmp_path, MissingDependency, job, "sacrebleu", "pip install 'peftc[train]'")
