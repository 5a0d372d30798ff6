"""Canonical LoRA: the rules of vLLM and llama.cpp, and the logits that PEFT makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftc
from peftc import Attach, Merge, Pipeline, Program, registry
from peftc.errors import ArtifactError, PeftcError
from peftc.evaluate import value

from .conftest import MakeAdapter, MakeCheckpoint, distance, logits, with_peft
from .helpers import alone as run_alone
from .helpers import refuse
from .test_combine import Crooked, Gated, carrying, lora
from .test_combine_interplay import other

KEY = re.compile(r"base_model\.model\.(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])")
PLAIN = {
    "peft_type": "LORA", "bias": "none", "use_rslora": False, "use_dora": False,
    "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False,
}  # fmt: skip


def engine_rules(folder: Path, modules: set[str]) -> list[str]:
    """What vLLM or llama.cpp would stumble over, by the rules read off their sources."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    wrong = [f"{key}: {config.get(key)}" for key in PLAIN if config.get(key) != PLAIN[key]]
    if config["lora_alpha"] != config["r"]:  # llama.cpp: alpha / the tensor's rank
        wrong.append("the scale is not 1")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            wrong.append(f"unexpected key {key}")
            continue
        pairs.setdefault(match[1], {})[match[2].replace("embedding_", "")[5]] = tensor
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"} or {pair["A"].shape[0], pair["B"].shape[1]} != {config["r"]}:
            wrong.append(f"{module} is not a pair of rank {config['r']}")
    if not set(config["target_modules"]) or any(
        not any(m == t or m.endswith(f".{t}") for m in pairs) for t in config["target_modules"]
    ):
        wrong.append("a target without tensors")
    chosen = {
        m for m in modules if any(m == t or m.endswith(f".{t}") for t in config["target_modules"])
    }
    return wrong + [f"{m} is targeted and has no tensors" for m in chosen - set(pairs)]


def canonical(program: Program, target: Path, **options: Any) -> dict[str, Any]:
    artifact = peftc.to_peft(program, target, canonical=True, **options)
    assert not engine_rules(target, set(program.modules))
    report: dict[str, Any] = artifact.manifest["canonical"]
    return report


def attached(base: Path, *adapters: tuple[Path, float]) -> Program:
    steps = [Attach(path=str(path), weight=weight) for path, weight in adapters]
    return Pipeline(steps).run(peftc.capture(base))


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 9},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 7},
        "alpha_pattern": {"v_proj": 31, "layers.0.self_attn.q_proj": 1},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_canonical_lora_is_exact_in_peft_when_it_is_a_lora_variant(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path, options: dict[str, Any]
) -> None:
    base = checkpoint("llama")
    trained = adapter(base, **options)
    report = canonical(attached(base, (trained, 1.0)), tmp_path / "out")
    assert report["exact"] and report["relative_error"] < 1e-6
    want = logits(with_peft(base, trained))
    assert distance(logits(with_peft(base, tmp_path / "out")), want) < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen2", "bert"])
def test_canonical_lora_is_exact_in_peft_when_the_model_is_another(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path, kind: str
) -> None:
    base = checkpoint(kind)
    trained = adapter(base)
    canonical(attached(base, (trained, 1.0)), tmp_path / "out")
    want = logits(with_peft(base, trained))
    assert distance(logits(with_peft(base, tmp_path / "out")), want) < 1e-5


def test_several_adapters_become_one_of_the_summed_rank(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    pair = (adapter(base, r=3), 0.7), (adapter(base, 1, r=5, target_modules=["q_proj"]), -0.4)
    program = attached(base, *pair)
    report = canonical(program, tmp_path / "out")
    assert (report["rank"], report["alpha"], report["exact"]) == (8, 8, True)
    want = logits(peftc.materialize(program))
    assert distance(logits(with_peft(base, tmp_path / "out")), want) < 1e-5
    name = next(iter(program.adapters))
    report = canonical(program, tmp_path / "one", adapter=name)
    assert report["rank"] == 3
    want = logits(peftc.materialize(attached(base, pair[0])))
    assert distance(logits(with_peft(base, tmp_path / "one")), want) < 1e-5


def test_rank_fills_up_with_zeros_when_it_is_higher(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    trained = adapter(base, r=3)
    report = canonical(attached(base, (trained, 1.0)), tmp_path / "out", rank=8)
    assert report["rank"] == 8 and report["exact"] and report["vllm_max_lora_rank"] == 8
    want = logits(with_peft(base, trained))
    assert distance(logits(with_peft(base, tmp_path / "out")), want) < 1e-5


def test_rank_cuts_the_smallest_part_off_when_it_is_lower(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    program = attached(base, (adapter(base, r=6), 1.0))
    report = canonical(program, tmp_path / "out", rank=2)
    assert not report["exact"] and report["truncated_sites"] == 14
    site = "model.layers.0.mlp.up_proj"
    a, b = (value(program.constants[f"{site}.lora_{x}.default.weight"]) for x in "AB")
    s = torch.linalg.svdvals(b @ a)
    assert report["sites"][site]["relative_error"] == pytest.approx(
        float(s[2:].norm() / s.norm()), abs=1e-5
    )


def test_ranks_that_are_not_used_are_left_out(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    trained = adapter(base, 3, r=5)
    file = trained / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        if "lora_B" in key:
            tensors[key][:, 1] = 0
            if "layers.1.mlp" in key:
                tensors[key][:] = 0
    save_file(tensors, file)
    program = attached(base, (trained, 1.0))
    report = canonical(program, tmp_path / "out")
    assert report["rank"] == 4 and len(report["sites"]) == 11
    want = logits(peftc.materialize(program))
    assert distance(logits(with_peft(base, tmp_path / "out")), want) < 1e-5


@pytest.mark.parametrize("name", [m for m in ("vera", "adalora") if m in registry.PASSES])
def test_method_is_exact_when_it_is_low_rank_in_disguise(name: str, tmp_path: Path) -> None:
    program = carrying(lora("a", targets="wide"), other(name, "b"))
    report = canonical(program, tmp_path / "out")
    assert report["exact"] and report["rank"] == 4 and report["relative_error"] < 1e-6


@pytest.mark.parametrize("name", [m for m in ("dora", "loha", "lokr") if m in registry.PASSES])
def test_method_is_approximated_and_says_so_when_it_has_no_low_rank(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 30))
    method = other(name, "b").model_copy(update={"targets": ["0", "1"]})
    program = carrying(method, model=layers)
    report = canonical(program, tmp_path / "cut", rank=2)
    assert not report["exact"] and 0.01 < report["relative_error"] < 1
    tensors = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    got = tensors["base_model.model.0.lora_B.weight"] @ tensors["base_model.model.0.lora_A.weight"]
    merged = value(Pipeline([Merge()]).run(program).constants["0.weight"])
    delta = merged - value(program.captured["0.weight"])
    s = torch.linalg.svdvals(delta)
    error = float((got - delta).norm() / delta.norm())
    assert error == pytest.approx(float(s[2:].norm() / s.norm()), abs=1e-4)
    assert report["sites"]["0"]["relative_error"] == pytest.approx(error, abs=1e-4)
    full = canonical(program, tmp_path / "full")  # no rank is above 24, which is below 256
    assert full["relative_error"] < 2e-6


def test_smallest_rank_is_asked_for_when_it_is_above_256(tmp_path: Path) -> None:
    dora = other("dora", "b").model_copy(update={"targets": ["0"], "rank": 4})
    program = carrying(dora, model=nn.Sequential(nn.Linear(300, 300)))
    refuse(tmp_path, PeftcError, lambda out: peftc.to_peft(program, out, canonical=True),
           "no low rank", "--rank", "0")  # fmt: skip


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bias": "lora_only"}, "k_proj.bias"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"lora_bias": True}, "bias"),
    ],
)
def test_adapter_is_refused_when_it_trains_more_than_weights(
    checkpoint: MakeCheckpoint,
    adapter: MakeAdapter,
    tmp_path: Path,
    options: dict[str, Any],
    word: str,
) -> None:
    base = checkpoint("qwen2")
    trained = adapter(base, target_modules=["q_proj", "k_proj"], **options)
    program = attached(base, (trained, 1.0))
    refuse(tmp_path, PeftcError, lambda out: peftc.to_peft(program, out, canonical=True), word)


def test_program_is_refused_when_there_is_no_adapter_left(tmp_path: Path) -> None:
    merged = Pipeline([Merge()]).run(carrying(lora("a")))
    refuse(tmp_path, ArtifactError, lambda out: peftc.to_peft(merged, out, canonical=True),
           "merged into the weights")  # fmt: skip
    two = carrying(lora("maths"), lora("code"))
    refuse(tmp_path, ArtifactError,
           lambda out: peftc.to_peft(two, out, "math", canonical=True),
           "did you mean maths")  # fmt: skip


def test_site_is_refused_when_engines_have_no_lora_of_its_kind(tmp_path: Path) -> None:
    refuse(tmp_path, PeftcError,
           lambda out: peftc.to_peft(carrying(lora("a")), out, canonical=True),
           "conv", "convolution")  # fmt: skip


def test_adapter_is_refused_when_it_bends(tmp_path: Path) -> None:
    program = carrying(Crooked(adapter="b", targets="wide"))
    refuse(tmp_path, PeftcError, lambda out: peftc.to_peft(program, out, canonical=True),
           "wide", "relu")  # fmt: skip


def test_adapter_is_refused_when_nothing_is_trained(tmp_path: Path) -> None:
    fresh = Pipeline([lora("a", targets="0")]).run(peftc.capture(nn.Sequential(nn.Linear(5, 5))))
    refuse(tmp_path, ArtifactError, lambda out: peftc.to_peft(fresh, out, canonical=True),
           "add nothing")  # fmt: skip


def test_adapter_is_refused_when_the_base_was_changed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 5))
    merged = Pipeline([Merge()]).run(carrying(lora("a", targets="0"), model=model))
    program = Pipeline([lora("b", targets="0"), Gated(adapter="c", targets="0")]).run(merged)
    refuse(tmp_path, PeftcError, lambda out: peftc.to_peft(program, out, canonical=True),
           "weights of its base were changed")  # fmt: skip


def test_command_line_writes_it_and_prints_the_error(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    a, b = adapter(base, r=12), adapter(base, 1, r=8)
    command = ("-m", "peftc", "export", base, "--adapter", f"{a}=0.7", "--adapter", f"{b}=0.3")
    out = ("--format", "peft", "--canonical", "-o", tmp_path / "out")
    done = run_alone(*command, *out)
    assert done.code == 0 and "rank 20, exact to" in done.err and "--max-lora-rank 32" in done.err
    cut = run_alone(*command, *out[:-1], tmp_path / "cut", "--rank", "4", "--json")
    assert cut.code == 0 and cut.data["canonical"]["rank"] == 4
    assert "an approximation: 14 of 14 sites" in cut.err
    for wrong in (("--canonical",), ("--format", "peft", "--rank", "4")):
        assert run_alone(*command, *wrong, "-o", tmp_path / "no").code == 2
