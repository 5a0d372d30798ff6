"""Input for proofs: a graph against eager torch at shapes that its capture never saw.

Both are given the same random input: one text and several, of which some are padded on the left,
without a past and with one that the graph itself gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from peftc.calling import MASK, POSITIONS, Call, Port, Tensors
from peftc.errors import ProofError
from peftc.evaluate import single_threaded
from peftc.proof import differences

BOUND = 1e-4  # of the largest value: fp32 rounding of sums in another order, through all layers
# Texts at once, tokens before and tokens now. The capture had 2, 5 and 3.
SHAPES = [[1, 0, 9], [3, 0, 6], [3, 11, 4], [1, 13, 1]]
Run = Callable[[Tensors], Tensors]


class Graph(Protocol):
    """What a case has to know of a graph; see `peftc.whole.Whole`."""

    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> tuple[Port, ...]: ...
    @property
    def outputs(self) -> tuple[Port, ...]: ...
    @property
    def takes_past(self) -> bool: ...


@single_threaded()
def compare(
    graph: Graph,
    call: Call,
    model: nn.Module,
    run: Run,
    *,
    where: str,
    runtime: str,
    bound: float | None = BOUND,
    shapes: Sequence[Sequence[int]] = SHAPES,
) -> dict[str, Any]:
    """The largest difference of a graph from a model, and where it is.

    Args:
        graph: Its inputs and outputs.
        call: How the model is called on them.
        model: What it must equal, in fp32.
        run: Runs the graph.
        where: Its file.
        runtime: Who runs it, for errors.
        bound: On the largest difference over the largest value; None for graphs whose weights are
            quantized, of which the difference of the first output is only measured.
        shapes: Texts at once, tokens before and tokens now.

    Raises:
        ProofError: They differ by more than the bound, or the graph cannot be run.
    """
    generator = torch.Generator().manual_seed(0)
    worst: dict[str, Any] = {"relative_error": -1.0}
    for batch, past, now in shapes:
        if past and not graph.takes_past:
            continue
        case = _Case(graph, model, batch, past, now, generator)
        try:
            pairs = list(case.pairs(run, call))
        except ProofError:
            raise
        except Exception as error:  # runtimes' exceptions have no class in common
            raise ProofError(
                f"{runtime} fails at {batch} texts, {past} tokens before and {now} now: "
                f"{_line(error)}",
                where=where,
                fix="nothing was published; this is a bug of peftc, please report it",
            ) from error
        if bound is None:  # of an approximation, what it answers
            pairs = pairs[:1]
        for name, want, got in pairs:
            found: dict[str, Any] = {"at": f"{name}, {batch} texts, {past} + {now} tokens"}
            figures = {**found, **differences(want, got)}
            if not figures["relative_error"] <= (math.inf if bound is None else bound):
                raise ProofError(
                    f"{name} differs from eager torch's by {figures['relative_error']:.2e} of its "
                    f"largest value (bound {bound}) at {batch} texts, {past} tokens before and "
                    f"{now} now",
                    where=where,
                    fix="nothing was published; this is a bug of peftc, please report it",
                )
            if figures["relative_error"] >= worst["relative_error"]:
                worst = figures
    return worst


class _Case:
    """Input of one shape, and what is asked of the output."""

    def __init__(
        self,
        whole: Graph,
        model: nn.Module,
        batch: int,
        past: int,
        now: int,
        generator: torch.Generator,
    ) -> None:
        self.whole, self.model, self.past, self.now = whole, model, past, now
        self.sizes = {"batch": batch, "encoder_sequence": now + 2, "images": batch + 1}
        self.generator = generator
        left = whole.takes_past  # what generates is padded there
        self.mask = self._padded(past + now, left)
        self.encoder_mask = self._padded(now + 2, False)

    def _padded(self, length: int, left: bool) -> torch.Tensor:
        """A mask in which the second text has a pad, and the third two."""
        mask = torch.ones(self.sizes["batch"], length, dtype=torch.int64)
        for row in range(1, len(mask)):
            mask[row, :row] = 0
        return mask if left else mask.flip(1)

    def pairs(self, run: Run, call: Call) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """What torch computes and what the graph does, by output, where no padding is."""
        whole = {p.name: self._random(p) for p in self.whole.inputs if "past" not in p.dims}
        nothing = {
            p.name: torch.zeros(_shape(p, {**self.sizes, "past": 0}))
            for p in self.whole.inputs
            if "past" in p.dims
        }
        before: Tensors = {}
        if self.past:
            given = {**self._part(whole, 0, self.past), **nothing}
            before = {
                name.replace("present.", "past_key_values."): x
                for name, x in run(given).items()
                if name.startswith("present.")
            }
        got = run({**self._part(whole, self.past, None), **(before or nothing)})
        with torch.no_grad():  # all at once, and without a past
            want = call.run(self.model, {**self._part(whole, 0, None), **nothing})
        for port in self.whole.outputs:
            seen = want[port.name].float()
            if "sequence" in port.dims:  # the last: a prompt's own are before them
                seen = seen[:, -self.now :]
            elif "past + sequence" in port.dims:
                seen = seen.narrow(2, seen.shape[2] - self.past - self.now, self.past + self.now)
            keep = self._real(port, seen.shape)
            width = seen.shape[-1] if seen.dim() > 1 else 1
            want_, got_ = (x[keep].reshape(-1, width) for x in (seen, got[port.name].float()))
            yield port.name, want_, got_

    def _part(self, whole: Tensors, start: int, end: int | None) -> Tensors:
        """The input of some tokens of all."""
        part = {}
        for port in self.whole.inputs:
            if port.name not in whole:
                continue
            x = whole[port.name]
            if "past + sequence" in port.dims:
                x = x[:, :end]
            elif "sequence" in port.dims:
                x = x[:, start:end]
            part[port.name] = x
        return part

    def _random(self, port: Port) -> torch.Tensor:
        length = self.mask.shape[1]
        sizes = {**self.sizes, "sequence": length, "past + sequence": length}
        shape = _shape(port, sizes)
        if port.dtype.is_floating_point:
            return torch.randn(shape, generator=self.generator)
        if port.name == POSITIONS:
            return (self.mask.cumsum(1) - 1).clamp(min=0)
        if port.name == MASK:
            return self.mask
        if port.name == "encoder_attention_mask":
            return self.encoder_mask
        if port.name == "token_type_ids":
            return torch.zeros(shape, dtype=torch.int64)
        config: Any = self.model.config
        size = config.get_text_config().vocab_size
        return torch.randint(0, size, shape, generator=self.generator)

    def _real(self, port: Port, shape: Sequence[int]) -> torch.Tensor:
        """Where an output is of no padding."""
        axis = next((i for i, d in enumerate(port.dims) if i and isinstance(d, str)), None)
        mask = {
            "sequence": self.mask[:, self.past :],
            "past + sequence": self.mask,
            "encoder_sequence": self.encoder_mask,
        }.get(str(port.dims[axis]) if axis is not None else "")
        if mask is None or axis is None:
            return torch.ones(tuple(shape), dtype=torch.bool)
        view = [1] * len(shape)
        view[0], view[axis] = mask.shape
        return mask.bool().reshape(view).expand(tuple(shape))


def _shape(port: Port, sizes: Mapping[str, int]) -> list[int]:
    return [sizes[dim] if isinstance(dim, str) else dim for dim in port.dims]


def _line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))
