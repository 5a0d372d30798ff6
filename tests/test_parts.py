"""Exports in parts: as one export, whoever wrote which part, and nothing unless all are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftc
from peftc.artifact import Artifact
from peftc.errors import ArtifactError, CheckpointError, PeftcError
from peftc.exporters.in_parts import Part
from peftc.link import Shard

from .conftest import MakeAdapter, MakeCheckpoint
from .helpers import copied


@pytest.fixture
def job(checkpoint: MakeCheckpoint, adapter: MakeAdapter) -> dict[str, Any]:
    base = checkpoint("llama", torch.bfloat16, shards=True)
    return {"source": base, "merge": True, "adapters": [(str(adapter(base)), 0.5)]}


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".peftc-" in path.name]


@given(sizes=st.lists(st.integers(0, 100), max_size=30), of=st.integers(1, 9))
def test_shares_are_every_file_once_and_nearly_of_a_size(sizes: list[int], of: int) -> None:
    shards = [Shard(f"{i}.safetensors", b"", (), size) for i, size in enumerate(sizes)]
    shares = [Part(number, of).share(shards) for number in range(1, of + 1)]
    assert sorted((s for share in shares for s in share), key=shards.index) == shards
    loads = [sum(shard.size for shard in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_four_processes_at_once_write_what_one_does(job: dict[str, Any], tmp_path: Path) -> None:
    whole = peftc.export(target=tmp_path / "whole", **job)
    adapter = f"{job['adapters'][0][0]}=0.5"
    command = [sys.executable, "-m", "peftc", "export", str(job["source"]), "-o", "out", "--merge"]
    running = [
        subprocess.Popen(
            [*command, "--adapter", adapter, "--shards", f"{i}/4", "--json"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(1, 5)
    ]  # fmt: skip
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    files = [name for out, _ in said for name in json.loads(out)["files"]]
    assert len(files) == len(set(files)) == len(list(job["source"].glob("*.safetensors")))
    assert not (tmp_path / "out").exists()
    made = peftc.finish(tmp_path / "out")
    assert made.manifest["files"] == whole.manifest["files"]
    assert made.manifest["proof"] == whole.manifest["proof"]
    assert not left(tmp_path)


def test_finish_names_every_part_that_lacks(job: dict[str, Any], tmp_path: Path) -> None:
    peftc.export_part(target=tmp_path / "out", shards="2/4", **job)
    stopped = tmp_path / ".out.peftc-part-3-of-4"
    stopped.mkdir()
    with pytest.raises(PeftcError) as caught:
        peftc.finish(tmp_path / "out")
    text = str(caught.value)
    assert "part 1 of 4 is missing" in text and "part 4 of 4 is missing" in text
    assert "part 3 of 4 is unfinished" in text and "part 2" not in text
    assert not (tmp_path / "out").exists()


def test_finish_refuses_when_there_are_no_parts_or_of_two_numbers(
    job: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="has no parts"):
        peftc.finish(tmp_path / "out")
    peftc.export_part(target=tmp_path / "out", shards="1/1", **job)
    peftc.export_part(target=tmp_path / "out", shards="1/2", **job)
    with pytest.raises(ArtifactError, match=r"parts of \[1, 2\] at once"):
        peftc.finish(tmp_path / "out")


def test_finish_refuses_parts_of_two_adapters(
    job: dict[str, Any], adapter: MakeAdapter, tmp_path: Path
) -> None:
    peftc.export_part(target=tmp_path / "out", shards="1/2", **job)
    other = {**job, "adapters": [(str(adapter(job["source"], seed=7)), 0.5)]}
    peftc.export_part(target=tmp_path / "out", shards="2/2", **other)
    with pytest.raises(ArtifactError, match="not of one export"):
        peftc.finish(tmp_path / "out")


def test_finish_refuses_when_the_source_has_changed(job: dict[str, Any], tmp_path: Path) -> None:
    base = copied(job["source"], tmp_path / "base")
    peftc.export_part(target=tmp_path / "out", shards="1/1", **{**job, "source": base})
    next(base.glob("*.safetensors")).touch()
    with pytest.raises(CheckpointError, match="have changed"):
        peftc.finish(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_part_that_is_run_again_writes_nothing_again(job: dict[str, Any], tmp_path: Path) -> None:
    """As a scheduler does that lost sight of a part which had ended."""
    first = peftc.export_part(target=tmp_path / "out", shards="1/2", **job)
    tree = Path(first["path"]) / "tree"
    before = {file.name: file.stat().st_mtime_ns for file in tree.iterdir()}
    assert before
    assert peftc.export_part(target=tmp_path / "out", shards="1/2", **job) == first
    assert {file.name: file.stat().st_mtime_ns for file in tree.iterdir()} == before


def test_finish_goes_on_when_it_was_killed_between_moving_and_publishing(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shards in ("1/2", "2/2"):
        peftc.export_part(target=tmp_path / "out", shards=shards, **job)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peftc.parts.prepare", killed)
        with pytest.raises(KeyboardInterrupt):
            peftc.finish(tmp_path / "out")
    made = peftc.finish(tmp_path / "out")
    assert isinstance(made, Artifact) and not made.damage()
    assert made.manifest["proof"]["site"]["sites"] and not left(tmp_path)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b", "1/2/3", "-1/2"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="is no part"):
        Part.parse(text)


def test_finish_that_was_killed_behind_its_publication_has_nothing_to_do(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peftc.export_part(target=tmp_path / "out", shards="1/1", **job)
    with monkeypatch.context() as patch:
        patch.setattr("peftc.exporters.in_parts.Gathered.remove", lambda _: None)
        made = peftc.finish(tmp_path / "out")
    assert left(tmp_path)
    assert peftc.finish(tmp_path / "out").manifest == made.manifest
    assert not left(tmp_path)
