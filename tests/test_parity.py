"""peftc against PEFT: the same numbers, unmerged and merged, on five architectures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import peftc
from peftc import Attach, Lora, Pipeline, Program, Unmerge
from peftc.errors import PeftcError
from tests.conftest import (
    ARCHITECTURES,
    MakeAdapter,
    MakeCheckpoint,
    auto,
    distance,
    logits,
    with_peft,
)

pytestmark = pytest.mark.filterwarnings("ignore")

Tensors = dict[str, torch.Tensor]
Options = dict[str, Any]
Merged = Callable[..., Path]

# Two targets of each architecture, both with biases where the architecture has any.
TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "gpt2": ("c_attn", "c_fc"),
    "opt": ("q_proj", "fc1"),
    "qwen2": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
}
VARIANTS: dict[str, Callable[[str, str], Options]] = {
    "plain": lambda q, v: {},
    "rank_pattern": lambda q, v: {"rank_pattern": {q: 8, rf".*\.1\..*{v}": 2}},
    "alpha_pattern": lambda q, v: {"alpha_pattern": {q: 13, rf".*\.1\..*{v}": 3}},
    "rslora": lambda q, v: {"use_rslora": True, "r": 5, "rank_pattern": {q: 3}},
    "layers": lambda q, v: {"target_modules": [q, v], "layers_to_transform": [1]},
    "exclude": lambda q, v: {"exclude_modules": [v]},
    "regex": lambda q, v: {"target_modules": rf".*\.1\..*({q}|{v})"},
    "lora_bias": lambda q, v: {"target_modules": [q, v], "lora_bias": True},
    "bias_all": lambda q, v: {"bias": "all"},
    "bias_lora_only": lambda q, v: {"target_modules": [q, v], "bias": "lora_only"},
}
CASES = [(name, variant) for name in ARCHITECTURES for variant in VARIANTS]
# Llama's layers have no bias that the branch's own could be merged into.
MERGEABLE = [case for case in CASES if case != ("llama", "lora_bias")]


def options(name: str, variant: str) -> Options:
    return VARIANTS[variant](*TARGETS[name])


def attach(base: Path, *adapters: Path, weights: tuple[float, ...] = ()) -> Program:
    pairs = zip(adapters, weights or [1.0] * len(adapters), strict=True)
    return Pipeline([Attach(path=str(a), weight=w) for a, w in pairs]).run(peftc.capture(base))


def stored(path: Path) -> Tensors:
    """Every tensor of a checkpoint, however many files it has."""
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def deltas(adapter: Path) -> Tensors:
    """s·(B@A) of every weight that an adapter changes, in fp32."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if "lora_A" in key:
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            patterns = [p for p in config["alpha_pattern"] if re.fullmatch(rf"(.*\.)?{p}", path)]
            alpha = config["alpha_pattern"][patterns[0]] if patterns else config["lora_alpha"]
            scale = alpha / len(a) ** (0.5 if config["use_rslora"] else 1)
            found[f"{path}.weight"] = scale * (tensors[key.replace("lora_A", "lora_B")] @ a)
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_same_bits(got: Tensors, want: Tensors) -> None:
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        assert same_bits(got[key], tensor), key


@cache
def reference(base: Path, adapter: Path) -> torch.Tensor:
    return logits(with_peft(base, adapter))


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """Merges adapters into a checkpoint by peftc, once for each of its arguments."""
    made: dict[Any, Path] = {}

    def make(base: Path, *adapters: Path, weights: tuple[float, ...] = ()) -> Path:
        key = base, adapters, weights
        if key not in made:
            made[key] = tmp_path_factory.mktemp("merged") / "out"
            chosen = list(zip(map(str, adapters), weights or [1.0] * len(adapters), strict=True))
            peftc.export(base, made[key], merge=True, adapters=chosen, proof="sites")
        return made[key]

    return make


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_unmerged_logits_equal_pefts(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, name: str, variant: str
) -> None:
    base = checkpoint(name)
    trained = adapter(base, **options(name, variant))
    got = logits(peftc.materialize(attach(base, trained)))
    assert distance(got, reference(base, trained)) <= 1e-5
    assert distance(got, logits(auto(base))) > 1e-2  # the adapter does something


@pytest.mark.parametrize(("name", "variant"), MERGEABLE)
def test_merged_logits_equal_pefts(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, merged: Merged, name: str, variant: str
) -> None:
    base = checkpoint(name)
    trained = adapter(base, **options(name, variant))
    want = logits(with_peft(base, trained).merge_and_unload())
    assert distance(logits(auto(merged(base, trained))), want) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_elements_are_rounded_once(
    checkpoint: MakeCheckpoint,
    adapter: MakeAdapter,
    merged: Merged,
    name: str,
    dtype: torch.dtype,
) -> None:
    base = checkpoint(name, dtype)
    trained = adapter(base)
    want = stored(base)
    for key, delta in deltas(trained).items():
        delta = delta.T if name == "gpt2" else delta  # Conv1D keeps its weight transposed
        want[key] = (want[key].float() + delta).to(dtype)
    assert_same_bits(stored(merged(base, trained)), want)


def test_merge_is_refused_when_lora_bias_has_no_place(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    trained = adapter(base, **options("llama", "lora_bias"))
    with pytest.raises(PeftcError, match=r"q_proj: .*bias"):
        peftc.export(base, tmp_path / "out", merge=True, adapters=[(str(trained), 1.0)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sharded_merge_equals_the_single_files(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, merged: Merged, name: str
) -> None:
    base, shards = checkpoint(name), checkpoint(name, shards=True)
    trained = adapter(base)
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert_same_bits(stored(merged(shards, trained)), stored(merged(base, trained)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_everything_untouched_is_byte_identical(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, merged: Merged, tmp_path: Path, name: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoint(name, shards=True), base)
    for companion in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (base / companion).write_text(f"{companion} of {name}\n")
    trained = adapter(checkpoint(name), **options(name, "regex"))
    out, touched = merged(base, trained), set(deltas(trained))
    assert {f.name for f in out.iterdir()} == {f.name for f in base.iterdir()} | {"peftc.json"}
    changed = set()
    for file in base.iterdir():
        old, new = file.read_bytes(), (out / file.name).read_bytes()
        if file.suffix != ".safetensors":
            assert new == old, file.name
            continue
        header = 8 + int.from_bytes(old[:8], "little")
        assert new[:header] == old[:header], file.name
        was, now = load_file(file), load_file(out / file.name)
        changed |= {key for key in was if not same_bits(now[key], was[key])}
    assert changed == touched


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_to_peft_writes_what_peft_wrote(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path, name: str, variant: str
) -> None:
    base = checkpoint(name)
    trained = adapter(base, **options(name, variant))
    out = peftc.to_peft(attach(base, trained), tmp_path / "out").path
    weights = "adapter_model.safetensors"
    assert_same_bits(load_file(out / weights), load_file(trained / weights))
    ours, theirs = with_peft(base, out), with_peft(base, trained)
    assert ours.state_dict().keys() == theirs.state_dict().keys()  # at these layers and no other
    assert torch.equal(logits(ours), logits(theirs))


def test_to_peft_keeps_the_order_of_patterns_when_they_overlap(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    patterns = {"self_attn.q_proj": 2, "mlp.up_proj": 3, "[qk]_proj": 5}  # the first match counts
    program = Pipeline([Lora(rank=4, rank_pattern=patterns)]).run(peftc.capture(base))
    out = peftc.to_peft(program, tmp_path / "out").path
    layer = with_peft(base, out).base_model.model.model.layers[0].self_attn
    assert (layer.q_proj.r["a0"], layer.k_proj.r["a0"]) == (2, 5)
    assert attach(base, out).constants.keys() == program.constants.keys()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0), (1.0, 0.25, -0.75)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weighted_adapters_add_exactly(
    checkpoint: MakeCheckpoint,
    adapter: MakeAdapter,
    merged: Merged,
    name: str,
    weights: tuple[float, ...],
) -> None:
    base, (q, _) = checkpoint(name), TARGETS[name]
    kinds: list[Options] = [
        {},
        {"use_rslora": True, "alpha_pattern": {q: 9}},
        {"target_modules": [q], "r": 2},
    ]
    adapters = [adapter(base, i, **kind) for i, kind in enumerate(kinds[: len(weights)])]
    active = with_peft(base, *adapters)
    for module in active.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling = {key: s * weights[int(key[1:])] for key, s in module.scaling.items()}
    program = attach(base, *adapters, weights=weights)
    assert distance(logits(peftc.materialize(program)), logits(active)) <= 1e-5
    out = merged(base, *adapters, weights=weights)
    assert distance(logits(auto(out)), logits(active.merge_and_unload())) <= 1e-5
    want = {key: tensor.double() for key, tensor in stored(base).items()}
    for path, weight in zip(adapters, weights, strict=True):
        for key, delta in deltas(path).items():
            want[key] += weight * (delta.T if name == "gpt2" else delta)
    got = stored(out)
    assert got.keys() == want.keys()
    assert max(distance(got[key], tensor) for key, tensor in want.items()) <= 5e-7


def test_two_adapters_on_a_bf16_base_are_rounded_once(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter
) -> None:
    base = checkpoint("llama", torch.bfloat16)
    adapters = [adapter(base, 0), adapter(base, 1)]
    got = logits(peftc.materialize(attach(base, *adapters)))
    assert torch.equal(got, logits(with_peft(base, *adapters)))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_take_the_bases_dtype(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, merged: Merged, bias: str
) -> None:
    base = checkpoint("opt", torch.bfloat16)
    trained = adapter(checkpoint("opt"), bias=bias)  # trained beside an fp32 base
    want = with_peft(base, trained)
    assert torch.equal(logits(peftc.materialize(attach(base, trained))), logits(want))
    got = stored(merged(base, trained))
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    key = "model.decoder.layers.0.fc1.bias"
    assert torch.equal(got[key], want.merge_and_unload().get_parameter(key))


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unmerge_gives_the_base_back(
    checkpoint: MakeCheckpoint,
    adapter: MakeAdapter,
    merged: Merged,
    tmp_path: Path,
    name: str,
    weight: float,
) -> None:
    base = checkpoint(name)
    trained = adapter(base)
    undo = Unmerge(path=str(trained), weight=weight)
    program = Pipeline([undo]).run(peftc.capture(merged(base, trained, weights=(weight,))))
    out = peftc.to_safetensors(program, tmp_path / "back", proof="sites").path
    back, want = stored(out), stored(base)
    assert back.keys() == want.keys()
    assert max(distance(back[key], tensor) for key, tensor in want.items()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fresh_lora_is_the_identity_bit_for_bit(
    checkpoint: MakeCheckpoint, name: str, init: Any, dtype: torch.dtype
) -> None:
    base = checkpoint(name, dtype)
    lora = Lora(rank=4, alpha=9, init=init, dropout=0.5)
    live = peftc.materialize(Pipeline([lora]).run(peftc.capture(base)))
    assert any("lora_A" in key for key in live.state_dict())
    assert torch.equal(logits(live), logits(auto(base)))


def starts(program: Program) -> Tensors:
    state: Tensors = peftc.materialize(program).state_dict()
    return {key: tensor for key, tensor in state.items() if "lora_A" in key}


def test_start_values_depend_on_name_and_seed_only(checkpoint: MakeCheckpoint) -> None:
    program = peftc.capture(checkpoint("llama"))
    reversed_sites = replace(program, sites=dict(reversed(list(program.sites.items()))))
    want = starts(Pipeline([Lora(rank=4)]).run(program))
    same = [
        (reversed_sites, Lora(rank=4)),
        (program, Lora(rank=4, targets=["v_proj", "q_proj"])),
        (peftc.capture(checkpoint("llama", torch.bfloat16)), Lora(rank=4, bias="all")),
    ]
    for source, lora in same:
        got = starts(Pipeline([lora]).run(source))
        assert_same_bits(got, {key: want[key] for key in got})
    reseeded = starts(Pipeline([Lora(rank=4, seed=1)]).run(program))
    drawn = {tuple(t.flatten()[:16].tolist()) for t in (*want.values(), *reseeded.values())}
    assert len(drawn) == 2 * len(want)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_start_values_have_pefts_distribution(init: Any) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 200))

    torch.manual_seed(0)
    start = True if init == "kaiming" else init
    config = peft.LoraConfig(r=64, target_modules=["0"], init_lora_weights=start)
    theirs = peft.get_peft_model(net(), config).state_dict()
    ours = peftc.materialize(Pipeline([Lora(rank=64, init=init)]).run(peftc.capture(net())))
    got = ours.get_parameter("0.lora_A.default.weight").detach()
    want = theirs["base_model.model.0.lora_A.default.weight"]
    assert got.shape == want.shape
    marks = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    gap = (got.flatten().quantile(marks) - want.flatten().quantile(marks)) / want.std()
    assert float(gap.abs().max()) < 0.08
    assert float(got.std()) == pytest.approx(float(want.std()), rel=0.02)
    if init == "kaiming":
        assert 0.999 < float(got.abs().max()) * 512**0.5 <= 1  # the bound is 1/√fan_in
    assert not ours.get_parameter("0.lora_B.default.weight").any()


def test_checkpoint_without_the_models_prefix_keeps_its_names(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, merged: Merged, tmp_path: Path
) -> None:
    prefixed, base = checkpoint("gpt2"), tmp_path / "hub"
    shutil.copytree(prefixed, base)
    tensors = {k.removeprefix("transformer."): v for k, v in stored(prefixed).items()}
    tensors["h.0.attn.bias"] = torch.ones(8, 8).tril()[None, None]  # as the hub's gpt2 has
    metadata = {"format": "pt", "written by": "a test"}
    save_file(tensors, base / "model.safetensors", metadata)
    trained = adapter(prefixed)
    want = reference(prefixed, trained)
    assert distance(logits(peftc.materialize(attach(base, trained))), want) <= 1e-5
    out = merged(base, trained)
    assert distance(logits(auto(out)), want) <= 1e-5
    for key, tensor in stored(merged(prefixed, trained)).items():
        tensors[key.removeprefix("transformer.")] = tensor
    assert_same_bits(stored(out), tensors)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == metadata
