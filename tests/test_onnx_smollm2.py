"""SmolLM2 with a LoRA merged, as ONNX: its numbers, its texts, and the memory that it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoTokenizer

import peftc
from peftc.demo_model import demo_checkpoint

from .conftest import auto
from .test_onnx import Runner, compare, switch

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


def test_layers_were_captured_twice_and_cloned(exported: Path) -> None:
    graphs = json.loads((exported / "peftc.json").read_text())["onnx"]["graphs"]
    assert graphs["model.onnx"]["layers"] == {"model.layers": {"captured": 2, "of": 30}}


def test_loras_of_ranks_4_8_and_16_swap_on_one_session(tmp_path: Path) -> None:
    base, ranks = demo_checkpoint("bfloat16"), (4, 8, 16)
    wrapped: Any = None
    for rank in ranks:
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        if wrapped is None:
            wrapped = peft.get_peft_model(auto(base, torch.float32), config, f"r{rank}")
        else:
            wrapped.add_adapter(f"r{rank}", config)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    wrapped.save_pretrained(tmp_path / "adapters")
    peftc.export(base, tmp_path / "onnx", format="onnx", swap=True, proof="sites")
    run = Runner(tmp_path / "onnx")
    for rank in ranks:
        folder, out = tmp_path / f"adapters/r{rank}", tmp_path / f"r{rank}"
        peftc.export(tmp_path / "onnx", out, format="onnx-adapter", adapters=[(str(folder), 1.0)])
        wrapped.merge_adapter([f"r{rank}"])
        switch(run, out / "adapter.onnx_adapter")
        compare(run, wrapped.eval(), 3, 20, 1e-5)
        wrapped.unmerge_adapter()
    switch(run)
    with wrapped.disable_adapter():
        compare(run, wrapped, 1, 0, 1e-5)
