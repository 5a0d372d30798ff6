"""The contract that every registered pass keeps, tested over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from peftc import Lora, Pass, Pipeline, Program, capture, materialize, registry
from peftc.contract import Effect, Method
from peftc.passes.nf4 import Nf4
from peftc.pipeline import run_pass

from .conftest import MakeAdapter, MakeCheckpoint, distance, logits

Make = Callable[[str], Pass]
pytestmark = pytest.mark.parametrize("name", registry.PASSES)


# Options with which a pass changes something that is not much the same by its defaults.
GIVEN: dict[str, dict[str, Any]] = {
    "combine": {"weights": {"a": 0.5, "b": 2.0}},
    "prune_ranks": {"budget": 20},
    "trainable_tokens": {"tokens": [3, 5]},
    "resize_vocabulary": {"size": 128},
    "replicate_layers": {"ranges": "0-2,1-2"},
}


def simplifies(name: str) -> bool:
    """Whether a pass works on what others added."""
    cls = registry.load(name)
    return cls.effect is Effect.EQUAL and not issubclass(cls, Method)


@pytest.fixture
def base(name: str, checkpoint: MakeCheckpoint) -> Path:
    """Gpt2 has biases, and a head that is tied; llama has neither."""
    return checkpoint("gpt2" if name in ("bitfit", "untie") else "llama")


@pytest.fixture
def make(base: Path, adapter: MakeAdapter) -> Make:
    """A pass with its required options given."""

    def build(name: str) -> Pass:
        cls = registry.load(name)
        required = {n for n, field in cls.model_fields.items() if field.is_required()}
        options = GIVEN.get(name, {})
        if "path" in required:
            options = {"path": str(adapter(base)), **options}
        assert required <= set(options), "give this contract a value for the new required option"
        return cls(**options)

    return build


@pytest.fixture
def program(name: str, base: Path) -> Program:
    """What the pass works on: a plain model, or one with an adapter for passes that need it."""
    plain = capture(base)
    if not simplifies(name) and name not in ("combine", "prune_ranks", "router"):
        return plain
    # Trained weights: with a fresh adapter folding would change nothing.
    loras = [Lora(rank=3, adapter=adapter) for adapter in "ab"]
    quantized = [Nf4()] if name in ("dequantize", "fuse") else []
    carrying = Pipeline([*quantized, *loras]).run(plain)
    torch.manual_seed(0)
    model = materialize(carrying)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    from peftc import absorb

    return absorb(carrying, model)


def test_pass_is_frozen_and_refuses_unknown_options(name: str, make: Make) -> None:
    made = make(name)
    with pytest.raises(ValidationError):
        type(made)(**{**made.model_dump(), "no_such_option": 1})
    for field in type(made).model_fields:
        with pytest.raises(ValidationError):
            setattr(made, field, None)


def test_pass_and_its_fields_are_described(name: str) -> None:
    cls = registry.load(name)
    summary = (cls.__doc__ or "").strip()
    assert "\n" not in summary.split("\n\n")[0] and summary.endswith(".")
    assert all(field.description for field in cls.model_fields.values())
    assert registry.name_of(cls) == name


def test_options_survive_json(name: str, make: Make) -> None:
    made = make(name)
    assert type(made)(**made.model_dump(mode="json", exclude_defaults=True)) == made


def test_check_finds_nothing_and_changes_nothing_when_all_is_well(
    name: str, make: Make, program: Program
) -> None:
    before = program.fingerprint
    assert make(name).check(program) == []
    assert replace(program).fingerprint == before  # worked out anew for a copy


def test_run_leaves_its_input_alone_and_tells_whether_it_changed(
    name: str, make: Make, program: Program
) -> None:
    before = program.fingerprint
    result = make(name).run(program)
    assert replace(program).fingerprint == before  # worked out anew for a copy
    assert result.modified == (result.program.fingerprint != before)
    assert result.modified


def test_run_is_deterministic(name: str, make: Make, program: Program) -> None:
    one, two = (make(name).run(program).program.fingerprint for _ in range(2))
    assert one == two


def test_pipeline_accepts_the_result_and_writes_the_journal(
    name: str, make: Make, program: Program
) -> None:
    after = run_pass(program, make(name))
    entry = after.journal[-1]
    assert (entry.title, entry.effect) == (name, registry.load(name).effect)
    if registry.load(name).structural:
        return  # its sites are others
    assert entry.sites == sum(
        site is not program.sites.get(fqn) or after.bindings(site) != program.bindings(site)
        for fqn, site in after.sites.items()
    )
    opened = {fqn for fqn, site in after.sites.items() if site.kind.opened}
    assert opened == set(program.sites)  # others a method makes on demand
    assert {c.spec for c in after.constants.values()} >= {c.spec for c in program.captured.values()}


def test_effect_holds_for_the_live_model(name: str, make: Make, program: Program) -> None:
    before = logits(materialize(program))
    after = logits(materialize(run_pass(program, make(name))))
    if after.shape != before.shape:  # new ids behind the old ones, or virtual tokens before them
        after = after[:, -before.shape[1] :, : before.shape[-1]]
    match registry.load(name).effect:
        case Effect.IDENTITY:
            assert torch.equal(before, after)
        case Effect.EQUAL:
            assert distance(after, before) < 1e-5
        case _:
            assert distance(after, before) > 1e-3


def test_pass_with_nothing_to_do_says_so(name: str, make: Make, base: Path) -> None:
    if simplifies(name):
        result = make(name).run(plain := capture(base))
        assert not result.modified and result.program is plain
