"""What training a program takes in memory, found by running a step on tensors without data.

The model is built and run, forward and backward, in torch's fake tensor mode: every operator gives
tensors of the right shape and dtype, and computes nothing. What lives at each moment is counted, so
it holds for any architecture and any method, and there is no formula that could be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftc.errors import CaptureError, PeftcError, did_you_mean
from peftc.live import hollow
from peftc.program import Program
from peftc.replay import Meter, listen, peak, played, shortened
from peftc.roles import example_inputs, takes
from peftc.schedules import schedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Numbers that an optimizer of `peftc tune` keeps for each one that it trains.
STATES = {
    "adamw": 2, "adamw_fused": 2, "adafactor": 0, "sgd": 0, "rmsprop": 1, "adagrad": 1,
    "adamw_8bit": 2, "paged_adamw": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1,
}  # fmt: skip
_SMALL, _BLOCK = 4096, 256  # bitsandbytes: tensors that stay in fp32, and numbers for each absmax
_ANY_LENGTH = 10**9  # of a training, on which what a schedule keeps does not depend
_TEXT_LOSS = ("CausalLM", "LMHeadModel", "MaskedLM", "ConditionalGeneration", "TokenClassification")


@dataclass(frozen=True)
class Step:
    """How a training step is taken.

    Attributes:
        batch: Examples in it.
        length: Tokens of each.
        dtype: Of the base's weights, by its name; None for the checkpoint's own.
        precision: What autocast computes in, one of `PRECISIONS`, if anything.
        checkpointing: Whether activations are computed again in the backward pass.
        optimizer: One of `STATES`.
    """

    batch: int = 1
    length: int = 512
    dtype: str | None = None
    precision: str | None = None
    checkpointing: bool = False
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Footprint:
    """What a training step takes, in bytes.

    Attributes:
        parameters: How many numbers the base has.
        trainable: How many numbers are trained.
        weights: Of all parameters and buffers.
        gradients: Of those that are trained.
        optimizer: Its states, and what a method's schedule keeps, such as AdaLoRA's.
        activations: What the forward pass leaves for the backward pass.
        peak: The most that lives at once. It is less than the sum: gradients come while activations
            go.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


def footprint(program: Program, step: Step) -> Footprint:
    """What training a program takes in memory; no weight is read.

    Attention is that of the CPU, which like a GPU's keeps no matrix of scores. Not counted are
    what the libraries take themselves, such as a CUDA context, and what fragmentation costs.

    Raises:
        CaptureError: The model cannot be run without data.
        PeftcError: An option is wrong.
    """
    if step.optimizer not in STATES:
        raise PeftcError(
            f"there is no optimizer {step.optimizer!r}",
            where="optimizer",
            fix=did_you_mean(step.optimizer, STATES),
        )
    if program.context is not None and step.length > program.context:
        raise PeftcError(
            f"the model has {program.context} positions, and {step.length} tokens are planned",
            where="length",
            fix=f"plan for at most {program.context}",
        )
    try:
        return _measured(program, step, short=True)
    except PeftcError:
        raise
    except Exception:  # of which layers seemed alike and are not, or any model code's
        pass
    try:
        return _measured(program, step, short=False)
    except Exception as error:  # any model code may need values
        raise CaptureError(
            f"a step cannot be run on tensors without data: {error}",
            where=program.source.name or program.source.architectures[0],
            fix="train a step, and look at the memory that it takes",
        ) from error


def _measured(program: Program, step: Step, short: bool) -> Footprint:
    mode = FakeTensorMode()
    model = hollow(program, mode, DTYPES[step.dtype] if step.dtype else None)
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}.values()
    trained = [p for p in model.parameters() if p.requires_grad]
    if step.checkpointing:
        checkpoint(model)
    kind = PRECISIONS[step.precision] if step.precision else None
    mixed = torch.autocast("cpu", kind) if kind else nullcontext()
    meter = Meter()
    with mode:
        inputs = batch_of(model, step)
        for tensor in (*tensors, *inputs.values()):
            meter.watch(tensor)
        with meter:
            extra = schedule(program, model, _ANY_LENGTH)
            kept = meter.live
            stacks, standing = shortened(model) if short else ([], {})
            listen(meter, model, stacks)
            meter.mark()
            with mixed:
                loss = loss_of(model.train(), inputs)
            meter.mark()
            forward = len(meter.spans)
            added = extra.loss(model)
            torch.autograd.backward(loss if added is None else loss + added)
            meter.mark()
    states = optimizer_bytes(step.optimizer, trained)
    stored = dict.fromkeys(program.stored.values())
    gradients = sum(_bytes(p) for p in trained if standing.get(p, p).grad is not None)
    weights = sum(map(_bytes, tensors))
    most = peak(played(meter.spans, stacks))
    return Footprint(
        parameters=sum(math.prod(program.constants[fqn].spec.shape) for fqn in stored),
        trainable=sum(p.numel() for p in trained),
        weights=weights,
        gradients=gradients,
        optimizer=states + kept,
        activations=sum(span.net for span in played(meter.spans[:forward], stacks)) - kept,
        peak=weights + states + max(most, gradients + kept),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def optimizer_bytes(name: str, trained: Iterable[nn.Parameter]) -> int:
    """What an optimizer keeps for these parameters."""
    total = 0
    for p in trained:
        if name == "adafactor":  # a row and a column of a matrix, else all (arXiv:1804.04235)
            *stack, rows, columns = p.shape if p.ndim > 1 else (1, p.numel(), 0)
            total += 4 * torch.Size(stack).numel() * (rows + columns)
        elif name.endswith("_8bit") and p.numel() >= _SMALL:
            total += STATES[name] * (p.numel() + 4 * -(-p.numel() // _BLOCK))
        else:
            wide = name.endswith("_8bit")
            total += STATES[name] * (4 if wide else p.element_size()) * p.numel()
    return total


def checkpoint(model: Any) -> None:
    """Has a model compute its activations again in the backward pass.

    Raises:
        CaptureError: It cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise CaptureError(
            "has no gradient checkpointing", where=type(model).__name__, fix="plan without it"
        )
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()
    model.config.use_cache = False


def batch_of(model: nn.Module, step: Step) -> dict[str, torch.Tensor]:
    """Inputs and labels of a step; the values of texts are all the same.

    Raises:
        CaptureError: Nobody can tell what the model takes.
    """
    examples = example_inputs(model)
    if not examples:
        raise CaptureError(
            "nothing says what it takes",
            where=type(model).__name__,
            fix="plan for a model that transformers knows",
        )
    inputs = {
        name: torch.zeros(step.batch, step.length, dtype=torch.long)
        if name.endswith("input_ids")
        else x.expand(step.batch, *x.shape[1:])
        for name, x in examples.items()
    }
    if "labels" in takes(model):
        per_token = any(part in type(model).__name__ for part in _TEXT_LOSS)
        shape = (step.batch, step.length) if per_token else (step.batch,)
        inputs["labels"] = torch.zeros(shape, dtype=torch.long)
        config: Any = getattr(model, "config", None)
        if getattr(config, "decoder_start_token_id", None) is not None:
            inputs.pop("decoder_input_ids", None)  # the model makes them of the labels
    return inputs


def loss_of(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's own loss, or where it has none, the mean of what it gives."""
    output = model(**inputs)
    loss = getattr(output, "loss", None)
    if loss is None:
        first = output if isinstance(output, torch.Tensor) else output[0]
        loss = first.float().mean()
    assert isinstance(loss, torch.Tensor)
    return loss
