"""What alike layers take, played from a few of them, against a step of the whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from peftc import Lora, Pass, Program, capture
from peftc.capturing import without_files
from peftc.footprint import Step, _measured, footprint
from peftc.passes.adalora import AdaLora
from peftc.passes.nf4 import Nf4
from peftc.passes.prefix_tuning import PrefixTuning
from peftc.passes.prompt_tuning import PromptTuning
from peftc.repeated import Unlike
from peftc.replay import Span, peak, played
from tests.test_planning import ALL, applied

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **{**SIZES, "num_hidden_layers": 12},
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 6,
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_heads=4,
            num_layers=6,
            num_decoder_layers=7,
            vocab_size=100,
        )
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16
        )
    ),
}
CASES: dict[str, tuple[str, list[Pass], Step]] = {
    "full": ("llama", [], Step(2, 16)),
    "lora": ("llama", [Lora(rank=8, **ALL)], Step(2, 16)),
    "lora-checkpointing": ("llama", [Lora(rank=8, **ALL)], Step(2, 16, checkpointing=True)),
    "adalora-autocast": ("llama", [AdaLora(**ALL)], Step(2, 16, precision="bf16")),
    "qlora": ("llama", [Nf4(), Lora(rank=4, targets="role:query,value")], Step(2, 16)),
    "prompt": ("llama", [PromptTuning(virtual_tokens=4)], Step(2, 16)),
    "prefix": ("llama", [PrefixTuning(virtual_tokens=4)], Step(2, 16)),
    "two-kinds": ("gemma3", [Lora(rank=8, **ALL)], Step(2, 16)),
    "two-lists": ("t5", [Lora(rank=8, **ALL)], Step(2, 16)),
    "experts": ("qwen3_moe", [], Step(2, 16)),
}


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {}


def program_of(name: str, programs: dict[str, Program]) -> Program:
    if name not in programs:
        programs[name] = capture(MODELS[name]())
    return programs[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_played_step_is_that_of_every_layer(name: str, programs: dict[str, Program]) -> None:
    model, passes, step = CASES[name]
    program = applied(program_of(model, programs), *passes)
    played, whole = (_measured(program, step, short) for short in (True, False))
    assert replace(played, peak=whole.peak) == whole
    assert played.peak == pytest.approx(whole.peak, rel=1e-5)  # of Gemma's 4.6 MB 16 bytes lack


@pytest.mark.parametrize("layers", [[3, 4], [2]])
def test_every_layer_is_run_when_alike_ones_differ_in_gradients(
    layers: list[int], programs: dict[str, Program]
) -> None:
    program = applied(program_of("llama", programs), Lora(rank=2, layers=layers, **ALL))
    with pytest.raises(Unlike):
        _measured(program, Step(1, 8), short=True)
    assert footprint(program, Step(1, 8)) == _measured(program, Step(1, 8), short=False)


def test_peak_is_the_highest_rise() -> None:
    spans = [Span(None, False, 0, 5, 3), Span("a", False, 0, 9, -1), Span(None, False, 0, 2, 0)]
    assert peak(spans) == 12
    with pytest.raises(KeyError):
        played(spans, [])


def test_program_without_files_takes_what_the_whole_one_does(tmp_path: Path) -> None:
    model: Any = MODELS["qwen3_moe"]()
    model.save_pretrained(tmp_path)
    program = capture(tmp_path)
    assert program.parts
    choices: list[list[Pass]] = [[Lora(rank=2)], [Nf4(double_quant=True), Lora(rank=2)]]
    for passes in choices:
        known = footprint(applied(program, *passes), Step(1, 8))
        bare = without_files(program)
        assert not bare.parts and not bare.source.checkpoint.files  # type: ignore[attr-defined]
        assert footprint(applied(bare, *passes), Step(1, 8)) == known
