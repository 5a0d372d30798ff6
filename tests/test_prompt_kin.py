"""PEFT's other virtual tokens: CPT, multitask prompts, cartridges are read; the rest is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftc import materialize, to_peft
from peftc.errors import AdapterError

from .conftest import MakeCheckpoint, auto, distance
from .helpers import refuse
from .prompting import N, attached, batch, checkpoint_of, generated

MULTITASK = {"num_virtual_tokens": N, "num_ranks": 2}
KIN: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "CPT": (
        peft.CPTConfig,
        {"cpt_token_ids": [5, 6, 7, 8, 9], "cpt_tokens_type_mask": [1, 2, 3, 3, 4]},
    ),
    "multitask": (peft.MultitaskPromptTuningConfig, MULTITASK),
    "cartridge": (peft.CartridgeConfig, {"num_virtual_tokens": N, "num_frozen_tokens": 2}),
}


def saved(name: str, base: Path, folder: Path, **options: Any) -> Any:
    """A trained adapter of PEFT's, as it is after `save_pretrained`."""
    make, own = KIN[name]
    wrapped = peft.get_peft_model(auto(base), make(task_type="CAUSAL_LM", **own, **options)).eval()
    torch.manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", KIN)
def test_output_equals_pefts(
    name: str, padding: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base, inputs = checkpoint(), batch(padding)
    theirs = saved(name, base, tmp_path / "theirs")
    asked: dict[str, dict[str, Any]] = {
        "multitask": {"task_ids": torch.tensor([0, 0])},
        "CPT": {"labels": None},
    }
    more = asked.get(name, {})
    program = attached(base, tmp_path / "theirs")
    ours: Any = materialize(program)
    with torch.no_grad():
        want, got = theirs(**inputs, **more).logits, ours(**inputs).logits
        assert distance(got, want) <= 1e-6
        assert distance(auto(base)(**inputs).logits[:, -9:], want[:, -9:]) > 1e-2
        to_peft(program, tmp_path / "ours")  # as the plain method that it is of
        back = peft.PeftModel.from_pretrained(auto(base), tmp_path / "ours").eval()
        assert distance(back(**inputs).logits, want) <= 1e-6
    assert torch.equal(
        generated(ours, inputs, cache_implementation="static"), generated(back, inputs)
    )


def test_multitask_prompt_before_a_decoder_too_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    base = checkpoint_of("t5", tmp_path_factory.mktemp)
    config = peft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", **MULTITASK)
    peft.get_peft_model(auto(base), config).save_pretrained(tmp_path)
    refuse(tmp_path, AdapterError, lambda _: attached(base, tmp_path), "before the decoder")


def test_prompts_of_several_tasks_are_refused(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    saved("multitask", checkpoint(), tmp_path, num_tasks=3)
    job = lambda _: attached(checkpoint(), tmp_path)  # noqa: E731
    refuse(tmp_path, AdapterError, job, "prompts of 3 tasks", "EXACT_SOURCE_TASK")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {k: x for k, x in t.items() if k != "prefix_task_rows"},
        lambda t: {**t, "prefix_task_rows": torch.zeros(1, 3, 48)},
        lambda t: {**t, "prefix_task_cols": torch.zeros(1)},
        lambda t: {k: x for k, x in t.items() if k != "prompt_embeddings"},
        lambda t: {**t, "more": torch.zeros(1)},
    ],
    ids=["lost", "rank", "flat", "no-prompt", "more"],
)
def test_damaged_multitask_prompt_is_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    saved("multitask", checkpoint(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    refuse(tmp_path, AdapterError, lambda _: attached(checkpoint(), tmp_path))


def test_llama_adapter_is_refused_by_name(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)
    peft.get_peft_model(auto(checkpoint()), config).save_pretrained(tmp_path)
    words = "ADAPTION_PROMPT", "PREFIX_TUNING", "CARTRIDGE"
    refuse(tmp_path, AdapterError, lambda _: attached(checkpoint(), tmp_path), *words)
