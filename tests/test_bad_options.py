"""Bad options, recipes and targets: a typed error that says how to fix them, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from peftc import Attach, Lora, Merge, Pipeline, apply, capture, export, load, to_peft
from peftc.errors import (
    ArtifactError,
    CheckpointError,
    PassError,
    PeftcError,
    RecipeError,
    SelectionError,
    TiedWeightError,
)
from peftc.recipe import Recipe, build

from .conftest import SMALL, MakeAdapter, MakeCheckpoint
from .helpers import copied, edit, refuse, tree

WEIGHTS, MANIFEST = "model.safetensors", "peftc.json"
NAN, INF = float("nan"), float("inf")
Kind = type[PeftcError]


@pytest.fixture
def base(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return copied(checkpoint("llama"), tmp_path / "base")


@pytest.fixture
def trained(checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path) -> Path:
    return copied(adapter(checkpoint("llama")), tmp_path / "trained")


TYPO = ("'q_porj'", "did you mean q_proj")
OPTIONS: list[tuple[dict[str, Any], Kind, tuple[str, ...]]] = [
    ({"targets": "q_porj"}, SelectionError, TYPO),
    ({"targets": "self_attn.q_porj"}, SelectionError, ("'self_attn.q_porj'", "q_proj")),
    ({"targets": r".*\.q_porj"}, SelectionError, ("q_porj",)),
    ({"targets": "q_proj("}, PassError, ("q_proj(", "regular expression")),
    ({"targets": "self_attn"}, SelectionError, ("'self_attn'", "no site")),
    ({"targets": []}, PeftcError, ("target",)),
    ({"exclude": "q_porj"}, SelectionError, TYPO),
    ({"targets": "q_proj", "exclude": "self_attn.q_proj"}, SelectionError, ("exclude",)),
    ({"layers": "1-3"}, SelectionError, ("layer 2", "layer 3", "0 to 1")),
    ({"layers": [-1]}, PeftcError, ("-1",)),
    ({"layers": "one"}, PassError, ("'one'",)),
    ({"layers": "0", "layers_pattern": "layer"}, SelectionError, ("layer",)),
    ({"layers": "0", "layers_pattern": "layers("}, PeftcError, ("layers(",)),
    ({"rank": 0}, PassError, ("rank", "0")),
    ({"rank": -4}, PassError, ("rank", "-4")),
    ({"rank": 4.5}, PassError, ("rank", "4.5")),
    ({"rank": "many"}, PassError, ("rank", "'many'")),
    ({"rank": 25}, PassError, ("k_proj", "rank 25", "24")),
    ({"rank": 10**30}, PassError, ("rank", "48")),
    ({"rank_pattern": {"k_proj": 25}}, PassError, ("k_proj", "rank 25", "24")),
    ({"rank_pattern": {"k_proj": 0}}, PassError, ("k_proj", "0")),
    ({"rank_pattern": {"q_porj": 4}}, SelectionError, TYPO),
    ({"rank_pattern": {"q_proj(": 4}}, PeftcError, ("q_proj(",)),
    ({"alpha": 0}, PassError, ("alpha", "0")),
    ({"alpha": -1}, PassError, ("alpha", "-1")),
    ({"alpha": NAN}, PassError, ("alpha", "nan")),
    ({"alpha": INF}, PassError, ("alpha", "inf")),
    ({"alpha_pattern": {"q_proj": NAN}}, PassError, ("q_proj", "nan")),
    ({"alpha_pattern": {"q_porj": 4}}, SelectionError, TYPO),
    ({"dropout": 1.5}, PassError, ("dropout", "1.5")),
    ({"dropout": -0.1}, PassError, ("dropout", "-0.1")),
    ({"bias": "some"}, PassError, ("bias", "'some'", "lora_only")),
    ({"adapter": "a/b"}, PassError, ("adapter", "'a/b'")),
    ({"seed": -1}, PassError, ("seed", "-1")),
    ({"ranc": 4}, PassError, ("'ranc'", "did you mean rank")),
]


@pytest.mark.parametrize(("options", "kind", "words"), OPTIONS, ids=[str(o[0]) for o in OPTIONS])
def test_option_is_refused(
    options: dict[str, Any], kind: Kind, words: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    refuse(tmp_path, kind, lambda out: apply(base, build([("lora", options)], "here"), out), *words)


def test_options_are_refused_all_at_once(base: Path, tmp_path: Path) -> None:
    options = {"targets": ["q_porj", "v_proj"], "exclude": "lm_haed", "rank_pattern": {"x_proj": 4}}
    passes = build([("lora", {**options, "rank": 25})], "here")
    words = "'q_porj'", "'lm_haed'", "'x_proj'", "rank 25"
    errors = refuse(tmp_path, PeftcError, lambda out: apply(base, passes, out), *words)
    assert len(errors) == 3 + 2, "a v_proj in each of the two layers"


HEAD = "peftc: 1\npasses:\n"
RECIPES: dict[str, tuple[str | bytes, Kind, tuple[str, ...]]] = {
    "empty": ("", RecipeError, ("peftc", "passes")),
    "list": ("- lora", RecipeError, ("peftc", "passes")),
    "no_yaml": ("peftc: [", RecipeError, ("YAML",)),
    "no_text": (b"\xff\xfe\x00", RecipeError, ("YAML",)),
    "tagged_code": ("!!python/object/apply:os.system [id]", RecipeError, ("YAML",)),
    "date_of_month_99": (f"{HEAD}  - lora: {{rank: 2001-99-99}}", RecipeError, ("YAML",)),
    "number_too_long": (f"{HEAD}  - lora: {{rank: {'9' * 5000}}}", RecipeError, ("YAML",)),
    "too_large": (HEAD + "#" * (1 << 20), RecipeError, ("1048576 bytes",)),
    "no_version": ("passes: [lora]", RecipeError, ("peftc",)),
    "wrong_version": ("peftc: 2\npasses: [lora]", RecipeError, ("peftc", "2")),
    "no_passes": ("peftc: 1\npasses: []", RecipeError, ("passes",)),
    "unknown_key": (f"{HEAD}  - lora\npases: []", RecipeError, ("'pases'", "did you mean passes")),
    "unknown_pass": (f"{HEAD}  - lroa", PassError, ("'lroa'", "did you mean lora")),
    "unknown_option": (f"{HEAD}  - lora: {{ranc: 4}}", PassError, ("'ranc'", "did you mean rank")),
    "bad_value": (f"{HEAD}  - lora: {{rank: -1}}", PassError, ("rank", "-1")),
    "missing_option": (f"{HEAD}  - attach", PassError, ("path",)),
    "options_no_mapping": (f"{HEAD}  - lora: 4", RecipeError, ("lora", "4")),
    "two_passes_in_a_step": (f"{HEAD}  - {{lora: {{}}, merge: {{}}}}", RecipeError, ("2 passes",)),
}


def refuse_recipe(
    text: str | bytes, kind: Kind, words: tuple[str, ...], root: Path
) -> Sequence[PeftcError]:
    """The errors of a recipe, each of which names its file."""
    file = root / "recipe.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    errors = refuse(root, kind, lambda out: Recipe.load(file).build(str(file)), *words)
    assert [error for error in errors if str(file) not in (error.where or "")] == []
    return errors


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_refused(name: str, tmp_path: Path) -> None:
    refuse_recipe(*RECIPES[name], tmp_path)


def test_recipe_is_refused_with_all_that_is_wrong_at_once(tmp_path: Path) -> None:
    text = "peftc: 2\nname: x\npasses:\n  - lroa\n  - lora: {ranc: 4, rank: -1}\n  - attach\n"
    words = "peftc: ", "'name'", "'lroa'", "'ranc'", "-1", "path"
    assert len(refuse_recipe(text, PeftcError, words, tmp_path)) == len(words)


@pytest.mark.parametrize("name", ["gone.yaml", ".", "n" * 300])
def test_recipe_is_refused_when_it_cannot_be_read(name: str, tmp_path: Path) -> None:
    refuse(tmp_path, RecipeError, lambda out: Recipe.load(tmp_path / name), str(tmp_path))


Write = Callable[..., object]
# What writes a target: a copy, a merged checkpoint, a fresh adapter, a rewritten base, PEFT's form.
WRITERS: dict[str, Write] = {
    "export": lambda base, _, out, **more: export(base, out, **more),
    "merge": lambda base, trained, out, **more: export(
        base, out, merge=True, adapters=[(str(trained), 1.0)], **more),
    "apply": lambda base, _, out, **more: apply(base, [Lora()], out, **more),
    "rewrite": lambda base, trained, out, **more: apply(
        base, [Attach(path=str(trained)), Merge()], out, **more),
    "to_peft": lambda base, _, out, **more: to_peft(
        Pipeline([Lora()]).run(capture(base)), out, **more),
}  # fmt: skip
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@writers
@pytest.mark.parametrize("kind", ["folder", "file", "artifact", "broken_link"])
def test_target_is_refused_when_it_exists(
    kind: str, write: Write, base: Path, trained: Path, tmp_path: Path
) -> None:
    match kind, tmp_path / "out":
        case "folder", out:
            out.mkdir()
        case "file", out:
            out.touch()
        case "artifact", out:
            export(base, out)
        case _, out:
            out.symlink_to("nowhere")
    words = "exists already", str(tmp_path / "out")
    refuse(tmp_path, ArtifactError, lambda out: write(base, trained, out), *words)


@pytest.mark.parametrize("kind", ["folder", "file", "foreign_manifest", "link_to_an_artifact"])
def test_target_is_not_overwritten_when_peftc_did_not_write_it(
    kind: str, base: Path, trained: Path, tmp_path: Path
) -> None:
    match kind, tmp_path / "out":
        case "folder", out:
            copied(trained, out)
        case "file", out:
            out.write_text("precious")
        case "foreign_manifest", out:
            (copied(trained, out) / MANIFEST).write_text('{"name": "of another program"}')
        case _, out:
            out.symlink_to(export(base, tmp_path / "artifact").path)
    words = "not an artifact of peftc"
    refuse(tmp_path, ArtifactError, lambda out: export(base, out, overwrite=True), words)


@writers
def test_artifact_is_overwritten_when_asked(
    write: Write, base: Path, trained: Path, tmp_path: Path
) -> None:
    fresh, out = tmp_path / "fresh", tmp_path / "out"
    write(base, trained, fresh)
    export(base, out)
    write(base, trained, out, overwrite=True)
    assert {f.relative_to(out) for f in tree(out)} == {f.relative_to(fresh) for f in tree(fresh)}
    assert {path.name for path in tmp_path.iterdir()} == {"base", "trained", "fresh", "out"}


def test_artifact_stays_when_what_should_replace_it_is_refused(base: Path, tmp_path: Path) -> None:
    export(base, tmp_path / "out")
    (base / WEIGHTS).unlink()
    refuse(tmp_path, CheckpointError, lambda out: export(base, out, overwrite=True), WEIGHTS)


@writers
@pytest.mark.parametrize("place", ["base", "base/out", "base/../base/x/y", "."])
def test_target_is_refused_when_it_lies_in_its_source_or_holds_it(
    place: str, write: Write, base: Path, trained: Path, tmp_path: Path
) -> None:
    words = "lies inside the source", str(base)
    refuse(tmp_path, ArtifactError, lambda _: write(base, trained, tmp_path / place), *words)


@pytest.mark.parametrize("write", [WRITERS["merge"], WRITERS["rewrite"]], ids=["merge", "rewrite"])
def test_target_is_refused_when_it_lies_in_the_adapter(
    write: Write, base: Path, trained: Path, tmp_path: Path
) -> None:
    words = "lies inside the source", str(trained)
    refuse(tmp_path, ArtifactError, lambda _: write(base, trained, trained / "out"), *words)


@writers
def test_target_is_refused_when_the_disk_is_full(
    write: Write, base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    words = "GB free", str(tmp_path / "out")
    refuse(tmp_path, ArtifactError, lambda out: write(base, trained, out), *words)


def test_target_is_refused_when_its_parent_is_a_file(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "file" / "out"
    target.parent.touch()
    refuse(tmp_path, ArtifactError, lambda _: export(base, target), str(target))


def test_staging_is_refused_when_it_is_a_link(base: Path, trained: Path, tmp_path: Path) -> None:
    staging = tmp_path / ".out.peftc-staging"
    staging.symlink_to(trained)
    refuse(tmp_path, ArtifactError, lambda out: export(base, out), str(staging))


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tied")
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("by", ["peft", "peftc"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_is_refused_when_it_would_change_one_side_of_a_tied_weight(
    name: str,
    by: str,
    tied_llama: Path,
    checkpoint: MakeCheckpoint,
    adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    base = tied_llama if name == "llama" else checkpoint(name)
    if by == "peft":
        head = adapter(base, target_modules=["lm_head"])
    else:
        head = apply(base, [Lora(targets="lm_head")], tmp_path / "head").path / "adapter"
    other = "model.embed_tokens.weight" if name == "llama" else "transformer.wte.weight"
    words = "lm_head.weight", f"tied to {other}", "exclude it (lm_head)"
    write = WRITERS["merge"]
    refuse(tmp_path, TiedWeightError, lambda out: write(base, head, out), *words)


def retensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    """Makes other weights of a checkpoint's."""

    def act(base: Path) -> None:
        tensors = {name: change(tensor) for name, tensor in load_file(base / WEIGHTS).items()}
        save_file(tensors, base / WEIGHTS, {"format": "pt"})

    return act


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "config": (lambda base: edit(base / "config.json", rms_norm_eps=0.5), "no longer the base"),
    "dtype": (retensor(torch.Tensor.bfloat16), "no longer the base"),
    "values": (retensor(torch.Tensor.neg), "no longer the base"),
    "weights_gone": (lambda base: (base / WEIGHTS).unlink(), "holds no weights"),
    "gone": (lambda base: base.rename(base.parent / "moved"), "no such directory"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_applied_artifact_is_refused_when_its_base_has_changed(
    change: str, base: Path, trained: Path, tmp_path: Path
) -> None:
    applied = apply(base, [Attach(path=str(trained))], tmp_path / "applied").path
    assert load(applied).adapters
    act, words = CHANGES[change]
    act(base)
    (error,) = refuse(
        tmp_path, CheckpointError, lambda out: export(applied, out, merge=True), words
    )
    assert error.where == str(base)


MANIFESTS: list[dict[str, Any]] = [
    {"peftc": 2}, {"files": None}, {"kind": None}, {"source": None}, {"source": {}},
    {"adapters": None}, {"adapters": {"a b": "adapter"}}, {"adapters": {"default": "gone"}},
]  # fmt: skip


@pytest.mark.parametrize("changes", MANIFESTS, ids=str)
def test_applied_artifact_is_refused_when_its_manifest_is_damaged(
    changes: dict[str, Any], base: Path, trained: Path, tmp_path: Path
) -> None:
    applied = apply(base, [Attach(path=str(trained))], tmp_path / "applied").path
    edit(applied / MANIFEST, **changes)
    words = str(applied)
    refuse(tmp_path, PeftcError, lambda out: export(applied, out, merge=True), words)
