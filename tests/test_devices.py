"""Weights computed on another device: by it all, to the same bits, and said when there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import peftc
from peftc import export
from peftc.cli import cli
from peftc.devices import true_fp32
from peftc.errors import ArtifactError, PeftcError
from peftc.evaluate import Evaluation

from .conftest import MakeAdapter, MakeCheckpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def job(checkpoint: MakeCheckpoint, adapter: MakeAdapter) -> dict[str, Any]:
    base = checkpoint("gpt2", torch.bfloat16, shards=True)
    return {"source": base, "merge": True, "adapters": [(str(adapter(base)), 0.5)]}


def test_device_computes_every_tensor_that_is_not_copied(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cpu:0` is the CPU, and goes the way of another device."""
    there, seen = torch.device("cpu:0"), []

    class Recorded(Evaluation):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            seen.append(self.device)

    plain = export(target=tmp_path / "plain", **job)
    expected = peftc.dry_run(target=tmp_path / "out", **job)["computed"]["tensors"]
    monkeypatch.setattr("peftc.link.Evaluation", Recorded)
    out = export(target=tmp_path / "out", device="cpu:0", **job)
    assert len(seen) == expected > 0 and set(seen) == {there}
    assert out.manifest["files"] == plain.manifest["files"]


@needs_gpu
def test_gpu_writes_the_bits_of_the_cpu(job: dict[str, Any], tmp_path: Path) -> None:
    plain = export(target=tmp_path / "plain", **job)
    torch.set_float32_matmul_precision("high")  # TF32, were it not refused
    try:
        out = export(target=tmp_path / "out", device="cuda", **job)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert out.manifest["files"] == plain.manifest["files"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_told_before_any_work(job: dict[str, Any], tmp_path: Path) -> None:
    for run in (export, lambda **how: peftc.export_part(shards="1/1", **how)):
        with pytest.raises(PeftcError, match="no such device here") as caught:
            run(target=tmp_path / "out", device="cuda", **job)
        assert "leave it out" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_device_that_holds_no_values_is_refused(job: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match="is not a device that weights are computed on"):
        export(target=tmp_path / "out", device="meta", **job)
    with pytest.raises(ArtifactError, match="is for the format safetensors"):
        export(target=tmp_path / "out", device="cpu:0", format="pt2", **job)
    arguments = ["export", str(job["source"]), "-o", "o", "--device", "cuda", "--format", "peft"]
    assert CliRunner().invoke(cli, arguments).exit_code == 2


def test_caller_s_precision_holds_again_afterwards() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with true_fp32():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
