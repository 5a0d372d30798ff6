"""The proof: an artifact compared by number with what it came from.

Per site: on random input, the output of the site as it was before folding against that of the
weights that were written, as rounded. It takes the memory of a few rows, so it holds for any model,
and an export does it while the rows are still in the cache. Whole: the logits of the unfolded model
against those of the artifact loaded by transformers, both computed in fp32.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from peftc.capturing import CheckpointSource, capture
from peftc.checkpoint import Checkpoint
from peftc.constants import Leaf, Packed
from peftc.errors import ProofError
from peftc.evaluate import chunks, single_threaded, value
from peftc.four_bit import parts_of
from peftc.link import Watcher
from peftc.live import materialize
from peftc.outline import architecture
from peftc.program import Program
from peftc.reading import read
from peftc.roles import example_inputs
from peftc.storage import packed_weights
from peftc.witness import witness

Extent = Literal["auto", "sites", "whole"]
SITE_BOUND = {torch.float32: 1e-5}  # other dtypes: one spacing of the dtype, finfo.eps
WHOLE_BOUND = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
AUTO_BYTES = 1 << 30  # the fp32 size up to which `auto` compares whole models
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n",
    "Parameter-efficient fine-tuning changes few weights of a large model.",
)


def watcher(program: Program) -> Callable[[str], Watcher | None]:
    """What the linker asks for the witness of a stored tensor."""
    weights = {old.site.name("weight"): fqn for fqn, old in program.unfolded.items()}

    packed = packed_weights(program)

    def watch(key: str) -> Watcher | None:
        if key not in program.stored:  # a part of a quantized weight
            weight, dot, part = key.rpartition(".")
            return Finite(weight) if dot and part in ("absmax", "nested_absmax") else None
        fqn = None if key in packed else weights.get(program.stored[key])
        return None if fqn is None else witness(program, fqn, program.parts.get(key))

    return watch


class Finite:
    """Sees the absmax of a quantized weight, in which a NaN or an infinity of the weight shows."""

    def __init__(self, weight: str) -> None:
        self.weight = weight

    def see(self, low: int, high: int, rows: torch.Tensor) -> None:
        """Takes some absmax.

        Raises:
            ProofError: One is not finite.
        """
        if rows.is_floating_point() and not bool(rows.isfinite().all()):
            raise ProofError(
                "holds a NaN or an infinity, which no 4-bit code stands for",
                where=self.weight,
                fix="nothing was published; repair the weight, or exclude its layer from nf4",
            )

    def result(self) -> None:
        """There is nothing to judge later."""


def watch_file(program: Program, checkpoint: Checkpoint) -> dict[str, Any]:
    """The same measurements from a written checkpoint.

    Raises:
        ProofError: Parts of a quantized weight are not those of the program.
    """
    measured: dict[str, Any] = {}
    watch = watcher(program)
    for key in program.stored:
        constant = program.written(key)
        if isinstance(constant, Packed):
            _compare_parts(key, constant, checkpoint)
        if (seer := watch(key)) is None:
            continue
        leaf = Leaf(checkpoint.tensors[key])
        for low, high in chunks(leaf.spec.shape):
            seer.see(low, high, read(leaf, low, high))
        measured[key] = seer.result()
    return measured


def _compare_parts(key: str, packed: Packed, checkpoint: Checkpoint) -> None:
    for suffix, part in packed.parts.items():
        if isinstance(part, Leaf):
            continue  # copied as it was; the files' hashes hold it
        written = checkpoint.tensors.get(key + suffix)
        if written is None or not torch.equal(read(Leaf(written)), value(part)):
            raise ProofError(
                "is not what the program makes of its weight",
                where=key + suffix,
                fix="export again; the figures of this artifact do not hold",
            )


def site_proof(program: Program, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Judges what the witnesses measured.

    Raises:
        ProofError: A site differs by more than its dtype's rounding explains.
    """
    worst: dict[str, Any] = {"relative_error": 0.0, "at": None, "bound": None}
    measured = {key: seen for key, seen in measured.items() if seen is not None}
    for key, seen in measured.items():
        dtype = program.written(key).spec.dtype
        bound = SITE_BOUND.get(dtype, torch.finfo(dtype).eps)
        relative = seen["error"] / max(seen["largest"], torch.finfo(torch.float32).tiny)
        if not relative <= bound:
            raise ProofError(
                f"differs from what it came from by {relative:.2e} of its largest value (bound "
                f"{bound:.2e})",
                where=key,
                fix="nothing was published; look for weights that overflow "
                f"{str(dtype).removeprefix('torch.')}",
            )
        if relative >= worst["relative_error"]:
            worst = {"relative_error": relative, "at": key, "bound": bound}
    return {"sites": len(measured), **worst}


def wants_whole(program: Program, extent: Extent) -> bool:
    """Whether to compare whole models, by the caller's wish or the model's size."""
    touched = any(program.touched(fqn) for fqn in program.stored.values())
    rewritten = bool(program.source.edited()) or touched
    known = isinstance(program.source, CheckpointSource)
    return known and rewritten and affords_whole(program, extent)


def affords_whole(program: Program, extent: Extent) -> bool:
    """Whether whole models are to be loaded for a proof."""
    live = set(program.stored.values())
    count = sum(torch.Size(program.constants[f].spec.shape).numel() for f in live)
    return extent == "whole" or (extent == "auto" and 4 * count <= AUTO_BYTES)


@single_threaded()
def whole_proof(program: Program, written: Path) -> dict[str, Any]:
    """Compares the logits of the unfolded program and of a written checkpoint.

    Raises:
        ProofError: They differ by more than the bound of the weights' dtype.
    """
    checkpoint = Checkpoint.open(written)
    model = materialize(unfold(program), dtype=torch.float32)
    inputs, origin = _inputs(model, written)
    if inputs is None:
        return {"skipped": origin}
    try:
        want = _logits(model, inputs)
    except Exception as error:  # the model's own code, which may need more than is known of it
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        return {"skipped": f"it does not run on sample input ({said}); each site was compared"}
    del model
    gc.collect()
    got = _logits(loaded(checkpoint), inputs)
    figures = differences(want, got)
    relative = figures["relative_error"]
    dtypes = {program.constants[f].spec.dtype for f in program.stored.values()}
    bound = max(WHOLE_BOUND.get(dtype, 0.0) for dtype in dtypes)
    if not relative <= bound:
        raise ProofError(
            f"the whole model's output differs from what it came from by {relative:.2e} of its "
            f"largest value (bound {bound:g})",
            where=str(written),
            fix="nothing was published; export with --proof sites to find the layer",
        )
    return {"input": origin, "bound": bound, **figures}


def differences(want: torch.Tensor, got: torch.Tensor) -> dict[str, float]:
    """How much logits (…, classes) differ from others, by every measure that a proof names."""
    difference = (got - want).abs()
    log_want, log_got = want.log_softmax(-1), got.log_softmax(-1)
    return {
        "relative_error": float(difference.max() / want.abs().max()),
        "largest_error": float(difference.max()),
        "mean_error": float(difference.mean()),
        "kl": float((log_want.exp() * (log_want - log_got)).sum(-1).mean()),
        "top1_agreement": float((want.argmax(-1) == got.argmax(-1)).float().mean()),
    }


def loaded(checkpoint: Checkpoint) -> nn.Module:
    """A written model in fp32; a quantized one by peftc, since bitsandbytes may not be there."""
    if parts_of(checkpoint.tensors):
        return materialize(capture(checkpoint.path), dtype=torch.float32)
    model: Any = architecture(checkpoint).from_pretrained(
        checkpoint.path, dtype=torch.float32, local_files_only=True, use_safetensors=True,
        trust_remote_code=False,
    )  # fmt: skip
    module: nn.Module = model.eval()
    return module


def unfold(program: Program) -> Program:
    """The program with every folded site as it was before."""
    sites = [old.site for old in program.unfolded.values()]
    constants = {
        old.site.name(local): constant
        for old in program.unfolded.values()
        for local, constant in old.constants.items()
    }
    return replace(program.rewrite(sites, constants), unfolded={})


def _inputs(model: nn.Module, path: Path) -> tuple[dict[str, torch.Tensor] | None, str]:
    """Token ids, by the model's own tokenizer where there is one, and random input of other kinds.

    Returns:
        The input, or None, and where it comes from, or why there is none.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(given.shape, generator=generator) if given.is_floating_point() else given
        for name, given in example_inputs(model).items()
    }
    if not inputs:
        return None, "no sample input is known for such a model; each site was compared"
    words = [name for name in ("input_ids", "decoder_input_ids") if name in inputs]
    if set(inputs) - set(words):
        return inputs, "random input, seed 0"
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        rows = [tokenizer(text)["input_ids"] for text in TEXTS]
        length = min(len(row) for row in rows)
        ids, origin = torch.tensor([row[:length] for row in rows]), "tokenized text"
        assert length
    except Exception:  # any tokenizer that does not load is no obstacle to a proof
        config: Any = model.config
        size = config.get_text_config().vocab_size
        ids = torch.randint(0, size, (3, 12), generator=generator)
        origin = "random token ids, seed 0"
    return dict.fromkeys(words, ids), origin


def _logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    first = output[0]
    assert isinstance(first, torch.Tensor)
    return first.float()
