"""Whole-model graphs: what is captured once stands for layers that are alike, and for no others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

from peftc import capture
from peftc.capturing import CheckpointSource
from peftc.errors import CaptureError
from peftc.evaluate import value
from peftc.program import Program
from peftc.repeated import Stack, shorten
from peftc.whole import Whole, capture_whole

from .conftest import SMALL, MakeCheckpoint, auto

BATCH, PAST, NOW = 3, 7, 4  # the capture has 2, 5 and 3


def save(path: Path, cls: str, config: str, **options: Any) -> Path:
    torch.manual_seed(3)
    model = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {**SMALL, "num_key_value_heads": 2, "num_hidden_layers": 5}
    return save(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", "LlamaConfig", **options)


class Run(fx.Interpreter):
    """A whole graph in torch, on a program's constants."""

    def __init__(self, program: Program, whole: Whole) -> None:
        super().__init__(nn.Module(), graph=whole.graph)
        self.program, self.whole = program, whole

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        if target in self.whole.held:
            return self.whole.held[target]
        return value(self.program.constants[target])


def results(program: Program, whole: Whole, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    returned = Run(program, whole).run(*(given[port.name] for port in whole.inputs))
    return dict(zip((port.name for port in whole.outputs), returned, strict=True))


def example(whole: Whole, past: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Left-padded text, behind a past where one is given."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(BATCH, PAST + NOW, dtype=torch.int64)
    mask[1, :2] = 0
    ids = torch.randint(0, 97, mask.shape, generator=generator)
    given = {
        "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(0),
    }  # fmt: skip
    if past is not None:
        given |= {name: given[name][:, PAST:] for name in ("input_ids", "position_ids")}
        given |= past
    for port in whole.inputs:
        if "past" in port.dims and past is None:
            given[port.name] = torch.zeros(BATCH, port.dims[1], 0, port.dims[3])  # type: ignore
    return given


def test_graph_computes_the_model_s_logits_with_and_without_a_past(llama: Path) -> None:
    program = capture(llama)
    (whole,) = capture_whole(program)
    given = example(whole)
    model = auto(llama)
    with torch.no_grad():
        want = model(**{k: v for k, v in given.items() if "past" not in k}).logits
        at_once = results(program, whole, given)
        first = {name: x[:, :PAST] if x.dim() == 2 else x for name, x in given.items()}
        before = {
            name.replace("present.", "past_key_values."): x
            for name, x in results(program, whole, first).items() if "present" in name
        }  # fmt: skip
        later = results(program, whole, example(whole, before))
    torch.testing.assert_close(at_once["logits"], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(later["logits"], want[:, PAST:], rtol=1e-5, atol=1e-5)


def test_layers_that_are_alike_are_captured_twice_and_cloned(llama: Path) -> None:
    program = capture(llama)
    (whole,) = capture_whole(program)
    assert whole.captured == {"model.layers": (2, 5)}
    named = {str(n.target) for n in whole.graph.nodes if n.op == "get_attr"}
    stored = {f for f in program.stored.values()}
    assert named - set(whole.held) == stored
    modules = {str(n.meta["module"]) for n in whole.graph.nodes if n.op == "call_function"}
    assert "model.layers.4.self_attn.q_proj" in modules
    assert [p.name for p in whole.inputs][-1] == "past_key_values.4.value"
    assert whole.outputs[-1].dims == ("batch", 2, "past + sequence", 12)


def test_clones_are_the_graph_that_capturing_every_layer_gives(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = capture(llama)
    (cloned,) = capture_whole(program)
    monkeypatch.setattr("peftc.whole.shorten", lambda model: [])
    (every,) = capture_whole(program)

    def listing(whole: Whole) -> list[tuple[str, str, str]]:
        nodes = (n for n in whole.graph.nodes if n.op == "call_function")
        return [(str(n.target), str(n.meta["module"]), str(n.meta["val"])[:12]) for n in nodes]

    assert every.captured == {}
    assert [row[:2] for row in listing(cloned)] == [row[:2] for row in listing(every)]
    given = example(cloned)
    for name, x in results(program, every, given).items():
        assert torch.equal(results(program, cloned, given)[name], x), name


def test_layers_of_two_kinds_stand_for_their_own_only() -> None:
    config = transformers.Gemma3TextConfig(
        **{**SMALL, "num_hidden_layers": 8}, num_key_value_heads=2, head_dim=12, sliding_window=4,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2
        + ["full_attention", "sliding_attention"],
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(config)
    (stack,) = shorten(model)
    assert stack == Stack(
        "model.layers", kept=(0, 1, 2, 5), stands=(0, 1, 2, 1, 1, 3, 3, 1), alike=((0, 1), (2, 3))
    )
    assert len(model.model.layers) == 4
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert model.config.layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 2


def test_every_layer_is_captured_when_alike_ones_compute_another_way(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers whose forward looks at their number: their modules are the same, their graphs not."""
    layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    plain = layer.forward

    def forward(self: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        out = plain(self, hidden_states, **options)
        assert isinstance(out, Tensor)
        return out * 2 if self.self_attn.layer_idx == 1 else out

    monkeypatch.setattr(layer, "forward", forward)
    program = capture(llama)
    (whole,) = capture_whole(program)
    assert whole.captured == {}
    given = example(whole)
    with torch.no_grad():
        want = auto(llama)(**{k: v for k, v in given.items() if "past" not in k}).logits
        got = results(program, whole, given)["logits"]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_no_weight_is_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    program = capture(llama)
    monkeypatch.setattr("peftc.reading.read", refuse)
    monkeypatch.setattr(CheckpointSource, "instantiate", refuse)
    (whole,) = capture_whole(program)
    assert set(whole.held) == {"model.rotary_emb.inv_freq"}


def test_state_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    options = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8}
    path = save(tmp_path / "mamba", "MambaForCausalLM", "MambaConfig", **options)
    with pytest.raises(CaptureError) as caught:
        capture_whole(capture(path))
    assert caught.value.where and caught.value.fix


def test_live_module_is_refused() -> None:
    with pytest.raises(CaptureError, match="live module"):
        capture_whole(capture(nn.Sequential(nn.Linear(3, 3))))


def test_failing_module_is_named(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = transformers.models.llama.modeling_llama.LlamaMLP

    def forward(self: Any, x: Tensor) -> Tensor:
        return x if x.max() > 0 else -x

    monkeypatch.setattr(mlp, "forward", forward)
    with pytest.raises(CaptureError, match="cannot capture it") as caught:
        capture_whole(capture(checkpoint("llama")))
    assert caught.value.where == "LlamaMLP"
