"""A program's prompt or prefix as constant keys and values, which the plain model starts from."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from transformers import DynamicCache

from peftc.artifact import Artifact, staging
from peftc.constant_cache import FILE, ConstantCache, shapes_of
from peftc.deltas import alone
from peftc.errors import ArtifactError, ProofError
from peftc.evaluate import single_threaded
from peftc.exporters.to_safetensors import folders, key_for, manifest, write_model
from peftc.link import plan
from peftc.live import materialize
from peftc.prefixes import keys_and_values
from peftc.program import Program
from peftc.progress import SILENT, Progress
from peftc.proof import differences, site_proof
from peftc.virtual import VirtualTokens

BOUND = 1e-5  # fp32 rounding of sums in another order
SAMPLES, LENGTH = 2, 8  # of the tokens that the proof runs


@single_threaded()
def to_cache(
    program: Program,
    target: str | Path,
    *,
    model: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress = SILENT,
    remarks: Mapping[str, Any] | None = None,
) -> Artifact:
    """Writes the keys and values of virtual tokens, proves them, and publishes them.

    They are computed once, in fp32, and rounded once, to the model's dtype. Read them by
    `peftc.ConstantCache.open`.

    Args:
        program: A causal decoder with a prompt or a prefix, and no other adapter.
        target: A directory that does not exist.
        model: Write the plain checkpoint too, which transformers loads from the same directory.
            It is always written where its weights are no longer the source's.
        overwrite: Replace an artifact that peftc wrote there.
        workers: Threads that write the checkpoint; default: one per core.
        progress: Told of each stage, and of every byte of the checkpoint.
        remarks: What else the manifest is to say.

    Raises:
        ArtifactError: There are no virtual tokens, or no cache that they could become.
        ProofError: From the cache the model gives other logits.
    """
    progress.stage("compute the cache")
    live: Any = materialize(program, dtype=torch.float32)
    if (reason := obstacle(program, live)) is not None:
        raise ArtifactError(reason, where=str(target), fix="write it with --format peft")
    generator = torch.Generator().manual_seed(0)
    embedding = program.sites[str(program.embedding)]
    ids = torch.randint(embedding.in_features, (SAMPLES, LENGTH), generator=generator)
    with torch.no_grad():
        cache = computed(live)
        want = live(input_ids=ids).logits[:, -LENGTH:]
        del live
        plain: Any = materialize(alone(program, []), dtype=torch.float32)
        figures = differences(want, plain(**cache.before(plain, ids)).logits)
    if not figures["relative_error"] <= BOUND:
        raise ProofError(
            f"from the cache the logits differ by {figures['relative_error']:.2e} of their largest "
            f"value (bound {BOUND:g})",
            where=str(target),
            fix="the model's state is more than its keys and values: write it with --format peft",
        )
    dtype = program.constants[embedding.name("weight")].spec.dtype
    tensors = {
        f"{i}.{name}": tensor.to(dtype).contiguous()
        for i, pair in enumerate(cache.layers)
        for name, tensor in zip(("key", "value"), pair, strict=True)
    }
    model = model or bool(program.rewritten) or bool(program.source.edited())
    need = sum(tensor.nbytes for tensor in tensors.values())
    need += sum(shard.size for shard in plan(program)) if model else 0
    numbering = None if cache.numbering is None else vars(cache.numbering)
    key = key_for(program, "cache", model, numbering)
    with staging(
        Path(target), key=key, need=need, sources=folders(program), overwrite=overwrite
    ) as stage:
        proof: dict[str, Any] = {}
        if model:
            progress.stage("link", need)
            written = write_model(program, stage, workers=workers, progress=progress)
            proof["site"] = site_proof(program, written)
        proof["whole"] = {"input": "random token ids, seed 0", "bound": BOUND, **figures}
        stage.add(FILE, save(tensors, metadata={"format": "pt"}))
        told = {"format": "cache", "model": model}
        more = {
            "numbering": numbering,
            "shapes": dict(cache.shapes),
            "proof": proof,
            "export": told,
        }
        stage.publish(manifest(program, "cache", **more, **(remarks or {})))
    return Artifact.open(Path(target))


def obstacle(program: Program, model: nn.Module) -> str | None:
    """Why the virtual tokens of a program and its live model cannot become constants, if so."""
    config: Any = getattr(model, "config", None)
    prefixed = any(adapter.prefixed for adapter in program.adapters.values())
    if not prefixed or program.embedding not in program.sites:
        return "the program carries no prompt or prefix"
    if len(program.adapters) > 1:
        return "the keys and values would be those of other adapters too: merge these (--merge)"
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder keeps no keys and values, and its decoder has two kinds of them"
    if "past_key_values" not in signature(model.forward).parameters:
        return "the model keeps no keys and values"
    if getattr(model, "_is_stateful", False):
        return "the model's state is more than keys and values"
    if keys_and_values(model) and any(DynamicCache(config=config).is_sliding):
        return "in layers with a sliding window a cached prefix would slide out of sight"
    return None


def computed(model: Any) -> ConstantCache:
    """The keys and values of a live model's virtual tokens."""
    shapes = shapes_of(model.config)
    if layers := keys_and_values(model):
        return ConstantCache(layers, shapes=shapes)
    tokens: VirtualTokens = model.virtual_tokens
    none = torch.zeros(1, 0, dtype=torch.int64)
    filled = model(input_ids=none, past_key_values=DynamicCache(), use_cache=True).past_key_values
    numbered = "position_ids" in signature(model.forward).parameters
    layers = tuple((layer.keys, layer.values) for layer in filled.layers)
    return ConstantCache(layers, tokens.numbering if numbered else None, shapes)
