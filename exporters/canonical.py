"""Adapters as the one plain LoRA that every engine reads: vLLM, llama.cpp, and PEFT.

vLLM takes one r and one lora_alpha for all layers and reads no patterns; llama.cpp scales by
lora_alpha over each tensor's rank and ignores use_rslora. So here the scale is in B, lora_alpha is
r, all layers have one r (zeros fill it up, which changes nothing), and there is nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from peftc.adapter import CONFIG, WEIGHTS
from peftc.artifact import Artifact, staging
from peftc.checkpoint import PEFT_PREFIX
from peftc.constants import Held
from peftc.deltas import alone, deltas, deviation, unstackable, untold
from peftc.errors import ArtifactError, PassError, did_you_mean, located, raise_all
from peftc.evaluate import single_threaded, value
from peftc.exporters.to_safetensors import folders, key_for, manifest
from peftc.factors import Delta, peft_parameters, product
from peftc.kernels.lowrank import of_matrix, of_product
from peftc.program import Adapter, Program
from peftc.structure import peft_edits

TOLERANCE, LIMIT = 1e-6, 256  # without a rank: the smallest one with this error, up to this one
KINDS = ("linear", "conv1d", "embedding")  # that engines have LoRA for
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank


@dataclass(frozen=True)
class _Plain:
    """One site's LoRA with the scale 1.

    Attributes:
        up: B (out, r).
        down: A (r, in).
        cut: Whether a part of ΔW was left out.
        error: ‖ΔW − B·A‖_F / ‖ΔW‖_F, measured on what is written.
    """

    up: torch.Tensor
    down: torch.Tensor
    cut: bool
    error: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@single_threaded()
def to_canonical(
    program: Program,
    target: str | Path,
    adapter: str | None = None,
    rank: int | None = None,
    *,
    overwrite: bool = False,
) -> Artifact:
    """Publishes what adapters add as one canonical LoRA, in PEFT's format.

    Args:
        program: Carries the adapters.
        target: A directory that does not exist.
        adapter: Which one; default: all of them together.
        rank: The rank r of all layers; what does not fit in it is cut off, by the SVD, and the
            error written down. Default: what is exact for low-rank methods, and for others the
            smallest rank up to 256 whose error is below 1e-6.
        overwrite: Replace an artifact that peftc wrote there.

    Raises:
        PeftcError: The target cannot be written, an adapter trains more than the weights of linear
            layers and embeddings, or no rank is given where one is needed.
    """
    found = _deltas(program, adapter, str(target))
    sites = {fqn: _plain(fqn, delta, rank) for fqn, delta in found.items()}
    sites = {fqn: site for fqn, site in sites.items() if site.rank}
    if not sites:
        raise ArtifactError(
            "the adapters add nothing", where=str(target), fix="train them, or leave them out"
        )
    r = rank or max(site.rank for site in sites.values())
    tensors = {
        key: tensor for fqn, site in sites.items()
        for key, tensor in _tensors(program, fqn, site, r).items()
    }  # fmt: skip
    need = sum(tensor.nbytes for tensor in tensors.values())
    with staging(
        Path(target),
        key=key_for(program, f"canonical {adapter} {rank}"),
        need=need,
        sources=folders(program),
        overwrite=overwrite,
    ) as stage:
        text = json.dumps(_config(program, list(sites), r), indent=2, sort_keys=True) + "\n"
        stage.add(CONFIG, text.encode())
        stage.add(WEIGHTS, save(tensors, metadata={"format": "pt"}))
        told = {"format": "peft", "canonical": True, "adapter": adapter, "rank": rank}
        report = _report(sites, r)
        stage.publish(manifest(program, "adapter", canonical=report, export=told))
    return Artifact.open(Path(target))


def _deltas(program: Program, adapter: str | None, where: str) -> dict[str, Delta]:
    """What is to be written, or every reason why it cannot be."""
    names = list(program.adapters) if adapter is None else [adapter]
    if not names or names[0] not in program.adapters:
        gone = ": they are merged into the weights already" if program.unfolded else ""
        raise ArtifactError(
            f"the program carries no adapter {adapter!r}" if adapter else f"no adapters{gone}",
            where=where,
            fix=did_you_mean(adapter or "", program.adapters)
            if program.adapters
            else "export before merging, or attach one: --adapter DIR",
        )
    errors = untold(program, names)
    carrying = program
    if names != list(program.adapters):
        errors += unstackable(program)
        raise_all(located(errors, where))
        carrying = alone(program, names)
    found, refused = deltas(carrying)
    errors += refused
    errors += [
        PassError(
            "its adapter changes the bias too, which no plain LoRA does",
            where=fqn,
            fix="merge it (--merge), or train it without a bias of its own",
        )
        for fqn, delta in found.items()
        if delta.bias is not None
    ]
    errors += [
        PassError(
            f"there is no canonical LoRA of a site of kind {program.sites[fqn].kind.name}",
            where=fqn,
            fix="merge the adapter (--merge), or export it without --canonical",
        )
        for fqn in found
        if program.sites[fqn].kind.name not in KINDS
    ]
    raise_all(located(errors, where))
    return found


def _plain(fqn: str, delta: Delta, rank: int | None) -> _Plain:
    if delta.factors is not None:
        up, down = (value(factor).float() for factor in delta.factors)
        used = up.ne(0).any(0) & down.ne(0).any(1)  # what AdaLoRA pruned, or nobody trained
        up, down = up[:, used], down[used]
        cut = rank is not None and down.shape[0] > rank
        if cut or down.shape[0] > min(up.shape[0], down.shape[1]):
            short = of_product(up, down, rank, TOLERANCE)
            up, down, cut = short.up, short.down, short.error > TOLERANCE
    else:
        found = of_matrix(value(delta.matrix), rank, TOLERANCE, LIMIT)
        if found.wanted is not None:
            raise PassError(
                f"what the adapter adds has no low rank: {found.wanted} is needed for an error of "
                f"{TOLERANCE:.0e}, and rank {LIMIT} leaves {found.error:.1e}",
                where=fqn,
                fix="give the rank yourself, and accept the error: --rank 64; or merge (--merge)",
            )
        up, down, cut = found.up, found.down, found.error > TOLERANCE
    up, down = up.contiguous(), down.contiguous()
    error = deviation(product(Held(up), Held(down)), delta.matrix) if down.shape[0] else 0.0
    return _Plain(up, down, cut, error)


def _tensors(program: Program, fqn: str, site: _Plain, r: int) -> dict[str, torch.Tensor]:
    """A site's tensors by PEFT's names, filled up with zeros to the rank of all."""
    pad = r - site.rank
    up = torch.nn.functional.pad(site.up, (0, pad))
    down = torch.nn.functional.pad(site.down, (0, 0, 0, pad))
    factors = Held(up), Held(down)
    return {
        f"{PEFT_PREFIX}{fqn}.{local.replace('.canonical', '', 1)}": value(constant).contiguous()
        for local, constant in peft_parameters(program.sites[fqn], "canonical", factors).items()
    }


def _config(program: Program, sites: list[str], r: int) -> dict[str, Any]:
    """What engines read, and PEFT; no key that some of them would ignore is set."""
    from peftc.exporters.to_peft import _targets, _task

    return {
        "peft_type": "LORA", "r": r, "lora_alpha": r, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": False, "use_dora": False, "lora_bias": False, "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": None, "init_lora_weights": True,
        "inference_mode": True, "base_model_name_or_path": program.source.name,
        "task_type": _task(program),
        "target_modules": _targets(program, Adapter("canonical", {}, {}, sites=tuple(sites)))[0],
        "fan_in_fan_out": any(program.sites[s].kind.name == "conv1d" for s in sites),
        **(peft_edits(program) or {}),
    }  # fmt: skip


def _report(sites: Mapping[str, _Plain], r: int) -> dict[str, Any]:
    """What the manifest says of it, and the command line prints."""
    worst = max(sites, key=lambda fqn: sites[fqn].error)
    fits = [size for size in ENGINE_RANKS if size >= r]
    return {
        "rank": r,
        "alpha": r,
        "exact": not any(site.cut for site in sites.values()),
        "relative_error": sites[worst].error,
        "at": worst,
        "truncated_sites": sum(site.cut for site in sites.values()),
        "sites": {fqn: {"rank": s.rank, "relative_error": s.error} for fqn, s in sites.items()},
        "vllm_max_lora_rank": fits[0] if fits else None,
    }
