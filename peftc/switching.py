"""Switching: which adapters of a live model are on, for a whole batch or row by row.

What a model that `peftc.together` made computes depends on one small table, and a slot's tensors
are written in place: nothing that `torch.compile` guards changes, so nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc import graphs, registry
from peftc.deltas import alone, deltas
from peftc.errors import AdapterError, PassError, PeftcError, did_you_mean, raise_all
from peftc.evaluate import value
from peftc.factors import Delta
from peftc.fusing import lora_of
from peftc.live import SHOWN
from peftc.mixing import Mix, sums
from peftc.program import Program
from peftc.sites import Site

Weights = Mapping[str, float]
Row = str | Weights | None


class Adapters:
    """The adapters of a live model, and which of them are on.

    At first that is the first one. A method that puts virtual tokens before a sequence is on for a
    whole batch or not at all, and only one such at a time.
    """

    def __init__(self, model: nn.Module, program: Program) -> None:
        """Takes hold of a live model.

        Args:
            model: What the program was materialized to, wrapped by `torch.compile` or not.
            program: What `peftc.together` made.

        Raises:
            PassError: The model has no table to write to.
        """
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.program = program
        self.names = program.mixed
        held = (item for module in self.model.modules() for item in vars(module).values())
        self._mix = next((item for item in held if isinstance(item, Mix)), None)
        if not program.mixed or (len(self._prefixed()) < len(self.names) and not self._mix):
            raise PassError(
                "mixes no adapters",
                where=type(self.model).__name__,
                fix="materialize what together makes: peftc.materialize(peftc.together(…))",
            )
        self._rows: list[dict[str, float]] = [{self.names[0]: 1.0}]
        hooks = self.model._forward_pre_hooks.values()
        if self._mix and not any(isinstance(hook, _Fits) for hook in hooks):
            self.model.register_forward_pre_hook(_Fits(self._mix), with_kwargs=True)

    @property
    def active(self) -> list[dict[str, float]]:
        """The weights of what is on: one for all rows of a batch, or one for each."""
        return [dict(row) for row in self._rows]

    def use(self, which: Row | Sequence[Row], copies: int = 1) -> None:
        """Switches adapters.

        Args:
            which: An adapter's name, None for the base, weights by name for several at once; or a
                list of such, one for each row of the batches to come.
            copies: How many sequences `generate` makes of each row: its beams, or what it returns.

        Raises:
            PassError: No adapter has such a name, or what is asked for cannot be had at once.
        """
        rows = [*which] if isinstance(which, Sequence) and not isinstance(which, str) else [which]
        chosen = [_weights(row) for row in rows for _ in range(copies if len(rows) > 1 else 1)]
        raise_all(self._wrong(chosen))
        for name in self._prefixed():
            self._method(name).withdraw(self.model)
        for name in self._prefixed() & chosen[0].keys():
            own = self.program.adapters[name].prompts
            tensors = {local: self._tensor(fqn) for local, fqn in own.items()}
            self._method(name).enliven(self.model, tensors)
        if self._mix is not None:
            mix = [[row.get(name, 0.0) for name in self.names] for row in chosen]
            self._mix.rows = torch.tensor(mix, device=next(self.model.parameters()).device)
        self._rows = chosen

    @contextmanager
    def using(self, which: Row | Sequence[Row], copies: int = 1) -> Iterator[None]:
        """`use` for a while; what was on before is on again after."""
        before = self._rows
        self.use(which, copies)
        try:
            yield
        finally:
            self.use(before)

    def load(self, name: str, source: str | Path | Loaded) -> Loaded:
        """Puts another adapter in the place of one.

        An adapter of the same method and shapes is copied. Into a LoRA any other low-rank one goes
        too, whatever its method, scale and rank, if that is not above the LoRA's own; what it does
        not touch becomes zero. An empty slot is a fresh `Lora` of the rank that is to fit in.

        Args:
            name: The adapter that is replaced.
            source: A directory, an id on the hub, or what this returned before, which is fastest.

        Returns:
            The tensors in memory, to load them again.

        Raises:
            PeftcError: There is no adapter of that name, the directory is damaged, or what is in it
                does not fit (all that is wrong, before anything is changed).
        """
        raise_all(self._unknown([name]))
        loaded = source if isinstance(source, Loaded) else self._read(name, str(source))
        if loaded.name != name:
            raise AdapterError(
                f"was read for the adapter {loaded.name!r}, and {name!r} may have other shapes",
                where=f"adapter {name}",
                fix="load it there from its directory",
            )
        with torch.no_grad():
            for fqn, tensor in loaded.tensors.items():
                self._tensor(fqn).copy_(tensor)
        return loaded

    def _read(self, name: str, path: str) -> Loaded:
        """The values that an adapter in a directory has for the tensors of a slot."""
        slot, bare = alone(self.program, [name]), alone(self.program, [])
        attach = registry.load("attach").model_validate({"path": path, "adapter": name})
        raise_all(attach.check(bare))
        new = attach.run(bare).program
        mine, theirs = slot.adapters[name], new.adapters[name]
        if all(_alike(slot, new, fqn) for fqn in {*mine.sites, *theirs.sites}):
            own = {*mine.tensors.values(), *mine.frozen}
            return Loaded(name, {fqn: value(new.constants[fqn]) for fqn in own})
        found, refused = deltas(new)
        errors: list[PeftcError] = list(refused)
        tensors: dict[str, Tensor] = {}
        for fqn in {**dict.fromkeys(mine.sites), **found}:
            try:
                tensors |= _in_slot(slot.sites[fqn], name, slot, found.get(fqn))
            except PeftcError as error:
                errors.append(error)
        raise_all(errors[:SHOWN])
        return Loaded(name, tensors)

    def _wrong(self, rows: Sequence[Weights]) -> list[PeftcError]:
        """What keeps these rows from being on."""
        errors = self._unknown(dict.fromkeys(name for row in rows for name in row))
        if not rows:
            errors.append(PassError("names no row", where="use", fix="name an adapter, or None"))
        if errors:
            return errors
        tokens = [{n: w for n, w in row.items() if n in self._prefixed()} for row in rows]
        if any(row != tokens[0] for row in tokens):
            name = next(name for row in tokens for name in row)
            errors.append(
                PassError(
                    f"{name!r} puts virtual tokens before every row of a batch or before none",
                    where=f"adapter {name}",
                    fix="give the rows that use it a batch of their own",
                )
            )
        elif len(tokens[0]) > 1 or any(weight != 1 for weight in tokens[0].values()):
            errors.append(
                PassError(
                    f"{' and '.join(map(repr, tokens[0]))} put virtual tokens first: one of such "
                    "is on, with weight 1, or none",
                    where=f"adapter {next(iter(tokens[0]))}",
                    fix="switch to one of them",
                )
            )
        if len(rows) > 1:
            flat = [f for f, site in self.program.sites.items() if _scattered(site)]
            errors += [
                PassError(
                    "is of experts, which see tokens in an order of their own, and no rows",
                    where=fqn,
                    fix="use one adapter for the whole batch, or train them without experts",
                )
                for fqn in flat[:1]
            ]
        return errors

    def _unknown(self, names: Sequence[str] | Mapping[str, Any]) -> list[PeftcError]:
        return [
            PassError(
                f"there is no adapter {name!r}",
                where="adapters",
                fix=did_you_mean(str(name), self.names),
            )
            for name in names
            if name not in self.names
        ]

    def _method(self, name: str) -> Any:
        return self.program.adapters[name].method

    def _prefixed(self) -> set[str]:
        """The adapters that put virtual tokens before a sequence."""
        return {name for name in self.names if self.program.adapters[name].prefixed}

    def _tensor(self, fqn: str) -> Tensor:
        owner, _, leaf = fqn.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(owner), leaf)
        return tensor


@dataclass(frozen=True)
class Loaded:
    """An adapter in memory, as a slot holds it.

    Attributes:
        name: Of the slot.
        tensors: By their names in the model.
    """

    name: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Fits:
    """A hook that refuses a batch of another size than the rows that were chosen for it."""

    mix: Mix

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = self.mix.rows.shape[0]
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if rows > 1 and given and given[0].shape[0] != rows:
            raise PassError(
                f"a batch of {given[0].shape[0]}, and adapters were chosen for {rows} rows",
                where=type(module).__name__,
                fix="choose one for each row: use([…]), with copies= for beams",
            )


def _weights(row: Row) -> dict[str, float]:
    """What one row has on, by name."""
    if row is None:
        return {}
    if isinstance(row, Mapping):
        return {name: float(weight) for name, weight in row.items() if weight}
    return {row: 1.0}


def _scattered(site: Site) -> bool:
    """Whether a changed site sees rows in another order than the batch's."""
    return not site.is_plain and (site.kind.name == "experts" or ".experts." in site.fqn)


def _alike(slot: Program, new: Program, fqn: str) -> bool:
    """Whether a site of two programs differs in nothing but values."""
    one, other = slot.sites.get(fqn), new.sites.get(fqn)
    if one is None or other is None or one.graph is not other.graph:
        return False
    shapes = [{n: s.shape for n, s in p.specs(x).items()} for p, x in ((slot, one), (new, other))]
    return shapes[0] == shapes[1]


def _in_slot(site: Site, name: str, slot: Program, delta: Delta | None) -> dict[str, Tensor]:
    """The tensors of a LoRA at a site that add what another adapter adds there.

    Raises:
        AdapterError: There is no LoRA, its rank is too small, or what is added has none.
    """
    result = graphs.output(site.graph)
    y: Any = result.args[1] if len(result.args) > 1 else None
    added = sums(result, y) or []
    lora = lora_of(added[0].args[1]) if len(added) == 1 else None  # type: ignore[arg-type]
    if lora is None:
        raise AdapterError(
            f"the adapter {name!r} is no LoRA here, and another's values do not fit in it",
            where=site.fqn,
            fix=f"load one of the same method, shapes and targets, or make {name!r} a fresh Lora",
        )
    a, b = (slot.constants[site.name(str(node.target))].spec for node in lora[1:3])
    down, up = torch.zeros(a.shape), torch.zeros(b.shape)
    if delta is not None:
        if delta.factors is None or delta.bias is not None:
            raise AdapterError(
                "what it adds is no product of two small matrices, as a LoRA is",
                where=site.fqn,
                fix="attach it with the others instead: peftc.together",
            )
        wide, flat = map(value, delta.factors)
        if (rank := flat.shape[0]) > down.shape[0]:
            raise AdapterError(
                f"has rank {rank}, and {name!r} has room for {down.shape[0]}",
                where=site.fqn,
                fix=f"make room before: Lora(adapter={name!r}, rank={rank})",
            )
        down[:rank], up[:, :rank] = flat, wide / lora[3]
    return {site.name(str(node.target)): t for node, t in zip(lora[1:3], (down, up), strict=True)}
