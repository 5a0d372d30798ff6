"""4-bit checkpoints between peftc, transformers and bitsandbytes, to the bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import peftc
from peftc import Attach, Pass, Pipeline, Program, capture, materialize
from peftc.constants import Held, Packed
from peftc.evaluate import value
from peftc.four_bit import BLOCK_SIZES, CODEBOOKS, FourBit, quantized
from peftc.kernels import nf4
from peftc.merging import merge
from peftc.passes.dequantize import Dequantize
from peftc.passes.nf4 import Nf4
from peftc.passes.replicate_layers import ReplicateLayers
from peftc.passes.resize_vocabulary import ResizeVocabulary

from .conftest import ARCHITECTURES, MakeAdapter, MakeCheckpoint, auto, distance, logits
from .families import COMMON, SPECIMENS
from .helpers import copied

bnb: Any = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
UP = "model.layers.0.mlp.up_proj.weight"
HYPOTHESIS = settings(max_examples=60, deadline=None, database=None, derandomize=True)
FULL: dict[str, Any] = {"double_quant": True, "codebook": "fp4", "block_size": 128}


def by_torch(*args: Any) -> Any:
    """Dequantizing by bitsandbytes' own torch code."""
    codes, absmax, size, book, shape, dtype = args
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as compute

    code = bnb.functional.get_4bit_type(book, "cpu")
    return compute(codes.view(torch.uint8).reshape(-1), absmax, code, size, shape, dtype)


@contextmanager
def sound() -> Iterator[None]:
    """Where bitsandbytes' own kernel is wrong: see the test named so."""
    make: Any = torch.library.Library
    library = make("bitsandbytes", "IMPL") if AVX512 else None
    if library:
        library.impl("dequantize_4bit", by_torch, "CPU")
    yield
    if library:
        library._destroy()


def four_bit(model: torch.nn.Module) -> dict[str, Any]:
    """The weights in 4 bits as bitsandbytes dequantizes them, fp32."""
    found = {}
    with sound():
        for fqn, module in model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                state = module.weight.quant_state
                state.dtype = torch.float32
                found[fqn] = bnb.functional.dequantize_4bit(module.weight.data, state)
    return found


def loaded(path: Path) -> Any:
    """A checkpoint as transformers and bitsandbytes load it, computing in fp32 throughout."""
    model = auto(path)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.support_avx512bf16_for_cpu = torch.float32, False
    return model


def first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0]
    return found


def same(path: Path, count: int, inputs: Any = None, output: Any = first) -> None:
    """bitsandbytes and peftc read the same numbers, and compute the same from them."""
    inputs = inputs or {"input_ids": torch.arange(22).view(2, 11)}
    theirs, program = loaded(path), capture(path)
    decoded = four_bit(theirs)
    ours = {f: value(c) for f, c in program.constants.items() if isinstance(c, Packed)}
    assert {f"{fqn}.weight" for fqn in decoded} == set(ours)
    assert len(ours) == count or not count
    for fqn, weight in decoded.items():
        turned = program.sites[fqn].kind.transposed
        assert torch.equal(weight.t() if turned else weight, ours[f"{fqn}.weight"].float()), fqn
    with sound(), torch.no_grad():
        want = output(theirs(**inputs))
        got = output(materialize(program, dtype=torch.float32)(**inputs))
    assert distance(got, want) < 1e-5


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in path.glob("*.safetensors") for k, t in load_file(file).items()}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors to compare, a NaN too."""
    return {
        key: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy().tobytes())
        for key, t in tensors.items()
    }


def run(source: Path, *passes: Pass) -> Program:
    return Pipeline(passes).run(capture(source))


DOWN = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
COUNTS = {"llama": 14, "gpt2": 8, "opt": 12, "qwen2": 14, "bert": 13}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "nested"])
@pytest.mark.parametrize("name", COUNTS)
def test_transformers_loads_what_apply_wrote(
    name: str, options: dict[str, Any], shards: bool, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint(name, torch.float32, shards)
    peftc.apply(base, [Nf4(**options)], tmp_path / "out")
    out = tmp_path / "out" / "base"
    same(out, COUNTS[name])
    program = capture(base)
    for fqn, weight in four_bit(loaded(out)).items():
        site = program.sites[fqn]
        matrix = value(program.constants[site.name("weight")])
        matrix = matrix.t().contiguous() if site.kind.transposed else matrix
        size, book = options.get("block_size", 64), options.get("codebook", "nf4")
        codes, absmax = nf4.quantize(matrix, size, book)
        absmax = nf4.unnest(*nf4.nest(absmax)) if options else absmax
        assert torch.equal(weight, nf4.dequantize(codes, absmax, matrix.shape, size, book)), fqn


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_numbers_are_the_reference_s_when_the_weights_are_bf16(
    name: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint(name, torch.bfloat16)
    artifact = peftc.to_safetensors(run(base, Nf4(double_quant=True)), tmp_path / "out")
    assert config_of(artifact.path)["bnb_4bit_compute_dtype"] == "bfloat16"
    model, program = loaded(artifact.path), capture(artifact.path)
    assert model.dtype == torch.bfloat16
    decoded = four_bit(model)
    assert len(decoded) == COUNTS[name]
    for fqn, weight in decoded.items():
        ours = value(program.constants[f"{fqn}.weight"])
        turned = program.sites[fqn].kind.transposed
        assert torch.equal((weight.t() if turned else weight).bfloat16(), ours)


@pytest.mark.skipif(not AVX512, reason="the kernel in question is for AVX512")
def test_bitsandbytes_dequantize_is_wrong_on_avx512_when_rows_split_blocks() -> None:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    want = nf4.dequantize(*nf4.quantize(weight), weight.shape)
    assert torch.equal(by_torch(codes, state.absmax, 64, "nf4", (32, 96), torch.float32), want)
    assert distance(bnb.functional.dequantize_4bit(codes, state), want) > 0.1


def test_export_after_a_merge_is_loaded_the_same(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("qwen2")
    peftc.export(base, tmp_path / "merged", merge=True, adapters=[(str(adapter(base)), 1.0)])
    peftc.apply(tmp_path / "merged", [Nf4()], tmp_path / "out")
    same(tmp_path / "out" / "base", 14)


def test_peft_computes_the_same_over_the_written_base(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    for name, target in (("llama", "down_proj"), ("gpt2", "c_fc")):
        lora = adapter(checkpoint(name), target_modules=[target])
        peftc.apply(checkpoint(name), [Nf4(double_quant=True)], tmp_path / name)
        base = tmp_path / name / "base"
        wrapped = peft.PeftModel.from_pretrained(loaded(base), lora).eval()
        with sound():
            want = logits(wrapped)
        assert distance(want, logits(loaded(base))) > 1e-2
        assert distance(logits(materialize(run(base, Attach(path=str(lora))))), want) < 1e-5


def test_formats_may_differ_from_layer_to_layer(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    up = Nf4(targets="up_proj", double_quant=True, compute_dtype="float16")
    peftc.apply(checkpoint("llama"), [up, Nf4(codebook="fp4", block_size=32)], tmp_path / "a")
    out = tmp_path / "a" / "base"
    same(out, 14)
    states = [key.rpartition("__")[2] for key in tensors_of(out) if ".quant_state." in key]
    assert (states.count("nf4"), states.count("fp4")) == (2, 12)
    assert config_of(out)["bnb_4bit_compute_dtype"] == "float16"  # there is but one for a model


def test_parts_in_another_shard_than_their_weight_are_found(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    peftc.apply(checkpoint("llama"), [Nf4()], tmp_path / "a")
    base, tensors = tmp_path / "split", tensors_of(tmp_path / "a" / "base")
    base.mkdir()
    (base / "config.json").write_bytes((tmp_path / "a" / "base" / "config.json").read_bytes())
    places = {k: f"model-{1 + ('.weight.' in k)}.safetensors" for k in tensors}
    for file in set(places.values()):
        held = {k: t for k, t in tensors.items() if places[k] == file}
        save_file(held, base / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    same(base, 14)
    peftc.to_safetensors(capture(base), tmp_path / "out")
    same(tmp_path / "out", 14)
    assert bits(tensors_of(tmp_path / "out")) == bits(tensors)


def test_checkpoint_without_the_prefix_is_loaded_the_same(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = copied(checkpoint("gpt2"), tmp_path / "base")
    headless = {k.removeprefix("transformer."): t for k, t in tensors_of(base).items()}
    save_file(headless, base / "model.safetensors", {"format": "pt"})
    peftc.apply(base, [Nf4()], tmp_path / "out")
    assert "h.0.mlp.c_fc.weight.absmax" in tensors_of(tmp_path / "out" / "base")
    same(tmp_path / "out" / "base", 8)


@pytest.mark.parametrize(
    ("options", "count", "kept"),
    [
        ({}, 14, ["lm_head"]),
        ({"targets": "lm_head"}, 1, None),
        ({"exclude": "down_proj"}, 12, ["lm_head", *DOWN]),
        ({"targets": "up_proj", "layers": 1}, 1, None),
    ],
)  # fmt: skip
def test_config_names_just_the_layers_left_alone(
    options: dict[str, Any],
    count: int,
    kept: list[str] | None,
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    peftc.apply(checkpoint("llama"), [Nf4(**options)], tmp_path / "out")
    out = tmp_path / "out" / "base"
    skipped = config_of(out)["llm_int8_skip_modules"]
    assert len(skipped) == 15 - count and (kept is None or skipped == kept)
    same(out, count)


def test_skipped_name_that_ends_a_quantized_one_is_told_apart(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(
        dim=48, hidden_dim=80, n_layers=1, n_heads=4, vocab_size=97, max_position_embeddings=64
    )
    transformers.DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    peftc.apply(tmp_path / "base", [Nf4(targets=["pre_classifier", "q_lin"])], tmp_path / "out")
    skipped = config_of(tmp_path / "out" / "base")["llm_int8_skip_modules"]
    assert "^classifier$" in skipped and len(skipped) == 6
    same(tmp_path / "out" / "base", 2)


# But for Falcon, whose linear layers transformers does not quantize.
@pytest.mark.parametrize("name", sorted(COMMON.keys() - {"falcon", *COUNTS}))
def test_every_architecture_is_loaded_the_same(name: str, tmp_path: Path) -> None:
    specimen = SPECIMENS[name]
    specimen.build().save_pretrained(tmp_path / "base")
    peftc.apply(tmp_path / "base", [Nf4(double_quant=True)], tmp_path / "out")
    same(tmp_path / "out" / "base", 0, specimen.inputs(), specimen.output)


def test_index_places_every_tensor_and_counts_all_bytes(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("llama", torch.bfloat16, True)
    name = "model.safetensors.index.json"
    before = json.loads((base / name).read_text())
    peftc.apply(base, [Nf4(double_quant=True)], tmp_path / "out")
    out = tmp_path / "out" / "base"
    index = json.loads((out / name).read_text())
    held = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert index["weight_map"] == {key: file for file, t in held.items() for key in t}
    assert {k: f for k, f in index["weight_map"].items() if k in before["weight_map"]} == before[
        "weight_map"
    ]
    tensors = [t for file in held.values() for t in file.values()]
    assert index["metadata"].keys() == before["metadata"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)
    plain = copied(base, tmp_path / "plain")
    (plain / name).write_text(json.dumps({"weight_map": before["weight_map"]}))
    peftc.apply(plain, [Nf4()], tmp_path / "other")
    assert "total_size" not in (tmp_path / "other" / "base" / name).read_text()


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    return torch.randn(rows, columns, generator=generator).to(dtype)


@HYPOTHESIS
@given(matrices(), st.sampled_from(BLOCK_SIZES), st.sampled_from(CODEBOOKS))
def test_codes_and_absmax_are_bitsandbytes_own(weight: torch.Tensor, size: int, book: str) -> None:
    parts = quantized(Held(weight), FourBit(book, size)).parts
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=size, quant_type=book)
    assert torch.equal(value(parts[""]), codes)
    assert torch.equal(value(parts[".absmax"]), state.absmax)
    assert torch.equal(value(parts[".quant_map"]), state.code)


def test_absmax_of_a_short_block_of_zeros_is_zero_and_bitsandbytes_own_is_not() -> None:
    weight = torch.zeros(1, 96)
    parts = quantized(Held(weight), FourBit()).parts
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    assert value(parts[".absmax"]).tolist() == [0, 0]
    assert state.absmax.tolist() == torch.tensor([0, 1e-38]).tolist()
    assert torch.equal(value(parts[""]), codes)


def test_nested_codes_are_the_nearest_and_bitsandbytes_own_are_not_always() -> None:
    weight = torch.randn(512, 2048, generator=torch.Generator().manual_seed(1))
    parts = quantized(Held(weight), FourBit(nested=True)).parts
    _, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours, theirs = value(parts[".absmax"]), state.absmax
    assert torch.equal(value(parts[".nested_absmax"]), state.state2.absmax)
    assert torch.equal(value(parts[".nested_quant_map"]), state.state2.code)
    other = (ours != theirs).float().mean()
    assert 0 < other < 0.01
    _, absmax = nf4.quantize(weight)
    outer, offset = state.state2.absmax, state.offset
    errors = [(nf4.unnest(codes, outer, offset) - absmax).abs() for codes in (ours, theirs)]
    assert bool((errors[0] <= errors[1] + 1e-6).all())


SAVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "nested": {"bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "as_bf16": {"bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_use_double_quant": True},
    "as_fp32": {"bnb_4bit_quant_storage": torch.float32},
}
Save = Callable[..., Path]


@pytest.fixture(scope="session")
def saved(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Makes, once for each of its arguments, a checkpoint that transformers quantized and saved."""
    made: dict[str, Path] = {}

    def make(name: str = "llama", shards: bool = False, **options: Any) -> Path:
        key = repr((name, shards, options))
        if key not in made:
            given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **options}
            config = transformers.BitsAndBytesConfig(**given)
            cls = getattr(transformers, ARCHITECTURES[name][0])
            model = cls.from_pretrained(checkpoint(name), quantization_config=config)
            made[key] = tmp_path_factory.mktemp("saved")
            model.save_pretrained(made[key], max_shard_size="20KB" if shards else "1GB")
        return made[key]

    return make


@pytest.mark.parametrize("how", SAVED)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bitsandbytes_checkpoint_is_read_and_exported_byte_for_byte(
    name: str, how: str, saved: Save, tmp_path: Path
) -> None:
    path = saved(name, **SAVED[how])
    same(path, COUNTS[name])
    peftc.to_safetensors(capture(path), tmp_path / "out", proof="sites")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (path / file).read_bytes()


def test_sharded_bitsandbytes_checkpoint_is_read_and_written(saved: Save, tmp_path: Path) -> None:
    path = saved("llama", True, bnb_4bit_use_double_quant=True)
    same(path, 14)
    peftc.to_safetensors(capture(path), tmp_path / "out")
    same(tmp_path / "out", 14)
    assert bits(tensors_of(tmp_path / "out")) == bits(tensors_of(path))


def test_bitsandbytes_checkpoint_dequantized_has_the_same_logits(
    saved: Save, tmp_path: Path
) -> None:
    for name in ("llama", "gpt2"):
        path = saved(name, **SAVED["nested"])
        artifact = peftc.to_safetensors(run(path, Dequantize()), tmp_path / name)
        assert "quantization_config" not in (artifact.path / "config.json").read_text()
        with sound():
            want = logits(loaded(path))
        assert distance(logits(auto(artifact.path)), want) < 1e-5


@pytest.mark.parametrize("then", ["nf4", "none"])
@pytest.mark.parametrize("how", ["as_bf16", "plain"])
def test_config_tells_the_storage_when_weights_were_merged_into(
    how: str, then: Any, saved: Save, adapter: MakeAdapter, checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:  # fmt: skip
    path = saved("llama", bnb_4bit_compute_dtype=torch.float32, **SAVED[how])
    lora = adapter(checkpoint("llama"))
    program = run(path, Attach(path=str(lora)))
    merged, _ = merge(program, then=then, force=True)
    out = peftc.to_safetensors(merged, tmp_path / "out").path
    if then == "none":
        assert "quantization_config" not in (out / "config.json").read_text()
        return
    same(out, 14)
    config = config_of(out)
    assert config["bnb_4bit_quant_storage"] == "uint8"
    assert config["bnb_4bit_compute_dtype"] == "float32"
    assert tensors_of(out)[UP].dtype == torch.uint8


def test_rest_of_a_bitsandbytes_checkpoint_is_quantized(saved: Save, tmp_path: Path) -> None:
    path = saved("llama", llm_int8_skip_modules=["lm_head", "down_proj"])
    same(path, 12)
    peftc.apply(path, [Nf4(codebook="fp4", block_size=32)], tmp_path / "out")
    out = tmp_path / "out" / "base"
    same(out, 14)
    before, after = (bits(tensors_of(folder)) for folder in (path, out))
    assert all(after[key] == before[key] for key in before if "down_proj" not in key)
    assert config_of(out)["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("shards", [False, True])
def test_resized_vocabulary_keeps_the_codes(
    name: str, shards: bool, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    peftc.apply(checkpoint(name, torch.float32, shards), [Nf4(double_quant=True)], tmp_path / "a")
    four, wide = tmp_path / "a" / "base", tmp_path / "b" / "base"
    peftc.apply(four, [ResizeVocabulary(size=128)], tmp_path / "b")
    before, after = (bits(tensors_of(folder)) for folder in (four, wide))
    changed = {key for key in before if after[key] != before[key]}
    assert before.keys() == after.keys() and changed
    assert all(re.search("embed_tokens|wte|lm_head", key) for key in changed)
    assert config_of(wide) == config_of(four)
    same(wide, COUNTS[name])


def test_replicated_layers_keep_the_codes_and_what_is_left_alone(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    left = Nf4(exclude="model.layers.1.mlp.down_proj")
    peftc.apply(checkpoint("llama"), [left], tmp_path / "a")
    four, deep = tmp_path / "a" / "base", tmp_path / "b" / "base"
    peftc.apply(four, [ReplicateLayers(ranges="0-2,1-2")], tmp_path / "b")
    before, after = (bits(tensors_of(folder)) for folder in (four, deep))
    for key, content in after.items():
        assert content == before[key.replace("layers.2.", "layers.1.")], key
    plain = [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)]
    assert config_of(deep)["llm_int8_skip_modules"] == ["lm_head", *plain]
    same(deep, 19)
