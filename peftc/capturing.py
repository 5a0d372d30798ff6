"""Capture: a checkpoint, or any module, as sites and constants, with no weight loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc.checkpoint import Checkpoint, resolve
from peftc.constants import Constant, Held, Leaf
from peftc.errors import CaptureError
from peftc.outline import Outline, architecture, checkpoint_outline, outline_of
from peftc.program import OutputFile, Program
from peftc.sites import KINDS, Site, template


def capture(source: str | Path | nn.Module) -> Program:
    """Captures a model for compilation.

    Args:
        source: A Hugging Face directory, a hub id, or a live module. A module is not changed, and
            its tensors are not copied.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or unsafe.
        CaptureError: transformers has no such architecture, or the checkpoint does not fit it.
    """
    if isinstance(source, nn.Module):
        return _capture_module(source)
    path = resolve(source)
    name = str(path.resolve()) if Path(source).exists() else str(source)
    return capture_checkpoint(Checkpoint.open(path), name)


@dataclass(frozen=True)
class CheckpointSource:
    """A program's origin in a Hugging Face directory."""

    checkpoint: Checkpoint
    name: str

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(map(str, self.checkpoint.config.get("architectures") or ()))

    def instantiate(self, dtype: torch.dtype | None) -> nn.Module:
        """Loads the model with transformers, in eval mode."""
        cls = architecture(self.checkpoint)
        model: nn.Module = cls.from_pretrained(
            self.checkpoint.path, dtype=dtype or "auto", local_files_only=True
        )
        return model.eval()

    def layout(self) -> list[OutputFile]:
        return [
            OutputFile(file.path.name, tuple(file.tensors), file.metadata, file)
            for file in self.checkpoint.files
        ]

    def companions(self) -> dict[str, Path]:
        return self.checkpoint.companions

    def pin(self) -> dict[str, Any]:
        return self.checkpoint.pin()


@dataclass(frozen=True)
class ModuleSource:
    """A program's origin in a live module."""

    module: nn.Module
    name: None = None

    @property
    def architectures(self) -> tuple[str, ...]:
        return (type(self.module).__name__,)

    def instantiate(self, dtype: torch.dtype | None) -> nn.Module:
        """A copy of the module, in eval mode."""
        return copy.deepcopy(self.module).to(dtype=dtype).eval()

    def layout(self) -> list[OutputFile]:
        outline = outline_of(self.module)
        names = tuple(name for name in outline.tensors if name not in outline.aliases)
        return [OutputFile("model.safetensors", names, {"format": "pt"})]

    def companions(self) -> dict[str, Path]:
        return {}

    def pin(self) -> dict[str, Any]:
        return {"module": f"{type(self.module).__module__}.{type(self.module).__qualname__}"}


def capture_checkpoint(checkpoint: Checkpoint, name: str) -> Program:
    """Captures an opened checkpoint by its outline; its tensors become leaves."""
    outline = checkpoint_outline(checkpoint)
    stored = _stored_names(checkpoint, outline)
    constants: dict[str, Constant] = {
        fqn: Leaf(checkpoint.tensors[key]) for key, fqn in stored.items()
    }
    wrong = [
        f"{fqn}: {list(constants[fqn].spec.shape)} instead of {list(shape)}"
        for fqn, shape in outline.tensors.items()
        if fqn in constants and constants[fqn].spec.shape != shape
    ]
    if wrong:
        raise CaptureError(
            f"{len(wrong)} tensors have shapes that config.json does not describe, such as "
            f"{wrong[0]}",
            where=str(checkpoint.path),
            fix="use the config.json that belongs to these weights",
        )
    for tied, owner in outline.aliases.items():
        if found := constants.get(owner) or constants.get(tied):
            constants.setdefault(owner, found)
            constants.setdefault(tied, found)
    return _program(CheckpointSource(checkpoint, name), outline, constants, stored)


def _capture_module(module: nn.Module) -> Program:
    outline = outline_of(module)
    state = module.state_dict(keep_vars=True)
    constants: dict[str, Constant] = {fqn: Held(state[fqn]) for fqn in outline.tensors}
    for tied, owner in outline.aliases.items():
        constants[tied] = constants[owner]
    stored = {fqn: fqn for fqn in outline.tensors}
    return _program(ModuleSource(module), outline, constants, stored)


def _stored_names(checkpoint: Checkpoint, outline: Outline) -> dict[str, str]:
    """The live name of each stored tensor; a checkpoint may lack, or add, the base's prefix."""
    names = {}
    for key in checkpoint.tensors:
        candidates = (key, outline.prefix + key, key.removeprefix(outline.prefix))
        names[key] = next((name for name in candidates if name in outline.tensors), key)
    if not outline.tensors.keys() & names.values():
        raise CaptureError(
            f"none of its tensors belongs to its architecture: it holds "
            f"{next(iter(checkpoint.tensors), 'nothing')}, and {min(outline.tensors)} is asked for",
            where=str(checkpoint.path),
            fix="use the config.json that belongs to these weights",
        )
    return names


def _program(
    source: CheckpointSource | ModuleSource,
    outline: Outline,
    constants: dict[str, Constant],
    stored: dict[str, str],
) -> Program:
    sites: dict[str, Site] = {}
    for fqn, module in outline.modules.items():
        wanted = ("weight", "bias") if module.bias else ("weight",)
        # A lone module has no name to address it by; a tensor may be missing from the file.
        if module.kind is None or not all(f"{fqn}.{name}" in constants for name in wanted):
            continue
        kind = KINDS[module.kind]
        shape = constants[f"{fqn}.weight"].spec.shape
        out_features, in_features = reversed(shape) if kind.transposed else shape
        graph = template(kind, module.bias)
        sites[fqn] = Site(fqn, kind, graph, in_features, out_features, module.bias)
    return Program(
        source,
        sites,
        constants,
        constants,
        stored,
        outline.aliases,
        frozenset(outline.modules),
        outline.head,
    )
