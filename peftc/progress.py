"""What long jobs report while they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftc.program import Entry


class Progress:
    """Told of every pass, stage and byte; this one says nothing. Subclass it to show them."""

    def passed(self, entry: Entry) -> None:
        """A pass has run and was checked."""

    def stage(self, name: str, total: int = 0) -> None:
        """A stage begins that will write or read `total` bytes, where that is known."""

    def advance(self, count: int) -> None:
        """So many bytes more are done; called from any thread."""

    def step(self, done: int, total: int, remark: str) -> None:
        """So many steps of a training are done, of so many."""


SILENT = Progress()
