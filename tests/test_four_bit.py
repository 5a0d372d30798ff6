"""4-bit weights: the constants they are, what is refused, and the proof of what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import peftc
from peftc import Attach, Merge, Pipeline, capture, evaluate, materialize
from peftc.checkpoint import Checkpoint
from peftc.constants import Constant, Held, Leaf, Packed
from peftc.errors import (
    CaptureError,
    CheckpointError,
    PassError,
    PeftcError,
    ProofError,
    SelectionError,
)
from peftc.evaluate import Evaluation, value
from peftc.four_bit import BLOCK_SIZES, CODEBOOKS, STATE, FourBit, quantized
from peftc.kernels import nf4
from peftc.passes.dequantize import Dequantize
from peftc.passes.nf4 import Nf4
from peftc.proof import watch_file
from peftc.recipe import build
from peftc.safetensors_file import read_header
from peftc.storage import contents

from .conftest import MakeAdapter, MakeCheckpoint, Tied, distance, logits
from .families import SPECIMENS
from .helpers import copied, edit, refuse

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UP = "model.layers.0.mlp.up_proj.weight"
FORMS = st.builds(
    FourBit, st.sampled_from(CODEBOOKS), st.sampled_from(BLOCK_SIZES), st.booleans()
)  # fmt: skip
HYPOTHESIS = settings(max_examples=150, deadline=None, database=None, derandomize=True)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Random numbers of one magnitude, some rows of them zero."""
    rows, columns = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    matrix = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-4, 3))
    matrix[draw(st.integers(0, rows)) :][: draw(st.sampled_from([0, 0, 3]))] = 0
    return matrix.to(draw(st.sampled_from(DTYPES)))


def pieces_of(elements: int) -> Any:
    """Evaluates as few elements at a time, so that a small matrix has several chunks."""
    return mock.patch.object(evaluate.chunks, "__defaults__", (elements, 1))


def leaf(weight: torch.Tensor, folder: str) -> Leaf:
    save_file({"w": weight}, Path(folder) / "w.safetensors")
    return Leaf(read_header(Path(folder) / "w.safetensors").tensors["w"])


def reference(weight: torch.Tensor, form: FourBit) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The stored tensors of a weight (out, in) but for its description, and what they stand for."""
    book: Any = form.codebook
    codes, absmax = nf4.quantize(weight, form.block_size, book)
    parts = {"": codes, ".absmax": absmax, ".quant_map": nf4.codebook(book)}
    if form.nested:
        inner, outer, offset = nf4.nest(absmax)
        absmax = nf4.unnest(inner, outer, offset)
        parts |= {".absmax": inner, ".nested_absmax": outer, "offset": offset}
        parts[".nested_quant_map"] = nf4.dynamic_map()
    return parts, nf4.dequantize(codes, absmax, weight.shape, form.block_size, book)


@HYPOTHESIS
@given(matrices(), FORMS, st.booleans(), st.booleans(), st.sampled_from([1, 300, 4000]))
def test_every_part_is_the_reference_s(
    weight: torch.Tensor, form: FourBit, turned: bool, stored: bool, elements: int
) -> None:
    matrix = weight.t().contiguous() if turned else weight  # (out, in)
    want, _ = reference(matrix, form)
    with TemporaryDirectory() as folder, pieces_of(elements):
        source: Constant = leaf(weight, folder) if stored else Held(weight)
        parts = quantized(source, form, turned).parts
        got = {suffix: value(part) for suffix, part in parts.items()}
    assert all(part.spec == Held(got[suffix]).spec for suffix, part in parts.items())
    raw = got.pop(STATE + form.codebook)
    offset = want.pop("offset", None)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[suffix], want[suffix]) for suffix in want)
    assert len(raw) % 8 == 0
    state = json.loads(bytes(raw.tolist()))
    if offset is not None:
        assert torch.equal(torch.tensor(state.pop("nested_offset")), offset)
        assert (state.pop("nested_blocksize"), state.pop("nested_dtype")) == (256, "float32")
    dtype = str(weight.dtype).removeprefix("torch.")
    assert list(state.values()) == [form.codebook, form.block_size, dtype, list(matrix.shape)]


@HYPOTHESIS
@given(matrices(), FORMS, st.booleans(), st.data())
def test_any_rows_are_the_reference_s(
    weight: torch.Tensor, form: FourBit, turned: bool, data: st.DataObject
) -> None:
    _, want = reference(weight.t().contiguous() if turned else weight, form)
    want = want.t() if turned else want
    packed = quantized(Held(weight), form, turned)
    assert packed.spec == Held(weight).spec
    low = data.draw(st.integers(0, len(weight) - 1))
    high = data.draw(st.integers(low + 1, len(weight)))
    with pieces_of(data.draw(st.sampled_from([1, 300]))):
        evaluation = Evaluation(packed.graph, packed.inputs)
        assert torch.equal(evaluation.rows(low, high), want[low:high])
        assert torch.equal(value(packed), want.to(weight.dtype))


def test_bits_are_those_of_the_parts() -> None:
    for form in (FourBit(), FourBit(nested=True), FourBit("fp4", 4096)):
        weight = torch.randn(96, 257)
        parts = quantized(Held(weight), form).parts
        counted = [parts[s].spec.nbytes for s in ("", ".absmax", ".nested_absmax") if s in parts]
        assert form.bits(weight.numel()) == 8 * sum(counted) / weight.numel()


def test_absmax_is_of_now_when_the_weight_changed(tmp_path: Path) -> None:
    weight = torch.randn(48, 64)
    held = quantized(Held(weight), FourBit()).parts
    filed = quantized(leaf(weight, str(tmp_path)), FourBit()).parts
    for parts in (held, filed):
        value(parts[""])  # which gives the absmax too
    weight.mul_(2)
    leaf(weight, str(tmp_path))
    for parts in (held, filed):
        assert torch.equal(value(parts[".absmax"]), nf4.quantize(weight)[1])


Job = Callable[[dict[str, torch.Tensor]], object]


def described(key: str, new: Any) -> Job:
    """Changes a quant state's JSON."""

    def job(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(tensors[f"{UP}{STATE}nf4"].tolist()))
        text(json.dumps({**state, key: new}))(tensors)

    return job


def text(content: str | bytes) -> Job:
    """Another quant state."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda tensors: tensors.update({f"{UP}{STATE}nf4": torch.tensor(list(raw)).byte()})


def changed(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Job:
    return lambda tensors: tensors.update({UP + suffix: change(tensors[UP + suffix]).contiguous()})


def gone(suffix: str) -> Job:
    return lambda tensors: tensors.pop(UP + suffix)


# Each with whether it is done to nested absmax, and words of the error.
DAMAGES: dict[str, tuple[bool, Job, str]] = {
    "absmax_longer": (False, changed(".absmax", lambda a: torch.cat([a, a])), "60 elements"),
    "absmax_shorter": (True, changed(".absmax", lambda a: a[1:]), ".absmax has the shape [59]"),
    "absmax_missing": (False, gone(".absmax"), "lacks .absmax"),
    "absmax_integers": (False, changed(".absmax", lambda a: a.int()), "int32"),
    "absmax_bytes": (False, changed(".absmax", lambda a: a.byte()), "double quantization"),
    "absmax_floats": (True, changed(".absmax", lambda a: a.float()), "double quantization"),
    "outer_missing": (True, gone(".nested_absmax"), "lacks .nested_absmax"),
    "outer_longer": (True, changed(".nested_absmax", lambda a: a.repeat(2)), "[2]"),
    "outer_integers": (True, changed(".nested_absmax", lambda a: a.long()), "int64"),
    "codes_shorter": (False, changed("", lambda c: c[1:]), "1920 elements"),
    "codes_gone": (False, gone(""), "no such tensor"),
    "map_missing": (False, gone(".quant_map"), "lacks .quant_map"),
    "map_of_fp4": (False, changed(".quant_map", lambda m: nf4.codebook("fp4")), "map of nf4"),
    "map_moved": (False, changed(".quant_map", lambda m: m.nextafter(m + 1)), "map of nf4"),
    "map_half": (False, changed(".quant_map", lambda m: m.half()), "map of nf4"),
    "map_nested": (True, changed(".nested_quant_map", lambda m: m.flip(0)), "map of dynamic"),
    "block_size_other": (False, described("blocksize", 128), "30 elements"),
    "block_size_48": (False, described("blocksize", 48), "describe"),
    "block_size_float": (False, described("blocksize", 64.0), "describe"),
    "block_size_text": (False, described("blocksize", "64"), "describe"),
    "shape_other": (False, described("shape", [80, 24]), "960 elements"),
    "shape_turned": (False, described("shape", [48, 80]), "[48, 80] instead of [80, 48]"),
    "shape_flat": (False, described("shape", [3840]), "describe"),
    "shape_negative": (False, described("shape", [-80, -48]), "describe"),
    "shape_missing": (False, described("shape", None), "describe"),
    "shape_huge": (False, described("shape", [10**30, 10**30]), "elements"),
    "dtype_wide": (False, described("dtype", "float64"), "describe"),
    "codebook_other": (False, described("quant_type", "int4"), "describe"),
    "offset_nan": (True, described("nested_offset", float("nan")), "describe"),
    "offset_infinite": (True, described("nested_offset", float("-inf")), "describe"),
    "offset_text": (True, described("nested_offset", "much"), "describe"),
    "offset_huge": (True, described("nested_offset", 10**400), "describe"),
    "nested_blocks": (True, described("nested_blocksize", 128), "describe"),
    "state_no_json": (False, text("{'shape': 3}"), "describe"),
    "state_no_object": (False, text("[1, 2]"), "describe"),
    "state_no_text": (False, text(b"\xff\xfe\x00{"), "describe"),
    "state_deep": (False, text("[" * 60_000), "describe"),
    "state_huge": (False, text(" " * 70_000 + "{}"), "describe"),
    "state_empty": (False, text(""), "describe"),
    "state_twice": (
        False,
        lambda t: t.update({f"{UP}{STATE}fp4": t[f"{UP}{STATE}nf4"].clone()}),
        "twice",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weight_is_refused_by_name(
    name: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    nested, damage, words = DAMAGES[name]
    peftc.apply(checkpoint("llama"), [Nf4(double_quant=nested)], tmp_path / "good")
    file = tmp_path / "good" / "base" / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, {"format": "pt"})
    kind = CaptureError if name == "shape_turned" else CheckpointError
    job = lambda out: peftc.export(file.parent, out)  # noqa: E731
    refuse(tmp_path, kind, job, UP.removesuffix(".weight"), words)


def test_parts_without_a_description_are_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    peftc.apply(checkpoint("llama"), [Nf4()], tmp_path / "good")
    file = tmp_path / "good" / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{UP}{STATE}nf4"]
    save_file(tensors, file, {"format": "pt"})
    refuse(tmp_path, CaptureError, lambda out: peftc.export(file.parent, out), UP)


@pytest.mark.parametrize(
    ("quantization", "word"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_other_quantization_is_refused(
    quantization: dict[str, Any], word: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = copied(checkpoint("llama"), tmp_path / "base")
    edit(base / "config.json", quantization_config=quantization)
    refuse(tmp_path, CaptureError, lambda out: peftc.export(base, out), word, "config.json")


def test_nf4_refuses_what_it_cannot_quantize(
    checkpoint: MakeCheckpoint, tied: Tied, tmp_path: Path
) -> None:
    llama = checkpoint("llama")
    peftc.apply(llama, [Nf4(targets="up_proj")], tmp_path / "four")
    peftc.apply(llama, [Nf4()], tmp_path / "all")
    four, all_four = (tmp_path / name / "base" for name in ("four", "all"))
    cases: list[tuple[Path, dict[str, Any], type[PeftcError], list[str]]] = [
        (four, {"targets": "up_proj"}, PassError, ["layers.1.mlp.up_proj", "4 bits already"]),
        (all_four, {}, PassError, ["no linear layer is left"]),
        (llama, {"targets": "embed_tokens"}, PassError, ["model.embed_tokens", "kind"]),
        (tied("llama"), {"targets": "lm_head"}, PassError, ["lm_head", "tied"]),
        (llama, {"targets": "up_porj"}, SelectionError, ["up_proj"]),
        (llama, {"targets": "up_proj", "layers": 7}, SelectionError, ["layer 7"]),
    ]
    for base, options, kind, words in cases:
        with pytest.raises(PeftcError) as caught:
            peftc.apply(base, [Nf4(**options)], tmp_path / "out")
        errors = getattr(caught.value, "errors", (caught.value,))
        assert all(isinstance(error, kind) and error.fix for error in errors), errors
        assert all(word in str(caught.value) for word in words), caught.value
        assert not (tmp_path / "out").exists()


def test_block_size_of_no_kernel_is_refused() -> None:
    with pytest.raises(ValidationError, match="must be one of 32, 64"):
        Nf4(block_size=48)
    with pytest.raises(PassError, match=r"block_size: must be one of .*, not 48"):
        build([("nf4", {"block_size": 48})], "here")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("nested", [False, True])
def test_weight_that_is_not_finite_is_refused(
    bad: float, nested: bool, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = copied(checkpoint("llama"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors[UP][79, 47] = bad
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    step = Nf4(double_quant=nested)
    site = UP.removesuffix(".weight")  # of nested absmax a sample shows it, before any work
    refuse(tmp_path, ProofError, lambda out: peftc.apply(base, [step], out), site)
    if not nested:
        program = Pipeline([step]).run(capture(base))
        refuse(tmp_path, ProofError, lambda out: peftc.to_safetensors(program, out), UP, "NaN")


@pytest.mark.parametrize("form", [{}, {"double_quant": True, "codebook": "fp4", "block_size": 32}])
def test_artifact_is_proven_and_a_flipped_code_is_found(
    form: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("gpt2")
    applied = peftc.apply(base, [Nf4(**form)], tmp_path / "applied")
    program = Pipeline([Nf4(**form)]).run(capture(base))
    exported = peftc.to_safetensors(program, tmp_path / "exported")
    assert exported.manifest["proof"]["whole"]["relative_error"] < 1e-5
    assert peftc.verify(tmp_path / "exported")["whole"]["relative_error"] < 1e-5
    assert peftc.verify(tmp_path / "applied")["files"]
    name, key = "model.safetensors", "transformer.h.1.mlp.c_fc.weight"
    peftc.export(applied.path, tmp_path / "again")
    places = ("applied/base", "exported", "again")
    both = [(tmp_path / place / name).read_bytes() for place in places]
    assert both[0] == both[1] == both[2]
    suffixes = ("", ".absmax", ".nested_absmax", f"{STATE}{form.get('codebook', 'nf4')}")
    for suffix in suffixes[: None if form else 2]:
        ref = read_header(tmp_path / "exported" / name).tensors[key + suffix]
        raw = bytearray(both[1])
        raw[ref.start + ref.nbytes // 2] ^= 1
        (tmp_path / "exported" / name).write_bytes(raw)
        with pytest.raises(ProofError, match=name):
            peftc.verify(tmp_path / "exported")
        with pytest.raises(ProofError, match="program makes") as caught:
            watch_file(program, Checkpoint.open(exported.path))
        assert caught.value.where == key + suffix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_over_a_merged_lora_quantizes_what_was_not_rounded(
    dtype: torch.dtype, checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("llama", dtype)
    merged = Pipeline([Attach(path=str(adapter(base))), Merge()]).run(capture(base))
    program = Pipeline([Nf4()]).run(merged)
    artifact = peftc.to_safetensors(program, tmp_path / "out")
    assert artifact.manifest["proof"]["whole"]["relative_error"] < 1e-5
    assert peftc.verify(tmp_path / "out")["whole"]["relative_error"] < 1e-5
    written = load_file(tmp_path / "out" / "model.safetensors")
    weight: Any = merged.constants[UP]
    codes, absmax = nf4.quantize(Evaluation(weight.graph, weight.inputs).whole())
    assert torch.equal(written[UP], codes) and torch.equal(written[f"{UP}.absmax"], absmax)


def test_dequantized_checkpoint_is_plain_and_its_logits_the_same(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    for name in ("llama", "gpt2"):
        peftc.apply(checkpoint(name), [Nf4(double_quant=True)], tmp_path / name)
        four = capture(tmp_path / name / "base")
        plain = Pipeline([Dequantize()]).run(four)
        artifact = peftc.to_safetensors(plain, tmp_path / f"plain-{name}")
        assert artifact.manifest["proof"]["whole"]["relative_error"] < 1e-5
        config = json.loads((artifact.path / "config.json").read_text())
        assert "quantization_config" not in config
        tensors = load_file(artifact.path / "model.safetensors")
        assert tensors.keys() == load_file(checkpoint(name) / "model.safetensors").keys()
        want = logits(materialize(four))
        assert distance(logits(materialize(capture(artifact.path))), want) < 1e-5


def test_original_weights_come_back_byte_for_byte(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    for name, dtype in (("llama", torch.bfloat16), ("gpt2", torch.float32)):
        base = checkpoint(name, dtype)
        peftc.apply(base, [Nf4()], tmp_path / name)
        back = Dequantize(base="original", original=str(base))
        program = Pipeline([back]).run(capture(tmp_path / name / "base"))
        peftc.to_safetensors(program, tmp_path / f"back-{name}", proof="sites")
        want = load_file(base / "model.safetensors")
        got = load_file(tmp_path / f"back-{name}" / "model.safetensors")
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
        just = Pipeline([Nf4(), Dequantize(base="original")]).run(capture(base))
        assert all(just.constants[key] is just.captured[key] for key in just.captured)


def test_original_that_is_not_to_be_had_is_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    peftc.apply(checkpoint("llama"), [Nf4(targets="up_proj")], tmp_path / "four")
    program = capture(tmp_path / "four" / "base")
    for original in (None, str(checkpoint("gpt2"))):
        with pytest.raises(PeftcError, match="original is not to be had") as caught:
            Pipeline([Dequantize(base="original", original=original)]).run(program)
        assert UP in str(caught.value)


def test_experts_stored_one_by_one_are_read_and_written(tmp_path: Path) -> None:
    base, plain = tmp_path / "base", tmp_path / "plain"
    mixtral = SPECIMENS["mixtral"]
    mixtral.build().save_pretrained(base)
    four: dict[str, torch.Tensor] = {}
    back: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(base / "model.safetensors").items():
        packed = quantized(Held(tensor), FourBit()) if ".experts." in key else None
        parts = packed.parts if packed else {"": Held(tensor)}
        four |= {key + suffix: value(part).clone() for suffix, part in parts.items()}
        back[key] = value(packed) if packed else tensor
    copied(base, plain)
    save_file(back, plain / "model.safetensors", {"format": "pt"})
    save_file(four, base / "model.safetensors", {"format": "pt"})
    edit(base / "config.json", quantization_config={"load_in_4bit": True})
    with torch.no_grad():
        live = (materialize(capture(path))(**mixtral.inputs()) for path in (base, plain))
        assert torch.equal(*map(mixtral.output, live))
    peftc.to_safetensors(capture(base), tmp_path / "out", proof="sites")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes()


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5, whose `wo` transformers keeps in fp32."""
    options = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(3)
    config = transformers.T5Config(**options, vocab_size=97, decoder_start_token_id=0)
    path = tmp_path_factory.mktemp("t5")
    transformers.T5ForConditionalGeneration(config).save_pretrained(path)
    return path


def test_modules_kept_in_fp32_are_left_alone_and_naming_them_is_an_error(
    t5: Path, tmp_path: Path
) -> None:
    program = Pipeline([Nf4()]).run(capture(t5))
    kinds = {fqn: isinstance(c, Packed) for fqn, c in program.constants.items()}
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wi.weight"]
    assert not any(four for fqn, four in kinds.items() if ".wo." in fqn)
    assert kinds["decoder.block.0.layer.0.SelfAttention.o.weight"]
    job = lambda out: peftc.apply(t5, [Nf4(targets="wo")], out)  # noqa: E731
    refuse(tmp_path, PassError, job, "DenseReluDense.wo", "fp32")


def test_all_tensors_are_aligned_when_shapes_are_odd(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=35, intermediate_size=33, num_hidden_layers=2, num_attention_heads=5,
        vocab_size=31, max_position_embeddings=17,
    )  # fmt: skip
    model: Any = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path / "base")
    for options in ({}, {"double_quant": True}, {"targets": "query", "block_size": 32}):
        program = Pipeline([Nf4(**options)]).run(capture(tmp_path / "base"))
        (file,) = program.source.layout()
        assert {key for key, _ in contents(program, file)} > set(file.tensors)
        out = tmp_path / f"out{len(options)}"
        peftc.to_safetensors(program, out)
        header = read_header(out / "model.safetensors")
        data = 8 + int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
        for ref in header.tensors.values():
            assert (ref.start - data) % Leaf(ref).spec.dtype.itemsize == 0, ref.name
