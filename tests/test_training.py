"""Twenty steps on a real text, the Zen of Python, lower the loss of every method beside linears."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable
from contextlib import redirect_stdout
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from peftc import (
    Bottleneck,
    Method,
    Pipeline,
    PrefixTuning,
    PromptTuning,
    PTuning,
    absorb,
    capture,
    materialize,
)

from .conftest import MakeCheckpoint, auto, logits

# Each with its learning rate, and by how much the loss falls at least.
METHODS: dict[str, tuple[Method, float, float]] = {
    "prompt": (PromptTuning(virtual_tokens=8), 3e-2, 0.02),
    "prompt from the vocabulary": (PromptTuning(virtual_tokens=8, init="vocabulary"), 3e-2, 0.02),
    "p-tuning, MLP": (PTuning(virtual_tokens=8, encoder="MLP"), 1e-2, 0.02),
    "p-tuning, LSTM": (PTuning(virtual_tokens=8, encoder="LSTM", hidden=24), 1e-2, 0.02),
    "prefix": (PrefixTuning(virtual_tokens=8), 3e-2, 0.02),
    "prefix, perceptron": (PrefixTuning(virtual_tokens=8, projection=True), 1e-2, 0.02),
    "Houlsby": (Bottleneck(preset="houlsby", reduction_factor=2), 1e-2, 0.2),
    "Pfeiffer": (Bottleneck(preset="pfeiffer", reduction_factor=2), 1e-2, 0.2),
    "parallel": (Bottleneck(preset="parallel", reduction_factor=2), 1e-2, 0.2),
}


def encoded(text: str, rows: int) -> torch.Tensor:
    """The beginning of a text by its bytes: (rows, 48) ids of a vocabulary of 97."""
    content = text.encode()[: rows * 48]
    return (torch.tensor(list(content)).clamp(32, 126) - 32).view(rows, 48)


def steps(model: Any, batches: Iterable[torch.Tensor], rate: float) -> list[float]:
    """Trains what requires gradients; returns the losses."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def reader(checkpoint: MakeCheckpoint) -> Any:
    """A tiny Llama that has read some of Python's own documentation."""
    model = auto(checkpoint("llama"))
    text = topics["compound"] + topics["objects"]
    steps(model, encoded(text, 40 * 16).view(40, 16, 48), 1e-2)
    return model.eval()


@pytest.mark.parametrize("name", METHODS)
def test_loss_falls_on_a_real_text(name: str, reader: Any) -> None:
    method, rate, fall = METHODS[name]
    program = Pipeline([method]).run(capture(reader))
    model: Any = materialize(program)
    model.gradient_checkpointing_enable()  # with which PEFT's prefixes do not work
    assert {n for n, p in model.named_parameters() if p.requires_grad} == program.trainable
    with redirect_stdout(io.StringIO()):
        import this
    zen = encoded(codecs.decode(this.s, "rot13"), 16)
    losses = steps(model, [zen] * 20, rate)
    assert max(losses[-5:]) < losses[0] - fall
    assert torch.equal(logits(materialize(absorb(program, model))), logits(model.eval()))
