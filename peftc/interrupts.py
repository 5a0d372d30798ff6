"""Ctrl-C and SIGTERM: a command ends by them in one line, whatever library was at work."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_AGAIN = 0.02  # seconds after which what a library swallowed is raised once more


class Terminated(KeyboardInterrupt):
    """SIGTERM: an interrupt by a scheduler, not by a person who wants none of it.

    What is sealed stays where it is, for the same command to go on from.
    """


class _Signals:
    """The signals of this process: which one came, and whether it has to wait."""

    def __init__(self) -> None:
        self.came: int | None = None
        self.held = 0
        self.waiting = False

    def take(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            self.came = number
        if self.held:
            self.waiting = True
        else:
            self.throw()

    def throw(self) -> None:
        self.waiting = False
        raise Terminated if self.came == signal.SIGTERM else KeyboardInterrupt

    def unraised(self, said: Any) -> None:
        """Where Python cannot raise, as in a weak reference's callback, it is done a bit later."""
        if self.came is None or not issubclass(said.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(said)
        else:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)


_signals = _Signals()


@contextmanager
def heard() -> Iterator[None]:
    """Raises SIGINT as KeyboardInterrupt and SIGTERM as Terminated, and ends the process by them.

    What else is raised after one of them, such as an ImportError of what it cut off, counts as it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _signals.came = None
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGALRM
    before = {number: signal.signal(number, _signals.take) for number in numbers}
    hook, sys.unraisablehook = sys.unraisablehook, _signals.unraised
    try:
        yield
    except Exception:
        if _signals.came is None:
            raise
        leave()
    except KeyboardInterrupt:
        leave()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in before.items():  # on the way out there is nothing to interrupt
            signal.signal(number, signal.SIG_IGN if came() else handler)


@contextmanager
def later() -> Iterator[None]:
    """Lets an interrupt wait for the end of what must not be done by half."""
    main = threading.current_thread() is threading.main_thread()
    _signals.held += main
    try:
        yield
    finally:
        _signals.held -= main
        if main and not _signals.held and _signals.waiting:
            _signals.throw()


def came() -> bool:
    """Whether a signal asked this process to end."""
    return _signals.came is not None


def leave() -> NoReturn:
    """Ends the process as an interrupted one: a line, and 128 and the signal as its exit code."""
    number = _signals.came or signal.SIGINT
    goes_on = "; the same command goes on from what is sealed" * (number == signal.SIGTERM)
    print(f"peftc: stopped by {signal.Signals(number).name}{goes_on}", file=sys.stderr)
    sys.exit(128 + number)
