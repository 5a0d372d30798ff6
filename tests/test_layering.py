"""The architecture, enforced from the source: who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "passes", "exporters")
# From the bottom up: a module may import those above it in this list, and none below.
ORDER = [
    "interrupts", "errors", "files", "extras", "progress", "safetensors_file", "checkpoint", "ops",
    "graphs", "constants", "devices", "direct", "reading", "flat", "evaluate", "four_bit", "kinds",
    "layout", "sites", "program", "patterns", "targets", "contract", "tuning", "examples",
    "token_rows", "scoring", "sources", "memory", "curve", "adapterhub", "adapter", "registry",
    "rules", "algebra", "factors", "deltas", "mixing", "pipeline", "tracing", "conversion",
    "sublayers", "roles", "attention", "outline", "capturing", "structure", "constant_layer",
    "calling", "normal", "repeated", "whole", "pieces", "storage", "artifact", "runs", "blocks",
    "early", "link", "fusing", "functions", "surrounding", "live", "switching", "virtual",
    "constant_cache", "prefixes", "rates", "schedules", "callbacks", "replay", "footprint", "tuner",
    "witness", "proof", "spectra", "analysis", "survival", "kernels", "machine", "warm", "resident",
    "libraries", "runtime", "passes", "exporters", "recipe", "merging", "formats", "api",
    "reproducing", "text", "running", "running_onnx", "running_live", "running_compiled", "timing",
    "parts", "rehearsal", "training", "evaluation", "terminal", "reports", "inspection",
    "analysis_view", "ranks_view", "planning", "demo_model", "demo", "cli_options", "cli_parts",
    "cli_plan", "cli_run", "cli_tune", "cli", "__main__",
]  # fmt: skip
TORCH_FREE = [
    "interrupts", "patterns", "errors", "files", "extras", "progress", "safetensors_file",
    "checkpoint",
    "targets", "contract", "tuning", "examples", "runs", "curve", "cli_tune", "registry", "recipe",
    "artifact", "direct", "early", "terminal", "formats", "reports", "inspection", "cli_options",
    "cli_parts", "cli_plan", "cli", "passes.lora", "passes.dora", "passes.adalora", "passes.vera",
    "passes.ia3", "passes.bitfit", "adapterhub", "passes.bottleneck", "passes.placement",
    "passes.layernorm", "passes.full", "passes.loha", "passes.lokr", "passes.oft", "passes.boft",
    "passes.attach", "passes.combine", "passes.fold", "passes.joint", "passes.merge",
    "passes.prompt_tuning", "passes.p_tuning", "passes.prune_ranks", "passes.router",
    "passes.nf4", "passes.dequantize", "passes.fuse", "passes.unmerge", "passes.untie",
    "passes.resize_vocabulary", "passes.replicate_layers", "passes.prefix_tuning", "demo_model",
    "memory", "text", "running", "running_onnx", "timing", "cli_run",
]  # fmt: skip
SOURCES = sorted(
    [
        *(ROOT / "peftc").glob("*.py"),
        *(file for room in ROOMS for file in (ROOT / room).glob("*.py")),
    ]
)


def place(file: Path) -> str:
    """The module's name in ORDER: a room's files share the room's."""
    return file.parent.name if file.parent.name in ROOMS else file.stem


def imports(file: Path) -> Iterator[str]:
    """The places of peftc that a file imports when it runs, in functions too."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peftc"):
            parts = (node.module or "").split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("peftc."))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_imports_point_one_way(file: Path) -> None:
    here = place(file)
    if file.stem == "__init__":
        assert not list(imports(file)), "the package's front door imports nothing by itself"
        return
    for target in imports(file):
        if target in ORDER:  # `from peftc import __version__` is no module
            same_room = here in ROOMS and target == here
            assert same_room or ORDER.index(target) < ORDER.index(here), f"{here} → {target}"


def test_exporters_never_import_passes() -> None:
    for file in (ROOT / "exporters").glob("*.py"):
        assert "passes" not in set(imports(file)), file.name


def test_order_names_every_module() -> None:
    assert {place(file) for file in SOURCES} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_file_is_at_most_500_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 500


def test_modules_of_the_command_line_import_no_torch() -> None:
    names = ", ".join(f"peftc.{name}" for name in TORCH_FREE)
    code = f"import sys, {names}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_main_jobs_import_no_transformers() -> None:
    """Its import takes seconds, which a merge of a known configuration does not need."""
    code = "import sys, peftc.api; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_exported_names_are_none_of_modules() -> None:
    """A module that is imported becomes the package's attribute of its name, whatever that was."""
    import peftc

    assert not set(peftc.__all__) & {file.stem for file in (ROOT / "peftc").glob("*.py")}


def test_rooms_reach_no_one_else_s_namespace() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert all(name == "peftc" or name.startswith("peftc.") for name in setuptools["packages"])
    assert setuptools["package-dir"] == {"peftc": "peftc", **{f"peftc.{r}": r for r in ROOMS}}
    # `kernels` is a package on PyPI that transformers probes for by import.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_rooms_are_flat() -> None:
    for room in ROOMS:
        assert not [d for d in (ROOT / room).iterdir() if d.is_dir() and d.name != "__pycache__"]
