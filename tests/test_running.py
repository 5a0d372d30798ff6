"""peftc run and bench: the same text whatever the engine, and nothing that was tampered with."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import peftc
from peftc import Lora, PromptTuning
from peftc.artifact import Artifact, digest
from peftc.cli import cli
from peftc.errors import ArtifactError, MissingDependency, PeftcError, RunError
from peftc.running import ENGINES, KINDS, Figures, Sampling, answer, open_runner
from peftc.text import Text
from peftc.timing import bench

from .conftest import MakeAdapter, Run
from .helpers import alone, copied, edit, refuse
from .talker import talker
from .test_constant_cache import with_lora

PROMPT = "What is 1+1?"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = talker(tmp_path_factory.mktemp("talker"))
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(0)
    for parameter in model.parameters():  # as it is, no token is much likelier than others
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "out"
    return peftc.export(base, out, format="onnx", proof="sites").path


@pytest.mark.parametrize("sampling", [
    Sampling(24), Sampling(24, 0.8, seed=3), Sampling(24, 1.5, top_k=9, top_p=0.8, seed=4),
])  # fmt: skip
def test_text_is_the_same_on_every_engine(exported: Path, sampling: Sampling) -> None:
    texts = {}
    for engine in (*KINDS["onnx"], "transformers"):
        runner, figures = open_runner(exported, engine=engine), Figures()
        text = Text(runner.folder)
        ids = text.encode(PROMPT)
        texts[engine] = "".join(answer(runner, text, ids, sampling, figures))
        assert figures.prompt_tokens == len(ids) and 1 <= figures.new_tokens <= 24
        assert figures.first > 0 and (figures.new_tokens == 1 or figures.rate > 0)
    assert len(set(texts.values())) == 1, texts


def test_greedy_text_is_that_of_generate(exported: Path, run: Run) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(exported)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    want = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    done = run("run", exported, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert done.code == 0, done.err
    assert done.out == tokenizer.decode(want, skip_special_tokens=True) + "\n"
    assert "onnxruntime-genai" in done.err and "tokens/s" in done.err


def test_chat_is_rendered_as_transformers_does(exported: Path, base: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé?"}]
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base)
    want = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    text = Text(exported)
    assert text.chat(messages) == want
    assert text.encode("Hé?") == tokenizer("Hé?")["input_ids"]
    assert text.ends == {1} and text.context == 128


def test_prompt_from_stdin_and_a_conversation_as_json(
    exported: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    options = ["--chat", "--system", "Be brief.", "--max-new-tokens", 5, "--json"]
    found = run("run", exported, *options).data
    assert 1 <= found["new_tokens"] <= 5 and len(found["tokens"]) == found["new_tokens"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    assert found["prompt_tokens"] == len(Text(exported).chat(messages))


def test_characters_of_several_tokens_come_whole(exported: Path) -> None:
    text = Text(exported)
    ids = text.tokenizer.encode("añ🙂").ids
    assert list(text.pieces(ids)) == ["a", "ñ", "🙂"]
    assert "".join(text.pieces(ids[:-1])).startswith("añ")  # cut off in the middle


@settings(max_examples=30, deadline=None)
@given(
    temperature=st.floats(0.2, 3), top_k=st.integers(0, 40), top_p=st.floats(0.05, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_tokens_that_may_be_chosen_are_those_of_transformers(
    temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(size=(2, 30)).astype(np.float32) * 3
    scores: Any = torch.from_numpy(logits).double()
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    sampling = Sampling(1, temperature, top_k, top_p)

    class Still:  # without noise and with a lot of it
        def __init__(self, token: int | None) -> None:
            self.token = token

        def gumbel(self, size: tuple[int, int]) -> Any:
            noise = np.zeros(size)
            if self.token is not None:
                noise[:, self.token] = 1e9
            return noise

    for token in range(30):
        still: Any = Still(token)
        chosen = sampling.choose(logits, still)
        allowed = scores[:, token].isfinite().numpy()
        assert ((chosen == token) == allowed).all()
    none: Any = Still(None)
    assert (sampling.choose(logits, none) == logits.argmax(-1)).all()


def test_drawn_tokens_have_the_probabilities_of_their_logits() -> None:
    logits = np.log(np.array([[0.6, 0.3, 0.1]], np.float32)).repeat(20_000, 0)
    chosen = Sampling(1, 1.0).choose(logits, np.random.default_rng(0))
    assert np.allclose(np.bincount(chosen) / 20_000, [0.6, 0.3, 0.1], atol=0.02)


def test_whatever_load_takes_runs_by_transformers(base: Path, tmp_path: Path, run: Run) -> None:
    program = with_lora(base, PromptTuning(virtual_tokens=3, adapter="p"))
    peftc.to_peft(program, tmp_path / "lora", adapter="l")
    peftc.apply(base, [PromptTuning(virtual_tokens=3)], tmp_path / "prompted")
    peftc.export(tmp_path / "prompted", tmp_path / "cache", merge=True, format="cache")
    peftc.export(tmp_path / "prompted", tmp_path / "onnx", format="onnx", proof="sites")
    rest = ["--prompt", PROMPT, "--max-new-tokens", 8, "--json"]
    plain = run("run", base, *rest).data["tokens"]
    with_adapter = run("run", base, "--adapter", tmp_path / "lora", *rest).data["tokens"]
    assert run("run", tmp_path / "lora", *rest).data["tokens"] == with_adapter != plain
    prompted = run("run", tmp_path / "prompted", *rest).data["tokens"]
    assert prompted != plain
    for path, engine in (("cache", "transformers"), ("onnx", "transformers"), ("onnx", "genai")):
        found = run("run", tmp_path / path, "--engine", engine, *rest).data
        assert found["tokens"] == prompted, (path, engine)


def test_adapters_are_switched_on_by_name_and_by_directory(
    base: Path, adapter: MakeAdapter, tmp_path: Path
) -> None:
    inside, outside = (str(adapter(base, seed, r=2 + seed)) for seed in (1, 2))
    given: Any = {"format": "onnx", "swap": True, "proof": "sites"}
    peftc.export(base, tmp_path / "onnx", adapters=[(inside, 1.0)], **given)
    (name,) = Artifact.open(tmp_path / "onnx").manifest["onnx"]["adapters"]
    alone_ = str(tmp_path / "alone")
    peftc.export(
        tmp_path / "onnx", alone_, adapters=[(outside, 1.0)], format="onnx-adapter", proof="sites"
    )
    named = {None: None, inside: name, outside: alone_}
    found = []
    for live, there in named.items():
        want = tokens(open_runner(base, adapter=live))
        found.append(want)
        for engine in ("genai", "onnxruntime"):
            runner = open_runner(tmp_path / "onnx", engine=engine, adapter=there)
            assert tokens(runner) == want, (engine, there)
    assert len({tuple(one) for one in found}) == 3
    refuse(tmp_path, RunError, lambda _: open_runner(alone_), "onnx-adapter", "--adapter")
    edit(tmp_path / "onnx" / "peftc.json", onnx={"base": "another"})
    job = lambda _: open_runner(tmp_path / "onnx", adapter=alone_)  # noqa: E731
    refuse(tmp_path, RunError, job, "made for another base")


def tokens(runner: Any) -> list[int]:
    text, figures = Text(runner.folder), Figures()
    list(answer(runner, text, text.encode(PROMPT), Sampling(12, ends=False), figures))
    return figures.tokens


def test_running_onnx_imports_no_torch(exported: Path) -> None:
    code = (
        "import sys; sys.argv = ['peftc', *sys.argv[1:]]; from peftc.cli import main\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    for engine in ("genai", "onnxruntime"):
        options = ["--prompt", "a", "--max-new-tokens", 2, "--chat", "--engine", engine]
        assert alone("-c", code, "run", exported, *options).code == 0


def test_figures_are_of_every_combination(exported: Path, run: Run) -> None:
    for engine in ("genai", "onnxruntime"):
        options = ["--batch", 1, "--batch", 3, "--prompt-tokens", 9, "--new-tokens", 6,
                   "--rounds", 1, "--engine", engine]  # fmt: skip
        found = run("bench", exported, *options, "--json").data
        assert [t["batch"] for t in found["timings"]] == [1, 3]
        assert all(min(t.values()) > 0 for t in found["timings"])
    shown = run("bench", exported, "--new-tokens", 3, "--prompt-tokens", 4, "--rounds", 1)
    assert "first token" in shown.out and "peak" in shown.out
    assert CliRunner().invoke(cli, ["bench", str(exported), "--new-tokens", "1"]).exit_code == 2


def test_every_round_writes_all_tokens(exported: Path) -> None:
    """Though a text ends before."""
    seen: list[Sampling] = []

    class Counting:
        engine, folder = "none", exported

        def generate(self, ids: Any, sampling: Sampling) -> Iterator[list[int]]:
            seen.append(sampling)
            yield from ([1] * len(ids) for _ in range(sampling.max_new_tokens))

    runner: Any = Counting()
    (timing,) = bench(runner, Text(exported), [2], [5], [4], 2)
    assert (timing.batch, timing.prompt, timing.new) == (2, 5, 4)
    assert len(seen) == 3 and not any(sampling.ends for sampling in seen)


# What is refused.


def test_graph_that_is_not_what_was_published_is_not_run(exported: Path, tmp_path: Path) -> None:
    bad = copied(exported, tmp_path / "bad")
    graph = bad / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\x00")
    for engine in ENGINES:
        with pytest.raises(ArtifactError, match="not what was published"):
            open_runner(bad, engine=engine)


def test_weights_are_compared_by_size_and_with_verify_by_hash(
    exported: Path, tmp_path: Path
) -> None:
    bad = copied(exported, tmp_path / "bad")
    weights = bad / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert open_runner(bad).folder == bad
    with pytest.raises(ArtifactError, match="not what was published"):
        open_runner(bad, verify=True)
    weights.write_bytes(content + b"\x00")
    with pytest.raises(ArtifactError, match="not what was published"):
        open_runner(bad)


def test_kind_that_is_no_model_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftc.running.KINDS", {})
    refuse(tmp_path, RunError, lambda _: open_runner(exported), "of kind onnx", "--adapter")


def test_command_offers_every_engine() -> None:
    (option,) = (p for p in cli.commands["run"].params if p.name == "engine")
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == list(ENGINES)


@pytest.mark.parametrize(("engine", "words"), [
    ("genai", "genai_config.json"), ("onnxruntime", "model.onnx"),
    ("transformers", "no checkpoint"),
])  # fmt: skip
def test_engine_that_does_not_run_a_directory_says_why(
    exported: Path, tmp_path: Path, engine: str, words: str
) -> None:
    bare = copied(exported, tmp_path / "bare")
    for name in ("genai_config.json", "model.onnx", "model.safetensors"):
        (bare / name).unlink()
    forget(bare)
    refuse(tmp_path, RunError, lambda _: open_runner(bare, engine=engine), words)
    refuse(tmp_path, RunError, lambda _: open_runner(bare), "model.onnx")


def forget(path: Path) -> None:
    """Makes a manifest of what is left."""
    manifest = dict(Artifact.open(path).manifest)
    manifest["files"] = {
        name: {"size": (path / name).stat().st_size, "blake3": digest(path / name)}
        for name in manifest["files"]
        if (path / name).exists()
    }
    (path / "peftc.json").write_text(json.dumps(manifest))


def test_model_that_generates_nothing_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    peftc.export(tmp_path / "bert", tmp_path / "onnx", format="onnx", proof="sites")
    for path in ("bert", "onnx"):
        with pytest.raises(RunError, match=r"generates nothing|no decoder"):
            open_runner(tmp_path / path)


def test_cache_of_a_type_that_numpy_lacks_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftc.running_onnx.TYPES", {"tensor(float16)": np.float16})
    job = lambda _: open_runner(exported, engine="onnxruntime")  # noqa: E731
    refuse(tmp_path, RunError, job, "tensor(float)", "--engine genai")


def test_prompt_that_is_empty_or_too_long_is_refused(exported: Path) -> None:
    runner, text = open_runner(exported), Text(exported)
    for ids, words in (([], "is empty"), ([5] * 128, "takes 128")):
        with pytest.raises(RunError, match=words):
            list(answer(runner, text, ids, Sampling(4), Figures()))
    figures = Figures()
    sampling = Sampling(50, ends=False)
    list(answer(runner, text, [5] * 120, sampling, figures))  # up to the end of its positions
    assert figures.new_tokens == 8
    with pytest.raises(RunError, match="takes 128"):
        bench(runner, text, [1], [100], [40], 1)


def test_tokenizer_and_template_that_are_not_there_are_named(
    exported: Path, tmp_path: Path
) -> None:
    bare = copied(exported, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    refuse(tmp_path, RunError, lambda _: Text(bare).chat([]), "no chat template")
    (bare / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    refuse(tmp_path, RunError, lambda _: Text(bare).chat([]), "no system here")
    (bare / "tokenizer.json").unlink()
    refuse(tmp_path, RunError, lambda _: Text(bare), "tokenizer.json")


@pytest.mark.parametrize("engine", ["genai", "onnxruntime"])
def test_adapter_that_is_not_there_is_refused(exported: Path, tmp_path: Path, engine: str) -> None:
    job = lambda _: open_runner(exported, engine=engine, adapter="pirate")  # noqa: E731
    refuse(tmp_path, RunError, job, "no such adapter", "onnx-adapter")
    (tmp_path / "bad.onnx_adapter").write_bytes(b"none")
    file = str(tmp_path / "bad.onnx_adapter")
    with pytest.raises(RunError, match="cannot load it"):
        open_runner(exported, engine=engine, adapter=file)


def test_missing_runtime_is_named_with_its_command(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    assert open_runner(exported).engine.startswith("onnxruntime 1")
    with pytest.raises(MissingDependency, match=r"pip install 'peftc\[onnx\]'"):
        open_runner(exported, engine="genai")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency):
        open_runner(exported)


def test_options_that_say_nothing_are_refused(exported: Path) -> None:
    for options in (["--top-k", "4"], ["--seed", "1"], ["--system", "x"], ["--top-p", "0"]):
        done = CliRunner().invoke(cli, ["run", str(exported), "--prompt", "a", *options])
        assert done.exit_code == 2, options


def test_lora_that_is_not_merged_runs_as_it_is(base: Path, tmp_path: Path) -> None:
    peftc.apply(base, [Lora(rank=2)], tmp_path / "applied")
    assert open_runner(tmp_path / "applied").engine.startswith("transformers")
    with pytest.raises(PeftcError):
        open_runner(tmp_path / "applied", engine="onnxruntime")
