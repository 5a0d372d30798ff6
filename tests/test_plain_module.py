"""A plain torch module, with no config and no checkpoint, from capture to a written merge."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftc
from peftc import Attach, Lora, Merge, Pipeline, Program
from peftc.errors import TiedWeightError
from tests.conftest import distance

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Nested, with layers with and without bias, and perhaps two that share their weight."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(16, 12, bias=False), nn.Dropout(0.5))
        first = nn.Linear(12, 16)
        self.body = nn.Sequential(first, nn.GELU(), inner)
        self.twin, self.head = nn.Linear(12, 16), nn.Linear(16, 5)
        if tie:
            self.twin.weight = first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.twin(self.body(x)))
        return y


def net(tie: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(tie)


X = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))


def train(program: Program) -> tuple[Program, torch.Tensor]:
    """The program after a few steps, and what its live model computes then."""
    live = peftc.materialize(program)
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        live(X).square().mean().backward()
        optimizer.step()
    return peftc.absorb(program, live), live(X).detach()


def test_module_is_materialized_in_eval_mode_and_left_in_its_own() -> None:
    source = net().train()
    live = peftc.materialize(Pipeline([Lora(rank=2)]).run(peftc.capture(source)))
    assert not any(module.training for module in live.modules())
    assert all(module.training for module in source.modules())


@pytest.mark.parametrize("tie", [False, True])
def test_module_is_injected_trained_merged_and_written(tmp_path: Path, tie: bool) -> None:
    source = net(tie).eval()
    start = copy.deepcopy(source.state_dict())
    lora = Lora(rank=3, alpha=6, targets=["body.2.0", "head"] if tie else "all-linear")
    program = Pipeline([lora]).run(peftc.capture(source))
    assert torch.equal(peftc.materialize(program)(X), source(X))
    program, want = train(program)
    assert distance(want, source(X).detach()) > 1e-2
    written = load_file(
        peftc.to_safetensors(Pipeline([Merge()]).run(program), tmp_path / "out").path
        / "model.safetensors"
    )
    again = net(tie).eval()
    again.load_state_dict(written, strict=not tie)
    assert written.keys() == start.keys() - ({"twin.weight"} if tie else set())
    assert distance(again(X).detach(), want) <= 1e-6
    for key, tensor in source.state_dict().items():  # what was captured is as it was
        assert torch.equal(tensor, start[key])


@pytest.mark.parametrize("targets", [["body.0"], ["twin"], ["body.0", "twin"]], ids=str)
def test_merge_is_refused_when_tied_layers_would_come_apart(targets: list[str]) -> None:
    program, _ = train(Pipeline([Lora(rank=3, targets=targets)]).run(peftc.capture(net(tie=True))))
    with pytest.raises(TiedWeightError, match="tied"):
        Pipeline([Merge()]).run(program)


def test_module_takes_the_adapter_that_peft_trained(tmp_path: Path) -> None:
    source = net().eval()
    config = peft.LoraConfig(r=3, target_modules=["body.0", "head"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(source), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    attach = Attach(path=str(tmp_path / "theirs"))
    program = Pipeline([attach]).run(peftc.capture(source))
    assert torch.equal(peftc.materialize(program)(X), theirs(X))
    ours = peftc.to_peft(program, tmp_path / "ours").path
    again = peft.PeftModel.from_pretrained(copy.deepcopy(source), ours).eval()
    assert torch.equal(again(X), theirs(X))
