"""What adapters add to each site, read off the folded graphs of a program that carries just them.

So it holds for every method that folds, and no method has code for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from peftc import graphs
from peftc.algebra import fold_sites
from peftc.constants import Constant
from peftc.errors import AdapterError, FoldError, PassError, PeftcError, Violations
from peftc.evaluate import Evaluation, chunks, single_threaded
from peftc.factors import Delta, delta_of
from peftc.graphs import Builder
from peftc.program import Adapter, Program
from peftc.sites import Site


def alone(program: Program, names: Sequence[str]) -> Program:
    """The program with just these adapters, on its plain sites and its weights as they are."""
    owned = {fqn for adapter in program.adapters.values() for fqn in _owned(program, adapter)}
    touched = {fqn for adapter in program.adapters.values() for fqn in adapter.sites}
    plain = [
        replace(site, graph=site.plain, dropouts={})
        for fqn, site in program.sites.items()
        if fqn in touched
    ]
    return again(replace(program.without(owned), adapters={}).rewrite(plain), program, names)


def again(onto: Program, program: Program, names: Sequence[str]) -> Program:
    """A program that these adapters of another one are added to, with their tensors."""
    for name in names:
        adapter = program.adapters[name]
        assert adapter.method is not None
        locals_ = _locals(program, adapter)
        given = {
            fqn: {
                local: program.constants[site.name(local)]
                for local in locals_
                if site.name(local) in program.constants
            }
            for fqn, site in program.sites.items()
            if fqn in adapter.sites
        }
        common = {key: program.constants[fqn] for key, fqn in adapter.prompts.items()}
        onto = onto.inject(adapter.method, list(given), given, common)
    return onto


def _owned(program: Program, adapter: Adapter) -> set[str]:
    """The tensors that an adapter brought, at every site, by their names in the model."""
    locals_ = _locals(program, adapter)
    named = {program.sites[fqn].name(local) for fqn in adapter.sites for local in locals_}
    owned = named | adapter.frozen | {*adapter.prompts.values()}
    return owned & program.constants.keys() - program.captured.keys()


def _locals(program: Program, adapter: Adapter) -> set[str]:
    """The names that an adapter's own tensors have at its sites, those that they share too."""
    prefixes = [program.sites[fqn].name("\0").rstrip("\0") for fqn in adapter.sites]
    prefixes.sort(key=len, reverse=True)  # of nested sites the inner one's
    whole = {*program.captured, *adapter.prompts.values()}
    own = [fqn for fqn in adapter.tensors.values() if fqn not in whole]
    return {next(fqn.removeprefix(p) for p in prefixes if fqn.startswith(p)) for fqn in own}


def unstackable(program: Program) -> list[PeftcError]:
    """Sites that are not their plain form with the program's adapters on it, one after another."""
    if lost := [name for name, adapter in program.adapters.items() if adapter.method is None]:
        return [
            PassError(f"the adapter {name!r} does not say what it adds", fix="attach it again")
            for name in lost
        ]
    try:
        sites: Mapping[str, Site | None] = alone(program, list(program.adapters)).sites
    except (AdapterError, Violations):  # some sites of an adapter are folded, and its tensors gone
        sites = dict.fromkeys(fqn for a in program.adapters.values() for fqn in a.sites)
    changed = [fqn for fqn, site in sites.items() if not _same(site, program.sites[fqn])]
    return [
        PassError(
            f"was rewritten by more than its adapters, as {len(changed)} sites were",
            where=fqn,
            fix="do this before passes such as fold",
        )
        for fqn in changed[:1]
    ]


def _same(one: Site | None, other: Site) -> bool:
    return one is not None and one.graph is other.graph


def untold(program: Program, names: Sequence[str]) -> list[PeftcError]:
    """An error for each of these adapters that trains tensors of the base: no ΔW holds them."""
    errors: list[PeftcError] = []
    base = program.captured
    for name in names:
        if program.adapters[name].prefixed:
            errors.append(
                PassError(
                    f"the adapter {name!r} puts virtual tokens before each sequence, and changes "
                    "no weights",
                    where=f"adapter {name}",
                    fix="keep it as it is: --format peft, without --canonical",
                )
            )
            continue
        trained = [fqn for fqn in program.adapters[name].tensors.values() if fqn in base]
        if trained:
            errors.append(
                PassError(
                    f"the adapter {name!r} trains {len(trained)} of the base's own tensors (biases "
                    f"or modules_to_save), such as {trained[0]}",
                    where=trained[0],
                    fix="merge it (--merge), or train it with bias='none' and no modules_to_save",
                )
            )
    return errors


def deltas(program: Program) -> tuple[dict[str, Delta], list[FoldError]]:
    """What a program's adapters together add to each site, and the sites that do not fold."""
    folded, errors = fold_sites(program)
    result: dict[str, Delta] = {}
    for fqn, site in program.sites.items():
        if site.is_plain or not folded.sites[fqn].is_plain:
            continue
        names = [local for local in ("weight", "bias") if site.name(local) in program.captured]
        before, after = (
            {local: which.constants[site.name(local)] for local in names}
            for which in (program, folded)
        )
        if (delta := delta_of(site, before, after)) is not None:
            result[fqn] = delta
    return result, errors


def deviation(got: Constant, want: Constant) -> float:
    """‖got − want‖_F / ‖want‖_F, some rows at a time; against zeros, 0 or infinite."""
    a, b = (_evaluation(constant) for constant in (got, want))
    wrong = size = 0.0
    with single_threaded():
        for low, high in chunks(want.spec.shape):
            should = b.rows(low, high)
            wrong += _norm(a.rows(low, high) - should) ** 2
            size += _norm(should) ** 2
    return math.sqrt(wrong / size) if size else (0.0 if wrong == 0 else math.inf)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _evaluation(constant: Constant) -> Evaluation:
    build = Builder()
    build.graph.output(build.const("value"))
    return Evaluation(graphs.intern(build.graph), {"value": constant})
