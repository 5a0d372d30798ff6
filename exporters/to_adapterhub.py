"""A program's bottleneck adapter as the directory that AdapterHub's `adapters` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from peftc.adapter import CONFIG
from peftc.adapterhub import VERSION, WEIGHTS, config_of, prefixes, written_names
from peftc.artifact import Artifact, staging
from peftc.checkpoint import PEFT_PREFIX
from peftc.errors import ArtifactError, did_you_mean
from peftc.evaluate import single_threaded, value
from peftc.exporters.to_safetensors import folders, key_for, manifest
from peftc.program import Adapter, Program
from peftc.structure import as_json


@single_threaded()
def to_adapterhub(
    program: Program, target: str | Path, adapter: str | None = None, *, overwrite: bool = False
) -> Artifact:
    """Publishes one bottleneck adapter of a program as an AdapterHub directory.

    Args:
        program: Carries the adapter, fresh or trained.
        target: A directory that does not exist.
        adapter: Which one; may be left out where there is only one.
        overwrite: Replace an artifact that peftc wrote there.

    Raises:
        ArtifactError: The target cannot be written, there is no such adapter, or it is not one
            that AdapterHub has: not a bottleneck, or at modules that are no sublayers.
    """
    name = adapter or (next(iter(program.adapters)) if len(program.adapters) == 1 else "")
    if name not in program.adapters:
        raise ArtifactError(
            f"the program carries no adapter {name!r}" if name else "which adapter?",
            where=str(target),
            fix=did_you_mean(name, program.adapters) if program.adapters else "attach one first",
        )
    found = program.adapters[name]
    _refuse_others(program, found, str(target))
    local = {key: program.site_of(key.removeprefix(PEFT_PREFIX)) for key in found.tensors}
    sites = {key: (site, rest) for key, (site, rest) in local.items() if site is not None}
    names = written_names(program, name, sites, bool(found.config["ln_before"]))
    tensors: dict[str, torch.Tensor] = {
        new: value(program.constants[found.tensors[old]]).contiguous().clone()
        for new, old in names.items()
    }
    own = _model_config(program)
    config = {
        "config": config_of(found.config),
        "hidden_size": own.get("hidden_size", own.get("n_embd", own.get("dim"))),
        "model_class": next(iter(program.source.architectures), None),
        "model_name": program.source.name or "",
        "model_type": own.get("model_type"),
        "name": name,
        "version": VERSION,
    }
    key = key_for(program, f"adapterhub {name}")
    need = sum(tensor.nbytes for tensor in tensors.values())
    with staging(
        Path(target), key=key, need=need, sources=folders(program), overwrite=overwrite
    ) as stage:
        stage.add(CONFIG, as_json(config))
        stage.add(WEIGHTS, save(tensors))
        told = {"format": "adapterhub", "adapter": name}
        stage.publish(manifest(program, "adapter", export=told))
    return Artifact.open(Path(target))


def _refuse_others(program: Program, found: Adapter, where: str) -> None:
    if found.config.get("peft_type") != "BOTTLENECK":
        raise ArtifactError(
            f"the adapter {found.name!r} is no bottleneck, which alone is written for AdapterHub",
            where=where,
            fix="write it for PEFT: --format peft",
        )
    if trained := sorted(set(found.tensors.values()) & set(program.stored.values())):
        raise ArtifactError(
            f"the adapter trains the base's own {trained[0]}, for which its files have no place",
            where=where,
            fix="train it without modules_to_save, or write it for PEFT: --format peft",
        )
    known = prefixes(program)
    away = [fqn for fqn in found.sites if fqn not in known]
    if away or not found.config.get("at_sublayers"):
        raise ArtifactError(
            f"the adapter stands at modules of its own choice, such as {(away or found.sites)[0]}, "
            "and AdapterHub has sublayers only",
            where=where,
            fix="leave out targets, or write it for PEFT: --format peft",
        )


def _model_config(program: Program) -> dict[str, Any]:
    """The model's config, of a checkpoint or of a live module."""
    source: Any = program.source
    if hasattr(source, "checkpoint"):
        return dict(source.checkpoint.config)
    config: Any = getattr(source.module, "config", None)
    return dict(config.to_dict()) if hasattr(config, "to_dict") else {}
