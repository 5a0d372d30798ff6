"""Dry runs: what an export would write, counted, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import peftc
from peftc.cli import cli
from peftc.errors import ArtifactError, PeftcError

from .conftest import MakeAdapter, MakeCheckpoint


@pytest.fixture
def job(checkpoint: MakeCheckpoint, adapter: MakeAdapter) -> dict[str, Any]:
    base = checkpoint("llama", torch.bfloat16, shards=True)
    return {"source": base, "merge": True, "adapters": [(str(adapter(base)), 1.0)]}


def test_dry_run_counts_what_is_then_written(job: dict[str, Any], tmp_path: Path) -> None:
    told = peftc.dry_run(target=tmp_path / "out", **job)
    assert not list(tmp_path.iterdir())
    made = peftc.export(target=tmp_path / "out", **job)
    weights = [f for name, f in made.manifest["files"].items() if name.endswith(".safetensors")]
    assert told["files"] == len(weights) and told["bytes"] == sum(f["size"] for f in weights)
    assert told["computed"]["tensors"] == made.manifest["proof"]["site"]["sites"]
    assert told["journal"] == made.manifest["journal"]
    assert 0 < told["computed"]["bytes"] < told["bytes"] < told["free"]


def test_dry_run_refuses_what_an_export_refuses(job: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ArtifactError, match="exists already"):
        peftc.dry_run(target=tmp_path / "out", **job)
    with pytest.raises(ArtifactError, match="still carries the adapter"):
        peftc.dry_run(target=tmp_path / "new", **{**job, "merge": False})
    with pytest.raises(PeftcError, match="is missing"):
        peftc.dry_run(target=tmp_path / "new", **{**job, "adapters": [(str(tmp_path), 1.0)]})


def test_dry_run_counts_and_fails_when_the_disk_is_too_small(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    line = ["export", str(job["source"]), "-o", str(tmp_path / "out"), "--merge", "--dry-run"]
    shown = CliRunner().invoke(cli, [*line, "--adapter", job["adapters"][0][0], "--json"])
    told = json.loads(shown.stdout)
    assert shown.exit_code == 1 and told["free"] == 1000 and not told["fits"]
    assert told["files"] > 1 and not list(tmp_path.iterdir())


def test_command_says_what_it_would_write(job: dict[str, Any], tmp_path: Path) -> None:
    adapter, out = job["adapters"][0][0], tmp_path / "out"
    line = ["export", str(job["source"]), "-o", str(out), "--merge", "--adapter", adapter]
    shown = CliRunner().invoke(cli, [*line, "--dry-run"])
    assert shown.exit_code == 0 and "nothing was written" in shown.stderr, shown.output
    data = json.loads(CliRunner().invoke(cli, [*line, "--dry-run", "--json"]).stdout)
    assert data["path"] == str(out) and data["computed"]["tensors"] > 0
    wrong = CliRunner().invoke(cli, [*line, "--dry-run", "--format", "onnx"])
    assert wrong.exit_code == 2 and "--dry-run is for" in wrong.stderr
    assert not list(tmp_path.iterdir())
