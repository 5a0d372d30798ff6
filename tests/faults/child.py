"""Runs commands in forked children, which have torch imported already, and does them harm."""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WATCHED = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}
Harm = Callable[[], object]


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: Its exit code; negative: the signal that killed it.
        said: All that it printed.
        seconds: How long it ran.
        operations: How often it opened, renamed, made or removed a file in the target's folder;
            known only of one that was not killed.
    """

    code: int
    said: str
    seconds: float
    operations: int


class Child:
    """A process that runs commands of peftc.

    Args:
        calls: The arguments of each; the first that fails is the last.
        folder: Of the target. What is done in it is counted.
        harm: Is called in the child at its beginning.
        at: The number of an operation in the folder at which it is killed.
        threads: Of torch.
    """

    def __init__(
        self,
        calls: Sequence[Sequence[str]],
        folder: Path,
        harm: Harm = lambda: None,
        at: int | None = None,
        threads: int = 1,
    ) -> None:
        self._said = folder.parent / f"{folder.name}.said"
        self._count = folder.parent / f"{folder.name}.count"
        self._count.write_text("0")
        self._began = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            code = 99
            try:
                self._redirect()
                count = _counted(str(folder), at)
                code = _commands(calls, harm, threads)
                resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
                self._count.write_text(str(count()))
            finally:
                os._exit(code)

    def signal(self, number: int) -> None:
        """Sends a signal to it and its own children, unless it has ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self) -> Ended:
        """Waits for its end, and ends what it left behind."""
        _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self._began
        self.signal(signal.SIGKILL)
        said = self._said.read_text(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, said, seconds, int(self._count.read_text() or 0))

    def _redirect(self) -> None:
        handle = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        for standard in (1, 2):
            os.dup2(handle, standard)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)


def _commands(calls: Sequence[Sequence[str]], harm: Harm, threads: int) -> int:
    import torch

    from peftc.__main__ import main

    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    harm()
    for given in calls:
        sys.argv = ["peftc", *given]
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                return int(stop.code)
    return 0


def _counted(folder: str, at: int | None) -> Callable[[], int]:
    """Counts file operations below a folder from now on, and dies at the one that is named."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in WATCHED or folder not in f"{args[0]} {args[1]}":
            return
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count
