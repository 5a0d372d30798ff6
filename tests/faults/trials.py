"""One fault each: a job is disturbed, what it left is judged, and it is run again."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from tests.faults.child import Child, Ended, Harm, commands, files_up_to
from tests.faults.world import Job, contents


class Failure(AssertionError):
    """Something is left that should not be, or another run does not end as it ought to."""


@dataclass
class Undisturbed:
    """What a job does when nothing disturbs it, in a folder that is its own."""

    job: Job
    folder: Path
    seconds: float = 0.0
    operations: int = 0
    files: dict[str, str] = field(default_factory=dict)
    largest: int = 0
    total: int = 0

    @classmethod
    def of(cls, job: Job, folder: Path) -> Undisturbed:
        """Runs a job twice, in two folders, on two threads and on one.

        Raises:
            Failure: It fails, or does not write the same bytes twice.
        """
        elsewhere = cls(job, folder if job.placed else folder.with_name(f"{folder.name}-elsewhere"))
        elsewhere.clear()
        elsewhere.again(1 if job.trains else 2)
        before = contents(elsewhere.target)
        elsewhere.clear()
        run = cls(job, folder)
        run.clear()
        ended = run.again()  # now what is cached is so
        run.files, run.seconds, run.operations = (
            contents(run.target), ended.seconds, ended.operations,
        )  # fmt: skip
        run.compare(before, "a run elsewhere, on two threads,")
        sizes = [path.stat().st_size for path in run.target.rglob("*") if path.is_file()]
        run.largest, run.total = max(sizes), sum(sizes)
        return run

    def compare(self, files: dict[str, str], which: str) -> None:
        """Compares what a run wrote.

        Raises:
            Failure: It wrote other bytes.
        """
        if files != self.files:
            names = sorted(files.keys() | self.files.keys())
            changed = [name for name in names if files.get(name) != self.files.get(name)]
            raise Failure(f"{which} wrote other bytes: {', '.join(changed)}")

    @property
    def target(self) -> Path:
        return self.folder / "out"

    def start(self, harm: Harm = lambda: None, at: int | None = None, threads: int = 1) -> Child:
        """Begins the job in a child."""
        work = partial(commands, self.job.calls(self.target), harm, threads)
        return Child(work, self.folder, at)

    def again(self, threads: int = 1) -> Ended:
        """Runs the job to its end.

        Raises:
            Failure: It fails.
        """
        ended = self.start(threads=threads).wait()
        if ended.code:
            raise Failure(f"exit code {ended.code}: {ended.said[-2000:]}")
        return ended

    def clear(self) -> None:
        """Leaves nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> list[str]:
        """What lies beside the target."""
        return sorted(path.name for path in self.folder.iterdir() if path != self.target)


class Outcome(NamedTuple):
    """What a fault left: a column of the table."""

    left: str


NOTHING, GOES_ON, DONE = Outcome("nothing"), Outcome("unfinished"), Outcome("whole")


def killed(run: Undisturbed, rng: random.Random) -> Outcome:
    """Kills a job at a random moment, or at one of its file operations, and runs it again."""
    if rng.random() < 0.5:
        run.start(at=rng.randint(1, run.operations)).wait()
    else:
        child = run.start()
        child.signal(signal.SIGKILL, after=rng.uniform(0, run.seconds))
        child.wait()
    return _rerun(run)


def interrupted(run: Undisturbed, rng: random.Random) -> Outcome:
    """Sends SIGINT or SIGTERM at a random moment."""
    child = run.start()
    number = rng.choice((signal.SIGINT, signal.SIGTERM))
    child.signal(number, after=rng.uniform(0, run.seconds))
    ended = child.wait()
    unheard = ended.code in (0, -signal.SIGTERM)  # it was not listening yet, or no longer
    if not unheard:
        _tells(ended, {128 + number, 130} if run.job.keeps else {128 + number})
        if "stopped by" not in ended.said:
            raise Failure(f"does not say that it was stopped: {ended.said[-2000:]}")
        if number == signal.SIGINT and not run.job.keeps and run.left():
            raise Failure(f"left {run.left()}")
    return _rerun(run)


def filled(run: Undisturbed, rng: random.Random) -> Outcome:
    """Has a job find the disk full, at a random offset of a file or of all of them."""
    if rng.random() < 0.5 or not _can_mount(run.folder):
        ended = run.start(files_up_to(rng.randint(0, run.largest))).wait()
        outcome = _judge_full(run, ended)
        _finish(run)
        return outcome
    with _Disk(run.folder, rng.randint(1 << 12, run.total + (run.total >> 2) + (1 << 15))) as disk:
        ended = run.start(_plenty if rng.random() < 0.7 else lambda: None).wait()
        outcome = _judge_full(run, ended)
        disk.grow()
        _finish(run)
    return outcome


FAULTS: dict[str, Callable[[Undisturbed, random.Random], Outcome]] = {
    "kills": killed,
    "interrupts": interrupted,
    "full disks": filled,
}


def share(total: int, jobs: list[Job]) -> dict[str, int]:
    """How many faults each job gets, one at least."""
    whole = sum(job.share for job in jobs)
    counts = {job.name: max(1, int(total * job.share / whole)) for job in jobs}
    for job in sorted(jobs, key=lambda job: -job.share):
        counts[job.name] += sum(counts.values()) < total
    rest = total - sum(counts.values())
    counts[max(jobs, key=lambda job: job.share).name] += max(0, rest)
    return counts


def tried(
    kind: str, run: Undisturbed, count: int, rng: random.Random
) -> tuple[Counter[Outcome], list[str]]:
    """Does harm to a job so many times; what it left, and what failed."""
    outcomes, failures = Counter[Outcome](), list[str]()
    for number in range(count):
        run.clear()
        try:
            outcomes[FAULTS[kind](run, rng)] += 1
        except Failure as failure:
            failures.append(f"{run.job.name}, {kind} {number + 1}: {failure}")
            print("FAILED", failures[-1], flush=True)
    run.clear()
    return outcomes, failures


def _judge_full(run: Undisturbed, ended: Ended) -> Outcome:
    if ended.code:
        _tells(ended, {1})
        if "fix" not in ended.said or "error" not in ended.said:
            raise Failure(f"does not say what to do: {ended.said[-2000:]}")
        if not run.job.keeps and run.left():
            raise Failure(f"left {run.left()}")
    return _looked(run)


def _tells(ended: Ended, codes: set[int]) -> None:
    if ended.code not in codes or "Traceback" in ended.said or "ignored in" in ended.said:
        raise Failure(f"exit code {ended.code}: {ended.said[-2000:]}")


def _rerun(run: Undisturbed) -> Outcome:
    outcome = _looked(run)
    _finish(run)
    return outcome


def _looked(run: Undisturbed) -> Outcome:
    """What is there; a target that is there must be whole."""
    if run.target.exists():
        if contents(run.target) != run.files:
            raise Failure("the target looks complete, and is not")
        return DONE
    return GOES_ON if any(map(_goes_on, run.folder.rglob("*"))) else NOTHING


def _goes_on(path: Path) -> bool:
    """Whether a file says that something is finished."""
    if path.name == "done.jsonl":
        lines = path.read_text().splitlines()
        return len(lines) > 1 and any(_is_json(line) for line in lines[1:])
    return path.name in ("sealed", "part.json")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _finish(run: Undisturbed) -> None:
    """Runs a disturbed job again, unless its target is there, and compares."""
    if run.target.exists():  # what is left beside it, the next run there removes
        return
    run.again()
    run.compare(contents(run.target), "another run")
    if run.left():
        raise Failure(f"another run left {run.left()}")


def _plenty() -> None:
    """Has a full disk found out by writing."""
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda _: usage._replace(free=1 << 50)  # type: ignore[assignment]


class _Disk:
    """A small disk at a folder."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def __enter__(self) -> _Disk:
        self._mount(f"size={self.size}")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def grow(self) -> None:
        """Makes room."""
        self._mount("remount,size=1g")

    def _mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "peftc", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)


@cache
def _can_mount(folder: Path) -> bool:
    """Whether this process may mount a disk."""
    try:
        with _Disk(folder, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
