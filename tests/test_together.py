"""Many adapters on one base: switched, weighed, mixed within a batch, and exchanged in place."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch._dynamo.testing
import transformers
from torch import nn

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
    registry,
    to_peft,
    together,
)
from peftc.errors import AdapterError, FoldError, PassError, PeftcError

from .conftest import SMALL, MakeAdapter, MakeCheckpoint, auto, distance, logits
from .helpers import refuse

# Methods by the names that the adapters get here, those that mix rows first.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4}, "dora": {"rank": 3}, "ia3": {}, "vera": {"rank": 8}, "loha": {"rank": 2},
    "oft": {"block_size": 8}, "adalora": {"init_r": 4, "target_r": 2}, "bottleneck": {},
    "trainable_tokens": {"tokens": [3, 5]},
    "prefix_tuning": {"virtual_tokens": 3}, "prompt_tuning": {"virtual_tokens": 4},
    "p_tuning": {"virtual_tokens": 5},
}  # fmt: skip
ROWWISE = [name for name in METHODS if name[:2] != "pr" and name != "p_tuning"]
Named = dict[str, Program]


def trained(program: Program) -> Program:
    """A program with random values for what it trains."""
    torch.manual_seed(5)
    model = materialize(program)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return absorb(program, model)


def passed(base: Program, *passes: Pass) -> Program:
    return trained(Pipeline(passes).run(base))


def made(name: str, **options: Any) -> Pass:
    return registry.load(name).model_validate(options)


def ids(rows: int = 8, length: int = 7) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(checkpoint: MakeCheckpoint) -> Program:
    return capture(checkpoint())


@pytest.fixture(scope="module")
def alone(base: Program) -> Named:
    """Each method's adapter by itself."""
    return {
        name: passed(base, made(name, adapter=name, **options)) for name, options in METHODS.items()
    }


@pytest.fixture(scope="module")
def loras(base: Program) -> Named:
    """Four LoRAs of different ranks, scales and targets."""
    options: dict[str, dict[str, Any]] = {
        "a": {"rank": 4}, "b": {"rank": 8, "alpha": 4},
        "c": {"rank": 2, "targets": "q_proj,v_proj"},
        "d": {"rank": 6, "rslora": True, "dropout": 0.1},
    }  # fmt: skip
    return {name: passed(base, Lora(adapter=name, **given)) for name, given in options.items()}


def live(programs: Named, **options: Any) -> tuple[nn.Module, Adapters]:
    program = together(*programs.values())
    model = materialize(program, **options)
    return model, Adapters(model, program)


@pytest.mark.parametrize("name", METHODS)
def test_chosen_adapter_computes_what_it_does_alone(alone: Named, name: str) -> None:
    model, adapters = live(alone)
    adapters.use(name)
    assert distance(logits(model), logits(materialize(alone[name]))) < 1e-6


def test_no_adapter_is_the_base_to_the_bit(alone: Named, base: Program) -> None:
    model, adapters = live(alone)
    adapters.use(None)
    assert torch.equal(logits(model), logits(materialize(base)))


def test_first_adapter_is_on_at_first(loras: Named) -> None:
    model, adapters = live(loras)
    assert adapters.active == [{"a": 1.0}]
    assert torch.equal(logits(model), logits(materialize(loras["a"])))


def test_mixed_batch_equals_single_runs_with_one_compiled_graph(loras: Named) -> None:
    model, adapters = live(loras)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    adapters.use([*"abcdabcd"])
    mixed = logits(compiled, ids())
    adapters.use([*"ddbbccaa"])
    logits(compiled, ids())
    for row, name in enumerate("abcdabcd"):
        single = logits(materialize(loras[name]), ids()[row : row + 1])
        assert distance(mixed[row : row + 1], single) < 1e-5
    assert counter.frame_count == 1


def test_methods_mix_within_a_batch(alone: Named) -> None:
    model, adapters = live(alone)
    rows = [*ROWWISE, None]
    adapters.use(rows)
    mixed = logits(model, ids(len(rows)))
    for row, name in enumerate(rows):
        adapters.use(name)
        single = logits(model, ids(len(rows))[row : row + 1])
        assert distance(mixed[row : row + 1], single) < 1e-5, name


def test_mixed_batch_equals_peft_s(checkpoint: MakeCheckpoint, adapter: MakeAdapter) -> None:
    path = checkpoint()
    folders = {"x": adapter(path), "y": adapter(path, 1, r=8, target_modules=["q_proj"])}
    base = capture(path)
    programs = [Pipeline([Attach(path=str(p), adapter=n)]).run(base) for n, p in folders.items()]
    model, adapters = live({str(i): program for i, program in enumerate(programs)})
    theirs = peft.PeftModel.from_pretrained(auto(path), folders["x"], adapter_name="x").eval()
    theirs.load_adapter(folders["y"], adapter_name="y")
    adapters.use(["x", None, "y", "x"])
    with torch.no_grad():
        want = theirs(ids(4), adapter_names=["x", "__base__", "y", "x"]).logits
    assert distance(logits(model, ids(4)), want) < 1e-6


def test_thousand_switches_compile_once_and_take_no_memory(loras: Named) -> None:
    model, adapters = live(loras)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    seen = []
    for number in range(1000):
        adapters.use("abcd"[number % 4])
        if number % 10 == 0:
            logits(compiled, ids(2, 3))
        if number in (99, 999):
            gc.collect()
            seen.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))
    assert counter.frame_count == 1
    assert seen[1] <= seen[0]


def test_batches_of_other_sizes_compile_no_more(loras: Named) -> None:
    model, adapters = live(loras)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    counts = []
    for rows in (8, 6, 4, 7):
        adapters.use([*"abcdabcd"][:rows])
        logits(compiled, ids(rows, rows + 2))
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 3


def test_weights_scale_what_adapters_add(base: Program, loras: Named, tmp_path: Path) -> None:
    model, adapters = live(loras)
    for name in "ab":
        to_peft(loras[name], tmp_path / name)
    given = {"a": 0.5, "b": -2.0}
    attach = [Attach(path=str(tmp_path / n), adapter=n, weight=w) for n, w in given.items()]
    want = logits(materialize(Pipeline(attach).run(base)))
    adapters.use(given)
    assert distance(logits(model), want) < 1e-6
    adapters.use([given, None])
    assert distance(logits(model)[:1], want[:1]) < 1e-6


def test_chosen_adapter_that_does_not_only_add_is_exact_in_bf16(
    checkpoint: MakeCheckpoint,
) -> None:
    base = capture(checkpoint(dtype=torch.bfloat16))
    programs = {name: passed(base, made(name, adapter=name)) for name in ("ia3", "oft")}
    model, adapters = live(programs)
    for name, program in programs.items():
        adapters.use(name)
        assert torch.equal(logits(model), logits(materialize(program)))


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_gives_each_row_its_adapter(loras: Named, beams: int) -> None:
    model: Any
    model, adapters = live(loras)
    options: dict[str, Any] = {
        "max_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    rows = ["a", None, "c", "b"]
    adapters.use(rows, copies=beams)
    mixed = model.generate(ids(4), **options)
    for row, name in enumerate(rows):
        adapters.use(name)
        assert mixed[row].equal(model.generate(ids(4)[row : row + 1], **options)[0])


def test_using_restores_what_was_on(loras: Named) -> None:
    _, adapters = live(loras)
    adapters.use({"a": 0.5, "d": 2.0})
    with adapters.using(["b", None]):
        assert adapters.active == [{"b": 1.0}, {}]
    assert adapters.active == [{"a": 0.5, "d": 2.0}]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_of_a_model_switches_by_itself(loras: Named, copied: Callable[[Any], Any]) -> None:
    model, adapters = live(loras)
    program = adapters.program
    other = copied(model)
    Adapters(other, program).use("b")
    assert torch.equal(logits(model), logits(materialize(loras["a"])))
    assert torch.equal(logits(other), logits(materialize(loras["b"])))


def test_rows_mix_on_a_quantized_base(base: Program) -> None:
    quantized = Pipeline([made("nf4")]).run(base)
    programs = {n: passed(quantized, Lora(adapter=n, rank=r)) for n, r in (("a", 2), ("b", 4))}
    model, adapters = live(programs)
    adapters.use(["a", "b"])
    mixed = logits(model)
    for row, name in enumerate("ab"):
        assert distance(mixed[row], logits(materialize(programs[name]))[row]) < 1e-5


@pytest.mark.parametrize(
    "other",
    [
        Lora(rank=4, alpha=9),
        Lora(rank=3, rslora=True, targets="q_proj,down_proj"),
        made("adalora", init_r=4, target_r=2),
        made("vera", rank=3),
    ],
    ids=["scale", "rank and targets", "adalora", "vera"],
)
def test_slot_of_a_lora_takes_any_low_rank_adapter(
    base: Program, loras: Named, tmp_path: Path, other: Pass
) -> None:
    model, adapters = live(loras)
    to_peft(new := passed(base, other), tmp_path / "new")
    adapters.load("a", tmp_path / "new")
    assert distance(logits(model), logits(materialize(new))) < 1e-5
    adapters.use("b")
    assert distance(logits(model), logits(materialize(loras["b"]))) < 1e-6


def test_loading_into_a_slot_compiles_nothing_again(loras: Named, tmp_path: Path) -> None:
    model, adapters = live(loras)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    before = logits(compiled)
    to_peft(loras["c"], tmp_path / "c")
    adapters.load("a", tmp_path / "c")
    after = logits(compiled)
    assert distance(after, logits(materialize(loras["c"]))) < 1e-5
    assert distance(after, before) > 1e-2
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["ia3", "oft", "bottleneck", "prefix_tuning", "prompt_tuning"])
def test_slot_takes_an_adapter_of_its_own_method(
    base: Program, alone: Named, tmp_path: Path, name: str
) -> None:
    model, adapters = live(alone)
    new = Pipeline([made(name, seed=4, **METHODS[name])]).run(base)
    torch.manual_seed(9)
    new = trained(new)
    if name == "bottleneck":
        from peftc import to_adapterhub

        to_adapterhub(new, tmp_path / "new")
    else:
        to_peft(new, tmp_path / "new")
    adapters.load(name, tmp_path / "new")
    adapters.use(name)
    assert distance(logits(model), logits(materialize(new))) < 1e-6


def test_loaded_adapters_are_exchanged_a_thousand_times_without_growth(
    loras: Named, tmp_path: Path
) -> None:
    model, adapters = live(loras)
    for name in "ac":
        to_peft(loras[name], tmp_path / name)
    kept = [adapters.load("a", tmp_path / name) for name in "ac"]
    want = [logits(materialize(loras[name])) for name in "ac"]
    seen = []
    for number in range(1000):
        adapters.load("a", kept[number % 2])
        if number in (500, 999):
            assert distance(logits(model), want[number % 2]) < 1e-6
            gc.collect()
            seen.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))
    assert seen[1] <= seen[0]


def test_program_with_several_adapters_is_taken_apart(base: Program, loras: Named) -> None:
    both = passed(base, Lora(adapter="a", rank=2), Lora(adapter="e", rank=3))
    model, adapters = live({"both": both, "b": loras["b"]})
    assert adapters.names == ("a", "e", "b")
    adapters.use({"a": 1, "e": 1})
    assert distance(logits(model), logits(materialize(both))) < 1e-6


def test_trained_rows_update_their_own_adapter_alone(loras: Named) -> None:
    model, adapters = live(loras)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    adapters.use(["b", None, "b"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(ids(3), labels=ids(3)).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if n in before and not p.equal(before[n])}
    assert moved == {name for name in before if ".b." in name}
    again = absorb(adapters.program, model)
    model.eval()
    adapters.use("b")
    assert distance(logits(materialize(together(again))), logits(materialize(loras["a"]))) < 1e-6
    other = materialize(program := together(again))
    Adapters(other, program).use("b")
    assert torch.equal(logits(other), logits(model))


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(loras: Named) -> None:
    model, adapters = live({name: loras[name] for name in "ab"})
    adapters.use(["a", "b"])
    model(ids(2), labels=ids(2)).loss.backward()
    mixed = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for row, name in enumerate("ab"):
        single: Any = materialize(loras[name])
        (single(ids(2)[row : row + 1], labels=ids(2)[row : row + 1]).loss / 2).backward()
        for fqn, parameter in single.named_parameters():
            if parameter.grad is not None:
                assert distance(mixed[fqn], parameter.grad) < 1e-4, fqn


def test_merge_of_a_mixture_is_refused(loras: Named, tmp_path: Path) -> None:
    program = together(*loras.values())
    refuse(tmp_path, FoldError, lambda _: Pipeline([Merge()]).run(program), "peftc.gate")


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (["lora", "lroa"], ("no adapter 'lroa'", "did you mean lora")),
        ("nothing", ("no adapter 'nothing'",)),
        ([], ("names no row",)),
        (["lora", "prefix_tuning"], ("'prefix_tuning'", "a batch of their own")),
        ({"prefix_tuning": 1, "prompt_tuning": 1}, ("switch to one",)),
        ({"prompt_tuning": 0.5}, ("with weight 1",)),
    ],
    ids=["row", "name", "none", "prefix row", "two prefixes", "half a prompt"],
)
def test_choice_that_cannot_be_had_is_refused(
    alone: Named, tmp_path: Path, use: Any, words: tuple[str, ...]
) -> None:
    _, adapters = live(alone)
    before = adapters.active
    refuse(tmp_path, PassError, lambda _: adapters.use(use), *words)
    assert adapters.active == before


def test_batch_of_another_size_is_refused(loras: Named, tmp_path: Path) -> None:
    model, adapters = live(loras)
    adapters.use(["a", "b", "c"])
    refuse(tmp_path, PassError, lambda _: model(ids(6)), "batch of 6", "3 rows")


def test_adapters_of_one_name_are_refused(base: Program, tmp_path: Path) -> None:
    pair = [Pipeline([Lora(rank=r)]).run(base) for r in (2, 4)]
    refuse(tmp_path, PassError, lambda _: together(*pair), "two adapters are named 'default'")


def test_adapters_of_other_bases_are_refused(
    checkpoint: MakeCheckpoint, base: Program, tmp_path: Path
) -> None:
    other = Pipeline([Lora(adapter="b")]).run(capture(checkpoint("gpt2")))
    one = Pipeline([Lora(adapter="a")]).run(base)
    refuse(tmp_path, PassError, lambda _: together(one, other), "different bases")


def test_adapter_that_trains_the_base_itself_is_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = capture(checkpoint("gpt2"))
    one = Pipeline([Lora(adapter="a", bias="all")]).run(base)
    refuse(tmp_path, PassError, lambda _: together(one), "the base's own tensors", "merge it")


def test_program_without_adapters_is_refused(base: Program, tmp_path: Path) -> None:
    refuse(tmp_path, PassError, lambda _: together(base), "no adapter")


def test_model_of_one_adapter_is_refused(base: Program, loras: Named, tmp_path: Path) -> None:
    model = materialize(loras["a"])
    refuse(tmp_path, PassError, lambda _: Adapters(model, loras["a"]), "mixes no adapters")


@pytest.mark.parametrize(
    ("slot", "other", "words"),
    [
        ("c", Lora(rank=2), ("'c' is no LoRA here", "same method")),
        ("a", Lora(rank=8), ("rank 8", "room for 4")),
        ("a", made("ia3"), ("no product of two small matrices",)),
        ("z", Lora(rank=2), ("no adapter 'z'",)),
    ],
    ids=["targets", "rank", "method", "name"],
)
def test_adapter_that_fits_no_slot_is_refused(
    base: Program, loras: Named, tmp_path: Path, slot: str, other: Pass, words: tuple[str, ...]
) -> None:
    model, adapters = live(loras)
    to_peft(passed(base, other), tmp_path / "new")
    before = logits(model)
    refuse(tmp_path, PeftcError, lambda _: adapters.load(slot, tmp_path / "new"), *words)
    assert torch.equal(logits(model), before)


def test_adapter_read_for_another_slot_is_refused(loras: Named, tmp_path: Path) -> None:
    _, adapters = live(loras)
    to_peft(loras["a"], tmp_path / "a")
    kept = adapters.load("b", tmp_path / "a")
    refuse(tmp_path, AdapterError, lambda _: adapters.load("a", kept), "'b'")


def test_rows_of_experts_are_refused_and_whole_batches_are_not(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    torch.manual_seed(7)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    base = capture(tmp_path / "moe")
    targets = {"targets": "q_proj", "parameters": ["mlp.experts.down_proj"]}
    programs = {n: passed(base, Lora(adapter=n, rank=2, **targets)) for n in "ab"}
    model, adapters = live(programs)
    adapters.use("b")
    assert distance(logits(model), logits(materialize(programs["b"]))) < 1e-5
    refuse(tmp_path, PassError, lambda _: adapters.use(["a", "b"]), "order of their own")
