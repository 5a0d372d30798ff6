"""The proof of ONNX graphs: what onnxruntime computes against what eager torch does, in fp32.

Both are given the same random input at shapes that the capture never saw: one text and three, of
which some are padded on the left, without a past and with one that the graph itself gave.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peftc.calling import MASK, POSITIONS, Call, Port, Tensors, calls
from peftc.errors import ProofError
from peftc.exporters.onnx_needs import onnxruntime
from peftc.proof import differences
from peftc.whole import Whole

# Of the largest value: rounding, of sums in another order too, through all layers. A CPU has no
# kernels for bf16.
BOUNDS = {torch.float32: 1e-4, torch.float16: 3e-2}
BOUND = BOUNDS[torch.float32]
# Texts at once, tokens before and tokens now. The capture had 2, 5 and 3.
SHAPES = [[1, 0, 9], [3, 0, 6], [3, 11, 4], [1, 13, 1]]
TOKENWISE = [3, 7, 1]  # for those that go on only so
Arrays = dict[str, np.ndarray[Any, Any]]


def prove(
    path: Path,
    wholes: Sequence[Whole],
    model: nn.Module,
    bound: float | None = BOUND,
    adapters: Mapping[str, Path] | None = None,
    shared: bool = False,
) -> dict[str, Any]:
    """Compares the graphs of a directory with a model in eager torch.

    Args:
        path: The directory.
        wholes: What its graphs were lowered from.
        model: What they must equal, in fp32 whatever they compute in.
        bound: On the largest difference over the largest value; None for graphs whose weights are
            quantized, of which the difference is only measured.
        adapters: The file of the adapter that is in each graph's slots, by the graph's file.
        shared: Their cache is the runtime's, so that several texts go on only token by token.

    Raises:
        ProofError: They differ by more than the bound, or onnxruntime fails.
    """
    figures = {}
    shapes = [[b, p, n] for b, p, n in SHAPES if not (shared and b > 1 and p)]
    shapes += [TOKENWISE] if shared else []
    for call in calls(model):
        whole = next(whole for whole in wholes if whole.name == call.name)
        file = path / f"{whole.name}.onnx"
        graph = session(file)
        if adapter := (adapters or {}).get(file.name):
            graph = Adapted(graph, adapter)
        figures[file.name] = _compare(graph, file.name, whole, call, model, bound, shapes)
        gc.collect()
    return {"bound": bound, "input": "random, seed 0", "shapes": shapes, **figures}


def session(path: Path, threads: int = 0) -> Any:
    """A session of onnxruntime on the CPU; threads 0 are as many as there are cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no class in common
        raise ProofError(
            f"onnxruntime {onnxruntime.__version__} cannot load it: {_line(error)}",
            where=str(path),
            fix="it takes opset 23 from version 1.23 on",
        ) from error


class Adapted:
    """A session with an adapter in its slots at every run.

    Args:
        graph: The session.
        file: An `.onnx_adapter` file.
    """

    def __init__(self, graph: Any, file: Path) -> None:
        self.graph, self.options = graph, onnxruntime.RunOptions()
        self.adapter = onnxruntime.LoraAdapter()  # which the options refer to
        self.adapter.Load(str(file))
        self.options.add_active_adapter(self.adapter)

    def run(self, outputs: Sequence[str], given: Mapping[str, Any]) -> Any:
        """As the session's own."""
        return self.graph.run(outputs, given, self.options)


def _compare(
    graph: Any,
    file: str,
    whole: Whole,
    call: Call,
    model: nn.Module,
    bound: float | None,
    shapes: Sequence[Sequence[int]],
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    worst: dict[str, Any] = {"relative_error": -1.0}
    for batch, past, now in shapes:
        if past and not whole.takes_past:
            continue
        case = _Case(whole, model, batch, past, now, generator)
        try:
            pairs = list(case.pairs(graph, call))
        except ProofError:
            raise
        except Exception as error:  # as above
            raise ProofError(
                f"onnxruntime fails at {batch} texts, {past} tokens before and {now} now: "
                f"{_line(error)}",
                where=file,
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
                    where=file,
                    fix="nothing was published; this is a bug of peftc, please report it",
                )
            if figures["relative_error"] >= worst["relative_error"]:
                worst = figures
    return worst


class _Case:
    """Input of one shape, and what is asked of the output."""

    def __init__(
        self,
        whole: Whole,
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

    def pairs(self, graph: Any, call: Call) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
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
                for name, x in self._run(graph, given).items()
                if name.startswith("present.")
            }
        got = self._run(graph, {**self._part(whole, self.past, None), **(before or nothing)})
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

    def _run(self, graph: Any, given: Mapping[str, torch.Tensor]) -> Tensors:
        names = [port.name for port in self.whole.outputs]
        types = {port.name: port.dtype for port in self.whole.inputs}
        arrays = {name: x.to(types[name]).numpy() for name, x in given.items()}
        outputs = graph.run(names, arrays)
        return {name: torch.from_numpy(x) for name, x in zip(names, outputs, strict=True)}

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
