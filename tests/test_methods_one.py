"""DoRA, AdaLoRA, VeRA, (IA)³, BitFit, LayerNorm tuning and full fine-tuning, beside PEFT's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

import peftc
from peftc import (
    Attach,
    Merge,
    Pipeline,
    Program,
    Unmerge,
    absorb,
    capture,
    materialize,
    registry,
)
from peftc.contract import Method
from peftc.errors import AdapterError, PassError, PeftcError, SelectionError
from peftc.exporters.to_peft import to_peft
from tests import zoo
from tests.conftest import MakeCheckpoint, auto, distance, logits, with_peft
from tests.helpers import edit

pytestmark = pytest.mark.filterwarnings("ignore")
ALL: dict[str, Any] = {"target_modules": "all-linear"}
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "use_dora": True}
NORMS = {"llama": ["input_layernorm", "norm"], "gpt2": ["ln_1", "ln_f"], "bert": ["LayerNorm"]}
# Targets of (IA)³, of which the second is a feed-forward one.
PAIRS = {"llama": ["k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"],
         "bert": ["value", "output.dense"]}  # fmt: skip
CONFIGS: dict[str, Callable[[str], peft.PeftConfig]] = {
    "dora": lambda arch: peft.LoraConfig(**LORA, **ALL, lora_dropout=0.2),
    "dora-ranks": lambda arch: peft.LoraConfig(
        **LORA, **ALL, use_rslora=True, rank_pattern={".*0.*": 2}, bias="lora_only"
    ),
    "adalora": lambda arch: peft.AdaLoraConfig(init_r=6, lora_alpha=5, total_step=9, **ALL),
    "vera": lambda arch: peft.VeraConfig(r=4, bias="vera_only", **ALL),
    "vera-drawn": lambda arch: peft.VeraConfig(
        r=4, save_projection=False, projection_prng_key=5, **ALL
    ),
    "ia3": lambda arch: peft.IA3Config(
        target_modules=PAIRS[arch], feedforward_modules=PAIRS[arch][1:]
    ),
    "layernorm": lambda arch: peft.LNTuningConfig(target_modules=NORMS[arch]),
}
ARCHS = ["llama", "gpt2", "bert"]


class Net(nn.Module):
    """An embedding, convolutions of one and two dimensions, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.line = nn.Conv1d(8, 6, 3, padding=1)
        self.plane = nn.Conv2d(2, 4, 3, stride=2, bias=False)
        self.out = nn.Linear(4, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        lines = self.line(self.embed(ids).transpose(1, 2))
        planes = self.plane(lines.reshape(len(ids), 2, 3, -1)).flatten(2).mean(-1)
        y: torch.Tensor = self.out(planes.tanh())
        return y


IDS = torch.randint(0, 20, (3, 9), generator=torch.Generator().manual_seed(4))


def net() -> Net:
    torch.manual_seed(2)
    return Net().eval()


def trained(model: Any, config: peft.PeftConfig, path: Path) -> Path:
    """A directory that PEFT wrote, with values that change what the model computes."""
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter *= 1 + 0.5 * torch.rand_like(parameter)
            elif parameter.requires_grad:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(path)
    return path


@dataclass(frozen=True)
class Made:
    """A base, PEFT's adapter for it, and what PEFT makes of both."""

    base: Path
    adapter: Path
    plain: torch.Tensor
    logits: torch.Tensor
    merged: torch.Tensor

    @property
    def attached(self) -> Program:
        return Pipeline([Attach(path=str(self.adapter))]).run(capture(self.base))


Make = Callable[[str, str], Made]


@pytest.fixture(scope="module")
def make(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Make:
    known: dict[Any, Made] = {}

    def made(arch: str, method: str) -> Made:
        if (arch, method) not in known:
            base = checkpoint(arch)
            path = trained(auto(base), CONFIGS[method](arch), tmp_path_factory.mktemp("adapter"))
            model = with_peft(base, path)
            known[arch, method] = Made(
                base, path, logits(auto(base)), logits(model), logits(model.merge_and_unload())
            )
        return known[arch, method]

    return made


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("method", CONFIGS)
def test_peft_s_adapter_computes_the_same_attached_merged_and_written_again(
    method: str, arch: str, make: Make, tmp_path: Path
) -> None:
    made = make(arch, method)
    assert distance(made.logits, made.plain) > 1e-2
    program = made.attached
    assert distance(logits(materialize(program)), made.logits) < 1e-5
    merged = logits(materialize(Pipeline([Merge()]).run(program)))
    assert distance(merged, made.logits) < 1e-5 and distance(merged, made.merged) < 1e-5
    to_peft(program, tmp_path / "again")
    assert set(load_file(tmp_path / "again/adapter_model.safetensors")) == set(
        load_file(made.adapter / "adapter_model.safetensors")
    )
    assert distance(logits(with_peft(made.base, tmp_path / "again")), made.logits) < 1e-5


KINDS = {
    "dora": (peft.LoraConfig(**LORA, target_modules=["embed", "line", "plane", "out"]), 4),
    "adalora": (peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=["plane", "out"]), 2),
    "ia3": (peft.IA3Config(target_modules=["plane", "out"], feedforward_modules=[]), 2),
    "ia3-input": (peft.IA3Config(target_modules=["plane"], feedforward_modules=["plane"]), 1),
    "layernorm": (peft.LNTuningConfig(target_modules=["line", "embed"]), 0),  # PEFT takes any
}


@pytest.mark.parametrize("method", KINDS)
def test_embeddings_and_convolutions_compute_as_in_peft(method: str, tmp_path: Path) -> None:
    config, sites = KINDS[method]
    path = trained(net(), config, tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(net(), path).eval()
    program = Pipeline([Attach(path=str(path))]).run(capture(net()))
    assert program.journal[-1].sites >= sites
    want = model(IDS)
    assert distance(materialize(program)(IDS), want) < 1e-5 < distance(net()(IDS), want)
    merged = Pipeline([Merge()]).run(program)
    assert distance(materialize(merged)(IDS), model.merge_and_unload()(IDS)) < 1e-5
    to_peft(program, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "again").eval()
    assert distance(again(IDS), want) < 1e-5


FRESH: dict[str, dict[str, Any]] = {
    "dora": {"rank": 3, "dropout": 0.1}, "adalora": {"init_r": 5}, "vera": {"rank": 7},
    "ia3": {}, "bitfit": {}, "layernorm": {}, "full": {"targets": ".*"},
}  # fmt: skip


def fresh(name: str, **options: Any) -> Method:
    made = registry.load(name)(**{**FRESH[name], **options})
    assert isinstance(made, Method)
    return made


@pytest.mark.parametrize("arch", ["gpt2", "bert"])
@pytest.mark.parametrize("name", FRESH)
def test_fresh_adapter_changes_nothing_and_trains_just_its_tensors(
    name: str, arch: str, checkpoint: MakeCheckpoint
) -> None:
    program = Pipeline([fresh(name)]).run(capture(checkpoint(arch)))  # which checks the effect
    model = materialize(program)
    assert distance(logits(model), logits(auto(checkpoint(arch)))) < 1e-6
    free = {fqn for fqn, p in model.named_parameters() if p.requires_grad}
    assert free == program.trainable & {fqn for fqn, _ in model.named_parameters()} and free
    if name in ("bitfit", "layernorm"):
        kinds = {"bitfit": ("bias",), "layernorm": ("weight", "bias")}[name]
        assert all(fqn.endswith(kinds) for fqn in free)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_dora_trains_as_in_peft(
    arch: str, dropout: float, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint(arch)
    targets = ["q_proj", "down_proj"] if arch == "llama" else ["c_attn"]
    config = peft.LoraConfig(**LORA, target_modules=targets, lora_dropout=dropout)
    path = trained(auto(base), config, tmp_path)
    gradients = []
    program = Pipeline([Attach(path=str(path))]).run(capture(base))
    for model in (materialize(program),
                  peft.PeftModel.from_pretrained(auto(base), path, is_trainable=True)):  # fmt: skip
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module.p == 0.1:  # GPT-2's own
                module.p = 0.0
        torch.manual_seed(9)
        model(input_ids=IDS)[0].square().mean().backward()
        found = {n.replace("base_model.model.", "").removesuffix(".weight"): p.grad
                 for n, p in model.named_parameters() if p.grad is not None}  # fmt: skip
        gradients.append(found)
    ours, theirs = gradients
    assert ours.keys() == theirs.keys() and any("magnitude" in name for name in ours)
    assert max(distance(ours[name], theirs[name]) for name in ours) < 1e-4


def test_dora_serves_rows_of_zeros() -> None:
    model = net()
    with torch.no_grad():
        model.out.weight[1] = 0
    program = Pipeline([fresh("dora", targets=["out"], dropout=0)]).run(capture(model))
    assert torch.allclose(materialize(program)(IDS), model(IDS))


def test_dora_in_bf16_stays_near_its_base(checkpoint: MakeCheckpoint) -> None:
    base = checkpoint("llama", torch.bfloat16)
    model = materialize(Pipeline([fresh("dora", dropout=0)]).run(capture(base)))
    assert model.get_submodule("lm_head").weight.dtype == torch.bfloat16
    assert distance(logits(model), logits(auto(base))) < 2e-2


@pytest.mark.parametrize("kept", [[True, False, True, True, False, True], [False] * 6])
def test_pruned_adalora_computes_as_in_peft(
    kept: list[bool], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base, where = checkpoint("llama"), "model.layers.1.self_attn.q_proj.lora_E"
    targets = ["q_proj", "v_proj"]
    config = peft.AdaLoraConfig(init_r=6, total_step=9, target_modules=targets)
    config.rank_pattern = {f"{where}.default": kept}
    path = trained(auto(base), config, tmp_path / "adapter")
    want = logits(with_peft(base, path))
    program = Pipeline([Attach(path=str(path))]).run(capture(base))
    assert program.constants[f"{where}.default"].spec.shape == (sum(kept), 1)
    merged = Pipeline([Merge()]).run(program)
    for form in (program, merged):
        assert distance(logits(materialize(form)), want) < 1e-5
    to_peft(program, tmp_path / "again")
    assert distance(logits(with_peft(base, tmp_path / "again")), want) < 1e-5


def test_vera_s_sites_share_two_frozen_tensors(make: Make) -> None:
    program = make("llama", "vera").attached
    buffers = dict(materialize(program).named_buffers(remove_duplicate=False))
    shared = [b.data_ptr() for name, b in buffers.items() if "vera_" in name]
    assert len(shared) == 28 and len(set(shared)) == 2
    assert not {fqn for fqn in program.trainable if "vera_A" in fqn}


@pytest.mark.parametrize("name", ["bitfit", "full", "layernorm"])
def test_trained_tensors_of_the_base_survive_apply_load_and_merge(
    name: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("gpt2")
    targets = {"full": {"targets": ["mlp", "ln_f", "wte"]}}.get(name, {})
    path = peftc.apply(base, [fresh(name, **targets)], tmp_path / "fresh").path
    program = peftc.load(path)
    model = materialize(program)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    want = logits(model)
    assert distance(want, logits(auto(base))) > 1e-2
    to_peft(absorb(program, model), tmp_path / "trained")
    again = Pipeline([Attach(path=str(tmp_path / "trained"))]).run(capture(base))
    assert torch.equal(logits(materialize(again)), want)
    peftc.export(base, tmp_path / "out", merge=True, adapters=[(str(tmp_path / "trained"), 1.0)])
    assert torch.equal(logits(auto(tmp_path / "out")), want)


@pytest.mark.parametrize(
    ("method", "options", "kind", "words"),
    [
        ("bitfit", {}, PassError, "none of the"),
        ("bitfit", {"targets": ["q_prj"]}, SelectionError, "q_prj"),
        ("full", {"targets": ["no_such"]}, SelectionError, "no_such"),
        ("layernorm", {"targets": ["input_norm"]}, SelectionError, "input_layernorm"),
        ("ia3", {"feedforward": ["up_prj"]}, SelectionError, "up_prj"),
        ("ia3", {"targets": ["embed_tokens"]}, PassError, "embedding"),
        ("vera", {"targets": ["embed_tokens"]}, PassError, "embedding"),
        ("dora", {"lora_bias": True}, PassError, "bias"),
        ("adalora", {"rank_pattern": {"no_proj.lora_E": [True] * 5}}, SelectionError, "no_proj"),
    ],
)
def test_method_that_cannot_run_is_refused(
    method: str, options: dict[str, Any], kind: type[PeftcError], words: str,
    checkpoint: MakeCheckpoint,
) -> None:  # fmt: skip
    with pytest.raises(kind, match=words):
        Pipeline([fresh(method, **options)]).run(capture(checkpoint("llama")))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adalora", {"tinit": 600, "tfinal": 400, "total_step": 1000}),
        ("adalora", {"rank_pattern": {"q": [True]}}),
        ("vera", {"rank": 0}), ("vera", {"bias": "lora_only"}), ("ia3", {"feedforward": "("}),
        ("dora", {"dropout": 1.0}), ("layernorm", {"targets": "("}),
    ],
)  # fmt: skip
def test_options_without_a_meaning_are_refused(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        fresh(method, **options)


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / "adapter_config.json", **changes)


def _tensors(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        for name, tensor in changes.items():
            tensors.pop(f"base_model.{name}", None)
            tensors |= {} if tensor is None else {f"base_model.{name}": tensor}
        save_file(tensors, file)

    return change


@pytest.mark.parametrize(
    ("method", "damage", "words"),
    [
        ("dora", _config(use_dora=False), "lora_magnitude_vector"),
        ("dora", _config(use_qalora=True), "use_qalora"),
        ("adalora", _config(init_r=7), "lora_A"),
        ("adalora", _config(tinit=9), "tfinal"),
        ("vera", _config(r=5), "vera_lambda_d|vera_A"),
        ("vera", _tensors(vera_A=None), "vera_A"),
        ("vera", _tensors(vera_B=torch.ones(3, 4)), "vera_B"),
        ("vera", _tensors(vera_C=torch.ones(3, 4)), "vera_C"),
        ("ia3", _config(feedforward_modules=None), "ia3_l"),
        ("layernorm", _config(target_modules=["input_layernorm"]), "norm"),
    ],
)
def test_damaged_directory_is_refused(
    method: str, damage: Callable[[Path], None], words: str, make: Make, tmp_path: Path
) -> None:
    made = make("llama", method)
    for file in made.adapter.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(PeftcError, match=words):
        Pipeline([Attach(path=str(tmp_path))]).run(capture(made.base))


@pytest.mark.parametrize("method", ["dora", "ia3", "layernorm"])
def test_what_is_no_sum_cannot_be_weighed(method: str, make: Make) -> None:
    made = make("llama", method)
    with pytest.raises((AdapterError, PassError), match=r"weighed by 0\.5"):
        Pipeline([Attach(path=str(made.adapter), weight=0.5)]).run(capture(made.base))


def test_feedforward_modules_are_written_so_that_peft_takes_them(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("gpt2")
    method = fresh("ia3", targets=["c_attn", "mlp.c_proj"], feedforward=["mlp.c_proj"])
    to_peft(Pipeline([method]).run(capture(base)), tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["feedforward_modules"] == r".*(mlp\.c_proj)"
    assert distance(logits(with_peft(base, tmp_path / "out")), logits(auto(base))) < 1e-6


@pytest.mark.parametrize("method", ["vera", "adalora"])
def test_additive_method_is_weighed_and_taken_out_again(method: str, tmp_path: Path) -> None:
    specimen = zoo.SPECIMENS["llama"]
    theirs = zoo.adapter(method, specimen)
    zoo.save(theirs, method, specimen, tmp_path / "adapter")
    path = str(tmp_path / "adapter")
    base = capture(specimen.build())
    merged = Pipeline([Attach(path=path, weight=0.5), Merge()]).run(base)
    plain, half = (zoo.run(materialize(p), specimen) for p in (base, merged))
    assert zoo.distance(half, plain) > 1e-4
    again = Pipeline([Unmerge(path=path, weight=0.5)]).run(merged)
    assert zoo.distance(zoo.run(materialize(again), specimen), plain) <= 1e-5
