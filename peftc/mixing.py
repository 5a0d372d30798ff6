"""Mixing: several adapters on one base, of which every row of a batch has its own mix at run time.

At each site y = y₀ + Σₐ mₐ·(yₐ − y₀), where y₀ is what the base computes, yₐ what it computes with
adapter a alone, and m a table (rows, adapters) that the live model reads: ones and zeros choose,
other numbers weigh. Where an adapter only adds, yₐ − y₀ is its branch. So it holds for every method
that works on sites, and none has code for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from peftc import graphs
from peftc.constants import Initial
from peftc.deltas import again, alone
from peftc.errors import PassError, PeftcError, raise_all
from peftc.graphs import Builder, Spec, aten
from peftc.program import MIX, Program
from peftc.sites import Site

Gate = Callable[[Builder, int, fx.Node], fx.Node]


def together(*programs: Program) -> Program:
    """One program with the adapters of several, among which the rows of a batch choose.

    Materialize it and steer it with `peftc.Adapters`; at first the first adapter is on. Each is
    what it is on the base alone: where several are on at once, what they change adds up.

    Args:
        programs: Of one base, each with one adapter or more.

    Raises:
        PeftcError: The bases differ, two adapters have one name, or one cannot be had beside
            others (all such at once).
    """
    owners = {name: program for program in programs for name in program.adapters}
    raise_all(_obstacles(programs))
    bare = [alone(program, []) for program in programs]
    base = bare[0].rewrite(site for other in bare[1:] for site in other.sites.values())
    gated = [name for name, owner in owners.items() if not owner.adapters[name].prefixed]
    columns = list(owners)
    spec = Spec((1, len(columns)), torch.float32)
    mix = Initial(MIX, spec, "values", values=(1, *(0 for _ in columns[1:])))

    def gate(build: Builder, number: int, y: fx.Node) -> fx.Node:
        table = build.const(MIX)
        return build.op(torch.ops.peftc.gate.default, table, columns.index(gated[number]), y)

    singles = {name: alone(owners[name], [name]) for name in gated}
    sites = list(mixed(base, singles, gate))
    constants: dict[str, Any] = {site.name(MIX): mix for site in sites}
    aliases: dict[str, str] = dict(base.aliases)
    for program in (*singles.values(), *programs):
        constants |= {fqn: c for fqn, c in program.constants.items() if fqn not in base.constants}
        aliases |= program.aliases
    result = base.rewrite(sites, constants, aliases=aliases)
    for name, owner in owners.items():
        if name not in gated:
            result = again(result, owner, [name])
    adapters = {n: result.adapters.get(n) or p.adapters[n] for n, p in owners.items()}
    return replace(result, adapters=adapters, mixed=tuple(owners))


def mixed(base: Program, singles: Mapping[str, Program], gate: Gate) -> list[Site]:
    """The sites of a base that some adapter changes, as mixtures.

    Args:
        base: Without these adapters.
        singles: For each adapter the base with it alone.
        gate: The node by which what an adapter changes is multiplied: of its number and y₀.
    """
    sites = []
    for fqn, site in base.sites.items():
        graph, dropouts = site.graph, dict(site.dropouts)
        found = {
            number: single.sites[fqn]
            for number, single in enumerate(singles.values())
            if fqn in single.sites and single.sites[fqn].graph is not graph
        }
        if found:
            build = Builder()
            changed = {number: other.graph for number, other in found.items()}
            build.graph.output(mixture(build, graph, changed, gate))
            for other in found.values():
                dropouts |= other.dropouts
            sites.append(replace(site, graph=graphs.intern(build.graph), dropouts=dropouts))
    return sites


def mixture(build: Builder, base: fx.Graph, others: Mapping[int, fx.Graph], gate: Gate) -> fx.Node:
    """Adds y₀ + Σ gate·(y − y₀) of a site's base and of what its adapters make of it to a graph.

    What the graphs have in common is there once.
    """
    known = {_form(node, node.args): node for node in build.graph.nodes}
    y = total = _graft(build, base, known)
    for number, graph in others.items():
        changed, weight = _graft(build, graph, known), gate(build, number, y)
        added = sums(changed, y)
        if added is None:
            # In fp32 the difference is exact, so that a weight of one gives just what is chosen.
            wide = build.type_as(changed, weight), build.type_as(y, weight)
            branches: list[Any] = [build.op(aten.sub.Tensor, *wide)]
        else:
            branches = [node.args[1] for node in added]
        for branch in branches:
            total = build.add(total, build.mul(branch, weight))
    return build.type_as(total, y)


def _graft(build: Builder, graph: fx.Graph, known: dict[str, fx.Node]) -> fx.Node:
    """Adds what a graph computes and is not known yet; returns its result."""
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = build.input(str(node.target))
        elif node.op != "output":
            form = _form(node, fx.node.map_arg(node.args, env.__getitem__))
            if form not in known:
                known[form] = build.graph.node_copy(node, env.__getitem__)
            env[node] = known[form]
    return env[graphs.output(graph)]


def _form(node: fx.Node, args: Any) -> str:
    """What makes two nodes of one graph the same."""
    return f"{node.op} {node.target} {args}"


class Mix:
    """The table of a live model, which all of its sites hold.

    It is no buffer: torch.compile takes a buffer's shape for fixed, and batches vary.

    Attributes:
        rows: (1 or batch, adapters), fp32.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows


def sums(result: fx.Node, y: fx.Node) -> list[fx.Node] | None:
    """The sums of a node type_as(y + … + …, y), innermost first; None if it is anything else."""
    if result.target is not aten.type_as.default or result.args[1] is not y:
        return None
    found: list[fx.Node] = []
    total = result.args[0]
    while total is not y:
        if not isinstance(total, fx.Node) or total.target is not aten.add.Tensor:
            return None
        found.insert(0, total)
        total = total.args[0]
    return found


def _obstacles(programs: Sequence[Program]) -> list[PeftcError]:
    """What keeps adapters from standing side by side."""
    errors: list[PeftcError] = []
    seen: set[str] = set()
    for program in programs:
        errors += [
            PassError(
                f"two adapters are named {name!r}",
                where=f"adapter {name}",
                fix="give one another name: Attach(path=…, adapter=…)",
            )
            for name in program.adapters
            if name in seen
        ]
        seen |= program.adapters.keys()
        for name, adapter in program.adapters.items():
            if adapter.method is None:
                errors.append(
                    PassError(
                        "does not say what it adds", where=f"adapter {name}", fix="attach it again"
                    )
                )
            own = [fqn for fqn in adapter.tensors.values() if fqn in program.captured]
            if own:
                errors.append(
                    PassError(
                        f"trains {len(own)} of the base's own tensors, such as {own[0]}, of which "
                        "there is but one",
                        where=f"adapter {name}",
                        fix="merge it, or train it with bias='none' and no modules_to_save",
                    )
                )
    if not seen:
        errors.append(
            PassError("there is no adapter", where="together", fix="attach some before: Attach")
        )
    if not errors and any(_base(program) != _base(programs[0]) for program in programs[1:]):
        errors.append(
            PassError(
                "the adapters are on different bases",
                where="together",
                fix="attach each to the same program: base = peftc.capture(…)",
            )
        )
    return errors


def _base(program: Program) -> dict[str, str]:
    """What identifies a base: its weights as they are below all adapters."""
    constants = alone(program, []).constants
    return {fqn: constant.key for fqn, constant in constants.items()}
