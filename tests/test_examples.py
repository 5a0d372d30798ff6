"""Examples from files: what of them is learned, and what is wrong with them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from peftc import Tuning
from peftc.errors import DataError, MissingDependency, TrainingError
from peftc.examples import Example, asked, read_examples
from peftc.token_rows import IGNORED, Rows, check_packing, collate, token_rows

from .helpers import refuse
from .talker import CHAT, byte_tokenizer, lines

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENIZER = byte_tokenizer()
PAIR = {"prompt": "1+1=", "completion": "2."}


def read(file: Path, **options: Any) -> list[Example]:
    return read_examples(Tuning(data=str(file), **options), str(file), TOKENIZER)


def rows_of(file: Path, limit: int = 128, **options: Any) -> Rows:
    data = Tuning(data=str(file), **options)
    return token_rows(read_examples(data, str(file), TOKENIZER), data, TOKENIZER, limit)


def learned(rows: Rows, index: int = 0) -> str:
    """The text of the tokens that are learned."""
    labels = rows[index]["labels"]
    text: str = TOKENIZER.decode(labels[labels != IGNORED])
    return text


@pytest.mark.parametrize(
    ("record", "options", "text", "wanted"),
    [
        (PAIR, {}, "1+1=2.</s>", "2.</s>"),
        (PAIR, {"loss_on": "all"}, "1+1=2.</s>", "+1=2.</s>"),
        ({"prompt": "", "completion": "ab"}, {}, "ab</s>", "b</s>"),
        ({"text": "héllo"}, {}, "héllo</s>", "éllo</s>"),
        (
            {"q": "ä", "a": "ö", "text": 3}, {"columns": {"prompt": "q", "completion": "a"}},
            "äö</s>", "ö</s>",
        ),
        (PAIR, {"chat": True}, "<|im|>user\n1+1=</s>\n<|im|>assistant\n2.</s>\n", "2.</s>"),
        (
            {"messages": CHAT}, {},
            "<|im|>user\nWho are you?</s>\n<|im|>assistant\nA model.</s>\n"
            "<|im|>user\nSure?</s>\n<|im|>assistant\nYes.</s>\n",
            "A model.</s>Yes.</s>",
        ),
        (
            {"messages": CHAT[:2]}, {"loss_on": "all"},
            "<|im|>user\nWho are you?</s>\n<|im|>assistant\nA model.</s>\n",
            "user\nWho are you?</s>\n<|im|>assistant\nA model.</s>\n",
        ),
    ],
)  # fmt: skip
def test_completions_are_learned_and_no_more(
    tmp_path: Path, record: dict[str, Any], options: dict[str, Any], text: str, wanted: str
) -> None:
    rows = rows_of(lines(tmp_path / "a.jsonl", [record]), **options)
    assert TOKENIZER.decode(rows[0]["input_ids"]) == text
    assert learned(rows) == wanted


def test_kinds_of_files_hold_the_same_examples(tmp_path: Path) -> None:
    import datasets

    records = [
        PAIR,
        {"prompt": 'a "b", c\nd', "completion": "NA"},
        {"prompt": "x", "completion": "007"},
    ]
    want = read(lines(tmp_path / "a.jsonl", records))
    (tmp_path / "a.json").write_text(json.dumps(records))
    table = datasets.Dataset.from_list(records)
    table.to_csv(str(tmp_path / "a.csv"))
    table.to_parquet(str(tmp_path / "a.parquet"))
    for kind in ("json", "csv", "parquet"):
        assert read(tmp_path / f"a.{kind}") == want, kind
    assert [asked(example) for example in want] == [tuple(r.values()) for r in records]


def test_gaps_that_a_table_leaves_in_messages_reach_no_template(tmp_path: Path) -> None:
    odd = [{"role": "user", "content": "a", "name": "b"}, {"role": "assistant", "content": "c"}]
    found = read(lines(tmp_path / "a.jsonl", [{"messages": odd}, {"messages": CHAT}]))
    assert found[1].text.count("<|im|>") == 4


@pytest.mark.parametrize(
    ("records", "options", "words"),
    [
        ([], {}, ["is empty"]),
        (["", " "], {}, ["cannot be read"]),
        ([PAIR, '{"prompt": "a"', PAIR, "[1]", "nonsense"], {},
         ["line 2", "line 4", "line 5", "no JSON object", "no JSON: "]),
        (['{"prompt": "a"'] * 9, {}, ["line 5", "and 4 lines more"]),
        ([{"prompt": "a"}], {}, ["no 'completion'", "--columns completion=NAME"]),
        ([{"qestion": "a", "answer": "b"}], {}, ["qestion, answer", "--columns text=NAME"]),
        ([{"qestion": "a", "b": "c"}], {"columns": {"text": "question"}},
         ["'question'", "did you mean qestion"]),
        ([PAIR], {"columns": {"promt": "prompt"}}, ["'promt'", "did you mean prompt"]),
        ([PAIR, {"prompt": "a"}, {"prompt": "a", "completion": ""}], {},
         ["example 2", "example 3", "completion is empty"]),
        ([{"text": "a"}, {"text": 5}], {}, ["example 2", "text is no text"]),
        ([{"text": ""}] * 8, {}, ["example 5", "and 3 examples more"]),
        ([{"messages": CHAT[:1]}], {}, ["no turn of it is the assistant's", "--loss-on all"]),
        ([{"messages": [{"role": "user"}]}], {},
         ["example 1", "message 1 has no role or no content"]),
        ([{"messages": []}], {}, ["no list of turns"]),
        ([{"text": "a" * 200}, {"text": "a"}, {"text": "b" * 300}], {},
         ["example 1", "201 tokens", "128", "example 3", "--max-length 301", "or skip"]),
        ([{"text": "a"}], {"max_length": 1}, None),
    ],
)  # fmt: skip
def test_bad_data_is_refused_with_its_place(
    tmp_path: Path, records: list[Any], options: dict[str, Any], words: list[str] | None
) -> None:
    if words is None:
        with pytest.raises(ValueError, match="greater than 1"):
            Tuning(data="a", **options)
        return
    file = lines(tmp_path / "a.jsonl", records)
    refuse(
        tmp_path,
        DataError,
        lambda _: rows_of(file, **options),
        "a.jsonl" if "columns" not in options else "",
        *words,
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "prompt,completion\nx,y\na,b,c\n", ["line 3"]),
        ("a.csv", "prompt,completion\nx\n", ["example 1", "completion is empty"]),
        ("a.parquet", "PAR1 not", ["cannot be read"]),
        ("a.txt", "hello", ["no kind of file", ".jsonl"]),
    ],
)  # fmt: skip
def test_bad_file_is_refused(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    (tmp_path / name).write_text(content)
    refuse(tmp_path, DataError, lambda _: read(tmp_path / name), name, *words)


def test_absent_file_and_dataset_are_told_apart(tmp_path: Path) -> None:
    refuse(tmp_path, DataError, lambda _: read(tmp_path / "no.jsonl"), "no such file")
    refuse(tmp_path, DataError, lambda _: read(Path("no/such")), "neither a file nor a dataset")


def test_model_without_a_template_takes_no_chat(tmp_path: Path) -> None:
    bare = byte_tokenizer()
    bare.chat_template = None
    file = lines(tmp_path / "a.jsonl", [{"messages": CHAT}])
    job = partial(read_examples, Tuning(data=str(file)), str(file), bare)
    refuse(tmp_path, DataError, lambda _: job(), "no chat template")


def test_template_that_rewrites_turns_is_refused(tmp_path: Path) -> None:
    odd = byte_tokenizer()
    odd.chat_template = "{{ messages | length }}" + odd.chat_template
    file = lines(tmp_path / "a.jsonl", [{"messages": CHAT}])
    job = partial(read_examples, Tuning(data=str(file)), str(file), odd)
    refuse(tmp_path, DataError, lambda _: job(), "example 1", "--loss-on all")


def test_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    file = lines(tmp_path / "a.jsonl", [PAIR])
    refuse(
        tmp_path, MissingDependency, lambda _: read(file), "datasets", "pip install 'peftc[train]'"
    )


def test_too_long_examples_are_cut_or_left_out(tmp_path: Path) -> None:
    far = {"prompt": "p" * 150, "completion": "c"}
    records = [{"prompt": "p" * 20, "completion": "c" * 200}, far, PAIR]
    file = lines(tmp_path / "a.jsonl", records)
    cut = rows_of(file, too_long="truncate")
    assert [len(row["input_ids"]) for row in cut] == [128, 7]  # type: ignore[attr-defined]
    assert cut.notes == {"truncated": 2, "skipped": 1}  # of the second no completion is left
    left = rows_of(file, too_long="skip")
    assert len(left) == 1 and left.notes == {"truncated": 0, "skipped": 2}
    with pytest.raises(DataError, match="no example is left"):
        rows_of(lines(tmp_path / "b.jsonl", [far]), too_long="skip")


def test_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    class Slow:
        is_fast = False

    data = Tuning(data="a")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        token_rows([Example(1, "a", ((0, 1),))], data, Slow(), 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=40), st.integers(0, 9))
def test_packing_keeps_every_example_whole_within_the_length(sizes: list[int], seed: int) -> None:
    ids = np.arange(sum(sizes), dtype=np.int32)
    ends, groups = np.cumsum(sizes), tuple((i,) for i in range(len(sizes)))
    rows = Rows(ids, np.ones(len(ids), bool), ends, groups, False, {})
    packed = rows.pack(12)
    assert sorted(i for group in packed.groups for i in group) == list(range(len(sizes)))
    assert len({packed.digest, rows.digest}) == 2
    lengths = [len(row["input_ids"]) for row in (packed[i] for i in range(len(packed)))]
    assert max(lengths) <= 12
    assert len(packed) <= 2 * -(-sum(sizes) // 12)  # no two rows would fit into one
    for i, group in enumerate(packed.groups):
        assert packed[i]["input_ids"].tolist() == [t for g in group for t in range(*rows.span(g))]
        assert (packed[i]["position_ids"] == 0).sum() == len(group)
    if len(rows) > 1:
        most, few = rows.split(0.3, seed)
        assert sorted([*most.groups, *few.groups]) == sorted(groups) and len(few) >= 1
        assert rows.split(0.3, seed)[1].groups == few.groups


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_batch_is_padded_with_what_counts_for_nothing(sizes: list[int], packed: bool) -> None:
    rows = [{"input_ids": torch.full((n,), 7), "labels": torch.full((n,), 7)} for n in sizes]
    if packed:
        rows = [
            {**row, "position_ids": torch.arange(n)} for row, n in zip(rows, sizes, strict=True)
        ]
    batch = collate(rows, pad=2)
    padding = torch.tensor([[i >= n for i in range(max(sizes))] for n in sizes])
    assert torch.equal(batch["input_ids"] == 2, padding)
    assert torch.equal(batch["labels"] == IGNORED, padding)
    if packed:
        assert "attention_mask" not in batch
        starts = (batch["position_ids"] == 0).sum(1)
        assert starts.tolist() == [1 + (n < max(sizes)) for n in sizes]
    else:
        assert torch.equal(batch["attention_mask"] == 0, padding)


def small(cls: str, **options: Any) -> Any:
    config = getattr(transformers, f"{cls}Config")(vocab_size=97, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.config.use_cache = False
    return model


LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.mark.parametrize(("cls", "options"), [("Llama", LLAMA), ("GPT2", GPT2)])
def test_packed_examples_are_computed_as_alone(cls: str, options: dict[str, int]) -> None:
    check_packing(small(cls, **options), 97)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),  # takes no positions
        ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),  # has a state
    ],
)  # fmt: skip
def test_model_that_would_mix_packed_examples_is_refused(cls: str, options: dict[str, int]) -> None:
    with pytest.raises(TrainingError, match="does not keep packed examples apart"):
        check_packing(small(cls, **options), 97)
