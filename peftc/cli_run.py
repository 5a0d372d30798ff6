"""The commands that run a model. Nothing here imports torch; what runs ONNX never does."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftc.cli_options import common
from peftc.terminal import Terminal, hush

if TYPE_CHECKING:
    from peftc.running import Runner
    from peftc.text import Text

ENGINE = click.option(
    "--engine",
    type=click.Choice(["genai", "onnxruntime", "compiled", "transformers"]),
    help="What runs it; default: by what SRC is.",
)
ADAPTER = click.option("--adapter", metavar="FILE|NAME", help="Switch an adapter on.")
VERIFY = click.option(
    "--verify", is_flag=True, help="Compare the hashes of the weights too, not only their sizes."
)


@click.command()
@click.argument("src")
@click.option("--prompt", help="What to go on from; default: stdin.")
@click.option("--chat", is_flag=True, help="Ask it as a user does, by the model's chat template.")
@click.option("--system", metavar="TEXT", help="The system's message before it, with --chat.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="At most."
)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True,
    help="0 takes the likeliest token.",
)  # fmt: skip
@click.option(
    "--top-k", type=click.IntRange(0), default=0, show_default=True,
    help="Choose from so many likeliest tokens; 0: from all.",
)  # fmt: skip
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    help="Choose from the likeliest tokens that together have this probability.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), help="Of the choice.")
@ADAPTER
@ENGINE
@VERIFY
@common
def run(
    src: str,
    prompt: str | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    adapter: str | None,
    engine: str | None,
    verify: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Generate text with what `export`, `apply` or `tune` wrote, or with a checkpoint.

    \b
      peftc run OUT --prompt "The capital of France is"
      echo "Who are you?" | peftc run OUT --chat --temperature 0.7

    The text goes to stdout as it is made, and how fast to stderr.
    """  # noqa: D301
    if system is not None and not chat:
        raise click.UsageError("--system is a part of a conversation: add --chat.")
    if not temperature and (top_k or top_p < 1 or seed is not None):
        raise click.UsageError("--top-k, --top-p and --seed need a --temperature above 0.")
    terminal = Terminal(as_json, quiet)
    from peftc.running import Figures, Sampling, answer

    given = sys.stdin.read() if prompt is None else prompt
    runner, text, took = _opened(src, engine, adapter, verify)
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        ids = text.chat([*messages, {"role": "user", "content": given}])
    else:
        ids = text.encode(given)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    figures, written = Figures(load=took), ""
    for piece in answer(runner, text, ids, sampling, figures):
        written += piece
        if not as_json:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    if not as_json:
        click.echo()
    terminal.say(
        f"[dim]{runner.engine}: loaded in {figures.load:.1f} s; {figures.prompt_tokens} tokens "
        f"read, the first after {figures.first:.2f} s; {figures.new_tokens} written, "
        f"{figures.rate:.1f} tokens/s[/]"
    )
    terminal.data(
        {
            "engine": runner.engine, "text": written, "tokens": figures.tokens,
            "prompt_tokens": figures.prompt_tokens, "new_tokens": figures.new_tokens,
            "load_s": figures.load, "first_token_s": figures.first,
            "tokens_per_s": figures.rate,
        }
    )  # fmt: skip


@click.command()
@click.argument("src")
@click.option(
    "--batch", "batches", type=click.IntRange(1), multiple=True, default=[1], show_default=True,
    help="Texts at once; may be given several times.",
)  # fmt: skip
@click.option(
    "--prompt-tokens", "prompts", type=click.IntRange(1), multiple=True, default=[128],
    show_default=True, help="Tokens that are read; likewise.",
)  # fmt: skip
@click.option(
    "--new-tokens", "news", type=click.IntRange(2), multiple=True, default=[64],
    show_default=True, help="Tokens that are written; likewise.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Measured.")
@ADAPTER
@ENGINE
@VERIFY
@common
def bench(
    src: str,
    batches: tuple[int, ...],
    prompts: tuple[int, ...],
    news: tuple[int, ...],
    rounds: int,
    adapter: str | None,
    engine: str | None,
    verify: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how fast SRC reads and writes: tokens a second, and the memory that it takes.

    \b
      peftc bench OUT --batch 1 --batch 4 --prompt-tokens 128 --new-tokens 64

    Greedy, on random tokens; medians of the rounds, after one that does not count.
    """  # noqa: D301
    terminal = Terminal(as_json, quiet)
    from peftc.timing import bench as measure

    runner, text, took = _opened(src, engine, adapter, verify)
    with terminal.progress() as progress:
        found = measure(runner, text, batches, prompts, news, rounds, progress)
    terminal.data({"engine": runner.engine, "load_s": took, "timings": [vars(t) for t in found]})
    if as_json:
        return
    head = ["batch", "read", "written", "read, tokens/s", "written, tokens/s", "first token",
            "peak memory"]  # fmt: skip
    rows = [
        (t.batch, t.prompt, t.new, f"{t.prefill:,.0f}", f"{t.decode:.1f}",
         f"{1e3 * t.first:,.0f} ms", f"{t.peak_memory / 1e6:,.0f} MB")
        for t in found
    ]  # fmt: skip
    terminal.table(f"{runner.engine}, loaded in {took:.1f} s", head, rows)


def _opened(
    src: str, engine: str | None, adapter: str | None, verify: bool
) -> tuple[Runner, Text, float]:
    """A runner, its text, and the seconds that it took to load."""
    from peftc.running import engine_for
    from peftc.text import Text

    began = time.perf_counter()
    cls = engine_for(src, engine, verify)
    if "transformers" in sys.modules:  # of the engines one imports it
        hush()
    runner = cls.open(Path(src), adapter)
    return runner, Text(runner.folder), time.perf_counter() - began
