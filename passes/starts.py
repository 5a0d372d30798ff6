"""Starts of LoRA that are a part of the weight, which the weight loses: PiSSA and OLoRA.

PiSSA, Meng et al. 2024, arXiv:2404.02948, eqs. 2-4: A and B are those of the largest singular
values. OLoRA, Büyükakyüz 2024, arXiv:2406.01775, §3: of the QR decomposition's first columns. The
base is W − s·B·A then. The factors are small: they are worked out once for a site, and held.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from peftc.errors import PassError, PeftcError, raise_all
from peftc.passes.lora import Lora

if TYPE_CHECKING:
    from torch import fx

    from peftc.constants import Constant
    from peftc.graphs import Builder
    from peftc.program import Adapter, Program
    from peftc.sites import Site, SiteEditor


def take(site: SiteEditor, init: str, rank: int, scale: float) -> tuple[Constant, Constant]:
    """Takes the start of A and B out of the site's weight.

    Args:
        site: Its weight is W − s·B·A then.
        init: See `peftc.ops.start`.
        rank: Of A and B.
        scale: The s of the branch.
    """
    import torch

    from peftc.algebra import settled
    from peftc.constants import Held, derive
    from peftc.evaluate import value
    from peftc.graphs import Builder, aten

    build, kind, weight = Builder(), site.kind, site.bound["weight"]
    matrix = kind.matrix(build, build.const("weight"))
    found = build.op(torch.ops.peftc.start.default, matrix, rank, init, site.seed)
    even = init == "olora"  # which divides nothing by s
    build.graph.output(found if even else build.mul(found, 1 / math.sqrt(scale)))
    both = derive(build.graph, {"weight": weight}, torch.float32)
    name = _input(site.adapter)
    constants = {"weight": weight, name: Held(value(both), both.key)}

    build = Builder()
    b, a = _halves(build, name, site.out_features)
    rest = build.op(
        aten.sub.Tensor,
        kind.matrix(build, build.const("weight")),
        build.mul(build.mm(b, a), scale),
    )
    build.graph.output(settled(build, kind.stored(build, rest, site.site.shape), kind))
    site.rebind("weight", derive(build.graph, constants, weight.spec.dtype))
    return start_of(constants[name], site.site)


def start_of(both: Constant, site: Site) -> tuple[Constant, Constant]:
    """A and B of the constant that holds both."""
    import torch

    from peftc.constants import derive
    from peftc.graphs import Builder

    halves = []
    for half in (1, 0):
        build = Builder()
        build.graph.output(_halves(build, "both", site.out_features)[half])
        halves.append(derive(build.graph, {"both": both}, torch.float32))
    return halves[0], halves[1]


def _input(adapter: str) -> str:
    return f"{adapter}.start"


def _halves(build: Builder, name: str, out: int) -> tuple[fx.Node, fx.Node]:
    """B and A in a graph."""
    from peftc.graphs import aten

    both = build.const(name)
    b = build.op(aten.slice.Tensor, both, 0, 0, out)
    return b, build.t(build.op(aten.slice.Tensor, both, 0, out))


def restore_base(program: Program) -> Program:
    """The same model on its original base: each PiSSA or OLoRA adapter as a plain LoRA.

    What was trained differs from the start by s·(B·A − B₀·A₀), which is a LoRA of twice the rank:
    no digit is lost, and PEFT loads it on the base that everyone has.

    Raises:
        PassError: A weight was changed since the adapter took its start from it.
    """
    errors: list[PeftcError] = []
    for adapter in reversed(list(program.adapters.values())):
        if isinstance(adapter.method, Lora) and adapter.method.moves_base:
            program = _restored(program, adapter, adapter.method, errors)
    raise_all(errors)
    return program


def _restored(
    program: Program, adapter: Adapter, method: Lora, errors: list[PeftcError]
) -> Program:
    from peftc.constants import Derived

    constants: dict[str, Constant] = {}
    for fqn in adapter.sites:
        site = program.sites[fqn]
        weight = program.constants[name := site.name("weight")]
        if not isinstance(weight, Derived) or _input(adapter.name) not in weight.inputs:
            errors.append(
                PassError("was changed since it was adapted", where=name, fix="restore it before")
            )
            continue
        constants[name] = weight.inputs["weight"]
        starts = start_of(weight.inputs[_input(adapter.name)], site)
        for letter, start, dim in zip("AB", starts, (0, 1), strict=True):
            own = site.name(f"lora_{letter}.{adapter.name}.weight")
            constants[own] = _beside(program.constants[own], start, dim)
    factor = math.sqrt(2) if method.rslora else 2
    plain = method.model_copy(
        update={
            "init": "kaiming",
            "rank": 2 * method.rank,
            "alpha": factor * (method.alpha or method.rank),
            "rank_pattern": {key: 2 * rank for key, rank in method.rank_pattern.items()},
            "alpha_pattern": {key: factor * alpha for key, alpha in method.alpha_pattern.items()},
        }
    )
    after = replace(adapter, config=plain.peft_config(), method=plain)
    return program.rewrite(constants=constants, adapters={**program.adapters, adapter.name: after})


def _beside(trained: Constant, start: Constant, dim: int) -> Constant:
    """[A; A₀] or [B, −B₀]."""
    import torch

    from peftc.constants import derive
    from peftc.graphs import Builder, aten

    build = Builder()
    other = build.const("start") if dim == 0 else build.mul(build.const("start"), -1.0)
    build.graph.output(build.op(aten.cat.default, [build.const("trained"), other], dim))
    return derive(build.graph, {"trained": trained, "start": start}, torch.float32)
