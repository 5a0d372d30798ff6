"""Runs commands in forked children, which have torch imported already, and does them harm."""

from __future__ import annotations

import fcntl
import io
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

WATCHED = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}
NEEDED = (
    "peftc.cli", "peftc.parts", "peftc.training", "peftc.exporters.to_onnx",
    "peftc.exporters.to_onnx_adapter", "peftc.exporters.to_cache", "peftc.exporters.to_inductor",
    "transformers.models.llama.modeling_llama", "onnxruntime", "accelerate", "datasets",
    "matplotlib.pyplot",
)  # fmt: skip
Harm = Callable[[], object]


def warm_up() -> None:
    """Imports what every command needs; nothing is computed, for threads survive no fork."""
    for name in NEEDED:
        import_module(name)


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: Its exit code; negative: the signal that killed it.
        said: All that it printed.
        seconds: Of the processor; known, as the next, only of one that was not killed.
        operations: How often it opened, renamed, made or removed a file in the target's folder.
    """

    code: int
    said: str
    seconds: float
    operations: int


class Child:
    """A process that does a piece of work.

    Args:
        work: Returns its exit code.
        folder: What is done in it is counted.
        at: The number of an operation in the folder at which it is killed.
    """

    def __init__(self, work: Callable[[], int], folder: Path, at: int | None = None) -> None:
        # A pipe, for it has no size that a limit would be for.
        self._said, said = os.pipe()
        self._counted, counted = os.pipe()
        fcntl.fcntl(said, fcntl.F_SETPIPE_SZ, 1 << 20)
        self.pid = os.fork()
        if not self.pid:
            code = 99
            try:
                os.setsid()
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the command listens
                _speak(said)
                count = _count(str(folder), at)
                code = work()
                os.write(counted, f"{time.process_time()} {count()}".encode())
            finally:
                os._exit(code)
        os.close(said)
        os.close(counted)

    def signal(self, number: int, after: float = 0.0) -> None:
        """Sends a signal to it and its own children, unless it has ended.

        Args:
            number: The signal.
            after: Seconds of the processor that it may have before; a busy machine changes them
                less than those of a clock.
        """
        clock = ~self.pid << 3 | 2  # as clock_getcpuclockid has it
        with suppress(OSError):
            while time.clock_gettime(clock) < after and not self._ended():
                time.sleep(0.0005)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> Ended:
        """Waits for its end, and ends what it left behind."""
        _, status = os.waitpid(self.pid, 0)
        self.signal(signal.SIGKILL)
        said, counted = (_all(handle) for handle in (self._said, self._counted))
        seconds, operations = counted.split() or (0, 0)
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, said, float(seconds), int(operations))


def commands(calls: Sequence[Sequence[str]], harm: Harm = lambda: None, threads: int = 1) -> int:
    """Runs commands of peftc one after the other, up to the first that fails; its exit code."""
    import torch

    from peftc.__main__ import main

    torch.set_num_threads(threads)
    harm()
    for given in calls:
        sys.argv = ["peftc", *given]
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                return int(stop.code)
    return 0


def files_up_to(size: int) -> Harm:
    """A disk on which no file grows beyond a size."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _speak(said: int) -> None:
    for standard in (1, 2):
        os.dup2(said, standard)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)


def _all(handle: int) -> str:
    """What is in a pipe; processes that have it open still may be there."""
    os.set_blocking(handle, False)
    found = b""
    with suppress(BlockingIOError):
        while piece := os.read(handle, 1 << 16):
            found += piece
    os.close(handle)
    return found.decode(errors="replace")


def _count(folder: str, at: int | None) -> Callable[[], int]:
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
