"""The head start: a guess that must never show in what is written, nor leave anything behind."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc
from peftc import Merge, Pipeline, capture, direct, early, export, to_safetensors
from peftc.artifact import AHEAD, LOG, Artifact
from peftc.checkpoint import Checkpoint
from peftc.cli import main
from peftc.early import HeadStart
from peftc.errors import ArtifactError, PeftcError
from peftc.passes.attach import Attach
from peftc.passes.untie import Untie

from .conftest import MakeAdapter, MakeCheckpoint, Tied
from .helpers import alone, copied, edit, tree

Bytes = dict[str, bytes]
BLOCK = 4096


@pytest.fixture
def base(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint("llama", torch.bfloat16, shards=True)


@pytest.fixture
def trained(base: Path, adapter: MakeAdapter) -> Path:
    return adapter(base, target_modules=["q_proj", "v_proj"])


@contextmanager
def ahead(source: Path, adapter: Path, target: Path, overwrite: bool = False) -> Iterator[Any]:
    """A head start that has copied all that it can."""
    with HeadStart(source, [str(adapter)], target, overwrite) as head:
        head._thread.join()
        yield head


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "BLOCK", BLOCK)
    monkeypatch.setattr(early, "_RUN", 1)


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the linker writes blocks, and not the head start."""
    places: list[int] = []
    write = direct.write

    def count(*given: Any) -> None:
        if "head-start" not in threading.current_thread().name:
            places.append(given[-1])
        write(*given)

    monkeypatch.setattr(direct, "write", count)
    return places


def merge(base: Path, adapter: Path, target: Path, head: HeadStart | None = None) -> None:
    export(base, target, merge=True, adapters=[(str(adapter), 1.0)], proof="sites", head=head)


def merged(base: Path, adapter: Path, target: Path) -> Bytes:
    merge(base, adapter, target)
    return weights(target)


def weights(folder: Path) -> Bytes:
    """The weights, of which the manifest must say the same, in a folder beside which is nothing."""
    assert not Artifact.open(folder).damage()
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def blocks(base: Path) -> int:
    sizes = [file.stat().st_size for file in base.glob("*.safetensors")]
    return sum(-(-size // BLOCK) for size in sizes)


def untouched(base: Path, *words: str) -> int:
    """The whole blocks without a header that none of these modules lies in."""
    found = 0
    for file in Checkpoint.open(base).files:
        free = set(range(1, file.size // BLOCK))
        for ref in file.tensors.values():
            if any(word in ref.name for word in words):
                end = ref.start + ref.nbytes
                free -= {n for n in free if n * BLOCK < end and ref.start < (n + 1) * BLOCK}
        found += len(free)
    return found


def test_bytes_are_those_of_a_merge_without(
    base: Path, trained: Path, tmp_path: Path, linked: list[int]
) -> None:
    plain = merged(base, trained, tmp_path / "plain")
    assert len(linked) == blocks(base)
    linked.clear()
    with ahead(base, trained, tmp_path / "out") as head:
        merge(base, trained, tmp_path / "out", head)
    assert weights(tmp_path / "out") == plain
    assert len(linked) == blocks(base) - untouched(base, "q_proj", "v_proj") < blocks(base)
    assert len(plain) > 2


@pytest.mark.parametrize("stop_after", [0, 1, 2, 5])
def test_linker_goes_on_where_the_copying_stopped(
    base: Path, trained: Path, tmp_path: Path, linked: list[int], stop_after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    head, copied_ahead = HeadStart(base, [str(trained)], tmp_path / "out"), list[int]()
    read_into = direct.read_into

    def count(*given: Any) -> bool:
        if "head-start" in threading.current_thread().name:
            if len(copied_ahead) == stop_after:
                head._ended.set()
                return False
            copied_ahead.append(given[-1])
        return read_into(*given)

    plain = merged(base, trained, tmp_path / "plain")
    linked.clear()
    monkeypatch.setattr(direct, "read_into", count)
    with head:
        head._thread.join()
        merge(base, trained, tmp_path / "out", head)
    assert weights(tmp_path / "out") == plain
    assert len(copied_ahead) == stop_after
    assert len(linked) == blocks(base) - stop_after


def test_source_may_be_an_adapter_or_what_apply_wrote(
    base: Path, trained: Path, tmp_path: Path, linked: list[int]
) -> None:
    mine = copied(trained, tmp_path / "mine")
    edit(mine / "adapter_config.json", base_model_name_or_path=str(base))
    peftc.apply(base, [Attach(path=str(trained))], tmp_path / "applied")
    plain = merged(base, trained, tmp_path / "plain")
    linked.clear()
    for source in (mine, tmp_path / "applied"):
        with HeadStart(source, [], tmp_path / "out") as head:
            head._thread.join()
            export(source, tmp_path / "out", merge=True, proof="sites", overwrite=True, head=head)
        assert weights(tmp_path / "out") == plain
        assert len(linked) == blocks(base) - untouched(base, "q_proj", "v_proj")
        linked.clear()
        os.rename(tmp_path / "out", tmp_path / f"out-{source.name}")  # noqa: PTH104


@pytest.mark.parametrize("guessed", [["k_proj"], ["gate_proj", "down_proj"], ["embed_tokens"]])
def test_guess_of_other_modules_does_not_show(
    base: Path, trained: Path, adapter: MakeAdapter, tmp_path: Path, guessed: list[str]
) -> None:
    other = adapter(base, target_modules=guessed)
    plain = merged(base, trained, tmp_path / "plain")
    with ahead(base, other, tmp_path / "out") as head:
        assert head._copies
        merge(base, trained, tmp_path / "out", head)
    assert weights(tmp_path / "out") == plain


def test_guess_of_another_layout_does_not_show(
    tied: Tied, adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = tied("llama", torch.bfloat16, shards=True)
    trained = adapter(base, target_modules=["q_proj"])
    steps = [Attach(path=str(trained)), Merge(), Untie()]
    program = Pipeline(steps).run(capture(base))
    to_safetensors(program, tmp_path / "plain", proof="sites")
    with ahead(base, trained, tmp_path / "out") as head:
        assert head._copies
        to_safetensors(program, tmp_path / "out", proof="sites", head=head)
    plain = weights(tmp_path / "plain")
    assert weights(tmp_path / "out") == plain
    assert plain != {name: (base / name).read_bytes() for name in plain}


@pytest.mark.parametrize("longer", [False, True])
def test_source_that_changed_after_it_was_copied_is_noticed(
    base: Path, trained: Path, tmp_path: Path, longer: bool
) -> None:
    mine = copied(base, tmp_path / "base")
    with ahead(mine, trained, tmp_path / "out") as head:
        assert head._copies
        for file in mine.glob("*.safetensors"):
            tensors = {name: tensor * 2 for name, tensor in load_file(file).items()}
            save_file(tensors, file, {"format": "pt", **({"more": "words" * 99} if longer else {})})
        merge(mine, trained, tmp_path / "out", head)
    assert weights(tmp_path / "out") == merged(mine, trained, tmp_path / "plain")


def _exists(target: Path, base: Path) -> None:
    target.mkdir()
    (target / "mine").touch()


def _resumable(target: Path, base: Path) -> None:
    staged = target.parent / f".{target.name}.peftc-staging"
    staged.mkdir()
    (staged / LOG).write_text('{"key": "of an earlier run"}\n')


def _quantized(target: Path, base: Path) -> None:
    edit(base / "config.json", quantization_config={"load_in_4bit": True})


def _renamed(target: Path, base: Path) -> None:
    for file in base.glob("*.safetensors"):
        tensors = {name.removeprefix("model."): t for name, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    renamed = {name.removeprefix("model."): file for name, file in index.items()}
    edit(base / "model.safetensors.index.json", weight_map=renamed)


def _damaged(target: Path, base: Path) -> None:
    next(base.glob("*.safetensors")).write_bytes(b"none")


@pytest.mark.parametrize("why", [_exists, _resumable, _quantized, _renamed, _damaged])
def test_nothing_begins(
    why: Callable[[Path, Path], None], base: Path, trained: Path, tmp_path: Path
) -> None:
    mine, target = copied(base, tmp_path / "base"), tmp_path / "out"
    why(target, mine)
    before = tree(tmp_path)
    with ahead(mine, trained, target) as head:
        assert tree(tmp_path) == before
        assert head.hand_over({}) is None and head.adopt("model.safetensors", target) is None
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["base/out", "absent/out", "base"])
def test_nothing_begins_at_a_bad_place(
    place: str, base: Path, trained: Path, tmp_path: Path
) -> None:
    mine = copied(base, tmp_path / "base")
    before = tree(tmp_path)
    with ahead(mine, trained, tmp_path / place, overwrite=True) as head:
        assert head._claim is None
        assert tree(tmp_path) == before


@pytest.mark.parametrize("source", ["no/such-model", "", "\0"])
def test_nothing_begins_of_what_is_not_here(source: str, trained: Path, tmp_path: Path) -> None:
    with HeadStart(source, [str(trained)], tmp_path / "out") as head:
        head._thread.join()
        assert head._claim is None
    assert not tree(tmp_path)


def test_nothing_begins_on_a_full_disk(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = Checkpoint.open(base).nbytes
    for free in (size - 1, size):
        usage = type("Usage", (), {"free": free})()
        monkeypatch.setattr("shutil.disk_usage", lambda _, usage=usage: usage)
        with ahead(base, trained, tmp_path / "out") as head:
            assert (head._claim is None) == (free < size)
            assert bool(tree(tmp_path)) == (free == size)
    assert not tree(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_when_the_export_does_not_come(
    error: type[BaseException], base: Path, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(error), ahead(base, trained, tmp_path / "out"):
        assert (tmp_path / ".out.peftc-staging" / AHEAD).is_dir()
        raise error
    assert not tree(tmp_path)


def test_nothing_is_left_of_a_bad_adapter(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = copied(trained, tmp_path / "bad")
    tensors = load_file(bad / "adapter_model.safetensors")
    wide = {name: t.repeat(1, 2).contiguous() for name, t in tensors.items()}
    save_file(wide, bad / "adapter_model.safetensors", {"format": "pt"})
    before = tree(tmp_path)
    with ahead(base, bad, tmp_path / "out") as head:
        assert head._copies and tree(tmp_path) != before
        with pytest.raises(PeftcError):
            merge(base, bad, tmp_path / "out", head)
    assert tree(tmp_path) == before


def test_another_run_is_refused_and_takes_nothing_away(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    copies = tmp_path / ".out.peftc-staging" / AHEAD
    with ahead(base, trained, tmp_path / "out") as head:
        before = tree(copies)
        with pytest.raises(ArtifactError, match="another run"):
            merge(base, trained, tmp_path / "out")
        with ahead(base, trained, tmp_path / "out") as second:
            assert second._claim is None
        assert before and tree(copies) == before
        merge(base, trained, tmp_path / "out", head)
    assert weights(tmp_path / "out")


# Imports once, then forks: each child is killed while it copies ahead, links, or is done.
KILLER = """
import os, random, signal, sys, threading, time
from pathlib import Path
from peftc import direct, early, export
from peftc.artifact import Artifact
import torch, transformers
base, adapter, out = map(Path, sys.argv[1:])
direct.BLOCK, early._RUN, read_into = 4096, 1, direct.read_into

def slowly(*arguments):
    time.sleep(0.02 * ("head-start" in threading.current_thread().name))
    return read_into(*arguments)

direct.read_into = slowly

def attempt(kill_after):
    child = os.fork()
    if child == 0:
        with early.HeadStart(base, [str(adapter)], out) as head:
            head._thread.join()
            export(base, out, merge=True, adapters=[(str(adapter), 1.0)], proof="sites", head=head)
        os._exit(0)
    if kill_after:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

export(base, out.parent / "plain", merge=True, adapters=[(str(adapter), 1.0)], proof="sites")
rng, killed, early_kills = random.Random(0), 0, 0
staged = out.parent / f".{out.name}.peftc-staging"
while killed < 8:
    killed += attempt(rng.uniform(0.01, 0.25)) != 0
    early_kills += (staged / "ahead").exists() and not (staged / "done.jsonl").exists()
    if out.exists():
        assert not Artifact.open(out).damage()
        out.rename(out.parent / f"done-{killed}-{time.monotonic_ns()}")
assert early_kills > 2, early_kills
assert attempt(None) == 0
"""


def test_rerun_after_kills_is_right_and_leaves_nothing(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    ran = alone("-c", KILLER, base, trained, tmp_path / "out")
    assert ran.code == 0, ran.err[-3000:]
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        (["--merge"], True),
        (["--merge", "--overwrite"], True),
        (["--merge", "--then", "none"], False),
        (["--format", "peft"], False),
    ],
)
def test_command_begins_where_it_merges_plain_weights(
    options: list[str], begins: bool, base: Path, trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, linked: list[int],
) -> None:  # fmt: skip
    given: list[tuple[Any, ...]] = []

    class Noted(HeadStart):
        def __init__(self, *arguments: Any) -> None:
            given.append(arguments)
            super().__init__(*arguments)

        def __enter__(self) -> HeadStart:
            super().__enter__()
            self._thread.join()
            return self

    monkeypatch.setattr(early, "HeadStart", Noted)
    command = ["peftc", "export", str(base), "-o", str(tmp_path / "out"), "-q", "--proof", "sites"]
    monkeypatch.setattr(sys, "argv", [*command, "--adapter", f"{trained}=0.5", *options])
    with pytest.raises(SystemExit):
        main()
    overwrite = "--overwrite" in options
    assert given == ([(str(base), [str(trained)], tmp_path / "out", overwrite)] if begins else [])
    if begins:
        assert len(linked) == blocks(base) - untouched(base, "q_proj", "v_proj")
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}
