"""The documentation: generated pages are up to date, examples run, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftc import Merge, Pipeline, absorb, capture, materialize

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(file for file in (ROOT / "examples").glob("[0-9]*.py"))
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", ["cli.md", "passes.md"])
def test_generated_page_is_up_to_date(page: str) -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.pages()[page] == (ROOT / "docs" / page).read_text(), "run `make docs`"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_example_runs(
    example: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, for most of a process of its own would be spent on imports."""
    monkeypatch.setattr(sys, "argv", [str(example), str(tmp_path)])
    monkeypatch.syspath_prepend(example.parent)
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip(), "an example shows something"


def test_method_on_the_page_about_passes_merges() -> None:
    page = (ROOT / "docs" / "writing-a-pass.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(code, namespace)
    program = Pipeline([namespace["OutputGain"]()]).run(capture(nn.Sequential(nn.Linear(3, 5))))
    model = materialize(program)
    with torch.no_grad():
        model.get_parameter("0.gain.default.weight").normal_()
    x = torch.randn(4, 3)
    merged = materialize(Pipeline([Merge()]).run(absorb(program, model)))
    assert torch.allclose(model(x), merged(x), atol=1e-6)


@pytest.mark.parametrize("page", PAGES, ids=lambda file: file.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_every_example_and_page_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for file in [*EXAMPLES, *(ROOT / "docs").glob("*.md")]:
        assert file.name in readme, file.name
