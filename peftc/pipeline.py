"""Pipelines: passes run in order, each checked on its result before the next one sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftc import graphs, registry
from peftc.constants import Constant
from peftc.contract import Effect, Pass
from peftc.errors import PassError, PeftcError, ProofError, TiedWeightError, located, raise_all
from peftc.evaluate import Evaluation, single_threaded
from peftc.graphs import Spec
from peftc.program import Entry, Program
from peftc.progress import SILENT, Progress
from peftc.sites import Site

EQUAL_BOUND = 1e-5  # fp32 rounding of a sum in another order
_REPORT = "this is a bug in the pass; please report it with the recipe"
FEATURES = 32  # of each site's output, per check


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run."""

    passes: Sequence[Pass]

    def run(self, program: Program, progress: Progress = SILENT) -> Program:
        """Runs every pass and checks it on its result.

        Args:
            program: What the first pass works on.
            progress: Told of each pass.

        Raises:
            PeftcError: A pass cannot run on this program (all of its violations at once), or its
                result is not what it declared.
        """
        for pass_ in self.passes:
            for step in (*pass_.needs(program), pass_):
                with single_threaded():
                    program = run_pass(program, step)
                progress.passed(program.journal[-1])
        return program


def run_pass(program: Program, pass_: Pass) -> Program:
    """One pass: check, run, check the result, write the journal."""
    title = registry.name_of(type(pass_))
    raise_all(located(pass_.check(program), f"pass {title}"))
    result = pass_.run(program)
    after = result.program
    raise_all(_losses(program, after, title, pass_.structural))
    changed = [
        fqn
        for fqn, site in after.sites.items()
        if site is not program.sites.get(fqn) or _rebound(program, after, site)
    ]
    raise_all(_violations(program, after, changed, title, pass_.structural))
    if result.modified != (after.fingerprint != program.fingerprint):
        raise PassError(
            f"pass {title} says modified={result.modified}, and that is not so", fix=_REPORT
        )
    change = _measure(program, after, changed, pass_, title, result.origins)
    measured = {**change, **result.measured}
    entry = Entry(
        title, _options(pass_), pass_.declared().value, len(changed), result.modified, measured
    )
    return replace(after, journal=(*program.journal, entry))


def _options(pass_: Pass) -> dict[str, Any]:
    """The options that differ from their defaults."""
    return pass_.model_dump(mode="json", exclude_defaults=True)


def _rebound(before: Program, after: Program, site: Site) -> bool:
    names = map(site.name, graphs.constant_names(site.graph))
    return any(after.constants[name] is not before.constants.get(name) for name in names)


def _losses(before: Program, after: Program, title: str, structural: bool) -> list[PeftcError]:
    """Sites that are gone, and constants that a graph names and the program does not have."""
    errors: list[PeftcError] = [
        PassError(f"pass {title} lost this site", where=fqn, fix=_REPORT)
        for fqn in before.sites.keys() - after.sites.keys()
        if not structural
    ]
    if after.source is not before.source and not structural:
        errors.append(PassError(f"pass {title} changed the model's structure", fix=_REPORT))
    for fqn, site in after.sites.items():
        for name in graphs.constant_names(site.graph):
            if site.name(name) not in after.constants:
                errors.append(
                    PassError(f"pass {title} names no constant {name!r}", where=fqn, fix=_REPORT)
                )
    return errors


def _violations(
    before: Program, after: Program, changed: list[str], title: str, structural: bool
) -> list[PeftcError]:
    """What is wrong with a result whatever its numbers: graphs, shapes, dtypes, tied weights."""
    errors: list[PeftcError] = []
    seen: set[Any] = set()
    for fqn in changed:
        site, old = after.sites[fqn], before.sites.get(fqn)
        specs = after.specs(site)
        key = site.graph, site.kind, site.shape, tuple(sorted(specs.items()))
        try:
            if key not in seen:
                site.graph.lint()
                weight = after.weight_of(site)
                dtype = weight.spec.dtype if weight else torch.float32
                inputs = site.kind.specs(site.shape, dtype)
                y, want = (
                    graphs.propagate(graph, given, inputs)[graphs.output(graph)]
                    for graph, given in (
                        (site.graph, specs),
                        (site.plain, _plain_specs(after, site)),
                    )
                )
                if y.dtype != want.dtype:
                    raise RuntimeError(f"its output is {y.dtype}, and was {want.dtype}")
                if y.shape != want.shape:
                    raise RuntimeError(f"its output has the shape {y.shape}, and had {want.shape}")
                seen.add(key)
        except (RuntimeError, TypeError) as error:
            errors.append(
                PassError(f"pass {title} left a graph that fails: {error}", where=fqn, fix=_REPORT)
            )
        alike = old is None or old.kind == site.kind or not site.kind.opened
        features = old is None or (alike and old.shape == site.shape)
        if not (features or structural):
            errors.append(
                PassError(f"pass {title} changed the site's features", where=fqn, fix=_REPORT)
            )
    for tied, owner in after.aliases.items():
        one, other = after.constants.get(tied), after.constants.get(owner)
        same = one is before.constants.get(tied), other is before.constants.get(owner)
        if all(same) or (one and other and one.key == other.key):
            continue
        changed_one, kept = (owner, tied) if same[0] else (tied, owner)
        errors.append(
            TiedWeightError(
                f"is tied to {kept}: pass {title} would make them differ",
                where=changed_one,
                fix="undo the tie before (the pass untie), exclude it "
                f"({changed_one.rsplit('.', 1)[0]}), or keep its adapter unmerged",
            )
        )
    return errors


def _plain_specs(program: Program, site: Site) -> dict[str, Spec]:
    return {name: constant.spec for name, constant in program.plain_bindings(site).items()}


def _measure(
    before: Program,
    after: Program,
    changed: list[str],
    pass_: Pass,
    title: str,
    origins: Mapping[str, str],
) -> dict[str, Any]:
    """The effect by number: each changed site on random input, some features of its output."""
    worst, where, effect = 0.0, None, pass_.declared()
    for fqn in changed:
        site, old = after.sites[fqn], before.sites.get(origins.get(fqn, fqn))
        if old is None and site.kind.opened:
            continue
        old = old or replace(site, graph=site.plain)  # made on demand, of a module as it was
        error = site_error(fqn, (old, before.bindings(old)), (site, after.bindings(site)))
        if not error < float("inf"):
            raise ProofError(
                f"pass {title} gives values that are not finite",
                where=fqn,
                fix="look for a NaN or an infinity in its weight, and repair or exclude it"
                if effect is Effect.BOUNDED
                else _REPORT,
            )
        if error and fqn in origins:
            raise ProofError(
                f"pass {title} says it is a copy of {origins[fqn]}, and it differs by {error:.2e}",
                where=fqn,
                fix=_REPORT,
            )
        if error >= worst:
            worst, where = error, fqn
    bound = {Effect.IDENTITY: 0.0, Effect.EQUAL: EQUAL_BOUND}.get(effect)
    if bound is not None:
        owners = (*(prefix for fqn in changed for prefix in (f"{fqn}.", f"{fqn}_")),)
        for fqn, constant in before.constants.items():
            now = after.constants.get(fqn)
            inside = any(n in changed or n.startswith(owners) for n in before.names_of(fqn))
            # Of another shape: a structural pass's, and no site has it.
            resized = pass_.structural and now is not None and now.spec != constant.spec
            if now is not constant and not inside and not resized:
                raise ProofError(
                    f"pass {title} declares {effect.value}, and changes a tensor of no site",
                    where=fqn,
                    fix=_REPORT,
                )
    if bound is not None and worst > bound:
        raise ProofError(
            f"pass {title} declares {effect.value}, and changes the output by {worst:.2e} of its "
            f"largest value (bound {bound:g})",
            where=where,
            fix=_REPORT,
        )
    return {"largest_relative_change": worst, "at": where} if changed else {}


Bound = tuple[Site, Mapping[str, Constant]]


def site_error(fqn: str, one: Bound, other: Bound) -> float:
    """How much two forms of a site differ, over the largest value of the first, in fp32.

    Both see the same random input, drawn from the site's name. Of a linear layer a window of
    features is compared, so that only those rows of the weights are read.
    """
    site = one[0]
    seed = int.from_bytes(hashlib.sha256(fqn.encode()).digest()[:7], "little")
    inputs = site.kind.example(site.shape, torch.Generator().manual_seed(seed))
    if site.kind.by_rows:
        low = seed % max(1, site.out_features - FEATURES + 1)
        high = min(low + FEATURES, site.out_features)
        a, b = (
            Evaluation(form.graph, bound, inputs).rows(low, high) for form, bound in (one, other)
        )
    else:
        a, b = (Evaluation(form.graph, bound, inputs).whole() for form, bound in (one, other))
    scale = a.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((a - b).abs().max() / scale)
