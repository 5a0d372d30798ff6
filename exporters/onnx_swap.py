"""Programs whose adapters stay outside of their ONNX graphs, to be given at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from peftc.artifact import Staging
from peftc.deltas import alone, unstackable
from peftc.errors import PeftcError, SelectionError, located, raise_all
from peftc.exporters.onnx_adapters import (
    Branches,
    base_fingerprint,
    check,
    low_rank,
    no_slot,
    write,
)
from peftc.exporters.onnx_proof import prove
from peftc.exporters.onnx_slots import Slots
from peftc.live import materialize
from peftc.program import Program
from peftc.progress import Progress
from peftc.targets import ALL_LINEAR, LINEARS, Targets
from peftc.whole import Whole

FOLDER = "adapters/"  # beside a base, of the adapters that it was exported with


@dataclass(frozen=True)
class Swap:
    """A program whose adapters stay outside of its graphs.

    Attributes:
        program: It carries the adapters.
        base: It carries none.
        slots: Where the graphs take one.
        branches: What each adapter adds.
    """

    program: Program
    base: Program
    slots: Slots
    branches: Mapping[str, Branches]

    @classmethod
    def of(cls, program: Program, targets: str | Sequence[str] | None) -> Swap:
        """Takes the adapters off a program.

        Args:
            program: It carries any number of them, none of which is merged.
            targets: Which layers have slots, beside those that the adapters change; default: these
                alone, or all linear layers where there is no adapter.

        Raises:
            PeftcError: A target has no slot, or an adapter is more than low-rank branches.
        """
        raise_all(located(unstackable(program), "--adapters swap"))
        base, found = alone(program, []), dict[str, Branches]()
        errors: list[PeftcError] = []
        for name in program.adapters:
            branches, wrong = low_rank(alone(program, [name]))
            found[name], errors = branches, errors + located(wrong, f"adapter {name}")
        names = {fqn for branches in found.values() for fqn in branches}
        if targets is not None or not found:
            chosen, wrong = _chosen(base, targets or ALL_LINEAR)
            names, errors = {*names, *chosen}, errors + wrong
        raise_all(errors)
        return cls(program, base, Slots(fqn for fqn in base.sites if fqn in names), found)

    def write(self, stage: Staging) -> dict[str, Any]:
        """Writes the adapters' files behind the base's; what the manifest says of both."""
        base = base_fingerprint({name: one.blake3 for name, one in stage.files.items()})
        made = self.slots.made
        written = {
            name: write(stage, f"{FOLDER}{name}", branches, made, base)
            for name, branches in self.branches.items()
        }
        slots = {fqn: made[fqn].described() for fqn in self.base.sites if fqn in made}
        return {"base": base, "slots": slots, "adapters": written}

    def prove(
        self,
        path: Path,
        report: Mapping[str, Any],
        wholes: Sequence[Whole],
        proved: Mapping[str, Any],
        progress: Progress,
    ) -> dict[str, Any]:
        """Compares each adapter's file with its adapter, and the graphs with it with torch.

        Args:
            path: The directory.
            report: What `write` gave.
            wholes: What the graphs were lowered from.
            proved: What the comparison of the graphs without adapters gave.
            progress: Told of each adapter.

        Raises:
            ProofError: A file or a graph is something else.
        """
        figures: dict[str, Any] = {}
        for name, branches in self.branches.items():
            files = report["adapters"][name]["files"]
            figures[name] = {"site": check(path, files, branches, self.slots.made, report["base"])}
            if "skipped" not in proved:
                progress.stage(f"compare {name} with torch")
                model = materialize(alone(self.program, [name]), dtype=torch.float32)
                given = {graph: path / file for graph, file in files.items()}
                seen = prove(path, wholes, model, proved["bound"], given)
                figures[name] |= {key: seen[key] for key in ("bound", *files)}
        return figures


def _chosen(base: Program, targets: str | Sequence[str]) -> tuple[list[str], list[PeftcError]]:
    """The layers that are to have slots."""
    given = targets if isinstance(targets, str) else list(targets)
    try:
        chosen, errors = Targets(targets=given).pick(base)
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        return [], [SelectionError(what, where=f"slots {given}", fix="write q_proj,v_proj")]
    errors += [no_slot(base, fqn) for fqn in chosen if base.sites[fqn].kind.name not in LINEARS]
    return chosen, located(errors, "slots")
