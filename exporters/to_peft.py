"""A program's adapter as the directory that PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from peftc.adapter import CONFIG, WEIGHTS
from peftc.artifact import Artifact, Staging, staging
from peftc.checkpoint import PEFT_PREFIX
from peftc.errors import ArtifactError, did_you_mean
from peftc.evaluate import single_threaded, value
from peftc.exporters.to_safetensors import folders, key_for, manifest
from peftc.program import Adapter, Program
from peftc.structure import peft_edits
from peftc.targets import named_modules

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
# Tasks of which PEFT looks for a trained head in the file, and refuses one that has none. For the
# last it has a class whose forward takes text alone, which Whisper's and LLaVA's is not.
HEADS: dict[str, set[str]] = {
    "SEQ_CLS": {"classifier", "score"}, "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"}, "SEQ_2_SEQ_LM": set(),
}  # fmt: skip


def to_peft(
    program: Program,
    target: str | Path,
    adapter: str | None = None,
    *,
    canonical: bool = False,
    rank: int | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Publishes one adapter of a program as a PEFT directory.

    Args:
        program: Carries the adapter, fresh or trained.
        target: A directory that does not exist.
        adapter: Which one; may be left out where there is only one.
        canonical: Write what all adapters add, or just that one, as one plain LoRA that vLLM and
            llama.cpp read too (see `peftc.exporters.canonical.to_canonical`).
        rank: Of that LoRA.
        overwrite: Replace an artifact that peftc wrote there.

    Raises:
        ArtifactError: The target cannot be written, or there is no such adapter.
    """
    if program.adapters and (moved := program.rewritten):
        raise ArtifactError(
            f"the adapter alone would be wrong: {len(moved)} weights of its base were changed too, "
            f"such as {moved[0]}",
            where=str(target),
            fix="write both (peftc apply), or after PiSSA and OLoRA: peftc.restore_base(program)",
        )
    if canonical:
        from peftc.exporters.canonical import to_canonical

        return to_canonical(program, target, adapter, rank, overwrite=overwrite)
    name = adapter or (next(iter(program.adapters)) if len(program.adapters) == 1 else "")
    if name not in program.adapters:
        raise ArtifactError(
            f"the program carries no adapter {name!r}" if name else "which adapter?",
            where=str(target),
            fix=did_you_mean(name, program.adapters) if program.adapters else "attach one first",
        )
    if peft_edits(program) is None:
        raise ArtifactError(
            "the adapter belongs to a model whose structure was edited, which PEFT cannot repeat",
            where=str(target),
            fix="write the model with it: peftc apply, or peftc.apply",
        )
    found = program.adapters[name]
    if found.method is not None and found.method.times != 1:
        raise ArtifactError(
            f"the adapter {name!r} is weighed by {found.method.times}, which its config cannot say",
            where=str(target),
            fix="write it as plain LoRA (--canonical), or merge it",
        )
    need = sum(program.constants[fqn].spec.nbytes for fqn in found.tensors.values())
    key = key_for(program, name)
    with staging(
        Path(target), key=key, need=need, sources=folders(program), overwrite=overwrite
    ) as stage:
        write_adapter(program, name, stage)
        told = {"format": "peft", "adapter": name}
        stage.publish(manifest(program, "adapter", export=told))
    return Artifact.open(Path(target))


@single_threaded()
def write_adapter(
    program: Program, name: str, stage: Staging, folder: str = "", base: str | None = None
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into a staging directory."""
    adapter = program.adapters[name]
    tensors: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    constants = {key: program.constants[fqn] for key, fqn in adapter.tensors.items()}
    method = adapter.method
    for key, constant in (method.written(constants) if method else constants).items():
        if adapter.prefixed:
            key = key.replace(PEFT_PREFIX, PEFT_PREFIX.removesuffix("model."), 1)
        tensor = value(constant).contiguous()
        # A tied tensor has several names, and the format takes no memory twice.
        tensors[key] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    config = {
        **adapter.config,
        "base_model_name_or_path": base or program.source.name,
        "task_type": _task(program, None if adapter.prefixed else tensors),
        "inference_mode": True,
        **(peft_edits(program) or {} if base is None else {}),
    }
    if not adapter.prefixed:
        modules, experts = _targets(program, adapter)
        sites = [program.sites[fqn] for fqn in adapter.sites]
        config["target_modules"] = modules
        config["fan_in_fan_out"] = any(site.kind.name == "conv1d" for site in sites)
        config |= {"target_parameters": experts} if experts else {}
    # The patterns keep their order, for the first that matches counts.
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    stage.add(folder + CONFIG, text.encode())
    stage.add(folder + WEIGHTS, save(tensors, metadata={"format": "pt"}))


def _targets(program: Program, adapter: Adapter) -> tuple[list[str], list[str]]:
    """The shortest names that select an adapter's modules, and its parameters of experts."""
    from peftc.kinds import ExpertsKind

    experts = [s for s in adapter.sites if isinstance(program.sites[s].kind, ExpertsKind)]
    modules = [s for s in adapter.sites if s not in set(experts)] or _owners(program, adapter)
    return _shortest(modules, program.modules, 1), _shortest(experts, program.sites, 3)


def _owners(program: Program, adapter: Adapter) -> list[str]:
    """The modules whose own tensors an adapter trains, but for those of `modules_to_save`."""
    if adapter.sites:
        return []
    saved, _ = named_modules(adapter.config.get("modules_to_save") or [], program)
    whole = set(program.tensors_of(saved))
    return sorted({f.rpartition(".")[0] for f in adapter.tensors.values() if f not in whole})


def _shortest(chosen: Sequence[str], names: Iterable[str], parts: int) -> list[str]:
    """Last parts of names that select just the chosen ones, or their whole names."""

    def last(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    suffixes = sorted({last(name) for name in chosen})
    selected = {name for name in names if last(name) in suffixes}
    return suffixes if selected == set(chosen) else sorted(chosen)


def _task(program: Program, keys: Iterable[str] | None = ()) -> str | None:
    """PEFT's name of what the model does, where an adapter with these tensors may have it."""
    names: Sequence[Any] = program.source.architectures
    parts = {part for key in keys or () for part in key.split(".")}
    for name in names:
        for suffix, task in TASKS.items():
            if str(name).endswith(suffix):
                headless = keys is not None and task in HEADS and not HEADS[task] & parts
                return None if headless else task
    return None
