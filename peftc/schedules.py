"""What methods have a training loop do. Most have it do nothing; AdaLoRA prunes ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from peftc.program import Program, Schedule


class Schedules:
    """The schedules of all adapters of a program, as one.

    Attributes:
        by_adapter: Those there are, by the names of their adapters.
    """

    def __init__(self, by_adapter: Mapping[str, Schedule]) -> None:
        self.by_adapter = dict(by_adapter)

    def loss(self, model: nn.Module) -> torch.Tensor | None:
        """What is added to the training loss, once an optimizer step."""
        losses = (schedule.loss(model) for schedule in self.by_adapter.values())
        found = [loss for loss in losses if loss is not None]
        return torch.stack(found).sum() if found else None

    def step(self, model: nn.Module, number: int) -> None:
        """What follows an optimizer step, before its gradients are cleared; the first is 1."""
        for schedule in self.by_adapter.values():
            schedule.step(model, number)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a run that goes on later needs."""
        return {
            f"{name}/{key}": tensor
            for name, schedule in self.by_adapter.items()
            for key, tensor in schedule.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up what `state_dict` gave."""
        for name, schedule in self.by_adapter.items():
            own = f"{name}/"
            schedule.load_state_dict(
                {key.removeprefix(own): t for key, t in state.items() if key.startswith(own)}
            )


def schedule(program: Program, model: nn.Module, total_steps: int) -> Schedules:
    """What the methods of a program's adapters have a training loop do.

    In a loop: add `loss(model)` to the loss, unless it is None; and after each step of the
    optimizer, before its gradients are cleared, call `step(model, number)` with 1 for the first.

    Args:
        program: What the model was materialized from.
        model: The live model, on the device that it trains on.
        total_steps: How many steps the optimizer will take.

    Raises:
        PassError: A method's options do not go with so many steps.
    """
    found = {
        name: adapter.method.schedule(program, model, total_steps)
        for name, adapter in program.adapters.items()
        if adapter.method is not None
    }
    return Schedules({name: one for name, one in found.items() if one is not None})
