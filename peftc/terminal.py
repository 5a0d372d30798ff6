"""What the terminal shows: people's output on stderr, data on stdout, progress with bytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.errors import PeftcError, Violations
from peftc.progress import Progress

if TYPE_CHECKING:
    from peftc.program import Entry

_SHOWN = 5  # sites for each figure that a pass measures


class Terminal:
    """One command's output.

    Args:
        as_json: Data goes to stdout as JSON, and nothing else does.
        quiet: No progress and no remarks.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        from rich.console import Console

        self.as_json, self.quiet = as_json, quiet
        self.err = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.out = Console(highlight=False)

    def say(self, text: str) -> None:
        """A remark for people."""
        self.err.print(text)

    def wrote(self, path: Path) -> None:
        """A directory is finished."""
        from rich.markup import escape

        self.say(f"[green]✓[/] wrote {escape(str(path))}")

    def data(self, value: Mapping[str, Any], human: str | None = None) -> None:
        """The command's result: JSON, or its text for people."""
        if self.as_json:
            print(json.dumps(value, indent=2, default=str))
        elif human is not None:
            self.out.print(human)

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table on stdout, for people."""
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(plain(title)), title_justify="left", header_style="bold", box=SIMPLE
        )
        for i, name in enumerate(head):
            table.add_column(name, overflow="fold", justify="left" if i == 0 else "default")
        for row in rows:
            table.add_row(*(Text(plain(value)) for value in row))
        self.out.print(table)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Shows a job's passes and stages, and a bar with bytes, rate and time left."""
        shown = _Shown(self)
        try:
            yield shown
        finally:
            shown.stop()

    @contextmanager
    def steps(self, total: int) -> Iterator[Callable[[str], None]]:
        """A bar over steps with the time left; yields a function that takes a remark a step."""
        from rich import progress as rich

        with rich.Progress(
            rich.TextColumn("  step"),
            rich.MofNCompleteColumn(),
            rich.BarColumn(),
            rich.TextColumn("{task.description}"),
            rich.TimeRemainingColumn(),
            console=self.err,
            disable=self.quiet,
        ) as bar:
            task = bar.add_task("", total=total)
            yield lambda remark: bar.update(task, advance=1, description=remark)

    def error(self, error: PeftcError) -> None:
        """What is wrong, where, and how to fix it."""
        errors = error.errors if isinstance(error, Violations) else (error,)
        if self.as_json:
            items = [
                {"error": type(e).__name__, "what": e.what, "where": e.where, "fix": e.fix}
                for e in errors
            ]
            print(json.dumps({"errors": items}, indent=2))
        from rich.console import Console
        from rich.markup import escape

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        for e in errors:
            where = f"{escape(plain(e.where))}: " if e.where else ""
            console.print(f"[bold red]error[/]: {where}{escape(plain(e.what))}")
            if e.fix:
                console.print(f"  [bold]fix[/]: {escape(plain(e.fix))}")


def plain(value: Any) -> str:
    """A value without what a terminal would obey: names come from files, and may hold anything."""
    return "".join(c for c in str(value) if c.isprintable() or c == "\n")


class _Shown(Progress):
    """Progress on a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.bar: Any = None

    def passed(self, entry: Entry) -> None:
        change = entry.measured.get("largest_relative_change")
        size = "" if change is None else f", largest relative change {change:.1e}"
        self.terminal.say(f"[green]✓[/] {entry.title}: {entry.sites} sites ({entry.effect}{size})")
        for name, figures in entry.measured.items():
            if isinstance(figures, Mapping):
                self._figures(name.replace("_", " "), figures)

    def _figures(self, name: str, figures: Mapping[str, float]) -> None:
        """A figure of each site: the largest of them, for the journal has them all."""
        largest = sorted(figures.items(), key=lambda item: -item[1])
        for site, figure in largest[:_SHOWN]:
            self.terminal.say(f"  {name}: {figure:.1e} at {site}")
        if len(largest) > _SHOWN:
            left = len(largest) - _SHOWN
            self.terminal.say(f"  {name}: at most {largest[_SHOWN][1]:.1e} at {left} sites more")

    def stage(self, name: str, total: int = 0) -> None:
        self.stop()
        if name == "compare logits":
            hush()
        if not total:
            self.terminal.say(f"[dim]…[/] {name}")
            return
        from rich import progress as rich

        self.bar = rich.Progress(
            rich.TextColumn("[dim]…[/] {task.description}"),
            rich.BarColumn(),
            rich.DownloadColumn(),
            rich.TransferSpeedColumn(),
            rich.TimeRemainingColumn(),
            console=self.terminal.err,
            disable=self.terminal.quiet,
        )
        self.bar.add_task(name, total=total)
        self.bar.start()

    def advance(self, count: int) -> None:
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0], count)

    def step(self, done: int, total: int, remark: str) -> None:
        if self.bar is None:
            from rich import progress as rich

            self.bar = rich.Progress(
                rich.TextColumn("  step"),
                rich.MofNCompleteColumn(),
                rich.BarColumn(),
                rich.TextColumn("{task.description}"),
                rich.TimeRemainingColumn(),
                console=self.terminal.err,
                disable=self.terminal.quiet,
            )
            # What a resumed run did before says nothing of how long the rest will take.
            self.bar.add_task("", total=total, completed=done)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=done, description=remark)

    def stop(self) -> None:
        """Ends the bar, if one is shown."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def hush() -> None:
    """Silences the libraries' own bars and advice, which would break into ours."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
