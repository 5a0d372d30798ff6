"""The command `peftc plan`. Nothing here imports torch until it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from peftc.cli_options import Bytes, PassGroup, common
from peftc.terminal import Terminal

PRECISIONS = click.Choice(["bf16", "fp16"])
DTYPES = click.Choice(["float32", "bfloat16", "float16"])


@click.group(cls=PassGroup, chain=True, invoke_without_command=True, subcommand_metavar="[PASS...]")
@click.argument("src")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Examples.")
@click.option("--length", type=click.IntRange(1), help="Tokens of each.  [default: 512]")
@click.option("--data", help="Take the length of the longest example, of a file as for tune.")
@click.option("--dtype", type=DTYPES, help="Of the base's weights; default: the checkpoint's own.")
@click.option("--precision", type=PRECISIONS, help="Mixed precision: what autocast computes in.")
@click.option(
    "--gradient-checkpointing",
    "checkpointing",
    is_flag=True,
    help="Keep no activations within layers.",
)
@click.option("--optimizer", default="adamw", show_default=True, help="As for tune.")
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
    length: int | None,
    data: str | None,
    memory: int | None,
    probe: bool,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> None:
    if length and data:
        raise click.UsageError("Give --length or --data, not both.")
    terminal = Terminal(as_json, quiet)
    from peftc import planning
    from peftc.api import load
    from peftc.capturing import without_files
    from peftc.footprint import Step

    with terminal.progress() as progress:
        program = load(src, progress)
        tokens = planning.longest(program, data) if data else length or 512
        if not (probe or steps):  # whoever names passes may name one that starts from weights
            program = without_files(program)
        step = Step(length=tokens, **how)
        name = " + ".join(title for title, _ in steps) or ", ".join(program.adapters)
        methods = {name: steps} if name else planning.METHODS
        found = planning.plan(program, step, methods, memory, probe, progress)
    planning.show(found, step, memory, terminal)
