"""Exports in parts, and dry ones, on the command line. Nothing here imports torch until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from peftc.cli_options import common
from peftc.reports import say_merge, say_proof
from peftc.terminal import Terminal


def run_part(src: str, target: Path, shards: str, terminal: Terminal, options: Any) -> None:
    """Writes a part of an export, and says what comes next."""
    from peftc.parts import export_part

    with terminal.progress() as progress:
        report = export_part(src, target, shards, progress=progress, **options)
    files, size = len(report["files"]), report["bytes"] / 1e9
    terminal.say(f"[green]✓[/] part {shards}: {files} files, {size:.2f} GB")
    terminal.say(f"when all parts are written: peftc finish {target}")
    terminal.data(report)


def run_dry(src: str, target: Path, terminal: Terminal, options: Any) -> None:
    """Says what an export would write."""
    from peftc.rehearsal import dry_run

    with terminal.progress() as progress:
        report = dry_run(src, target, progress=progress, **options)
    say_merge(terminal, report.get("merge"))
    computed, free = report["computed"], report["free"] / 1e9
    terminal.say(
        f"[green]✓[/] would write {report['files']} files, {report['bytes'] / 1e9:.2f} GB, to "
        f"{target}, where {free:.2f} GB are free"
    )
    terminal.say(
        f"  {computed['tensors']} of {report['tensors']} tensors computed "
        f"({computed['bytes'] / 1e9:.2f} GB), the others copied; nothing was written"
    )
    terminal.data(report)
    if not report["fits"]:
        terminal.say("[red]✗[/] it does not fit: make room, or write to another disk")
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(1), help="Threads; default: one per core.")
@common
def finish(target: Path, workers: int | None, as_json: bool, quiet: bool) -> None:
    """Publish OUT, whose parts `peftc export … -o OUT --shards 1/N` wrote, with the proof."""
    terminal = Terminal(as_json, quiet)
    from peftc.parts import finish as run

    with terminal.progress() as progress:
        artifact = run(target, workers=workers, progress=progress)
    say_proof(terminal, artifact.manifest.get("proof", {}))
    terminal.wrote(target)
    terminal.data({"path": str(target), **artifact.manifest})
