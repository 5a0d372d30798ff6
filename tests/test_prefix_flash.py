"""A prefix under flash attention, whose kernel is played by a plain function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor, nn

from peftc import Pipeline, capture, materialize
from peftc.errors import PassError
from peftc.passes.prefix_tuning import PrefixTuning
from peftc.prefixes import MARK

from .conftest import SMALL, MakeCheckpoint, distance


def fresh(base: Path | nn.Module) -> Any:
    return Pipeline([PrefixTuning(virtual_tokens=5)]).run(capture(base))


def text(side: str = "none") -> dict[str, Tensor]:
    """Two texts, of which the first is padded at a side."""
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if side != "none":
        mask[0, slice(None, 3) if side == "left" else slice(-3, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def plain_flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any, causal: Any) -> Tensor:
    """(batch, length, heads, size); the triangle ends at the last key, as flash attention's."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    every = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask = every.tril(k.shape[2] - q.shape[2]) if causal else every
    y = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale)
    return y.transpose(1, 2)


def plain_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: Any,
    max_seqlen_k: Any, softmax_scale: Any = None, causal: Any = False,
) -> Tensor:  # fmt: skip
    cuts = [x.tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
    parts = []
    for a, b, c, d in zip(cuts[0], cuts[0][1:], cuts[1], cuts[1][1:], strict=False):
        one = plain_flash(q[None, a:b], k[None, c:d], v[None, c:d], softmax_scale, causal)
        parts.append(one[0])
    return torch.cat(parts)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_flash_attention_sees_the_prefix(
    side: str, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = set()

    def imported(name: str, *args: Any, **options: Any) -> Any:
        asked.add(name)
        process = flash._lazy_define_process_function(plain_varlen)
        pads = flash._pad_input, flash._unpad_input
        return (plain_flash, plain_varlen, None, *pads), (process, process)

    model: Any = materialize(fresh(checkpoint("llama")))
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    seen = text(side)["attention_mask"].bool()
    with torch.no_grad():
        want = model(**text(side)).logits[seen]
        tokens = model.generate(**text(side), **options)
        monkeypatch.setattr(flash, "lazy_import_flash_attention", imported)
        model.config._attn_implementation_internal = f"{MARK}flash_attention_2"
        got = model(**text(side)).logits[seen]
        if side != "right":  # from which no one generates
            assert torch.equal(model.generate(**text(side), **options), tokens)
    assert asked == {"flash_attention_2"}
    assert distance(got, want) < 1e-5


def test_flash_attention_is_refused_when_a_window_slides() -> None:
    config = transformers.Gemma3TextConfig(
        **SMALL, num_key_value_heads=2, head_dim=12, sliding_window=32
    )
    model: Any = materialize(fresh(transformers.Gemma3ForCausalLM(config)))
    model.config._attn_implementation_internal = f"{MARK}flash_attention_2"
    with pytest.raises(PassError, match="sliding window"):
        model(**text())
