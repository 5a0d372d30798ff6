"""The pipeline believes no pass: each is checked on its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import peftc
from peftc import Effect, Pass, PassResult, Pipeline, Program
from peftc.constants import Held
from peftc.errors import PassError, PeftcError, ProofError
from peftc.graphs import aten
from peftc.sites import SiteEditor

Change = Callable[[Program], Program]
Inject = Callable[[SiteEditor], None]


def told(claimed: Effect, change: Change, modified: bool = True) -> Pass:
    """A pass made of what it claims and what it does."""

    class Told(Pass):
        """Do something."""

        effect = claimed

        def run(self, program: Program) -> PassResult:
            return PassResult(change(program), modified)

    return Told()


def edit(inject: Inject) -> Change:
    """Rewrites site 0."""

    def change(program: Program) -> Program:
        editor = SiteEditor(program.sites["0"], "default")
        inject(editor)
        created = {f"0.{name}": constant for name, constant in editor.created.items()}
        return program.rewrite([editor.finish()], created)

    return change


def times(factor: float) -> Change:
    """Multiplies what site 0 computes."""

    def inject(site: SiteEditor) -> None:
        site.y = site.mul(site.y, factor)

    return edit(inject)


def grown(fqn: str, factor: float) -> Change:
    """Multiplies a tensor of the model."""

    def change(program: Program) -> Program:
        constant = program.constants[fqn]
        assert isinstance(constant, Held)
        return program.rewrite(constants={fqn: Held(constant.tensor.detach() * factor)})

    return change


def wide(site: SiteEditor) -> None:
    site.y = site.linear(site.y, site.parameter("w.weight", (7, 6)))


def flat(site: SiteEditor) -> None:
    site.y = site.op(aten.sum.dim_IntList, site.y, [0], True)


def double(site: SiteEditor) -> None:
    site.y = site.op(aten.to.dtype, site.y, torch.float64)


def clash(site: SiteEditor) -> None:
    site.y = site.linear(site.y, site.parameter("w.weight", (6, 5)))


def promoted(site: SiteEditor) -> None:
    site.y = site.add(site.y, site.parameter("shift.weight", (6,)))


def nowhere(site: SiteEditor) -> None:
    site.y = site.add(site.y, site.const("nowhere"))


def relabel(program: Program) -> Program:
    return program.rewrite([replace(program.sites["0"], shape=(7, 4))])


def forget(program: Program) -> Program:
    return replace(program, sites={"2": program.sites["2"]})


def nothing(program: Program) -> Program:
    return program


def capture(dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    return peftc.capture(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype))


@pytest.mark.parametrize(
    ("effect", "change"),
    [
        (Effect.IDENTITY, times(1 + 1e-6)),
        (Effect.IDENTITY, grown("0.weight", 1.001)),
        (Effect.IDENTITY, grown("0.bias", 1.001)),
        (Effect.IDENTITY, grown("1.weight", 1.001)),  # of no site: the norm's
        (Effect.EQUAL, grown("1.weight", 1.001)),
        (Effect.EQUAL, times(1 + 1e-4)),
        (Effect.EQUAL, times(0.0)),
        (Effect.CHANGES, times(float("nan"))),
        (Effect.CHANGES, times(float("inf"))),
        (Effect.CHANGES, grown("0.weight", float("nan"))),
        (Effect.BOUNDED, grown("0.bias", float("inf"))),
    ],
)
def test_pass_is_refused_when_its_numbers_are_not_its_effect(
    effect: Effect, change: Change
) -> None:
    with pytest.raises(ProofError, match=f"declares {effect}|not finite"):
        Pipeline([told(effect, change)]).run(capture())


@pytest.mark.parametrize(("change", "modified"), [(times(1.5), False), (nothing, True)])
def test_pass_is_refused_when_modified_is_wrong(change: Change, modified: bool) -> None:
    with pytest.raises(PassError, match=f"modified={modified}"):
        Pipeline([told(Effect.CHANGES, change, modified)]).run(capture())


@pytest.mark.parametrize("inject", [wide, flat, double, clash])
def test_pass_is_refused_when_its_output_has_another_shape_or_dtype(inject: Inject) -> None:
    with pytest.raises(PassError, match=r"^0: "):
        Pipeline([told(Effect.CHANGES, edit(inject))]).run(capture())


def test_pass_is_refused_when_it_forgets_the_bases_dtype() -> None:
    shift = told(Effect.IDENTITY, edit(promoted))
    assert Pipeline([shift]).run(capture()).journal[-1].modified
    with pytest.raises(PassError, match=r"^0: .*float32.*bfloat16"):
        Pipeline([shift]).run(capture(torch.bfloat16))


@pytest.mark.parametrize("change", [edit(nowhere), relabel, forget])
def test_pass_is_refused_when_its_program_does_not_hold_together(change: Change) -> None:
    with pytest.raises(PeftcError):
        Pipeline([told(Effect.CHANGES, change)]).run(capture())


@pytest.mark.parametrize(
    ("effect", "change", "measured"),
    [
        (Effect.IDENTITY, times(1.0), 0.0),
        (Effect.EQUAL, times(1 + 1e-6), 1e-6),
        (Effect.CHANGES, times(1.5), 0.5),
        (Effect.BOUNDED, grown("0.weight", 1.01), 1e-2),
    ],
)
def test_honest_pass_is_believed_and_written_down(
    effect: Effect, change: Change, measured: float
) -> None:
    before = capture()
    sites, constants = dict(before.sites), dict(before.constants)
    entry = Pipeline([told(effect, change)]).run(before).journal[-1]
    assert (entry.title, entry.effect, entry.sites, entry.modified) == ("told", effect, 1, True)
    assert entry.measured["at"] == "0"
    assert entry.measured["largest_relative_change"] == pytest.approx(measured, rel=0.3)
    assert (dict(before.sites), dict(before.constants)) == (sites, constants)


def test_later_passes_do_not_run_when_one_is_refused() -> None:
    ran: list[Program] = []

    def watched(program: Program) -> Program:
        ran.append(program)
        return program

    liar = told(Effect.IDENTITY, times(2.0))
    witness = told(Effect.CHANGES, watched, modified=False)
    with pytest.raises(ProofError):
        Pipeline([liar, witness]).run(capture())
    assert not ran
    Pipeline([witness]).run(capture())
    assert len(ran) == 1
