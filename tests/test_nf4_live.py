"""Live models over 4-bit codes: they compute, train, compile and copy as over plain weights."""

from __future__ import annotations

import copy
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import peftc
from peftc import Lora, Merge, Pipeline, Program, registry
from peftc.errors import PassError, PeftcError
from peftc.kernels import nf4, nf4_ops  # noqa: F401  # registers the operators
from peftc.passes.dequantize import Dequantize
from peftc.passes.fuse import Fuse
from peftc.passes.nf4 import Nf4

from . import zoo
from .conftest import ARCHITECTURES, MakeCheckpoint, auto, distance, logits
from .families import COMMON
from .families.senses import Plain

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(5, 97, (2, 9), generator=torch.Generator().manual_seed(5))
FORMS: dict[str, dict[str, Any]] = {
    "nf4": {}, "nested": {"double_quant": True}, "fp4": {"codebook": "fp4", "block_size": 32},
}  # fmt: skip
ops: Any = torch.ops.peftc


def apply(base: Any, *passes: Any) -> Program:
    program = base if isinstance(base, Program) else peftc.capture(base)
    return Pipeline(list(passes)).run(program)


def trained(program: Program, std: float = 0.05) -> Program:
    """A program whose adapters are as after training: noise on all that is trained."""
    model = peftc.materialize(program)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=std)
    return peftc.absorb(program, model)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def exact(model: nn.Module) -> dict[str, Tensor]:
    """What the quantized weights of a live model are stored as."""
    return {
        f"{fqn}.{name}": getattr(module, name)
        for fqn, module in model.named_modules()
        for name in getattr(module, "exact", ())
    }


def called(model: nn.Module) -> Counter[str]:
    """The operators in the graphs of a live model."""
    graphs: list[Any] = [m.graph for m in model.modules() if hasattr(m, "graph")]
    return Counter(str(node.target) for graph in graphs for node in graph.nodes)


def loss(model: Any) -> Any:
    return model(input_ids=IDS, labels=IDS)[0]


def gradients(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model.train().zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


def agree(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    """Gradients are equal up to a share of the largest: some are nothing but rounding."""
    scale = max(float(grad.abs().max()) for grad in want.values())
    assert got.keys() == want.keys() and scale > 0
    assert max(float((got[k] - want[k]).abs().max()) for k in want) <= bound * scale


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_those_of_the_dequantized_weights(
    checkpoint: MakeCheckpoint, name: str, form: str
) -> None:
    program = apply(checkpoint(name), Nf4(**FORMS[form]))
    live = peftc.materialize(program)
    plain = peftc.materialize(apply(program, Dequantize()))
    assert distance(logits(live), logits(plain)) <= 1e-5
    assert 1e-3 < distance(logits(live), logits(auto(checkpoint(name)))) < 0.5
    quantized = {key.rpartition(".")[0] for key in exact(live)}
    assert quantized == {fqn for fqn in program.sites if f"{fqn}.weight_absmax" in exact(live)}
    assert all(live.get_buffer(f"{fqn}.weight").dtype == torch.uint8 for fqn in quantized)
    assert not exact(plain) and len(quantized) == program.journal[-1].sites > 0


@pytest.mark.parametrize(
    "name", [*sorted(COMMON.keys() - {*ARCHITECTURES, "falcon"}), "plain", "grouped"]
)
def test_output_equals_that_of_the_dequantized_weights_when_the_model_is_another(
    name: str, tmp_path: Path
) -> None:
    specimen = zoo.SPECIMENS[name]
    source: Any = specimen.build()
    if not isinstance(source, Plain):
        source.save_pretrained(tmp_path)
        source = tmp_path
    program = apply(source, Nf4())
    live, plain = (peftc.materialize(p) for p in (program, apply(program, Dequantize())))
    with torch.no_grad():
        got, want = (specimen.output(model(**specimen.inputs())) for model in (live, plain))
    assert distance(got, want) <= 1e-5
    assert called(live)["peftc.nf4_linear.default"] == program.journal[-1].sites > 0


METHODS = ("lora", "dora", "adalora", "vera", "ia3", "oft", "loha", "lokr")


@pytest.mark.parametrize("order", ["under", "over"])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("llama", method) for method in METHODS),
        ("gpt2", "lora"),
        ("gpt2", "dora"),
        ("bert", "ia3"),
    ],
)
def test_method_computes_and_merges_as_on_the_dequantized_weights(
    checkpoint: MakeCheckpoint, name: str, method: str, order: str
) -> None:
    adapter = registry.load(method)()
    passes = [adapter, Nf4()] if order == "under" else [Nf4(), adapter]
    program = trained(apply(checkpoint(name), *passes))
    live = peftc.materialize(program)
    want = logits(peftc.materialize(apply(program, Dequantize())))
    assert distance(logits(live), want) <= 1e-5
    assert distance(want, logits(peftc.materialize(apply(checkpoint(name), Nf4())))) > 1e-3
    assert distance(logits(peftc.materialize(apply(program, Merge()))), want) <= 1e-5
    assert exact(live) and all("absmax" not in key for key in trainable(live))


@pytest.fixture(scope="module")
def program(checkpoint: MakeCheckpoint) -> Program:
    """A tiny llama in 4 bits with a trained LoRA that has dropout."""
    return trained(apply(checkpoint("llama"), Nf4(double_quant=True), Lora(rank=4, dropout=0.1)))


def test_copies_compute_the_same(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    live, want = peftc.materialize(program), logits(peftc.materialize(program))
    blank = peftc.materialize(
        apply(program.source.name, Nf4(double_quant=True), Lora(rank=4, dropout=0.1, seed=9))
    )
    assert distance(logits(blank), want) > 1e-3
    blank.load_state_dict(live.state_dict())
    pickled = pickle.dumps(live)
    monkeypatch.setattr("peftc.live._classes", {})  # as in another process
    for twin in (blank, copy.deepcopy(live), pickle.loads(pickled)):
        assert torch.equal(logits(twin), want)
        assert exact(twin).keys() == exact(live).keys()
        kept = {part.data_ptr() for part in exact(live).values()}
        assert not kept & {part.data_ptr() for part in exact(twin).values()}
    noisy = live.train()
    assert distance(logits(noisy), logits(noisy)) > 1e-3
    assert torch.equal(logits(live.eval()), want)


@pytest.mark.parametrize(
    ("cast", "bound"),
    [
        (lambda m: m.half(), 1e-2),
        (lambda m: m.to(torch.bfloat16), 5e-2),
        (lambda m: m.bfloat16().float(), 5e-2),
        (lambda m: m.double().float(), 1e-6),
        (lambda m: m.type(torch.float16), 1e-2),
    ],
    ids=["half", "bfloat16", "and back", "double", "type"],
)
def test_casts_leave_codes_and_absmax_exact(
    program: Program, cast: Callable[[Any], Any], bound: float
) -> None:
    live = peftc.materialize(program)
    before, want = exact(copy.deepcopy(live)), logits(live)
    after = cast(live)
    assert distance(logits(after), want) <= bound
    assert before.keys() == exact(after).keys()
    for key, part in exact(after).items():
        assert part.dtype == before[key].dtype and torch.equal(part, before[key])
    assert all(part.is_meta for part in exact(after.to("meta")).values())


def test_gradients_are_the_same_with_checkpointing(program: Program) -> None:
    live: Any = peftc.materialize(program)
    want = gradients(live)
    agree(gradients(peftc.materialize(apply(program, Dequantize()))), want, 1e-5)
    for reentrant in (False, True):
        live.enable_input_require_grads()
        live.gradient_checkpointing_enable({"use_reentrant": reentrant})
        agree(gradients(live), want, 1e-6)


def test_compile_makes_one_graph(program: Program) -> None:
    live = peftc.materialize(program)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(live, fullgraph=True, backend=counter)
    assert torch.equal(logits(compiled), logits(live))
    assert counter.frame_count == 1


@pytest.mark.parametrize("fused", [False, True])
def test_generate_equals_that_of_the_dequantized_weights(
    checkpoint: MakeCheckpoint, fused: bool
) -> None:
    carrying = trained(apply(checkpoint("llama"), Nf4(), Lora(rank=4)), 0.2)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    one: Any = peftc.materialize(apply(carrying, Fuse()) if fused else carrying)
    other: Any = peftc.materialize(apply(carrying, Dequantize()))
    assert torch.equal(one.generate(IDS, **options), other.generate(IDS, **options))


@pytest.mark.parametrize(
    ("form", "bits"), [({}, 4.5), ({"double_quant": True}, 4.127), ({"block_size": 128}, 4.25)]
)
@pytest.mark.parametrize("again", [False, True])
def test_model_holds_its_weights_in_four_bits_and_a_half(
    wide: Path, tmp_path: Path, form: dict[str, Any], bits: float, again: bool
) -> None:
    program = apply(wide, Nf4(**form))
    if again:  # read from a 4-bit checkpoint
        peftc.apply(wide, [Nf4(**form)], tmp_path / "out")
        program = apply(tmp_path / "out" / "base")
    live = peftc.materialize(program)
    weights = sum(s.shape[0] * s.shape[1] for f, s in program.sites.items() if "layers" in f)
    held = [t for key, t in live.state_dict().items() if "proj" in key]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert 8 * sum(storages.values()) / weights == pytest.approx(bits, rel=0.01)
    assert not [name for name, _ in live.named_parameters() if "proj" in name]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama of whole blocks: bitsandbytes' AVX512 code decodes others wrongly."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("wide")
    model.save_pretrained(path)
    return path


def in_peft(name: str) -> str:
    return f"base_model.model.{name}"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_pefts_over_bitsandbytes(
    wide: Path, tmp_path: Path, form: str, fused: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    peftc.apply(wide, [Nf4(**FORMS[form])], tmp_path / "out")
    base = tmp_path / "out" / "base"
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    theirs = peft.get_peft_model(auto(base), config)
    assert (
        type(theirs.get_submodule(in_peft("model.layers.0.mlp.up_proj"))).__name__ == "Linear4bit"
    )
    plain = trained(apply(base, Lora(rank=4, alpha=6)), 0.1)
    live = peftc.materialize(apply(plain, Fuse()) if fused else plain)
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in trainable(live).items():
            parameters[in_peft(name)].copy_(parameter)
    want = gradients(theirs)
    agree({in_peft(name): grad for name, grad in gradients(live).items()}, want, 1e-4)


def test_trained_adapter_gives_the_same_logits_in_peft_over_bitsandbytes(
    wide: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    peftc.apply(wide, [Nf4(double_quant=True), Lora(rank=4)], tmp_path / "out")
    base = tmp_path / "out" / "base"
    program = peftc.load(tmp_path / "out")
    live = peftc.materialize(program)
    start = {key: tensor.clone() for key, tensor in live.state_dict().items()}
    arguments = transformers.TrainingArguments(
        tmp_path / "trainer", max_steps=6, learning_rate=0.02, save_strategy="no", report_to=[],
        use_cpu=True, seed=3, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = transformers.Trainer(live, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    moved = {key for key, t in live.state_dict().items() if not torch.equal(t, start[key])}
    assert moved == trainable(live).keys() and all("lora_" in key for key in moved)
    peftc.to_peft(peftc.absorb(program, live), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    theirs = peft.PeftModel.from_pretrained(auto(base), tmp_path / "adapter").eval()
    assert distance(logits(theirs), logits(live.eval())) <= 1e-4
    assert distance(logits(live), logits(auto(base))) > 1e-2


def lora(**options: Any) -> Lora:
    return Lora(**{"rank": 4, "alpha": 6, **options})


LAYERS = 14  # of the tiny llama
FUSIBLE: dict[str, tuple[list[Any], int]] = {
    "plain": ([Nf4(), lora()], LAYERS),
    "under": ([lora(), Nf4()], LAYERS),
    "no scale": ([Nf4(double_quant=True), lora(alpha=4)], LAYERS),
    "some": ([Nf4(targets=["q_proj"]), lora()], 2),
    "several": ([Nf4(), lora(adapter="a"), lora(adapter="b")], LAYERS),  # the first of them
    "dropout": ([Nf4(), lora(dropout=0.1)], 0),
    "dora": ([Nf4(), registry.load("dora")()], 0),
    "16 bits": ([lora()], 0),
}


@pytest.mark.parametrize("case", FUSIBLE)
def test_fuse_computes_the_same(checkpoint: MakeCheckpoint, case: str) -> None:
    passes, count = FUSIBLE[case]
    program = trained(apply(checkpoint("llama"), *passes), 0.1)
    fused = apply(program, Fuse())
    live, plain = peftc.materialize(fused), peftc.materialize(program)
    assert called(live)["peftc.nf4_lora.default"] == count
    assert called(plain)["peftc.nf4_lora.default"] == 0
    assert fused.journal[-1].modified == bool(count)
    assert distance(logits(live), logits(plain)) <= 1e-5
    agree(gradients(live), gradients(plain), 1e-5)
    merged = [logits(peftc.materialize(apply(p, Merge()))) for p in (fused, program)]
    assert torch.equal(*merged)
    twin = pickle.loads(pickle.dumps(live.eval()))
    assert torch.equal(logits(twin), logits(live)) and called(twin) == called(live)
    assert not apply(fused, Fuse()).journal[-1].modified


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_fuse_keeps_biases_and_transposed_weights(checkpoint: MakeCheckpoint, name: str) -> None:
    program = trained(apply(checkpoint(name), Nf4(), lora(bias="all")), 0.1)
    live, plain = (peftc.materialize(p) for p in (apply(program, Fuse()), program))
    assert called(live)["peftc.nf4_lora.default"] == len(exact(live)) // 2 > 0
    assert distance(logits(live), logits(plain)) <= 1e-5
    agree(gradients(live), gradients(plain), 1e-5)


def test_fuse_trains_and_is_absorbed(checkpoint: MakeCheckpoint) -> None:
    program = apply(checkpoint("llama"), Nf4(), lora(), Fuse())
    live = peftc.materialize(program)
    optimizer = torch.optim.AdamW(trainable(live).values(), lr=0.02)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(loss(live))
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1]) < float(losses[0]) - 0.05
    after = peftc.absorb(program, live)
    assert torch.equal(logits(peftc.materialize(after)), logits(live))
    assert distance(logits(peftc.materialize(apply(after, Merge()))), logits(live)) <= 1e-5


@pytest.mark.parametrize("case", ["dropout", "dora", "16 bits", "some"])
def test_fuse_is_refused_when_a_named_layer_cannot_be_fused(
    checkpoint: MakeCheckpoint, case: str
) -> None:
    program = apply(checkpoint("llama"), *FUSIBLE[case][0])
    with pytest.raises(PeftcError) as caught:
        apply(program, Fuse(targets=["v_proj"]))
    errors = getattr(caught.value, "errors", (caught.value,))
    assert all(isinstance(error, PassError) and error.fix for error in errors)
    assert {error.where for error in errors} == {
        f"model.layers.{i}.self_attn.v_proj" for i in range(2)
    }
