"""What ONNX graphs compute in, who keeps their cache, and what their weights are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from safetensors.torch import load_file

import peftc
from peftc import capture
from peftc.errors import ArtifactError, MissingDependency
from peftc.exporters import onnx_needs

from .conftest import MakeCheckpoint, Tied, auto
from .helpers import refuse
from .onnx_families import FAMILIES
from .test_onnx import Runner, compare, generated
from .test_onnx_weights import kinds

FLOAT16, BFLOAT16 = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


def types(path: Path) -> dict[str, int]:
    """The element types of the graph's inputs and outputs."""
    graph = onnx.load(str(path / "model.onnx"), load_external_data=False).graph
    return {port.name: port.type.tensor_type.elem_type for port in (*graph.input, *graph.output)}


def test_cache_that_the_runtime_keeps_gives_the_same_texts(tied: Tied, tmp_path: Path) -> None:
    base = tied("llama", head_dim=8)
    artifact = peftc.export(base, tmp_path / "out", format="onnx", cache="shared")
    path, model = artifact.path, auto(base)
    assert kinds(path).count("GroupQueryAttention") == 2 and "Attention" not in kinds(path)
    assert artifact.manifest["proof"]["onnx"]["shapes"][-1] == [3, 7, 1]
    for batch, past in ((1, 0), (3, 0), (1, 41)):  # of which two rows are padded on the left
        compare(path, model, batch, past, 1e-5)
    ids = [5, 17, 3, 29, 8]
    want = model.generate(
        torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False
    )
    assert generated(path, ids, 20) == want[0].tolist()
    assert Runner(path).greedy(torch.tensor([ids]), 20).tolist() == want.tolist()
    config = json.loads((path / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True


@pytest.mark.parametrize(
    ("name", "says"), [("Llama", "have 4 features"), ("T5", "attends to more than one cache")]
)
def test_cache_that_the_runtime_cannot_keep_is_refused(
    tmp_path: Path, name: str, says: str
) -> None:
    base, family = tmp_path / "base", FAMILIES[name]
    options = {**family.options, **({"head_dim": 4} if name == "Llama" else {})}
    config = getattr(transformers, family.config)(**options)
    getattr(transformers, family.cls)(config).save_pretrained(base)
    refuse(
        tmp_path, ArtifactError,
        lambda out: peftc.export(base, out, format="onnx", cache="shared"), says, "cache='grown'",
    )  # fmt: skip


def test_fp16_graph_is_fp16_throughout_and_near_fp32(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    artifact = peftc.export(
        checkpoint("llama"), tmp_path / "out", format="onnx", weights="fp16", provider="cuda"
    )
    path, ports = artifact.path, types(artifact.path)
    assert {t.dtype for t in load_file(path / "onnx.safetensors").values()} == {torch.float16}
    assert ports["past_key_values.0.key"] == ports["present.1.value"] == FLOAT16
    assert ports["logits"] == onnx.TensorProto.FLOAT
    names = kinds(path)  # what is fused in fp32 is in fp16 too
    counts = [names.count(k) for k in ("RMSNormalization", "RotaryEmbedding", "Attention")]
    assert counts == [5, 4, 2]
    proof = artifact.manifest["proof"]["onnx"]
    assert 0 < proof["model.onnx"]["relative_error"] < 5e-3 < proof["bound"] == 3e-2
    config = json.loads((path / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]
    assert peftc.verify(path)["onnx"] == proof


def test_bf16_graph_refers_to_bf16_weights_and_is_not_run_on_a_cpu(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("qwen2", torch.bfloat16)
    artifact = peftc.export(base, tmp_path / "out", format="onnx", compute="bf16")
    assert not (artifact.path / "onnx.safetensors").exists()
    assert types(artifact.path)["past_key_values.0.key"] == BFLOAT16
    assert "no bf16 on a CPU" in artifact.manifest["proof"]["onnx"]["skipped"]
    onnx.checker.check_model(str(artifact.path / "model.onnx"), full_check=True)


def test_nf4_codes_in_8_bits_are_said_to_be_an_approximation(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    program = peftc.Pipeline([peftc.Nf4(block_size=32)]).run(capture(checkpoint("llama")))
    artifact = peftc.to_onnx(program, tmp_path / "out", weights="nf4-int8")
    names, said = kinds(artifact.path), artifact.manifest["onnx"]
    assert names.count("MatMulNBits") == 10 and "MatMulBnb4" not in names
    assert names.count("FusedMatMul") == 1  # the head, which is not in NF4
    assert said["approximation"] and said["quantized_layers"] == 14
    assert said["block_size"] == [32] and "head_bits" not in said
    proof = artifact.manifest["proof"]  # against the model in exact NF4
    assert 0 < proof["weights"]["relative_error"] < 7e-3
    assert proof["onnx"]["bound"] is None
    assert proof["onnx"]["model.onnx"]["relative_error"] < 0.05
    assert peftc.verify(artifact.path)["weights"] == proof["weights"]


@pytest.mark.parametrize("bits", [8, 4])
def test_head_has_the_bits_asked_for_and_a_tied_embedding_reads_its_codes(
    tied: Tied, tmp_path: Path, bits: Any
) -> None:
    base = tied("llama", hidden_size=64)  # whole blocks
    artifact = peftc.export(base, tmp_path / "out", format="onnx", weights="int4", head_bits=bits)
    assert artifact.manifest["onnx"]["head_bits"] == bits
    assert "GatherBlockQuantized" in kinds(artifact.path)
    tensors = load_file(artifact.path / "onnx.safetensors")
    assert "model.embed_tokens.weight" not in tensors
    codes = tensors["model.embed_tokens.weight.codes"]
    assert codes.shape[-1] * 8 == bits * 32
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight.steps" in tensors
    assert artifact.manifest["proof"]["onnx"]["model.onnx"]["relative_error"] < 0.6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": "fp16", "compute": "bf16"}, "held twice"),
        ({"weights": "int4", "head_bits": 3}, "8 or 4 bits, not 3"),
        ({"weights": "nf4-int8"}, "no layer is in NF4"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    base = checkpoint("llama")
    refuse(
        tmp_path, ArtifactError, lambda out: peftc.export(base, out, format="onnx", **options),
        says,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("what", "says"),
    [("both", "overwrite each other's files"), ("runtime", "no kernels for opset 23"),
     ("onnx", "knows opset 22 at most")],
)  # fmt: skip
def test_libraries_in_each_other_s_way_or_too_old_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, says: str
) -> None:
    if what == "both":
        monkeypatch.setattr(onnx_needs, "installed", lambda name: "1.31.1")
    elif what == "runtime":
        monkeypatch.setattr("onnxruntime.__version__", "1.22.0")
    else:
        monkeypatch.setattr("onnx.defs.onnx_opset_version", lambda: 22)
    with pytest.raises(MissingDependency, match=says) as error:
        onnx_needs.check()
    assert "pip " in str(error.value)
