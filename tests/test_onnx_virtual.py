"""Prompts and prefixes in ONNX: the graph starts from what virtual tokens compute, and says it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peftc
from peftc import (
    ConstantCache,
    Lora,
    Nf4,
    Pass,
    PrefixTuning,
    Program,
    PromptTuning,
    apply,
    materialize,
    to_onnx,
    to_peft,
    verify,
)
from peftc.errors import ArtifactError, ProofError

from .conftest import MakeCheckpoint, auto, distance
from .helpers import edit, refuse
from .prompting import N, batch, injected
from .test_constant_cache import with_lora
from .test_onnx import Runner, compare, generated

VIRTUAL: dict[str, Pass] = {
    "prompt": PromptTuning(virtual_tokens=N, adapter="p"),
    "prefix": PrefixTuning(virtual_tokens=N, adapter="p"),
}


@pytest.fixture(scope="module")
def base(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, of which two are captured, and a token that ends texts."""
    config = {**transformers.AutoConfig.from_pretrained(checkpoint("llama")).to_dict()}
    torch.manual_seed(7)
    config |= {"num_hidden_layers": 3, "eos_token_id": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("three")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=VIRTUAL)
def tuned(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Program]:
    program = injected(base, VIRTUAL[request.param])
    return to_onnx(program, tmp_path_factory.mktemp("onnx") / "out").path, program


def test_graph_computes_what_the_live_tuned_model_does(tuned: tuple[Path, Program]) -> None:
    path, program = tuned
    live = materialize(program)
    for texts, past in ((1, 0), (3, 0), (3, 41)):  # left-padded
        compare_tail(path, live, texts, past)
    ids = batch()["input_ids"]
    with torch.no_grad():
        plain = auto(path)(ids).logits
        assert distance(plain, live(ids).logits[:, -ids.shape[1] :]) > 1e-2


def compare_tail(path: Path, live: Any, texts: int, past: int) -> None:
    """`test_onnx.compare` with a model whose logits are of its virtual tokens too."""

    class Tail:
        config = live.config

        def __call__(self, input_ids: torch.Tensor, **given: Any) -> Any:
            output = live(input_ids=input_ids, **given)
            output.logits = output.logits[:, -input_ids.shape[1] :]
            return output

    compare(path, Tail(), texts, past, 1e-5)


def test_both_runtimes_generate_what_the_live_tuned_model_does(
    tuned: tuple[Path, Program],
) -> None:
    path, program = tuned
    ids = torch.tensor([[5, 17, 3, 29, 8]])
    live: Any = materialize(program)
    want = live.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False).tolist()
    with_end = live.generate(
        ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert Runner(path).greedy(ids, 20).tolist() == with_end.tolist()
    assert generated(path, ids[0].tolist(), 20) == want[0]


def test_cache_is_no_input_and_clones_have_their_own(tuned: tuple[Path, Program]) -> None:
    path, _ = tuned
    proto = onnx.load(str(path / "model.onnx"), load_external_data=False)
    assert [i.name for i in proto.graph.input][:3] == [
        "input_ids", "attention_mask", "position_ids",
    ]  # fmt: skip
    names = {t.name for t in proto.graph.initializer}
    for layer in range(3):
        assert f"model.layers.{layer}.self_attn.constant_key" in names
    manifest = peftc.Artifact.open(path).manifest
    assert manifest["onnx"]["graphs"]["model.onnx"]["layers"]["model.layers"]["captured"] == 2
    assert manifest["constant_cache"]["tokens"] == N


def test_directory_serves_transformers_from_the_same_cache(tuned: tuple[Path, Program]) -> None:
    path, program = tuned
    plain, cache, inputs = auto(path), ConstantCache.open(path), batch("left")
    with torch.no_grad():
        want = materialize(program)(**inputs).logits[:, -9:]
        assert distance(plain(**cache.before(plain, **inputs)).logits, want) <= 1e-5


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(count=st.integers(1, 12), seed=st.integers(0, 9))
def test_any_number_of_tokens_is_captured(count: int, seed: int, base: Path) -> None:
    """Its examples' sizes must be taken for no other dimension."""
    from peftc.exporters.virtual_constants import settled
    from peftc.whole import capture_whole

    program = injected(base, PrefixTuning(virtual_tokens=count, seed=seed))
    plain, virtual = settled(program, Path("out"))
    (whole,) = capture_whole(plain)
    assert virtual is not None and virtual.cache.tokens == count
    assert {port.dims[2] for port in whole.outputs[1:]} == {"past + sequence"}


@pytest.mark.parametrize("weights", ["stored", "int8"])
def test_merged_adapter_and_a_prompt_are_one_directory(
    base: Path, tmp_path: Path, weights: Any
) -> None:
    program = with_lora(base, VIRTUAL["prompt"])
    for name in program.adapters:
        to_peft(program, tmp_path / name, adapter=name)
    adapters = [(str(tmp_path / name), 1.0) for name in program.adapters]
    out = peftc.export(
        base, tmp_path / "out", merge=True, adapters=adapters, format="onnx", weights=weights
    )
    if weights == "stored":
        compare_tail(out.path, materialize(program), 3, 9)
    assert out.manifest["proof"]["onnx"]["model.onnx"]["relative_error"] < 0.1
    assert verify(out.path)["onnx"] == out.manifest["proof"]["onnx"]


def test_base_in_four_bits_takes_a_prompt(base: Path, tmp_path: Path) -> None:
    program = injected(base, Nf4(block_size=32), VIRTUAL["prompt"])
    out = to_onnx(program, tmp_path / "out")
    assert out.manifest["proof"]["onnx"]["model.onnx"]["relative_error"] <= 1e-5
    compare_tail(out.path, materialize(program), 3, 9)


@pytest.mark.parametrize(("name", "virtual"), [("gpt2", "prompt"), ("opt", "prefix")])
def test_learned_positions_begin_behind_the_tokens(
    name: str, virtual: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    program = injected(checkpoint(name), VIRTUAL[virtual])
    out = to_onnx(program, tmp_path / virtual, proof="sites").path
    compare_tail(out, materialize(program), 3, 9)


def test_window_that_slides_is_right_for_a_prompt_and_refused_for_a_prefix(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = tmp_path / "mistral"
    config = transformers.MistralConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.MistralForCausalLM(config).save_pretrained(base)
    prompted = injected(base, VIRTUAL["prompt"])
    out = to_onnx(prompted, tmp_path / "prompt", proof="sites").path
    compare_tail(out, materialize(prompted), 3, 21)
    job = partial(to_onnx, injected(base, VIRTUAL["prefix"]))
    refuse(tmp_path, ArtifactError, job, "slide out of sight")


def test_adapters_beside_a_prompt_are_to_be_merged(base: Path, tmp_path: Path) -> None:
    program = injected(base, Lora(rank=2, adapter="l"), VIRTUAL["prompt"])
    refuse(tmp_path, ArtifactError, partial(to_onnx, program), "the adapter l", "--merge")


def test_prompt_of_an_encoder_is_refused(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    job = partial(to_onnx, injected(checkpoint("bert"), VIRTUAL["prompt"]))
    refuse(tmp_path, ArtifactError, job, "no keys and values")


def test_graph_with_other_keys_is_not_published(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftc.exporters.to_cache import computed

    def damaged(live: Any) -> ConstantCache:
        first, *rest = computed(live).layers
        return ConstantCache(((first[0] + 0.1, first[1]), *rest))

    monkeypatch.setattr("peftc.exporters.virtual_constants.computed", damaged)
    job = partial(to_onnx, injected(base, VIRTUAL["prompt"]))
    refuse(tmp_path, ProofError, job, "differs from eager torch's")


def test_apply_directory_is_exported_as_it_is(base: Path, tmp_path: Path) -> None:
    apply(base, [VIRTUAL["prefix"]], tmp_path / "applied")
    out = peftc.export(tmp_path / "applied", tmp_path / "out", format="onnx", proof="sites")
    assert out.manifest["constant_cache"]["tokens"] == N
    edit(tmp_path / "out" / "peftc.json", constant_cache=None)
    with pytest.raises(ArtifactError, match="no constant cache"):
        ConstantCache.open(tmp_path / "out")
    config = json.loads((out.path / "genai_config.json").read_text())
    assert config["model"]["context_length"] == 64 - N
