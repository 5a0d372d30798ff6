"""SmolLM2 with a LoRA merged, as ONNX: its numbers, its texts, and the memory that it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoTokenizer

from peftc.demo_model import demo_checkpoint

from .conftest import auto
from .test_onnx import Runner, compare, generated

TEXT = "The three laws of thermodynamics say that"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, folder = demo_checkpoint("bfloat16"), tmp_path_factory.mktemp("smollm2")
    model = auto(base)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    wrapped.save_pretrained(folder / "adapter")
    command = [
        sys.executable, "-m", "peftc", "export", str(base), "-o", str(folder / "out"), "--merge",
        "--adapter", str(folder / "adapter"), "--format", "onnx", "--proof", "sites", "-q",
    ]  # fmt: skip
    # By a small process between: a child of this one is as large as this one until it is exec'd.
    measured = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", measured, *command], check=True, stdout=subprocess.PIPE, text=True
    )
    peak = int(done.stdout.splitlines()[-1])
    # 269 MB of weights go through; without them the libraries alone take 0.45 GB.
    assert peak < 0.65e6
    return folder / "out"


def test_logits_equal_torch_s(exported: Path) -> None:
    model = auto(exported, torch.float32)
    for batch, past in ((1, 0), (3, 77)):
        compare(exported, model, batch, past, 1e-5)


def test_greedy_text_is_transformers_own_for_64_tokens(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    model = auto(exported, torch.float32)
    want = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert Runner(exported).greedy(ids, 64).tolist() == want.tolist()
    assert generated(exported, ids[0].tolist(), 64) == want[0].tolist()


def test_layers_were_captured_twice_and_cloned(exported: Path) -> None:
    graphs = json.loads((exported / "peftc.json").read_text())["onnx"]["graphs"]
    assert graphs["model.onnx"]["layers"] == {"model.layers": {"captured": 2, "of": 30}}
