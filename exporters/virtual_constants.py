"""A prompt or prefix in a whole graph: constant keys and values at every layer's attention.

In a causal decoder nothing that follows changes what virtual tokens compute, so they are run once,
at export. The graph puts the result before the keys and values of its input (see
`peftc.constant_layer`), moves positions behind it and lets every token see it. It is no part of the
cache that goes in and out: who runs the graph knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc.calling import CONSTANT
from peftc.capturing import capture
from peftc.constant_cache import ConstantCache
from peftc.constants import Held
from peftc.deltas import again, alone
from peftc.errors import ArtifactError
from peftc.exporters.to_cache import computed, obstacle
from peftc.live import materialize
from peftc.program import Program


@dataclass(frozen=True)
class Virtual:
    """A program's virtual tokens as constants.

    Attributes:
        program: The program that has them, as an adapter.
        cache: Their keys and values, fp32.
        names: For each layer the names that these have in the graph.
    """

    program: Program
    cache: ConstantCache
    names: tuple[tuple[str, str], ...]

    def report(self, file: str) -> dict[str, Any]:
        """What the manifest says of them, from which `ConstantCache.open` reads them too.

        Args:
            file: Which holds them.
        """
        numbering = self.cache.numbering
        return {
            "tokens": self.cache.tokens,
            "file": file,
            "layers": self.names,
            "numbering": None if numbering is None else vars(numbering),
            "shapes": dict(self.cache.shapes),
        }

    def tuned(self, path: Path) -> nn.Module:
        """The live tuned model, in fp32, on the weights that a directory holds."""
        return materialize(
            again(capture(path), self.program, _names(self.program)), dtype=torch.float32
        )


def settled(program: Program, target: Path) -> tuple[Program, Virtual | None]:
    """The program whose model a graph is of, and the virtual tokens that it starts from.

    Args:
        program: With no adapter, or with a prompt or a prefix.
        target: Where it is to be written.

    Raises:
        ArtifactError: It carries an adapter that is to be merged, or virtual tokens that cannot
            become constants.
    """
    names = _names(program)
    if others := [name for name in program.adapters if name not in names]:
        raise ArtifactError(
            f"the program still carries the adapter {', '.join(others)}",
            where=str(target),
            fix="merge it (--merge), leave it to be given at run time (--adapters swap), or write "
            "it with --format peft",
        )
    if not names:
        return program, None
    live = materialize(program, dtype=torch.float32)
    reason, attention = obstacle(program, live), program.source.attention()
    if reason is None:
        cache = computed(live)
        if attention is None or len(attention.modules) != len(cache.layers):
            reason = "peftc does not find where each of the layers attends, which is where keys go"
    if reason is not None:
        raise ArtifactError(reason, where=str(target), fix="write it with --format peft")
    assert attention is not None
    keys = tuple(
        (f"{module}.{CONSTANT[0]}", f"{module}.{CONSTANT[1]}") for module in attention.modules
    )
    constants = {
        name: Held(tensor.detach().contiguous(), f"{name} of {program.fingerprint}")
        for pair, tensors in zip(keys, cache.layers, strict=True)
        for name, tensor in zip(pair, tensors, strict=True)
    }
    return alone(program, []).rewrite(constants=constants), Virtual(program, cache, keys)


def _names(program: Program) -> Sequence[str]:
    return [name for name, adapter in program.adapters.items() if adapter.prefixed]
