"""Compiled models: a tiny Llama with slots, its runtime, and what it refuses.

Compiled twice, the second time in 4 bits and with an adapter for each row: only its layers are new.
The model has the sizes of example 24, whose libraries are these.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import peftc
from peftc.errors import AdapterError, ArtifactError, InputError, PeftcError, Violations
from peftc.machine import differences, here
from peftc.running import Sampling, open_runner
from peftc.runtime import Runtime, load

from .conftest import MakeAdapter, auto, logits, with_peft
from .pt2_real import TOKENS, beside

IDS = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of more layers than are captured."""
    import transformers

    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def one(base: Path, adapter: MakeAdapter) -> Path:
    return adapter(base, seed=1, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def other(base: Path, adapter: MakeAdapter) -> Path:
    return adapter(base, seed=2, r=6, use_rslora=True, rank_pattern={"k_proj": 2},
                   alpha_pattern={"down_proj": 3})  # fmt: skip


@pytest.fixture(scope="module")
def compiled(base: Path, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pt2") / "out"
    named = [(str(one), 1.0)]
    peftc.export(base, out, format="pt2", swap=True, slots="all-linear", adapters=named)
    return out


@pytest.fixture(scope="module")
def runtime(compiled: Path) -> Runtime:
    return load(compiled, verify=True)


def given(ids: Tensor, runtime: Runtime) -> dict[str, Tensor]:
    """A graph's inputs for a prefill."""
    ports = runtime.graphs["model"].inputs
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    past = {p.name: p.example({"batch": len(ids), "past": 0}) for p in ports if "past" in p.dims}
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions, **past
    }  # fmt: skip


def answers(runtime: Runtime) -> Tensor:
    return runtime.run(given(IDS, runtime))["logits"]


def close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).abs().max() / want.abs().max()) < 1e-5


def test_layers_are_one_library_and_the_proof_holds(compiled: Path) -> None:
    manifest = json.loads((compiled / "peftc.json").read_text())
    told = manifest["pt2"]["graphs"]["model"]
    assert (told["pieces"], len(told["steps"])) == (3, 8)
    proof = manifest["proof"]
    (name,) = proof["pt2_adapters"]
    for figures in (proof["pt2"], proof["pt2_adapters"][name]):
        assert figures["model"]["relative_error"] < 1e-5 and len(figures["shapes"]) == 6


def test_greedy_text_is_transformers_own(runtime: Runtime, base: Path) -> None:
    runtime.swap(None)
    want = auto(base).generate(IDS, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert runtime.generate(IDS, 20, stop=[]).tolist() == want[:, 11:].tolist()


def test_run_writes_what_transformers_does(compiled: Path, base: Path, one: Path) -> None:
    """By the engine that the artifact's kind has, and with an adapter by its folder too."""
    for adapter in (None, one):
        texts = []
        for source, engine in ((compiled, None), (base, "transformers")):
            runner = open_runner(source, engine=engine, adapter=str(adapter) if adapter else None)
            texts.append([step[0] for step in runner.generate([[5, 6, 7]], Sampling(12))])
        assert "compiled" in open_runner(compiled).engine
        assert texts[0] == texts[1] and len(texts[0]) == 12, adapter


def test_padding_on_the_left_changes_no_text(runtime: Runtime) -> None:
    runtime.swap(None)
    alone = runtime.generate(IDS[:1, 4:], 8, stop=[])
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    assert runtime.generate(IDS, 8, mask=mask, stop=[])[:1].tolist() == alone.tolist()


def test_text_ends_at_a_stop_token(runtime: Runtime) -> None:
    runtime.swap(None)
    free = runtime.generate(IDS, 8, stop=[])
    ended = runtime.generate(IDS, 8, stop=[int(free[0, 2])])
    assert ended[0, :3].tolist() == free[0, :3].tolist()
    assert set(ended[0, 2:].tolist()) == {int(free[0, 2])}


def test_sampling_repeats_by_its_seed_and_of_one_candidate_is_greedy(runtime: Runtime) -> None:
    runtime.swap(None)
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "stop": []}
    first = runtime.generate(IDS, 6, seed=7, **options)
    assert first.tolist() == runtime.generate(IDS, 6, seed=7, **options).tolist()
    assert first.tolist() != runtime.generate(IDS, 6, seed=8, **options).tolist()
    greedy = runtime.generate(IDS, 6, temperature=0.9, top_k=1, stop=[])
    assert greedy.tolist() == runtime.generate(IDS, 6, stop=[]).tolist()


def test_swapped_adapters_answer_as_in_peft(
    runtime: Runtime, base: Path, one: Path, other: Path
) -> None:
    for which, path in ((other, other), (runtime.adapters[0], one), (None, None), (one, one)):
        runtime.swap(which)
        model = auto(base)
        want = peft.PeftModel.from_pretrained(model, path).eval() if path else model
        assert close(answers(runtime), logits(want, IDS)), which


def test_a_thousand_swaps_take_no_memory_and_compile_nothing(
    runtime: Runtime, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was compiled or loaded")

    handles = [runtime.load_adapter(other), runtime.load_adapter(runtime.adapters[0]), None]
    monkeypatch.setattr(torch._inductor, "aot_compile", refuse)
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", refuse)
    before = _resident()
    for number in range(1000):
        runtime.swap(handles[number % 3])
        if number % 100 == 0:
            answers(runtime)
    assert _resident() - before < 8 << 20
    runtime.swap(None)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_it_runs_without_transformers_and_the_compiler(compiled: Path) -> None:
    code = f"""
import sys, torch
from peftc.runtime import load
runtime = load({str(compiled)!r})
runtime.swap(runtime.adapters[0])
print(runtime.generate(torch.ones(1, 3, dtype=torch.int64), 4).shape)
barred = ("transformers", "torch._inductor", "torch._dynamo", "peftc.passes", "peftc.exporters")
sys.exit(", ".join(name for name in barred if name in sys.modules) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_new_shapes_and_64_tokens_are_peft_s_in_a_bare_process(
    compiled: Path, base: Path, one: Path, tmp_path: Path
) -> None:
    found = beside(compiled, with_peft(base, one), tmp_path)
    assert found.relative < 1e-5 and found.same == TOKENS


def test_verify_repeats_the_proof(compiled: Path) -> None:
    report = peftc.verify(compiled)
    assert report["pt2"]["model"]["relative_error"] < 1e-5
    assert len(report["pt2_adapters"]) == 1


def edited(compiled: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of which the manifest says something else."""
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    manifest = json.loads((copy / "peftc.json").read_text())
    edit(manifest["pt2"])
    (copy / "peftc.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("torch", "2.1.0", "torch 2.1.0"),
        ("capability", "ZVECTOR", "ZVECTOR"),
        ("machine", "riscv64", "riscv64"),
        ("extensions", ["avx9000"], "avx9000"),
        ("gpu", [9, 0], "compute capability"),
    ],
)
def test_an_artifact_of_another_machine_is_refused(
    part: str, value: Any, words: str, compiled: Path, tmp_path: Path
) -> None:
    copy = edited(compiled, tmp_path, lambda told: told["built"].__setitem__(part, value))
    with pytest.raises(ArtifactError, match=words) as caught:
        load(copy)
    assert "export it again" in str(caught.value.fix)


def test_a_manifest_that_lacks_a_part_is_refused(compiled: Path, tmp_path: Path) -> None:
    copy = edited(compiled, tmp_path, lambda told: told.pop("graphs"))
    with pytest.raises(ArtifactError, match="damaged: KeyError"):
        load(copy)


def test_all_differences_of_a_machine_are_told_at_once() -> None:
    built = {**here(), "torch": "0.4", "system": "Plan9"}
    assert len(differences(built, here(), "model.pt2")) == 2


def test_a_library_that_was_changed_is_not_loaded(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    with (copy / "model.pt2").open("r+b") as file:
        file.seek(4000)
        file.write(b"\0not what was published")
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", None)
    with pytest.raises(ArtifactError, match="is not loaded"):
        load(copy)


def test_weights_that_were_changed_are_found_when_asked_for(compiled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    with pytest.raises(ArtifactError, match="not what was published"):
        load(copy, verify=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": IDS.int()}, "int32"),
        ({"input_ids": IDS[0]}, r"\[11\]"),
        ({"position_ids": torch.zeros(2, 5, dtype=torch.int64)}, "sequence="),
        ({"attention_mask": torch.ones(2, 13, dtype=torch.int64)}, "13 tokens"),
        ({"surplus": IDS}, "is no input"),
        ({"input_ids": IDS[:0]}, "at least 1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    change: dict[str, Tensor], words: str, runtime: Runtime
) -> None:
    with pytest.raises((InputError, Violations), match=words):
        runtime.run({**given(IDS, runtime), **change})


def test_a_text_beyond_the_model_s_positions_is_refused(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runtime.told["limits"] == {"past + sequence": 2048}
    monkeypatch.setitem(runtime.told["limits"], "past + sequence", 20)
    with pytest.raises(InputError, match="at most 20"):
        runtime.generate(IDS[:1], 20, stop=[])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(
    options: dict[str, Any], words: str, runtime: Runtime, base: Path, adapter: MakeAdapter
) -> None:
    folder = adapter(base, target_modules=["q_proj"], **options)
    with pytest.raises(PeftcError, match=words):
        runtime.load_adapter(folder)


def test_an_adapter_of_another_model_is_refused(
    runtime: Runtime, adapter: MakeAdapter, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(PeftcError, match="has no slot here"):
        runtime.load_adapter(adapter(checkpoint("gpt2"), target_modules=["c_attn"]))
    with pytest.raises(AdapterError, match="neither"):
        runtime.swap(tmp_path)
    with pytest.raises(AdapterError, match="one adapter for a whole batch"):
        runtime.swap([None, None])


def test_an_adapter_that_is_not_finite_is_refused(
    runtime: Runtime, one: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(one, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="NaN"):
        runtime.load_adapter(folder)


def test_a_prompt_has_no_slot(base: Path, tmp_path: Path) -> None:
    prompted = peftc.Pipeline([peftc.PromptTuning(virtual_tokens=2)]).run(peftc.capture(base))
    with pytest.raises(PeftcError, match="virtual tokens"):
        peftc.to_pt2(prompted, tmp_path / "out", adapters="swap")


def test_a_checkpoint_is_no_compiled_model(base: Path) -> None:
    with pytest.raises(PeftcError):
        load(base)


@pytest.fixture(scope="module")
def seven(base: Path, adapter: MakeAdapter) -> list[Path]:
    return [adapter(base, seed=seed, r=1 + seed) for seed in range(7)]


@pytest.fixture(scope="module")
def rows(base: Path, compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """In 4 bits, each row of a batch with its own adapter."""
    program = peftc.Pipeline([peftc.Nf4(double_quant=True, block_size=32)]).run(peftc.capture(base))
    out = tmp_path_factory.mktemp("rows") / "out"
    told = peftc.to_pt2(program, out, adapters="rows").manifest
    assert told["pt2"]["operators"] == ["peftc::nf4_linear.default"]
    assert (told["pt2"]["four_bit"], told["pt2"]["quantized"]) == ("kernel", 42)
    assert told["proof"]["pt2"]["model"]["relative_error"] < 1e-5
    return load(out)


def test_rows_of_eight_adapters_answer_as_eight_runs(rows: Runtime, seven: list[Path]) -> None:
    ids = torch.randint(0, 97, (8, 7), generator=torch.Generator().manual_seed(3))
    chosen = [*(rows.load_adapter(path) for path in seven), None]
    rows.swap(chosen)
    got = rows.run(given(ids, rows))["logits"]
    texts = rows.generate(ids, 6, stop=[])
    for row, which in enumerate(chosen):
        rows.swap(which)
        assert close(got[row], rows.run(given(ids[row : row + 1], rows))["logits"][0])
        assert texts[row].tolist() == rows.generate(ids[row : row + 1], 6, stop=[])[0].tolist()


def test_one_adapter_is_for_batches_of_any_size(rows: Runtime, seven: list[Path]) -> None:
    rows.swap(seven[3])
    both = rows.run(given(IDS, rows))["logits"]
    for row in range(2):
        torch.testing.assert_close(
            both[row], rows.run(given(IDS[row : row + 1], rows))["logits"][0]
        )


def test_a_batch_of_other_rows_is_refused(rows: Runtime, seven: list[Path]) -> None:
    rows.swap([seven[0], None])
    with pytest.raises(InputError, match="chosen for 2"):
        rows.run(given(IDS[[0, 1, 0]], rows))
    with pytest.raises(AdapterError):
        rows.swap([])


def test_a_second_export_compiles_nothing(
    base: Path, compiled: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was compiled for one adapter is there for every other of the same layers."""
    from peftc.exporters import inductor_compile

    def refuse(*_: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr(inductor_compile, "_compiled", refuse)
    named = [(str(other), 1.0)]
    out = tmp_path / "out"
    peftc.export(base, out, format="pt2", swap=True, slots="all-linear", adapters=named)
    assert load(out).adapters == [other.name]


def test_a_kept_library_that_was_changed_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftc.exporters.inductor_cache import kept

    monkeypatch.setenv("PEFTC_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "a.so"
    made.write_bytes(b"library")
    asked: list[str] = []

    def make() -> list[str]:
        asked.append("again")
        return [str(made)]

    kept("a graph", {}, make)
    (file,) = kept("a graph", {}, make)
    assert len(asked) == 1 and Path(file).read_bytes() == b"library"
    Path(file).write_bytes(b"another")
    kept("a graph", {}, make)
    assert len(asked) == 2 and Path(file).read_bytes() == b"library"
    kept("a graph", {"option": 1}, make)
    kept("another graph", {}, make)
    assert len(asked) == 4
