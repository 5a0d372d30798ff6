"""The linker: bytes, resumption, kills, and changes under way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc
from peftc import Lora, Merge, Pipeline, capture, export, to_safetensors
from peftc.artifact import Artifact, Staging
from peftc.errors import ArtifactError, CheckpointError, ProofError
from peftc.progress import Progress

from .conftest import MakeAdapter, MakeCheckpoint


def digests(artifact: Artifact) -> dict[str, Any]:
    return dict(artifact.manifest["files"])


def test_untouched_shards_are_byte_identical(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("llama", torch.bfloat16, shards=True)
    given = adapter(base, target_modules=["q_proj"], layers_to_transform=[0])
    export(base, tmp_path / "out", merge=True, adapters=[(str(given), 1.0)])
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    touched = index["model.layers.0.self_attn.q_proj.weight"]
    assert len(set(index.values())) > 2
    for shard in sorted(set(index.values())):
        same = (base / shard).read_bytes() == (tmp_path / "out" / shard).read_bytes()
        assert same == (shard != touched), shard


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_result_does_not_depend_on_workers_or_directory(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path, workers: int
) -> None:
    base = checkpoint("gpt2", torch.bfloat16, shards=True)
    given = [(str(adapter(base)), 1.0)]
    one = export(base, tmp_path / "one", merge=True, adapters=given, workers=1)
    other = export(base, tmp_path / "other", merge=True, adapters=given, workers=workers)
    assert digests(one) == digests(other)


def test_tensors_that_are_odd_are_carried_over(tmp_path: Path, checkpoint: MakeCheckpoint) -> None:
    base, odd = checkpoint("llama"), tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_bytes((base / "config.json").read_bytes())
    extra = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "counts": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "eight": torch.ones(3).to(torch.float8_e4m3fn),
    }
    save_file({**load_file(base / "model.safetensors"), **extra}, odd / "model.safetensors")
    program = Pipeline([Lora(rank=2), Merge()]).run(capture(odd))
    to_safetensors(program, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in extra.items():
        assert written[name].dtype == tensor.dtype and torch.equal(
            written[name].float(), tensor.float()
        )


def test_checkpoint_that_changes_under_way_is_not_published(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in checkpoint("llama").iterdir():
        (base / file.name).write_bytes(file.read_bytes())

    class Meddler(Progress):
        def stage(self, name: str, total: int = 0) -> None:
            if name == "prove":
                os.utime(base / "model.safetensors")

    given = [(str(adapter(checkpoint("llama"))), 1.0)]
    with pytest.raises(CheckpointError, match="changed while it was read"):
        export(base, tmp_path / "out", merge=True, adapters=given, progress=Meddler())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_proof_above_its_bound_publishes_nothing(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((checkpoint("llama") / "config.json").read_bytes())
    weights = load_file(checkpoint("llama") / "model.safetensors")
    big = {name: (tensor * 0 + 60000).half() for name, tensor in weights.items()}
    save_file(big, base / "model.safetensors", {"format": "pt"})
    program = Pipeline([Lora(rank=2, targets=["q_proj"])]).run(capture(base))
    model = peftc.materialize(program)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(100.0)  # 60000 + 2·100·100 does not fit into fp16
    merged = Pipeline([Merge()]).run(peftc.absorb(program, model))
    with pytest.raises(ProofError, match="differs from what it came from") as caught:
        to_safetensors(merged, tmp_path / "out", proof="sites")
    assert "overflow float16" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_second_run_is_refused_while_one_is_writing(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    given = [(str(adapter(base)), 1.0)]
    refused: list[ArtifactError] = []

    class Second(Progress):
        def stage(self, name: str, total: int = 0) -> None:
            if name == "prove":
                with pytest.raises(ArtifactError, match="another run") as caught:
                    export(base, tmp_path / "out", merge=True, adapters=given)
                refused.append(caught.value)

    export(base, tmp_path / "out", merge=True, adapters=given, progress=Second())
    assert refused and not Artifact.open(tmp_path / "out").damage()


def test_overwriting_replaces_an_artifact_whole(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base, out = checkpoint("llama"), tmp_path / "out"
    export(base, out, merge=True, adapters=[(str(adapter(base, seed=1)), 1.0)])
    first = digests(Artifact.open(out))
    (out / "stray").touch()
    export(base, out, merge=True, adapters=[(str(adapter(base, seed=2)), 1.0)], overwrite=True)
    assert digests(Artifact.open(out)) != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not (out / "stray").exists()


# Imports once, then forks: each child exports until it is killed or done.
KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from peftc import export
from peftc.artifact import Artifact
base, adapter, out = map(Path, sys.argv[1:])
staged = out.parent / f".{out.name}.peftc-staging"
import transformers; transformers.LlamaForCausalLM

def attempt(kill_after):
    child = os.fork()
    if child == 0:
        export(base, out, merge=True, adapters=[(str(adapter), 1.0)], proof="sites", workers=2)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

def sealed():
    log = staged / "done.jsonl"
    lines = []
    for text in log.read_text().splitlines() if log.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return {l["file"]: (staged / "tree" / l["file"]).stat().st_mtime_ns for l in lines[1:]
            if l["file"].startswith("model-") and (staged / "tree" / l["file"]).exists()}

assert attempt(None) == 0
shutil.rmtree(out)
start = time.monotonic()
assert attempt(None) == 0
whole = time.monotonic() - start
hashes = Artifact.open(out).manifest["files"]
rng = random.Random(0)
killed = resumed = attempts = 0
while killed < 20:
    if out.exists():
        assert not Artifact.open(out).damage()
        shutil.rmtree(out)
    before = sealed()
    status = attempt(rng.uniform(0.1, 0.9) * whole)
    attempts += 1
    killed += status != 0
    if out.exists():
        assert not Artifact.open(out).damage(), "published in part"
        assert Artifact.open(out).manifest["files"] == hashes
        now = {f.name: f.stat().st_mtime_ns for f in out.glob("model-*.safetensors")}
    else:
        now = sealed()
    assert before.items() <= now.items(), "a sealed shard was written again"
    resumed += bool(before)
if not out.exists():
    before = sealed()
    assert attempt(None) == 0
    now = {f.name: f.stat().st_mtime_ns for f in out.glob("model-*.safetensors")}
    assert before.items() <= now.items()
assert Artifact.open(out).manifest["files"] == hashes
assert not (staged / "tree").exists()
print(json.dumps({"killed": killed, "attempts": attempts, "resumed": resumed, "seconds": whole}))
"""


def test_target_is_whole_or_absent_and_a_rerun_goes_on_when_killed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    made = f"""
import torch, transformers, peft
config = transformers.LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=6,
                                  vocab_size=4000, num_attention_heads=12, num_key_value_heads=12)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(config).bfloat16()
model.save_pretrained({str(base)!r}, max_shard_size="8MB")
model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear",
                                                   init_lora_weights=False))
model.save_pretrained({str(tmp_path / "adapter")!r})
"""
    subprocess.run([sys.executable, "-c", made], check=True, capture_output=True)
    assert len(list(base.glob("*.safetensors"))) > 8
    command = [sys.executable, "-c", KILLER, str(base), str(tmp_path / "adapter"),
               str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["killed"] == 20 and report["resumed"] >= 3, report


def test_sealed_file_of_another_size_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / ".out.peftc-staging"
    path.mkdir()
    stage = Staging(path, tmp_path / "out", "key")
    stage.add("a", b"123")
    stage.add("b", b"456")
    (path / "tree" / "b").write_bytes(b"4")
    with (path / "done.jsonl").open("a") as log:
        log.write('{"file": "c", "si')  # cut off by a kill
    again = Staging(path, tmp_path / "out", "key")
    assert set(again.files) == {"a"}
    # Now `b` is being written anew, at its full size from the start, and the run is killed.
    (path / "tree" / "b").write_bytes(b"\0\0\0")
    assert set(Staging(path, tmp_path / "out", "key").files) == {"a"}
    assert Staging(path, tmp_path / "out", "other key").files == {}
    assert not (path / "tree" / "a").exists()
