"""Pruning ranks: an adapter without those that add nothing, or least, as a plain LoRA.

What AdaLoRA's budget masked adds nothing, and goes with no change to the numbers. Of trained ranks
those with the smallest singular values of ΔW go, over all sites: of all choices that leave as many,
it is the one whose squared error, summed over the sites, is least (Eckart and Young 1936).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from peftc.contract import Effect, Pass, PassResult, absent
from peftc.errors import PassError, PeftcError, raise_all
from peftc.passes.joint import Joint, in_place_of
from peftc.passes.lora import Lora
from peftc.targets import Names, listed

if TYPE_CHECKING:
    import torch

    from peftc.constants import Constant
    from peftc.factors import Delta
    from peftc.program import Adapter, Program


@dataclass(frozen=True)
class Pruning:
    """What pruning does to one adapter at one site.

    Attributes:
        adapter: The adapter's name.
        site: The site's name.
        rank: How many ranks there are.
        left: How many are left; where that is 0, the site is left alone.
        error: ‖ΔW − ΔW′‖_F / ‖ΔW‖_F.
        norm: ‖ΔW‖_F; 0 where nothing that counts is removed.
    """

    adapter: str
    site: str
    rank: int
    left: int
    error: float
    norm: float


class PruneRanks(Pass):
    """Remove the ranks of adapters that add nothing, or least; what is left is plain LoRA."""

    effect: ClassVar[Effect] = Effect.BOUNDED

    adapters: Names | None = Field(None, description="which, by name: a,b; default: all")
    budget: int | None = Field(
        None, gt=0, description="how many ranks are left, of all sites together; default: all but "
        "those that add nothing, such as AdaLoRA masked"
    )  # fmt: skip

    def declared(self) -> Effect:
        return Effect.EQUAL if self.budget is None else Effect.BOUNDED

    def check(self, program: Program) -> list[PeftcError]:
        from peftc.deltas import alone, deltas, unstackable, untold

        there, names = program.adapters, self.names(program)
        errors = absent(names or ["default"], program)
        lost = [name for name in names if name in there and _beside(there[name]) is None]
        errors = errors or untold(program, lost) + unstackable(program)
        if errors:
            return errors
        for name in names:
            found, refused = deltas(alone(program, [name]))
            for error in refused:
                error.what = f"the adapter {name!r}: {error.what}"
            errors += refused
            errors += [
                PassError(
                    f"what the adapter {name!r} adds is no product of two small matrices"
                    if delta.bias is None
                    else f"the adapter {name!r} changes the bias too, which has no ranks",
                    where=fqn,
                    fix="make it one first: combine --method svd --rank 16",
                )
                for fqn, delta in found.items()
                if delta.factors is None or delta.bias is not None
            ]
        if not errors:
            left = {one.adapter for one in self.outlook(program) if one.left}
            empty = [name for name in names if name not in left]
            # An adapter without ranks is gone, and with it what it trains beside them.
            if not left or untold(program, empty):
                errors.append(
                    PassError(f"the adapter {empty[0]!r} adds nothing", fix="train it first")
                )
        return errors

    def run(self, program: Program) -> PassResult:
        cores = self._cores(program)
        after = program
        for name in self.names(program):
            mine = {core.site: core for core in cores if core.adapter == name}
            whole = all(core.left == core.rank for core in mine.values())
            if whole and isinstance(program.adapters[name].method, Lora):
                continue
            made = {fqn: core.joint() for fqn, core in mine.items() if core.left}
            beside = _beside(program.adapters[name]) or {}
            after = in_place_of(after, [name], name, made, **beside)
        told = [core.told() for core in cores]
        several = len(self.names(program)) > 1
        errors = {f"{one.site} ({one.adapter})" if several else one.site: one.error for one in told}
        measured = {
            "ranks_before": sum(one.rank for one in told),
            "ranks_left": sum(one.left for one in told),
            "pruning_error": errors,
        }
        return PassResult(after, after is not program, measured)

    def names(self, program: Program) -> list[str]:
        """The adapters that are pruned."""
        return list(program.adapters) if self.adapters is None else listed(self.adapters)

    def outlook(self, program: Program) -> list[Pruning]:
        """What the pass would do to each site, which it does not do.

        Raises:
            PeftcError: An adapter cannot be pruned.
        """
        return [core.told() for core in self._cores(program)]

    def _cores(self, program: Program) -> list[_Core]:
        """The factors of each adapter at each site, and how many of their ranks are left."""
        import torch

        from peftc.deltas import alone, deltas

        cores = []
        for name in self.names(program):
            found, errors = deltas(alone(program, [name]))
            raise_all(errors)
            cores += [
                _Core(name, fqn, delta, self.budget is not None) for fqn, delta in found.items()
            ]
        if self.budget is not None:
            squares = torch.cat([core.squares for core in cores])
            if self.budget < len(squares):
                sizes = [len(core.squares) for core in cores]
                order = squares.argsort(descending=True, stable=True)
                stays = torch.zeros(len(squares), dtype=torch.bool)
                stays[order[: self.budget]] = True
                for core, part in zip(cores, torch.split(stays, sizes), strict=True):
                    core.left = int(part.sum())
        return cores


class _Core:
    """B and A of one adapter at one site, without the ranks that add nothing.

    Attributes:
        squares: Of the singular values of B·A, the largest first, of experts their sum; empty where
            nobody asked for them.
        left: How many ranks are left.
    """

    def __init__(self, adapter: str, site: str, delta: Delta, ranked: bool) -> None:
        import torch

        from peftc.evaluate import value
        from peftc.kernels.lowrank import of_product

        assert delta.factors is not None
        self.adapter, self.site, self.matrix = adapter, site, delta.matrix
        up, down = (value(factor).float() for factor in delta.factors)
        self.rank = down.shape[-2]
        used = _any(up) & _any(down.mT)
        self.up, self.down = up[..., used], down[..., used, :]
        self.squares = torch.zeros(0)
        self.left = int(used.sum())
        self._best: tuple[torch.Tensor, torch.Tensor] | None = None
        if ranked and self.left:
            found = of_product(self.up, self.down)
            # The singular values are shared evenly between the two.
            values = found.up.double().square().sum(-2)
            self.squares = values.square().reshape(-1, values.shape[-1]).sum(0)
            self._best = found.up, found.down
            self.left = len(self.squares)

    def told(self) -> Pruning:
        """What happens to it."""
        total = float(self.squares.sum())
        lost = float(self.squares[self.left :].sum())
        error = math.sqrt(lost / total) if total else 0.0
        return Pruning(self.adapter, self.site, self.rank, self.left, error, math.sqrt(total))

    def joint(self) -> Joint:
        """What is left of it."""
        from peftc.constants import Held

        up, down = self.up, self.down
        if self._best is not None and self.left < up.shape[-1]:
            up, down = self._best[0][..., : self.left], self._best[1][..., : self.left, :]
        origin = hashlib.sha256(f"{self.left} {self.matrix.key}".encode()).hexdigest()
        factors: tuple[Constant, Constant] = (
            Held(up.contiguous(), f"B of {origin}"),
            Held(down.contiguous(), f"A of {origin}"),
        )
        return Joint(self.matrix, factors, None, self.told().error, None)


def _beside(adapter: Adapter) -> dict[str, Any] | None:
    """The options by which a LoRA trains what an adapter trains beside its ranks, if it can."""
    method = adapter.method
    if getattr(method, "bias", None) not in ("none", "all"):
        return None
    return {name: getattr(method, name) for name in ("bias", "modules_to_save")}


def _any(factor: torch.Tensor) -> torch.Tensor:
    """Which columns of a matrix, or of any matrix of a stack, are not zero."""
    return factor.ne(0).flatten(0, -2).any(0)


def total_error(found: Sequence[Pruning]) -> float:
    """‖ΔW − ΔW′‖_F / ‖ΔW‖_F over all sites."""
    lost = sum((one.error * one.norm) ** 2 for one in found)
    total = sum(one.norm**2 for one in found)
    return math.sqrt(lost / total) if total else 0.0
