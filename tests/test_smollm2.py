"""The whole way on a real model: SmolLM2-135M-Instruct, LoRA r=16 on all linear layers."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftc
from peftc import Attach, Pipeline, capture, materialize, verify
from peftc.demo_model import demo_checkpoint

from .conftest import distance, logits, with_peft

TEXT = "The capital of France is Paris. def add(a, b): return a + b"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def base(request: pytest.FixtureRequest) -> Path:
    return demo_checkpoint(request.param)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter made by PEFT, its weights as large as training makes them."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    path = tmp_path_factory.mktemp("trained")
    wrapped.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ids(base: Path) -> torch.Tensor:
    tokens: Any = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt")["input_ids"]
    assert isinstance(tokens, torch.Tensor)
    return tokens


@pytest.fixture(scope="module")
def reference(base: Path, trained: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """PEFT's logits in fp32, unmerged and merged."""
    model = with_peft(base, trained, dtype=torch.float32)
    unmerged = logits(model, ids)
    return {"unmerged": unmerged, "merged": logits(model.merge_and_unload(), ids)}


@pytest.fixture(scope="module")
def merged(base: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    peftc.export(base, out, merge=True, adapters=[(str(trained), 1.0)])
    gc.collect()
    return out


def test_unmerged_logits_equal_peft_s(
    base: Path, trained: Path, ids: torch.Tensor, reference: dict[str, torch.Tensor]
) -> None:
    program = Pipeline([Attach(path=str(trained))]).run(capture(base))
    assert sum(not site.is_plain for site in program.sites.values()) == 210
    live = materialize(program, dtype=torch.float32)
    assert distance(logits(live, ids), reference["unmerged"]) <= 1e-5


def test_merged_logits_in_plain_transformers_equal_peft_s_merge(
    merged: Path, ids: torch.Tensor, reference: dict[str, torch.Tensor]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    stored = AutoModelForCausalLM.from_pretrained(merged).dtype
    bound = 1e-5 if stored == torch.float32 else 0.1  # bf16 weights are rounded; see below
    assert distance(logits(model, ids), reference["merged"]) <= bound


def test_each_merged_element_is_the_fp32_result_rounded_once(
    base: Path, trained: Path, merged: Path
) -> None:
    wrong = changed = 0
    with (
        safe_open(trained / "adapter_model.safetensors", "pt") as lora,
        safe_open(base / "model.safetensors", "pt") as old,
        safe_open(merged / "model.safetensors", "pt") as new,
    ):
        assert set(old.keys()) == set(new.keys())
        names = set(lora.keys())
        for name in old.keys():  # noqa: SIM118
            want = old.get_tensor(name)
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{key}A.weight" in names:
                a, b = (lora.get_tensor(f"{key}{part}.weight").float() for part in "AB")
                want = (want.float() + (b @ a) * 2.0).to(want.dtype)
                changed += 1
            wrong += int((new.get_tensor(name) != want).sum())
    assert (wrong, changed) == (0, 210)


def test_verify_repeats_the_proof(merged: Path) -> None:
    manifest = json.loads((merged / "peftc.json").read_text())
    report = verify(merged, "sites")
    assert report["site"]["sites"] == 210
    # The rows come in other pieces from a file, which fp32 sums may show in the last place.
    assert report["site"]["relative_error"] == pytest.approx(
        manifest["proof"]["site"]["relative_error"], rel=0.2
    )
    assert manifest["proof"]["whole"]["top1_agreement"] > 0.9
    assert manifest["proof"]["whole"]["input"] == "tokenized text"


def test_merged_model_carries_tokenizer_and_chat_template(base: Path, merged: Path) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    one, other = (
        AutoTokenizer.from_pretrained(path).apply_chat_template(chat, tokenize=False)
        for path in (base, merged)
    )
    assert one == other and "capital of France" in one


def test_peft_loads_what_to_peft_wrote(
    base: Path, trained: Path, ids: torch.Tensor, reference: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    program = Pipeline([Attach(path=str(trained))]).run(capture(base))
    peftc.to_peft(program, tmp_path / "again")
    model = with_peft(base, tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(model, ids), reference["unmerged"])


def test_demo_shows_its_way_and_answers_from_the_merged_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "peftc", "demo", "-o", str(tmp_path), "--steps", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["before"]["What is the capital of France?"] == "The capital of France is Paris."
    assert set(report["after"]) == set(report["before"])
    assert len(report["losses"]) == 2 and min(report["losses"]) > 0
    assert report["proof"]["whole"]["relative_error"] < 1e-4
    for shown in ("apply", "step", "merge: 210 sites", "link", "proof", "done in"):
        assert shown in done.stderr, shown


@pytest.fixture(scope="module")
def prompted(
    base: Path, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[peftc.Program, Path]:
    """A prompt trained for a few steps, and the directory that it is exported to with its model."""
    prompt = peftc.PromptTuning(virtual_tokens=16, init="text", text="Answer in one short line.")
    program = Pipeline([prompt]).run(capture(base))
    live = materialize(program, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        live(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("prompted")
    peftc.to_peft(peftc.absorb(program, live), folder / "adapter")
    adapters = [(str(folder / "adapter"), 1.0)]
    peftc.export(base, folder / "served", merge=True, adapters=adapters, format="cache")
    return Pipeline([Attach(path=str(folder / "adapter"))]).run(capture(base)), folder / "served"


def test_exported_prompt_answers_from_its_cache_as_with_its_virtual_tokens(
    prompted: tuple[peftc.Program, Path],
) -> None:
    program, served = prompted
    live: Any = materialize(program, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32).eval()
    cache, tokenizer = peftc.ConstantCache.open(served), AutoTokenizer.from_pretrained(served)
    tokenizer.padding_side = "left"
    chats = ["What is the capital of France?", "Name two colours."]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": chat}], tokenize=False, add_generation_prompt=True
        )
        for chat in chats
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 12, "do_sample": False}
    want = live.generate(**inputs, **options)
    run: list[int] = []
    plain.model.embed_tokens.register_forward_pre_hook(lambda _, args: run.append(args[0].shape[1]))
    before = cache.before(plain, inputs["input_ids"], inputs["attention_mask"])
    got = plain.generate(**before, **options)
    stored = AutoModelForCausalLM.from_pretrained(served).dtype
    if stored == torch.float32:  # in bf16 the cache is rounded, and the live model's is not
        assert torch.equal(got, want)
    assert got.shape == want.shape
    assert run == [inputs["input_ids"].shape[1], *[1] * 11], "virtual tokens are run again"
