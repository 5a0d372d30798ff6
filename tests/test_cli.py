"""The command line: what it imports, prints and returns."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import peftc
from peftc import inspection, proof, registry
from peftc.artifact import digest
from peftc.cli import cli

from .conftest import MakeAdapter, MakeCheckpoint, Run, auto, distance, logits, with_peft
from .helpers import alone, copied

HEAVY = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "peft"}


@pytest.fixture(scope="module")
def base(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def trained(base: Path, adapter: MakeAdapter) -> Path:
    return adapter(base)


@pytest.fixture(scope="module")
def artifacts(
    base: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One of each kind that peftc writes: `apply`, `rewrite`, `model` and `adapter`."""
    root = tmp_path_factory.mktemp("artifacts")
    attach = peftc.Attach(path=str(trained))
    peftc.apply(base, [attach], root / "apply")
    peftc.apply(base, [attach, peftc.Merge()], root / "rewrite")
    peftc.export(base, root / "model", merge=True, adapters=[(str(trained), 1.0)])
    peftc.export(root / "apply", root / "adapter", format="peft")
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize(
    "command",
    [
        "--help", "--version", "apply --help", "apply X lora --help", "export --help", "passes",
        "passes lora --json", "completion bash", "inspect {base}", "inspect {trained} --json",
        "inspect {apply}", "inspect {model} --json", "inspect {adapter}",
    ],
)  # fmt: skip
def test_command_imports_no_torch(
    command: str, base: Path, trained: Path, artifacts: dict[str, Path]
) -> None:
    places = {"base": base, "trained": trained, **artifacts}
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
    args = [part.format(**places) for part in command.split()]
    ran = alone("-c", f"{code} from peftc.cli import main; main()", *args)
    assert ran.code == 0 and ran.out
    assert HEAVY & set(ran.err.split()) == set()


def test_help_answers_within_a_fifth_of_a_second() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        alone("-m", "peftc", "--help")
        return time.perf_counter() - began

    assert any(seconds() < 0.2 for _ in range(20))  # the machine may be busy otherwise


def test_module_runs_as_the_command() -> None:
    assert alone("-m", "peftc", "--version").out == f"peftc, version {peftc.__version__}\n"
    assert alone("-m", "peftc", "inspect", "/nowhere").code == 1


@pytest.mark.parametrize("name", registry.PASSES)
def test_help_of_a_pass_shows_every_field(name: str) -> None:
    help_page = CliRunner().invoke(cli, ["apply", "X", name, "--help"], terminal_width=400).output
    for field, info in registry.load(name).model_fields.items():
        given = field.replace("_", "-")
        assert f"--{given}" in help_page or field.upper() in help_page
        default = info.default
        if not info.is_required() and default is not None and not isinstance(default, (bool, dict)):
            assert f"[default: {default}]" in " ".join(help_page.split()), field


def test_passes_describes_all_or_one(run: Run) -> None:
    assert set(run("passes", "--json").data) == set(registry.PASSES)
    assert [name for name in registry.PASSES if name not in run("passes").out] == []
    fields = run("passes", "lora", "--json").data["lora"]["fields"]
    assert [f["name"] for f in fields] == list(peftc.Lora.model_fields)
    what = "rank of A and B"
    assert {"name": "rank", "type": "int", "default": 16, "description": what} in fields
    assert what in run("passes", "lora").out


def test_completion_script_is_bash(run: Run) -> None:
    script = run("completion", "bash").out
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "_PEFTC_COMPLETE=bash_complete" in script


@pytest.mark.parametrize(
    ("words", "found"),
    [("peftc ex", "export"), ("peftc apply X lor", "lora"), ("peftc export X --format pe", "peft"),
     ("peftc apply X -o Y lora --dr", "--dropout")],
)  # fmt: skip
def test_completion_completes(words: str, found: str) -> None:
    count = str(len(words.split()) - 1)
    ran = alone("-m", "peftc", _PEFTC_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=count)
    assert ran.out == f"plain,{found}\n"


ORDERS = [
    "{base} -o {out} --json lora --rank 3",
    "-o {out} --json {base} lora --rank 3",
    "--json {base} -o {out} lora --rank 3",
    "-o {out} {base} --json lora --rank 3",
    "{base} -o{out} --json lora --rank 3",
    "{base} --output={out} --json lora --rank 3",
    "{base} --json --overwrite --output {out} lora --rank=3",
    "{base} --recipe {recipe} -o {out} --json",
    "--recipe {recipe} {base} -o {out} --json",
]


@pytest.mark.parametrize("order", ORDERS)
def test_apply_takes_options_before_and_behind_its_base(
    order: str, run: Run, base: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("peftc: 1\npasses:\n  - lora: {rank: 3}\n")
    out = tmp_path / "out"
    ran = run("apply", *order.format(base=base, out=out, recipe=recipe).split())
    assert ran.code == 0, ran.err
    assert ran.data["journal"][0]["options"] == {"rank": 3}
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 3


def test_apply_runs_passes_as_chained(run: Run, base: Path, trained: Path, tmp_path: Path) -> None:
    ran = run(
        "apply", base, "--json", "-o", tmp_path / "out",
        "attach", "--weight", 0.5, trained, "merge",
        "lora", "--targets", "q_proj,v_proj", "--rank-pattern", "q_proj=2,v_proj=3",
        "lora", "--adapter", "second", "--layers", "1", "--rslora", "--dropout", "0.1",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    steps = [(step["title"], step["options"], step["sites"]) for step in ran.data["journal"]]
    lora = {"targets": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, "v_proj": 3}}
    assert steps == [
        ("attach", {"path": str(trained), "weight": 0.5}, 14),
        ("merge", {}, 14),
        ("lora", lora, 4),
        ("lora", {"adapter": "second", "layers": [1], "rslora": True, "dropout": 0.1}, 7),
    ]
    assert ran.data["adapters"] == {"default": "adapters/default", "second": "adapters/second"}
    halved = with_peft(base, trained)
    for module in halved.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("a0", 0.5)
    assert distance(logits(auto(tmp_path / "out" / "base")), logits(halved)) < 1e-5


def test_apply_takes_a_pass_s_options_behind_its_argument(
    run: Run, base: Path, trained: Path, tmp_path: Path
) -> None:
    ran = run("apply", base, "-o", tmp_path / "out", "attach", trained, "--weight", 0.5, "merge")
    assert ran.code == 0, ran.err
    journal = peftc.Artifact.open(tmp_path / "out").manifest["journal"]
    assert [step["options"].get("weight") for step in journal] == [0.5, None]


def test_export_merges_what_is_given(run: Run, base: Path, trained: Path, tmp_path: Path) -> None:
    given = "--adapter", trained, "--adapter", f"{trained}=-1"
    more = "--workers", 1, "--proof", "sites", "--json"
    ran = run("export", base, "-o", tmp_path / "out", "--merge", *given, *more)
    assert ran.code == 0, ran.err
    assert ran.data["proof"]["site"]["sites"] == 14 and "whole" not in ran.data["proof"]
    assert distance(logits(auto(tmp_path / "out")), logits(auto(base))) < 1e-5


def test_json_is_all_of_stdout(
    run: Run, base: Path, trained: Path, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    manifest = json.loads((artifacts["model"] / "peftc.json").read_text())
    ran = run("export", base, "-o", tmp_path / "out", "--merge", "--adapter", trained, "--json")
    assert set(ran.data) == {"path", *manifest}
    assert run("apply", base, "--json", "-o", tmp_path / "two", "lora").data["kind"] == "apply"
    assert run("verify", artifacts["model"], "--json").data["site"]["sites"] == 14
    assert run("verify", artifacts["apply"], "--json").data["adapters"] == ["default"]
    assert run("inspect", artifacts["model"], "--json").data["checkpoint"]["files"] == 1
    assert run("inspect", artifacts["apply"], "--json").data["artifact"]["kind"] == "apply"
    assert run("inspect", trained, "--json").data["adapter"]["r"] == 4


def test_people_read_stderr_and_quiet_silences_it(run: Run, base: Path, tmp_path: Path) -> None:
    loud = run("apply", base, "-o", tmp_path / "out", "lora")
    assert loud.out == "" and str(tmp_path / "out") in loud.err.replace("\n", "")
    quiet = run("apply", base, "-q", "-o", tmp_path / "two", "lora")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


@pytest.mark.parametrize("name", ["run[bold]", "run[lr=1e-4]", "[red]"])
def test_output_names_a_path_whole_when_it_looks_like_markup(
    name: str, run: Run, base: Path, tmp_path: Path
) -> None:
    ran = run("apply", base, "-o", tmp_path / name, "lora", "--rank", 1)
    assert ran.code == 0 and name in ran.err.replace("\n", "")
    assert name in run("inspect", tmp_path / name).out.replace("\n", "")


@pytest.mark.parametrize("name", ["[/]", "[bold]x", "\x1b]0;owned\x07", "\x1b[31mred"])
def test_inspect_shows_a_tensor_whole_and_harmless(
    name: str, run: Run, base: Path, tmp_path: Path
) -> None:
    path = copied(base, tmp_path / "base")
    save_file({name: torch.zeros(2)}, path / "model.safetensors")
    ran = run("inspect", path)
    assert ran.code == 0, ran.err
    assert name.replace("\x1b", "").replace("\x07", "") in ran.out
    assert "\x1b" not in ran.out and "\x07" not in ran.out
    assert run("inspect", path, "--json").data["checkpoint"]["tensors"][0]["name"] == name


FAILURES = {
    "inspect /nowhere --json": "CheckpointError",
    "verify {base} --json": "CheckpointError",
    "passes lroa --json": "PassError",
    "export {base} --json -o {out} --merge": "ArtifactError",
    "export {base} --json -o {out} --adapter {trained}=heavy": "PassError",
    "export {base} --json -o {out} --adapter {trained}=nan": "PassError",
    "apply {base} --json -o {out} --recipe {out}.yaml": "RecipeError",
    "apply {base} --json -o {out} lora --rank 0": "PassError",
    "apply {base} --json -o {out} lora --rank-pattern q_proj=x": "PassError",
    "apply {base} --json -o {out} lora --targets q_porj,v_porj": "SelectionError SelectionError",
}


@pytest.mark.parametrize("command", FAILURES)
def test_exit_code_is_1_and_the_error_is_data_when_something_given_is_wrong(
    command: str, run: Run, base: Path, trained: Path, tmp_path: Path
) -> None:
    ran = run(*command.format(base=base, trained=trained, out=tmp_path / "out").split())
    assert ran.code == 1, ran.err
    errors = ran.data["errors"]
    assert " ".join(error["error"] for error in errors) == FAILURES[command]
    for error in errors:
        assert set(error) == {"error", "what", "where", "fix"}
        assert error["what"] in ran.err and "Traceback" not in ran.err
    assert not any(tmp_path.iterdir())


USAGES = [
    "", "nonsense", "apply", "apply {base}", "apply {base} lora", "apply {base} -o {out}",
    "apply {base} -o {out} lroa", "apply {base} -o {out} lora --ranc 4", "export {base}",
    "apply {base} -o {out} lora --rank many", "apply {base} -o {out} lora --rank-pattern q_proj",
    "apply {base} -o {out} --recipe {out} lora", "export {base} -o {out} --proof some",
    "export {base} -o {out} --workers 0", "export {base} -o {out} --format gguf",
    "verify", "inspect", "completion tcsh",
]  # fmt: skip


@pytest.mark.parametrize("command", USAGES)
def test_exit_code_is_2_when_the_command_is_misused(
    command: str, run: Run, base: Path, tmp_path: Path
) -> None:
    ran = run(*command.format(base=base, out=tmp_path / "out").split())
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: peftc" in ran.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["apply X -o Y lroa", "passes lroa"])
def test_error_names_the_near_miss_when_a_pass_is_unknown(command: str, run: Run) -> None:
    ran = run(*command.split())
    assert "'lroa'" in ran.err and "did you mean lora" in ran.err.lower()


def test_error_says_what_where_and_how_to_fix_it(run: Run) -> None:
    ran = run("inspect", "/nowhere")
    assert ran.err == "error: /nowhere: there is no such directory\n  fix: check the path\n"


def test_exit_code_is_3_and_nothing_is_published_when_the_proof_fails(
    run: Run, base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "SITE_BOUND", {torch.float32: -1.0})
    ran = run("export", base, "-o", tmp_path / "out", "--merge", "--adapter", trained, "--json")
    assert ran.code == 3
    assert [error["error"] for error in ran.data["errors"]] == ["ProofError"]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [RuntimeError("boom"), KeyboardInterrupt()])
def test_exit_code_tells_a_bug_from_an_interruption(
    stop: BaseException, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise stop

    monkeypatch.setattr(inspection, "inspect", fail)
    ran = run("inspect", "X")
    if isinstance(stop, KeyboardInterrupt):
        assert (ran.code, ran.out) == (130, "")
    else:
        assert (ran.code, ran.out) == (70, "")
        assert "RuntimeError: boom" in ran.err and "a bug of peftc" in ran.err


def published(path: Path) -> list[Path]:
    return [f for f in path.rglob("*") if f.is_file() and f.name != "peftc.json"]


@pytest.mark.parametrize("kind", ["apply", "rewrite", "model", "adapter"])
def test_verify_accepts_what_was_published(kind: str, run: Run, artifacts: dict[str, Path]) -> None:
    ran = run("verify", artifacts[kind], "--json")
    assert ran.code == 0, ran.err
    assert ran.data["files"] == len(published(artifacts[kind])) > 0


@pytest.mark.parametrize("kind", ["apply", "rewrite", "model", "adapter"])
def test_exit_code_is_3_when_verify_finds_a_file_changed_or_gone(
    kind: str, run: Run, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    path = copied(artifacts[kind], tmp_path / "artifact")
    for file in published(path):
        content = file.read_bytes()
        for damage in (content[:-1] + bytes([content[-1] ^ 1]), content + b" ", None):
            file.write_bytes(damage) if damage else file.unlink()
            ran = run("verify", path, "--json")
            assert ran.code == 3
            assert [error["where"] for error in ran.data["errors"]] == [str(file)]
        file.write_bytes(content)
    assert run("verify", path).code == 0


@pytest.mark.parametrize("kind", ["model", "rewrite"])
def test_exit_code_is_3_when_verify_finds_other_numbers_behind_right_hashes(
    kind: str, run: Run, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    path = copied(artifacts[kind], tmp_path / "artifact")
    manifest = json.loads((path / "peftc.json").read_text())
    name = {"model": "model.safetensors", "rewrite": "base/model.safetensors"}[kind]
    tensors = load_file(path / name)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, path / name, {"format": "pt"})
    manifest["files"][name] = {"size": (path / name).stat().st_size, "blake3": digest(path / name)}
    (path / "peftc.json").write_text(json.dumps(manifest))
    ran = run("verify", path)
    assert ran.code == 3 and "model.layers.1.mlp.up_proj.weight" in ran.err
