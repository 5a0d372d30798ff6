"""LoHa, LoKr, OFT, BOFT, the starts PiSSA and OLoRA, and LoRA+'s groups, each against PEFT."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc import Attach, Effect, Lora, Merge, Method, Pipeline, Program
from peftc.errors import ArtifactError, PassError, PeftcError
from peftc.passes.boft import Boft
from peftc.passes.loha import Loha
from peftc.passes.lokr import Lokr
from peftc.passes.oft import Oft
from tests.conftest import MakeCheckpoint, auto, distance, logits

from .helpers import edit

pytestmark = pytest.mark.filterwarnings("ignore")
BOUND = 1e-5
LYCORIS: dict[str, Any] = {"r": 3, "alpha": 5}
CONFIGS: dict[str, Callable[..., Any]] = {
    "loha": lambda **o: peft.LoHaConfig(**{**LYCORIS, **o}),
    "loha-patterns": lambda **o: peft.LoHaConfig(
        **LYCORIS, **o, rank_pattern={"0": 2}, alpha_pattern={".*3": 7}
    ),
    "loha-tucker": lambda **o: peft.LoHaConfig(**LYCORIS, **o, use_effective_conv2d=True),
    "lokr": lambda **o: peft.LoKrConfig(**LYCORIS, **o),
    "lokr-both": lambda **o: peft.LoKrConfig(
        **LYCORIS | {"r": 1}, **o, decompose_both=True, decompose_factor=4
    ),
    "lokr-full": lambda **o: peft.LoKrConfig(**LYCORIS | {"r": 64}, **o),
    "lokr-tucker": lambda **o: peft.LoKrConfig(
        **LYCORIS | {"r": 1}, **o, use_effective_conv2d=True
    ),
    "oft": lambda **o: peft.OFTConfig(oft_block_size=8, **o),
    "oft-near": lambda **o: peft.OFTConfig(oft_block_size=7, **o),
    "oft-blocks": lambda **o: peft.OFTConfig(r=3, oft_block_size=0, use_cayley_neumann=False, **o),
    "oft-share": lambda **o: peft.OFTConfig(
        oft_block_size=8, block_share=True, num_cayley_neumann_terms=3, **o
    ),
    "oft-coft": lambda **o: peft.OFTConfig(oft_block_size=8, coft=True, eps=0.3, **o),
    "oft-bias": lambda **o: peft.OFTConfig(oft_block_size=8, bias="oft_only", **o),
    "boft": lambda **o: peft.BOFTConfig(boft_block_size=4, **o),
    "boft-blocks": lambda **o: peft.BOFTConfig(boft_block_size=0, boft_block_num=4, **o),
}
FRESH: list[Method] = [
    Loha(rank=3),
    Lokr(rank=3),
    Lokr(rank=1, decompose_both=True),
    Oft(),
    Oft(neumann=False, coft=True),
    Boft(blocks=4),
    Lora(rank=4, init="pissa", alpha=6),
    Lora(rank=4, init="pissa_niter_3"),
    Lora(rank=4, init="olora", rslora=True, alpha=3),
]


class Convolutions(nn.Module):
    """Convolutions of one and two dimensions, with groups and of a point, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(8, 12, 3, padding=1), nn.GELU(), nn.Unflatten(2, (4, 4)),
            nn.Conv2d(12, 16, 3, stride=2, padding=1, groups=2), nn.Conv2d(16, 8, (1, 2)),
            nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(16, 8),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


CONVOLUTIONS, X = ["0", "3", "4", "5", "7"], torch.randn(3, 8, 16)


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions().eval()


def shake(model: nn.Module) -> Any:
    """Every trained tensor made random, near its start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def compare(
    source: Callable[[], Any], out: Callable[[Any], Tensor], config: Any, at: Path
) -> Program:
    """PEFT's adapter attached, merged, written and loaded again, all against PEFT."""
    theirs = shake(peft.get_peft_model(source(), config))
    want = out(theirs).clone()
    assert distance(want, out(source())) > 1e-3
    theirs.save_pretrained(at / "theirs")
    program = Pipeline([Attach(path=str(at / "theirs"))]).run(peftc.capture(source()))
    assert distance(out(peftc.materialize(program)), want) <= BOUND
    merged = Pipeline([Merge()]).run(program)
    assert not merged.adapters and all(site.is_plain for site in merged.sites.values())
    assert distance(out(peftc.materialize(merged)), want) <= BOUND
    assert distance(out(peftc.materialize(merged)), out(theirs.merge_and_unload())) <= BOUND
    ours = peftc.to_peft(program, at / "ours").path
    assert distance(out(peft.PeftModel.from_pretrained(source(), ours).eval()), want) <= BOUND
    return program


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_of_peft_computes_and_merges_alike(
    checkpoint: MakeCheckpoint, tmp_path: Path, name: str, architecture: str
) -> None:
    base = checkpoint(architecture)
    targets = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "output.dense"]}
    config = CONFIGS[name](target_modules=targets[architecture])
    config.rank_pattern = {} if hasattr(config, "rank_pattern") else None
    config.alpha_pattern = {targets[architecture][1]: 9} if hasattr(config, "alpha") else None
    compare(lambda: auto(base), logits, config, tmp_path)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("lo")])
def test_adapter_of_convolutions_computes_and_merges_alike(tmp_path: Path, name: str) -> None:
    # PEFT's own LoKr raises with the core of a convolution of one dimension.
    targets = CONVOLUTIONS[1:] if name == "lokr-tucker" else CONVOLUTIONS
    compare(convolutions, run, CONFIGS[name](target_modules=targets), tmp_path)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(X)
    return y


def test_rotated_embedding_computes_alike(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    config = peft.OFTConfig(oft_block_size=8, target_modules=["embed_tokens"])
    compare(lambda: auto(base), logits, config, tmp_path)


def test_rotations_keep_their_order_when_there_are_several(tmp_path: Path) -> None:
    model = peft.get_peft_model(convolutions(), CONFIGS["oft"](target_modules=["7"]), "one")
    model.add_adapter("two", CONFIGS["oft-blocks"](target_modules=["7"]))
    model.base_model.set_adapter(["one", "two"])
    for parameter in (p for n, p in model.named_parameters() if "oft_" in n):
        parameter.requires_grad_(True)
    want = run(shake(model))
    model.save_pretrained(tmp_path)
    passes = [Attach(path=str(tmp_path / name)) for name in ("one", "two")]
    program = Pipeline(passes).run(peftc.capture(convolutions()))
    assert distance(run(peftc.materialize(program)), want) <= BOUND
    assert distance(run(peftc.materialize(Pipeline([Merge()]).run(program))), want) <= BOUND


@pytest.mark.parametrize("method", FRESH, ids=repr)
def test_fresh_method_changes_nothing_and_learns(
    checkpoint: MakeCheckpoint, tmp_path: Path, method: Method
) -> None:
    base = checkpoint("llama")
    program = Pipeline([method]).run(peftc.capture(base))
    assert program.journal[-1].effect == method.declared()
    live, before = peftc.materialize(program), logits(auto(base))
    if method.declared() is Effect.IDENTITY:
        assert torch.equal(logits(live), before)
    else:
        assert distance(logits(live), before) <= BOUND
    ids = torch.arange(12).view(2, 6)
    live(input_ids=ids, labels=ids).loss.backward()
    trained = {n: p for n, p in live.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())


@pytest.mark.parametrize("method", [Loha(), Lokr(), Oft(), Boft()], ids=lambda m: type(m).__name__)
def test_method_is_refused_when_peft_has_it_not(checkpoint: MakeCheckpoint, method: Method) -> None:
    with pytest.raises(PeftcError, match="conv1d"):
        Pipeline([method]).run(peftc.capture(checkpoint("gpt2")))


@pytest.mark.parametrize("method", [Loha, Lokr, Oft])
def test_method_is_refused_when_a_convolution_has_three_dimensions(method: type[Method]) -> None:
    with pytest.raises(PassError, match="convolution"):
        Pipeline([method(targets=["0"])]).run(peftc.capture(nn.Sequential(nn.Conv3d(2, 2, 3))))


@pytest.mark.parametrize(
    ("method", "word"),
    [
        (lambda: Oft(blocks=3, block_size=3), "not both"),
        (lambda: Boft(blocks=3, block_size=3), "not both"),
        (lambda: Loha(rank_pattern={"(": 3}), "regular expression"),
        (lambda: Lora(init="svd"), "init"),
    ],
)
def test_options_are_refused_when_they_make_no_sense(
    method: Callable[[], Method], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        method()


@pytest.mark.parametrize(
    ("method", "word"),
    [
        (Boft(block_size=5), "multiple of 5"),
        (Lokr(rank_pattern={"nowhere": 3}), "nowhere"),
        (Loha(alpha_pattern={"nowhere": 3}), "nowhere"),
        (Lora(init="pissa", targets=["embed_tokens"]), "linear layer"),
        (Lora(init="olora", rank=49), "smaller dimension"),
    ],
)
def test_method_is_refused_when_it_does_not_fit(
    checkpoint: MakeCheckpoint, method: Method, word: str
) -> None:
    with pytest.raises(PeftcError, match=word):
        Pipeline([method]).run(peftc.capture(checkpoint("llama")))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("loha", {"r": 4}),
        ("lokr", {"decompose_factor": 3}),
        ("oft", {"oft_block_size": 4}),
        ("oft", {"r": 4}),
        ("boft", {"boft_block_size": 8}),
        ("oft", {"bias": "some"}),
    ],
)
def test_attach_is_refused_when_the_config_is_another_s(
    checkpoint: MakeCheckpoint, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    base = checkpoint("llama")
    peft.get_peft_model(auto(base), CONFIGS[name](target_modules=["q_proj"])).save_pretrained(
        tmp_path
    )
    edit(tmp_path / "adapter_config.json", **change)
    with pytest.raises(PeftcError, match=r"shape|bias|both"):
        Pipeline([Attach(path=str(tmp_path))]).run(peftc.capture(base))


def test_dropouts_of_training_do_not_hinder_attaching(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    config = peft.LoHaConfig(
        r=4, alpha=16, rank_dropout=0.1, module_dropout=0.2, target_modules=["v_proj"]
    )
    compare(lambda: auto(base), logits, config, tmp_path)


STARTS = ["pissa", "pissa_niter_4", "olora"]


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_start_is_peft_s(checkpoint: MakeCheckpoint, init: str, architecture: str) -> None:
    if (init, architecture) == ("olora", "gpt2"):
        pytest.skip("PEFT does not transpose Conv1D's weight")
    base, target = checkpoint(architecture), {"llama": "v_proj", "gpt2": "c_fc"}[architecture]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=init, target_modules=[target],
        fan_in_fan_out=architecture == "gpt2",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = dict(peft.get_peft_model(auto(base), config).named_parameters())
    lora = Lora(rank=4, alpha=6, init=init, targets=[target])
    ours = dict(peftc.materialize(Pipeline([lora]).run(peftc.capture(base))).named_parameters())
    for name in (n for n in ours if f"{target}.weight" in n):
        key = "base_model.model." + name.replace(".weight", ".base_layer.weight")
        assert distance(ours[name], theirs[key]) <= BOUND


def trained(program: Program) -> tuple[Program, Tensor]:
    live = shake(peftc.materialize(program))
    return peftc.absorb(program, live), logits(live)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options", [{"alpha": 6}, {"rslora": True, "rank_pattern": {"^.*0.*": 2}}], ids=repr
)
def test_restored_base_gives_the_same_logits_in_peft(
    checkpoint: MakeCheckpoint, tmp_path: Path, init: str, architecture: str, options: Any
) -> None:
    base = checkpoint(architecture)
    program = Pipeline([Lora(rank=4, init=init, **options)]).run(peftc.capture(base))
    program, want = trained(program)
    assert distance(want, logits(auto(base))) > 1e-2
    with pytest.raises(ArtifactError, match="restore_base"):
        peftc.to_peft(program, tmp_path / "alone")
    restored = peftc.restore_base(program)
    assert not restored.rewritten and program.rewritten
    assert distance(logits(peftc.materialize(restored)), want) <= BOUND
    written = peftc.to_peft(restored, tmp_path / "adapter").path
    assert distance(logits(peft.PeftModel.from_pretrained(auto(base), written)), want) <= BOUND
    merged = (Pipeline([Merge()]).run(p) for p in (program, restored))
    assert all(distance(logits(peftc.materialize(m)), want) <= BOUND for m in merged)


def test_restored_base_is_refused_when_the_weight_was_changed(checkpoint: MakeCheckpoint) -> None:
    program = Pipeline([Lora(rank=4, init="olora")]).run(peftc.capture(checkpoint("llama")))
    name = next(n for n in program.rewritten)
    changed = program.rewrite(constants={name: program.captured[name]})
    with pytest.raises(PassError, match=name):
        peftc.restore_base(changed)


def test_plain_program_is_left_alone_when_its_base_is_restored(checkpoint: MakeCheckpoint) -> None:
    program = Pipeline([Lora(rank=4)]).run(peftc.capture(checkpoint("llama")))
    assert peftc.restore_base(program) is program


def test_apply_writes_the_base_that_is_left(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    out = peftc.apply(base, [Lora(rank=4, init="pissa")], tmp_path / "out").path
    want = logits(auto(base))
    assert distance(logits(auto(out / "base")), want) > 1e-2
    theirs = peft.PeftModel.from_pretrained(auto(out / "base"), out / "adapter")
    assert distance(logits(theirs), want) <= BOUND
    assert distance(logits(peftc.materialize(peftc.load(out))), want) <= BOUND
    peftc.verify(out)


def test_start_is_worked_out_once_for_each_site(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    svd = torch.linalg.svd

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return svd(*args, **options)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    lora = Lora(rank=4, init="pissa", targets=["q_proj"])
    peftc.materialize(Pipeline([lora]).run(peftc.capture(checkpoint("llama"))))
    assert len(calls) == 2


def test_optimizer_groups_are_those_of_peft(checkpoint: MakeCheckpoint) -> None:
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(
        r=2, target_modules=["query", "word_embeddings"], lora_bias=False, bias="all",
        modules_to_save=["LayerNorm"],
    )  # fmt: skip
    model = peft.get_peft_model(auto(checkpoint("bert")), config)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1,
        loraplus_lr_embedding=1e-5,
    )  # fmt: skip
    ours = torch.optim.AdamW(peftc.optimizer_groups(model, 1e-3, 8, 0.1, 1e-5))
    names = {id(p): n for n, p in model.named_parameters()}

    def table(optimizer: Any) -> dict[str, tuple[float, float]]:
        return {
            names[id(p)]: (g["lr"], g["weight_decay"])
            for g in optimizer.param_groups
            for p in g["params"]
        }

    assert table(ours) == table(theirs)
    assert len({value for value in table(ours).values()}) == 4


def test_optimizer_groups_hold_every_trained_tensor_of_a_live_model(
    checkpoint: MakeCheckpoint,
) -> None:
    live = peftc.materialize(Pipeline([Lora(rank=2)]).run(peftc.capture(checkpoint("llama"))))
    groups = peftc.optimizer_groups(live, 1e-4)
    assert [round(math.log10(g["lr"]), 1) for g in groups] == [-4.0, -2.8]
    held = {id(p) for g in groups for p in g["params"]}
    assert held == {id(p) for p in live.parameters() if p.requires_grad}
    copy.deepcopy(torch.optim.SGD(groups))
