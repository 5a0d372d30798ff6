"""AdaLoRA's budget: which ranks count, and how many may be left (arXiv:2303.10512, §3.1 to §3.3).

Whoever trains calls `RankSchedule.loss` and `RankSchedule.step`, and the rest goes by itself. The
numbers are those of the authors' code and of PEFT, whose regularizer is a mean of norms where eq. 4
has a sum of their squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError, PassError

if TYPE_CHECKING:
    from peftc.passes.adalora import AdaLora

_PARTS = ("lora_A", "lora_B", "lora_E")  # (rank, in), (out, rank), (rank, 1)


@dataclass(frozen=True)
class Budget:
    """How many ranks all sites together may have (eq. 12).

    Attributes:
        start: At the start.
        target: At the end.
        first: The last step at which all may stay.
        last: The step from which on they are as at the end.
        every: How many steps lie between two prunings before that.
    """

    start: int
    target: int
    first: int
    last: int
    every: int = 1

    def at(self, step: int) -> int:
        """The budget after an optimizer step, of which the first is 1."""
        if step <= self.first:
            return self.start
        left = max(0.0, 1 - (step - self.first) / (self.last - self.first))
        return int((self.start - self.target) * left**3 + self.target)

    def prunes(self, step: int) -> bool:
        """Whether ranks are chosen after this step."""
        return step == self.last or (self.first < step < self.last and step % self.every == 0)


class RankSchedule:
    """Measures what ranks do for the loss, and prunes those that do least.

    Of each number w of a triplet (a row of A, a column of B, and their value in E) the sensitivity
    |w·∂L/∂w| (eq. 8) is smoothed over steps (eq. 9), and so is how much it varies (eq. 10). Of
    their product (eq. 11) the mean over each vector, summed over a triplet, is a rank's importance
    (eq. 7).

    Attributes:
        budget: How many ranks may be left.
        sites: The names of the sites, in the order of the model.
        kept: For each site, which of its ranks the last pruning left; None before the first.
        history: How many ranks were left after each pruning, by its step.
    """

    def __init__(
        self, method: AdaLora, model: nn.Module, sites: Sequence[str], budget: Budget
    ) -> None:
        self.method, self.sites, self.budget = method, list(sites), budget
        if any(
            "_fsdp_" in name or hasattr(p, "placements") for name, p in model.named_parameters()
        ):
            raise PassError(
                "the model's parameters are sharded, and a rank's importance needs all of its own",
                where=f"adapter {method.adapter}",
                fix="train with data parallelism alone, or use lora and prune_ranks afterwards",
            )
        known = {
            name.removeprefix("module.").replace("_orig_mod.", ""): parameter
            for name, parameter in model.named_parameters()
        }
        names = [f"{fqn}.{part}.{method.adapter}" for part in _PARTS for fqn in self.sites]
        if lost := [name for name in names if name not in known]:
            raise PassError(
                f"the model lacks {len(lost)} tensors of the adapter, such as {lost[0]}",
                where=f"adapter {method.adapter}",
                fix="pass the model that this program was materialized to",
            )
        self._names = names
        self._parameters: list[Tensor] = [known[name] for name in names]
        self._smooth = [torch.zeros_like(p) for p in self._parameters]  # of the sensitivity
        self._varies = [torch.zeros_like(p) for p in self._parameters]
        self.kept: list[Tensor] | None = None
        self.history: dict[int, int] = {}

    @property
    def ranks(self) -> dict[str, int]:
        """How many ranks each site has left."""
        kept = self.kept or [torch.ones_like(e, dtype=torch.bool) for e in self._of("lora_E")]
        return {fqn: int(mask.sum()) for fqn, mask in zip(self.sites, kept, strict=True)}

    def loss(self, model: nn.Module) -> Tensor | None:
        """The weight times the mean over all A and B of ‖A·Aᵀ − I‖_F and ‖Bᵀ·B − I‖_F."""
        weight = self.method.orth_reg_weight
        if weight == 0:
            return None
        matrices = [*self._of("lora_A"), *(b.t() for b in self._of("lora_B"))]
        alike: dict[torch.Size, list[Tensor]] = {}  # few large products in the place of many small
        for matrix in matrices:
            alike.setdefault(matrix.shape, []).append(matrix)
        norms = []
        with torch.autocast(matrices[0].device.type, enabled=False):
            for shape, group in alike.items():
                stack = torch.stack(group)
                off = stack @ stack.mT - torch.eye(shape[0], device=stack.device)
                norms.append(torch.linalg.matrix_norm(off))
        return torch.cat(norms).mean() * weight

    @torch.no_grad()
    def step(self, model: nn.Module, number: int) -> None:
        """Takes the gradients in, and prunes where the budget says so.

        Args:
            model: As for `loss`.
            number: The optimizer step that was just taken; the first is 1.

        Raises:
            PassError: The gradients are cleared already, or ranks should have been chosen before.
        """
        if number < self.budget.last:
            self._listen(number)
        if self.budget.prunes(number):
            self._choose(number)
        elif number > self.budget.last and self.kept is None:
            raise PassError(
                f"ranks were to be chosen at step {self.budget.last}, and the first step seen is "
                f"{number}",
                where=f"adapter {self.method.adapter}",
                fix="call step from the first optimizer step on, or load the state of the run that "
                "this one goes on with",
            )
        elif number < self.budget.last:
            return  # between two prunings the optimizer may wake a rank
        assert self.kept is not None
        for e, kept in zip(self._of("lora_E"), self.kept, strict=True):
            e.masked_fill_(~kept, 0.0)

    def _of(self, part: str) -> list[Tensor]:
        at = _PARTS.index(part) * len(self.sites)
        return self._parameters[at : at + len(self.sites)]

    def _listen(self, number: int) -> None:
        """Eq. 8 to 10, for all tensors at once."""
        given = [p.grad for p in self._parameters]
        if all(gradient is None for gradient in given):
            raise PassError(
                f"there are no gradients at step {number}",
                where=f"adapter {self.method.adapter}",
                fix="call step after the optimizer's step, before its gradients are cleared",
            )
        pairs = zip(given, self._parameters, strict=True)
        # A site that no token reached, such as an expert, has none.
        gradients = [torch.zeros_like(p) if g is None else g for g, p in pairs]
        sizes = torch._foreach_norm(gradients)
        if not torch.stack(sizes).isfinite().all():
            return  # they overflowed, and the gradient scaler skipped the step
        sensitivity = torch._foreach_mul(self._parameters, gradients)
        torch._foreach_abs_(sensitivity)
        torch._foreach_mul_(self._smooth, self.method.beta1)
        torch._foreach_add_(self._smooth, sensitivity, alpha=1 - self.method.beta1)
        torch._foreach_sub_(sensitivity, self._smooth)
        torch._foreach_abs_(sensitivity)
        torch._foreach_mul_(self._varies, self.method.beta2)
        torch._foreach_add_(self._varies, sensitivity, alpha=1 - self.method.beta2)

    def importance(self) -> list[Tensor]:
        """Of each site's ranks, shape (rank,) (eq. 7)."""
        scores = torch._foreach_mul(self._smooth, self._varies)
        count = len(self.sites)
        return [
            e.view(-1) + (a.mean(1) + b.mean(0))
            for a, b, e in zip(
                *(scores[i * count : (i + 1) * count] for i in range(3)), strict=True
            )
        ]

    def _choose(self, number: int) -> None:
        """Keeps as many ranks as the budget has, by importance (eq. 6)."""
        scores = self.importance()
        keep = self.budget.at(number)
        ranked = torch.cat(scores).argsort(descending=True, stable=True)
        mask = torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
        mask[ranked[:keep]] = True
        parts = torch.split(mask, [len(score) for score in scores])
        self.kept = [part.view(-1, 1) for part in parts]
        self.history[number] = keep

    def state_dict(self) -> dict[str, Tensor]:
        """Sensitivities, their variations and the ranks kept, by the tensors' names."""
        state = {
            f"{name}.sensitivity": t for name, t in zip(self._names, self._smooth, strict=True)
        }
        state |= {f"{name}.variation": t for name, t in zip(self._names, self._varies, strict=True)}
        if self.kept is not None:
            state |= {f"{fqn}.kept": t for fqn, t in zip(self.sites, self.kept, strict=True)}
        steps = [[step, count] for step, count in self.history.items()]
        state["history"] = torch.tensor(steps, dtype=torch.int64).reshape(-1, 2)
        return {name: tensor.clone() for name, tensor in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state_dict` gave.

        Raises:
            AdapterError: It is not the state of this adapter on this model.
        """
        mine = self.state_dict()
        chosen = {f"{fqn}.kept" for fqn in self.sites}
        fit = mine.keys() - chosen == state.keys() - chosen and all(
            state[name].shape == mine[name].shape for name in mine.keys() - chosen - {"history"}
        )
        if not fit or (chosen & state.keys()) not in (set(), chosen):
            raise AdapterError(
                "is not the state of this adapter's budget",
                where=f"adapter {self.method.adapter}",
                fix="take that of the same run, model and options",
            )
        for suffix, tensors in (("sensitivity", self._smooth), ("variation", self._varies)):
            for name, tensor in zip(self._names, tensors, strict=True):
                tensor.copy_(state[f"{name}.{suffix}"])
        device = self._parameters[0].device
        if chosen & state.keys():
            self.kept = [state[f"{fqn}.kept"].to(device) for fqn in self.sites]
        self.history = {int(step): int(count) for step, count in state["history"].tolist()}
