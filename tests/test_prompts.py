"""Prompt tuning and P-tuning: PEFT's numbers, its files, and what it cannot do."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftc import (
    Attach,
    Fold,
    Lora,
    Merge,
    Pass,
    PeftcError,
    Pipeline,
    Program,
    PromptCache,
    PromptTuning,
    PTuning,
    absorb,
    capture,
    export,
    load,
    materialize,
    to_cache,
    to_peft,
)
from peftc.errors import AdapterError, ArtifactError, FoldError, PassError, SelectionError

from .conftest import SMALL, MakeCheckpoint, Tied, auto, distance
from .helpers import copied, edit, refuse

MakeModel = Callable[[str], Path]
N = 5  # virtual tokens
HALF = {"layers": 2, "ffn_dim": 80, "attention_heads": 4}
HALVES = {f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in HALF.items()}
T5 = {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4}
GEMMA = {**SMALL, "num_key_value_heads": 2, "head_dim": 12}
# Each with the class, its configuration and PEFT's name of the task.
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA, "CAUSAL_LM"),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {**T5, "vocab_size": 97, "decoder_start_token_id": 0}, "SEQ_2_SEQ_LM"),
    "bart": ("BartForConditionalGeneration", "BartConfig",
             {**HALVES, "d_model": 48, "vocab_size": 97, "max_position_embeddings": 64},
             "SEQ_2_SEQ_LM"),
    "bert": ("BertForSequenceClassification", "BertConfig", SMALL, "SEQ_CLS"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", SMALL, "SEQ_CLS"),
    "tokens": ("BertForTokenClassification", "BertConfig", SMALL, "TOKEN_CLS"),
    "answers": ("BertForQuestionAnswering", "BertConfig", SMALL, "QUESTION_ANS"),
}  # fmt: skip
DECODERS = ("llama", "gpt2", "qwen2", "opt")
PADDINGS = ("none", "left", "right")


@pytest.fixture(scope="session")
def model(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Makes, once for each name, a tiny random checkpoint."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in MODELS:
            return checkpoint(name)
        if name not in made:
            cls, config, options, _ = MODELS[name]
            torch.manual_seed(7)
            built = getattr(transformers, cls)(getattr(transformers, config)(**options))
            for parameter in built.parameters():
                nn.init.normal_(parameter, std=0.1)
            made[name] = tmp_path_factory.mktemp(name)
            built.save_pretrained(made[name])
        return made[name]

    return make


def task(name: str) -> str:
    return MODELS[name][3] if name in MODELS else "CAUSAL_LM"


def prompted(base: Path, folder: Path, kind: str = "CAUSAL_LM", **options: Any) -> Any:
    """The model with a random prompt of PEFT's, saved too."""
    torch.manual_seed(3)
    config = peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=N, **options)
    wrapped = peft.get_peft_model(auto(base), config).eval()
    wrapped.save_pretrained(folder)
    return wrapped


def attached(base: Path, folder: Path) -> Program:
    return Pipeline([Attach(path=str(folder))]).run(capture(base))


def injected(base: Path, *passes: Pass) -> Program:
    return Pipeline(passes).run(capture(base))


def batch(padding: str = "none", length: int = 9) -> dict[str, Any]:
    ids = torch.randint(4, 97, (2, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padding == "none":
        return {"input_ids": ids}
    mask[0, : 4 if padding == "left" else None] = 0
    if padding == "right":
        mask[0] = torch.tensor([1] * (length - 4) + [0] * 4)
    return {"input_ids": ids, "attention_mask": mask}


def labelled(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with what a loss is of; PEFT cannot give one of a token classifier's."""
    ids = inputs["input_ids"]
    match task(name):
        case "SEQ_CLS":
            return {**inputs, "labels": torch.tensor([0, 1])}
        case "QUESTION_ANS":
            return {**inputs, "start_positions": ids[:, 0] % 7, "end_positions": ids[:, 1] % 7}
        case "SEQ_2_SEQ_LM":
            return {**inputs, "labels": ids[:, :6].contiguous()}
        case "TOKEN_CLS":
            return inputs
        case _:
            return {**inputs, "labels": ids}


@torch.no_grad()
def generated(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    found: Tensor = model.generate(**{"max_new_tokens": 7, "do_sample": False, **inputs, **options})
    return found


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", [*DECODERS, *MODELS])
def test_output_and_loss_equal_pefts(
    name: str, padding: str, model: MakeModel, tmp_path: Path
) -> None:
    base = model(name)
    theirs = prompted(base, tmp_path, task(name))
    ours = materialize(attached(base, tmp_path))
    inputs = labelled(name, batch(padding))
    with torch.no_grad():
        want, got = theirs(**inputs), ours(**inputs)
    key = "start_logits" if name == "answers" else "logits"
    assert got[key].shape == want[key].shape
    assert distance(got[key], want[key]) <= 1e-6
    assert want.loss is None or abs(got.loss - want.loss) <= 1e-6 * want.loss


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", [*DECODERS, "gemma2", "t5", "bart"])
def test_generated_tokens_equal_pefts(
    name: str, padding: str, model: MakeModel, tmp_path: Path
) -> None:
    base = model(name)
    theirs = prompted(base, tmp_path, task(name))
    ours = materialize(attached(base, tmp_path))
    inputs = batch(padding)
    for options in ({}, {"num_beams": 2}, {"repetition_penalty": 1.4}):
        want = generated(theirs, inputs, **options)
        got = generated(ours, inputs, **options)
        assert torch.equal(got, want), options
        still = generated(ours, inputs, cache_implementation="static", **options)
        assert torch.equal(still, want), options
        assert torch.equal(generated(ours, inputs, use_cache=False, **options), want), options


@pytest.fixture
def llama(model: MakeModel) -> Path:
    return model("llama")


@pytest.fixture
def ours(llama: Path) -> Any:
    return materialize(injected(llama, PromptTuning(tokens=N)))


def test_peft_fails_where_peftc_generates_with_a_static_cache(llama: Path, tmp_path: Path) -> None:
    theirs = prompted(llama, tmp_path)
    with pytest.raises(Exception):  # noqa: B017  # what it says is no one's promise
        generated(theirs, batch("left"), cache_implementation="static")


def test_lengths_mean_what_the_caller_means(ours: Any) -> None:
    inputs = batch()
    assert generated(ours, inputs, max_new_tokens=3).shape[1] == 9 + 3
    assert generated(ours, inputs, max_new_tokens=None, max_length=14).shape[1] == 14
    sampled = generated(ours, inputs, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (6, 9 + 7)
    assert int(sampled.max()) < 97
    assert torch.equal(sampled[::3, :9], inputs["input_ids"])


def test_generation_goes_on_from_the_cache_that_it_returned(ours: Any) -> None:
    inputs = batch()
    first = ours.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    again = generated(
        ours, {"input_ids": first.sequences}, past_key_values=first.past_key_values,
        max_new_tokens=4,
    )  # fmt: skip
    assert torch.equal(again, generated(ours, inputs, max_new_tokens=7))


@pytest.mark.parametrize("rule", ["peft", "mask"])
def test_decoding_by_hand_equals_generate(rule: Any, llama: Path) -> None:
    live: Any = materialize(injected(llama, PromptTuning(tokens=N, positions=rule)))
    inputs = batch("left")
    ids, mask, past = inputs["input_ids"], inputs["attention_mask"], None
    step = ids
    with torch.no_grad():
        for _ in range(4):
            out = live(input_ids=step, attention_mask=mask, past_key_values=past, use_cache=True)
            past, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, step], 1), torch.cat([mask, mask[:, -1:]], 1)
    assert torch.equal(ids, generated(live, inputs, max_new_tokens=4))


def test_pads_change_nothing_when_positions_go_by_the_mask(model: MakeModel) -> None:
    live: Any = materialize(injected(model("gpt2"), PromptTuning(tokens=N, positions="mask")))
    inputs = batch("left")
    with torch.no_grad():
        padded = live(**inputs).logits[0, N + 4 :]
        alone = live(input_ids=inputs["input_ids"][:1, 4:]).logits[0, N:]
    assert distance(padded, alone) <= 1e-6


def test_positions_by_the_mask_survive_their_directory(llama: Path, tmp_path: Path) -> None:
    program = injected(llama, PromptTuning(tokens=N, positions="mask"))
    to_peft(program, tmp_path / "out")
    again = attached(llama, tmp_path / "out")
    with torch.no_grad():
        want, got = (materialize(p)(**batch("left")).logits for p in (program, again))
    assert torch.equal(want, got)


def test_own_positions_are_moved_behind_the_prompt(ours: Any) -> None:
    ids = batch()["input_ids"]
    with torch.no_grad():
        told = ours(input_ids=ids, position_ids=torch.arange(9).expand(2, -1)).logits
        assert torch.equal(told, ours(input_ids=ids).logits)


def test_live_model_survives_what_models_are_put_through(ours: Any, llama: Path) -> None:
    inputs = batch("left")
    with torch.no_grad():
        want = ours(**inputs).logits
        for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert torch.equal(other(**inputs).logits, want)
            assert torch.equal(generated(other, inputs), generated(ours, inputs))
        assert torch.equal(ours(inputs["input_ids"], inputs["attention_mask"]).logits, want)
        compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
        assert distance(compiled(**inputs).logits, want) <= 1e-6
    plain = auto(llama)
    assert inspect.signature(ours.forward) == inspect.signature(plain.forward)
    assert type(ours).__name__ == type(plain).__name__ and isinstance(ours, type(plain))


def test_trainer_trains_a_prompt(ours: Any, tmp_path: Path) -> None:
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in batch()["input_ids"]]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no",
        gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(ours, arguments, train_dataset=rows).train()
    moved = [n for n, p in ours.named_parameters() if not torch.equal(p, before[n])]
    assert moved == ["model.embed_tokens.prompt_encoder.default.embedding.weight"]


def test_prompt_is_rounded_to_the_embeddings_dtype(llama: Path, tmp_path: Path) -> None:
    prompted(llama, tmp_path)
    ours = materialize(attached(llama, tmp_path), dtype=torch.bfloat16)
    theirs = peft.PeftModel.from_pretrained(auto(llama, torch.bfloat16), tmp_path)
    with torch.no_grad():
        assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)


def test_own_labels_of_token_classes_are_ignored_at_the_prompt(
    model: MakeModel, tmp_path: Path
) -> None:
    theirs = prompted(model("tokens"), tmp_path, "TOKEN_CLS")
    ours: Any = materialize(attached(model("tokens"), tmp_path))
    inputs = {**batch(), "labels": batch()["input_ids"] % 2}
    with pytest.raises(ValueError):  # in PEFT the labels are too few
        theirs(**inputs)
    out = ours(**inputs)
    want = nn.functional.cross_entropy(out.logits[:, N:].flatten(0, 1), inputs["labels"].flatten())
    assert torch.allclose(out.loss, want)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_p_tuning_equals_pefts_in_training_and_when_saved(
    encoder: Any, llama: Path, tmp_path: Path
) -> None:
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_reparameterization_type=encoder,
        encoder_hidden_size=24,
    )  # fmt: skip
    program = injected(llama, PTuning(tokens=N, encoder=encoder, hidden=24))
    ours = materialize(program).train()
    theirs = peft.get_peft_model(auto(llama), config).train()
    mine = {n.partition("embed_tokens.")[2]: p for n, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(mine[name])
    inputs = labelled("llama", batch("left"))
    got, want = ours(**inputs), theirs(**inputs)
    got.loss.backward()
    want.loss.backward()
    assert distance(got.logits.detach(), want.logits.detach()) <= 1e-6
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            mine_too = mine[name].grad
            assert parameter.grad is not None and mine_too is not None
            assert distance(mine_too, parameter.grad) <= 1e-6, name
    trained = absorb(program, ours)
    to_peft(trained, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    tables = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    ]
    assert [list(table) for table in tables] == [["prompt_embeddings"]] * 2
    assert distance(*(table["prompt_embeddings"] for table in tables)) <= 1e-6
    with torch.no_grad():
        want = ours.eval()(**batch()).logits
        for folder in ("ours", "theirs"):
            again = materialize(attached(llama, tmp_path / folder))
            assert distance(again(**batch()).logits, want) <= 1e-6
        back = peft.PeftModel.from_pretrained(auto(llama), tmp_path / "ours")
        assert distance(back(**batch()).logits, want) <= 1e-6


def test_dropout_stands_between_the_layers_of_an_lstm(llama: Path) -> None:
    live = materialize(injected(llama, PTuning(tokens=N, encoder="LSTM", hidden=8, dropout=0.5)))
    with torch.no_grad():
        still = [live(**batch()).logits for _ in range(2)]
        live.train()
        moving = [live(**batch()).logits for _ in range(2)]
    assert torch.equal(*still) and not torch.equal(*moving)


@pytest.mark.parametrize("method", [PromptTuning(tokens=N), PTuning(tokens=N, encoder="LSTM")])
def test_training_lowers_the_loss(method: Any, llama: Path) -> None:
    live: Any = materialize(injected(llama, method)).train()
    live.gradient_checkpointing_enable()
    optimizer = torch.optim.Adam([p for p in live.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(20):
        loss = live(**labelled("llama", batch())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_directory_round_trips_through_peft(name: str, model: MakeModel, tmp_path: Path) -> None:
    base = model(name)
    theirs = prompted(base, tmp_path / "theirs", task(name))
    program = attached(base, tmp_path / "theirs")
    to_peft(program, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(auto(base), tmp_path / "ours").eval()
    files = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs")]
    assert set(files[0]) == set(files[1])
    inputs = labelled(name, batch("left"))
    with torch.no_grad():
        assert distance(back(**inputs).logits, theirs(**inputs).logits) <= 1e-6
    keys = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert "target_modules" not in keys and keys["token_dim"] == 48


def test_applied_prompt_is_loaded_again(llama: Path, tmp_path: Path) -> None:
    from peftc import apply

    apply(llama, [Lora(rank=2, adapter="l"), PromptTuning(tokens=N, adapter="p")], tmp_path / "out")
    program = load(tmp_path / "out")
    assert list(program.adapters) == ["l", "p"]
    assert materialize(program)(**batch()).logits.shape[1] == N + 9


def vocabulary(folder: Path) -> None:
    """A tokenizer of three words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "sort": 7, "this": 11}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_start_from_a_text_is_its_embeddings(name: str, model: MakeModel, tmp_path: Path) -> None:
    base = model(name)
    vocabulary(tmp_path / "tokenizer")
    options = {"text": "sort this", "tokenizer": str(tmp_path / "tokenizer")}
    program = injected(base, PromptTuning(tokens=N, init="text", **options))
    plain = auto(base)
    with torch.no_grad():
        want = plain.get_input_embeddings()(torch.tensor([7, 11, 7, 11, 7]))
        got = materialize(program).get_parameter(next(iter(program.trainable)))
    assert torch.equal(got, want)
    to_peft(program, tmp_path / "out")
    assert peft.PeftModel.from_pretrained(auto(base), tmp_path / "out") is not None


def test_start_from_the_vocabulary_is_rows_of_it(llama: Path) -> None:
    program = injected(llama, PromptTuning(tokens=N, init="vocabulary"))
    rows = materialize(program).get_parameter(next(iter(program.trainable)))
    table = auto(llama).get_input_embeddings().weight
    assert all(any(torch.equal(row, known) for known in table) for row in rows)


def test_merge_refuses_and_says_what_to_do(llama: Path, tmp_path: Path) -> None:
    program = injected(llama, PromptTuning(tokens=N))
    with pytest.raises(FoldError) as caught:
        Pipeline([Merge()]).run(program)
    assert "no change of a weight" in str(caught.value) and "--format peft" in str(caught.value)
    to_peft(program, tmp_path / "prompt")
    adapters = [(str(tmp_path / "prompt"), 1.0)]
    refuse(tmp_path, FoldError, lambda out: export(llama, out, merge=True, adapters=adapters))
    refuse(tmp_path, ArtifactError, lambda out: export(llama, out, adapters=adapters))


def test_fold_merges_what_stands_beside_a_prompt(llama: Path) -> None:
    torch.manual_seed(0)
    program = injected(llama, Lora(rank=2, adapter="l"), PromptTuning(tokens=N, adapter="p"))
    live = materialize(program)
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    trained = absorb(program, live)
    folded = Pipeline([Fold()]).run(trained)
    assert list(folded.adapters) == ["p"]
    with torch.no_grad():
        assert distance(materialize(folded)(**batch()).logits, live(**batch()).logits) <= 1e-5


def test_model_without_attention_has_a_prompt_too(tmp_path: Path) -> None:
    torch.manual_seed(7)
    config = transformers.MambaConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, state_size=8
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    live: Any = materialize(injected(tmp_path, PromptTuning(tokens=N)))
    inputs = batch()
    with torch.no_grad():
        out = live(**inputs, use_cache=True)
        step = out.logits[:, -1:].argmax(-1)
        second = live(input_ids=step, cache_params=out.cache_params).logits[:, -1].argmax(-1)
    want = generated(live, inputs, max_new_tokens=2)
    assert torch.equal(torch.cat([inputs["input_ids"], step, second[:, None]], 1), want)
    assert torch.equal(generated(live, inputs, max_new_tokens=2, use_cache=False), want)


def test_tied_head_never_sees_a_prompt(tied: Tied) -> None:
    live = materialize(injected(tied("llama"), PromptTuning(tokens=N)))
    assert live(**batch()).logits.shape == (2, N + 9, 97)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"inputs_embeds": torch.zeros(2, 3, 48)}, "no inputs_embeds"),
        ({**batch(), "attention_mask": torch.ones(2, 1, 9, 9)}, "masks of (batch, length)"),
    ],
)
def test_forward_refuses_what_has_no_place_for_a_prompt(
    given: dict[str, Any], words: str, ours: Any
) -> None:
    with pytest.raises(PassError) as caught:
        ours(**given)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("passes", "kind", "words"),
    [
        ([PromptTuning(tokens=64)], PassError, "64 positions"),
        ([PromptTuning(init="text", text="a")], PassError, "tokenizer=…"),
        ([PromptTuning(init="text")], PassError, "give both"),
        ([PromptTuning(text="a")], PassError, "give both"),
        ([PromptTuning(targets="q_proj")], PassError, "cannot serve"),
        ([PromptTuning(adapter="a"), PTuning(adapter="b")], PassError, "add that one last"),
        (
            [PromptTuning(adapter="a"), Lora(adapter="b", targets="embed_tokens")],
            PassError,
            "add that one last",
        ),
    ],
)
def test_pass_refuses(passes: list[Pass], kind: Any, words: str, llama: Path) -> None:
    with pytest.raises(PeftcError) as caught:
        injected(llama, *passes)
    assert words in str(caught.value)


def test_model_without_token_embedding_is_refused() -> None:
    with pytest.raises(SelectionError) as caught:
        Pipeline([PromptTuning()]).run(capture(nn.Sequential(nn.Linear(3, 5))))
    assert "no token embedding" in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"prompt_embeddings": torch.zeros(N, 32)}, "ask for [5, 48]"),
        ({"prompt_embeddings": torch.zeros(3, 48)}, "ask for [5, 48]"),
        ({"other": torch.zeros(N, 48)}, "lacks prompt_embeddings"),
        ({"prompt_embeddings": torch.zeros(N, 48), "more": torch.zeros(1)}, "more, of shape"),
        ({"prompt_embeddings": torch.full((N, 48), torch.nan)}, "NaN"),
    ],
)
def test_damaged_file_is_refused(
    damage: dict[str, Tensor], words: str, llama: Path, tmp_path: Path
) -> None:
    prompted(llama, tmp_path / "good")
    bad = copied(tmp_path / "good", tmp_path / "bad")
    save_file(damage, bad / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError) as caught:
        attached(llama, bad)
    assert words in str(caught.value)


def test_unknown_option_of_the_config_is_refused(llama: Path, tmp_path: Path) -> None:
    prompted(llama, tmp_path)
    edit(tmp_path / "adapter_config.json", num_ranks=3)
    with pytest.raises(AdapterError) as caught:
        attached(llama, tmp_path)
    assert "num_ranks" in str(caught.value)


@pytest.mark.parametrize("rule", ["peft", "mask"])
@pytest.mark.parametrize("name", [*DECODERS, "gemma2"])
def test_plain_model_generates_the_same_from_a_prompts_cache(
    name: str, rule: Any, model: MakeModel, tmp_path: Path
) -> None:
    program = injected(model(name), PromptTuning(tokens=N, positions=rule))
    artifact = to_cache(program, tmp_path / "cache")
    assert artifact.manifest["proof"]["whole"]["relative_error"] <= 1e-5
    prompt, plain, live = PromptCache.open(artifact.path), auto(model(name)), materialize(program)
    for padding in ("none", "left"):
        inputs = batch(padding)
        with torch.no_grad():
            got = plain(**prompt.before(plain, **inputs)).logits
            assert distance(got, live(**inputs).logits[:, N:]) <= 1e-5
        assert torch.equal(
            generated(plain, prompt.before(plain, **inputs)), generated(live, inputs)
        )
        beams = prompt.before(plain, **inputs, copies=2)
        assert torch.equal(
            generated(plain, beams, num_beams=2), generated(live, inputs, num_beams=2)
        )
        room = transformers.StaticCache(plain.config, max_cache_len=N + 16)
        still = prompt.before(plain, **inputs, cache=room)
        assert torch.equal(generated(plain, still), generated(live, inputs))


def test_prompts_cache_is_refused_where_there_is_none(
    model: MakeModel, llama: Path, tmp_path: Path
) -> None:
    prompt, lora = PromptTuning(tokens=N, adapter="p"), Lora(rank=2, adapter="l")
    for base, passes, words in (
        (llama, [lora], "no prompt"),
        (llama, [lora, prompt], "fold these first"),
        (model("t5"), [prompt], "encoder"),
        (model("bert"), [prompt], "no keys and values"),
    ):
        program = injected(base, *passes)
        refuse(tmp_path, ArtifactError, partial(to_cache, program), words)
    to_peft(injected(llama, prompt), tmp_path / "peft")
    with pytest.raises(ArtifactError):
        PromptCache.open(tmp_path / "peft")


def test_damaged_cache_of_a_prompt_is_refused(llama: Path, tmp_path: Path) -> None:
    to_cache(injected(llama, PromptTuning(tokens=N)), tmp_path / "cache")
    file = tmp_path / "cache" / "prompt_cache.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00\x01"[1:])
    with pytest.raises(PeftcError):
        PromptCache.open(tmp_path / "cache")


def test_last_token_of_a_class_is_found_by_the_ids(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SMALL, pad_token_id=0)
    torch.manual_seed(7)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    theirs = prompted(tmp_path / "base", tmp_path / "prompt", "SEQ_CLS")
    ours = materialize(attached(tmp_path / "base", tmp_path / "prompt"))
    for padding, same in (("left", True), ("right", False)):
        inputs = batch(padding)
        inputs["input_ids"] = inputs["input_ids"] * inputs["attention_mask"]
        with torch.no_grad():
            apart = distance(ours(**inputs).logits, theirs(**inputs).logits)
        assert (apart <= 1e-6) == same
    alone = {"input_ids": inputs["input_ids"][:1, :5]}
    with torch.no_grad():
        got, want = ours(**inputs).logits[0], ours(**alone).logits[0]
    assert distance(got, want) <= 1e-6
