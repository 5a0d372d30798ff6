"""Parity with PEFT, method by architecture: what the tests assert and docs/parity.md shows.

python -m tests.parity            writes docs/parity.md
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import peftc
from peftc.contract import Pass
from peftc.errors import FoldError, PeftcError, TiedWeightError, Violations
from peftc.passes.attach import Attach
from peftc.passes.merge import Merge
from peftc.passes.untie import Untie
from peftc.pipeline import Pipeline
from peftc.program import Program
from tests import zoo

PAGE = Path(__file__).parent.parent / "docs" / "parity.md"
BOUND = 1e-5
# Cells in which PEFT's own unmerged output is not what was trained, as its merged one shows.
STRUCTURAL = {
    "layer replication", "lora on embedding", "dora on embedding", "modules_to_save",
}  # fmt: skip
TIED = "merging is refused: a tied weight would change on one side only"
PEFT_UNMERGED_WRONG = {("tokens", "roberta"), ("lora + tokens", "roberta")}

# Cells that peftc refuses, and why.
REFUSED = {
    ("lora on convolution", "grouped"): "a branch on a grouped convolution cannot be merged",
    ("dora on convolution", "grouped"): "a branch on a grouped convolution cannot be merged",
}


@dataclass(frozen=True)
class Cell:
    """What was measured of one method on one architecture.

    Attributes:
        unmerged: peftc's output with the adapter attached against PEFT's.
        merged: peftc's merged output against its unmerged one; None where merging is refused.
        peft: peftc's merged output against PEFT's; None where PEFT's own is wrong or raises.
        note: Why a figure is missing.
    """

    unmerged: float | None = None
    merged: float | None = None
    peft: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether every figure is within the bound, and every missing one has its reason."""
        figures = (self.unmerged, self.merged, self.peft)
        near = all(figure is None or figure <= BOUND for figure in figures)
        return near and (None not in figures or bool(self.note))

    def __str__(self) -> str:
        figures = [f for f in (self.unmerged, self.merged, self.peft) if f is not None]
        return f"{max(figures):.0e}" if figures else ""


def cells() -> Iterator[tuple[str, str]]:
    """Every method on every architecture that has what the method is for."""
    for method in zoo.METHODS:
        for name in zoo.SPECIMENS:
            if not zoo.UNSUPPORTED.get((method, name), "").startswith("has no"):
                yield method, name


def measure(method: str, name: str) -> Cell:
    """Runs one cell."""
    specimen = zoo.SPECIMENS[name]
    if reason := zoo.UNSUPPORTED.get((method, name)):
        return Cell(note=f"PEFT: {reason}")
    theirs = zoo.adapter(method, specimen)
    want = zoo.run(theirs, specimen)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter")
        zoo.save(theirs, method, specimen, path)
        attach, base = Attach(path=str(path)), captured(method, specimen, Path(folder, "base"))
        steps: list[Pass] = [attach]
        try:
            program = Pipeline(steps).run(base)
        except PeftcError as refused:
            if (method, name) in REFUSED:
                return Cell(note=f"peftc: {REFUSED[method, name]}")
            if reason_of(refused) != TIED or method not in STRUCTURAL:
                raise
            steps = [Untie(), attach]
            program = Pipeline(steps).run(base)
        ours = zoo.run(peftc.materialize(program), specimen)
        trusted = (method, name) not in PEFT_UNMERGED_WRONG
        unmerged = zoo.distance(ours, want) if trusted else None
        notes = [] if trusted else ["PEFT's unmerged output is wrong"]
        notes += ["attached after `untie`"] if len(steps) > 1 else []
        try:
            merged = Pipeline([Merge()]).run(program)
        except PeftcError as refused:
            reason = reason_of(refused)
            if reason != TIED or method not in STRUCTURAL:
                return Cell(unmerged, note=reason)
            try:
                merged = Pipeline([Untie(), attach, Merge()]).run(base)
            except PeftcError:
                return Cell(unmerged, note=reason)
            notes.append("merged after `untie`")
        got = zoo.run(peftc.materialize(merged), specimen)
        known = zoo.PEFT_MERGE_WRONG.get((method, name))
        if known:
            notes.append(f"PEFT's merge: {known}")
        right = None if known else zoo.distance(got, peft_merged(method, specimen))
        return Cell(unmerged, zoo.distance(got, ours), right, "; ".join(notes))


def reason_of(refused: PeftcError) -> str:
    """Why merging is refused, where that is right; any other error is raised again."""
    errors = refused.errors if isinstance(refused, Violations) else [refused]
    if all(isinstance(error, TiedWeightError) for error in errors):
        return TIED
    if all(isinstance(error, FoldError) and "no place for one" in error.what for error in errors):
        return "merging is refused: the adapter has biases, and the layers have no place for them"
    raise refused


def captured(method: str, specimen: zoo.Specimen, path: Path) -> Program:
    """The base; from a checkpoint where its structure may have to be edited."""
    model = specimen.build()
    if method not in STRUCTURAL or not hasattr(model, "config"):
        return peftc.capture(model)
    model.save_pretrained(path)
    return peftc.capture(path)


def peft_merged(method: str, specimen: zoo.Specimen) -> torch.Tensor:
    """PEFT's merged output."""
    model = zoo.adapter(method, specimen).merge_and_unload()
    return zoo.run(model.eval(), specimen)


def page(found: dict[tuple[str, str], Cell]) -> str:
    """The table as docs/parity.md has it: the largest of each cell's three differences."""
    names = list(zoo.SPECIMENS)
    notes: dict[str, int] = {}
    lines = [
        "# Parity with PEFT",
        "",
        "Tiny random models of each architecture carry a trained adapter that PEFT made. A cell "
        "shows the largest of three differences, each the largest absolute difference over the "
        "largest absolute value, in fp32: peftc's output with the adapter attached against PEFT's; "
        "peftc's merged output against its unmerged one; and against PEFT's merged one. "
        f"The tests (`tests/test_architectures.py`) hold every cell to {BOUND:g}. A dash: the "
        "architecture has no such part. A number in brackets: see the notes.",
        "",
        "| method | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for method in zoo.METHODS:
        row = []
        for name in names:
            cell = found.get((method, name))
            mark = ""
            if cell and cell.note:
                mark = f" [{notes.setdefault(cell.note, len(notes) + 1)}]"
            row.append(f"{cell}{mark}".strip() if cell else "–")
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    lines += ["", *(f"{number}. {note}" for note, number in notes.items()), ""]
    return "\n".join(lines)


def main() -> int:
    """Measures every cell, prints what does not hold, and writes the page."""
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    chosen = set(sys.argv[1:])
    found, failed = {}, 0
    for method, name in cells():
        if chosen and method not in chosen:
            continue
        try:
            found[method, name] = cell = measure(method, name)
            problem = "" if cell.holds else str(cell)
        except PeftcError as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        if problem:
            failed += 1
            print(f"{method} on {name}: {problem}", flush=True)
    if not chosen:
        PAGE.write_text(page(found))
    print(f"{len(found)} cells, {failed} do not hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
