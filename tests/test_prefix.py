"""Prefix tuning: PEFT's numbers, to the bit where both run, and what PEFT's prefixes cannot do."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from peftc import Attach, Lora, Merge, Pipeline, Program, absorb, capture, materialize, to_peft
from peftc.api import apply, export, load
from peftc.errors import AdapterError, CheckpointError, PassError
from peftc.passes.prefix_tuning import PrefixTuning
from peftc.prefixes import MARK

from .conftest import SMALL, MakeCheckpoint, auto, distance, logits
from .helpers import copied, edit, refuse

MakePrefix = Callable[..., Path]
N = 5
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": 97, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 3, "num_heads": 4,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}),
    "bart": ("BartForConditionalGeneration", "BartConfig", {
        "vocab_size": 97, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 80,
        "decoder_ffn_dim": 80, "max_position_embeddings": 64}),
    "classifier": ("BertForSequenceClassification", "BertConfig", SMALL),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {
        **SMALL, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 32}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {
        "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {
        "vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
}  # fmt: skip
TASKS = {"t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}
DECODERS = ["llama", "gpt2", "qwen2", "opt", "gemma3"]
EVERY = [*DECODERS, "t5", "bart", "classifier"]


@pytest.fixture(scope="module")
def base(
    checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A tiny random checkpoint of an architecture, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in OTHERS:
            return checkpoint(name)
        if name not in made:
            cls, config, options = OTHERS[name]
            torch.manual_seed(7)
            model = getattr(transformers, cls)(getattr(transformers, config)(**options))
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.1)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return make


def with_prefix(path: Path, name: str = "llama", **options: Any) -> Any:
    """The model with a random prefix of PEFT's."""
    torch.manual_seed(3)
    config = peft.PrefixTuningConfig(
        task_type=TASKS.get(name, "CAUSAL_LM"), num_virtual_tokens=N, **options
    )
    return peft.get_peft_model(auto(path), config).eval()


@pytest.fixture(scope="module")
def trained(
    base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A directory with a random prefix that PEFT saved, made once for each of its arguments."""
    made: dict[Any, Path] = {}

    def make(name: str, **options: Any) -> Path:
        key = name, repr(options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("prefix")
            with_prefix(base(name), name, **options).save_pretrained(made[key])
        return made[key]

    return make


def program_of(base: Path, *passes: Any) -> Program:
    return Pipeline([*passes]).run(capture(base))


def fresh(base: Path, **options: Any) -> Program:
    return program_of(base, PrefixTuning(virtual_tokens=N, **options))


def use(model: Any, implementation: str) -> Any:
    """The model with another implementation of attention."""
    model.set_attn_implementation(implementation)
    return model


def text(side: str = "none") -> dict[str, Tensor]:
    """Two texts, of which the first is padded at a side."""
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if side != "none":
        mask[0, slice(None, 3) if side == "left" else slice(-3, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labelled(name: str, side: str = "none") -> dict[str, Tensor]:
    inputs = text(side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = {"classifier": torch.tensor([1, 0]), "t5": labels[:, 3:6].contiguous()}.get(
        name, labels
    )
    return inputs | {"labels": labels}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", EVERY)
def test_logits_and_loss_equal_peft_s(
    name: str, implementation: str, side: str, base: Callable[[str], Path], trained: MakePrefix
) -> None:
    theirs = use(peft.PeftModel.from_pretrained(auto(base(name)), trained(name)), implementation)
    ours: Any = materialize(program_of(base(name), Attach(path=str(trained(name)))))
    use(ours, MARK + implementation)
    inputs = labelled(name, side)
    with torch.no_grad():
        one, other = ours(**inputs), theirs.eval()(**inputs)
        without = auto(base(name))(**inputs)
    seen = inputs["attention_mask"].bool() if one.logits.shape[1] == 9 else slice(None)
    assert distance(one.logits[seen], other.logits[seen]) < 1e-6
    assert abs(one.loss - other.loss) < 1e-6 * other.loss.abs()
    assert distance(without.logits[seen], other.logits[seen]) > 1e-2, "the prefix is seen"


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", [*DECODERS, "t5", "bart"])
def test_generated_tokens_equal_peft_s(
    name: str, beams: int, base: Callable[[str], Path], trained: MakePrefix
) -> None:
    theirs = peft.PeftModel.from_pretrained(auto(base(name)), trained(name)).eval()
    ours: Any = materialize(program_of(base(name), Attach(path=str(trained(name)))))
    for side in ("none", "left"):
        options = text(side) | {"num_beams": beams, "max_new_tokens": 7, "do_sample": False}
        assert torch.equal(ours.generate(**options), theirs.generate(**options)), side


@pytest.mark.parametrize("projection", [False, True])
def test_gradients_equal_peft_s(projection: bool, base: Callable[[str], Path]) -> None:
    theirs = with_prefix(base("llama"), prefix_projection=projection, encoder_hidden_size=16)
    ours: Any = materialize(
        fresh(base("llama"), projection=projection, hidden=16 if projection else None)
    )
    given = theirs.prompt_encoder.default.state_dict()
    if not projection:
        given = {"prompt_embeddings": given["embedding.weight"]}
    ours.prompt_encoder.default.load_state_dict(given)
    inputs = labelled("llama", "left")
    for model in (ours, theirs):
        model.train()(**inputs).loss.backward()
    found = [p.grad for p in ours.parameters() if p.requires_grad]
    wanted = [p.grad for p in theirs.parameters() if p.requires_grad]
    assert len(found) == len(wanted) == (5 if projection else 1)
    assert all(distance(one, other) < 1e-5 for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_static_cache_gives_the_tokens_of_a_dynamic_one(
    name: str, implementation: str, base: Callable[[str], Path]
) -> None:
    model: Any = use(materialize(fresh(base(name))), MARK + implementation)
    for side in ("none", "left"):
        options = text(side) | {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
        dynamic = model.generate(**options)
        assert torch.equal(model.generate(**options, cache_implementation="static"), dynamic)
        assert torch.equal(model.generate(**options, use_cache=False), dynamic)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_when_activations_are_checkpointed(
    reentrant: bool, projection: bool, base: Callable[[str], Path]
) -> None:
    model: Any = materialize(fresh(base("llama"), projection=projection)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    model(**labelled("llama")).loss.backward()
    plain = [p.grad.clone() for p in trained if p.grad is not None]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(**labelled("llama")).loss.backward()
    again = [p.grad for p in trained if p.grad is not None]
    assert plain and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_padding_changes_nothing_when_it_is_right(base: Callable[[str], Path]) -> None:
    model = materialize(fresh(base("llama")))
    ids = text()["input_ids"][:1]
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        short, long = model(input_ids=ids), model(input_ids=padded, attention_mask=mask)
    assert distance(long.logits[:, :9], short.logits) < 1e-6


def test_prefix_stays_in_sight_when_a_window_slides(base: Callable[[str], Path]) -> None:
    model: Any = materialize(fresh(base("gemma3")))
    ids = torch.randint(3, 97, (1, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = model(input_ids=ids).logits[0, -1]
        model.prompt_encoder.default.prompt_embeddings[:, :48] += (
            1  # of the first layer, a local one
        )
        assert distance(model(input_ids=ids).logits[0, -1], before) > 1e-3


def test_only_the_prefix_is_trained(base: Callable[[str], Path]) -> None:
    program = fresh(base("llama"))
    model = materialize(program)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == program.trainable == {"prompt_encoder.default.prompt_embeddings"}
    assert inspect.signature(model.forward) == inspect.signature(auto(base("llama")).forward)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_copies_have_a_prefix_of_their_own(name: str, base: Callable[[str], Path]) -> None:
    model: Any = materialize(fresh(base(name), projection=True))
    with torch.no_grad():
        before = model(**labelled(name)).logits
        copies: list[Any] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        model.prompt_encoder.default.embedding.weight += 1
        assert distance(model(**labelled(name)).logits, before) > 1e-3
        for other in copies:
            assert torch.equal(other(**labelled(name)).logits, before)


def test_forward_compiles_to_one_graph(base: Callable[[str], Path]) -> None:
    model: Any = materialize(fresh(base("llama"), projection=True))
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**labelled("llama", "left")).loss
    loss.backward()
    assert abs(loss - model(**labelled("llama", "left")).loss) < 1e-5
    assert model.prompt_encoder.default.embedding.weight.grad.abs().max() > 0


def test_seeds_and_only_seeds_change_the_start(base: Callable[[str], Path]) -> None:
    tables = [
        materialize(fresh(base("llama"), seed=seed)).get_parameter(
            "prompt_encoder.default.prompt_embeddings"
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[1], tables[2])


def test_base_in_bf16_takes_a_prefix_in_fp32(checkpoint: MakeCheckpoint) -> None:
    model: Any = materialize(fresh(checkpoint("llama", torch.bfloat16)))
    assert model.prompt_encoder.default.prompt_embeddings.dtype == torch.float32
    assert model(**text()).logits.isfinite().all()


def test_prefix_and_lora_are_trained_together(base: Callable[[str], Path]) -> None:
    lora = Lora(rank=2, adapter="lora")
    program = program_of(base("llama"), PrefixTuning(virtual_tokens=N), lora)
    assert torch.equal(logits(materialize(program)), logits(materialize(fresh(base("llama")))))
    assert len({fqn.split(".")[-2] for fqn in program.trainable}) > 1


@pytest.mark.parametrize("name", ["llama", "t5", "classifier"])
@pytest.mark.parametrize("projection", [False, True])
def test_peft_computes_the_same_from_what_is_written(
    name: str, projection: bool, base: Callable[[str], Path], tmp_path: Path
) -> None:
    saved = ["classifier"] if name == "classifier" else None
    program = fresh(base(name), projection=projection, modules_to_save=saved)
    model: Any = materialize(program)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    to_peft(absorb(program, model), tmp_path / "prefix")
    theirs = peft.PeftModel.from_pretrained(auto(base(name)), tmp_path / "prefix").eval()
    back = materialize(program_of(base(name), Attach(path=str(tmp_path / "prefix"))))
    with torch.no_grad():
        want = model(**labelled(name)).logits
        assert distance(theirs(**labelled(name)).logits, want) < 1e-5
        assert distance(back(**labelled(name)).logits, want) < 1e-5


@pytest.mark.parametrize("name", ["llama", "classifier"])
def test_what_peft_wrote_is_written_again_as_it_was(
    name: str, base: Callable[[str], Path], trained: MakePrefix, tmp_path: Path
) -> None:
    path = trained(name, prefix_projection=True, encoder_hidden_size=16)
    to_peft(program_of(base(name), Attach(path=str(path))), tmp_path / "again")
    old, new = (load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / "again"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_applied_prefix_is_loaded_again(base: Callable[[str], Path], tmp_path: Path) -> None:
    apply(base("llama"), [PrefixTuning(virtual_tokens=N)], tmp_path / "out")
    want = logits(materialize(fresh(base("llama"))))
    assert torch.equal(logits(materialize(load(tmp_path / "out"))), want)
    export(tmp_path / "out", tmp_path / "adapter", format="peft")
    theirs = peft.PeftModel.from_pretrained(auto(base("llama")), tmp_path / "adapter").eval()
    assert distance(logits(theirs), want) < 1e-6


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_model_without_attention_that_takes_a_prefix_is_refused(
    name: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    refuse(tmp_path, PassError, lambda _: fresh(base(name)), "AttentionInterface", "lora")


def test_prefix_is_refused_when_it_leaves_no_positions(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    job = PrefixTuning(virtual_tokens=64)
    refuse(tmp_path, PassError, lambda _: program_of(base("gpt2"), job), "64", "positions")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_text_is_refused_when_it_leaves_no_positions(
    name: str, base: Callable[[str], Path]
) -> None:
    model = materialize(fresh(base(name)))
    ids = torch.full((1, 64), 3)
    assert model(input_ids=ids[:, N:]).logits.isfinite().all()
    with pytest.raises(PassError, match="60 tokens and 5 virtual ones are more than 64"):
        model(input_ids=ids[:, N - 1 :])


def test_attention_that_cannot_take_a_prefix_is_named(base: Callable[[str], Path]) -> None:
    model = auto(base("llama"))
    model.config._attn_implementation_internal = "flex_attention"
    program = Pipeline([PrefixTuning(virtual_tokens=N)]).run(capture(model))
    with pytest.raises(PassError, match=r"flex_attention.*\n.*eager, sdpa, flash_attention_2"):
        materialize(program)


def test_attention_set_later_never_ignores_the_prefix(base: Callable[[str], Path]) -> None:
    model: Any = use(materialize(fresh(base("llama"))), "sdpa")
    with pytest.raises(PassError, match="would ignore the prefix"):
        model(**text())
    assert use(model, f"{MARK}sdpa")(**text()).logits.isfinite().all()


def test_prefix_of_another_head_layout_is_refused(
    base: Callable[[str], Path], trained: MakePrefix, tmp_path: Path
) -> None:
    attach = Attach(path=str(trained("llama")))
    refuse(
        tmp_path, AdapterError, lambda _: program_of(base("gpt2"), attach), "[5, 96]", "[5, 192]"
    )


@pytest.mark.parametrize("options", [{"targets": ["q_proj"]}, {"layers": [0]}, {"hidden": 8}])
def test_option_that_a_prefix_does_not_have_is_refused(
    options: dict[str, Any], base: Callable[[str], Path], tmp_path: Path
) -> None:
    refuse(tmp_path, PassError, lambda _: fresh(base("llama"), **options), *options)


def test_second_prefix_is_refused(base: Callable[[str], Path], tmp_path: Path) -> None:
    two = PrefixTuning(), PrefixTuning(adapter="b")
    refuse(tmp_path, PassError, lambda _: program_of(base("llama"), *two), "'default'", "already")


@pytest.mark.parametrize("lora", [False, True])
def test_merging_a_prefix_is_refused_with_what_to_do(
    lora: bool, base: Callable[[str], Path], tmp_path: Path
) -> None:
    passes = [Lora(rank=2, adapter="lora")] if lora else []
    program = program_of(base("llama"), PrefixTuning(), *passes)
    refuse(tmp_path, PassError, lambda _: Pipeline([Merge()]).run(program), "--format peft")


def test_prefix_is_no_plain_lora(
    base: Callable[[str], Path], trained: MakePrefix, tmp_path: Path
) -> None:
    program = fresh(base("llama"))
    refuse(tmp_path, PassError, lambda out: to_peft(program, out, canonical=True), "no weights")


def test_damaged_prefix_is_refused(
    base: Callable[[str], Path], trained: MakePrefix, tmp_path: Path
) -> None:
    path = copied(trained("llama"), tmp_path / "prefix")
    edit(path / "adapter_config.json", num_virtual_tokens=6)
    attach = Attach(path=str(path))
    refuse(tmp_path, AdapterError, lambda _: program_of(base("llama"), attach), "[6, 96]")
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refuse(tmp_path, CheckpointError, lambda _: program_of(base("llama"), attach))
