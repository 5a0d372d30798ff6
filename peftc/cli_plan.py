"""The command `peftc plan`. Nothing here imports torch until it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from peftc.cli_options import Bytes, PassGroup, common
from peftc.terminal import Terminal

DTYPES = click.Choice(["float32", "bfloat16", "float16"])


@click.group(cls=PassGroup, chain=True, invoke_without_command=True, subcommand_metavar="[PASS...]")
@click.argument("src")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Examples.")
@click.option("--length", type=click.IntRange(1), default=512, show_default=True, help="Tokens.")
@click.option("--dtype", type=DTYPES, help="Of the base's weights; default: the checkpoint's own.")
@click.option("--mixed", type=DTYPES, help="What autocast computes in.")
@click.option("--checkpointing", is_flag=True, help="Compute activations again for gradients.")
@click.option("--optimizer", default="adamw", show_default=True, help="adamw, adamw_8bit, sgd …")
@click.option("--memory", type=Bytes(), help="What there is, such as 24GB: say what fits, and why.")
@click.option("--probe", is_flag=True, help="Take a few steps for their time; needs the memory.")
@common
def plan(**_: Any) -> None:
    """Show what training SRC takes in memory, before anything runs.

    Nothing is trained, and no weight is read. Without passes, several methods are compared:

    \b
      peftc plan BASE --batch 4 --length 1024 --memory 24GB     which methods fit, and why
      peftc plan BASE --batch 4 nf4 lora --rank 64              what one takes
    """  # noqa: D301


@plan.result_callback()
def _plan(
    steps: list[tuple[str, Mapping[str, Any]]],
    src: str,
    memory: int | None,
    probe: bool,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> None:
    terminal = Terminal(as_json, quiet)
    from peftc import planning
    from peftc.api import load
    from peftc.footprint import Step

    step = Step(**how)
    with terminal.progress() as progress:
        program = load(src, progress)
        name = " + ".join(title for title, _ in steps) or ", ".join(program.adapters)
        methods = {name: steps} if name else planning.METHODS
        found = planning.plan(program, step, methods, memory, probe, progress)
    planning.show(found, step, memory, terminal)
