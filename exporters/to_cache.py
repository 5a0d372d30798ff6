"""A program's prompt as constant keys and values, which the plain model starts from."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from peftc.artifact import Artifact, key_of, staging
from peftc.errors import ArtifactError, ProofError
from peftc.exporters.to_safetensors import folders, manifest
from peftc.live import materialize
from peftc.program import Program
from peftc.prompt_cache import FILE, PromptCache
from peftc.proof import differences
from peftc.virtual import DONE, VirtualTokens

BOUND = 1e-5  # fp32 rounding of sums in another order
SAMPLES, LENGTH = 2, 8  # of the tokens that the proof runs


def to_cache(program: Program, target: str | Path, *, overwrite: bool = False) -> Artifact:
    """Computes the keys and values of a prompt's tokens once, proves them, and publishes them.

    They are computed in fp32 and rounded once, to the model's dtype. Read them by
    `peftc.PromptCache.open`.

    Args:
        program: A causal decoder with a prompt, and no other adapter.
        target: A directory that does not exist.
        overwrite: Replace an artifact that peftc wrote there.

    Raises:
        ArtifactError: There is no prompt, or no cache that it could become.
        ProofError: From the cache the model gives other logits.
    """
    model: Any = materialize(program, dtype=torch.float32)
    tokens = getattr(type(model), "virtual_tokens", None)
    obstacle = _obstacle(program, model, tokens)
    if obstacle is not None or tokens is None:
        raise ArtifactError(obstacle or "", where=str(target), fix="write it with --format peft")
    with torch.no_grad():
        cache, figures = _computed(model, tokens)
    if not figures["relative_error"] <= BOUND:
        raise ProofError(
            f"from the cache the logits differ by {figures['relative_error']:.2e} of their largest "
            f"value (bound {BOUND:g})",
            where=str(target),
            fix="the model's state is more than its keys and values: write it with --format peft",
        )
    dtype = program.constants[f"{program.embedding}.weight"].spec.dtype
    tensors = {
        f"{i}.{name}": tensor.to(dtype).contiguous()
        for i, pair in enumerate(cache.layers)
        for name, tensor in zip(("key", "value"), pair, strict=True)
    }
    need = sum(tensor.nbytes for tensor in tensors.values())
    numbering = None if cache.numbering is None else vars(cache.numbering)
    key = key_of(program.fingerprint, "cache", numbering)
    with staging(
        Path(target), key=key, need=need, sources=folders(program), overwrite=overwrite
    ) as stage:
        stage.add(FILE, save(tensors, metadata={"format": "pt"}))
        proof = {"whole": {"input": "random token ids, seed 0", "bound": BOUND, **figures}}
        stage.publish(manifest(program, "cache", numbering=numbering, proof=proof))
    return Artifact.open(Path(target))


def _obstacle(program: Program, model: nn.Module, tokens: VirtualTokens | None) -> str | None:
    """Why there is nothing to write, if so."""
    if tokens is None:
        return "the program carries no prompt"
    if len(program.adapters) > 1:
        return "the keys and values would be those of other adapters too: fold these first"
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "its prompt goes before an encoder, which keeps no keys and values"
    if "past_key_values" not in signature(model.forward).parameters:
        return "the model keeps no keys and values"
    if getattr(model, "_is_stateful", False):
        return "the model's state is more than keys and values"
    return None


def _computed(model: Any, tokens: VirtualTokens) -> tuple[PromptCache, dict[str, float]]:
    """The cache, and how much logits from it differ from those of the virtual tokens."""
    from transformers import DynamicCache

    numbered = "position_ids" in signature(model.forward).parameters
    none = torch.zeros(1, 0, dtype=torch.int64)
    filled = model(input_ids=none, past_key_values=DynamicCache(), use_cache=True).past_key_values
    layers = tuple((layer.keys, layer.values) for layer in filled.layers)
    cache = PromptCache(layers, tokens.numbering if numbered else None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tokens.first, (SAMPLES, LENGTH), generator=generator)
    want = model(input_ids=ids).logits[:, tokens.count :]
    got = model(**cache.before(model, ids), **{DONE: True}).logits
    return cache, differences(want, got)
