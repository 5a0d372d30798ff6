"""What is published: a wheel, made from the sdist, that holds all of peftc and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("peftc", "passes", "kernels", "exporters")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of the sources as they are, and the wheel made of it."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
        file = ROOT / name
        if file.is_symlink() or file.is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            if file.is_symlink():
                (copy / name).symlink_to(file.readlink())
            else:
                (copy / name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def test_wheel_holds_every_module_under_peftc_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        (f"peftc/{file.relative_to(ROOT)}" if room != "peftc" else str(file.relative_to(ROOT)))
        for room in FOLDERS
        for file in (ROOT / room).glob("*.py")
    }
    assert modules <= names, sorted(modules - names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"peftc"}


def test_sdist_holds_what_the_native_kernels_are_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {f"kernels/{file.name}" for file in (ROOT / "kernels").glob("*.c")} <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_wheel_runs_where_the_sources_are_not(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import peftc, sys; assert peftc.__file__.startswith(sys.argv[1]), peftc.__file__\n"
        "from peftc import Lora, Merge, Pipeline, capture\n"
        "import torch; Pipeline([Lora(rank=2), Merge()]).run(capture(torch.nn.Sequential("
        "torch.nn.Linear(4, 4))))\n"
        "from peftc.demo import run"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
