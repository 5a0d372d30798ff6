"""The proof of ONNX graphs: what onnxruntime computes against what eager torch does, in fp32."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc.calling import Tensors, calls
from peftc.errors import ProofError
from peftc.exporters.cases import BOUND, SHAPES, Run, compare
from peftc.exporters.onnx_needs import onnxruntime
from peftc.whole import Whole

# A CPU has no kernels for bf16.
BOUNDS = {torch.float32: BOUND, torch.float16: 3e-2}
TOKENWISE = [3, 7, 1]  # texts that go on only token by token


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
        graph = session(file, threads=1)
        if adapter := (adapters or {}).get(file.name):
            graph = Adapted(graph, adapter)
        figures[file.name] = compare(
            whole, call, model, _runner(graph, whole), where=file.name, runtime="onnxruntime",
            bound=bound, shapes=shapes,
        )  # fmt: skip
        del graph
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


def _runner(graph: Any, whole: Whole) -> Run:
    names = [port.name for port in whole.outputs]
    types = {port.name: port.dtype for port in whole.inputs}

    def run(given: Tensors) -> Tensors:
        outputs = graph.run(names, {name: x.to(types[name]).numpy() for name, x in given.items()})
        return {name: torch.from_numpy(x) for name, x in zip(names, outputs, strict=True)}

    return run


def _line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))
