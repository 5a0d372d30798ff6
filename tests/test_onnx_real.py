"""SmolLM2 and MiniLM in ONNX: plain, with a prompt or a prefix, in NF4 and in int4, run unedited.

The reference is eager torch in fp64: in fp32 its own rounding is as large as the bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import peftc
from peftc import Nf4, Pass, Pipeline, Program, PromptTuning, capture, materialize
from peftc.demo_model import demo_checkpoint
from peftc.evaluate import Evaluation
from peftc.exporters.onnx_proof import session

from .test_onnx import Runner, generated

TEXT = "The three laws of thermodynamics say that"
TOKENS = {"nf4": 16}  # which onnxruntime multiplies slowly on a CPU; of others 64
PASSES: dict[str, Pass | None] = {
    "base": None,
    "prompt": PromptTuning(virtual_tokens=12, init="vocabulary"),
    "nf4": Nf4(),
}


@dataclass(frozen=True)
class Case:
    """A program of SmolLM2, and what it is in ONNX."""

    name: str
    path: Path
    program: Program


@pytest.fixture(scope="module", params=PASSES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    chosen = PASSES[request.param]
    program = capture(demo_checkpoint("bfloat16"))
    program = Pipeline([chosen] if chosen else []).run(program)
    path = tmp_path_factory.mktemp(request.param) / "out"
    return Case(request.param, peftc.to_onnx(program, path, proof="sites").path, program)


def test_greedy_text_is_torch_s_own_in_both_runtimes(case: Case) -> None:
    ids = AutoTokenizer.from_pretrained(case.path)(TEXT, return_tensors="pt")["input_ids"]
    count = TOKENS.get(case.name, 64)
    live: Any = materialize(case.program, dtype=torch.float32)
    want = live.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    assert Runner(case.path).greedy(ids, count).tolist() == want.tolist()
    assert generated(case.path, ids[0].tolist(), count) == want[0].tolist()


def test_logits_are_within_1e_4_of_torch_in_fp64(case: Case) -> None:
    model: Any = exact(case.program)
    onnx.checker.check_model(str(case.path / "model.onnx"), full_check=True)
    for batch, past in ((1, 0), (3, 77)):
        assert largest_error(Runner(case.path), model, batch, past) <= 1e-4


def exact(program: Program) -> Any:
    """A program's model in fp64, weights in 4 bits as what their codes stand for, unrounded."""
    if not program.packed:
        return materialize(program, dtype=torch.float64)
    model = materialize(capture(demo_checkpoint("bfloat16")), dtype=torch.float64)
    for fqn, packed in program.packed.items():
        weight = Evaluation(packed.graph, packed.inputs).whole()
        model.get_parameter(f"{fqn}.weight").data.copy_(weight)
    return model


def largest_error(run: Runner, model: Any, batch: int, past: int) -> float:
    """The largest absolute difference of logits of left-padded texts."""
    now, generator = 5, torch.Generator().manual_seed(8)
    ids = torch.randint(3, model.config.vocab_size, (batch, past + now), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, :row] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -now:]
    cache = run.empty(batch)
    if past:
        _, cache = run(ids[:, :past], mask[:, :past], cache)
    got, _ = run(ids[:, past:], mask, cache)
    return float((got - want)[mask[:, past:].bool()].abs().max())


def test_int4_is_the_same_in_both_runtimes(tmp_path: Path) -> None:
    program = capture(demo_checkpoint("bfloat16"))
    path = peftc.to_onnx(program, tmp_path / "out", weights="int4", proof="sites").path
    ids = AutoTokenizer.from_pretrained(path)(TEXT, return_tensors="pt")["input_ids"]
    want = Runner(path).greedy(ids, 64)
    assert generated(path, ids[0].tolist(), 64) == want[0].tolist()


def test_minilm_embeds_as_torch_does(tmp_path: Path) -> None:
    from .onnx_families import minilm

    artifact = peftc.export(minilm(), tmp_path / "out", format="onnx", proof="whole")
    assert artifact.manifest["proof"]["onnx"]["model.onnx"]["relative_error"] <= 1e-5
    texts = ["A short one.", "And one with several more words in it, so that the other is padded."]
    given = AutoTokenizer.from_pretrained(minilm())(texts, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(minilm(), dtype=torch.float64).eval()
    with torch.no_grad():
        want = model(**given).last_hidden_state
    graph = session(artifact.path / "model.onnx")
    (got,) = graph.run(["last_hidden_state"], {name: x.numpy() for name, x in given.items()})
    real = given["attention_mask"].bool()
    assert (torch.from_numpy(got) - want)[real].abs().max() <= 1e-4
