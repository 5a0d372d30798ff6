"""Routers over adapters, and tasks that share one A."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.nn.functional import linear, softmax

from peftc import (
    Adapters,
    Attach,
    Lora,
    Merge,
    Pass,
    Pipeline,
    Program,
    absorb,
    capture,
    materialize,
    to_peft,
    together,
)
from peftc.api import apply, load
from peftc.errors import FoldError, PassError
from peftc.passes.router import Router

from .conftest import MakeCheckpoint, auto, distance, logits
from .helpers import refuse
from .test_together import ids, made, passed, trained

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(checkpoint: MakeCheckpoint) -> Program:
    return capture(checkpoint())


@pytest.fixture(scope="module")
def experts(base: Program) -> Program:
    """Three trained adapters of two methods."""
    return passed(
        base, Lora(adapter="a", rank=4), Lora(adapter="b", rank=2, alpha=6),
        made("ia3", adapter="c", targets="q_proj,down_proj", feedforward="down_proj"),
    )  # fmt: skip


def fit(model: Any, steps: int, use: Any = None) -> list[float]:
    """Losses of some steps on one batch."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(ids(6), labels=ids(6)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("top", [None, 1, 2])
def test_routed_site_is_the_weighted_sum_of_what_experts_add(
    experts: Program, top: int | None
) -> None:
    routed = passed(experts, Router(experts="a,b", top=top))
    site: Any = materialize(routed).get_submodule(Q)
    x = torch.randn(2, 5, 48)
    with torch.no_grad():
        logits_ = linear(x, site.router.router.weight)
        if top:
            low = logits_.topk(top, -1).values[..., -1:]
            logits_ = logits_.masked_fill(logits_ < low, float("-inf"))
        weights = softmax(logits_, -1)
        want = linear(x, site.weight) * site.ia3_l.c.flatten()
        for k, (name, scale) in enumerate((("a", 1.0), ("b", 3.0))):
            a, b = (site.get_buffer(f"lora_{letter}.{name}.weight") for letter in "AB")
            want = want + weights[..., k : k + 1] * scale * linear(linear(x, a), b)
        assert distance(site(x), want) < 1e-5


def test_fresh_router_gives_each_expert_the_same_weight(base: Program, experts: Program) -> None:
    routed = Pipeline([Router(experts="a,b")]).run(experts)
    program = together(experts)
    model = materialize(program)
    Adapters(model, program).use({"a": 0.5, "b": 0.5})
    site, want = (
        m.get_submodule("model.layers.0.mlp.up_proj") for m in (materialize(routed), model)
    )
    x = torch.randn(2, 5, 48)
    with torch.no_grad():
        assert distance(site(x), want(x)) < 1e-6


def test_training_a_router_leaves_its_experts_alone(experts: Program) -> None:
    routed = Pipeline([Router()]).run(experts)
    model = materialize(routed)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses = fit(model, 20)
    assert losses[-1] < losses[0]
    assert all(buffer.equal(before[name]) for name, buffer in model.named_buffers())
    assert {name.split(".")[-3] for name in routed.trainable} == {"router"}


def test_experts_are_trained_too_when_asked(experts: Program) -> None:
    routed = Pipeline([Router(experts="a,b", train_experts=True)]).run(experts)
    assert {name.split(".")[-2] for name in routed.trainable if "lora_A" in name} == {"a", "b"}


def test_router_survives_apply_and_load(experts: Program, tmp_path: Path) -> None:
    for name in "ab":
        to_peft(experts, tmp_path / name, name)
    steps: list[Pass] = [Attach(path=str(tmp_path / n), adapter=n) for n in "ab"]
    base = experts.source.name
    assert base is not None
    apply(base, [*steps, Router(top=1)], tmp_path / "routed")
    routed = trained(load(tmp_path / "routed"))
    assert {name.split(".")[-2] for name in routed.trainable} == {"router"}
    for name in ("a", "b", "router"):
        to_peft(routed, tmp_path / "again" / name, name)
    attach = [Attach(path=str(tmp_path / "again" / n), adapter=n) for n in ("a", "b", "router")]
    back = Pipeline(attach).run(capture(base))
    assert torch.equal(logits(materialize(back)), logits(materialize(routed)))


def test_router_runs_as_one_compiled_graph(experts: Program) -> None:
    model = materialize(passed(experts, Router(top=2)))
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert distance(logits(compiled), logits(model)) < 1e-6


def test_merge_of_a_routed_program_is_refused(experts: Program, tmp_path: Path) -> None:
    routed = Pipeline([Router()]).run(experts)
    refuse(tmp_path, FoldError, lambda _: Pipeline([Merge()]).run(routed), "peftc.route")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": "a,x"}, ("no adapter 'x'",)),
        ({"experts": "a"}, ("no site has two experts",)),
        ({"top": 4}, ("experts", "lower top")),
        ({"targets": "k_proj", "experts": "a,c"}, ("fewer than two experts",)),
    ],
    ids=["name", "one", "top", "targets"],
)
def test_router_without_experts_to_weigh_is_refused(
    experts: Program, tmp_path: Path, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    router = Router(**options)
    refuse(tmp_path, PassError, lambda _: Pipeline([router]).run(experts), *words)


def test_router_over_a_prompt_is_refused(base: Program, tmp_path: Path) -> None:
    both = Pipeline([Lora(adapter="a"), made("prefix_tuning", adapter="p")]).run(base)
    refuse(tmp_path, PassError, lambda _: Pipeline([Router()]).run(both), "virtual tokens")


@pytest.fixture(scope="module")
def tasks(base: Program) -> Program:
    """Three tasks with a B each, and one A."""
    others = [Lora(adapter=n, rank=4, share_a="fr") for n in ("de", "it")]
    return Pipeline([Lora(adapter="fr", rank=4), *others]).run(base)


def test_tasks_train_one_a_and_a_b_each(tasks: Program, base: Program) -> None:
    program = together(tasks)
    model = materialize(program)
    a = model.get_parameter(f"{Q}.lora_A.fr.weight")
    assert all(model.get_parameter(f"{Q}.lora_A.{n}.weight") is a for n in ("de", "it"))
    plain = Pipeline([Lora(adapter=n, rank=4) for n in ("fr", "de", "it")]).run(base)
    counts = [
        sum(p.numel() for p in materialize(p_).parameters() if p.requires_grad)
        for p_ in (program, plain)
    ]
    assert counts[0] < 0.7 * counts[1]
    before = a.detach().clone()
    Adapters(model, program).use(["fr", "de", "it", "de", None, "it"])
    losses = fit(model, 15)
    assert losses[-1] < losses[0] and not a.equal(before)


def test_task_is_saved_as_a_lora_that_peft_loads(tasks: Program, tmp_path: Path) -> None:
    program = together(tasks)
    model = materialize(program)
    adapters = Adapters(model, program)
    adapters.use(["fr", "de", "it", "de", None, "it"])
    fit(model, 3)
    done = absorb(program, model)
    for name in ("fr", "de"):
        to_peft(done, tmp_path / name, name)
        adapters.use(name)
        base = program.source.name
        assert base is not None
        theirs = peft.PeftModel.from_pretrained(auto(Path(base)), tmp_path / name).eval()
        assert distance(logits(model.eval()), logits(theirs)) < 1e-6
    config = json.loads((tmp_path / "fr" / "adapter_config.json").read_text())
    assert "share_a" not in config


def test_shared_a_stays_one_when_applied_and_loaded(base: Program, tmp_path: Path) -> None:
    name = base.source.name
    assert name is not None
    apply(
        name,
        [Lora(adapter="fr", rank=4), Lora(adapter="de", rank=4, share_a="fr")],
        tmp_path / "tasks",
    )
    model = materialize(load(tmp_path / "tasks"))
    parameters = [model.get_parameter(f"{Q}.lora_A.{n}.weight") for n in ("fr", "de")]
    assert parameters[0] is parameters[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share_a": "fx"}, ("no LoRA named 'fx'", "there are: c, fr")),
        ({"share_a": "fr", "rank": 8}, ("'fr' has no A of rank 8",)),
        ({"share_a": "fr", "init": "pissa"}, ("starts A anew",)),
        ({"share_a": "c"}, ("no LoRA named 'c'",)),
    ],
    ids=["name", "rank", "start", "method"],
)
def test_a_that_cannot_be_shared_is_refused(
    base: Program, tmp_path: Path, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    steps = [Lora(adapter="fr", rank=4), made("ia3", adapter="c")]
    last = Lora(**{"adapter": "de", "rank": 4, **options})
    program = Pipeline(steps).run(base)
    refuse(tmp_path, PassError, lambda _: Pipeline([last]).run(program), *words)
