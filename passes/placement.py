"""Where methods stand that work on whole modules: sites made on demand, of what is not opened."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from peftc.errors import PassError, PeftcError, SelectionError

if TYPE_CHECKING:
    from peftc.kinds import Kind
    from peftc.program import Program
    from peftc.sites import Site

Found = tuple[list["Site"], list[PeftcError]]


def module_sites(
    program: Program,
    names: Sequence[str],
    kinds: Collection[str],
    beside: bool,
    width: int | None = None,
) -> Found:
    """Named modules as sites: those that are sites of these kinds as they are, others unopened.

    Args:
        program: What has the modules.
        names: The modules.
        kinds: The kinds of site that a method serves.
        beside: Whether it needs the features of what a module takes, not only of what it gives.
        width: Features where the pass on sample input did not show them.

    Returns:
        The sites, and an error for each module whose features are not known.
    """
    from peftc.kinds import ModuleKind

    roles = program.source.roles()
    sites: list[Site] = []
    errors: list[PeftcError] = []
    for fqn in names:
        site = program.sites.get(fqn)
        if site is not None and site.kind.name in kinds:
            sites.append(site)
            continue
        given, gives = (width or 0, width or 0)
        if roles is not None:
            given, gives = roles.features.get(fqn, (given, gives))
        if gives and (given or not beside):
            sites.append(_made(fqn, ModuleKind(), (gives, given), program))
            continue
        errors.append(
            PassError(
                "has no known number of features: no pass on sample input shows them",
                where=fqn,
                fix="say it: width=…, or exclude this module",
            )
        )
    return sites, errors


def sublayer_sites(
    program: Program,
    roles: Collection[str],
    normed: bool,
    choose: Callable[[Program, list[str]], tuple[list[str], list[PeftcError]]],
) -> Found:
    """The places where the model adds what attention or a feed-forward gives to its stream.

    Args:
        program: What has them.
        roles: Of which sublayers.
        normed: Whether to stand within the normalization that follows, where one does.
        choose: Those of the places' names that are wanted.

    Returns:
        A site each, whose `stream` is what the sublayer took; and why there is none.
    """
    from peftc.kinds import ModuleKind, NormKind

    shown = program.source.roles()
    at: dict[str, tuple[Kind, tuple[int, ...]]] = {}
    for found in shown.sublayers if shown else ():
        if found.role in roles and shown is not None:
            width = shown.features[found.exit][1]
            if normed and found.norm:
                at[found.norm] = NormKind(found.entry, width, found.eps), (width,)
            else:
                at[found.exit] = ModuleKind(found.entry), (width, width)
    if not at:
        what = "no attention or feed-forward that adds to a stream is seen in the model"
        return [], [SelectionError(what, fix="name the modules: targets=…")]
    names, errors = choose(program, list(at))
    if not names and not errors:
        errors = [SelectionError("no sublayer is left", fix="narrow exclude and leave_out")]
    sites = []
    for fqn in names:
        kind, shape = at[fqn]
        own = program.sites.get(fqn)
        if own is not None and not own.kind.opened and own.kind != kind:
            own = replace(own, kind=kind)  # until now it had no use for a stream
        sites.append(own or _made(fqn, kind, shape, program))
    return sites, errors


def _made(fqn: str, kind: Kind, shape: tuple[int, ...], program: Program) -> Site:
    """A new site of a module."""
    from peftc.sites import Site, template

    bias = kind.name == "norm" and f"{fqn}.bias" in program.constants
    graph = template(kind, bias)
    return Site(fqn, kind, graph, graph, shape, bias)
