"""Prompts and prefixes as constant keys and values: the plain model starts from what it was given.

Its logits and tokens are those of the virtual tokens, with any cache, and beside merged weights.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from peftc import (
    ConstantCache,
    Lora,
    Nf4,
    Pass,
    PeftcError,
    PrefixTuning,
    Program,
    PromptTuning,
    PTuning,
    absorb,
    apply,
    capture,
    export,
    materialize,
    to_cache,
    to_peft,
    verify,
)
from peftc.errors import ArtifactError, FoldError, ProofError

from .conftest import MakeCheckpoint, auto, distance
from .helpers import copied, refuse
from .prompting import DECODERS, MODELS, MakeModel, N, batch, checkpoint_of, generated, injected

PROMPT = PromptTuning(virtual_tokens=N, adapter="p")
PREFIX = PrefixTuning(virtual_tokens=N, adapter="p")
VIRTUAL: dict[str, Pass] = {
    "prompt": PROMPT,
    "by-mask": PromptTuning(virtual_tokens=N, positions="mask"),
    "p-tuning": PTuning(virtual_tokens=N, encoder="LSTM", hidden=8),
    "prefix": PREFIX,
    "perceptron": PrefixTuning(virtual_tokens=N, projection=True),
}


@pytest.fixture(scope="session")
def model(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Makes, once for each name, a tiny random checkpoint."""
    folder = tmp_path_factory.mktemp
    return lambda name: checkpoint_of(name, folder) if name in MODELS else checkpoint(name)


@pytest.fixture
def llama(model: MakeModel) -> Path:
    return model("llama")


def with_lora(base: Path, virtual: Pass) -> Program:
    """A program with virtual tokens and a LoRA that changes something."""
    program = injected(base, Lora(rank=2, adapter="l"), virtual)
    live = materialize(program)
    torch.manual_seed(0)
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return absorb(program, live)


@pytest.mark.parametrize("virtual", VIRTUAL)
@pytest.mark.parametrize("name", [*DECODERS, "gemma2"])
def test_plain_model_generates_the_same_from_a_constant_cache(
    name: str, virtual: str, model: MakeModel, tmp_path: Path
) -> None:
    program = injected(model(name), VIRTUAL[virtual])
    if name == "gemma2" and virtual in ("prefix", "perceptron"):
        refuse(tmp_path, ArtifactError, partial(to_cache, program), "slide out of sight")
        return
    artifact = to_cache(program, tmp_path / "cache")
    assert artifact.manifest["proof"]["whole"]["relative_error"] <= 1e-5
    cache, plain, live = ConstantCache.open(artifact.path), auto(model(name)), materialize(program)
    for padding in ("none", "left"):
        inputs = batch(padding)
        with torch.no_grad():
            got = plain(**cache.before(plain, **inputs)).logits
            assert distance(got, live(**inputs).logits[:, -9:]) <= 1e-5
        assert torch.equal(generated(plain, cache.before(plain, **inputs)), generated(live, inputs))
        beams = cache.before(plain, **inputs, copies=2)
        assert torch.equal(
            generated(plain, beams, num_beams=2), generated(live, inputs, num_beams=2)
        )
        room = transformers.StaticCache(plain.config, max_cache_len=N + 16)
        still = cache.before(plain, **inputs, cache=room)
        assert torch.equal(generated(plain, still), generated(live, inputs))


@pytest.mark.parametrize("virtual", [PROMPT, PREFIX], ids=["prompt", "prefix"])
def test_cache_is_shipped_with_merged_weights(virtual: Pass, llama: Path, tmp_path: Path) -> None:
    program = with_lora(llama, virtual)
    live = materialize(program)
    for name in program.adapters:
        to_peft(program, tmp_path / name, adapter=name)
    adapters = [(str(tmp_path / name), 1.0) for name in program.adapters]
    out = export(llama, tmp_path / "out", merge=True, adapters=adapters, format="cache").path
    report = verify(out)
    assert report["site"]["sites"] == 14 and report["site"]["relative_error"] <= 1e-5
    plain, cache = auto(out), ConstantCache.open(out)  # one directory for both
    inputs = batch("left")
    with torch.no_grad():
        want = live(**inputs).logits[:, -9:]
        assert distance(plain(**cache.before(plain, **inputs)).logits, want) <= 1e-5
        assert distance(auto(llama)(**inputs).logits, want) > 1e-2
    assert torch.equal(generated(plain, cache.before(plain, **inputs)), generated(live, inputs))


def test_cache_is_shipped_with_a_merged_base_in_four_bits(llama: Path, tmp_path: Path) -> None:
    apply(llama, [Nf4(block_size=32)], tmp_path / "base")
    program = with_lora(tmp_path / "base" / "base", PREFIX)
    for name in program.adapters:
        to_peft(program, tmp_path / name, adapter=name)
    adapters = [(str(tmp_path / name), 1.0) for name in program.adapters]
    for then in ("none", "nf4"):
        out = export(
            tmp_path / "base" / "base", tmp_path / then, merge=True, then=then, force=True,
            adapters=adapters, format="cache",
        )  # fmt: skip
        assert out.manifest["merge"]["then"] == then
        plain = materialize(capture(out.path))
        cache, inputs = ConstantCache.open(out.path), batch("left")
        with torch.no_grad():
            want = materialize(program)(**inputs).logits[:, -9:]
            got = plain(**cache.before(plain, **inputs)).logits
        assert distance(got, want) <= (1e-5 if then == "none" else 0.5)
        verify(out.path)


@pytest.mark.parametrize("merge", [False, True])
def test_plain_weights_are_shipped_when_asked(merge: bool, llama: Path, tmp_path: Path) -> None:
    apply(llama, [PROMPT], tmp_path / "applied")
    out = export(tmp_path / "applied", tmp_path / "out", merge=merge, format="cache").path
    assert (out / "model.safetensors").exists() == merge
    if merge:
        old, new = (path / "model.safetensors" for path in (llama, out))
        assert old.read_bytes() == new.read_bytes()


def test_merging_without_a_cache_still_refuses_virtual_tokens(llama: Path, tmp_path: Path) -> None:
    for name, virtual in (("prompt", PROMPT), ("prefix", PREFIX)):
        apply(llama, [virtual], tmp_path / name)
        job = partial(export, tmp_path / name, merge=True)
        refuse(tmp_path, PeftcError, job, "--format cache", "--format peft")


def test_adapter_that_does_not_merge_is_refused_beside_a_prompt(
    llama: Path, tmp_path: Path
) -> None:
    from peftc import Bottleneck

    apply(llama, [Bottleneck(adapter="b"), PROMPT], tmp_path / "both")
    job = partial(export, tmp_path / "both", merge=True, format="cache")
    refuse(tmp_path, FoldError, job, "aten.relu")


def test_cache_is_refused_where_there_is_none(
    model: MakeModel, llama: Path, tmp_path: Path
) -> None:
    lora = Lora(rank=2, adapter="l")
    for base, passes, words in (
        (llama, [lora], "no prompt or prefix"),
        (llama, [lora, PROMPT], "merge these"),
        (llama, [lora, PREFIX], "merge these"),
        (model("t5"), [PROMPT], "encoder"),
        (model("t5"), [PREFIX], "encoder"),
        (model("bert"), [PROMPT], "no keys and values"),
        (model("bert"), [PREFIX], "no keys and values"),
    ):
        refuse(tmp_path, ArtifactError, partial(to_cache, injected(base, *passes)), words)
    to_peft(injected(llama, PROMPT), tmp_path / "peft")
    refuse(tmp_path, ArtifactError, lambda _: ConstantCache.open(tmp_path / "peft"), "to_cache")


def test_cache_that_is_not_equal_is_not_published(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftc.exporters import to_cache as home

    def damaged(live: Any) -> ConstantCache:
        first, *rest = computed(live).layers
        return ConstantCache(((first[0] + 0.1, first[1]), *rest))

    computed = home.computed
    monkeypatch.setattr(home, "computed", damaged)
    refuse(tmp_path, ProofError, partial(to_cache, injected(llama, PREFIX)), "logits differ")


def test_damaged_cache_is_refused(llama: Path, tmp_path: Path) -> None:
    to_cache(injected(llama, PROMPT), tmp_path / "cache")
    bad = copied(tmp_path / "cache", tmp_path / "bad")
    file = bad / "constant_cache.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    refuse(tmp_path, ArtifactError, lambda _: ConstantCache.open(bad), "not what was published")


def test_cache_of_another_head_layout_is_refused(
    model: MakeModel, llama: Path, tmp_path: Path
) -> None:
    for name, virtual in (("prompt", PROMPT), ("prefix", PREFIX)):
        cache = ConstantCache.open(to_cache(injected(llama, virtual), tmp_path / name).path)
        wider = auto(llama)
        wider.config.num_key_value_heads = 4
        for other, words in (
            (wider, "num_key_value_heads 2 (the model's: 4)"),
            (auto(model("gpt2")), "model_type llama (the model's: gpt2)"),
        ):
            given = (other, batch()["input_ids"])
            job = partial(lambda c, g, _: c.before(*g), cache, given)
            refuse(tmp_path, ArtifactError, job, "another model", words)
