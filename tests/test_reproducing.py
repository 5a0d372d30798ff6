"""verify --rebuild: the same bytes from nothing but the manifest, or what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc.artifact import Artifact
from peftc.errors import ArtifactError, ProofError
from peftc.reproducing import reproduce

from .conftest import MakeAdapter, MakeCheckpoint, Run
from .helpers import edit


@pytest.fixture
def made(checkpoint: MakeCheckpoint, adapter: MakeAdapter) -> dict[str, Any]:
    base = checkpoint("llama", torch.bfloat16, shards=True)
    return {"source": base, "adapters": [(str(adapter(base)), 0.5)]}


@pytest.mark.parametrize(
    "options",
    [
        {"merge": True},
        {"merge": True, "format": "onnx", "weights": "int8", "proof": "sites"},
        {"merge": True, "format": "onnx", "proof": "sites"},
        {"format": "onnx", "swap": True, "slots": "q_proj", "proof": "sites"},
        {"format": "peft", "canonical": True, "rank": 4},
    ],
    ids=["merged", "int8", "onnx", "swap", "canonical"],
)
def test_export_is_made_again_byte_for_byte(
    made: dict[str, Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    artifact = peftc.export(target=tmp_path / "out", **{**made, **options})
    assert reproduce(tmp_path / "out")["files"] == len(artifact.manifest["files"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_applied_is_made_again_with_its_random_start(
    checkpoint: MakeCheckpoint, tmp_path: Path, run: Run
) -> None:
    """From another directory, on one thread and on two; the base's own place is in the config."""
    base = checkpoint("llama")
    peftc.apply(base, [peftc.Nf4(), peftc.Lora(rank=2)], tmp_path / "out")
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert (
            run("verify", tmp_path / "out", "--rebuild", "--json").data["rebuilt"]["format"]
            == "apply"
        )
    torch.set_num_threads(before)


def test_file_that_is_another_one_now_is_named(made: dict[str, Any], tmp_path: Path) -> None:
    peftc.export(target=tmp_path / "out", merge=True, **made)
    files = json.loads((tmp_path / "out" / "peftc.json").read_text())["files"]
    name = next(name for name in files if name.endswith(".safetensors"))
    files[name]["blake3"] = "0" * 64
    edit(tmp_path / "out" / "peftc.json", files=files)
    with pytest.raises(ProofError, match=f"{name}.*another file when it is made again"):
        reproduce(tmp_path / "out")


def test_what_was_trained_is_not_made_again(made: dict[str, Any], tmp_path: Path) -> None:
    peftc.export(target=tmp_path / "out", merge=True, **made)
    edit(tmp_path / "out" / "peftc.json", training={"settings": {}})
    assert Artifact.open(tmp_path / "out").manifest["training"]
    with pytest.raises(ArtifactError, match="what was trained"):
        reproduce(tmp_path / "out")
