"""Passes that edit the structure: ties undone, vocabularies resized, layers replicated."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftc
from peftc import Attach, Lora, Merge, Pass, Pipeline, Program, capture, materialize
from peftc.contract import Effect, PassResult
from peftc.errors import (
    AdapterError,
    PassError,
    PeftcError,
    ProofError,
    TiedWeightError,
    Violations,
)
from peftc.evaluate import Evaluation, value
from peftc.passes.replicate_layers import ReplicateLayers
from peftc.passes.resize_vocabulary import ResizeVocabulary
from peftc.passes.untie import Untie

from .conftest import MakeAdapter, MakeCheckpoint, Tied, auto, distance, logits, with_peft
from .families import COMMON, SPECIMENS
from .zoo import run as zoo_run

FAMILIES = ("llama", "gpt2", "qwen2")
HEAD_AND_EMBEDDING = {
    "llama": ("lm_head", "model.embed_tokens"),
    "qwen2": ("lm_head", "model.embed_tokens"),
    "gpt2": ("lm_head", "transformer.wte"),
}


def run(program: Program | Path, *passes: Pass) -> Program:
    return Pipeline(passes).run(capture(program) if isinstance(program, Path) else program)


def refused(program: Program, pass_: Pass, kind: type[PeftcError], *words: str) -> None:
    """The pass must be refused, with errors of the kind that say where, and how to fix it."""
    with pytest.raises(PeftcError) as caught:
        run(program, pass_)
    found = caught.value
    errors = found.errors if isinstance(found, Violations) else (found,)
    assert all(type(error) is kind and error.where and error.fix for error in errors), errors
    assert all(word in str(found) for word in words), str(found)


def keys(folder: Path) -> set[str]:
    return {key for file in folder.glob("*.safetensors") for key in load_file(file)}


@pytest.mark.parametrize("name", FAMILIES)
def test_untied_logits_are_the_tied_ones_bit_for_bit(name: str, tied: Tied, tmp_path: Path) -> None:
    base = tied(name)
    program = run(base, Untie())
    assert [e.title for e in program.journal] == ["untie"] and program.journal[0].modified
    head, embedding = (f"{module}.weight" for module in HEAD_AND_EMBEDDING[name])
    assert not program.aliases
    assert program.constants[head] is program.constants[embedding]  # no copy before it is written
    model = materialize(program)
    assert model.get_parameter(head) is not model.get_parameter(embedding)
    assert torch.equal(logits(model), logits(auto(base)))
    artifact = peftc.to_safetensors(program, tmp_path / "out")
    assert artifact.manifest["proof"]["whole"]["relative_error"] == 0
    written = auto(tmp_path / "out")
    assert written.config.tie_word_embeddings is False
    assert written.get_parameter(head) is not written.get_parameter(embedding)
    assert torch.equal(logits(written), logits(auto(base)))
    assert keys(tmp_path / "out") == keys(base) | {head}
    assert peftc.verify(tmp_path / "out")["whole"]["relative_error"] == 0


def test_untied_head_lies_in_the_shard_and_the_index_of_its_twin(
    tied: Tied, tmp_path: Path
) -> None:
    base = tied("llama", torch.bfloat16, shards=True)
    peftc.to_safetensors(run(base, Untie()), tmp_path / "out")
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (base, tmp_path / "out")
    )
    places = after["weight_map"]
    assert places == before["weight_map"] | {"lm_head.weight": places["model.embed_tokens.weight"]}
    size = 97 * 48 * 2
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] + size
    for file in {*places.values()}:
        assert set(load_file(tmp_path / "out" / file)) == {
            k for k, f in places.items() if f == file
        }
    assert torch.equal(logits(auto(tmp_path / "out")), logits(auto(base)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", [0, 1], ids=["head", "embedding"])
def test_adapter_on_a_tied_weight_merges_when_it_is_untied(
    name: str, side: int, tied: Tied, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = tied(name)
    trained = adapter(base, target_modules=[HEAD_AND_EMBEDDING[name][side].rpartition(".")[2]])
    want = logits(with_peft(base, trained))
    with pytest.raises(TiedWeightError, match="untie"):
        run(base, Attach(path=str(trained)), Merge())
    for order in ((Untie(), Attach(path=str(trained))), (Attach(path=str(trained)), Untie())):
        merged = run(base, *order, Merge())
        assert distance(logits(materialize(merged)), want) < 1e-5
    artifact = peftc.to_safetensors(merged, tmp_path / "out")
    assert artifact.manifest["proof"]["site"]["sites"] == 1
    assert distance(logits(auto(tmp_path / "out")), want) < 1e-5
    assert peftc.verify(tmp_path / "out")["site"]["sites"] == 1


def test_untie_edits_the_nested_config_when_the_tie_lies_there(tmp_path: Path) -> None:
    model = copy.deepcopy(SPECIMENS["qwen2_5_vl"].build())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    program = run(tmp_path / "base", Untie())
    peftc.to_safetensors(program, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    inputs = SPECIMENS["qwen2_5_vl"].inputs()
    with torch.no_grad():
        want, got = (auto(tmp_path / f)(**inputs).logits for f in ("base", "out"))
    assert torch.equal(got, want)


def test_untie_keeps_other_ties_and_unties_all_names_of_the_weight(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("bert")  # its head's weight and its bias are tied
    program = run(base, Untie())
    assert not program.aliases
    peftc.to_safetensors(program, tmp_path / "out")
    assert torch.equal(logits(auto(tmp_path / "out")), logits(auto(base)))


def test_untie_does_nothing_when_nothing_is_tied(checkpoint: MakeCheckpoint) -> None:
    plain = capture(checkpoint("llama"))
    result = Untie().run(plain)
    assert not result.modified and result.program is plain
    twice = run(checkpoint("gpt2"), Untie(), Untie())
    assert [entry.modified for entry in twice.journal] == [True, False]


def test_untie_is_refused_when_the_architecture_always_ties(tmp_path: Path) -> None:
    SPECIMENS["t5"].build().save_pretrained(tmp_path / "t5")
    refused(capture(tmp_path / "t5"), Untie(), TiedWeightError, "whatever config.json says")


def test_untie_is_refused_when_an_adapter_trains_the_tied_weight_whole(tied: Tied) -> None:
    program = run(tied("llama"), Lora(targets="q_proj", modules_to_save="lm_head"))
    refused(program, Untie(), TiedWeightError, "'default'", "before")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_resized_model_keeps_old_rows_and_begins_new_ones_at_the_mean(
    name: str, kind: str, tied: Tied, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = tied(name, tie_word_embeddings=kind == "tied")
    program = run(base, ResizeVocabulary(size=101, pad_to_multiple_of=8))
    peftc.to_safetensors(program, tmp_path / "out")
    old, new = auto(base), auto(tmp_path / "out")
    assert (new.config.vocab_size, new.config.tie_word_embeddings) == (104, kind == "tied")
    for model in (materialize(program), new):
        got = logits(model)
        assert torch.equal(got[..., :97], logits(old))
        for module in HEAD_AND_EMBEDDING[name]:
            was, now = (m.get_parameter(f"{module}.weight") for m in (old, model))
            assert torch.equal(now[:97], was)
            assert torch.allclose(now[97:], was.mean(0).expand(7, -1), atol=1e-7)
        shared = {id(model.get_parameter(f"{m}.weight")) for m in HEAD_AND_EMBEDDING[name]}
        assert len(shared) == 1 + (kind == "untied")
    # transformers draws around the same mean, with a covariance of 1e-9 times theirs.
    old.resize_token_embeddings(101, pad_to_multiple_of=8)
    ids = torch.arange(104).reshape(2, 52)
    assert distance(logits(new, ids), logits(old, ids)) < 1e-3
    assert peftc.verify(tmp_path / "out")["whole"]["relative_error"] == 0


def test_resized_rows_are_zero_when_zeros_are_asked_for(tied: Tied, tmp_path: Path) -> None:
    peftc.to_safetensors(
        run(tied("llama", torch.bfloat16, True), ResizeVocabulary(size=100, init="zeros")),
        tmp_path / "out",
    )
    weight = auto(tmp_path / "out").get_input_embeddings().weight
    assert weight.dtype == torch.bfloat16 and not weight[97:].any() and weight[:97].all()


def test_resize_covers_the_heads_bias_and_buffers(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("bert")
    peftc.to_safetensors(run(base, ResizeVocabulary(size=99)), tmp_path / "bert")
    bias = auto(tmp_path / "bert").get_output_embeddings().bias
    was = auto(base).get_output_embeddings().bias
    assert torch.equal(bias[:97], was) and torch.allclose(bias[97:], was.mean())
    SPECIMENS["bart"].build().save_pretrained(tmp_path / "bart")
    program = run(tmp_path / "bart", ResizeVocabulary(size=70))
    peftc.to_safetensors(program, tmp_path / "out")
    model = auto(tmp_path / "out")
    assert model.final_logits_bias.shape == (1, 70)
    with torch.no_grad():
        inputs = SPECIMENS["bart"].inputs()
        got, want = model(**inputs).logits, auto(tmp_path / "bart")(**inputs).logits
    assert torch.equal(got[..., :64], want)


def test_mean_of_rows_is_summed_a_few_rows_at_a_time(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = run(checkpoint("llama", torch.bfloat16), ResizeVocabulary(size=120))
    constant = program.constants["lm_head.weight"]
    want = value(program.captured["lm_head.weight"])
    assert constant is program.captured["lm_head.weight"] and want.shape == (120, 48)
    import peftc.evaluate
    import peftc.reading

    read, largest = peftc.reading.read, []

    def watched(leaf: Any, low: int = 0, high: int | None = None) -> torch.Tensor:
        rows = read(leaf, low, high)
        largest.append(len(rows))
        return rows

    monkeypatch.setattr(peftc.reading, "read", watched)

    def sixteen(shape: tuple[int, ...]) -> list[tuple[int, int]]:
        return [(low, min(low + 16, shape[0])) for low in range(0, shape[0], 16)]

    monkeypatch.setattr(peftc.evaluate, "chunks", sixteen)
    evaluation = Evaluation(constant.graph, constant.inputs)  # type: ignore[union-attr]
    pieces = [evaluation.rows(low, min(low + 17, 120)) for low in range(0, 120, 17)]
    assert torch.equal(torch.cat(pieces).bfloat16(), want)
    assert max(largest) <= 17


def test_resize_before_attach_serves_an_adapter_of_a_resized_model(
    tied: Tied, tmp_path: Path
) -> None:
    base = tied("qwen2")
    model = auto(base)
    model.resize_token_embeddings(100)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(80, 100)[None]
    want = logits(wrapped.eval(), ids)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    attach = Attach(path=str(tmp_path / "adapter"))
    with pytest.raises(AdapterError, match="shape"):
        run(base, attach)
    passes = (ResizeVocabulary(size=100), Untie(), attach, Merge())
    peftc.to_safetensors(run(base, *passes), tmp_path / "out")
    assert distance(logits(auto(tmp_path / "out"), ids), want) < 1e-4
    assert peftc.verify(tmp_path / "out")["site"]["sites"] == 3


def test_smaller_vocabulary_drops_rows_when_they_are_asked_for(tied: Tied, tmp_path: Path) -> None:
    base = tied("llama")
    refused(capture(base), ResizeVocabulary(size=80), PassError, "97", "--drop-rows")
    peftc.to_safetensors(run(base, ResizeVocabulary(size=80, drop_rows=True)), tmp_path / "out")
    ids = torch.arange(80)[None]
    assert torch.equal(logits(auto(tmp_path / "out"), ids), logits(auto(base), ids)[..., :80])
    again = run(tmp_path / "out", ResizeVocabulary(size=90), ResizeVocabulary(size=96))
    assert materialize(again).get_parameter("lm_head.weight").shape == (96, 48)
    cut = run(again, ResizeVocabulary(size=85, drop_rows=True))
    assert torch.equal(logits(materialize(cut), ids)[..., :80], logits(auto(tmp_path / "out"), ids))


def test_smaller_vocabulary_is_refused_when_it_drops_a_special_token(tied: Tied) -> None:
    program = capture(tied("llama", eos_token_id=[2, 96]))
    refused(
        program, ResizeVocabulary(size=90, drop_rows=True), PassError, "eos_token_id", "token 96"
    )


def test_resize_is_refused_when_the_rows_were_rewritten(tied: Tied, adapter: MakeAdapter) -> None:
    program = run(tied("llama"), Lora(targets="embed_tokens"))
    refused(program, ResizeVocabulary(size=99), PassError, "embed_tokens.weight", "before")
    others = run(tied("llama"), Lora(targets="q_proj"), ResizeVocabulary(size=99))
    assert set(others.adapters) == {"default"}
    assert logits(materialize(others)).shape[-1] == 99


def test_resize_does_nothing_when_the_size_is_the_same(tied: Tied) -> None:
    plain = capture(tied("llama"))
    result = ResizeVocabulary(size=97).run(plain)
    assert not result.modified and result.program is plain


def test_resize_is_refused_when_stored_ties_differ(tied: Tied, tmp_path: Path) -> None:
    base = tied("llama")
    tensors = load_file(base / "model.safetensors")
    for change in (0.0, 1.0):
        folder = tmp_path / str(change)
        folder.mkdir()
        (folder / "config.json").write_text((base / "config.json").read_text())
        both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + change}
        save_file(both, folder / "model.safetensors", {"format": "pt"})
        program = capture(folder)
        if change:
            refused(program, ResizeVocabulary(size=99), TiedWeightError, "untie")
            run(program, Untie(), ResizeVocabulary(size=99))
        else:
            got = logits(materialize(run(program, ResizeVocabulary(size=99))))
            assert torch.equal(got[..., :97], logits(auto(folder)))


@pytest.mark.parametrize("name", [n for n in COMMON if n != "vit"])
def test_old_tokens_logits_are_the_same_bit_for_bit_on_every_architecture(
    name: str, tmp_path: Path
) -> None:
    specimen = SPECIMENS[name]
    model = specimen.build()
    want = zoo_run(model, specimen)
    model.save_pretrained(tmp_path)
    # T5 is tied whatever its config says.
    passes = [*([] if name == "t5" else [Untie()]), ResizeVocabulary(size=72)]
    got = zoo_run(materialize(run(tmp_path, *passes)), specimen)
    assert torch.equal(got[..., : want.shape[-1]], want)


@pytest.mark.parametrize(
    "pass_", [Untie(), ResizeVocabulary(size=99), ReplicateLayers(ranges="0-2,1-2")], ids=repr
)
def test_structural_pass_is_refused_when_the_source_is_a_live_module(pass_: Pass) -> None:
    program = capture(nn.Sequential(nn.Linear(3, 5)))
    refused(program, pass_, PassError, "config.json", "save_pretrained")


def test_structure_may_change_only_when_a_pass_says_so(tied: Tied) -> None:
    class Sly(Untie):
        """Untie without saying so."""

        structural = False

    refused_by = pytest.raises(PassError, match="changed the model's structure")
    with refused_by:
        run(tied("llama"), Sly())


def test_copies_must_equal_what_they_copy(tied: Tied) -> None:
    class Wrong(ReplicateLayers):
        """Name the wrong layers as the copies' own."""

        def run(self, program: Program) -> PassResult:
            result = super().run(program)
            old, new = "model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"
            return PassResult(result.program, True, origins={**result.origins, new: old})

    with pytest.raises(ProofError, match="copy of"):
        run(tied("llama"), Wrong(ranges="0-2,1-2"))
    assert ReplicateLayers.effect is Effect.CHANGES


def test_passes_chain_into_one_recorded_checkpoint(tied: Tied, tmp_path: Path) -> None:
    base = tied("gpt2", torch.bfloat16)
    passes = [Untie(), ResizeVocabulary(size=100), ReplicateLayers(ranges="0-2,0-1")]
    artifact = peftc.apply(base, passes, tmp_path / "applied")
    titles = [entry["title"] for entry in artifact.manifest["journal"]]
    assert titles == ["untie", "resize_vocabulary", "replicate_layers"]
    assert artifact.manifest["source"]["path"] == str(base)
    model = auto(artifact.path / "base")
    config = model.config
    assert (config.vocab_size, config.n_layer, config.tie_word_embeddings) == (100, 3, False)
    assert torch.equal(logits(model), logits(materialize(run(base, *passes))))
    peftc.verify(artifact.path)


def test_commands_run_the_structural_passes(tied: Tied, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from peftc.cli import cli

    args = ["apply", str(tied("llama")), "-o", str(tmp_path / "out"), "untie"]
    args += ["resize_vocabulary", "--size", "100", "--pad-to-multiple-of", "16"]
    args += ["replicate_layers", "--ranges", "0-2,1-2"]
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "base" / "config.json").read_text())
    assert (config["vocab_size"], config["num_hidden_layers"]) == (112, 3)
