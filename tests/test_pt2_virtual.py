"""Prompts and prefixes in compiled models: constant keys and values that no cache holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc import ConstantCache, PrefixTuning, materialize
from peftc.errors import ArtifactError
from peftc.runtime import load

from .conftest import MakeCheckpoint
from .prompting import N, injected
from .test_constant_cache import with_lora

PREFIX = PrefixTuning(virtual_tokens=N, adapter="p")
IDS = torch.tensor([[5, 17, 3, 29, 8], [31, 2, 44, 12, 9]])


@pytest.fixture(scope="module")
def program(checkpoint: MakeCheckpoint) -> peftc.Program:
    return injected(checkpoint("llama"), PREFIX)


@pytest.fixture(scope="module")
def path(program: peftc.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peftc.to_pt2(program, tmp_path_factory.mktemp("prefix") / "out").path


def test_text_is_the_live_tuned_model_s_with_padding_too(
    path: Path, program: peftc.Program
) -> None:
    runtime, live = load(path), materialize(program)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    want: Any = live.generate(IDS, attention_mask=mask, **options)  # type: ignore[operator]
    got = runtime.generate(IDS, 20, mask=mask, stop=[])
    assert got.tolist() == want[:, IDS.shape[1] :].tolist()
    assert runtime.told["limits"] == {"past + sequence": 64 - N}
    plain = materialize(peftc.capture(path)).generate(IDS, **options)  # type: ignore[operator]
    assert got.tolist() != plain[:, IDS.shape[1] :].tolist()


def test_directory_says_what_is_before_texts_and_its_proof_is_repeated(path: Path) -> None:
    assert ConstantCache.open(path).tokens == N
    assert peftc.verify(path)["pt2"]["model"]["relative_error"] < 1e-5


def test_a_lora_that_is_not_merged_is_refused_beside_a_prefix(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    program = with_lora(checkpoint("llama"), PREFIX)
    with pytest.raises(ArtifactError, match="still carries the adapter l"):
        peftc.to_pt2(program, tmp_path / "out")
