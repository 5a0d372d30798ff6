"""Adapter directories, PEFT's and AdapterHub's: a config and a safetensors file, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftc import adapterhub
from peftc.checkpoint import contained, digest_file, read_json
from peftc.constants import Leaf
from peftc.errors import AdapterError, PeftcError
from peftc.evaluate import chunks
from peftc.reading import read
from peftc.safetensors_file import SafetensorsFile, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterDirectory:
    """A trained adapter on disk, of which no tensor is read yet."""

    path: Path
    config: Mapping[str, Any]
    file: SafetensorsFile

    @classmethod
    def open(cls, path: Path) -> AdapterDirectory:
        """Opens a directory that PEFT, AdapterHub's `adapters` or peftc wrote.

        Raises:
            CheckpointError: A file is missing or damaged.
            AdapterError: The weights are pickled, or the config names no peft_type.
        """
        config = read_json(path / CONFIG, "a PEFT adapter")
        if adapterhub.is_hub(config):
            if not (path / adapterhub.WEIGHTS).exists() and (path / adapterhub.PICKLED).exists():
                raise AdapterError(
                    f"holds only pickled weights ({adapterhub.PICKLED}), which may run code when "
                    "opened",
                    where=str(path),
                    fix=adapterhub.CONVERT,
                )
            weights = contained(path, adapterhub.WEIGHTS)
            return cls(path, config, read_header(weights, path / CONFIG))
        if not (path / WEIGHTS).exists() and (path / "adapter_model.bin").exists():
            raise AdapterError(
                "holds only pickled weights (adapter_model.bin), which run code when opened",
                where=str(path),
                fix="load it with PEFT, if you trust it, and save it again as safetensors",
            )
        if not isinstance(config.get("peft_type"), str):
            raise AdapterError("names no peft_type", where=str(path / CONFIG), fix="save it again")
        return cls(path, config, read_header(contained(path, WEIGHTS), path / CONFIG))

    def leaves(self) -> dict[str, Leaf]:
        """Every tensor as a constant, by its name in the file."""
        return {name: Leaf(ref) for name, ref in self.file.tensors.items()}

    def not_finite(self) -> list[PeftcError]:
        """An error for each tensor that holds a NaN or an infinity."""
        errors: list[PeftcError] = []
        for name, leaf in self.leaves().items():
            rows = chunks(leaf.spec.shape)
            if not all(bool(torch.isfinite(read(leaf, *span)).all()) for span in rows):
                errors.append(
                    AdapterError(
                        f"tensor {name} holds NaN or infinity",
                        where=str(self.file.path),
                        fix="the training diverged: use an earlier checkpoint of it",
                    )
                )
        return errors

    def pin(self) -> dict[str, Any]:
        """What identifies the adapter: its path and the hashes of its two files."""
        return {
            "path": str(self.path.resolve()),
            "config": digest_file(self.path / CONFIG),
            "weights": digest_file(self.file.path),
        }
