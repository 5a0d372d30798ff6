"""Bad checkpoints and adapters: a typed error that says how to fix them, and nothing written."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftc import Attach, Lora, Pass, apply, export
from peftc.errors import (
    AdapterError,
    CaptureError,
    CheckpointError,
    PassError,
    PeftcError,
    SelectionError,
)

from .conftest import MakeAdapter, MakeCheckpoint
from .helpers import copied, edit, refuse, replace_by_link

Damage = Callable[[Path], object]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
LAST = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def base(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return copied(checkpoint("llama"), tmp_path / "base")


@pytest.fixture
def trained(checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path) -> Path:
    """An adapter of it to damage."""
    return copied(adapter(checkpoint("llama")), tmp_path / "trained")


def move_out(file: Path) -> None:
    """Moves a file out of its folder and links to it."""
    file.touch()
    replace_by_link(file, file.rename(file.parent.parent / "elsewhere"))


def index(folder: Path, shard: object) -> None:
    (folder / INDEX).write_text("{}")
    edit(folder / INDEX, weight_map={"lm_head.weight": shard})


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def config(**changes: Any) -> Damage:
    return lambda p: edit(p / "config.json", **changes)


OTHER = {"h.0.attn.c_attn.weight": torch.ones(2, 2)}
CHECKPOINTS: dict[str, tuple[Damage, type[PeftcError], str]] = {
    "no_config": (lambda p: (p / "config.json").unlink(), CheckpointError, "config.json"),
    "config_no_json": (lambda p: (p / "config.json").write_text("{"), CheckpointError, "read"),
    "config_no_object": (lambda p: (p / "config.json").write_text("[]"), CheckpointError, "object"),
    "no_weights": (lambda p: (p / SINGLE).unlink(), CheckpointError, "holds no weights"),
    "truncated": (lambda p: os.truncate(p / SINGLE, 9000), CheckpointError, "truncated"),
    "weights_are_a_folder": (lambda p: as_folder(p / SINGLE), CheckpointError, SINGLE),
    "missing_shard": (lambda p: index(p, "gone.safetensors"), CheckpointError, "gone.safetensors"),
    "shard_above": (lambda p: index(p, "../x"), CheckpointError, "'../x'"),
    "shard_absolute": (lambda p: index(p, "/etc/passwd"), CheckpointError, "'/etc/passwd'"),
    "shard_of_many_letters": (lambda p: index(p, "n" * 300), CheckpointError, "nnn"),
    "shard_no_safetensors": (lambda p: index(p, "config.json"), CheckpointError, "config.json"),
    "index_of_numbers": (lambda p: index(p, 1), CheckpointError, "weight_map"),
    "link_out": (lambda p: move_out(p / SINGLE), CheckpointError, "link out of its folder"),
    "companion_link_out": (lambda p: move_out(p / "tokenizer.json"), CheckpointError, "link out"),
    "no_architecture": (config(architectures=None), CaptureError, "architecture"),
    "architectures_no_list": (config(architectures={"a": 1}), CaptureError, "architecture"),
    "unknown_architecture": (config(architectures=["LamaModel"]), CaptureError, "'LamaModel'"),
    "config_of_other_shapes": (config(hidden_size=96), CaptureError, "instead of"),
    "config_of_no_sense": (config(hidden_size="x"), CaptureError, "LlamaForCausalLM"),
    "other_weights": (lambda p: save_file(OTHER, p / SINGLE), CaptureError, "c_attn.weight"),
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_checkpoint_is_refused(damage: str, base: Path, tmp_path: Path) -> None:
    act, kind, words = CHECKPOINTS[damage]
    act(base)
    (error,) = refuse(tmp_path, kind, lambda out: export(base, out), words)
    assert error.where and str(base) in error.where


def test_shards_are_refused_all_at_once(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = copied(checkpoint("llama", shards=True), tmp_path / "base")
    one, two, three, *_ = sorted(base.glob("*.safetensors"))
    one.unlink()
    os.truncate(two, 100)
    move_out(three)
    errors = refuse(tmp_path, CheckpointError, lambda out: export(base, out))
    assert [error.where for error in errors] == [str(one), str(two), str(three)]


@pytest.mark.parametrize(
    "source", ["no/such/folder", "nothing", "n" * 300, "a\0b", "~no-such-user/x"]
)
def test_source_is_refused_when_it_does_not_exist(source: str, tmp_path: Path) -> None:
    refuse(tmp_path, CheckpointError, lambda out: export(source, out), source)


@pytest.mark.parametrize("architectures", [["GPT2Model"], None, {"a": 1}, 5, ['x"; rm -rf /; "']])
@pytest.mark.parametrize("folder", ["base", "it's a $(base)"])
def test_pickled_checkpoint_is_refused_with_the_command_that_converts_it(
    architectures: Any, folder: str, base: Path, tmp_path: Path
) -> None:
    base = base.rename(tmp_path / folder)
    edit(base / "config.json", architectures=architectures)
    (base / SINGLE).rename(base / "pytorch_model.bin")
    (error,) = refuse(tmp_path, CheckpointError, lambda out: export(base, out), "pytorch_model.bin")
    _, python, command = (error.fix or "").partition("python -c ")
    _, _, code = shlex.split(python + command)
    names = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert names == {str(base), f"{base}-safetensors"}
    assert "rm -rf" not in code


def test_code_of_a_checkpoint_is_refused_and_not_run(base: Path, tmp_path: Path) -> None:
    config(architectures=["Mine"], model_type="mine", auto_map={"AutoConfig": "mine.Mine"})(base)
    (base / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    words = "'Mine'", "is not run", "peftc.capture(model)"
    refuse(tmp_path, CaptureError, lambda out: export(base, out), *words)


def hub_cache(base: Path, cache: Path) -> Path:
    """A checkpoint as the hub's cache holds it: a snapshot of links to blobs."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    for folder in ("refs", "blobs"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(f for f in base.rglob("*") if f.is_file()):
        link = snapshot / file.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = Path(shutil.copy(file, repo / "blobs" / f"{number:064}"))
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("by", ["folder", "id"])
@pytest.mark.parametrize("more", ["tokenizer_config.json", "additional_chat_templates/tool.jinja"])
def test_hub_cache_is_read(
    more: str, by: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / more).parent.mkdir(exist_ok=True)
    (base / more).write_text("{}")
    snapshot = hub_cache(base, tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    export(snapshot if by == "folder" else "org/name", tmp_path / "out")
    for name in ("config.json", SINGLE, more):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
        assert not (tmp_path / "out" / name).is_symlink()


def test_hub_cache_is_refused_when_a_link_leads_to_another_model(
    base: Path, tmp_path: Path
) -> None:
    snapshot = hub_cache(base, tmp_path / "hub")
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    replace_by_link(snapshot / SINGLE, (snapshot / SINGLE).resolve().rename(other / "0"))
    refuse(tmp_path, CheckpointError, lambda out: export(snapshot, out), "link out of its folder")


def test_hub_id_is_refused_when_offline(tmp_path: Path) -> None:
    words = "org/nothing", "hf download org/nothing"
    refuse(tmp_path, CheckpointError, lambda out: export("org/nothing", out), *words)


def rewrite(file: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Replaces every tensor of a file by what `change` makes of it; None drops it."""
    changed = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file({k: v for k, v in changed.items() if v is not None}, file, {"format": "pt"})


def dropped(text: str) -> Damage:
    return lambda p: rewrite(p / WEIGHTS, lambda name, t: None if text in name else t)


def added(name: str) -> Damage:
    return lambda p: save_file({**load_file(p / WEIGHTS), name: torch.ones(4, 48)}, p / WEIGHTS)


def holding(value: float) -> Damage:
    last = torch.tensor([-1])
    return lambda p: rewrite(
        p / WEIGHTS, lambda name, t: t.index_fill(0, last, value) if name == LAST else t
    )


def setting(**changes: Any) -> Damage:
    return lambda p: edit(p / CONFIG, **changes)


TYPO = ("'q_porj'", "did you mean q_proj")
ADAPTERS: dict[str, tuple[Damage, type[PeftcError], tuple[str, ...]]] = {
    "no_config": (lambda p: (p / CONFIG).unlink(), CheckpointError, (CONFIG,)),
    "no_weights": (lambda p: (p / WEIGHTS).unlink(), PeftcError, (WEIGHTS,)),
    "pickled": (lambda p: (p / WEIGHTS).rename(p / PICKLED), AdapterError, (PICKLED, "save it")),
    "truncated": (lambda p: os.truncate(p / WEIGHTS, 5000), CheckpointError, ("truncated",)),
    "link_out": (lambda p: move_out(p / WEIGHTS), CheckpointError, ("link out of its folder",)),
    "no_tensors": (dropped(""), AdapterError, ("holds no tensors",)),
    "wrong_shapes": (
        lambda p: rewrite(p / WEIGHTS, lambda _, t: t.repeat(1, 2)),
        AdapterError, ("[4, 96]", "[4, 48]")),
    "another_rank": (setting(r=8), AdapterError, ("[4, 48]", "[8, 48]")),
    "half_its_layers": (dropped(".layers.1."), AdapterError, ("model.layers.1.self_attn",)),
    "half_of_each_pair": (dropped("lora_B"), AdapterError, ("lora_B.weight",)),
    "tensor_without_site": (
        added(FIRST.replace("q_proj", "q_porj") + ".lora_A.weight"),
        AdapterError, ("q_porj", "did you mean", "self_attn.q_proj")),
    "tensor_of_no_method": (added(f"{FIRST}.lora_C.weight"), AdapterError, ("lora_C",)),
    "weight_of_the_base": (added("base_model.model.lm_head.weight"), AdapterError, ("lm_head",)),
    "nan": (holding(NAN), AdapterError, (LAST, "NaN")),
    "infinity": (holding(-INF), AdapterError, (LAST, "infinity")),
    "no_peft_type": (setting(peft_type=None), AdapterError, ("peft_type",)),
    "unknown_peft_type": (setting(peft_type="SHIRA"), AdapterError, ("SHIRA", "LORA")),
    "dora": (setting(use_dora=True), AdapterError, ("lora_magnitude_vector",)),
    "modules_to_save": (setting(modules_to_save=["x"]), SelectionError, ("'x'",)),
    "pissa": (setting(init_lora_weights="pissa"), AdapterError, ("pissa",)),
    "rank_no_number": (setting(r="many"), AdapterError, ("rank",)),
    "alpha_zero": (setting(lora_alpha=0), AdapterError, ("alpha",)),
    "alpha_nan": (setting(lora_alpha=NAN), AdapterError, ("alpha",)),
    "alpha_pattern_nan": (setting(alpha_pattern={"q_proj": NAN}), AdapterError, ("q_proj",)),
    "alpha_pattern_typo": (setting(alpha_pattern={"q_porj": 4}), SelectionError, TYPO),
    "rank_pattern_zero": (setting(rank_pattern={"q_proj": 0}), AdapterError, ("q_proj",)),
    "rank_pattern_typo": (setting(rank_pattern={"q_porj": 4}), SelectionError, TYPO),
    "pattern_no_expression": (setting(rank_pattern={"q_proj(": 4}), PeftcError, ("q_proj(",)),
    "target_typo": (setting(target_modules=["q_porj"]), SelectionError, TYPO),
}  # fmt: skip


@pytest.mark.parametrize("damage", ADAPTERS)
def test_adapter_is_refused(damage: str, base: Path, trained: Path, tmp_path: Path) -> None:
    act, kind, words = ADAPTERS[damage]
    act(trained)
    given = [(str(trained), 1.0)]
    refuse(tmp_path, kind, lambda out: export(base, out, merge=True, adapters=given), *words)


@pytest.mark.parametrize("other", ["gpt2", "opt", "bert"])
def test_adapter_is_refused_when_it_belongs_to_another_architecture(
    other: str, base: Path, checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    path = str(adapter(checkpoint(other)))
    words = "belongs to another architecture", path, "model.layers.0.self_attn.q_proj"
    refuse(tmp_path, AdapterError, lambda out: export(base, out, adapters=[(path, 1.0)]), *words)


@pytest.mark.parametrize("weight", [NAN, INF])
def test_weight_is_refused_when_it_is_not_finite(
    weight: float, base: Path, trained: Path, tmp_path: Path
) -> None:
    given = [(str(trained), weight)]
    refuse(
        tmp_path, PassError, lambda out: export(base, out, adapters=given), "weight", str(weight)
    )


@pytest.mark.parametrize("path", ["n" * 300, "~no-such-user/adapter", "org/nothing"])
def test_adapter_is_refused_when_it_does_not_exist(path: str, base: Path, tmp_path: Path) -> None:
    refuse(tmp_path, CheckpointError, lambda out: export(base, out, adapters=[(path, 1.0)]), path)


@pytest.mark.parametrize("name", [None, "", "org/nothing"])
def test_adapter_as_source_is_refused_when_its_base_is_unknown(
    name: str | None, trained: Path, tmp_path: Path
) -> None:
    setting(base_model_name_or_path=name)(trained)
    words = name or f"--adapter {trained}"
    refuse(tmp_path, CheckpointError, lambda out: export(trained, out, merge=True), words)


@pytest.mark.parametrize("by", ["lora", "attach"])
def test_adapters_are_refused_when_two_have_one_name(
    by: str, base: Path, trained: Path, tmp_path: Path
) -> None:
    one: Pass = Lora(adapter="same") if by == "lora" else Attach(path=str(trained), adapter="same")
    words = "'same'", "another name"
    refuse(tmp_path, PassError, lambda out: apply(base, [one, one], out), *words)


def test_adapters_are_merged_when_their_folders_have_one_name(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    copies = [copied(trained, tmp_path / f"run{i}" / "adapter") for i in range(3)]
    export(base, tmp_path / "out", merge=True, adapters=[(str(copy), 0.5) for copy in copies])
    assert (tmp_path / "out" / SINGLE).is_file()
