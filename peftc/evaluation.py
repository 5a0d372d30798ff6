"""Evaluation: how well models know examples, and write what is asked, side by side."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc.api import load
from peftc.capturing import capture
from peftc.errors import DataError, raise_all
from peftc.examples import asked, read_examples
from peftc.extras import lacking
from peftc.live import materialize
from peftc.memory import peak, reset_peak
from peftc.passes.merge import Merge
from peftc.pipeline import Pipeline
from peftc.program import Program
from peftc.progress import SILENT, Progress
from peftc.scoring import perplexity, token_loss
from peftc.sources import limit_of, pad_of, tokenizer_of
from peftc.token_rows import collate, token_rows
from peftc.tuning import Evaluation


@dataclass(frozen=True)
class Scores:
    """What was measured of one model.

    Attributes:
        name: The source.
        examples: How many it was evaluated on.
        tokens: How many tokens of them count.
        loss: Cross-entropy per such token, in nats.
        perplexity: e to the loss.
        bleu: sacrebleu's corpus BLEU of the written completions, 0 to 100.
        rouge_l: The mean F-measure of ROUGE-L of them, 0 to 100.
        read_ms: Milliseconds per token, padding left out, of the loss's forward passes.
        write_ms: Milliseconds per token written.
        peak_memory: Most bytes meanwhile: of tensors on a GPU, of the process on a CPU.
        written: The completions.
    """

    name: str
    examples: int
    tokens: int
    loss: float
    perplexity: float
    bleu: float | None
    rouge_l: float | None
    read_ms: float
    write_ms: float | None
    peak_memory: int
    written: list[str]


def score(
    sources: Sequence[str | Path], evaluation: Evaluation, progress: Progress = SILENT
) -> list[Scores]:
    """Evaluates models on the same examples.

    Args:
        sources: Each is what `load` takes: a checkpoint, an adapter, or what `apply` or `tune`
            wrote. Its own tokenizer reads the examples.
        evaluation: The data and what is measured.
        progress: Told of each model.

    Returns:
        One for each source, in their order; with `compare` before it one of its base, and behind
        it one of its merge.

    Raises:
        MissingDependency: Generation is compared by sacrebleu and rouge-score.
        DataError: The examples cannot be read, or ask for nothing where completions are wanted.
        FoldError: With `compare`: an adapter cannot be merged.
    """
    needed = ["sacrebleu", "rouge_score"] if evaluation.generate else []
    raise_all(lacking("--generate", "train", *needed))
    found = []
    for name, program in _models(sources, evaluation):
        progress.stage(f"evaluate {name}")
        found.append(_score(name, program, evaluation))
        gc.collect()  # before the next one is loaded
    return found


def _models(sources: Sequence[str | Path], evaluation: Evaluation) -> Iterator[tuple[str, Program]]:
    for source in sources:
        program = load(source)
        carries = bool(program.adapters) and evaluation.compare
        if carries:
            base: Any = program.source
            yield f"{source}, before", capture(base.checkpoint.path)
        yield str(source), program
        if carries:
            yield f"{source}, merged", Pipeline([Merge()]).run(program)


def _score(name: str, program: Program, evaluation: Evaluation) -> Scores:
    tokenizer = tokenizer_of(program)
    examples = read_examples(evaluation, evaluation.data, tokenizer)[: evaluation.limit]
    rows = token_rows(examples, evaluation, tokenizer, limit_of(program, tokenizer))
    pad = pad_of(tokenizer)
    gpu = evaluation.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    reset_peak()
    dtype = None if evaluation.dtype == "auto" else getattr(torch, evaluation.dtype)
    model = materialize(program, device, dtype)
    began = time.perf_counter()
    total, count = token_loss(model, rows, evaluation.batch_size, partial(collate, pad=pad), device)
    read = time.perf_counter() - began
    written: list[str] = []
    wanted, write_ms = list[str](), None
    if evaluation.generate:
        questions = [pair for example in examples if (pair := asked(example))]
        if not questions:
            raise DataError(
                "asks for nothing that could be written", where=evaluation.data,
                fix="give it the columns prompt and completion, or messages",
            )  # fmt: skip
        began = time.perf_counter()
        chosen = questions[: evaluation.generate]
        whole = examples[0].whole
        written, number = _write(model, tokenizer, chosen, whole, evaluation, pad, device)
        write_ms = 1e3 * (time.perf_counter() - began) / max(1, number)
        wanted = [_plain(tokenizer, answer) for _, answer in chosen]
    return Scores(
        name=name,
        examples=len(rows),
        tokens=count,
        loss=total / count,
        perplexity=perplexity(total / count),
        bleu=_bleu(written, wanted) if written else None,
        rouge_l=_rouge(written, wanted) if written else None,
        read_ms=1e3 * read / len(rows.ids),
        write_ms=write_ms,
        peak_memory=peak(device),
        written=written,
    )


def _write(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[tuple[str, str]],
    whole: bool,
    evaluation: Evaluation,
    pad: int,
    device: torch.device,
) -> tuple[list[str], int]:
    """The greedy completions, and how many tokens they have."""
    generator: Any = model.eval()
    written, count = [], 0
    for low in range(0, len(questions), evaluation.batch_size):
        prompts = [prompt for prompt, _ in questions[low : low + evaluation.batch_size]]
        ids = tokenizer(prompts, add_special_tokens=not whole)["input_ids"]
        longest = max(map(len, ids))
        batch = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
        mask = torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device
        )
        with torch.no_grad():
            output = generator.generate(
                input_ids=batch, attention_mask=mask, do_sample=False, pad_token_id=pad,
                max_new_tokens=evaluation.max_new_tokens,
            )  # fmt: skip
        for row in output[:, longest:].tolist():
            count += sum(token != pad for token in row)  # padding stands behind the end
            written.append(tokenizer.decode(row, skip_special_tokens=True).strip())
    return written, count


def _plain(tokenizer: Any, text: str) -> str:
    """A reference without the template's tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    plain: str = tokenizer.decode(ids, skip_special_tokens=True)
    return plain.strip()


def _bleu(written: list[str], wanted: list[str]) -> float:
    import sacrebleu

    return float(sacrebleu.corpus_bleu(written, [wanted]).score)


def _rouge(written: list[str], wanted: list[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(wanted, written, strict=True)]
    return float(100 * sum(scores) / len(scores))
