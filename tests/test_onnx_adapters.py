"""Adapters at run time: one ONNX base, slots that take LoRAs of any rank, and files for them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import onnx
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import peftc
from peftc import Attach, Lora, Nf4, Pipeline, capture
from peftc.cli import cli
from peftc.errors import (
    AdapterError,
    ArtifactError,
    CheckpointError,
    FoldError,
    PassError,
    PeftcError,
    ProofError,
    SelectionError,
)  # fmt: skip
from peftc.exporters.onnx_adapters import check, low_rank, read
from peftc.exporters.onnx_slots import slots_of
from peftc.reproducing import reproduce

from .conftest import MakeAdapter, MakeCheckpoint, Run, Tied, auto, with_peft
from .helpers import copied, edit, refuse
from .test_onnx import Runner, compare, switch

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with slots on all linear layers, exported before there is any adapter."""
    out = tmp_path_factory.mktemp("base") / "onnx"
    peftc.export(checkpoint("llama"), out, format="onnx", swap=True)
    return out


def fit(base: Path, out: Path, *adapters: Path | tuple[Path, float], **more: Any) -> Path:
    """The file of some adapters for a base."""
    given_ = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    chosen = [(str(path), weight) for path, weight in given_]
    peftc.export(base, out, adapters=chosen, format="onnx-adapter", **more)
    return out / "adapter.onnx_adapter"


def test_adapter_for_slots_is_made_again_byte_for_byte(
    base: Path, checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    fit(base, tmp_path / "out", (adapter(checkpoint("llama"), r=3), 0.5))
    assert reproduce(tmp_path / "out") == {"files": 1, "format": "onnx-adapter"}


def test_adapters_of_other_ranks_swap_on_one_session(
    base: Path, checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    plain = checkpoint("llama")
    options: list[dict[str, Any]] = [
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
        {"r": 8, "lora_alpha": 4, "use_rslora": True},
        # In one layer another rank than in the next, which one name for all ranks would not allow.
        {"r": 3, "rank_pattern": {"q_proj": 7, "0.mlp.up_proj": 1}, "alpha_pattern": {"k_proj": 9}},
    ]
    folders = [adapter(plain, seed, **more) for seed, more in enumerate(options)]
    files = [fit(base, tmp_path / str(i), folder) for i, folder in enumerate(folders)]
    run = Runner(base)
    for index in (None, 0, 1, 2, 0, None):
        switch(run, *([] if index is None else [files[index]]))
        model = auto(plain) if index is None else with_peft(plain, folders[index])
        compare(run, model, 3, 9, 1e-5)


def test_names_are_the_same_from_peft_s_file_to_the_session(
    base: Path, checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = adapter(checkpoint("llama"))
    slots = slots_of(json.loads((base / "peftc.json").read_text())["onnx"]["slots"])
    names = {name for slot in slots.values() for name in (slot.down, slot.up)}
    stored = load_file(folder / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in stored} == names
    assert set(read(fit(base, tmp_path / "out", folder))[0]) == names
    session = Runner(base).session  # after constant folding
    assert {value.name for value in session.get_overridable_initializers()} == names
    proto = onnx.load(str(base / "model.onnx"), load_external_data=False)
    shapes = {i.name: [d.dim_value or d.dim_param for d in i.type.tensor_type.shape.dim]
              for i in proto.graph.input}  # fmt: skip
    assert shapes[f"{Q}.lora_A.weight"] == [48, f"{Q}.lora_rank"]
    assert shapes[f"{DOWN}.lora_B.weight"] == [f"{DOWN}.lora_rank", 48]


@settings(max_examples=8, deadline=None)
@given(ranks=st.lists(st.integers(0, 9), min_size=14, max_size=14), seed=st.integers(0, 99))
def test_any_ranks_and_scales_add_what_they_add_to_the_weights(
    base: Path, checkpoint: MakeCheckpoint, ranks: list[int], seed: int
) -> None:
    """Ranks by site; none where it is 0."""
    if not any(ranks):
        ranks[seed % 14] = 1
    torch.manual_seed(seed)
    slots = slots_of(json.loads((base / "peftc.json").read_text())["onnx"]["slots"])
    model, tensors = auto(checkpoint("llama")), dict[str, torch.Tensor]()
    chosen = {site: r for site, r in zip(slots, ranks, strict=True) if r}
    scales = {site: float(torch.rand(())) + 0.1 for site in chosen}
    for site, rank in chosen.items():
        a = torch.randn(rank, slots[site].inputs) * 0.1
        b = torch.randn(slots[site].outputs, rank) * 0.1
        key = f"base_model.model.{site}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        model.get_submodule(site).weight.data += scales[site] * b @ a
    config = {
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": list(chosen),
        "rank_pattern": chosen, "alpha_pattern": {s: scales[s] * r for s, r in chosen.items()},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        run = Runner(base)
        switch(run, fit(base, Path(name) / "out", folder))
        compare(run, model, 3, 4, 1e-5)


def test_several_adapters_become_one_since_onnxruntime_would_take_the_first_alone(
    base: Path, checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    plain = checkpoint("llama")
    a, b = adapter(plain, 1), adapter(plain, 2, r=2, target_modules=["q_proj", "o_proj"])
    both = fit(base, tmp_path / "both", (a, 0.7), (b, -0.4))
    assert read(both)[0][f"{Q}.lora_A.weight"].shape == (48, 6)
    peftc.export(plain, tmp_path / "merged", merge=True, adapters=[(str(a), 0.7), (str(b), -0.4)])
    run = Runner(base)
    switch(run, both)
    compare(run, auto(tmp_path / "merged"), 3, 9, 1e-5)
    one, other = fit(base, tmp_path / "one", a), fit(base, tmp_path / "other", b)
    switch(run, one, other)
    compare(run, with_peft(plain, a), 1, 0, 1e-5)  # what must not be relied on


def test_program_s_adapters_lie_beside_their_base_proven(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, run: Run, tmp_path: Path
) -> None:
    plain, out = checkpoint("gpt2"), tmp_path / "out"
    folders = {"fr": adapter(plain, 1), "de": adapter(plain, 2, r=2, target_modules=["c_fc"])}
    for name, folder in folders.items():
        folders[name] = copied(folder, tmp_path / name)
    done = run(
        "export", plain, "-o", out, "--format", "onnx", "--adapters", "swap",
        "--adapter", folders["fr"], "--adapter", f"{folders['de']}=0.5",
    )  # fmt: skip
    assert done.code == 0 and "model.onnx with de in onnxruntime equals eager torch" in done.err
    manifest = json.loads((out / "peftc.json").read_text())
    said, proof = manifest["onnx"], manifest["proof"]
    assert said["adapters"]["de"] == {
        "files": {"model.onnx": "adapters/de.onnx_adapter"}, "sites": 2, "ranks": [2, 2]
    }  # fmt: skip
    assert len(said["slots"]) == 8 and len(said["base"]) == 64
    for name in ("fr", "de"):
        assert proof["onnx_adapters"][name]["model.onnx"]["relative_error"] <= 1e-4
        assert proof["onnx_adapters"][name]["site"]["relative_error"] <= 1e-5
    session = Runner(out)
    switch(session, out / "adapters/fr.onnx_adapter")
    compare(session, with_peft(plain, folders["fr"]), 3, 9, 1e-5)
    again = peftc.verify(out)
    assert again["onnx_adapters"] == proof["onnx_adapters"] and again["onnx"] == proof["onnx"]
    assert "transformer.h.0.mlp.c_fc.weight" in load_file(out / "model.safetensors")


def test_base_in_few_bits_takes_the_same_adapters(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    plain = checkpoint("llama")
    folder, eight = adapter(plain), tmp_path / "int8"
    peftc.export(plain, eight, format="onnx", swap=True, weights="int8")
    assert not (eight / "model.safetensors").exists()
    file = fit(eight, tmp_path / "file", folder)  # no checkpoint is there, and none is needed
    assert peftc.verify(tmp_path / "file")["site"]["sites"] == 14
    run = Runner(eight)
    switch(run, file)
    compare(run, with_peft(plain, folder), 1, 0, 0.1)
    nested = Nf4(double_quant=True, block_size=32)
    program = Pipeline([nested, Attach(path=str(folder))]).run(capture(plain))
    figures = peftc.to_onnx(program, tmp_path / "nf4", adapters="swap").manifest["proof"]
    assert figures["onnx_adapters"]["default"]["model.onnx"]["relative_error"] < 1e-5
    proto = onnx.load(str(tmp_path / "nf4/model.onnx"), load_external_data=False)
    assert [node.op_type for node in proto.graph.node].count("MatMulBnb4") == 14


def test_slots_are_chosen_like_targets(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = adapter(checkpoint("llama"), target_modules=["q_proj"])
    program = peftc.load(folder)
    artifact = peftc.to_onnx(program, tmp_path / "out", adapters="swap", slots="lm_head,v_proj")
    kinds = {site.rpartition(".")[2] for site in artifact.manifest["onnx"]["slots"]}
    assert kinds == {"q_proj", "v_proj", "lm_head"}
    fitting = {"target_modules": ["v_proj", "lm_head"], "r": 3}
    other = adapter(checkpoint("llama"), 3, **fitting)
    run = Runner(tmp_path / "out")
    switch(run, fit(tmp_path / "out", tmp_path / "file", other))
    compare(run, with_peft(checkpoint("llama"), other), 3, 9, 1e-5)


def test_tied_head_takes_an_adapter_that_could_not_be_merged(
    tied: Tied, adapter: MakeAdapter, tmp_path: Path
) -> None:
    plain = tied("llama")
    folder = adapter(plain, target_modules=["lm_head", "q_proj"])
    peftc.export(folder, tmp_path / "out", format="onnx", swap=True, proof="sites")
    run = Runner(tmp_path / "out")
    switch(run, tmp_path / "out/adapters/default.onnx_adapter")
    compare(run, with_peft(plain, folder), 3, 9, 1e-5)


def test_encoder_and_decoder_have_a_file_each(adapter: MakeAdapter, tmp_path: Path) -> None:
    options = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1,
               "num_heads": 4}  # fmt: skip
    torch.manual_seed(0)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**options))
    t5.save_pretrained(tmp_path / "base")
    folder = adapter(tmp_path / "base", target_modules=["q", "wo"])
    manifest = peftc.export(folder, tmp_path / "onnx", format="onnx", swap=True).manifest
    graphs = {"encoder_model", "decoder_model"}
    assert {g for s in manifest["onnx"]["slots"].values() for g in s["graphs"]} == graphs
    assert {f"adapters/default.{g}.onnx_adapter" for g in graphs} <= set(manifest["files"])
    for graph in graphs:
        assert (
            manifest["proof"]["onnx_adapters"]["default"][f"{graph}.onnx"]["relative_error"] < 1e-4
        )


def test_onnxruntime_genai_switches_between_adapters(
    base: Path, checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    import onnxruntime_genai as og

    plain, ids = checkpoint("llama"), [5, 17, 3, 29, 8]
    folders = {"a": adapter(plain, 1), "b": adapter(plain, 2, r=2)}
    model = og.Model(str(base))
    adapters = og.Adapters(model)
    for name, folder in folders.items():
        adapters.load(str(fit(base, tmp_path / name, folder)), name)
    for chosen in ("a", "b", None, "a"):
        options = og.GeneratorParams(model)
        options.set_search_options(max_length=25, min_length=25, do_sample=False)
        generator = og.Generator(model, options)
        if chosen:
            generator.set_active_adapter(adapters, chosen)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        eager = with_peft(plain, folders[chosen]) if chosen else auto(plain)
        prompt = {"input_ids": torch.tensor([ids])}
        want = eager.generate(**prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        assert list(map(int, generator.get_sequence(0))) == want[0].tolist()


def configured(plain: Path, config: peft.PeftConfig, folder: Path) -> Path:
    """A PEFT adapter of any method, every trained tensor of it random."""
    model = peft.get_peft_model(auto(plain), config)
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


WHERE = ["q_proj", "v_proj"]
REFUSED: dict[str, tuple[peft.PeftConfig, type[PeftcError], tuple[str, ...]]] = {
    "dora": (peft.LoraConfig(target_modules=WHERE, use_dora=True), AdapterError,
             ("LORA", "no product of two small matrices", Q)),
    "ia3": (peft.IA3Config(target_modules=WHERE, feedforward_modules=[]), AdapterError,
            ("IA3", "no product of two small matrices")),
    "loha": (peft.LoHaConfig(target_modules=WHERE), AdapterError, ("LOHA", "no product")),
    "prompt": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), PassError,
               ("virtual tokens",)),
    "head": (peft.LoraConfig(target_modules=WHERE, modules_to_save=["lm_head"]), PassError,
             ("trains 1 of the base's own tensors", "lm_head.weight")),
    "bias": (peft.LoraConfig(target_modules=WHERE, lora_bias=True), FoldError,
             ("a bias, and the model has no place for one", Q)),
    "embedding": (peft.LoraConfig(target_modules=["embed_tokens"]), AdapterError,
                  ("of kind embedding", "model.embed_tokens")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_adapter_that_is_more_than_low_rank_branches_is_refused(
    base: Path, checkpoint: MakeCheckpoint, tmp_path: Path, name: str
) -> None:
    config, kind, words = REFUSED[name]
    folder = configured(checkpoint("llama"), config, tmp_path / "adapter")
    refuse(tmp_path, kind, lambda out: fit(base, out, folder), *words)
    refuse(tmp_path, kind, lambda out: peftc.export(folder, out, format="onnx", swap=True), *words)


def changed(folder: Path, to: Path, change: Callable[[str, torch.Tensor], Any]) -> Path:
    """A copy of an adapter of which `change` gives each tensor's new value."""
    copy = copied(folder, to)
    tensors = load_file(copy / "adapter_model.safetensors")
    new = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(new, copy / "adapter_model.safetensors")
    return copy


def test_adapter_that_does_not_fit_is_refused_with_near_misses(
    base: Path, checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder, foreign = adapter(checkpoint("llama")), adapter(checkpoint("gpt2"))
    nan = changed(folder, tmp_path / "nan", lambda name, x: x * float("nan"))
    wide = changed(folder, tmp_path / "wide", lambda name, x: x[:, :-1] if "_A" in name else x)

    def refused(path: Path, *words: str, kind: type[PeftcError] = AdapterError) -> None:
        refuse(tmp_path, kind, lambda out: fit(base, out, path), *words)

    refused(foreign, "belongs to another architecture")
    refused(nan, "holds NaN or infinity")
    refused(wide, "lora_A.weight", "47]", "48]")
    refused(tmp_path / "none", "adapter_config.json", "is missing", kind=CheckpointError)
    peftc.export(
        checkpoint("llama"), tmp_path / "few", format="onnx", swap=True, slots="q_proj,up_proj",
        proof="sites",
    )  # fmt: skip
    refuse(
        tmp_path, AdapterError, lambda out: fit(tmp_path / "few", out, folder),
        "no slot for 10 of the layers", "did you mean", "self_attn.q_proj",
        "--slots down_proj,gate_proj,k_proj,o_proj,v_proj",
    )  # fmt: skip


def test_base_without_slots_and_wrong_options_are_refused(
    base: Path, checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    plain = checkpoint("llama")
    folder = adapter(plain)

    def refused(kind: type[PeftcError], *words: str, source: Path = plain, **more: Any) -> None:
        refuse(tmp_path, kind, lambda out: peftc.export(source, out, **more), *words)

    into: dict[str, Any] = {"format": "onnx-adapter", "adapters": [(str(folder), 1.0)]}
    refused(ArtifactError, "is no ONNX base with slots", source=folder, **into)
    refused(ArtifactError, "no adapter is attached", source=base, format="onnx-adapter")
    refused(ArtifactError, "is not merged", source=base, merge=True, **into)
    refused(ArtifactError, "slots='q_proj' goes with format=onnx", slots="q_proj")
    swap: dict[str, Any] = {"format": "onnx", "swap": True}
    refused(SelectionError, "'q_prj' matches no site", "did you mean q_proj", slots="q_prj", **swap)
    refused(SelectionError, "is no regular expression", slots="q_(proj", **swap)
    refused(AdapterError, "of kind embedding", slots="embed_tokens", **swap)
    lora = Pipeline([Lora(rank=2)]).run(capture(plain))
    refuse(
        tmp_path, ArtifactError, lambda out: peftc.to_onnx(lora, out, adapters="swap"),
        "adds nothing",
    )  # fmt: skip
    for words in (["--adapters", "swap"], ["--format", "onnx", "--slots", "q_proj"]):
        with pytest.raises(click.UsageError, match=r"goes with --(format onnx|adapters swap)"):
            cli.main(["export", str(plain), "-o", "out", *words], standalone_mode=False)


def test_verify_refuses_another_base_and_another_adapter(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, base: Path, tmp_path: Path
) -> None:
    own, folder = copied(base, tmp_path / "own"), adapter(checkpoint("llama"))
    file = fit(own, tmp_path / "file", folder)
    assert peftc.verify(tmp_path / "file", "whole")["onnx"]["model.onnx"]["relative_error"] < 1e-4
    manifest = json.loads((own / "peftc.json").read_text())

    def rebased(**more: Any) -> None:
        edit(own / "peftc.json", onnx={**manifest["onnx"], **more})

    rebased(base="0" * 64)
    with pytest.raises(ArtifactError, match="does not have the files that its slots belong to"):
        peftc.verify(tmp_path / "file")
    rebased()
    other = json.loads((tmp_path / "file/peftc.json").read_text())
    edit(tmp_path / "file/peftc.json", onnx={**other["onnx"], "base": "0" * 64})
    with pytest.raises(CheckpointError, match="no longer the base"):
        peftc.verify(tmp_path / "file")
    edit(tmp_path / "file/peftc.json", onnx=other["onnx"])
    stranger = fit(own, tmp_path / "stranger", adapter(checkpoint("llama"), 4))
    file.write_bytes(stranger.read_bytes())
    with pytest.raises(ProofError, match="not what was published"):
        peftc.verify(tmp_path / "file")
    sealed = json.loads((tmp_path / "stranger/peftc.json").read_text())["files"]
    edit(tmp_path / "file/peftc.json", files=sealed)  # the hashes hold, and the numbers do not
    with pytest.raises(ProofError, match=r"what adapter.onnx_adapter adds differs"):
        peftc.verify(tmp_path / "file")


def test_file_that_is_none_or_for_another_base_is_told(
    base: Path, checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = adapter(checkpoint("llama"))
    file = fit(base, tmp_path / "out", folder)
    slots = slots_of(json.loads((base / "peftc.json").read_text())["onnx"]["slots"])
    branches, files = low_rank(peftc.load(folder))[0], {"model.onnx": file.name}
    with pytest.raises(ProofError, match="is for another base"):
        check(file.parent, files, branches, slots, "f" * 64)
    for content in (b"", b"junk", file.read_bytes()[:1000]):
        (tmp_path / file.name).write_bytes(content)
        with pytest.raises(AdapterError, match="is no adapter that onnxruntime"):
            check(tmp_path, files, branches, slots, "f" * 64)
