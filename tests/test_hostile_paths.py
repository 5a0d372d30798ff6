"""Paths: what lies in a file's place, and what names in files lead to, for each that is opened."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from peftc import Attach, Lora, Pipeline, apply, capture, export, to_peft
from peftc.artifact import MANIFEST, Artifact, Staging, claimed, staging
from peftc.checkpoint import Checkpoint, read_json
from peftc.errors import ArtifactError, CheckpointError, PeftcError, RunError, Violations
from peftc.runs import working
from peftc.terminal import Terminal

from .conftest import MakeAdapter, MakeCheckpoint
from .fuzz.reader import Reader, as_bytes, zeros
from .fuzz.readers import INDEX, onnx_seed, readers
from .fuzz.running_readers import SLOT, told
from .helpers import copied, edit, refuse, replace_by_link, within

SECONDS = 10  # more than any of these takes; who opens a pipe waits for ever


def _socket(path: Path) -> None:
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's whole path must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link_to_pipe(path: Path) -> None:
    os.mkfifo(path.parent / "pipe")
    replace_by_link(path, "pipe")


def _link_out(path: Path) -> None:
    away = path.parent.parent / f"{path.parent.name}-away"
    away.mkdir(exist_ok=True)
    replace_by_link(path, path.rename(away / path.name))


INSTEAD: dict[str, Callable[[Path], None]] = {
    "pipe": _pipe,
    "link_to_a_pipe": _link_to_pipe,
    "device": lambda path: replace_by_link(path, "/dev/zero"),
    "socket": _socket,
    "folder": _folder,
    "link_out": _link_out,
    "link_to_nothing": lambda path: replace_by_link(path, path.name),
}
# Which file each of these reads is the user's own choice: a link is followed.
CHOSEN = {"header", "recipe", "jsonl", "json", "csv", "parquet", "four_bit"}
# Of an interrupted run: what cannot be read of it is as if it were not there.
LEFT = {"log", "metrics"}
# Read by a name that a manifest or a caller has checked.
NAMED = {"onnx_adapter", "header", "four_bit"}
# Whether these are there says something, and what is in them does not.
UNREAD = {
    ("metrics", "checkpoint-1/sealed"), ("settings", "checkpoint-1/sealed"), ("log", "tree/a.json"),
    ("inspect_adapter", "adapter.safetensors"),
}  # fmt: skip
PLACES = [
    (name, file)
    for name, reader in readers().items()
    for file in (reader.file, *reader.others)
    if (name, file) not in UNREAD
]


def _made(reader: Reader, root: Path) -> Path:
    """A folder of its own with a reader's sound files in it."""
    root.mkdir()
    for name, data in {**reader.others, reader.file: reader.seeds[0]}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.mark.parametrize("instead", INSTEAD)
@pytest.mark.parametrize(("name", "file"), PLACES, ids=[f"{n}-{f}" for n, f in PLACES])
def test_what_is_no_file_of_the_folder_is_refused_at_once(
    name: str, file: str, instead: str, tmp_path: Path
) -> None:
    reader = readers()[name]
    root = _made(reader, tmp_path / "folder")
    INSTEAD[instead](root / file)
    followed = instead == "link_out" and name in CHOSEN | NAMED
    with within(SECONDS):
        # A folder of its name is no manifest: what is there is shown as a checkpoint.
        unlike = (name, file, instead) == ("inspect", MANIFEST, "folder")
        if instead == "link_to_nothing" or unlike:  # as if it were not there
            with suppress(PeftcError):
                reader.read(root)
        elif followed or (name in LEFT and instead != "folder"):
            reader.read(root)
        else:
            with pytest.raises(PeftcError):
                reader.read(root)


NAMES = ["../x", "/etc/passwd", "a/../../x", "x\0y", "a\nb", "..", ".", "", "C:\\x", "\ud800", "/x"]


def _manifest(root: Path, **changes: Any) -> None:
    (root / "weights.safetensors").write_bytes(zeros(w=[2]))
    (root / MANIFEST).write_bytes(told("onnx", **changes))


def _index(root: Path, name: str) -> object:
    (root / "config.json").write_bytes(as_bytes({}))
    index = {**INDEX, "weight_map": {"a.weight": name}}
    (root / "model.safetensors.index.json").write_bytes(as_bytes(index))
    return Checkpoint.open(root)


def _files(root: Path, name: str) -> object:
    _manifest(root)
    edit(root / MANIFEST, files={name: {"size": 0, "blake3": "0"}})
    if errors := Artifact.open(root).damage():
        raise errors[0]
    return None


def _adapters(root: Path, name: str) -> object:
    from peftc import load

    (root / "base").mkdir()
    (root / MANIFEST).write_bytes(told("apply", adapters={"default": name}))
    reader = readers()["capture"]
    for file, data in {**reader.others, reader.file: reader.seeds[0]}.items():
        (root / "base" / file).write_bytes(data)
    return load(root)


def _slot(root: Path, name: str) -> object:
    from peftc.running_onnx import adapter_file

    _manifest(root, onnx={"slots": SLOT, "adapters": {"one": {"files": {"model.onnx": name}}}})
    return adapter_file(root, "one")


def _cache(root: Path, name: str) -> object:
    from peftc.constant_cache import ConstantCache

    said: dict[str, Any] = {"numbering": None, "shapes": {}, "layers": [["w", "w"]]}
    (root / MANIFEST).write_bytes(told("cache", file=name, **said))
    return ConstantCache.open(root)


def _constant(root: Path, name: str) -> object:
    from peftc.libraries import mapped

    return mapped(root, {"constants": {"w": [name, "w", "float32", [2]]}})


def _library(root: Path, name: str) -> object:
    from peftc import runtime

    built = {"device": "cpu"}
    _manifest(root)
    edit(root / MANIFEST, kind="pt2", pt2={"built": built, "library": name})
    return runtime.load(root)


def _published(root: Path, name: str) -> object:
    from peftc.resident import Slots

    return Slots(root, {"slots": {"q": [6, 6]}, "published": {"one": name}}).read("one")


def _external(root: Path, name: str) -> object:
    from peftc.exporters.to_onnx import external_data

    (root / "model.onnx").write_bytes(onnx_seed(name))
    raise external_data(root)[0]


def _graph(root: Path, name: str) -> object:
    from peftc.running_onnx import dangers

    decoder = {"filename": name, "session_options": {}}
    (root / "genai_config.json").write_bytes(as_bytes({"model": {"decoder": decoder}}))
    raise dangers(root)[0]


def _written(root: Path, name: str) -> object:
    with staging(root / "out", key="k", need=0, sources=[]) as stage:
        stage.add(name, b"x")
    return None


NAMED_IN: dict[str, Callable[[Path, str], object]] = {
    "index": _index,
    "manifest_files": _files,
    "manifest_adapters": _adapters,
    "onnx_adapter": _slot,
    "onnx_external_data": _external,
    "genai_graph": _graph,
    "constant_cache": _cache,
    "pt2_constant": _constant,
    "pt2_library": _library,
    "pt2_adapter": _published,
    "what_is_written": _written,
}


@pytest.mark.parametrize("place", NAMED_IN)
def test_name_in_a_file_is_refused_when_it_is_no_name_of_a_file_in_its_folder(
    place: str, tmp_path: Path
) -> None:
    for number, name in enumerate(NAMES):
        if place == "onnx_external_data" and name == "\ud800":
            continue  # protobuf writes no such text
        (root := tmp_path / str(number) / "in").mkdir(parents=True)
        (root.parent / "x").write_bytes(zeros(w=[2]))  # what ../x would find
        with within(SECONDS), pytest.raises(PeftcError):
            NAMED_IN[place](root, name)
        assert {path.name for path in root.parent.iterdir()} == {"in", "x"}


def test_folder_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "x").touch()
    (root := tmp_path / "artifact").mkdir()
    (root / "a").symlink_to(tmp_path / "away")
    with pytest.raises(PeftcError, match="is missing, or not what was published"):
        _files(root, "a/x")


def test_hostile_folder_is_refused_by_whole_jobs(
    checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Whatever transformers would open by itself, and all at once."""
    base = copied(checkpoint("llama"), tmp_path / "base")
    trained = copied(adapter(checkpoint("llama")), tmp_path / "trained")
    (base / "additional_chat_templates").mkdir()
    os.mkfifo(base / "tokenizer_config.json.x")
    os.mkfifo(base / "additional_chat_templates" / "tool.jinja")
    replace_by_link(base / "generation_config.json", "/dev/zero")
    jobs: list[Callable[[Path], object]] = [
        lambda out: export(base, out),
        lambda out: export(base, out, merge=True, adapters=[(str(trained), 1.0)]),
        lambda out: apply(base, [Lora(rank=2)], out),
    ]
    for job in jobs:
        with within(SECONDS):
            errors = refuse(tmp_path, CheckpointError, job)
        assert [Path(str(e.where)).name for e in errors] == [
            "generation_config.json", "tokenizer_config.json.x", "tool.jinja",
        ]  # fmt: skip


VICTIM = "do not touch"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that links lead to."""
    (file := tmp_path / "victim").write_text(VICTIM)
    return file


def _adapted() -> Any:
    return Pipeline([Lora(rank=2)]).run(capture(torch.nn.Sequential(torch.nn.Linear(4, 4))))


def _written_adapter(target: Path) -> object:
    return to_peft(_adapted(), target)


def _stage_key(target: Path) -> str:
    """The key that a staging directory must have to be gone on with."""
    seen: list[str] = []
    original = Staging.__init__

    def spy(self: Staging, root: Path, target: Path, key: str, overwrite: bool) -> None:
        seen.append(key)
        original(self, root, target, key, overwrite)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "__init__", spy)
        _written_adapter(target.parent / "first")
    return seen[0]


@pytest.mark.parametrize("name", ["lock", "done.jsonl", "done.new", "tree", "tree/x"])
def test_nothing_is_written_through_a_link_in_a_staging_directory(
    name: str, victim: Path, tmp_path: Path
) -> None:
    target, stage = tmp_path / "out", tmp_path / ".out.peftc-staging"
    key = _stage_key(target)
    (stage / "tree").mkdir(parents=True)
    (stage / "done.jsonl").write_bytes(as_bytes({"key": key}) + b"\n")
    link = stage / name.replace("tree/x", "tree/adapter_model.safetensors")
    if name == "tree":
        link.rmdir()
        (away := tmp_path / "away").mkdir()
        (away / "kept").write_text(VICTIM)
        link.symlink_to(away)
    else:
        replace_by_link(link, victim)
    try:
        _written_adapter(target)
    except PeftcError:
        assert not target.exists()
    else:
        assert not any(path.is_symlink() for path in target.rglob("*"))
    assert victim.read_text() == VICTIM
    if name == "tree":
        assert [path.name for path in away.iterdir()] == ["kept"]


@pytest.mark.parametrize("purpose", ["staging", "training", "part-1-of-2"])
def test_directory_of_work_that_is_a_link_is_refused(
    purpose: str, victim: Path, tmp_path: Path
) -> None:
    (tmp_path / f".out.peftc-{purpose}").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="is a link"), claimed(tmp_path / "out", purpose):
        pass
    assert victim.read_text() == VICTIM


def test_pipe_in_the_place_of_a_lock_does_not_hold_the_work(tmp_path: Path) -> None:
    (stage := tmp_path / ".out.peftc-staging").mkdir()
    os.mkfifo(stage / "lock")
    with within(SECONDS):
        _written_adapter(tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST).is_file()


@pytest.mark.parametrize("name", ["run.json.new", "metrics.jsonl.new"])
def test_nothing_is_written_through_a_link_in_a_training_s_directory(
    name: str, victim: Path, tmp_path: Path
) -> None:
    with working(tmp_path / "out", claim=True) as run:
        (run.root / name).symlink_to(victim)
        run.begin({"settings": {}}, restart=False)
    assert victim.read_text() == VICTIM


def test_nothing_is_written_through_a_link_beside_an_artifact(
    victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from peftc.warm import save_compile_cache

    made = b"x", SimpleNamespace(artifacts={})
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: made)
    for name in (".torch_compile.cache.new", ".torch_compile.json.new"):
        (tmp_path / name).symlink_to(victim)
    save_compile_cache(tmp_path)
    assert victim.read_text() == VICTIM


@pytest.mark.parametrize("overwrite", [False, True])
def test_target_that_is_a_link_is_refused(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "away")
    with pytest.raises(ArtifactError):
        to_peft(_adapted(), tmp_path / "out", overwrite=overwrite)
    assert not list((tmp_path / "away").iterdir())


def test_names_that_differ_by_case_alone_are_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = copied(checkpoint("llama", shards=True), tmp_path / "base")
    index = read_json(base / "model.safetensors.index.json", "x")
    first = sorted(set(index["weight_map"].values()))[0]
    places = dict(index["weight_map"])
    moved = next(key for key, shard in places.items() if shard == first)
    places[moved] = first.upper()
    edit(base / "model.safetensors.index.json", weight_map=places)
    refuse(tmp_path, CheckpointError, lambda out: export(base, out), "case alone")
    with (
        pytest.raises(ArtifactError, match=r"case alone: License\.txt, LICENSE\.txt"),
        staging(tmp_path / "o", key="k", need=0, sources=[]) as stage,
    ):
        stage.add("License.txt", b"")
        stage.add("LICENSE.txt", b"")
    assert not (tmp_path / "o").exists()


def test_companions_that_differ_by_case_alone_are_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = copied(checkpoint("llama"), tmp_path / "base")
    for name in ("LICENSE.md", "LICENSE.MD"):
        (base / name).write_text(name)
    refuse(tmp_path, ArtifactError, lambda out: export(base, out), "LICENSE.MD", "case alone")


SETTINGS: dict[str, dict[str, Any]] = {
    "library": {"session_options": {"custom_ops_library": "x.so"}},
    "provider": {"session_options": {"provider_options": [{"x": {"library_path": "x.so"}}]}},
    "provider_address": {"session_options": {"provider_options": [{"cuda": {"alloc": "1"}}]}},
    "pipeline": {"pipeline": [{"x": {"filename": "../x.onnx"}}]},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_that_load_libraries_are_refused(setting: str, tmp_path: Path) -> None:
    from peftc.running_onnx import GenAI

    decoder = {"filename": "model.onnx", **SETTINGS[setting]}
    (tmp_path / "genai_config.json").write_bytes(as_bytes({"model": {"decoder": decoder}}))
    with pytest.raises(RunError, match="peftc does not write"):
        GenAI(tmp_path, None)


def test_errors_show_no_escapes_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    Terminal().error(CheckpointError("a\x1b]0;b\x07", where="\x1b[2J[red]x", fix="\x9b31m"))
    assert not set("\x1b\x07\x9b") & set(capfd.readouterr().err)


def test_adapter_s_path_in_a_recipe_is_no_way_into_other_files(tmp_path: Path) -> None:
    shutil.copytree(_made(readers()["attach"], tmp_path / "a"), tmp_path / "b")
    replace_by_link(tmp_path / "b" / "adapter_config.json", tmp_path / "a" / "adapter_config.json")
    with pytest.raises((CheckpointError, Violations), match="link out"):
        Pipeline([Attach(path=str(tmp_path / "b"))]).run(
            capture(torch.nn.Sequential(torch.nn.Linear(6, 6)))
        )
