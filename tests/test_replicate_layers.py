"""Layer replication: copies of layers that share weights, and each its own adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import peftc
from peftc import Attach, Lora, Merge, capture, materialize
from peftc.errors import (
    AdapterError,
    ArtifactError,
    CaptureError,
    PassError,
)
from peftc.passes.replicate_layers import ReplicateLayers, needed
from peftc.passes.untie import Untie

from .conftest import MakeCheckpoint, Tied, auto, distance, logits, with_peft
from .families import SPECIMENS
from .test_structure import FAMILIES, keys, refused, run


def replicated_adapter(base: Path, folder: Path, ranges: list[list[int]]) -> Any:
    """A PEFT model with replicated layers and random LoRA weights, saved too."""
    options: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "r": 4}
    wrapped = peft.get_peft_model(auto(base), peft.LoraConfig(layer_replication=ranges, **options))
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def without_replication(adapter: Path, to: Path) -> Path:
    """The same adapter, whose config does not say that layers are replicated."""
    to.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, "layer_replication": None}))
    name = "adapter_model.safetensors"
    (to / name).write_bytes((adapter / name).read_bytes())
    return to


def test_replicated_model_equals_pefts_when_it_carries_the_same_lora(
    tied: Tied, tmp_path: Path
) -> None:
    base = tied("llama", num_hidden_layers=4)
    want = logits(replicated_adapter(base, tmp_path / "peft", [[0, 3], [1, 4]]))
    plain = without_replication(tmp_path / "peft", tmp_path / "plain")
    program = run(base, ReplicateLayers(ranges="0-3,1-4"), Attach(path=str(plain)))
    assert [entry.title for entry in program.journal] == ["replicate_layers", "attach"]
    model: Any = materialize(program)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))
    assert distance(logits(model), want) < 1e-6


def test_each_replicated_layer_merges_its_own_adapter_where_pefts_merge_is_wrong(
    tied: Tied, tmp_path: Path
) -> None:
    base = tied("llama", num_hidden_layers=4)
    wrapped = replicated_adapter(base, tmp_path / "peft", [[0, 3], [1, 4]])
    want = logits(wrapped)
    plain = without_replication(tmp_path / "peft", tmp_path / "plain")
    passes = (ReplicateLayers(ranges="0-3,1-4"), Attach(path=str(plain)), Merge())
    merged = run(base, *passes)
    assert distance(logits(materialize(merged)), want) < 1e-5
    peftc.to_safetensors(merged, tmp_path / "out")
    written = auto(tmp_path / "out")
    assert written.config.num_hidden_layers == 6
    assert distance(logits(written), want) < 1e-5
    assert peftc.verify(tmp_path / "out")["site"]["sites"] == 12
    one, other = (written.model.layers[i].self_attn.q_proj.weight for i in (1, 3))
    assert not torch.equal(one, other)  # both are copies of layer 1
    assert torch.equal(
        written.model.layers[1].self_attn.k_proj.weight,
        written.model.layers[3].self_attn.k_proj.weight,
    )
    assert distance(logits(wrapped.merge_and_unload()), want) > 1e-2, "PEFT has mended its merge"


@pytest.mark.parametrize("name", FAMILIES)
def test_replicated_checkpoint_loads_in_transformers(
    name: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint(name, torch.bfloat16, shards=True)
    program = run(base, ReplicateLayers(ranges=[[0, 2], [0, 1], [1, 2]]))
    plain = capture(base)
    one, two = ({id(c) for c in p.constants.values()} for p in (plain, program))
    assert len(one) == len(two)  # copies share the constants of what they copy
    peftc.to_safetensors(program, tmp_path / "out")
    old, new = auto(base), auto(tmp_path / "out")
    assert new.config.num_hidden_layers == 4
    if layer_types := getattr(new.config, "layer_types", None):
        assert len(layer_types) == 4
    stack = "transformer.h" if name == "gpt2" else "model.layers"
    for copy_, layer in enumerate([0, 1, 0, 1]):
        was = old.get_submodule(f"{stack}.{layer}").state_dict()
        now = new.get_submodule(f"{stack}.{copy_}").state_dict()
        assert was.keys() == now.keys() and all(torch.equal(was[k], now[k]) for k in was)
    assert torch.equal(logits(materialize(program)), logits(new))
    generated = new.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        uncached = new.generate(
            torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, use_cache=False
        )
    assert torch.equal(generated, uncached)  # each layer has its own place in the cache
    assert peftc.verify(tmp_path / "out")["whole"]["relative_error"] == 0


def test_unmerged_adapter_on_replicated_layers_keeps_the_base_and_loads_in_peft(
    tied: Tied, tmp_path: Path
) -> None:
    base = tied("llama", num_hidden_layers=3)
    program = run(base, ReplicateLayers(ranges="0-2,1-3"), Lora(rank=3, targets="q_proj,o_proj"))
    trained = materialize(program)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    peftc.to_peft(peftc.absorb(program, trained), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["layer_replication"] == [[0, 2], [1, 3]]
    assert distance(logits(with_peft(base, tmp_path / "adapter")), logits(trained)) < 1e-6
    passes = [ReplicateLayers(ranges="0-2,1-3"), Lora(rank=3, targets="q_proj")]
    artifact = peftc.apply(base, passes, tmp_path / "applied")
    assert not (artifact.path / "base").exists()
    config = json.loads((artifact.path / "adapter" / "adapter_config.json").read_text())
    assert config["layer_replication"] == [[0, 2], [1, 3]]
    with_peft(base, artifact.path / "adapter")


def test_apply_writes_the_replicated_base_when_peft_cannot_replicate_it(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("qwen2")  # PEFT does not lengthen its layer_types
    passes = [ReplicateLayers(ranges="0-2,1-2"), Lora(rank=3, targets="q_proj")]
    artifact = peftc.apply(base, passes, tmp_path / "out")
    config = json.loads((artifact.path / "adapter" / "adapter_config.json").read_text())
    assert "layer_replication" not in config
    model = with_peft(artifact.path / "base", artifact.path / "adapter")
    assert model.config.num_hidden_layers == 3
    want = logits(materialize(run(base, *passes)))
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(materialize(peftc.load(artifact.path))), want)
    assert peftc.verify(artifact.path)["sites"] > 0
    with pytest.raises(ArtifactError, match="apply"):
        peftc.to_peft(run(base, *passes), tmp_path / "adapter")


def test_attach_replicates_layers_when_the_adapters_config_says_so(
    tied: Tied, tmp_path: Path
) -> None:
    base = tied("llama", num_hidden_layers=4)
    want = logits(replicated_adapter(base, tmp_path / "peft", [[0, 3], [1, 4]]))
    program = run(base, Attach(path=str(tmp_path / "peft")))
    assert [entry.title for entry in program.journal] == ["replicate_layers", "attach"]
    assert distance(logits(materialize(program)), want) < 1e-6
    peftc.export(base, tmp_path / "out", merge=True, adapters=[(str(tmp_path / "peft"), 1.0)])
    assert distance(logits(auto(tmp_path / "out")), want) < 1e-5
    assert peftc.verify(tmp_path / "out")["site"]["sites"] == 12
    artifact = peftc.apply(base, [Attach(path=str(tmp_path / "peft"))], tmp_path / "applied")
    assert distance(logits(materialize(peftc.load(artifact.path))), want) < 1e-6
    assert peftc.verify(artifact.path)["sites"] == len(program.sites)


def test_needed_is_the_replication_that_an_adapters_config_asks_for(tied: Tied) -> None:
    plain = capture(tied("llama"))
    config = {"layer_replication": [[0, 2], [1, 2]]}
    assert needed(plain, {}) == needed(plain, {"layer_replication": None}) == []
    (pass_,) = needed(plain, config)
    assert pass_ == ReplicateLayers(ranges="0-2,1-2")
    assert needed(run(plain, pass_), config) == []
    with pytest.raises(AdapterError, match="layer_replication"):
        needed(run(plain, ReplicateLayers(ranges="0-2,0-2")), config)


def test_fused_experts_are_replicated_and_keep_what_was_merged_when_untied(tmp_path: Path) -> None:
    model = copy.deepcopy(SPECIMENS["mixtral"].build())
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")  # each expert's matrices are stored one by one
    passes = (ReplicateLayers(ranges="0-2,0-1"), Lora(targets="q_proj", parameters="down_proj"))
    program = run(tmp_path / "base", *passes)
    trained = materialize(program)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    ids = torch.arange(12)[None]
    want = logits(trained, ids)
    merged = run(peftc.absorb(program, trained), Merge(), Untie())
    assert distance(logits(materialize(merged), ids), want) < 1e-5
    peftc.to_safetensors(merged, tmp_path / "out")
    written = auto(tmp_path / "out")
    assert distance(logits(written, ids), want) < 1e-5
    parts = {key for key in keys(tmp_path / "out") if "layers.2" in key and "experts" in key}
    assert len(parts) == 4 * 3


def test_replicated_twice_names_the_originals_layers(tied: Tied) -> None:
    from peftc.structure import EditedSource, peft_edits

    base = tied("llama", num_hidden_layers=3)
    program = run(base, ReplicateLayers(ranges="0-3,0-1"), ReplicateLayers(ranges="2-4,0-1"))
    assert isinstance(program.source, EditedSource) and program.source.layers == (2, 0, 0)
    assert peft_edits(program) == {"layer_replication": [[2, 3], [0, 1], [0, 1]]}
    assert peft_edits(run(program, Untie())) is None


@pytest.mark.parametrize(
    ("ranges", "word"), [("0-2-3", "0-4,2-6"), ("2-1", "exclusive"), ("a", "0-4,2-6"), ([], "1")]
)
def test_bad_ranges_are_refused(ranges: Any, word: str) -> None:
    with pytest.raises(PassError, match=word):
        peftc.Recipe(peftc=1, passes=[{"replicate_layers": {"ranges": ranges}}]).build()


def test_replication_is_refused_when_a_layer_is_not_there(tied: Tied) -> None:
    refused(
        capture(tied("llama")), ReplicateLayers(ranges="0-2,1-3"), PassError, "no layer 2", "to 2"
    )


def test_replication_is_refused_when_layers_were_rewritten(tied: Tied) -> None:
    program = run(tied("llama"), Lora(rank=2))
    refused(program, ReplicateLayers(ranges="0-2,1-2"), PassError, "before")


def test_replication_is_refused_when_there_are_two_stacks(tmp_path: Path) -> None:
    SPECIMENS["bart"].build().save_pretrained(tmp_path / "bart")
    program = capture(tmp_path / "bart")
    refused(program, ReplicateLayers(ranges="0-1"), PassError, "2 lists", "one stack")


def test_replication_is_refused_when_a_layer_would_be_built_otherwise(tmp_path: Path) -> None:
    config = transformers.Qwen2MoeConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, num_experts=4, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, decoder_sparse_step=2,
    )  # fmt: skip
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    program = capture(tmp_path / "base")  # a mixture every second layer, by its number
    with pytest.raises((PassError, CaptureError), match=r"layer|tensors"):
        run(program, ReplicateLayers(ranges="0-1,0-4"))
    model = materialize(run(program, ReplicateLayers(ranges="0-4,2-4")))
    assert model.config.num_hidden_layers == 6  # type: ignore[union-attr]
