"""Examples: what a data file holds, as texts of which some characters are learned.

Files and the hub's datasets are read by the library `datasets`; what it cannot read is looked at
again here, so that the error names the line.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftc.errors import DataError, PeftcError, did_you_mean, raise_all
from peftc.extras import lacking
from peftc.tuning import Data

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SHAPES = (("messages",), ("prompt", "completion"), ("text",))  # the columns of each kind
SHOWN = 5  # how many of many alike errors are spelled out
Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One text to learn from.

    Attributes:
        number: Of the example in its file, from 1.
        text: All of it.
        learned: The characters whose tokens are learned, as spans.
        whole: The template has written what begins and ends it; else the tokenizer's beginning of
            a text goes before it, and its end is learned behind it.
    """

    number: int
    text: str
    learned: tuple[Span, ...]
    whole: bool = False


def read_examples(data: Data, source: str, tokenizer: Any) -> list[Example]:
    """The examples of a file or of a dataset on the hub.

    Args:
        data: How they are to be read.
        source: The file, or the hub's id: `data.data`, or what is evaluated on.
        tokenizer: transformers' tokenizer of the model, for its chat template.

    Raises:
        MissingDependency: The library `datasets` is not installed.
        DataError: Everything that is wrong with the file, or with examples.
    """
    raise_all(lacking("reading data", "train", "datasets"))
    with tempfile.TemporaryDirectory(prefix="peftc-data-") as cache:
        table = _table(data, source, cache)
        columns = _columns(data, source, table.column_names)
        make = _maker(columns, data, tokenizer, source)
        examples: list[Example] = []
        wrong: list[PeftcError] = []
        for number, record in enumerate(table, 1):
            try:
                examples.append(make(number, {as_: record[name] for as_, name in columns.items()}))
            except DataError as error:
                wrong.append(error)
    raise_shown(wrong, source, "correct them, or take them out")
    return examples


def raise_shown(errors: list[PeftcError], where: str, fix: str) -> None:
    """Raises the first of many alike errors, and says how many more there are."""
    if (more := len(errors) - SHOWN) > 0:
        errors = [*errors[:SHOWN], DataError(f"and {more} examples more", where=where, fix=fix)]
    raise_all(errors)


def _table(data: Data, source: str, cache: str) -> Any:
    """What `datasets` reads of a source."""
    import datasets

    file = Path(source)
    if not (file.exists() or file.suffix in READERS):
        return _from_hub(data, source)
    if file.suffix not in READERS:
        raise DataError(
            "is no kind of file that can be read", where=source,
            fix=f"name a file that ends in {', '.join(READERS)}",
        )  # fmt: skip
    if not file.is_file():
        raise DataError("there is no such file", where=source, fix="check the path")
    if not file.stat().st_size:
        raise DataError("is empty", where=source, fix="put an example into every line")
    kind = READERS[file.suffix]
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    if kind == "json":  # Arrow's reader of it crashes the process on a line that is no object
        raise_all(_broken_lines(file) if file.suffix == ".jsonl" else _broken_entries(file))
    try:
        options = _as_texts(file) if kind == "csv" else {}
        table = datasets.load_dataset(
            kind, data_files=str(file), split="train", cache_dir=cache, **options
        )
    except Exception as error:  # of pyarrow, pandas and json, as their parsers please
        cause = str(error.__cause__ or error).strip().splitlines()
        raise DataError(
            f"cannot be read: {cause[0] if cause else 'it holds no example'}", where=source,
            fix="correct it there",
        ) from error  # fmt: skip
    if not len(table):
        raise DataError("holds no example", where=source, fix="put an example into every line")
    return table


def _as_texts(file: Path) -> dict[str, Any]:
    """How a CSV file is read so that "NA" and "007" are texts, and no gap or number."""
    import datasets

    with file.open(newline="", encoding="utf-8") as opened:
        names = next(csv.reader(opened))
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False}


def _from_hub(data: Data, source: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source, data.subset, split=data.split)
    except Exception as error:  # of any of the libraries beneath
        raise DataError(
            f"is neither a file nor a dataset that the hub gives: {str(error).splitlines()[0]}",
            where=source,
            fix="check the path, or --subset and --split",
        ) from error


def _broken_lines(file: Path) -> list[PeftcError]:
    """An error for each line that is no JSON object."""
    errors: list[PeftcError] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                what = None if isinstance(json.loads(line.strip()), dict) else "is no JSON object"
            except json.JSONDecodeError as error:
                what = f"is no JSON: {error.msg} at its character {error.pos + 1}"
            except (UnicodeDecodeError, RecursionError):
                what = "is no JSON: it is not in UTF-8, or nested too deep"
            if what:
                errors.append(DataError(
                    what, where=f"{file}, line {number}", fix="correct the line, or take it out"
                ))  # fmt: skip
    if len(errors) > SHOWN:
        rest = f"and {len(errors) - SHOWN} lines more"
        errors[SHOWN:] = [DataError(rest, where=str(file), fix="correct them")]
    return errors


def _broken_entries(file: Path) -> list[PeftcError]:
    """An error where a file is neither a list of JSON objects nor of a line each."""
    try:
        entries = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return _broken_lines(file)
    if isinstance(entries, dict) or (
        isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    ):
        return []
    return [
        DataError("is no list of JSON objects", where=str(file), fix="write one for each example")
    ]


def _columns(data: Data, source: str, there: list[str]) -> dict[str, str]:
    """The column of each part of an example."""
    known = {part for shape in SHAPES for part in shape}
    raise_all(
        [
            DataError(
                f"there is no part {part!r}", where="--columns", fix=did_you_mean(part, known)
            )
            for part in data.columns
            if part not in known
        ]
        + [
            DataError(f"has no column {name!r}", where=source, fix=did_you_mean(name, there))
            for name in data.columns.values()
            if name not in there
        ]
    )
    named = {**{name: name for name in there}, **data.columns}
    for shape in SHAPES:
        if all(part in named for part in shape):
            return {part: named[part] for part in shape}
    half = next((part for part in ("prompt", "completion") if part in named), None)
    other = {"prompt": "completion", "completion": "prompt"}.get(half or "")
    raise DataError(
        f"has a column {half!r} and no {other!r}"
        if half
        else "has none of the columns text, "
        f"prompt and completion, or messages; it has {', '.join(there)}",
        where=source,
        fix=f"name it: --columns {other or 'text'}=NAME",
    )


def _maker(
    columns: Mapping[str, str], data: Data, tokenizer: Any, source: str
) -> Callable[[int, dict[str, Any]], Example]:
    """What makes an example of a record with these columns."""
    templated = "messages" in columns or data.chat
    if templated and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the model's tokenizer has no chat template", where=source,
            fix="use an instruct model, or data with the columns prompt and completion",
        )  # fmt: skip

    def make(number: int, record: dict[str, Any]) -> Example:
        where = f"{source}, example {number}"
        if "messages" in record:
            return _chat(number, _turns(record["messages"], where), data, tokenizer, where)
        for part, text in record.items():
            if not isinstance(text, str) or not (text or part == "prompt"):
                raise DataError(
                    f"its {part} is {'empty' if text in (None, '') else 'no text'}", where=where,
                    fix="give it one, or take the example out",
                )  # fmt: skip
        if "text" in record:
            return Example(number, record["text"], ((0, len(record["text"])),))
        prompt, completion = record["prompt"], record["completion"]
        if data.chat:
            turns = [
                {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
            ]  # fmt: skip
            return _chat(number, turns, data, tokenizer, where)
        low = 0 if data.loss_on == "all" else len(prompt)
        return Example(number, prompt + completion, ((low, len(prompt + completion)),))

    return make


def _turns(messages: Any, where: str) -> list[dict[str, Any]]:
    """The messages without the gaps that a table's columns leave in them."""
    if not isinstance(messages, list) or not messages:
        raise DataError("its messages are no list of turns", where=where, fix="give it some")
    turns = [{k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
             for turn in messages]  # fmt: skip
    if lost := [i for i, turn in enumerate(turns, 1) if not {"role", "content"} <= turn.keys()]:
        raise DataError(
            f"its message {lost[0]} has no role or no content", where=where,
            fix='write {"role": "user", "content": "…"}',
        )  # fmt: skip
    return turns


def _chat(
    number: int, turns: list[dict[str, Any]], data: Data, tokenizer: Any, where: str
) -> Example:
    """A chat as the model's template writes it, of which the assistant's turns are learned."""

    def written(count: int, prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(
            turns[:count], tokenize=False, add_generation_prompt=prompt
        )
        return text

    try:
        text = written(len(turns))
        if data.loss_on == "all":
            return Example(number, text, ((0, len(text)),), whole=True)
        spans = list[Span]()
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before, behind = written(i, prompt=True), written(i + 1)
            if not (text.startswith(before) and text.startswith(behind)):
                raise DataError(
                    "the model's chat template writes a turn otherwise once more turns follow, so "
                    "that its tokens cannot be told", where=where,
                    fix="--loss-on all, or one answer in each example",
                )  # fmt: skip
            # White space behind the end of a turn is never generated.
            spans.append((len(before), len(behind.rstrip())))
    except DataError:
        raise
    except Exception as error:  # a template may raise anything
        raise DataError(
            f"the model's chat template does not take it: {error}", where=where,
            fix="order its turns as the model wants them",
        ) from error  # fmt: skip
    if not spans:
        raise DataError(
            "no turn of it is the assistant's", where=where, fix="--loss-on all, or take it out"
        )
    return Example(number, text, tuple(spans), whole=True)


def asked(example: Example) -> tuple[str, str] | None:
    """The text before what is learned last, and that; None where nothing is asked."""
    low, high = example.learned[-1]
    return (example.text[:low], example.text[low:high]) if low else None


def texts(examples: list[Example], size: int) -> Iterator[list[Example]]:
    """The examples in groups, in order."""
    for low in range(0, len(examples), size):
        yield examples[low : low + size]
