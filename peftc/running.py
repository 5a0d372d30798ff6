"""Running what peftc wrote: which engine runs which directory, and what all engines share.

An engine makes tokens of tokens. Text, the choice of a token by its logits and the figures are the
same for all, so that a seed gives the same text on each that computes the same logits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from peftc.artifact import MANIFEST, Artifact
from peftc.errors import PeftcError, RunError, raise_all
from peftc.text import Text

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and how many.

    Attributes:
        max_new_tokens: At most so many.
        temperature: What logits are divided by; 0 takes the likeliest token.
        top_k: Only the so many likeliest are chosen from; 0 for all.
        top_p: Only the likeliest that together have this probability.
        seed: Of the choice; None for another one every time.
        ends: Whether a token that ends a text ends it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    ends: bool = True

    def choose(self, logits: Array, random: np.random.Generator) -> Array:
        """The next tokens (batch) by their logits (batch, vocabulary).

        Temperature, top k and top p in this order, as transformers' `generate` has them.
        """
        if not self.temperature:
            likeliest: Array = logits.argmax(-1)
            return likeliest
        scores = logits.astype(np.float64) / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = np.partition(scores, -self.top_k)[:, -self.top_k, None]
            scores = np.where(scores < least, -np.inf, scores)
        if self.top_p < 1:
            order = np.argsort(scores, -1, kind="stable")
            ascending = np.take_along_axis(scores, order, -1)
            share = np.exp(ascending - ascending[:, -1:])
            below = share.cumsum(-1) / share.sum(-1, keepdims=True) <= 1 - self.top_p
            below[:, -1] = False
            np.put_along_axis(scores, order, np.where(below, -np.inf, ascending), -1)
        # The largest of log-probabilities and Gumbel noise is drawn as the probabilities are.
        chosen: Array = (scores + random.gumbel(size=scores.shape)).argmax(-1)
        return chosen


class Runner(Protocol):
    """A model that is loaded.

    Attributes:
        engine: What runs it, with its version.
        folder: Where its tokenizer and its configs lie.
    """

    engine: str
    folder: Path

    @classmethod
    def unfit(cls, path: Path) -> PeftcError | None:
        """Why this engine cannot run a directory, as far as can be said without loading it."""

    @classmethod
    def open(cls, path: Path, adapter: str | None) -> Runner:
        """Loads a directory."""

    def generate(self, ids: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Sequence[int]]:
        """Goes on with texts of the same length: step by step the next token of each."""


# What runs an artifact of each kind, the first that can; what is no artifact is a source of `load`,
# as what `apply` wrote is. Another engine is a row in each of the two.
KINDS: Mapping[str, tuple[str, ...]] = {
    "onnx": ("genai", "onnxruntime"),
    "pt2": ("compiled",),
    "model": ("transformers",),
    "apply": ("transformers",),
    "cache": ("transformers",),
    "adapter": ("transformers",),
}
ENGINES: Mapping[str, str] = {
    "genai": "running_onnx:GenAI",
    "onnxruntime": "running_onnx:PlainRuntime",
    "compiled": "running_compiled:Compiled",
    "transformers": "running_live:Live",
}


def open_runner(
    source: str | Path,
    *,
    engine: str | None = None,
    adapter: str | None = None,
    verify: bool = False,
) -> Runner:
    """Loads what peftc wrote, or a checkpoint, so that it can be run.

    Args:
        source: A directory; for transformers whatever `peftc.load` takes.
        engine: One of `ENGINES`; default: the first that runs such a directory.
        adapter: One to switch on: a file or a name that the engine knows.
        verify: Compare the weights' hashes too. All other files' are compared always, of weights
            the sizes.

    Raises:
        ArtifactError: A file is not what was published.
        RunError: No engine runs it, or not this one.
        MissingDependency: The engine is not installed.
    """
    return engine_for(source, engine, verify).open(Path(source), adapter)


def engine_for(source: str | Path, engine: str | None, verify: bool) -> type[Runner]:
    """What runs a directory whose files are what was published; see `open_runner`."""
    path, kind = Path(source), None
    if (path / MANIFEST).is_file():
        artifact = Artifact.open(path)
        raise_all(artifact.damage(weights=verify))
        kind = artifact.manifest["kind"]
    if kind is not None and kind not in KINDS:
        raise RunError(
            f"is of kind {kind}, which is no model by itself",
            where=str(path),
            fix=f"run the model that it belongs to: peftc run MODEL --adapter {path}",
        )
    reasons: list[PeftcError] = []
    for name in (engine,) if engine else KINDS[kind or "apply"]:
        module, _, cls = ENGINES[name].partition(":")
        found: type[Runner] = getattr(import_module(f"peftc.{module}"), cls)
        if (reason := found.unfit(path)) is None:
            return found
        reasons.append(reason)
    raise reasons[-1]


@dataclass
class Figures:
    """What a run took.

    Attributes:
        prompt_tokens: How many tokens were given.
        new_tokens: How many were made.
        load: Seconds until the model was ready.
        first: Seconds from the prompt to the first new token.
        rest: Seconds of all others.
        tokens: The new ones.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    load: float = 0.0
    first: float = 0.0
    rest: float = 0.0
    tokens: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second behind the first."""
        return (self.new_tokens - 1) / self.rest if self.new_tokens > 1 else 0.0


def answer(
    runner: Runner, text: Text, ids: Sequence[int], sampling: Sampling, figures: Figures
) -> Iterator[str]:
    """The text that goes on from a prompt, in pieces as they are made.

    Args:
        runner: Makes the tokens.
        text: Its tokenizer.
        ids: The prompt.
        sampling: How.
        figures: Told of what it takes.

    Raises:
        RunError: The prompt is empty, or leaves no room for an answer.
    """
    if not ids:
        raise RunError("is empty", where="prompt", fix="give at least one token to go on from")
    if text.context is not None and len(ids) >= text.context:
        raise RunError(
            f"has {len(ids)} tokens, and the model takes {text.context} with what it answers",
            where="prompt",
            fix="shorten it",
        )
    room = sampling.max_new_tokens if text.context is None else text.context - len(ids)
    count = min(sampling.max_new_tokens, room)
    figures.prompt_tokens = len(ids)
    began = time.perf_counter()

    def made() -> Iterator[int]:
        limited = Sampling(**{**vars(sampling), "max_new_tokens": count})
        for (token,) in runner.generate([ids], limited):
            now = time.perf_counter() - began
            if not figures.new_tokens:
                figures.first = now
            figures.rest, figures.new_tokens = now - figures.first, figures.new_tokens + 1
            figures.tokens.append(token)
            if sampling.ends and token in text.ends:
                return
            yield token

    yield from text.pieces(made())
