"""What several test files assert and run: refusals, copies to damage, commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peftc.errors import PeftcError, Violations

ROOT = Path(__file__).parent.parent


def refuse(
    root: Path, kind: type[PeftcError], job: Callable[[Path], object], *words: str
) -> Sequence[PeftcError]:
    """Runs a job that must be refused, on the target `root / "out"`, and returns its errors.

    Every error is of the kind, and says what is wrong, where, and how to fix it; together they hold
    the words. Below `root` no file appears, goes or changes: neither the target, nor its staging
    directory, nor what was there before.
    """
    before = tree(root)
    with pytest.raises(PeftcError) as caught:
        job(root / "out")
    found = caught.value
    errors = found.errors if isinstance(found, Violations) else (found,)
    others = [repr(error) for error in errors if not isinstance(error, kind)]
    assert not others, f"not of the kind {kind.__name__}: {others}"
    partial = [vars(error) for error in errors if not (error.what and error.where and error.fix)]
    assert not partial, f"lack what, where or fix: {partial}"
    absent = [word for word in words if word not in str(found)]
    assert not absent, f"{absent} are not named in: {found}"
    assert tree(root) == before, "nothing is written where something is refused"
    return errors


def tree(root: Path) -> dict[Path, tuple[int, int]]:
    """Everything below a folder, links not followed, with its size and time."""
    stats = {path: path.lstat() for path in root.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def edit(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def replace_by_link(file: Path, to: Path | str) -> None:
    """A link in the place of a file."""
    file.unlink(missing_ok=True)
    file.symlink_to(to)


def copied(folder: Path, to: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder, to))


@dataclass(frozen=True)
class Ran:
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """All of stdout as JSON."""
        return json.loads(self.out)


def alone(*args: object, **environment: str) -> Ran:
    """Runs `python …` in a process of its own, where peftc is found."""
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails the test where the block hangs."""

    def ring(*_: object) -> None:
        raise AssertionError(f"hangs for more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
