"""The commands tune and eval: options from the settings' fields, recipes, output, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import peftc
from peftc import Evaluation, Tuning
from peftc.cli import cli

from .conftest import Run
from .helpers import alone
from .talker import lines, sums, talker

pytestmark = pytest.mark.filterwarnings("ignore")
HOW = ["--steps", "2", "--batch-size", "4", "--lr", "1e-3", "--device", "cpu", "--no-plot"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sums(tmp_path_factory.mktemp("data") / "sums.jsonl", 8)


@pytest.mark.parametrize(("command", "settings"), [("tune", Tuning), ("eval", Evaluation)])
def test_help_shows_every_field_and_imports_no_torch(command: str, settings: type[Tuning]) -> None:
    page = CliRunner().invoke(cli, [command, "--help"], terminal_width=400).output
    missing = [f for f in settings.model_fields if f"--{f.replace('_', '-')}" not in page]
    assert not missing
    code = (
        "import sys; sys.argv = ['peftc', sys.argv[1], '--help']; from peftc.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)))"
    )
    assert alone("-c", code, command).code == 0


def test_chained_passes_and_an_applied_source_train_alike(
    base: Path, data: Path, tmp_path: Path, run: Run
) -> None:
    chained = run(
        "tune", base, "-o", tmp_path / "one", "--data", data, *HOW, "--json",
        "nf4", "--exclude", "v_proj", "lora", "--rank", 2,
    )  # fmt: skip
    assert chained.code == 0, chained.err
    assert chained.data["training"]["steps"] == 2
    assert [entry["title"] for entry in chained.data["journal"]] == ["nf4", "lora"]
    peftc.apply(
        base, [peftc.Nf4(exclude="v_proj"), peftc.Lora(rank=2)], tmp_path / "applied"
    )  # fmt: skip
    applied = run("tune", tmp_path / "applied", "-o", tmp_path / "two", "--data", data, *HOW)
    assert applied.code == 0, applied.err
    assert "2 steps on 8 examples: loss" in applied.err and "✓ wrote" in applied.err
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_recipe_holds_the_training(base: Path, data: Path, tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"peftc: 1\npasses: [{{lora: {{rank: 2}}}}]\n"
        f"tune: {{data: {data}, steps: 9, batch_size: 4, device: cpu, plot: false}}\n"
    )
    done = run("tune", base, "-o", tmp_path / "out", "--recipe", recipe, "--steps", 1, "--json")
    assert done.code == 0, done.err
    assert done.data["training"]["settings"]["steps"] == 1  # the command line has the last word
    refused = run("apply", base, "-o", tmp_path / "other", "--recipe", recipe)
    assert refused.code == 1 and "peftc tune" in refused.err
    recipe.write_text(recipe.read_text().replace("steps: 9", "stps: 9, lr: fast"))
    refused = run("tune", base, "-o", tmp_path / "other", "--recipe", recipe)
    assert refused.code == 1
    assert "unknown option 'stps'" in refused.err and "did you mean steps" in refused.err
    assert "lr: " in refused.err and "peftc tune --help" in refused.err


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ([], 2, "--data"),
        (["--data", "{data}", "--steps", "two"], 2, "--steps"),
        (["--data", "{data}", "--eval-steps", "5"], 1, "eval_data or eval_share"),
        (["--data", "{data}", "lorra"], 2, "lora"),
        (["--data", "{bad}", *HOW, "lora"], 1, "line 2"),
        (["--data", "{data}", *HOW, "--optimizer", "adamw_8bit", "lora"], 1, "--optimizer adamw"),
    ],
)
def test_wrong_options_are_told(
    base: Path, data: Path, tmp_path: Path, run: Run, more: list[str], code: int, words: str
) -> None:
    bad = lines(tmp_path / "bad.jsonl", ['{"text": "a"}', '{"text": '])
    args = [part.format(data=data, bad=bad) for part in more]
    ran = run("tune", base, "-o", tmp_path / "out", *args)
    assert ran.code == code and words in ran.err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_examples_left_out_are_said(base: Path, tmp_path: Path, run: Run) -> None:
    data = lines(tmp_path / "a.jsonl", [{"text": "a" * n} for n in (5, 6, 7, 8, 200, 300)])
    ran = run(
        "tune", base, "-o", tmp_path / "out", "--data", data, *HOW, "--too-long", "skip", "lora"
    )
    assert ran.code == 0 and "2 skipped" in ran.err


def test_eval_prints_a_table_or_json(base: Path, data: Path, run: Run) -> None:
    shown = run("eval", base, base, "--data", data, "--device", "cpu", "-q")
    assert shown.code == 0, shown.err
    assert shown.out.count(base.name) == 2
    assert "perplexity" in shown.out and "8 examples" in shown.out
    found = run("eval", base, "--data", data, "--device", "cpu", "--json").data
    assert json.dumps(found) and found["scores"][0]["tokens"] > 8
    assert run("eval", base).code == 2
