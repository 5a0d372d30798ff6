"""Running compiled models, by torch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from peftc import runtime
from peftc.errors import PeftcError
from peftc.running import Sampling


class Compiled:
    """What `--format pt2` wrote."""

    def __init__(self, model: runtime.Runtime, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.engine = f"torch {version('torch')}, compiled"

    @classmethod
    def unfit(cls, path: Path) -> PeftcError | None:
        """See `peftc.running.Runner`; what does not fit this machine, `open` tells."""
        return None

    @classmethod
    def open(cls, path: Path, adapter: str | None) -> Self:
        """Loads a directory."""
        model = runtime.load(path)
        if adapter is not None:
            model.swap(model.load_adapter(adapter))
        return cls(model, path)

    def generate(self, ids: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Sequence[int]]:
        """See `peftc.running.Runner`."""
        random = np.random.default_rng(sampling.seed)

        def choose(_: Tensor, logits: Tensor) -> Tensor:
            return torch.from_numpy(sampling.choose(logits.numpy(), random))

        steps = self.model.stream(
            torch.tensor(ids), sampling.max_new_tokens, choose=choose, stop=()
        )
        for tokens in steps:
            yield tokens.tolist()
