"""The one callback by which transformers' Trainer does what methods have a training loop do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from peftc.errors import CheckpointError
from peftc.program import Program
from peftc.reading import tensors
from peftc.schedules import Schedules, schedule

STATE = "peftc_schedule.safetensors"  # in a checkpoint's folder


class ScheduleCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Has transformers' Trainer do what a program's methods ask for; see `callback`.

    Attributes:
        schedules: What is done; None before the training begins.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.schedules: Schedules | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Takes the training's length from the Trainer, and goes on where a resumed run was."""
        self.schedules = schedule(self.program, model, state.max_steps)
        if state.global_step and self.schedules.by_adapter:
            self.schedules.load_state_dict(_read(_folder(args, state) / STATE))

    def on_step_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Puts the gradients of what is added to the loss before those of the batches.

        They depend on no batch: so they are had once a step, whatever the accumulation, and are
        clipped with the others.
        """
        assert self.schedules is not None
        if (loss := self.schedules.loss(model)) is not None:
            scaler = getattr(optimizer, "scaler", None)  # of fp16, by which the others are scaled
            (loss if scaler is None else scaler.scale(loss)).backward()

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """The gradients are still there."""
        assert self.schedules is not None
        self.schedules.step(model, state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keeps what a resumed run needs in the Trainer's checkpoint."""
        assert self.schedules is not None
        if self.schedules.by_adapter and state.is_world_process_zero:
            save_file(self.schedules.state_dict(), _folder(args, state) / STATE)


def callback(program: Program) -> ScheduleCallback:
    """The one callback that transformers' Trainer needs for AdaLoRA; for others it does nothing.

    Args:
        program: What the Trainer's model was materialized from.
    """
    return ScheduleCallback(program)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return tensors(file)
    except CheckpointError as error:
        raise CheckpointError(
            f"the state of the adapters' schedule cannot be read: it {error.what}",
            where=str(file),
            fix="resume from a checkpoint that was written with peftc.callback, in its folder",
        ) from error
