"""ONNX of other architectures; every export compares its graphs with eager torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from .conftest import auto
from .onnx_families import FAMILIES, export
from .test_onnx import generated

# One of each way of computing; `python -m tests.onnx_families` tries all.
CHOSEN = {
    "GPT-2": {"transformer.h": (2, 3)},
    "Gemma 3": {"model.layers": (4, 6)}, "Qwen3-MoE": {"model.layers": (2, 3)},
    "BERT": {"encoder.layer": (2, 3)}, "T5": {"encoder.block": (3, 4), "decoder.block": (3, 4)},
    "ViT": {"vit.layers": (2, 3)},
}  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_architecture_is_exported_equal_and_its_layers_cloned(name: str, tmp_path: Path) -> None:
    manifest = export(FAMILIES[name], tmp_path).manifest
    graphs = manifest["onnx"]["graphs"]
    for graph in graphs:
        assert manifest["proof"]["onnx"][graph]["relative_error"] <= 1e-5
    layers = {
        path: (few["captured"], few["of"])
        for graph in graphs.values() for path, few in graph["layers"].items()
    }  # fmt: skip
    assert layers == CHOSEN[name]


def test_decoder_that_numbers_positions_by_itself_runs_in_genai(tmp_path: Path) -> None:
    path, ids = export(FAMILIES["BLOOM"], tmp_path).path, [5, 17, 3, 29, 8]
    config = json.loads((path / "genai_config.json").read_text())
    assert "position_ids" not in config["model"]["decoder"]["inputs"]
    given = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    want = auto(path).generate(torch.tensor([ids]), **given)
    assert generated(path, ids, 12) == want[0].tolist()
