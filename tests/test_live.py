"""The live model: it trains, compiles, pickles and generates as PEFT's does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounter

import peftc
from peftc import Attach, Lora, Merge, Pipeline, Program
from peftc.errors import PeftcError, TiedWeightError
from tests.conftest import (
    ARCHITECTURES,
    MakeAdapter,
    MakeCheckpoint,
    auto,
    distance,
    logits,
    with_peft,
)

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(5, 97, (2, 9), generator=torch.Generator().manual_seed(5))


def inject(base: Path, **options: Any) -> Program:
    return Pipeline([Lora(**{"rank": 4, "alpha": 6, **options})]).run(peftc.capture(base))


def attach(base: Path, trained: Path) -> Program:
    return Pipeline([Attach(path=str(trained))]).run(peftc.capture(base))


@cache
def reference(base: Path, trained: Path) -> torch.Tensor:
    return logits(with_peft(base, trained))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def as_live(peft_name: str) -> str:
    """A parameter's name in a live PEFT model as peftc has it: as in the bare model."""
    bare = peft_name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return bare.replace(".a0.", ".default.")


def loss(model: nn.Module) -> Any:
    return model(input_ids=IDS, labels=IDS)[0]


def train(model: nn.Module, count: int) -> list[float]:
    """The losses of some steps of AdamW in training mode, dropout and all."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(trainable(model.train()).values(), lr=0.02)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        found = loss(model)
        found.backward()
        optimizer.step()
        losses.append(float(found))
    model.eval()
    return losses


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_have_pefts_names_and_gradients(
    checkpoint: MakeCheckpoint, name: str, bias: Any
) -> None:
    base = checkpoint(name)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", bias=bias)
    theirs = peft.get_peft_model(auto(base), config)
    live = peftc.materialize(inject(base, bias=bias))
    want = {as_live(key): p for key, p in theirs.named_parameters()}
    got = dict(live.named_parameters())
    assert {key: p.shape for key, p in got.items()} == {key: p.shape for key, p in want.items()}
    assert trainable(live).keys() == {key for key, p in want.items() if p.requires_grad}


def test_one_class_serves_every_site_of_one_graph(checkpoint: MakeCheckpoint) -> None:
    live = peftc.materialize(inject(checkpoint("llama"), rank_pattern={"q_proj": 2}))
    classes = {type(m) for m in live.modules() if hasattr(m, "lora_A")}
    assert len(classes) == 2  # by the scale, 6/4 and 6/2; not by shape


def test_dropout_works_in_training_only(checkpoint: MakeCheckpoint, adapter: MakeAdapter) -> None:
    base = checkpoint("llama")  # which has no dropout of its own
    live = peftc.materialize(attach(base, adapter(base, lora_dropout=0.5)))
    assert not any(module.training for module in live.modules())
    assert torch.equal(logits(live), logits(live))
    live.train()
    assert all(module.training for module in live.modules())
    assert distance(logits(live), logits(live)) > 1e-2
    assert torch.equal(logits(live.eval()), logits(live))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_copies_compute_the_same(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint(name)
    program = attach(base, adapter(base, lora_dropout=0.1))
    live, want = peftc.materialize(program), reference(base, adapter(base, lora_dropout=0.1))
    blank = peftc.materialize(inject(base, rank=4, seed=9, dropout=0.1))
    assert distance(logits(blank), want) > 1e-2
    blank.load_state_dict(live.state_dict())
    pickled = pickle.dumps(live)
    monkeypatch.setattr("peftc.live._classes", {})  # as in another process
    for twin in (blank, copy.deepcopy(live), pickle.loads(pickled)):
        assert torch.equal(logits(twin), want)
        assert trainable(twin).keys() == trainable(live).keys()
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in live.parameters()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_compile_makes_one_graph(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, name: str
) -> None:
    base = checkpoint(name)
    live = peftc.materialize(attach(base, adapter(base, lora_dropout=0.1)))
    torch._dynamo.reset()
    counter = CompileCounter()  # the backend "eager", which counts its graphs
    compiled = torch.compile(live, fullgraph=True, backend=counter)
    assert torch.equal(logits(compiled), reference(base, adapter(base, lora_dropout=0.1)))
    assert torch.equal(logits(compiled), logits(live))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_equal_pefts_with_and_without_checkpointing(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, name: str
) -> None:
    base = checkpoint(name)
    trained = adapter(base, lora_dropout=0.1)

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model.train().zero_grad()
        loss(model).backward()
        found = {as_live(key): p.grad for key, p in trainable(model).items()}
        return {key: grad.clone() for key, grad in found.items() if grad is not None}

    live: Any = peftc.materialize(attach(base, trained))
    want = gradients(with_peft(base, trained))
    plain = gradients(live)
    live.gradient_checkpointing_enable({"use_reentrant": False})
    for got in (plain, gradients(live)):
        assert got.keys() == want.keys()
        assert max(distance(got[key], grad) for key, grad in want.items()) <= 1e-5
    assert max(float(grad.abs().max()) for grad in want.values()) > 0


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2"])
def test_generate_equals_pefts_token_by_token(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, name: str, beams: int
) -> None:
    base = checkpoint(name)
    trained = adapter(base, lora_alpha=40)
    live: Any = peftc.materialize(attach(base, trained))
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    got = live.generate(input_ids=IDS, **options)
    assert torch.equal(got, with_peft(base, trained).generate(input_ids=IDS, **options))
    assert not torch.equal(got, auto(base).generate(input_ids=IDS, **options))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_loses_as_pefts_does(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, name: str, dtype: torch.dtype, dropout: float
) -> None:
    base = checkpoint(name, dtype)
    trained = adapter(base, lora_dropout=dropout)
    got = train(peftc.materialize(attach(base, trained)), 4)
    assert got == pytest.approx(train(with_peft(base, trained), 4), rel=1e-6)
    assert got[-1] < got[0]


def test_trainer_trains_the_adapter_alone(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    trained = adapter(base)

    def run(model: Any) -> dict[str, torch.Tensor]:
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=2, learning_rate=0.02, save_strategy="no", report_to=[],
            use_cpu=True, seed=3, disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in IDS]
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        assert trainer.train().global_step == 2
        state = {as_live(key): v for key, v in model.state_dict().items()}
        return {key: tensor.clone() for key, tensor in state.items()}

    live = peftc.materialize(attach(base, trained))
    start = {key: tensor.clone() for key, tensor in live.state_dict().items()}
    got, want = run(live), run(with_peft(base, trained))
    assert got.keys() == want.keys()
    assert {key for key in got if not torch.equal(got[key], start[key])} == trainable(live).keys()
    assert max(distance(got[key], tensor) for key, tensor in want.items()) <= 1e-5


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile, nn.DataParallel])
def test_absorb_takes_the_trained_tensors(
    checkpoint: MakeCheckpoint, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    base = checkpoint("opt")
    program = inject(base, bias="lora_only")
    live = peftc.materialize(program)
    train(live, 2)
    want = logits(live)
    assert distance(want, logits(auto(base))) > 1e-3
    after = peftc.absorb(program, wrap(live))
    for trained in (live, peftc.materialize(after)):  # what was absorbed is a copy
        train(trained, 1)
    assert torch.equal(logits(peftc.materialize(after)), want)
    assert torch.equal(logits(peftc.materialize(program)), logits(auto(base)))
    merged = peftc.materialize(Pipeline([Merge()]).run(after))
    assert distance(logits(merged), want) <= 1e-5
    assert merged.state_dict().keys() == auto(base).state_dict().keys()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"rank": 8}),
        ("llama", {"adapter": "other"}),
        ("llama", {"targets": ["q_proj"]}),
        ("gpt2", {}),
    ],
)
def test_absorb_is_refused_when_the_model_is_foreign(
    checkpoint: MakeCheckpoint, name: str, options: dict[str, Any]
) -> None:
    foreign = peftc.materialize(inject(checkpoint(name), **options))
    with pytest.raises(PeftcError, match="lora_A"):
        peftc.absorb(inject(checkpoint("llama")), foreign)


def test_absorb_finds_a_child_that_is_named_module() -> None:
    source = nn.ModuleDict({"module": nn.Linear(4, 4)})
    program = Pipeline([Lora(rank=2)]).run(peftc.capture(source))
    live, key = peftc.materialize(program), "module.lora_B.default.weight"
    nn.init.ones_(live.get_parameter(key))
    after = peftc.materialize(peftc.absorb(program, live))
    assert after.get_parameter(key).eq(1).all()


def test_biases_trained_in_fp32_merge_into_a_bf16_base(checkpoint: MakeCheckpoint) -> None:
    base = checkpoint("opt", torch.bfloat16)
    program = inject(base, bias="all")
    live = peftc.materialize(program, dtype=torch.float32)
    train(live, 2)
    merged = peftc.materialize(Pipeline([Merge()]).run(peftc.absorb(program, live)))
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    key = "model.decoder.layers.0.fc1.bias"
    assert torch.equal(merged.get_parameter(key), live.get_parameter(key).bfloat16())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dtypes_and_logits_equal_pefts(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, name: str, dtype: torch.dtype
) -> None:
    trained = adapter(checkpoint(name))
    theirs = with_peft(checkpoint(name), trained, dtype=dtype)
    want = {as_live(key): p.dtype for key, p in theirs.named_parameters()}
    for base in (checkpoint(name), checkpoint(name, dtype)):
        live = peftc.materialize(attach(base, trained), dtype=dtype)
        assert {key: p.dtype for key, p in live.named_parameters()} == want
    # In fp64 BLAS takes another path for weights that a file maps at odd addresses.
    slack = 1e-14 if dtype == torch.float64 else 0.0
    assert float((logits(live) - logits(theirs)).abs().max()) <= slack


EMBEDDING = {"gpt2": "transformer.wte.weight", "bert": "bert.embeddings.word_embeddings.weight"}


@pytest.mark.parametrize(
    ("name", "targets", "ties"),
    [
        ("gpt2", "all-linear", {"lm_head.weight": EMBEDDING["gpt2"]}),
        ("gpt2", "lm_head", {"lm_head.weight": EMBEDDING["gpt2"]}),
        (
            "bert",
            "decoder",
            {
                "cls.predictions.decoder.weight": EMBEDDING["bert"],
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        ),
    ],
    ids=["gpt2", "gpt2-head", "bert-head"],
)
def test_tied_weights_stay_tied(
    checkpoint: MakeCheckpoint, name: str, targets: str, ties: dict[str, str]
) -> None:
    program = inject(checkpoint(name), targets=targets)
    live = peftc.materialize(program, dtype=torch.bfloat16)
    for model in (live, copy.deepcopy(live)):
        for one, other in ties.items():
            assert model.get_parameter(one) is model.get_parameter(other)
    if targets != "all-linear":
        with pytest.raises(TiedWeightError, match="is tied to"):
            Pipeline([Merge()]).run(program)
