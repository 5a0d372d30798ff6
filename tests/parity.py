"""Parity, method by architecture: what the tests assert and docs/parity.md shows.

python -m tests.parity [--part I/N]      measures every cell, and writes docs/parity.md
python -m tests.parity CELL…             measures these: a method, a family, or method@family

What was measured stays in build/parity, so that a run that was killed goes on, and so that several
processes can each take a part; the last writes the page.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

from peftc import Attach, Merge, Pass, Program, materialize
from peftc.errors import FoldError, PeftcError, TiedWeightError, Violations
from peftc.passes.untie import Untie

from . import parity_formats as formats
from . import parity_rows as rows
from . import zoo
from .families import KINDS
from .families.specimen import Specimen
from .parity_rows import BOUND, Cell

PAGE = Path(__file__).parent.parent / "docs" / "parity.md"
KEPT = Path(__file__).parent.parent / "build" / "parity"
# Cells in which a tied weight is changed, so that it has to be untied first.
STRUCTURAL = {
    "layer replication", "lora on embedding", "dora on embedding", "modules_to_save",
}  # fmt: skip
TIED = "merging is refused: a tied weight would change on one side only"
# Cells in which PEFT's own unmerged output is not what was trained, as its merged one shows.
PEFT_UNMERGED_WRONG = {
    (method, name)
    for method in ("tokens", "lora + tokens")
    for name in ("roberta", "albert", "modernbert", "blip")
}

# Cells that peftc refuses, and why.
GROUPED = "a branch on a grouped convolution cannot be merged"
KINDS_BY_PERIOD = "the kinds of its layers are a function of their number, which copies change"
REFUSED = {
    ("lora on convolution", "grouped"): GROUPED,
    ("dora on convolution", "grouped"): GROUPED,
    ("layer replication", "jamba"): KINDS_BY_PERIOD,
    ("layer replication", "recurrent_gemma"): KINDS_BY_PERIOD,
    ("layer replication", "falcon_h1"): "transformers does not read the config that it wrote",
}
# Cells in which rounding is amplified beyond the bound, by PEFT's merge as by peftc's.
AMPLIFIED = {("oft", "qwen3_next"): "merging rounds, and the model amplifies it: PEFT's by 2e-05"}
METHODS = (*zoo.METHODS, *rows.ROWS)
# The passes whose methods a row's PEFT adapters are, where they are not named as the row is.
PEFT_PASSES: dict[str, tuple[str, ...]] = {
    **{name: ("lora",) for name in ("rslora", "lora bias=all", "lora_bias", "pissa", "olora",
                                    "modules_to_save", "experts")},
    **{f"{name} on {part}": (name,) for name in ("lora", "dora", "loha", "lokr")
       for part in ("embedding", "convolution")},
    "tokens": ("trainable_tokens",),
    "lora + tokens": ("lora", "trainable_tokens"),
    "layer replication": ("replicate_layers",),
}  # fmt: skip
UNMEASURED = "…"
SLICES = 8  # of all cells, of which CI runs one


def passes() -> dict[str, tuple[str, ...]]:
    """The passes of the registry that each row runs."""
    return {
        **{name: ("attach", "merge", *(PEFT_PASSES.get(name, (name,)))) for name in zoo.METHODS},
        **{name: row.passes for name, row in rows.ROWS.items()},
    }


def cells() -> Iterator[tuple[str, str]]:
    """Every method, and every format, on every architecture that has what the method is for."""
    for method in (*METHODS, *formats.FORMATS):
        for name in zoo.SPECIMENS:
            if not zoo.UNSUPPORTED.get((method, name), "").startswith("has no"):
                yield method, name


def sample(number: int = 0) -> list[tuple[str, str]]:
    """One of `SLICES` parts of the cells: a diagonal, so that each row and column is in it."""
    columns, lines = list(zoo.SPECIMENS), list(METHODS)
    return [
        (method, name)
        for method, name in cells()
        if method in lines
        and (lines.index(method) + 3 * columns.index(name)) % SLICES == number % SLICES
    ]


def measure(method: str, name: str) -> Cell:
    """Runs one cell."""
    if method in formats.FORMATS:
        return formats.measure(method, name)
    if method in rows.ROWS:
        return rows.measure(method, name)
    specimen = zoo.SPECIMENS[name]
    if reason := zoo.UNSUPPORTED.get((method, name)):
        return Cell(note=f"PEFT: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        return beside_peft(method, specimen, Path(folder))


def beside_peft(method: str, specimen: Specimen, folder: Path) -> Cell:
    """A method of PEFT's."""
    theirs, cell = zoo.adapter(method, specimen), (method, specimen.name)
    want, path = zoo.run(theirs, specimen), folder / "adapter"
    zoo.save(theirs, method, specimen, path)
    base = captured(method, specimen, folder / "base")
    attach = Attach(path=str(path))
    steps: list[Pass] = [attach]
    try:
        program = rows.ran(base, *steps)
    except PeftcError as refused:
        if cell in REFUSED:
            return Cell(note=f"peftc: {REFUSED[cell]}")
        if reason_of(refused) != TIED or method not in STRUCTURAL:
            raise
        steps = [Untie(), attach]
        program = rows.ran(base, *steps)
    ours = zoo.run(materialize(program), specimen)
    trusted = cell not in PEFT_UNMERGED_WRONG
    unmerged = zoo.distance(ours, want) if trusted else None
    notes = [] if trusted else ["PEFT's unmerged output is wrong"]
    notes += ["attached after `untie`"] if len(steps) > 1 else []
    try:
        merged = rows.ran(program, Merge())
    except PeftcError as refused:
        reason = reason_of(refused)
        if reason != TIED or method not in STRUCTURAL:
            return Cell(unmerged, note=reason)
        try:
            merged = rows.ran(base, Untie(), attach, Merge())
        except PeftcError:
            return Cell(unmerged, note=reason)
        notes.append("merged after `untie`")
    if cell in AMPLIFIED:
        return Cell(unmerged, note=AMPLIFIED[cell])
    got = zoo.run(materialize(merged), specimen)
    if known := zoo.PEFT_MERGE_WRONG.get(cell):
        notes.append(f"PEFT's merge: {known}")
        return Cell(unmerged, zoo.distance(got, ours), note="; ".join(notes))
    if method in zoo.INITIAL:  # what was saved serves for nothing
        theirs = zoo.adapter(method, specimen)
    right = zoo.run(theirs.merge_and_unload().eval(), specimen)
    return Cell(unmerged, zoo.distance(got, ours), zoo.distance(got, right), "; ".join(notes))


def reason_of(refused: PeftcError) -> str:
    """Why merging is refused, where that is right; any other error is raised again."""
    errors = refused.errors if isinstance(refused, Violations) else [refused]
    if all(isinstance(error, TiedWeightError) for error in errors):
        return TIED
    if all(isinstance(error, FoldError) and "no place for one" in error.what for error in errors):
        return "merging is refused: the adapter has biases, and the layers have no place for them"
    raise refused


def captured(method: str, specimen: Specimen, path: Path) -> Program:
    """The base; from a checkpoint where its structure may have to be edited."""
    if method not in STRUCTURAL or specimen.name in rows.UNSAVED:
        return rows.captured(specimen)
    return rows.saved(specimen, path)


def page(found: dict[tuple[str, str], Cell]) -> str:
    """docs/parity.md: tables of methods and of formats, for each kind of architecture."""
    notes: dict[str, int] = {}
    lines = [HEAD]
    for title, specimens in KINDS.items():
        names = [specimen.name for specimen in specimens]
        lines += ["", f"## {title}", "", *table("method", METHODS, names, found, notes)]
    lines += ["", FORMATS_HEAD]
    for specimens in KINDS.values():
        names = [specimen.name for specimen in specimens]
        lines += ["", *table("format", tuple(formats.FORMATS), names, found, notes)]
    lines += ["", "## Notes", "", *(f"{n}. {note}" for note, n in notes.items()), ""]
    return "\n".join(lines)


HEAD = f"""# Parity, method by architecture

Tiny random models of each architecture carry a trained adapter. A cell shows the largest of up to
three differences, each the largest absolute difference over the largest absolute value, in fp32:
peftc's output with the adapter attached against PEFT's; peftc's merged output against its unmerged
one; and against PEFT's merged one. Every cell is held to {BOUND:g}. A dash: the architecture has no
such part; an ellipsis: not measured yet. A number in brackets: see the [notes](#notes), which say
why a figure is missing.

What PEFT has not is compared with arithmetic that is not peftc's: bottlenecks with AdapterHub's
equations, written anew as hooks where peftc finds sublayers; `bitfit` and `full` with two steps of
SGD on transformers' model alone; a router with its own equation; 4-bit bases with PEFT's LoRA on
the same weights dequantized; `combine` with PEFT's weighted adapter; what only edits (`unmerge`,
`untie`, `resize_vocabulary`) with the base. Every registered pass is in a row.

`python -m tests.parity` measures all of it, goes on where it was killed, and writes this page. The
tests (`tests/test_architectures.py`) run one cell of {SLICES}, from every row and every column:
`PEFTC_MATRIX=3` takes the third part instead, `PEFTC_MATRIX=all` every cell."""

FORMATS_HEAD = """## Formats

What a model with a LoRA computes after a round trip through a format, against what it computed
before. `peft`: attached, written and attached again, which is equal to the bit, and loaded by PEFT.
`safetensors`: merged, in the base's own layout, loaded by transformers. `canonical`: ranks that
differ, as one plain LoRA that PEFT loads. `nf4`: nested, under bitsandbytes' names, computed by
transformers and bitsandbytes. `onnx` and `pt2`: as [onnx.md](onnx.md) and [pt2.md](pt2.md) have it
of models of three layers."""


def table(
    corner: str,
    methods: tuple[str, ...],
    names: list[str],
    found: dict[tuple[str, str], Cell],
    notes: dict[str, int],
) -> list[str]:
    """Methods by architectures; notes are numbered as they come."""
    wanted = set(cells())
    lines = [f"| {corner} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method in methods:
        line = []
        for name in names:
            cell = found.get((method, name))
            mark = ""
            if cell and cell.note:
                mark = f" [{notes.setdefault(cell.note, len(notes) + 1)}]"
            missing = UNMEASURED if (method, name) in wanted else "–"
            line.append(f"{cell}{mark}".strip() if cell else missing)
        if set(line) != {"–"}:
            lines.append(f"| {method} | " + " | ".join(line) + " |")
    return lines


def shown() -> dict[tuple[str, str], str]:
    """What the page has in each cell: whether there is a figure, and the note."""
    text = PAGE.read_text()
    notes = dict(line.split(". ", 1) for line in text.partition("## Notes")[2].split("\n") if line)
    found, names = {}, []
    for line in text.splitlines():
        first, *words = [word.strip() for word in line.strip("|").split("|")]
        if first in ("method", "format"):
            names = words
        elif line.startswith("| "):
            for name, word in zip(names, words, strict=True):
                figure, _, mark = word.partition("[")
                if word == UNMEASURED:
                    found[first, name] = UNMEASURED
                elif word != "–":
                    found[first, name] = told(bool(figure), notes.get(mark.strip("]"), ""))
    return found


def told(measured: bool, note: str) -> str:
    """What a test compares of a cell: figures differ from machine to machine."""
    return f"{'measured' if measured else 'not measured'} {note}".strip()


def kept() -> dict[tuple[str, str], Cell]:
    """What earlier runs measured."""
    found = {}
    for file in sorted(KEPT.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            method, name, cell = json.loads(line)
            found[method, name] = Cell(**cell)
    return found


def main() -> int:
    """Measures what is not measured yet, prints what does not hold, and writes the page."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    words, part, parts = sys.argv[1:], 1, 1
    if words[:1] == ["--part"]:
        part, parts = map(int, words[1].split("/"))
        words = words[2:]
    known, failed = {} if words else kept(), 0
    todo = [
        cell for i, cell in enumerate(cells())
        if (not words or {*cell, "@".join(cell)} & set(words)) and i % parts == part - 1
        and cell not in known
    ]  # fmt: skip
    KEPT.mkdir(parents=True, exist_ok=True)
    for method, name in todo:
        try:
            cell = measure(method, name)
            problem = "" if cell.holds else str(cell)
        except Exception as error:  # one cell's fault keeps no other from being measured
            problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
        if problem or words:
            print(f"{method} on {name}: {problem or (str(cell), cell.note)}", flush=True)
        if problem:
            failed += 1
        else:
            with (KEPT / f"{part}-of-{parts}.jsonl").open("a") as file:
                file.write(json.dumps([method, name, asdict(cell)]) + "\n")
    found = kept()
    if not words:
        PAGE.write_text(page(found))
    print(f"{len(todo)} cells measured, {failed} do not hold, {len(found)} of all are kept")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
