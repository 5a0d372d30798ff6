"""A compiled graph: what it takes, the calls of libraries that it is, and the tensors of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc.calling import Port, Tensors
from peftc.checkpoint import contained
from peftc.errors import ArtifactError, InputError, PeftcError
from peftc.safetensors_file import read_header


@dataclass(frozen=True)
class Graph:
    """One graph of a model: what it takes and gives, and the calls that it is.

    Attributes:
        name: `model`, or `encoder_model` and `decoder_model`.
        inputs: What it takes.
        outputs: What it gives.
        steps: Of each call the library's name, and the names of what it takes and gives.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    steps: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]

    @property
    def takes_past(self) -> bool:
        """Whether it goes on from keys and values of tokens before."""
        return any("past" in port.dims for port in self.inputs)

    @classmethod
    def read(cls, name: str, told: Mapping[str, Any]) -> Graph:
        """From a manifest's description."""
        steps = tuple((piece, tuple(takes), tuple(gives)) for piece, takes, gives in told["steps"])
        return cls(name, _ports(told["inputs"]), _ports(told["outputs"]), steps)

    def described(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "inputs": [_told(port) for port in self.inputs],
            "outputs": [_told(port) for port in self.outputs],
            "steps": [list(step) for step in self.steps],
        }


def _told(port: Port) -> list[Any]:
    return [port.name, list(port.dims), str(port.dtype).removeprefix("torch.")]


def _ports(told: Sequence[Any]) -> tuple[Port, ...]:
    return tuple(Port(name, tuple(dims), getattr(torch, dtype)) for name, dims, dtype in told)


def misshapen(port: Port, given: Tensor, sizes: dict[str, int]) -> list[PeftcError]:
    """What is wrong with one input; `sizes` learns the sizes that vary."""
    shape, fits = list(given.shape), given.dim() == len(port.dims)
    for dim, size in zip(port.dims, shape, strict=False):
        least = 0 if dim == "past" else 1
        fits &= (
            size == sizes.setdefault(dim, size) >= least if isinstance(dim, str) else size == dim
        )
    if fits and given.dtype == port.dtype:
        return []
    known = [f"{dim}={sizes[dim]}" if dim in sizes else str(dim) for dim in map(str, port.dims)]
    return [
        InputError(
            f"is {given.dtype} {shape}, and what was exported takes {port.dtype} "
            f"[{', '.join(known)}], every size at least 1 but the past's",
            where=f"input {port.name}",
            fix="give it so, or export for other shapes",
        )
    ]


class Plan:
    """The calls of one graph, their operands resolved to places in one list."""

    def __init__(
        self, library: Path, graph: Graph, constants: Tensors, slots: Iterable[str]
    ) -> None:
        self.graph, names = graph, dict[str, int]()

        def place(name: str) -> int:
            return names.setdefault(name, len(names))

        self.inputs = [(port.name, place(port.name)) for port in graph.inputs]
        loaders = {
            piece: _loader(library, piece) for piece in dict.fromkeys(s[0] for s in graph.steps)
        }
        plan = [
            (loaders[piece], [place(n) for n in takes], [place(n) for n in gives])
            for piece, takes, gives in graph.steps
        ]
        self.outputs = [(port.name, place(port.name)) for port in graph.outputs]
        self.slots = [(name, names[name]) for name in slots if name in names]
        self.start: list[Any] = [constants.get(name) for name in names]
        kept = {i for _, i in self.outputs} | {i for i, x in enumerate(self.start) if x is not None}
        kept |= {i for _, i in self.slots}
        last = {i: n for n, (_, takes, gives) in enumerate(plan) for i in (*takes, *gives)}
        self.plan = [
            (call, takes, gives, [i for i in {*takes, *gives} - kept if last[i] == n])
            for n, (call, takes, gives) in enumerate(plan)
        ]

    def bind(self, chosen: Tensors) -> None:
        """Puts an adapter's tensors where the calls look for them."""
        start = self.start.copy()  # whole at once, for a run that goes on meanwhile
        for name, i in self.slots:
            start[i] = chosen[name]
        self.start = start

    def run(self, given: Tensors) -> Tensors:
        """What the graph gives."""
        held = self.start.copy()
        for name, i in self.inputs:
            held[i] = given[name].contiguous()
        for call, takes, gives, gone in self.plan:
            for i, x in zip(gives, call([held[i] for i in takes]), strict=True):
                held[i] = x
            for i in gone:
                held[i] = None
        return {name: held[i] for name, i in self.outputs}


def _loader(library: Path, piece: str) -> Callable[[list[Tensor]], list[Tensor]]:
    """The compiled function of a piece."""
    # Not torch._inductor.aoti_load_package: that imports the compiler, which takes a second.
    found = torch._C._aoti.AOTIModelPackageLoader(str(library), piece, False, 1, -1)
    call: Callable[[list[Tensor]], list[Tensor]] = found.boxed_run
    return call


def mapped(path: Path, told: Mapping[str, Any]) -> Tensors:
    """The constants, mapped into memory; those of another dtype than is computed in are cast."""
    from safetensors import safe_open

    tensors: Tensors = {}
    files: dict[str, list[tuple[str, str, str, list[int]]]] = {}
    for name, (file, key, dtype, shape) in told["constants"].items():
        files.setdefault(file, []).append((name, key, dtype, shape))
    for file, wanted in files.items():
        shared: dict[tuple[str, str], Tensor] = {}
        read_header(contained(path, file))  # whose errors say what is damaged
        with safe_open(path / file, "pt") as opened:
            known = set(opened.keys())
            for name, key, dtype, shape in wanted:
                if (key, dtype) not in shared:
                    x = opened.get_tensor(key) if key in known else torch.empty(0)
                    if min(shape, default=0) < 0 or x.numel() != math.prod(shape):
                        raise ArtifactError(
                            f"{key} is not {shape} there, as the library takes it",
                            where=str(path / file),
                            fix="export it again",
                        )
                    shared[key, dtype] = x.reshape(shape).to(getattr(torch, dtype))
                tensors[name] = shared[key, dtype]
    return tensors
