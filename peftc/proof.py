"""The proof: an artifact compared by number with what it came from.

Per site: on random input, the output of the site as it was before folding against that of the
weights that were written, as rounded. It takes the memory of a few rows, so it holds for any model,
and an export does it while the rows are still in the cache. Whole: the logits of the unfolded model
against those of the artifact loaded by transformers, both computed in fp32.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from peftc.capturing import CheckpointSource
from peftc.checkpoint import Checkpoint
from peftc.constants import Leaf
from peftc.errors import ProofError
from peftc.evaluate import Evaluation, chunks, read, value
from peftc.link import Watcher
from peftc.live import materialize
from peftc.outline import architecture
from peftc.program import Program

Extent = Literal["auto", "sites", "whole"]
SAMPLES = 1  # of random input to a site: any wrong weight shows in any Gaussian sample
SITE_BOUND = {torch.float32: 1e-5}  # other dtypes: one spacing of the dtype, finfo.eps
WHOLE_BOUND = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
AUTO_BYTES = 1 << 30  # the fp32 size up to which `auto` compares whole models
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n",
    "Parameter-efficient fine-tuning changes few weights of a large model.",
)


class SiteWitness:
    """Compares one folded site with what it was, from the pieces of the weight as written."""

    def __init__(self, program: Program, fqn: str) -> None:
        old = program.unfolded[fqn]
        seed = int.from_bytes(hashlib.sha256(f"proof {fqn}".encode()).digest()[:7], "little")
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(SAMPLES, old.site.in_features, generator=generator)
        self.want = Evaluation(old.site.graph, old.constants, self.x)
        self.transposed = old.site.kind.transposed
        bias = program.constants.get(f"{fqn}.bias")
        self.bias = None if bias is None else value(bias).float()
        self.sum = torch.zeros(SAMPLES, old.site.out_features) if self.transposed else None
        self.error, self.largest = 0.0, 0.0

    def see(self, low: int, high: int, rows: torch.Tensor) -> None:
        """Takes rows low to high of the stored weight."""
        if self.sum is not None:
            self.sum += self.x[:, low:high] @ rows.float()
            return
        bias = None if self.bias is None else self.bias[low:high]
        got = nn.functional.linear(self.x, rows.float(), bias)
        self._compare(got, self.want.rows(low, high))

    def result(self) -> dict[str, float]:
        """The largest difference, and the largest value that it is to be seen against."""
        if self.sum is not None:
            got = self.sum if self.bias is None else self.sum + self.bias
            self._compare(got, self.want.whole())
        return {"error": self.error, "largest": self.largest}

    def _compare(self, got: torch.Tensor, want: torch.Tensor) -> None:
        # A NaN must not be lost in a maximum.
        difference = float((got - want).abs().max())
        self.error = max(self.error, difference if difference == difference else float("inf"))
        self.largest = max(self.largest, float(want.abs().max()))


def watcher(program: Program) -> Any:
    """What the linker asks for a tensor's witness."""

    def watch(fqn: str) -> Watcher | None:
        owner, _, leaf = fqn.rpartition(".")
        if leaf != "weight" or owner not in program.unfolded:
            return None
        return SiteWitness(program, owner)

    return watch


def watch_file(program: Program, checkpoint: Checkpoint) -> dict[str, Any]:
    """The same measurements from a written checkpoint."""
    measured: dict[str, Any] = {}
    watch = watcher(program)
    for key, fqn in program.stored.items():
        if (witness := watch(fqn)) is None:
            continue
        leaf = Leaf(checkpoint.tensors[key])
        for low, high in chunks(leaf.spec.shape):
            witness.see(low, high, read(leaf, low, high))
        measured[fqn] = witness.result()
    return measured


def site_proof(program: Program, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Judges what the witnesses measured.

    Raises:
        ProofError: A site differs by more than its dtype's rounding explains.
    """
    worst: dict[str, Any] = {"relative_error": 0.0, "at": None, "bound": None}
    for fqn, seen in measured.items():
        dtype = program.constants[fqn].spec.dtype
        bound = SITE_BOUND.get(dtype, torch.finfo(dtype).eps)
        relative = seen["error"] / max(seen["largest"], torch.finfo(torch.float32).tiny)
        if not relative <= bound:
            raise ProofError(
                f"differs from what it came from by {relative:.2e} of its largest value (bound "
                f"{bound:.2e})",
                where=fqn,
                fix="nothing was published; look for weights that overflow "
                f"{str(dtype).removeprefix('torch.')}",
            )
        if relative >= worst["relative_error"]:
            worst = {"relative_error": relative, "at": fqn, "bound": bound}
    return {"sites": len(measured), "samples": SAMPLES, **worst}


def wants_whole(program: Program, extent: Extent) -> bool:
    """Whether to compare whole models, by the caller's wish or the model's size."""
    count = sum(
        torch.Size(program.constants[f].spec.shape).numel() for f in program.stored.values()
    )
    if not (isinstance(program.source, CheckpointSource) and program.unfolded):
        return False
    return extent == "whole" or (extent == "auto" and 4 * count <= AUTO_BYTES)


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
    want = _logits(model, inputs)
    del model
    gc.collect()
    loaded = architecture(checkpoint).from_pretrained(
        written, dtype=torch.float32, local_files_only=True
    )
    got = _logits(loaded.eval(), inputs)
    difference = (got - want).abs()
    relative = float(difference.max() / want.abs().max())
    log_want, log_got = want.log_softmax(-1), got.log_softmax(-1)
    kl = float((log_want.exp() * (log_want - log_got)).sum(-1).mean())
    agree = float((want.argmax(-1) == got.argmax(-1)).float().mean())
    dtypes = {program.constants[f].spec.dtype for f in program.stored.values()}
    bound = max(WHOLE_BOUND.get(dtype, 0.0) for dtype in dtypes)
    if not relative <= bound:
        raise ProofError(
            f"the whole model's output differs from what it came from by {relative:.2e} of its "
            f"largest value (bound {bound:g})",
            where=str(written),
            fix="nothing was published; export with --proof sites to find the layer",
        )
    return {
        "input": origin,
        "relative_error": relative,
        "bound": bound,
        "largest_error": float(difference.max()),
        "mean_error": float(difference.mean()),
        "kl": kl,
        "top1_agreement": agree,
    }


def unfold(program: Program) -> Program:
    """The program with every folded site as it was before."""
    sites = [old.site for old in program.unfolded.values()]
    constants = {
        f"{fqn}.{local}": constant
        for fqn, old in program.unfolded.items()
        for local, constant in old.constants.items()
    }
    return replace(program.rewrite(sites, constants), unfolded={})


def _inputs(model: nn.Module, path: Path) -> tuple[dict[str, torch.Tensor] | None, str]:
    """Token ids, by the model's own tokenizer where there is one, and where they come from."""
    if getattr(model, "main_input_name", "") != "input_ids":
        return None, "the model takes no token ids; each site was compared"
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        rows = [tokenizer(text)["input_ids"] for text in TEXTS]
        length = min(len(row) for row in rows)
        ids, origin = torch.tensor([row[:length] for row in rows]), "tokenized text"
        assert length
    except Exception:  # any tokenizer that does not load is no obstacle to a proof
        generator = torch.Generator().manual_seed(0)
        config: Any = model.config
        size = config.get_text_config().vocab_size
        ids = torch.randint(0, size, (3, 12), generator=generator)
        origin = "random token ids, seed 0"
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs, origin


def _logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    first = output[0]
    assert isinstance(first, torch.Tensor)
    return first.float()
