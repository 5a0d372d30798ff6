"""A program's adapter as the directory that PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

from peftc.adapter import CONFIG, WEIGHTS
from peftc.artifact import Artifact, Staging, key_of, staging
from peftc.errors import ArtifactError, did_you_mean
from peftc.evaluate import value
from peftc.exporters.to_safetensors import folders, manifest
from peftc.program import Adapter, Program

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def to_peft(
    program: Program, target: str | Path, adapter: str | None = None, *, overwrite: bool = False
) -> Artifact:
    """Publishes one adapter of a program as a PEFT directory.

    Args:
        program: Carries the adapter, fresh or trained.
        target: A directory that does not exist.
        adapter: Which one; may be left out where there is only one.
        overwrite: Replace an artifact that peftc wrote there.

    Raises:
        ArtifactError: The target cannot be written, or there is no such adapter.
    """
    name = adapter or (next(iter(program.adapters)) if len(program.adapters) == 1 else "")
    if name not in program.adapters:
        raise ArtifactError(
            f"the program carries no adapter {name!r}" if name else "which adapter?",
            where=str(target),
            fix=did_you_mean(name, program.adapters) if program.adapters else "attach one first",
        )
    found = program.adapters[name]
    need = sum(program.constants[fqn].spec.nbytes for fqn in found.tensors.values())
    key = key_of(program.fingerprint, name)
    with staging(
        Path(target), key=key, need=need, sources=folders(program), overwrite=overwrite
    ) as stage:
        write_adapter(program, name, stage)
        stage.publish(manifest(program, "adapter"))
    return Artifact.open(Path(target))


def write_adapter(
    program: Program, name: str, stage: Staging, folder: str = "", base: str | None = None
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into a staging directory."""
    adapter = program.adapters[name]
    tensors = {
        key: value(program.constants[fqn]).contiguous() for key, fqn in adapter.tensors.items()
    }
    modules, experts = _targets(program, adapter)
    config = {
        **adapter.config,
        "base_model_name_or_path": base or program.source.name,
        "task_type": _task(program),
        "inference_mode": True,
        "target_modules": modules,
        "fan_in_fan_out": any(program.sites[s].kind.name == "conv1d" for s in adapter.sites),
    }
    if experts:
        config["target_parameters"] = experts
    # The patterns keep their order, for the first that matches counts.
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    stage.add(folder + CONFIG, text.encode())
    stage.add(folder + WEIGHTS, save(tensors, metadata={"format": "pt"}))


def _targets(program: Program, adapter: Adapter) -> tuple[list[str], list[str]]:
    """The shortest names that select an adapter's modules, and its parameters of experts."""
    from peftc.kinds import ExpertsKind

    experts = [s for s in adapter.sites if isinstance(program.sites[s].kind, ExpertsKind)]
    modules = [s for s in adapter.sites if s not in set(experts)]
    return _shortest(modules, program.modules, 1), _shortest(experts, program.sites, 3)


def _shortest(chosen: Sequence[str], names: Iterable[str], parts: int) -> list[str]:
    """Last parts of names that select just the chosen ones, or their whole names."""

    def last(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    suffixes = sorted({last(name) for name in chosen})
    selected = {name for name in names if last(name) in suffixes}
    return suffixes if selected == set(chosen) else sorted(chosen)


def _task(program: Program) -> str | None:
    names: Sequence[Any] = program.source.architectures
    for name in names:
        for suffix, task in TASKS.items():
            if str(name).endswith(suffix):
                return task
    return None
