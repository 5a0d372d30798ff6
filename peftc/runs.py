"""A training's working directory: its settings, its checkpoints and its figures, until published.

It lies beside the target. What is whole in it is said by a seal written last, so that a run that
was killed goes on from its last whole checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from peftc.artifact import LOCK, claimed, fsync_folder
from peftc.checkpoint import read_json
from peftc.errors import ArtifactError, TrainingError
from peftc.files import fresh, lines, opened, write

PURPOSE = "training"
SETTINGS, METRICS, SEAL = "run.json", "metrics.jsonl", "sealed"
PREFIX = "checkpoint-"


class Run:
    """The working directory of one training.

    Args:
        root: The directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def checkpoints(self) -> list[Path]:
        """The whole ones, the oldest first."""
        found = (p for p in self.root.glob(f"{PREFIX}*") if (p / SEAL).is_file())
        return sorted(found, key=step_of)

    @property
    def last(self) -> Path | None:
        """The last whole checkpoint."""
        return next(reversed(self.checkpoints), None)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The figures so far, a mapping for each step and for each evaluation."""
        return [line for line in lines(self.root / METRICS) if type(line.get("step")) is int]

    def begin(self, what: Mapping[str, Any], restart: bool) -> None:
        """Takes up what an earlier run left, if it was the same training.

        Args:
            what: All that the training depends on, as plain data.
            restart: Leave nothing of an earlier run.

        Raises:
            TrainingError: An earlier run was another training.
        """
        file = self.root / SETTINGS
        if restart:
            for path in self.root.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        if file.exists() and self.checkpoints:
            self._compare(read_json(file, "a training's working directory"), what)
        for partial in set(self.root.glob(f"{PREFIX}*")) - set(self.checkpoints):
            shutil.rmtree(partial)
        step = step_of(self.last) if self.last else 0
        kept = [line for line in self.metrics if line["step"] <= step] if step else []
        self._replace(METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self._replace(SETTINGS, json.dumps(what, indent=2) + "\n")

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        plain = json.loads(json.dumps(now))
        old, new = before.get("settings"), plain["settings"]
        old = old if isinstance(old, dict) else {}
        changed = [f"{name} was {old.get(name)!r} and is {value!r}"
                   for name, value in new.items() if old.get(name) != value]  # fmt: skip
        changed += [f"the {part} is another" for part in plain
                    if part != "settings" and before.get(part) != plain[part]]  # fmt: skip
        if changed:
            raise TrainingError(
                f"holds a run that was not finished, of another training: {'; '.join(changed)}",
                where=str(self.root),
                fix="run it as before to go on, or add --restart to throw it away",
            )

    def log(self, line: Mapping[str, Any]) -> None:
        """Writes figures down."""
        try:
            with (self.root / METRICS).open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise self.unwritten(error) from error

    def seal(self, checkpoint: Path, keep: int, best: int | None) -> None:
        """Writes down that a checkpoint is whole, and removes old ones.

        Args:
            checkpoint: Its directory; its bytes are brought to the disk first.
            keep: How many are left.
            best: The step of one that is left too.
        """
        try:
            for file in (path for path in checkpoint.rglob("*") if path.is_file()):
                with opened(file) as written:
                    os.fsync(written.fileno())
            with fresh(checkpoint / SEAL) as seal:
                os.fsync(seal.fileno())
            fsync_folder(checkpoint)
            fsync_folder(self.root)
        except OSError as error:
            raise self.unwritten(error) from error
        for old in self.checkpoints[:-keep]:
            if step_of(old) != best:
                (old / SEAL).unlink()
                shutil.rmtree(old)

    def unwritten(self, error: Exception) -> ArtifactError:
        """That something could not be written, and what there is to go on from."""
        for partial in set(self.root.glob(f"{PREFIX}*")) - set(self.checkpoints):
            shutil.rmtree(partial, ignore_errors=True)
        return ArtifactError(
            f"could not be written: {getattr(error, 'strerror', None) or error}",
            where=str(self.root),
            fix=f"make room on the disk; the same command goes on {self.point}",
        )

    @property
    def point(self) -> str:
        """Where the same command would go on, in words."""
        return f"from step {step_of(self.last)}" if self.last else "from the beginning"

    def _replace(self, name: str, text: str) -> None:
        staged = self.root / f"{name}.new"
        try:
            write(staged, text)
            staged.replace(self.root / name)
        except OSError as error:
            raise self.unwritten(error) from error


@contextmanager
def working(target: Path, claim: bool) -> Iterator[Run]:
    """The working directory of a target, `.NAME.peftc-training` beside it.

    Args:
        target: The artifact's directory.
        claim: Make and lock it; of several processes only one does.

    Raises:
        ArtifactError: It cannot be made, or another run is training there.
    """
    target = target.absolute()
    if not claim:
        yield Run(target.parent / f".{target.name}.peftc-{PURPOSE}")
        return
    with claimed(target, PURPOSE, kept=True) as root:
        run = Run(root)
        try:
            yield run
        except SafetensorError as error:
            raise run.unwritten(error) from error
        finally:
            begun = (root / SETTINGS).exists() and (run.metrics or run.checkpoints)
            if not begun:  # or all of it is published
                shutil.rmtree(root, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix(PREFIX))


def best_of(metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """The step of the best evaluation; that before the first step has no checkpoint."""
    losses = [(line["eval_loss"], line["step"]) for line in metrics if "eval_loss" in line]
    return min(((loss, step) for loss, step in losses if step), default=(0.0, None))[1]
