"""How fast a model reads and writes: tokens a second, until the first token, and memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

import numpy as np

from peftc.errors import RunError
from peftc.memory import peak, reset_peak
from peftc.progress import SILENT, Progress
from peftc.running import Runner, Sampling
from peftc.text import Text


@dataclass(frozen=True)
class Timing:
    """What was measured at one setting: medians of the rounds.

    Attributes:
        batch: Texts at once.
        prompt: Tokens of each that are read.
        new: Tokens of each that are written.
        prefill: Tokens read a second, all texts together.
        decode: Tokens written a second behind the first, all texts together.
        first: Seconds from the prompt to the first token.
        peak_memory: Most bytes of the process, the model's too.
    """

    batch: int
    prompt: int
    new: int
    prefill: float
    decode: float
    first: float
    peak_memory: int


def bench(
    runner: Runner,
    text: Text,
    batches: Sequence[int],
    prompts: Sequence[int],
    news: Sequence[int],
    rounds: int,
    progress: Progress = SILENT,
) -> list[Timing]:
    """Measures every combination of sizes, after one round that does not count.

    Args:
        runner: A model that is loaded.
        text: Its tokenizer, whose ids the random prompts are of.
        batches: Texts at once.
        prompts: Tokens that are read.
        news: Tokens that are written, 2 or more.
        rounds: How often each is measured.
        progress: Told of each combination.

    Raises:
        RunError: Some are longer than the model takes.
    """
    longest = max(prompts) + max(news)
    if text.context is not None and longest > text.context:
        raise RunError(
            f"are {longest} tokens together, and the model takes {text.context}",
            where="--prompt-tokens and --new-tokens",
            fix="give fewer",
        )
    random, found = np.random.default_rng(0), []
    for batch, prompt, new in product(batches, prompts, news):
        progress.stage(f"{batch} texts, {prompt} tokens read, {new} written")
        ids = random.integers(0, text.tokenizer.get_vocab_size(), (batch, prompt)).tolist()
        reset_peak()
        times = [_round(runner, ids, new) for _ in range(rounds + 1)][1:]
        first, rest = (median(column) for column in zip(*times, strict=True))
        found.append(
            Timing(
                batch, prompt, new, batch * prompt / first, batch * (new - 1) / rest, first, peak()
            )
        )
    return found


def _round(runner: Runner, ids: Sequence[Sequence[int]], new: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    began, times = time.perf_counter(), []
    for _ in runner.generate(ids, Sampling(max_new_tokens=new, ends=False)):
        times.append(time.perf_counter())
    return times[0] - began, times[-1] - times[0]
