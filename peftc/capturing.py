"""Capture: a checkpoint, or any module, as sites and constants, with no weight loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftc.checkpoint import Checkpoint, resolve
from peftc.constants import Constant, Held, Leaf
from peftc.errors import CaptureError
from peftc.program import OutputFile, Program
from peftc.sites import Site, kind_of, template

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        """A copy of the module."""
        return copy.deepcopy(self.module).to(dtype=dtype)

    def layout(self) -> list[OutputFile]:
        owned = {id(tensor): name for name, tensor in reversed(_state(self.module).items())}
        return [OutputFile("model.safetensors", tuple(reversed(owned.values())), {"format": "pt"})]

    def companions(self) -> dict[str, Path]:
        return {}

    def pin(self) -> dict[str, Any]:
        return {"module": f"{type(self.module).__module__}.{type(self.module).__qualname__}"}


def capture_checkpoint(checkpoint: Checkpoint, name: str) -> Program:
    """Captures an opened checkpoint: its skeleton on the meta device, its tensors as leaves."""
    skeleton = _skeleton(checkpoint)
    state = _state(skeleton)
    stored = _stored_names(checkpoint, skeleton, set(state))
    constants: dict[str, Constant] = {
        fqn: Leaf(checkpoint.tensors[key]) for key, fqn in stored.items()
    }
    wrong = [
        f"{fqn}: {list(constants[fqn].spec.shape)} instead of {list(tensor.shape)}"
        for fqn, tensor in state.items()
        if fqn in constants and constants[fqn].spec.shape != tuple(tensor.shape)
    ]
    if wrong:
        raise CaptureError(
            f"{len(wrong)} tensors have shapes that config.json does not describe, such as "
            f"{wrong[0]}",
            where=str(checkpoint.path),
            fix="use the config.json that belongs to these weights",
        )
    aliases = _aliases(state)
    for tied, owner in aliases.items():
        if found := constants.get(owner) or constants.get(tied):
            constants.setdefault(owner, found)
            constants.setdefault(tied, found)
    head = skeleton.get_output_embeddings()
    source = CheckpointSource(checkpoint, name)
    return _program(source, skeleton, constants, stored, aliases, head)


def _capture_module(module: nn.Module) -> Program:
    state = _state(module)
    constants: dict[str, Constant] = {fqn: Held(tensor) for fqn, tensor in state.items()}
    aliases = _aliases(state)
    for tied, owner in aliases.items():
        constants[tied] = constants[owner]
    stored = {fqn: fqn for fqn in state}
    output = getattr(module, "get_output_embeddings", lambda: None)()
    return _program(ModuleSource(module), module, constants, stored, aliases, output)


def architecture(checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """The transformers class that config.json names; code from the checkpoint is never run.

    Raises:
        CaptureError: It names none, or one that transformers does not have.
    """
    import transformers

    names = checkpoint.config.get("architectures") or []
    if not isinstance(names, list) or not names:
        raise CaptureError(
            "names no architecture",
            where=str(checkpoint.path / "config.json"),
            fix='add it, for instance "architectures": ["LlamaForCausalLM"]',
        )
    cls = getattr(transformers, str(names[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        remote = "auto_map" in checkpoint.config
        raise CaptureError(
            f"transformers {transformers.__version__} has no architecture {names[0]!r}"
            + (", and code that comes with a checkpoint is not run" if remote else ""),
            where=str(checkpoint.path / "config.json"),
            fix="capture the live model instead: peftc.capture(model)"
            if remote
            else "check the name, or upgrade transformers",
        )
    return cls


def _skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    from transformers import AutoConfig

    cls = architecture(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        with torch.device("meta"):
            return cls(config)
    except Exception as error:  # any library code may fail on a config from outside
        raise CaptureError(
            f"transformers cannot build {cls.__name__} from it: {error}",
            where=str(checkpoint.path / "config.json"),
            fix="check the config, or upgrade transformers",
        ) from error


def _stored_names(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, known: set[str]
) -> dict[str, str]:
    """The live name of each stored tensor; a checkpoint may lack, or add, the base's prefix."""
    prefix = f"{skeleton.base_model_prefix}."
    names = {}
    for key in checkpoint.tensors:
        candidates = (key, prefix + key, key.removeprefix(prefix))
        names[key] = next((name for name in candidates if name in known), key)
    if not known & set(names.values()):
        raise CaptureError(
            f"none of its tensors belongs to {type(skeleton).__name__}: it holds "
            f"{next(iter(checkpoint.tensors), 'nothing')}, and {sorted(known)[0]} is asked for",
            where=str(checkpoint.path),
            fix="use the config.json that belongs to these weights",
        )
    return names


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every saved tensor by each of its names, tied ones twice."""
    return {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }


def _aliases(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    owners: dict[int, str] = {}
    aliases = {}
    for name, tensor in state.items():
        if (owner := owners.setdefault(id(tensor), name)) != name:
            aliases[name] = owner
    return aliases


def _program(
    source: CheckpointSource | ModuleSource,
    skeleton: nn.Module,
    constants: dict[str, Constant],
    stored: dict[str, str],
    aliases: dict[str, str],
    head: nn.Module | None,
) -> Program:
    sites: dict[str, Site] = {}
    names: dict[str, nn.Module] = dict(skeleton.named_modules(remove_duplicate=False))
    for fqn, module in names.items():
        kind = kind_of(module)
        if kind is None or not fqn or f"{fqn}.weight" not in constants:
            continue
        shape = constants[f"{fqn}.weight"].spec.shape
        out_features, in_features = reversed(shape) if kind.transposed else shape
        bias = getattr(module, "bias", None) is not None
        if bias and f"{fqn}.bias" not in constants:
            continue
        graph = template(kind, bias)
        sites[fqn] = Site(fqn, kind, graph, in_features, out_features)
    return Program(
        source,
        sites,
        constants,
        constants,
        stored,
        aliases,
        frozenset(names),
        next((fqn for fqn, module in names.items() if module is head), None) if head else None,
    )
