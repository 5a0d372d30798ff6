"""Bottleneck adapters: AdapterHub's equations and directories, modules that stay themselves."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from peftc import (
    Attach,
    Fold,
    Lora,
    Merge,
    Pipeline,
    Program,
    absorb,
    apply,
    capture,
    export,
    materialize,
    to_adapterhub,
    to_peft,
    verify,
)  # fmt: skip
from peftc.adapterhub import prefixes
from peftc.errors import AdapterError, ArtifactError, FoldError, PeftcError
from peftc.graphs import Builder, intern
from peftc.passes.bottleneck import Bottleneck
from peftc.roles import trace
from peftc.surrounding import surround

from .bottleneck_reference import Reference
from .conftest import ARCHITECTURES, MakeCheckpoint, auto, distance, logits

IDS = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(3))
PRESETS = ("houlsby", "pfeiffer", "parallel")
BASES = ("bert", "gpt2", "llama")
# Beside the presets, what exercises every option that changes the arithmetic.
CASES: dict[str, dict[str, Any]] = {
    **{preset: {"preset": preset} for preset in PRESETS},
    "both": {"preset": "pfeiffer", "mh_adapter": True, "non_linearity": "gelu_new"},
    "residual_after": {"preset": "pfeiffer", "residual_before_ln": "false"},
    "post_add": {"preset": "pfeiffer", "residual_before_ln": "post_add"},
    "norms": {
        "preset": "houlsby", "ln_before": True, "ln_after": True, "scaling": "learned",
        "non_linearity": "leakyrelu",
    },
    "residual_in_norm": {
        "preset": "pfeiffer", "ln_after": True, "adapter_residual_before_ln": True,
        "scaling": "channel", "non_linearity": "tanh",
    },
    "parallel_both": {"preset": "parallel", "mh_adapter": True, "ln_after": True},
    "adapter_plus": {
        "preset": "pfeiffer", "original_ln_after": False, "residual_before_ln": "false",
        "scaling": "channel", "non_linearity": "gelu",
    },
}  # fmt: skip


def adapted(base: Path | nn.Module, seed: int = 0, **options: Any) -> Program:
    """A program with a bottleneck whose tensors are random, as after training."""
    options = {"reduction_factor": 4, "init": "bert", **options}
    program = Pipeline([Bottleneck(**options)]).run(capture(base))
    model = materialize(program)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return absorb(program, model)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", CASES)
def test_live_model_equals_adapterhub(
    base: str, case: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    if case == "post_add" and base != "bert":
        with pytest.raises(PeftcError, match="normalizes behind its sublayers"):
            adapted(checkpoint(base), **CASES[case])
        return
    program = adapted(checkpoint(base), **CASES[case])
    to_adapterhub(program, tmp_path / "hub")
    reference = auto(checkpoint(base))
    pass_ = Bottleneck(**{"reduction_factor": 4, **CASES[case]})
    Reference(reference, pass_, load_file(tmp_path / "hub" / "adapter.safetensors"))
    want = logits(reference)
    assert distance(logits(materialize(program)), want) < 1e-6
    assert distance(logits(auto(checkpoint(base))), want) > 1e-2
    again = Pipeline([Attach(path=str(tmp_path / "hub"))]).run(capture(checkpoint(base)))
    assert torch.equal(logits(materialize(again)), logits(materialize(program)))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("preset", PRESETS)
def test_fresh_adapter_changes_nothing_unless_its_start_does(
    base: str, preset: str, checkpoint: MakeCheckpoint
) -> None:
    plain = logits(auto(checkpoint(base)))
    fresh, drawn = (Bottleneck(preset=preset, init=init) for init in ("mam_adapter", "bert"))
    program = Pipeline([fresh]).run(capture(checkpoint(base)))
    assert program.journal[-1].effect == "identity"
    assert torch.equal(logits(materialize(program)), plain)
    program = Pipeline([drawn]).run(capture(checkpoint(base)))
    assert program.journal[-1].effect == "changes"
    assert 0 < distance(logits(materialize(program)), plain) < 0.5


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("preset", PRESETS)
def test_live_model_behaves_as_any_other(
    base: str, preset: str, checkpoint: MakeCheckpoint
) -> None:
    """Names, copies, checkpointing, compiling: the module is the one it was."""
    program = adapted(checkpoint(base), preset=preset)
    plain, model = auto(checkpoint(base)), materialize(program)
    want = logits(model)
    assert set(plain.state_dict()) <= set(model.state_dict())
    classes = {name: type(module) for name, module in plain.named_modules()}
    assert all(isinstance(model.get_submodule(name), cls) for name, cls in classes.items())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want)
        other.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
        assert torch.equal(logits(model), want)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert distance(logits(compiled), want) < 1e-6
    given = gradients(model)
    assert all(gradient.abs().sum() > 0 for gradient in given.values())
    for reentrant in (False, True):
        other = copy.deepcopy(model)
        other.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        other.enable_input_require_grads()  # type: ignore[operator]
        for module in other.train().modules():  # the same arithmetic, but for checkpointing
            for name in ("p", "dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        assert all(torch.equal(g, given[name]) for name, g in gradients(other).items())
        assert copy.deepcopy(other) is not other  # no tensor of the last pass is left in it


@pytest.mark.parametrize("preset", PRESETS)
def test_generation_is_the_same_with_a_cache(preset: str, checkpoint: MakeCheckpoint) -> None:
    model: Any = materialize(adapted(checkpoint("llama"), preset=preset))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    one, two = (model.generate(IDS[:, :4], use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(one, two)


def test_dropout_follows_the_mode_of_the_model(checkpoint: MakeCheckpoint) -> None:
    model = materialize(adapted(checkpoint("llama"), dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


class Point(NamedTuple):
    first: torch.Tensor
    second: int


@pytest.mark.parametrize(
    "shape",
    [
        lambda y: y,
        lambda y: (y, None),
        lambda y: [None, y],
        lambda y: {"y": y, "more": 1},
        lambda y: Point(y, 1),
        lambda y: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=y),
    ],
)
def test_first_tensor_is_replaced_whatever_holds_it(shape: Callable[[Any], Any]) -> None:
    class Module(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return shape(x + 1)

    build = Builder()
    x, y = build.input("x"), build.input("y")
    build.graph.output(build.add(x, build.mul(y, 2.0)))
    module, given = Module(), torch.zeros(2)
    surround(module, intern(build.graph))
    out, want = module(given), shape(torch.full((2,), 2.0))
    assert type(out) is type(want) and str(out) == str(want)


def test_module_without_its_stream_says_so(checkpoint: MakeCheckpoint) -> None:
    model: Any = materialize(adapted(checkpoint("llama"), preset="parallel"))
    with pytest.raises(RuntimeError, match="did not run before"):
        model.model.layers[0].mlp(torch.zeros(1, 2, 48))


class Pair(nn.Module):
    """Takes keywords, gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, *, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, str]:
        return self.inner(x) * scale, "more"


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        found: tuple[torch.Tensor, str] = self.pair(x=x, scale=2.0)
        return found


@pytest.mark.parametrize("is_parallel", [False, True])
def test_adapter_stands_behind_or_beside_a_named_module(is_parallel: bool) -> None:
    torch.manual_seed(0)
    plain, x = Outer(), torch.randn(3, 6)
    program = adapted(plain, targets=["pair"], is_parallel=is_parallel, width=6, scaling="0.5")
    model = materialize(program)
    own = {n.rpartition("adapter_")[2]: p for n, p in model.named_parameters() if "adapter_" in n}
    read = x if is_parallel else plain(x)[0]
    h = torch.relu(nn.functional.linear(read, own["down.default.weight"], own["down.default.bias"]))
    h = nn.functional.linear(h, own["up.default.weight"], own["up.default.bias"])
    y, more = model(x)
    assert distance(y, plain(x)[0] + 0.5 * h) < 1e-6 and more == "more"


@pytest.mark.parametrize("base", BASES)
def test_directories_lead_back_to_the_same_model(
    base: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    plain = capture(checkpoint(base))
    program = adapted(checkpoint(base), preset="houlsby", layers=[1])
    want = logits(materialize(program))
    to_peft(program, tmp_path / "peft")
    to_adapterhub(program, tmp_path / "hub")
    own = next(iter(prefixes(plain))).partition(".")[0]  # a base model's names lack this
    stored = load_file(tmp_path / "hub" / "adapter.safetensors")
    save_file(
        {k.removeprefix(f"{own}."): v for k, v in stored.items()},
        tmp_path / "hub" / "adapter.safetensors",
    )
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    config["config"]["leave_out"] = [0]
    (tmp_path / "hub" / "adapter_config.json").write_text(json.dumps(config))
    for form in ("peft", "hub"):
        again = Pipeline([Attach(path=str(tmp_path / form))]).run(plain)
        assert torch.equal(logits(materialize(again)), want)


def test_command_applies_verifies_and_exports(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    passes = [Bottleneck(preset="houlsby", init="bert"), Lora(rank=2, adapter="lora")]
    apply(checkpoint(), passes, tmp_path / "applied")
    assert verify(tmp_path / "applied")["adapters"] == ["default", "lora"]
    apply(checkpoint(), passes[:1], tmp_path / "alone")
    export(tmp_path / "alone", tmp_path / "hub", format="adapterhub")
    keys = load_file(tmp_path / "hub" / "adapter.safetensors")
    assert "model.layers.1.output_adapters.adapters.default.adapter_down.0.weight" in keys


def test_two_adapters_stand_one_behind_the_other(checkpoint: MakeCheckpoint) -> None:
    one = adapted(checkpoint(), preset="houlsby")
    both = Pipeline([Bottleneck(preset="parallel", adapter="b")]).run(one)
    assert torch.equal(logits(materialize(both)), logits(materialize(one)))
    assert len(both.adapters) == 2
    named = adapted(checkpoint(), targets=["self_attn", "mlp"], adapter="a")
    both = Pipeline([Bottleneck(preset="parallel", mh_adapter=True, init="bert")]).run(named)
    assert distance(logits(materialize(both)), logits(materialize(named))) > 1e-3
    behind = adapted(checkpoint("bert"), targets=["output.LayerNorm"], adapter="a")
    with pytest.raises(PeftcError, match="stands behind this normalization"):
        Pipeline([Bottleneck(preset="pfeiffer")]).run(behind)


def test_other_methods_do_not_see_the_modules(checkpoint: MakeCheckpoint) -> None:
    program = adapted(checkpoint(), preset="houlsby")
    assert Lora().pick(program)[0] == Lora().pick(capture(checkpoint()))[0]
    with pytest.raises(PeftcError, match="names a module that is no site"):
        Pipeline([Lora(targets=["mlp"], adapter="b")]).run(program)


def test_merging_is_refused_with_the_node_that_stands_in_the_way(
    checkpoint: MakeCheckpoint,
) -> None:
    program = adapted(checkpoint(), preset="houlsby")
    with pytest.raises(PeftcError, match=r"mlp: node .*aten\.silu.* not opened"):
        Pipeline([Merge()]).run(program)
    linear = adapted(checkpoint(), preset="houlsby", non_linearity="linear")
    with pytest.raises(PeftcError, match=r"mlp: node .* not opened"):
        Pipeline([Merge()]).run(linear)
    lora = Pipeline([Lora(rank=2, adapter="b"), Fold()]).run(program)
    assert set(lora.adapters) == {"default"}  # what folds is folded
    assert distance(logits(materialize(lora)), logits(materialize(program))) < 1e-5


@pytest.mark.parametrize("is_parallel", [False, True])
def test_adapter_without_nonlinearity_at_a_linear_layer_merges(
    is_parallel: bool, checkpoint: MakeCheckpoint
) -> None:
    base = checkpoint("gpt2")
    program = adapted(base, targets=["c_fc"], non_linearity="linear", is_parallel=is_parallel)
    merged = Pipeline([Merge()]).run(program)
    assert not merged.adapters
    assert distance(logits(materialize(merged)), logits(materialize(program))) < 1e-5
    with pytest.raises(PeftcError, match=r"c_fc: node .*aten\.relu"):
        Pipeline([Merge()]).run(adapted(base, targets=["c_fc"]))


@pytest.mark.parametrize("base", [*BASES, "opt", "qwen2"])
def test_sublayers_are_found_by_structure(base: str) -> None:
    cls, config, options = ARCHITECTURES[base]
    with torch.device("meta"):
        model = getattr(transformers, cls)(getattr(transformers, config)(**options))
    roles = trace(model)
    assert roles is not None
    assert [s.role for s in roles.sublayers] == ["attention", "feed_forward"] * 2
    assert all((s.norm is not None) == (base == "bert") for s in roles.sublayers)
    assert all(roles.features[s.exit][1] == 48 for s in roles.sublayers)


def refusals(base: Path, **options: Any) -> Iterator[PeftcError]:
    yield from Bottleneck(**options).check(capture(base))


def test_bad_input_is_a_typed_error(checkpoint: MakeCheckpoint) -> None:
    base = checkpoint()
    for options, words in (
        ({"targets": ["mlpp"]}, "matches no site"),
        ({"targets": ["mlp"], "layers": [7]}, "layer 7"),
        ({"layers": [7]}, "layer 7"),
        ({"leave_out": [0, 1]}, "no sublayer is left"),
        ({"mh_adapter": False, "output_adapter": False}, "no attention or feed-forward"),
        ({"targets": ["embed_tokens"], "is_parallel": True}, "no known number of features"),
    ):
        found = list(refusals(base, **options))
        assert found and all(error.fix for error in found), options
        assert any(words in str(error) for error in found), (options, found)
    with pytest.raises(PeftcError, match="kind linear, to which") as caught:
        Pipeline([Bottleneck(preset="parallel")]).run(capture(checkpoint("opt")))
    assert "houlsby" in str(caught.value)
    assert adapted(checkpoint("opt"), preset="houlsby").adapters
    with pytest.raises(PeftcError, match="no known number of features"):
        Pipeline([Bottleneck(targets=["pair"])]).run(capture(Outer()))
    with pytest.raises(PeftcError, match="an adapter named 'default' already"):
        Pipeline([Bottleneck()]).run(adapted(base))
    with pytest.raises(ValidationError, match="loses the model's residual"):
        Bottleneck(original_ln_after=False)


def test_damaged_directory_is_refused(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    plain, hub = capture(checkpoint()), tmp_path / "hub"
    to_adapterhub(adapted(checkpoint()), hub)
    (hub / "peftc.json").unlink()
    config = json.loads((hub / "adapter_config.json").read_text())
    tensors = load_file(hub / "adapter.safetensors")
    first = next(iter(tensors))

    def refuse(words: str, changed: dict[str, Any], given: dict[str, torch.Tensor]) -> None:
        content = {**config, "config": {**config["config"], **changed}}
        (hub / "adapter_config.json").write_text(json.dumps(content))
        save_file(given, hub / "adapter.safetensors")
        with pytest.raises(AdapterError, match=words) as caught:
            Pipeline([Attach(path=str(hub))]).run(plain)
        assert caught.value.fix

    refuse("inv_adapter", {"inv_adapter": "nice"}, tensors)
    refuse("'prefix_tuning'", {"architecture": "prefix_tuning"}, tensors)
    refuse("non_linearity", {"non_linearity": "softplus"}, tensors)
    refuse("has shape", {}, {**tensors, first: torch.zeros(3)})
    refuse("adapter lacks", {}, {k: v for k, v in tensors.items() if k != first})
    refuse("of 1 targeted", {}, {k: v for k, v in tensors.items() if ".0.output" not in k})
    refuse(
        "binds to no site", {}, {**tensors, "model.layers.9.x.adapters.default.y": torch.ones(1)}
    )
    with pytest.raises(AdapterError, match="another architecture"):
        (hub / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, hub / "adapter.safetensors")
        Pipeline([Attach(path=str(hub))]).run(capture(checkpoint("bert")))
    (hub / "adapter.safetensors").rename(hub / "pytorch_adapter.bin")
    with pytest.raises(AdapterError, match="pickled") as caught:
        Pipeline([Attach(path=str(hub))]).run(plain)
    assert "safetensors" in str(caught.value.fix)


def test_what_adapterhub_has_not_is_not_written_for_it(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    for program, words in (
        (Pipeline([Lora(rank=2)]).run(capture(checkpoint())), "no bottleneck"),
        (adapted(checkpoint(), targets=["mlp"]), "modules of its own choice"),
        (adapted(checkpoint(), modules_to_save=["lm_head"]), "base's own lm_head"),
        (capture(checkpoint()), "which adapter"),
    ):
        with pytest.raises(ArtifactError, match=words):
            to_adapterhub(program, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fold_errors_name_the_site_and_the_nonlinearity(checkpoint: MakeCheckpoint) -> None:
    from peftc.algebra import fold_sites

    errors = fold_sites(adapted(checkpoint("bert")))[1]
    assert all(isinstance(error, FoldError) for error in errors)
    places = [f"bert.encoder.layer.{i}.output.LayerNorm" for i in range(2)]
    assert [error.where for error in errors] == places
    errors += fold_sites(adapted(checkpoint("llama")))[1]
    assert len(errors) == 4 and all("aten.relu" in str(error) for error in errors)
