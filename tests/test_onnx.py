"""ONNX exports: onnxruntime computes what eager torch does, and nothing half-made is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftc
from peftc import capture
from peftc.cli import cli
from peftc.errors import ArtifactError, CaptureError, CheckpointError, MissingDependency, ProofError
from peftc.exporters.onnx_proof import session
from peftc.exporters.to_onnx import lower

from .conftest import MakeAdapter, MakeCheckpoint, Tied, auto
from .helpers import refuse, tree

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def merged(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny Llama with a LoRA merged, as ONNX."""
    base, out = checkpoint("llama"), tmp_path_factory.mktemp("onnx") / "out"
    peftc.export(base, out, merge=True, adapters=[(str(adapter(base)), 1.0)], format="onnx")
    return out


class Runner:
    """A decoder in onnxruntime, as any user of it would write it."""

    def __init__(self, path: Path) -> None:
        self.session = session(path / "model.onnx", threads=1)
        self.options, self.adapters = onnxruntime.RunOptions(), list[Any]()
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.cache = {
            i.name: i.shape for i in self.session.get_inputs() if i.name.startswith("past_")
        }
        self.numbered = any(i.name == "position_ids" for i in self.session.get_inputs())

    def empty(self, batch: int) -> Arrays:
        return {
            name: np.zeros((batch, shape[1], 0, shape[3]), np.float32)
            for name, shape in self.cache.items()
        }

    def __call__(self, ids: Tensor, mask: Tensor, past: Arrays) -> tuple[Tensor, Arrays]:
        """Logits of the last of the mask's tokens, whose ids are given, and the cache."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **past}
        if self.numbered:
            given["position_ids"] = positions.numpy()
        logits, *present = self.session.run(self.outputs, given, self.options)
        names = [name.replace("present.", "past_key_values.") for name in self.outputs[1:]]
        return torch.from_numpy(logits), dict(zip(names, present, strict=True))

    def greedy(self, ids: Tensor, count: int) -> Tensor:
        past, mask, new = self.empty(len(ids)), torch.ones_like(ids), ids
        for _ in range(count):
            logits, past = self(new, mask, past)
            new = logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, new], 1), torch.ones(len(ids), ids.shape[1] + 1).long()
        return ids


def switch(run: Runner, *files: Path) -> None:
    """Other adapters, or none, from the next run on."""
    run.options = onnxruntime.RunOptions()
    run.adapters = [onnxruntime.LoraAdapter() for _ in files]  # the options only refer to them
    for adapter, file in zip(run.adapters, files, strict=True):
        adapter.Load(str(file))
        run.options.add_active_adapter(adapter)


def compare(path: Path | Runner, model: Any, batch: int, past: int, bound: float) -> None:
    """Prefill and decode of left-padded texts against the eager model."""
    run = path if isinstance(path, Runner) else Runner(path)
    now, generator = 5, torch.Generator().manual_seed(8)
    ids = torch.randint(3, model.config.vocab_size, (batch, past + now), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, :row] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    cache = run.empty(batch)
    if past:
        _, cache = run(ids[:, :past], mask[:, :past], cache)
    got, _ = run(ids[:, past:], mask, cache)
    real = mask[:, past:].bool()
    error = (got - want[:, past:])[real].abs().max() / want.abs().max()
    assert error <= bound


@pytest.mark.parametrize(("batch", "past"), [(1, 0), (3, 0), (1, 41), (3, 41)])
def test_logits_equal_torch_s_at_shapes_that_the_export_did_not_see(
    merged: Path, batch: int, past: int
) -> None:
    compare(merged, auto(merged), batch, past, 1e-5)


def test_greedy_tokens_are_transformers_own(merged: Path) -> None:
    ids = torch.tensor([[5, 17, 3, 29, 8]])
    want = auto(merged).generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert Runner(merged).greedy(ids, 40).tolist() == want.tolist()


def generated(path: Path, ids: list[int], count: int) -> list[int]:
    """What onnxruntime-genai makes of a directory, in which nothing is edited."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(path))
    options = onnxruntime_genai.GeneratorParams(model)
    length = len(ids) + count
    options.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_onnxruntime_genai_generates_the_same_from_the_same_directory(
    name: str, merged: Path, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = merged
    if name != "llama":
        path = tmp_path / "out"
        peftc.export(checkpoint(name), path, format="onnx", proof="sites")
    ids = [5, 17, 3, 29, 8]
    want = auto(path, torch.float32).generate(
        torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False
    )
    assert generated(path, ids, 20) == want[0].tolist()


def test_genai_config_is_left_out_where_nothing_ends_a_text(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The tiny GPT-2's config names an end that is not in its vocabulary."""
    artifact = peftc.export(checkpoint("gpt2"), tmp_path / "out", format="onnx", proof="sites")
    assert "genai_config.json" not in artifact.manifest["files"]
    assert "skipped" in artifact.manifest["proof"]["onnx"]


def test_directory_serves_transformers_too_and_holds_each_weight_once(merged: Path) -> None:
    names = {file.name for file in merged.iterdir()}
    assert names >= {"model.onnx", "model.safetensors", "config.json", "genai_config.json"}
    proto = onnx.load(str(merged / "model.onnx"), load_external_data=False)
    stored = {key for file in peftc.capture(merged).source.layout() for key in file.tensors}
    outside = [t for t in proto.graph.initializer if t.external_data]
    assert {t.name for t in outside} == stored
    for tensor in outside:
        assert {e.key: e.value for e in tensor.external_data}["location"] == "model.safetensors"
    assert (merged / "model.onnx").stat().st_size < 100_000


def test_graph_is_of_opset_23_s_own_operators(merged: Path) -> None:
    proto = onnx.load(str(merged / "model.onnx"), load_external_data=False)
    onnx.checker.check_model(str(merged / "model.onnx"), full_check=True)
    kinds = [node.op_type for node in proto.graph.node]
    assert {i.domain: i.version for i in proto.opset_import}[""] == 23
    assert [kinds.count(k) for k in ("Attention", "RotaryEmbedding")] == [2, 4]
    assert kinds.count("RMSNormalization") == 5
    names = [i.name for i in proto.graph.input]
    assert names[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    outputs = [o.name for o in proto.graph.output]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]
    assert any(node.name == "model.layers.1.mlp.up_proj.FusedMatMul" for node in proto.graph.node)


def test_manifest_has_the_proof_and_verify_repeats_it(merged: Path) -> None:
    manifest = json.loads((merged / "peftc.json").read_text())
    proof = manifest["proof"]
    assert proof["site"]["sites"] == 14
    assert proof["onnx"]["model.onnx"]["relative_error"] <= proof["onnx"]["bound"] == 1e-4
    assert manifest["onnx"]["graphs"]["model.onnx"]["layers"] == {}
    assert "onnxruntime" in manifest["versions"]
    again = peftc.verify(merged)
    assert again["onnx"] == proof["onnx"]
    assert again["site"]["sites"] == proof["site"]["sites"]


def test_half_weights_are_cast_when_they_are_loaded(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("qwen2", torch.bfloat16, shards=True)
    peftc.export(base, tmp_path / "out", format="onnx")
    compare(tmp_path / "out", auto(base, torch.float32), 3, 9, 1e-5)
    proto = onnx.load(str(tmp_path / "out/model.onnx"), load_external_data=False)
    places = [entry for tensor in proto.graph.initializer for entry in tensor.external_data]
    assert len({entry.value for entry in places if entry.key == "location"}) > 1


def test_tied_head_is_one_initializer(tied: Tied, tmp_path: Path) -> None:
    base = tied("llama")
    peftc.export(base, tmp_path / "out", format="onnx")
    compare(tmp_path / "out", auto(base), 3, 9, 1e-5)
    proto = onnx.load(str(tmp_path / "out/model.onnx"), load_external_data=False)
    names = [t.name for t in proto.graph.initializer]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_attached_adapter_is_refused(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    path = adapter(checkpoint("llama"))
    refuse(
        tmp_path, ArtifactError, lambda out: peftc.export(path, out, format="onnx"), "--merge",
        "carries the adapter",
    )  # fmt: skip


def test_operator_without_onnx_is_refused_by_name_and_module(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    monkeypatch.setattr(mlp, "forward", lambda self, x: self.down_proj(self.up_proj(x).digamma()))
    base = checkpoint("llama")
    refuse(
        tmp_path, CaptureError, lambda out: peftc.export(base, out, format="onnx"),
        "aten.digamma", "model.layers.0.mlp",
    )  # fmt: skip


def test_wrong_graph_is_not_published(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lower

    def wrong(*given: Any) -> Any:
        lowered = real(*given)
        graph = lowered.models["model.onnx"].graph
        node = next(node for node in graph if node.op_type == "RMSNormalization")
        node.attributes["epsilon"] = onnx_ir.AttrFloat32("epsilon", 0.3)
        return lowered

    monkeypatch.setattr("peftc.exporters.to_onnx.lower", wrong)
    base = checkpoint("llama")
    refuse(
        tmp_path, ProofError, lambda out: peftc.export(base, out, format="onnx"),
        "differs from eager torch's by", "1 texts, 0 tokens before",
    )  # fmt: skip


def test_graph_that_fails_in_the_runtime_is_not_published(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("onnxruntime.InferenceSession", broken)
    base = checkpoint("llama")
    refuse(
        tmp_path, ProofError, lambda out: peftc.export(base, out, format="onnx"),
        "cannot load it: no such kernel",
    )  # fmt: skip


def test_weights_of_no_graph_are_refused(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="--format onnx"):
        cli.main(["export", "base", "-o", "out", "--weights", "int4"], standalone_mode=False)
    refuse(
        tmp_path, ArtifactError, lambda out: peftc.export("base", out, weights="int4"),
        "weights='int4' goes with format=onnx or format=pt2",
    )  # fmt: skip


def test_existing_target_is_refused_and_kept(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    before = tree(tmp_path)
    with pytest.raises(ArtifactError, match="exists already"):
        peftc.export(checkpoint("llama"), tmp_path / "out", format="onnx")
    assert tree(tmp_path) == before


def damaged(merged: Path, tmp_path: Path, change: Mapping[str, str]) -> Path:
    """A copy of an artifact whose first tensor's data is said to be elsewhere."""
    copy = tmp_path / "copy"
    shutil.copytree(merged, copy)
    proto = onnx.load(str(copy / "model.onnx"), load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.external_data)
    for entry in tensor.external_data:
        entry.value = change.get(entry.key, entry.value)
    (copy / "model.onnx").write_bytes(proto.SerializeToString())
    return copy


@pytest.mark.parametrize(
    "change",
    [{"location": "../secret"}, {"location": "/etc/passwd"}, {"offset": "99999999"},
     {"offset": "-8"}, {"length": "999999999999"}],
)  # fmt: skip
def test_data_outside_of_the_files_is_refused_though_the_hashes_hold(
    merged: Path, tmp_path: Path, change: Mapping[str, str]
) -> None:
    from peftc.artifact import digest

    copy = damaged(merged, tmp_path, change)
    manifest = json.loads((copy / "peftc.json").read_text())
    file = copy / "model.onnx"
    manifest["files"]["model.onnx"] = {"size": file.stat().st_size, "blake3": digest(file)}
    (copy / "peftc.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="not in a file beside it"):
        peftc.verify(copy)


def test_tampered_graph_or_weights_fail_verify(merged: Path, tmp_path: Path) -> None:
    copy = damaged(merged, tmp_path, {"offset": "0"})
    with pytest.raises(ProofError, match="not what was published"):
        peftc.verify(copy)


def test_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [n for n in sys.modules if n.startswith("peftc.exporters.onnx_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "peftc.exporters.to_onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match="pip install 'peftc"):
        peftc.export("anything", "anywhere", format="onnx")


def test_source_that_changes_meanwhile_is_not_published(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoint("llama"), base)
    real = peftc.exporters.to_onnx.check

    def touch(stage: Any) -> None:
        real(stage)
        (base / "model.safetensors").touch()

    monkeypatch.setattr("peftc.exporters.to_onnx.check", touch)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        peftc.export(base, tmp_path / "out", format="onnx", proof="sites")
    assert not (tmp_path / "out").exists()


def test_rewritten_structure_is_captured_as_it_is_written(
    tied: Tied, adapter: MakeAdapter, tmp_path: Path
) -> None:
    program = peftc.Pipeline([peftc.Untie(), peftc.ReplicateLayers(ranges="0-2,0-2")]).run(
        capture(tied("llama"))
    )
    peftc.to_onnx(program, tmp_path / "out")
    compare(tmp_path / "out", auto(tmp_path / "out"), 3, 9, 1e-5)
    assert isinstance(auto(tmp_path / "out").model.layers[3], nn.Module)
