"""Planning a training before it runs: what each method takes, what fits, and why."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from peftc.contract import Pass
from peftc.errors import CaptureError, PeftcError, Violations, located, raise_all
from peftc.examples import read_examples
from peftc.footprint import PRECISIONS, Footprint, Step, batch_of, checkpoint, footprint, loss_of
from peftc.live import materialize
from peftc.program import Program
from peftc.progress import SILENT, Progress
from peftc.recipe import build
from peftc.sources import limit_of, tokenizer_of
from peftc.terminal import Terminal
from peftc.token_rows import token_rows
from peftc.tuning import Data

Passes = Sequence[tuple[str, Mapping[str, Any]]]
_PARTS = ("weights", "gradients", "optimizer", "activations")
_PROBED = 3  # steps whose median time is told, behind one that is not counted
_ATTENTION: Mapping[str, Any] = {"targets": "role:query,value"}
_LINEAR: Mapping[str, Any] = {"targets": "all-linear"}
# What is looked at where nobody names passes: from all weights to the fewest numbers.
METHODS: Mapping[str, Passes] = {
    "full": [],
    "lora 64, all linear": [("lora", {"rank": 64, **_LINEAR})],
    "lora 8, all linear": [("lora", {"rank": 8, **_LINEAR})],
    "lora 8, query, value": [("lora", {"rank": 8, **_ATTENTION})],
    "adalora 12→8": [("adalora", _LINEAR)],
    "nf4, lora 64": [("nf4", {}), ("lora", {"rank": 64, **_LINEAR})],
    "nf4, lora 8, query, value": [("nf4", {}), ("lora", {"rank": 8, **_ATTENTION})],
    "prompt of 20": [("prompt_tuning", {"virtual_tokens": 20})],
}


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one method.

    Attributes:
        method: In words.
        passes: What makes it, as `peftc apply` takes them.
        step: How it is trained; with checkpointing where it fits only so.
        footprint: None where it cannot be trained on this model.
        fits: Whether it fits the memory; None where nobody said how much there is.
        reason: Why it does not, what takes most, or what would make it fit.
        seconds: A step's time, where it was tried.
        measured: The most memory that torch had on a GPU where it was tried.
    """

    method: str
    passes: Passes
    step: Step
    footprint: Footprint | None
    fits: bool | None
    reason: str
    seconds: float | None = None
    measured: int | None = None


def plan(
    program: Program,
    step: Step,
    methods: Mapping[str, Passes] = METHODS,
    memory: int | None = None,
    probe: bool = False,
    progress: Progress = SILENT,
) -> list[Verdict]:
    """What training takes by each of several methods.

    Args:
        program: The model.
        step: How it is trained.
        methods: Passes by the method's name; none of them is run on weights.
        memory: How many bytes there are. What does not fit is tried with checkpointing too.
        probe: Take a few steps of each that fits, on a GPU if there is one, and tell the time.
        progress: Told of each method.

    Raises:
        PeftcError: The model cannot be run without data, or an option is wrong.
    """
    found: list[Verdict] = []
    errors: list[PeftcError] = []
    for name, passes in methods.items():
        progress.stage(name)
        try:
            ready = _with(program, build(passes, name), name)
            verdict = _verdict(name, passes, ready, step, memory)
        except PeftcError as error:
            errors.append(error)
            first = error.errors[0] if isinstance(error, Violations) else error
            reason = f"not on this model: {first.what}"
            found.append(Verdict(name, passes, step, None, None, reason))
            continue
        if probe and verdict.fits is not False:
            try:
                seconds, measured = _probe(ready, verdict.step)
                verdict = replace(verdict, seconds=seconds, measured=measured)
            except torch.OutOfMemoryError as error:
                verdict = replace(verdict, fits=False, reason=f"the probe failed: {error}")
        found.append(verdict)
    if len(errors) == len(found):  # what keeps all of them away is no method's own
        raise errors[0]
    return found


def longest(program: Program, data: str) -> int:
    """The tokens of a data file's longest example, as `peftc tune` reads it.

    Raises:
        MissingDependency: The library `datasets` is not installed.
        DataError: What is wrong with the file.
    """
    tokenizer, how = tokenizer_of(program), Data(data=data)
    examples = read_examples(how, data, tokenizer)
    rows = token_rows(examples, how, tokenizer, limit_of(program, tokenizer))
    return max(high - low for low, high in map(rows.span, range(len(rows.ends))))


def _with(program: Program, passes: Sequence[Pass], where: str) -> Program:
    """The program after these passes, whose effect on numbers is not looked at: none is read."""
    for pass_ in passes:
        for step in (*pass_.needs(program), pass_):
            raise_all(located(step.check(program), where))
            program = step.run(program).program
    return program


def _verdict(
    name: str, passes: Passes, program: Program, step: Step, memory: int | None
) -> Verdict:
    found = footprint(program, step)
    if memory is None or found.peak <= memory:
        fits = None if memory is None else True
        return Verdict(name, passes, step, found, fits, _most(found))
    reason = f"with checkpointing; without it {size(found.peak)}"
    step, found = _checkpointed(program, step, found)
    if found.peak <= memory:
        return Verdict(name, passes, step, found, True, reason)
    return Verdict(name, passes, step, found, False, _obstacle(program, step, found, memory))


def _checkpointed(program: Program, step: Step, found: Footprint) -> tuple[Step, Footprint]:
    """The step with checkpointing, where that takes less."""
    if step.checkpointing:
        return step, found
    again = replace(step, checkpointing=True)
    try:
        less = footprint(program, again)
    except CaptureError:  # the model has none
        return step, found
    return (again, less) if less.peak < found.peak else (step, found)


def _parts(found: Footprint) -> dict[str, int]:
    return {name: getattr(found, name) for name in _PARTS}


def _most(found: Footprint) -> str:
    """What takes most."""
    name, most = max(_parts(found).items(), key=lambda item: item[1])
    what = {"optimizer": "optimizer states"}.get(name, name)
    return f"{what} take most, {most / sum(_parts(found).values()):.0%} of the sum"


def _obstacle(program: Program, step: Step, found: Footprint, memory: int) -> str:
    """Why it does not fit, and what would make it fit."""
    fixed = found.weights + found.gradients + found.optimizer
    if found.weights > memory:
        fix = "use a smaller model" if program.packed else "put nf4 before it"
        return f"the weights alone take {size(found.weights)}: {fix}"
    if fixed > memory:
        return (
            f"weights, gradients and optimizer states take {size(fixed)} before any data: "
            "train fewer numbers"
        )
    ways = []
    # What is not there for the batch stays, and the rest is in proportion to it.
    batch = int(step.batch * (memory - fixed) / max(1, found.peak - fixed))
    if batch and step.batch > 1:
        ways.append(f"a batch of {batch}")
    length = int(step.length * (memory - fixed) / max(1, found.peak - fixed))
    ways.append(f"{length} tokens" if length > 15 else "a shorter text")
    with_ = " even with checkpointing" if step.checkpointing else ""
    return f"activations take too much{with_}: try {' or '.join(ways)}"


def _probe(program: Program, step: Step) -> tuple[float, int | None]:
    """A step's median time in seconds, and the peak memory of a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, step.dtype) if step.dtype else None
    model: Any = materialize(program, device, dtype).train()
    if step.checkpointing:
        checkpoint(model)
    inputs = {name: x.to(device) for name, x in batch_of(model, step).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    times = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 + _PROBED):
        start = time.perf_counter()
        kind = PRECISIONS.get(step.precision or "")
        with torch.autocast(device, kind, enabled=kind is not None):
            loss = loss_of(model, inputs)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return statistics.median(times[1:]), peak


def size(count: int) -> str:
    """Bytes in words, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"


def show(found: Sequence[Verdict], step: Step, memory: int | None, terminal: Terminal) -> None:
    """Prints a table of verdicts, or all of them as JSON."""
    plans = [asdict(verdict) for verdict in found]
    terminal.data({"step": asdict(step), "memory": memory, "methods": plans})
    if terminal.as_json:
        return
    head = ["method", "trained", "weights", "grads", "optim.", "activ.", "peak"]
    head += ["fits"] * (memory is not None) + ["step"] * any(v.seconds for v in found)
    title = f"batch {step.batch}, {step.length} tokens, {step.optimizer}"
    terminal.table(title, head, [_row(verdict, head) for verdict in found])
    for verdict in found:
        terminal.out.print(f"{verdict.method}: {verdict.reason}", soft_wrap=True)


def _row(verdict: Verdict, head: Sequence[str]) -> list[str]:
    found = verdict.footprint
    cells = [verdict.method] + [""] * (len(head) - 1)
    if found is not None:
        share = found.trainable / max(1, found.parameters)
        parts = (*_parts(found).values(), found.peak)
        cells[1:7] = [f"{share:.2%}", *map(size, parts)]
        if "fits" in head:
            cells[7] = "yes" if verdict.fits else "no"
        if verdict.seconds is not None:
            cells[-1] = f"{verdict.seconds:.2g} s"
    return cells
