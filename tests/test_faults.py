"""What goes wrong under way: sources that change, disks that fill, signals, two runs at once."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import peftc
from peftc import interrupts
from peftc.artifact import Artifact, claimed
from peftc.errors import ArtifactError, CheckpointError, PeftcError
from peftc.files import lines
from peftc.interrupts import Terminated
from peftc.progress import Progress

from .conftest import MakeAdapter, MakeCheckpoint
from .faults.child import files_up_to
from .helpers import ROOT, copied, edit, tree

Job = Callable[..., Artifact]


def test_commands_survive_kills_interrupts_and_full_disks() -> None:
    """A small share of `python -m tests.faults`, which also compares threads and folders."""
    command = [
        sys.executable, "-W", "ignore", "-m", "tests.faults", "--kills", "8", "--interrupts", "6",
        "--full", "6", "--job", "nf4 lora", "safetensors", "parts", "peft", "adapterhub",
        "--without", "NF4",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("| kills |") == 6, done.stdout


@pytest.fixture
def base(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return copied(checkpoint("llama", shards=True), tmp_path / "base")


@pytest.fixture
def given(checkpoint: MakeCheckpoint, adapter: MakeAdapter, tmp_path: Path) -> Path:
    return copied(adapter(checkpoint("llama", shards=True)), tmp_path / "adapter")


def merge(base: Path, given: Path, out: Path, **options: Any) -> Artifact:
    how: dict[str, Any] = {"merge": True, "proof": "sites", **options}
    return peftc.export(base, out, adapters=[(str(given), 1.0)], **how)


def apply(base: Path, given: Path, out: Path, **options: Any) -> Artifact:
    return peftc.apply(base, [peftc.Attach(path=str(given)), peftc.Merge()], out, **options)


def rewrite(file: Path) -> None:
    """Other bytes, of the same size and with the same time."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def replace(file: Path) -> None:
    """Another file of the same bytes and time."""
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize("job", [merge, apply])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("base/model-00001-of-*", rewrite),
        ("base/model-00001-of-*", shorten),
        ("base/model-00001-of-*", replace),
        ("base/model-00001-of-*", Path.unlink),
        ("base/config.json", rewrite),
        ("adapter/adapter_model.safetensors", rewrite),
        ("adapter/adapter_config.json", replace),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_source_that_changes_under_way_is_never_published(
    base: Path, given: Path, tmp_path: Path, job: Job, name: str, change: Callable[[Path], None]
) -> None:
    file = next(tmp_path.glob(name))

    class Meddler(Progress):
        done = False

        def stage(self, name: str, total: int = 0) -> None:
            if name == "link" and not self.done:
                self.done = True
                change(file)

    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError) as caught:
        job(base, given, tmp_path / "out", progress=Meddler())
    assert caught.value.where == str(file) and caught.value.fix
    assert {path.name for path in tmp_path.iterdir()} == before


def test_source_that_changed_since_a_kill_begins_anew(
    base: Path, given: Path, tmp_path: Path
) -> None:
    """Nothing of the old one may get into the artifact, as only its states tell."""

    class Killed(Exception):
        pass

    class Killer(Progress):
        def stage(self, name: str, total: int = 0) -> None:
            if name == "publish":
                raise Killed

    with pytest.raises(Killed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        merge(base, given, tmp_path / "out", progress=Killer())
    assert (tmp_path / ".out.peftc-staging" / "done.jsonl").exists()
    for file in base.glob("model-*.safetensors"):
        tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    again = merge(base, given, tmp_path / "out")
    fresh = merge(base, given, tmp_path / "fresh")
    assert again.manifest == fresh.manifest


@pytest.mark.parametrize("job", [merge, apply])
def test_source_that_cannot_be_read_is_named(
    base: Path, given: Path, tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not stop root, so it is the system that says no."""
    shard = sorted(base.glob("model-*.safetensors"))[1]
    opened = os.open

    def refuse(path: Any, *args: Any, **more: Any) -> int:
        if Path(path) == shard:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied") as caught:
        job(base, given, tmp_path / "out")
    assert caught.value.where == str(shard)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_second_run_is_told_who_writes(base: Path, given: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "out"), pytest.raises(ArtifactError) as caught:
        merge(base, given, tmp_path / "out")
    assert f"another run of peftc (process {os.getpid()} on " in caught.value.what
    assert str(tmp_path / ".out.peftc-staging" / "lock") in str(caught.value.fix)


def test_lock_of_a_directory_that_is_being_removed_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two runs would hold one target: this lock, and that of the next directory."""
    root, flock, calls = tmp_path / ".out.peftc-staging", fcntl.flock, list[int]()

    def slow(lock: Any, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:  # its run ends between opening and locking
            (root / "lock").unlink()
            root.rmdir()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with claimed(tmp_path / "out") as made, pytest.raises(ArtifactError, match="another run"):
        assert made == root and len(calls) == 2
        with claimed(tmp_path / "out"):
            pass


def test_what_appeared_meanwhile_is_not_replaced(base: Path, given: Path, tmp_path: Path) -> None:
    class Other(Progress):
        def stage(self, name: str, total: int = 0) -> None:
            if name == "publish":
                (tmp_path / "out").mkdir()
                (tmp_path / "out" / "precious").touch()

    with pytest.raises(ArtifactError, match="exists already"):
        merge(base, given, tmp_path / "out", progress=Other())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_artifact_comes_back_when_a_run_was_killed_between_two_renames(
    base: Path, given: Path, tmp_path: Path
) -> None:
    first = merge(base, given, tmp_path / "out").manifest
    (tmp_path / "out").rename(tmp_path / ".out.peftc-previous")
    with pytest.raises(PeftcError), claimed(tmp_path / "out"):
        raise PeftcError("of the run that was to replace it")
    assert Artifact.open(tmp_path / "out").manifest == first
    assert not (tmp_path / ".out.peftc-previous").exists()


def test_half_a_line_of_a_log_is_none(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"a": 1}\n{"b": 2}\n{"c"')
    assert lines(tmp_path / "log") == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize("form", ["peft", "safetensors"])
def test_disk_that_is_full_is_said_and_nothing_is_left(
    base: Path, given: Path, tmp_path: Path, form: str
) -> None:
    before = tree(tmp_path)
    child = os.fork()
    if not child:
        code = 1
        try:
            files_up_to(700)()
            how: dict[str, Any] = {"merge": True} if form == "safetensors" else {}
            peftc.export(
                base, tmp_path / "out", adapters=[(str(given), 1.0)], format=form, **how  # type: ignore[arg-type]
            )  # fmt: skip
        except ArtifactError as error:
            code = 0 if "File too large" in error.what and "make room" in str(error.fix) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    after = tree(tmp_path)
    assert after == before


def command(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "peftc", *map(str, args)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def listens(process: subprocess.Popen[str]) -> bool:
    """Whether a command is there that takes signals: before, it is Python that starts."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    taken = int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16)
    return bool(taken >> (signal.SIGTERM - 1) & 1)


def imports_torch(process: subprocess.Popen[str]) -> bool:
    """Whether it is at the longest of its imports."""
    return "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize(
    ("number", "when"),
    [(signal.SIGINT, listens), (signal.SIGINT, imports_torch), (signal.SIGTERM, imports_torch)],
)
def test_signal_ends_a_command_in_one_line_while_it_imports(
    base: Path,
    given: Path,
    tmp_path: Path,
    number: signal.Signals,
    when: Callable[[subprocess.Popen[str]], bool],
) -> None:
    with command("export", base, "-o", tmp_path / "out", "--merge", "--adapter", given) as process:
        while not when(process):
            time.sleep(0.002)
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert not out and re.fullmatch(rf"\n?peftc: stopped by {number.name}.*\n", err), err
    assert not (tmp_path / "out").exists()
    if number == signal.SIGINT:
        assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The signals as a command has them, in this process."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGALRM
    before = [(number, signal.getsignal(number)) for number in numbers]
    monkeypatch.setattr(interrupts, "_signals", interrupts._Signals())
    yield
    for number, handler in before:
        signal.signal(number, handler)


def test_interrupt_that_a_library_swallows_is_raised_again(
    heard: None, capfd: pytest.CaptureFixture[str]
) -> None:
    class Odd:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit) as stop, interrupts.heard():
        odd = Odd()
        del odd
        time.sleep(5)
    assert stop.value.code == 130
    assert capfd.readouterr().err == "peftc: stopped by SIGINT\n"


def test_error_that_an_interrupt_caused_counts_as_it(heard: None) -> None:
    with pytest.raises(SystemExit) as stop, interrupts.heard():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("half of a library") from error
    assert stop.value.code == 143


def test_interrupt_waits_for_what_must_be_done_whole(heard: None) -> None:
    done = []
    with pytest.raises(SystemExit), interrupts.heard(), interrupts.later():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done


def test_termination_leaves_what_is_sealed_and_an_interrupt_does_not(tmp_path: Path) -> None:
    for kind, left in ((Terminated, True), (KeyboardInterrupt, False)):
        with pytest.raises(kind), claimed(tmp_path / "out") as root:
            raise kind
        assert root.exists() == left


def test_base_whose_config_was_edited_is_another_source(base: Path, tmp_path: Path) -> None:
    peftc.apply(base, [peftc.Lora(rank=2)], tmp_path / "out")
    edit(base / "config.json", rms_norm_eps=0.1)
    with pytest.raises(CheckpointError, match="is no longer the base"):
        peftc.load(tmp_path / "out")
