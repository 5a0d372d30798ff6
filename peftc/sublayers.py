"""Sublayers: where a model's forward pass adds what a block of layers makes to the stream it took.

A transformer's attention and its feed-forward each take a stream r of hidden states and give h; the
model goes on with r + h, or with the layer normalization of that sum (post-norm). While the model
runs on tensors without data (see `peftc.roles`), it is seen which modules take and give which
tensor, and which are summed; no name of an architecture is looked at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

Role = Literal["attention", "feed_forward"]


class Sublayer(BaseModel):
    """One place where the model adds h to its stream r.

    Attributes:
        role: What makes h.
        exit: The outermost module that gives h: its output, or the first of several.
        entry: A module whose first input is r, and that runs before the exit does.
        norm: The layer normalization that the model goes on with, where it is of r + h alone.
        eps: Of that normalization.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    exit: str
    entry: str
    norm: str | None = None
    eps: float = 0.0


@dataclass
class _Sum:
    role: Role
    givers: list[str]  # of h, from the inside out
    takers: list[str]  # of r, in the order of their calls
    norm: tuple[str, float] | None = None
    goes_on: bool = False  # the sum itself is the stream of what follows


class Streams:
    """Hears of a model's calls and sums, in their order."""

    def __init__(self) -> None:
        self.features: dict[str, tuple[int, int]] = {}
        self._calls: Counter[str] = Counter()
        self._widths: dict[str, int] = {}
        self._takers: MutableMapping[torch.Tensor, list[str]] = WeakTensorKeyDictionary()
        self._givers: MutableMapping[torch.Tensor, list[str]] = WeakTensorKeyDictionary()
        self._given: MutableMapping[torch.Tensor, int] = WeakTensorKeyDictionary()
        self._of: MutableMapping[torch.Tensor, _Sum] = WeakTensorKeyDictionary()
        self._sums: list[_Sum] = []

    def enter(self, name: str, module: nn.Module, x: torch.Tensor, linear: bool) -> None:
        """A module is called; x is its first tensor."""
        self._calls[name] += 1
        self._widths[name] = x.shape[-1] if x.ndim and x.is_floating_point() else 0
        if not linear:  # which may be a site of its own
            self._takers[x] = [*self._takers.get(x, []), name]
        if type(module) is nn.LayerNorm and module.elementwise_affine and x in self._of:
            self._of[x].norm = name, module.eps

    def leave(self, name: str, y: torch.Tensor) -> None:
        """A module returns; y is its first tensor."""
        self._givers[y] = [*self._givers.get(y, []), name]
        self._given[y] = self._calls.total()
        if y.ndim and name in self._widths:
            self.features[name] = self._widths[name], y.shape[-1]

    def add(
        self, operands: Sequence[torch.Tensor], out: torch.Tensor, roles: Sequence[Role | None]
    ) -> None:
        """Two tensors are summed; `roles` say what makes each of them, where that is known."""
        if len(operands) != 2 or operands[0].shape != operands[1].shape:
            return
        if operands[0].ndim > 3:  # of a picture nothing tells which dimension has the features
            return
        for tensor in operands:
            if tensor in self._of:
                self._of[tensor].goes_on = True
        last = int(self._given.get(operands[0], 0) < self._given.get(operands[1], 0))
        role, stream = roles[last], operands[1 - last]
        givers, passing = self._givers.get(operands[last], []), self._givers.get(stream, [])
        takers = [name for name in self._takers.get(stream, []) if name not in passing]
        if role is not None and givers and takers:
            self._of[out] = _Sum(role, givers, takers)
            self._sums.append(self._of[out])

    def sublayers(self) -> list[Sublayer]:
        """All that were found, in the order in which they run."""
        found = (self._sublayer(s) for s in self._sums)
        return [sublayer for sublayer in found if sublayer]

    def _sublayer(self, found: _Sum) -> Sublayer | None:
        # A module that runs twice, as one dropout for two sublayers, is no place of its own.
        leaves = next((n for n in reversed(found.givers) if self._calls[n] == 1), None)
        if leaves is None:
            return None
        near = [n for n in found.takers if _block(n) == _block(leaves) and self._calls[n] == 1]
        inner = [n for n in near if not leaves.startswith(f"{n}.")]
        if not near:
            return None
        norm, eps = found.norm or (None, 0.0)
        if norm is None or found.goes_on or _block(norm) != _block(leaves):
            norm, eps = None, 0.0
        entry = (inner or near)[-1]
        return Sublayer(role=found.role, exit=leaves, entry=entry, norm=norm, eps=eps)


def _block(name: str) -> str:
    """The layer that a module belongs to: its name up to the last number in it."""
    found = re.match(r"(?:.*\.)?\d+(?=\.|$)", name)
    return found[0] if found else ""
