"""Slots in a compiled model: LoRA's A and B as what its libraries are given beside the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import fx

from peftc.artifact import Staging
from peftc.contract import safe_name
from peftc.deltas import alone, deltas, unstackable, untold
from peftc.errors import AdapterError, CaptureError, PeftcError, located, raise_all
from peftc.evaluate import single_threaded, value
from peftc.graphs import Spec, aten
from peftc.normal import operator_of, owner
from peftc.program import Program
from peftc.resident import ROWS, names_of
from peftc.targets import ALL_LINEAR, LINEARS, Targets
from peftc.whole import Whole

INPUT = {"linear": 0, "addmm": 1, "nf4_linear": 0}  # which argument of an operator is x
SHOWN = 5
Mode = Literal["swap", "rows"]


@dataclass(frozen=True)
class Swap:
    """A program whose adapters stay outside of its graphs.

    Attributes:
        program: It carries the adapters.
        base: It carries none.
        mode: `swap` for one adapter at a time, `rows` for one of each row of a batch.
        sites: The layers that have a slot.
    """

    program: Program
    base: Program
    mode: Mode
    sites: tuple[str, ...]

    @classmethod
    def of(cls, program: Program, mode: Mode, targets: str | Sequence[str] | None) -> Swap:
        """Takes the adapters off a program.

        Args:
            program: It carries any number of them, none of which is merged.
            mode: See `Swap`.
            targets: The layers with slots beside those that the adapters change; default: these
                alone, or all linear layers where there is no adapter.

        Raises:
            PeftcError: A target has no slot, or an adapter is more than branches beside layers.
        """
        obstacles = [*unstackable(program), *untold(program, list(program.adapters))]
        raise_all(located(obstacles, "--adapters"))
        touched = {fqn for adapter in program.adapters.values() for fqn in adapter.sites}
        base = alone(program, [])
        if targets is not None or not touched:
            chosen, errors = Targets(targets=targets or ALL_LINEAR).pick(base)
            raise_all(located(errors, "--slots"))
            touched |= {*chosen}
        wrong = [
            AdapterError(
                f"is {base.sites[fqn].kind.name}, and slots are beside linear layers",
                where=fqn,
                fix="merge the adapter (--merge), or leave this layer out of it",
            )
            for fqn in sorted(touched)
            if base.sites[fqn].kind.name not in LINEARS
        ]
        raise_all(wrong[:SHOWN])
        return cls(program, base, mode, tuple(f for f in base.sites if f in touched))

    def insert(self, wholes: Iterable[Whole]) -> dict[str, list[int]]:
        """Puts slots into graphs; returns the in and out features of each layer's.

        Raises:
            CaptureError: A layer is not by itself in any graph, or its rows are not a batch's.
        """
        found: dict[str, list[int]] = {}
        wanted, errors = frozenset(self.sites), list[PeftcError]()
        for whole in wholes:
            for node in list(whole.graph.nodes):
                name = operator_of(node) if node.op == "call_function" else ""
                if name in INPUT and owner(node) in wanted:
                    error = self._slot(whole.graph, node, node.args[INPUT[name]], found)
                    errors += [error] if error else []
        errors += [
            CaptureError(
                "has no slot: no graph has it as a linear layer by itself",
                where=fqn,
                fix="leave it out of the slots, and merge adapters that change it (--merge)",
            )
            for fqn in self.sites
            if fqn not in found and not errors
        ]
        raise_all(errors[:SHOWN])
        return found

    def _slot(
        self, graph: fx.Graph, node: fx.Node, x: Any, found: dict[str, list[int]]
    ) -> PeftcError | None:
        fqn, y = owner(node), node.meta["val"]
        wide, high = int(x.meta["val"].shape[-1]), int(y.shape[-1])
        rows = self.mode == ROWS
        if rows and y.dim() != 3:
            return CaptureError(
                "sees the tokens of all rows as one list, so that no row has its own adapter there",
                where=fqn,
                fix="export with --adapters swap, or without a slot there (--slots)",
            )
        found[fqn] = [wide, high]
        each = ("batch",) if rows else ()
        names = names_of(fqn)
        with graph.inserting_before(node):
            factors = [graph.create_node("get_attr", name) for name in names]
        for factor, shape in zip(factors, (("rank", wide), (high, "rank")), strict=True):
            factor.meta = {"val": Spec((*each, *shape), torch.float32), "slot": True}  # type: ignore[arg-type]
        with graph.inserting_after(node):
            total = graph.call_function(aten.add.Tensor, (node, node))
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        with graph.inserting_before(total):
            added = x
            for factor in factors:
                if rows:
                    turned = graph.call_function(aten.transpose.int, (factor, 1, 2))
                    turned.meta = dict(node.meta)
                    added = graph.call_function(aten.bmm.default, (added, turned))
                else:
                    added = graph.call_function(aten.linear.default, (added, factor))
                added.meta = dict(node.meta)
        total.args = (node, added)
        total.meta = dict(node.meta)
        return None

    @single_threaded()
    def write(self, stage: Staging, slots: dict[str, list[int]]) -> dict[str, str]:
        """Writes the program's adapters as files for the slots; returns these by name.

        Raises:
            AdapterError: An adapter adds more than low-rank branches at these layers.
        """
        written: dict[str, str] = {}
        for name in self.program.adapters:
            file = f"adapter.{safe_name(name)}.safetensors"
            found, refused = deltas(alone(self.program, [name]))
            errors: list[PeftcError] = [*refused]
            tensors: dict[str, torch.Tensor] = {}
            for fqn, delta in found.items():
                if delta.factors is None or delta.bias is not None or fqn not in slots:
                    errors.append(
                        AdapterError(
                            f"{name!r} adds more there than a product of two small matrices",
                            where=fqn,
                            fix="merge it (--merge), or make it one LoRA first: export … "
                            "--format peft --canonical",
                        )
                    )
                    continue
                up, down = (value(factor).float().contiguous() for factor in delta.factors)
                tensors |= dict(zip(names_of(fqn), (down, up), strict=True))
            raise_all(errors[:SHOWN])
            stage.add(file, save(tensors, metadata={"format": "pt"}))
            written[name] = file
        return written
