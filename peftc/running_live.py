"""Running by transformers, in eager torch: what `load` takes, with its adapters on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from peftc.api import load
from peftc.artifact import MANIFEST, Artifact
from peftc.checkpoint import resolve
from peftc.constant_cache import ConstantCache
from peftc.errors import PeftcError, RunError
from peftc.live import materialize
from peftc.passes.attach import Attach
from peftc.pipeline import Pipeline
from peftc.running import Sampling


class Live:
    """A live model of transformers'; a constant cache that lies beside it is its beginning."""

    def __init__(self, model: Any, folder: Path, cache: ConstantCache | None) -> None:
        self.model, self.folder, self.cache = model, folder, cache
        self.engine = f"transformers {version('transformers')}"

    @classmethod
    def unfit(cls, path: Path) -> PeftcError | None:
        """See `peftc.running.Runner`."""
        kind = _manifest(path).get("kind")
        if kind in ("onnx", "cache") and not list(path.glob("model*.safetensors")):
            return RunError(
                "holds no checkpoint for transformers",
                where=str(path),
                fix="export it again with --merge, and without --weights",
            )
        return None

    @classmethod
    def open(cls, path: Path, adapter: str | None) -> Self:
        """Loads a directory, or a hub id, in fp32."""
        program, manifest = load(path), _manifest(path)
        if adapter is not None:
            program = Pipeline([Attach(path=adapter)]).run(program)
        model: Any = materialize(program, dtype=torch.float32)
        if not hasattr(model, "generate") or not model.can_generate():
            raise RunError(
                f"is a {type(model).__name__}, which generates nothing",
                where=str(path),
                fix="run a decoder",
            )
        cached = manifest.get("kind") == "cache" or "constant_cache" in manifest
        source: Any = program.source
        return cls(model, source.checkpoint.path, ConstantCache.open(path) if cached else None)

    @torch.no_grad()
    def generate(self, ids: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Sequence[int]]:
        """See `peftc.running.Runner`."""
        new, random = torch.tensor(ids), np.random.default_rng(sampling.seed)
        given = self.cache.before(self.model, new) if self.cache else {"input_ids": new}
        for _ in range(sampling.max_new_tokens):
            output = self.model(**given, use_cache=True)
            chosen = sampling.choose(output.logits[:, -1].numpy(), random)
            yield chosen.tolist()
            new = torch.from_numpy(chosen)[:, None]
            given = {"input_ids": new, "past_key_values": output.past_key_values}


def _manifest(path: Path) -> dict[str, Any]:
    here = resolve(path)
    return dict(Artifact.open(here).manifest) if (here / MANIFEST).is_file() else {}
