"""Merging into a 4-bit base: what is written, what is left of the update, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftc
from peftc import Lora, Merge, Pipeline, registry
from peftc.errors import ArtifactError, PassError, ProofError
from peftc.kernels import nf4
from peftc.merging import merge, original_of
from peftc.passes.bottleneck import Bottleneck
from peftc.passes.dequantize import Dequantize
from peftc.passes.nf4 import Nf4

from .conftest import auto, distance, logits
from .helpers import Ran, refuse, tree

pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH, RANK, SCALE = 256, 16, 2.0
PREFIX = "base_model.model."
Base = Literal["dequantized", "original"]
Then = Literal["none", "nf4"]
WAYS: list[tuple[Base, Then]] = [
    ("dequantized", "none"), ("dequantized", "nf4"), ("original", "none"), ("original", "nf4")
]  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "nf4": {}, "nested": {"double_quant": True}, "fp4": {"codebook": "fp4", "block_size": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    """A llama of one layer with Gaussian weights in bf16: those of its MLP are 256×512."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=97, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model.bfloat16().save_pretrained(root / "base")
    return root / "base"


Quantize = Callable[..., Path]


@pytest.fixture(scope="module")
def quantize(base: Path, root: Path) -> Quantize:
    """What `apply BASE nf4 lora` makes once for each of its arguments, as after training.

    The updates have a norm of `relative` times the weight's.
    """

    @cache
    def make(relative: float, form: str = "nf4", targets: tuple[str, ...] | None = None) -> Path:
        path = root / f"{form}-{relative}-{targets}"
        lora = Lora(
            rank=RANK, alpha=SCALE * RANK, **({"targets": list(targets)} if targets else {})
        )
        peftc.apply(base, [Nf4(**FORMS[form]), lora], path)
        train(path, base, relative)
        return path

    return make


def train(applied: Path, base: Path, relative: float) -> None:
    """Writes random factors into an adapter's file."""
    file, weights = applied / "adapter" / "adapter_model.safetensors", stored(base)
    factors = load_file(file)
    generator = torch.Generator().manual_seed(1)
    for name in sorted(factors):
        if "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            a, b = (torch.randn(factors[n].shape, generator=generator) for n in (name, other))
            weight = weights[name.removeprefix(PREFIX).replace(".lora_A", "")].float()
            factors[name], factors[other] = (
                a,
                b * (relative * weight.norm() / (SCALE * (b @ a).norm())),
            )
    save_file(factors, file, metadata={"format": "pt"})


def stored(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(path / "model.safetensors")
    return tensors


def updates(applied: Path) -> dict[str, Tensor]:
    """s·B·A of each weight, fp64."""
    factors = load_file(applied / "adapter" / "adapter_model.safetensors")
    return {
        name.removeprefix(PREFIX).replace(".lora_A", ""): SCALE
        * (factors[name.replace("lora_A", "lora_B")].double() @ a.double())
        for name, a in factors.items()
        if "lora_A" in name
    }


def decoded(tensors: dict[str, Tensor], name: str) -> Tensor:
    """A weight of a 4-bit checkpoint by the reference, fp64."""
    key = next(k for k in tensors if k.startswith(f"{name}.quant_state"))
    about = json.loads(bytes(tensors[key].tolist()))
    absmax = tensors[f"{name}.absmax"]
    if "nested_offset" in about:
        offset = torch.tensor(about["nested_offset"])
        absmax = nf4.unnest(absmax, tensors[f"{name}.nested_absmax"], offset)
    shape, size, book = about["shape"], about["blocksize"], about["quant_type"]
    return nf4.dequantize(tensors[name], absmax, shape, size, book).double()


def export(source: Path, target: Path, **options: Any) -> Any:
    return peftc.export(source, target, merge=True, **options)


def peft_logits(base: Path, adapter: Path) -> Tensor:
    """Those of the unmerged live model."""
    program = Pipeline([peftc.Attach(path=str(adapter))]).run(peftc.capture(base))
    return logits(peftc.materialize(program, dtype=torch.float32))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("onto", "then"), WAYS)
def test_written_weights_and_figures_are_those_of_a_direct_computation(
    base: Path, quantize: Quantize, tmp_path: Path, onto: Base, then: Then, form: str
) -> None:
    source = quantize(0.2, form, ("q_proj", "down_proj"))
    artifact = export(source, tmp_path / "out", merge_base=onto, then=then)
    plain, packed, written = stored(base), stored(source / "base"), stored(artifact.path)
    report = artifact.manifest["merge"]
    assert (report["base"], report["then"], report["original"]) == (onto, then, str(base))
    sums = torch.zeros(4, dtype=torch.float64)
    for name, update in updates(source).items():
        trained_on = decoded(packed, name)
        merged = (trained_on if onto == "dequantized" else plain[name].double()) + update
        if then == "none":
            assert written[name].dtype == torch.bfloat16
            found, exact = written[name].double(), merged
            assert bool(((found - exact).abs() <= 2**-8 * exact.abs() * (1 + 1e-4) + 1e-7).all())
            assert float((written[name] == merged.bfloat16()).double().mean()) > 0.999  # ties
        else:
            found, options = decoded(written, name), FORMS[form]
            size, book = options.get("block_size", 64), options.get("codebook", "nf4")
            codes, absmax = nf4.quantize(merged.float(), size, book)
            assert float((written[name] == codes).double().mean()) > 0.999  # fp32 sums may round
            if form != "nested":
                assert torch.allclose(written[f"{name}.absmax"], absmax, rtol=1e-6)
        want = trained_on + update
        lost, left = found - want, found - trained_on
        pairs = (left, update), (update, update), (lost, lost), (want, want)
        own = torch.stack([(a * b).sum() for a, b in pairs])
        figures = report["sites"][name.removesuffix(".weight")]
        assert figures["share"] == pytest.approx(float(own[0] / own[1]), rel=1e-4)
        assert figures["output_error"] == pytest.approx(float((own[2] / own[3]).sqrt()), rel=1e-3)
        sums += own
    assert report["share"] == pytest.approx(float(sums[0] / sums[1]), rel=1e-4)
    assert report["output_error"] == pytest.approx(float((sums[2] / sums[3]).sqrt()), rel=1e-3)
    assert len(report["sites"]) == len(updates(source)) == 2
    assert peftc.verify(artifact.path)["files"] == len(artifact.manifest["files"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_untouched_layers_keep_their_codes_when_4_bits_are_written(
    base: Path, quantize: Quantize, tmp_path: Path, onto: Base, form: str
) -> None:
    source = quantize(0.2, form, ("q_proj", "down_proj"))
    artifact = export(source, tmp_path / "out", merge_base=onto, then="nf4")
    before, after = stored(source / "base"), stored(artifact.path)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys() and changed
    assert all("q_proj" in key or "down_proj" in key for key in changed)
    assert {key for key in changed if key.endswith("weight")} == updates(source).keys()
    configs = [
        json.loads((p / "config.json").read_text()) for p in (source / "base", artifact.path)
    ]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_untouched_layers_are_plain_when_16_bits_are_written(
    base: Path, quantize: Quantize, tmp_path: Path, onto: Base
) -> None:
    source = quantize(0.2, "nested", ("q_proj", "down_proj"))
    artifact = export(source, tmp_path / "out", merge_base=onto)
    plain, packed, after = stored(base), stored(source / "base"), stored(artifact.path)
    assert after.keys() == plain.keys()
    for name in after.keys() - updates(source).keys():
        was_packed = f"{name}.absmax" in packed and onto == "dequantized"
        assert torch.equal(
            after[name], decoded(packed, name).bfloat16() if was_packed else plain[name]
        )
    assert "quantization_config" not in json.loads((artifact.path / "config.json").read_text())


def test_default_is_what_was_trained_in_16_bits(
    base: Path, quantize: Quantize, tmp_path: Path
) -> None:
    source = quantize(0.1)
    artifact = export(source, tmp_path / "out")
    report = artifact.manifest["merge"]
    assert (report["base"], report["then"], report["original"]) == (
        "dequantized",
        "none",
        str(base),
    )
    assert 0.999 < report["share"] < 1.001 and report["output_error"] < 3e-3
    live = peft_logits(source / "base", source / "adapter")
    assert distance(logits(auto(artifact.path, torch.float32)), live) <= 1e-2
    assert distance(logits(auto(base, torch.float32)), live) > 3e-2


# relative norm: share left of requantizing, and of quantizing the originals, in per cent
TABLE = {0.01: (1, 3), 0.03: (3, 6), 0.05: (22, 34), 0.1: (78, 90)}


@pytest.mark.parametrize("relative", TABLE)
def test_survival_is_that_of_the_dead_zone(
    quantize: Quantize, tmp_path: Path, relative: float
) -> None:
    low, high = TABLE[relative]
    source = quantize(relative)
    again = export(source, tmp_path / "again", then="nf4", force=True, proof="sites")
    fresh = export(source, tmp_path / "fresh", then="nf4", merge_base="original", proof="sites")
    share = 100 * again.manifest["merge"]["sites"]["model.layers.0.mlp.down_proj"]["share"]
    assert low <= share <= high
    assert 97 <= 100 * fresh.manifest["merge"]["share"] <= 101
    for artifact in (again, fresh):
        assert artifact.manifest["merge"]["relative_update"] == pytest.approx(relative, rel=0.02)


@pytest.mark.parametrize("method", ["dora", "oft", "ia3"])
def test_error_is_against_what_was_trained_when_the_method_scales_the_weight(
    base: Path, tmp_path: Path, method: str
) -> None:
    peftc.apply(base, [Nf4(), registry.load(method)()], tmp_path / "q")
    file = tmp_path / "q" / "adapter" / "adapter_model.safetensors"
    torch.manual_seed(0)
    noisy = {key: t + 0.02 * torch.randn_like(t) for key, t in load_file(file).items()}
    save_file(noisy, file, metadata={"format": "pt"})
    onto = [
        export(tmp_path / "q", tmp_path / base_, merge_base=base_).path
        for base_ in ("dequantized", "original")
    ]
    report = json.loads((onto[1] / "peftc.json").read_text())["merge"]["sites"]
    trained, written = map(stored, onto)
    assert report
    for site, figures in report.items():
        want, found = (t[f"{site}.weight"].double() for t in (trained, written))
        error = float((found - want).norm() / want.norm())
        assert figures["output_error"] == pytest.approx(error, rel=0.02)


def test_fresh_adapter_requantizes_to_the_same_codes(base: Path, tmp_path: Path) -> None:
    peftc.apply(base, [Nf4(), Lora(rank=4)], tmp_path / "q")
    artifact = export(tmp_path / "q", tmp_path / "out", then="nf4")
    before, after = stored(tmp_path / "q" / "base"), stored(artifact.path)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert artifact.manifest["merge"]["share"] == 1.0
    assert artifact.manifest["merge"]["output_error"] == 0.0


@pytest.mark.parametrize(("onto", "then"), WAYS)
def test_merge_works_when_no_quantized_layer_is_touched(
    base: Path, tmp_path: Path, onto: Base, then: Then
) -> None:
    peftc.apply(base, [Nf4(), Lora(rank=4, targets=["lm_head"])], tmp_path / "q")
    train(tmp_path / "q", base, 0.1)
    artifact = export(tmp_path / "q", tmp_path / "out", merge_base=onto, then=then)
    assert artifact.manifest["merge"]["sites"] == {}
    head = [stored(path)["lm_head.weight"] for path in (base, artifact.path)]
    assert distance(*head) > 0.01


def test_merge_touches_no_layer_whose_name_ends_alike(tmp_path: Path) -> None:
    source = nn.ModuleDict(
        {"fc": nn.Linear(64, 64), "inner": nn.ModuleDict({"fc": nn.Linear(64, 64)})}
    )
    program = peftc.capture(source)
    program = Pipeline([Nf4(targets="(fc)"), Lora(targets="(fc)", rank=2)]).run(program)
    merged, _ = merge(program, then="nf4", force=True)
    assert merged.constants["inner.fc.weight"] is program.constants["inner.fc.weight"]


def test_originals_are_found_through_a_chain_and_not_when_changed(
    base: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(base, tmp_path / "mine"))
    peftc.apply(mine, [Nf4()], tmp_path / "q")
    peftc.apply(tmp_path / "q", [Lora(rank=4)], tmp_path / "lora")
    assert original_of(peftc.load(tmp_path / "lora")) == mine
    assert original_of(peftc.load(mine)) is None
    # Merged before it was quantized: the source's weights are not those that were quantized.
    attached = [peftc.Attach(path=str(tmp_path / "lora" / "adapter")), Merge(), Nf4()]
    peftc.apply(mine, attached, tmp_path / "merged")
    assert original_of(peftc.capture(tmp_path / "merged" / "base")) is None
    with (mine / "model.safetensors").open("r+b") as file:
        file.seek(-(1 << 20), 2)
        file.write(bytes(1 << 20))
    assert original_of(peftc.load(tmp_path / "lora")) is None
    refuse(
        tmp_path, PassError, lambda out: export(tmp_path / "lora", out, merge_base="original"),
        "--original",
    )  # fmt: skip


def test_original_is_refused_when_it_is_in_4_bits_or_not_used(
    base: Path, quantize: Quantize, tmp_path: Path
) -> None:
    source = quantize(0.1)
    given = {"merge_base": "original", "original": source / "base"}
    refuse(tmp_path, PassError, lambda out: export(source, out, **given), "in 4 bits")
    unused = "--merge-base original"
    refuse(tmp_path, PassError, lambda out: export(source, out, original=base), unused)


def test_original_is_taken_from_where_it_is_named(
    base: Path, quantize: Quantize, tmp_path: Path
) -> None:
    source = quantize(0.1)
    foreign = Path(shutil.copytree(source / "base", tmp_path / "foreign"))  # not peftc's any more
    options: dict[str, Any] = {
        "adapters": [(str(source / "adapter"), 1.0)],
        "merge_base": "original",
    }
    refuse(tmp_path, PassError, lambda out: export(foreign, out, **options), "--original")
    artifact = export(foreign, tmp_path / "out", original=base, **options)
    want = export(source, tmp_path / "want", merge_base="original")
    assert all(torch.equal(t, stored(want.path)[key]) for key, t in stored(artifact.path).items())
    assert artifact.manifest["merge"]["original"] == str(base)
    peftc.verify(artifact.path)


@pytest.mark.parametrize(
    "options", [{"merge_base": "original"}, {"then": "nf4"}, {"original": "BASE"}]
)
def test_options_of_4_bits_are_refused_when_the_base_is_plain_or_nothing_is_merged(
    base: Path, quantize: Quantize, tmp_path: Path, options: dict[str, Any]
) -> None:
    given: dict[str, Any] = {k: base if v == "BASE" else v for k, v in options.items()}
    adapters = [(str(quantize(0.1) / "adapter"), 1.0)]
    refuse(tmp_path, PassError, lambda out: export(base, out, adapters=adapters, **given), "4 bits")
    refuse(tmp_path, ArtifactError, lambda out: peftc.export(quantize(0.1), out, **given))


def test_bitsandbytes_checkpoint_and_peft_adapter_merge(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    import peft

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "bnb")
    options = {"r": RANK, "lora_alpha": SCALE * RANK, "target_modules": "all-linear"}
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**options))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.03)
    wrapped.save_pretrained(tmp_path / "adapter")
    adapters = [(str(tmp_path / "adapter"), 1.0)]
    artifact = export(tmp_path / "bnb", tmp_path / "out", adapters=adapters)
    assert artifact.manifest["merge"]["original"] is None
    assert distance(logits(auto(artifact.path)), logits(wrapped.eval())) <= 1e-4
    assert distance(logits(auto(tmp_path / "bnb")), logits(wrapped)) > 1e-2


def test_export_is_refused_when_most_of_the_update_dies(
    quantize: Quantize, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    source = quantize(0.01)
    ways = ("--then none", "--merge-base original", "--format peft", "--force")
    refuse(tmp_path, ProofError, lambda out: export(source, out, then="nf4"), *ways)
    before = tree(tmp_path)
    ran = run("export", source, "-o", tmp_path / "out", "--merge", "--then", "nf4")
    said = " ".join(ran.err.split())
    assert ran.code == 3 and all(way in said for way in ways)
    assert re.search(r"only 2% .*down_proj 2%", said)
    assert tree(tmp_path) == before


def test_force_publishes_what_would_be_refused(
    quantize: Quantize, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    out = tmp_path / "out"
    ran = run("export", quantize(0.01), "-o", out, "--merge", "--then", "nf4", "--force")
    assert ran.code == 0 and re.search(r"1\.\d% of the update is left", " ".join(ran.err.split()))
    assert run("verify", out).code == 0
    assert json.loads((out / "peftc.json").read_text())["merge"]["share"] < 0.05


def test_command_line_says_how_it_merged(
    base: Path, quantize: Quantize, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    source = quantize(0.1)
    one = run("export", source, "-o", tmp_path / "one", "--merge")
    said = "".join(one.err.split())
    assert one.code == 0 and "mergedintothedequantizedweights" in said
    assert "--merge-baseoriginal" in said and str(base) in said
    given = ("--merge", "--merge-base", "original", "--then", "nf4", "--original", base, "--json")
    other = run("export", source, "-o", tmp_path / "two", *given)
    assert other.data["merge"]["base"] == "original" and other.data["merge"]["share"] > 0.97


@pytest.mark.parametrize("option", ["--merge-base original", "--then nf4", "--original X"])
def test_options_need_a_merge_on_the_command_line(
    quantize: Quantize, tmp_path: Path, run: Callable[..., Ran], option: str
) -> None:
    ran = run("export", quantize(0.1), "-o", tmp_path / "out", *option.split())
    assert ran.code == 2 and "need --merge" in ran.err


def test_verify_fails_when_a_code_was_changed(quantize: Quantize, tmp_path: Path) -> None:
    artifact = export(quantize(0.2), tmp_path / "out", then="nf4")
    peftc.verify(artifact.path)
    tensors = stored(artifact.path)
    tensors["model.layers.0.mlp.up_proj.weight"][0] ^= 1
    save_file(tensors, artifact.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError):
        peftc.verify(artifact.path)


def test_dequantize_leaves_a_bottleneck_alone(base: Path) -> None:
    beside = Bottleneck(targets=["mlp"])
    program = Pipeline([Nf4(), beside]).run(peftc.capture(base))
    plain = Pipeline([Dequantize()]).run(program)
    assert program.packed and not plain.packed and plain.adapters.keys() == program.adapters.keys()
