"""Several processes by accelerate: they train as one does, and the loss of one is met."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peftc import Artifact, Lora, tune
from peftc.errors import TrainingError

from .helpers import ROOT, refuse
from .talker import sums, talker, tuning

pytestmark = pytest.mark.filterwarnings("ignore")
HOW = (
    "--steps 16 --batch-size 8 --micro-batch 2 --save-steps 2 --lr 5e-3 --no-plot --device cpu "
    "--eval-share 0.2 --eval-steps 8"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sums(tmp_path_factory.mktemp("data") / "sums.jsonl", 30)


@pytest.fixture(scope="module")
def alone(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    how = tuning(data, steps=16, micro_batch=4, eval_share=0.2, eval_steps=8, save_steps=2)
    return tune(base, how, tmp_path_factory.mktemp("alone") / "out", [Lora(rank=4)])


def launched(base: Path, data: Path, out: Path, *options: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(port), *options,
        "-m", "peftc", "tune", str(base), "--data", str(data), "-o", str(out), *HOW.split(),
        "lora", "--rank", "4",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    found = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "FSDP"))}
    return {**found, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def figures(artifact: Artifact, key: str) -> list[float]:
    text = (artifact.path / "training/metrics.jsonl").read_text()
    return [line[key] for line in map(json.loads, text.splitlines()) if key in line]


def children(parent: int) -> list[int]:
    """The processes that a process began."""
    file = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def test_two_processes_train_as_one_though_one_was_lost(
    base: Path, data: Path, alone: Artifact, tmp_path: Path
) -> None:
    call = {"cwd": ROOT, "env": environment(), "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(launched(base, data, tmp_path / "out"), **call) as agent:  # type: ignore[call-overload]
        work = tmp_path / ".out.peftc-training"
        workers = list[int]()
        while not (work / "checkpoint-2/sealed").exists() and agent.poll() is None:
            workers = workers if len(workers) == 2 else children(agent.pid)
            time.sleep(0.005)
        os.kill(workers[-1], signal.SIGKILL)
        _, err = agent.communicate(timeout=120)
    assert agent.returncode not in (0, None)
    assert "another process is gone" in err or "Signal 9" in err, err
    assert not (tmp_path / "out").exists() and (work / "checkpoint-2/sealed").exists(), err
    with subprocess.Popen(launched(base, data, tmp_path / "out"), **call) as agent:  # type: ignore[call-overload]
        _, err = agent.communicate()
    assert agent.returncode == 0, err
    after = Artifact.open(tmp_path / "out")
    assert err.count("wrote") == 1
    assert after.manifest["training"]["processes"] == 2
    assert "went on at step" in err
    for key in ("loss", "eval_loss", "tokens"):
        assert figures(after, key) == pytest.approx(figures(alone, key), abs=1e-4), key
    one, two = (load_file(a.path / "adapter/adapter_model.safetensors") for a in (alone, after))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
import peftc

dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
program = peftc.Pipeline([peftc.Lora(rank=4)]).run(peftc.capture(sys.argv[1]))
ids = torch.randint(0, 259, (4, 12), generator=torch.Generator().manual_seed(0))


def train(sharded):
    model = peftc.materialize(program).train()
    for part in [*model.model.layers, model] if sharded else []:
        fully_shard(part, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    rows = ids[dist.get_rank() :: 2] if sharded else ids
    for _ in range(4):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = StateDictOptions(full_state_dict=True)
    return get_model_state_dict(model, options=whole) if sharded else model.state_dict()


one, two = train(False), train(True)
if dist.get_rank() == 0:
    peftc.absorb(program, two)
    moved = max(float(one[name].abs().max()) for name in program.trainable if "lora_B" in name)
    error = max(float((one[name] - two[name]).abs().max()) for name in program.trainable)
    print("moved" if moved > 1e-3 else "still", error)
dist.destroy_process_group()
"""


def test_live_model_trains_alike_in_shards(base: Path, tmp_path: Path) -> None:
    """FSDP2 itself on gloo; accelerate turns it on for GPUs alone."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            str(script), str(base),
        ],
        cwd=ROOT, env=environment(), check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    moved, error = done.stdout.split()
    assert moved == "moved" and float(error) < 1e-5


def test_fsdp_that_would_not_be_is_refused(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    job = lambda out: tune(base, tuning(data), out, [Lora(rank=4)])  # noqa: E731
    refuse(tmp_path, TrainingError, job, "--use_fsdp", "--multi_gpu")
