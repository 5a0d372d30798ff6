"""Prompts in training and in files: encoders, starts, directories, caches, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftc import (
    Fold,
    Lora,
    Merge,
    Pass,
    PeftcError,
    Pipeline,
    PromptTuning,
    PTuning,
    absorb,
    capture,
    export,
    load,
    materialize,
    to_peft,
)
from peftc.errors import AdapterError, ArtifactError, FoldError, PassError, SelectionError

from .conftest import SMALL, MakeCheckpoint, Tied, auto, distance
from .helpers import copied, edit, refuse
from .prompting import (
    MODELS,
    MakeModel,
    N,
    attached,
    batch,
    checkpoint_of,
    generated,
    injected,
    labelled,
    prompted,
    task,
)


@pytest.fixture(scope="session")
def model(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Makes, once for each name, a tiny random checkpoint."""
    folder = tmp_path_factory.mktemp
    return lambda name: checkpoint_of(name, folder) if name in MODELS else checkpoint(name)


@pytest.fixture
def llama(model: MakeModel) -> Path:
    return model("llama")


@pytest.fixture
def ours(llama: Path) -> Any:
    return materialize(injected(llama, PromptTuning(virtual_tokens=N)))


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_p_tuning_equals_pefts_in_training_and_when_saved(
    encoder: Any, llama: Path, tmp_path: Path
) -> None:
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_reparameterization_type=encoder,
        encoder_hidden_size=24,
    )  # fmt: skip
    program = injected(llama, PTuning(virtual_tokens=N, encoder=encoder, hidden=24))
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
    live = materialize(
        injected(llama, PTuning(virtual_tokens=N, encoder="LSTM", hidden=8, dropout=0.5))
    )
    with torch.no_grad():
        still = [live(**batch()).logits for _ in range(2)]
        live.train()
        moving = [live(**batch()).logits for _ in range(2)]
    assert torch.equal(*still) and not torch.equal(*moving)


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

    apply(
        llama,
        [Lora(rank=2, adapter="l"), PromptTuning(virtual_tokens=N, adapter="p")],
        tmp_path / "out",
    )
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
    program = injected(base, PromptTuning(virtual_tokens=N, init="text", **options))
    plain = auto(base)
    with torch.no_grad():
        want = plain.get_input_embeddings()(torch.tensor([7, 11, 7, 11, 7]))
        got = materialize(program).get_parameter(next(iter(program.trainable)))
    assert torch.equal(got, want)
    to_peft(program, tmp_path / "out")
    assert peft.PeftModel.from_pretrained(auto(base), tmp_path / "out") is not None


def test_start_from_the_vocabulary_is_rows_of_it(llama: Path) -> None:
    program = injected(llama, PromptTuning(virtual_tokens=N, init="vocabulary"))
    rows = materialize(program).get_parameter(next(iter(program.trainable)))
    table = auto(llama).get_input_embeddings().weight
    assert all(any(torch.equal(row, known) for known in table) for row in rows)


def test_merge_refuses_and_says_what_to_do(llama: Path, tmp_path: Path) -> None:
    program = injected(llama, PromptTuning(virtual_tokens=N))
    with pytest.raises(FoldError) as caught:
        Pipeline([Merge()]).run(program)
    assert "no change of a weight" in str(caught.value) and "--format peft" in str(caught.value)
    to_peft(program, tmp_path / "prompt")
    adapters = [(str(tmp_path / "prompt"), 1.0)]
    refuse(tmp_path, FoldError, lambda out: export(llama, out, merge=True, adapters=adapters))
    refuse(tmp_path, ArtifactError, lambda out: export(llama, out, adapters=adapters))


def test_fold_merges_what_stands_beside_a_prompt(llama: Path) -> None:
    torch.manual_seed(0)
    program = injected(
        llama, Lora(rank=2, adapter="l"), PromptTuning(virtual_tokens=N, adapter="p")
    )
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
    live: Any = materialize(injected(tmp_path, PromptTuning(virtual_tokens=N)))
    inputs = batch()
    with torch.no_grad():
        out = live(**inputs, use_cache=True)
        step = out.logits[:, -1:].argmax(-1)
        second = live(input_ids=step, cache_params=out.cache_params).logits[:, -1].argmax(-1)
    want = generated(live, inputs, max_new_tokens=2)
    assert torch.equal(torch.cat([inputs["input_ids"], step, second[:, None]], 1), want)
    assert torch.equal(generated(live, inputs, max_new_tokens=2, use_cache=False), want)


def test_tied_head_never_sees_a_prompt(tied: Tied) -> None:
    live = materialize(injected(tied("llama"), PromptTuning(virtual_tokens=N)))
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
        ([PromptTuning(virtual_tokens=64)], PassError, "64 positions"),
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
    edit(tmp_path / "adapter_config.json", num_prompts=3)
    with pytest.raises(AdapterError) as caught:
        attached(llama, tmp_path)
    assert "num_prompts" in str(caught.value)


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
