"""What the weights of an ONNX graph may be: the checkpoint's own, in 4 bits too, or the graph's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import peftc
from peftc import capture
from peftc.errors import ProofError
from peftc.exporters.onnx_quantized import blocks, dequantized
from peftc.ops import start  # noqa: F401  # registers the operators

from .conftest import MakeAdapter, MakeCheckpoint, Tied, auto
from .test_onnx import Runner, compare

uniform: Any = torch.ops.peftc
REACH = {8: "full", 4: "fitted"}


def kinds(path: Path) -> list[str]:
    proto = onnx.load(str(path / "model.onnx"), load_external_data=False)
    return [node.op_type for node in proto.graph.node]


def matmul(x: torch.Tensor, weight: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """x·Wᵀ by onnxruntime, of the weight in steps; accuracy level 1 multiplies in fp32."""
    given = {
        "codes": uniform.uniform_codes(weight, bits, block, REACH[bits]),
        "steps": uniform.uniform_scales(weight, bits, block, REACH[bits]),
    }
    values = [
        onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array.numpy(), name=name))
        for name, array in given.items()
    ]
    input_ = onnx_ir.Value(
        name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape(x.shape)
    )
    out, inner = weight.shape
    node = onnx_ir.node(
        "MatMulNBits", [input_, *values], domain="com.microsoft",
        attributes={"K": inner, "N": out, "bits": bits, "block_size": block, "accuracy_level": 1},
    )  # fmt: skip
    node.outputs[0].name, node.outputs[0].type = "y", input_.type
    graph = onnx_ir.Graph(
        [input_], node.outputs, nodes=[node], initializers=values,
        opset_imports={"": 23, "com.microsoft": 1},
    )  # fmt: skip
    proto = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=11))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 40), inner=st.integers(1, 150), bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 128]), seed=st.integers(0, 99),
)  # fmt: skip
def test_codes_and_steps_are_what_the_runtime_reads(
    out: int, inner: int, bits: int, block: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inner, generator=generator)
    weight[0] = 0  # a block without a step
    x = torch.randn(3, inner, generator=generator)
    codes, steps = (
        f(weight, bits, block, REACH[bits]) for f in (uniform.uniform_codes, uniform.uniform_scales)
    )
    stands = dequantized(codes, steps.unsqueeze(-1), bits)
    reach = steps.abs().unsqueeze(-1) * 2 ** (bits - 1)  # 4 bits may cut the largest values off
    error = (stands - blocks(weight, block).clamp(-reach, reach)).abs()
    assert bool((error <= steps.abs().unsqueeze(-1) * 1.001).all())
    want = x @ stands.reshape(out, -1)[:, :inner].t()
    torch.testing.assert_close(matmul(x, weight, bits, block), want, rtol=1e-4, atol=1e-4)


def test_codes_are_the_nearest_and_the_largest_value_is_met_in_8_bits() -> None:
    weight = torch.tensor([[-128.0, 127.0, 3.4, -3.4, 0.6, 0.0, 128.0, 1.0] * 2])
    codes, steps = (
        f(weight, 8, 16, "full") for f in (uniform.uniform_codes, uniform.uniform_scales)
    )
    assert steps.item() == 1
    got = dequantized(codes, steps.unsqueeze(-1), 8).flatten()[:8]
    assert got.tolist() == [-128, 127, 3, -3, 1, 0, 127, 1]
    even = uniform.uniform_scales(weight, 8, 16, "even")
    ends = dequantized(
        uniform.uniform_codes(weight, 8, 16, "even"), even.unsqueeze(-1), 8
    ).flatten()
    assert (ends[0].item(), ends[6].item()) == (-128, 128)


def test_steps_of_4_bits_are_closer_than_those_that_reach_the_largest_value() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    parts = blocks(weight, 32)
    largest = parts.gather(2, parts.abs().argmax(2, keepdim=True))
    plain = (parts * -8 / largest).round().clamp(-8, 7) * largest / -8
    codes, steps = (
        f(weight, 4, 32, "fitted") for f in (uniform.uniform_codes, uniform.uniform_scales)
    )
    error, before = (
        (x - parts).norm() for x in (dequantized(codes, steps.unsqueeze(-1), 4), plain)
    )
    assert error < 0.97 * before


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_layers_answer_alike_and_the_error_is_measured(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path, kind: Any
) -> None:
    base = checkpoint("llama")
    artifact = peftc.export(
        base, tmp_path / "out", merge=True, adapters=[(str(adapter(base)), 1.0)], format="onnx",
        weights=kind,
    )  # fmt: skip
    manifest, bits = artifact.manifest, int(kind[3:])
    assert manifest["onnx"]["weights"] == kind
    assert manifest["onnx"]["block_size"] == [32] and manifest["onnx"]["accuracy_level"] == 4
    assert manifest["onnx"]["quantized_layers"] == 15  # q, k and v by one product a layer
    assert kinds(artifact.path).count("MatMulNBits") == 11
    assert "FusedMatMul" not in kinds(artifact.path)
    assert not (artifact.path / "model.safetensors").exists()
    low, high = {8: (1e-3, 1e-2), 4: (3e-2, 0.2)}[bits]
    assert low < manifest["proof"]["weights"]["relative_error"] < high
    assert manifest["proof"]["onnx"]["bound"] is None
    assert manifest["proof"]["onnx"]["model.onnx"]["at"].startswith("logits")
    assert manifest["proof"]["onnx"]["model.onnx"]["relative_error"] < {8: 0.1, 4: 0.6}[bits]
    assert peftc.verify(artifact.path)["weights"] == manifest["proof"]["weights"]


def test_fp32_weights_of_its_own_are_the_merged_ones_unrounded(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("qwen2", torch.bfloat16)
    path = adapter(base)
    out = peftc.export(
        base, tmp_path / "out", merge=True, adapters=[(str(path), 1.0)], format="onnx",
        weights="fp32",
    ).path  # fmt: skip
    program = peftc.load(path)
    model: Any = peftc.materialize(program, dtype=torch.float32)
    compare(out, model, 3, 9, 1e-5)
    assert {t.dtype for t in load_file(out / "onnx.safetensors").values()} == {torch.float32}
    assert peftc.verify(out)["onnx"]["bound"] == 1e-4


def test_conv1d_and_tied_head_are_quantized_too(tied: Tied, tmp_path: Path) -> None:
    base = tied("gpt2")
    out = peftc.export(base, tmp_path / "out", format="onnx", weights="int8").path
    report = json.loads((out / "peftc.json").read_text())["onnx"]
    assert report["quantized_layers"] == 9
    tensors = load_file(out / "onnx.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight.codes"].shape == (144, 2, 32)
    assert tensors["transformer.wte.weight.codes"].dtype == torch.uint8
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    run = Runner(out)
    got, _ = run(ids, torch.ones_like(ids), run.empty(1))
    with torch.no_grad():
        want = auto(base)(ids).logits
    assert (got - want).abs().max() / want.abs().max() < 0.05


@pytest.mark.parametrize(("double", "cls"), [(False, "llama"), (True, "gpt2")])
def test_nf4_runs_from_bitsandbytes_own_bytes(
    checkpoint: MakeCheckpoint, tmp_path: Path, double: bool, cls: str
) -> None:
    base = checkpoint(cls)
    program = peftc.Pipeline([peftc.Nf4(double_quant=double, block_size=32)]).run(capture(base))
    artifact = peftc.to_onnx(program, tmp_path / "out")
    assert kinds(artifact.path).count("MatMulBnb4") == {"llama": 14, "gpt2": 8}[cls]
    assert artifact.manifest["proof"]["onnx"]["model.onnx"]["relative_error"] < 1e-5
    proto = onnx.load(str(artifact.path / "model.onnx"), load_external_data=False)
    codes = next(t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.UINT8)
    place = {entry.key: entry.value for entry in codes.external_data}
    assert place["location"] == "model.safetensors"  # which transformers loads by bitsandbytes
    assert (artifact.path / "onnx.safetensors").exists() == double
    assert peftc.verify(artifact.path)["onnx"] == artifact.manifest["proof"]["onnx"]


def test_weight_that_is_no_number_is_not_published(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(checkpoint("llama"), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 5] = np.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match="further than a step"):
        peftc.export(base, tmp_path / "out", format="onnx", weights="int8", proof="sites")
    assert not (tmp_path / "out").exists()


def test_experts_are_written_whole_once_and_referred_to(tmp_path: Path) -> None:
    from .onnx_families import FAMILIES, export

    artifact = export(FAMILIES["Mixtral"], tmp_path)
    tensors = load_file(artifact.path / "onnx.safetensors")
    assert (
        sorted(name.rpartition(".")[2] for name in tensors)
        == ["down_proj"] * 3 + ["gate_up_proj"] * 3
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(artifact.path)
    for name, tensor in tensors.items():
        assert torch.equal(model.state_dict()[name], tensor)
