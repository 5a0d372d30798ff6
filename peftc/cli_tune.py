"""The commands that train and evaluate. Nothing here imports torch until one runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peftc.cli_options import PassGroup, common, given, needed, output, parameters
from peftc.terminal import Terminal, hush

if TYPE_CHECKING:
    from pydantic import BaseModel

    from peftc.evaluation import Scores


class _Settings(click.Command):
    """A command that has an option for each field of its settings, made when they are asked for."""

    settings: str  # a class in peftc.tuning

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The fields of the settings behind the command's own options."""
        cls: type[BaseModel] = getattr(import_module("peftc.tuning"), self.settings)
        return [*self.params, *parameters(cls), *super().get_params(ctx)[len(self.params) :]]


class _TuneGroup(_Settings, PassGroup):
    settings = "Tuning"


class _EvalCommand(_Settings):
    settings = "Evaluation"


@click.group(
    cls=_TuneGroup, chain=True, invoke_without_command=True, subcommand_metavar="[PASS...]"
)
@click.argument("src")
@output
@click.option(
    "--recipe", type=click.Path(path_type=Path, dir_okay=False),
    help="Take passes, and these options under tune:, from a file.",
)  # fmt: skip
@click.option("--restart", is_flag=True, help="Throw away what an unfinished run left.")
@common
def tune(**_: Any) -> None:
    """Train the adapters that SRC carries, or that passes give it, on a data file.

    \b
      peftc tune APPLIED --data chats.jsonl -o OUT
      peftc tune BASE --data pairs.csv -o OUT nf4 lora --rank 16
      accelerate launch --num_processes 4 -m peftc tune …

    OUT is what `apply` writes, with what was trained: adapter/, which PEFT loads, training/ with
    the losses, and peftc.json. A run that was stopped or killed goes on by the same command.
    """  # noqa: D301


@tune.result_callback()
def _tune(
    steps_of_passes: list[tuple[str, Mapping[str, Any]]],
    src: str,
    target: Path | None,
    overwrite: bool,
    recipe: Path | None,
    restart: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    from peftc.recipe import Recipe, build, settings
    from peftc.tuning import Tuning

    target, chosen, passes = needed(target), given(options), []
    if recipe is not None:
        if steps_of_passes:
            raise click.UsageError("Give passes or --recipe, not both.")
        loaded = Recipe.load(recipe)
        passes, chosen = loaded.build(str(recipe)), {**(loaded.tune or {}), **chosen}
    elif steps_of_passes:
        passes = build(steps_of_passes, "peftc tune")
    if "data" not in chosen:
        raise click.UsageError("Missing option '--data'.")
    tuning = settings(Tuning, chosen, "peftc tune", "peftc tune")
    # Of several processes one speaks.
    first = os.environ.get("RANK", "0") == "0"
    terminal = Terminal(as_json and first, quiet or not first)
    from peftc.training import summary
    from peftc.training import tune as run

    hush()
    with terminal.progress() as progress:
        artifact = run(
            src, tuning, target, passes, overwrite=overwrite, restart=restart, progress=progress
        )
    if not first:
        return
    figures = artifact.manifest["training"]
    terminal.say(f"[green]✓[/] {summary(figures)}")
    if left := {k: figures[k] for k in ("truncated", "skipped") if k in figures}:
        counts = ", ".join(f"{count} {name}" for name, count in left.items())
        terminal.say(f"[yellow]![/] examples: {counts}")
    terminal.wrote(target)
    terminal.data({"path": str(target), **artifact.manifest})


@click.command("eval", cls=_EvalCommand)
@click.argument("src", nargs=-1, required=True)
@common
def evaluate(src: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Evaluate one or more SRC on a data file, side by side: loss, perplexity, and what is written.

    \b
      peftc eval BASE OUT MERGED --data held.jsonl --generate 50
      peftc eval OUT --compare --data held.jsonl         before, the adapter, merged
    """  # noqa: D301
    from peftc.recipe import settings
    from peftc.tuning import Evaluation

    chosen = given(options)
    if "data" not in chosen:
        raise click.UsageError("Missing option '--data'.")
    evaluation = settings(Evaluation, chosen, "peftc eval", "peftc eval")
    terminal = Terminal(as_json, quiet)
    from peftc.evaluation import score

    hush()
    with terminal.progress() as progress:
        found = score(src, evaluation, progress)
    terminal.data({"data": evaluation.data, "scores": [vars(scores) for scores in found]})
    if not as_json:
        _show(found, terminal)


def _show(found: list[Scores], terminal: Terminal) -> None:
    head = ["model", "loss", "perplexity", "BLEU", "ROUGE-L", "ms per token", "peak memory"]
    last = [scores.name.rpartition("/")[2] for scores in found]
    names = last if len(set(last)) == len({scores.name for scores in found}) else None
    rows = [
        (
            name, f"{scores.loss:.4f}", f"{scores.perplexity:.3f}",
            "" if scores.bleu is None else f"{scores.bleu:.2f}",
            "" if scores.rouge_l is None else f"{scores.rouge_l:.2f}",
            f"{scores.read_ms:.2f} read"
            + ("" if scores.write_ms is None else f", {scores.write_ms:.1f} written"),
            f"{scores.peak_memory / 1e6:,.0f} MB",
        )
        for name, scores in zip(names or [s.name for s in found], found, strict=True)
    ]  # fmt: skip
    title = f"{found[0].examples} examples, {found[0].tokens} learned tokens"
    terminal.table(title, head, rows)
