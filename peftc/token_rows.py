"""Rows of tokens: examples cut to length, several packed into one row, and batches of rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from peftc.errors import DataError, PeftcError, TrainingError
from peftc.examples import Example, raise_shown, texts
from peftc.tuning import Data

IGNORED = -100  # labels that count for nothing in transformers' losses
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of other dtypes: 5e-2

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rows(torch.utils.data.Dataset[Batch]):
    """Examples as tokens, in five bytes each.

    Attributes:
        ids: Every example's tokens, one behind the other (int32).
        learned: Which of them are learned; the first of an example never is, for nothing tells it.
        ends: Where each example ends.
        groups: The examples of each row, by their numbers from 0.
        packed: Whether rows hold several examples.
        notes: How many examples were cut or left out.
    """

    ids: np.ndarray[Any, Any]
    learned: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]
    groups: tuple[tuple[int, ...], ...]
    packed: bool
    notes: dict[str, int]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Batch:
        spans = [self.span(example) for example in self.groups[index]]
        where = np.concatenate([np.arange(low, high) for low, high in spans])
        ids, learned = self.ids[where].astype(np.int64), self.learned[where]
        row = {"input_ids": ids, "labels": np.where(learned, ids, IGNORED)}
        if self.packed:
            row["position_ids"] = np.concatenate([np.arange(high - low) for low, high in spans])
        return {name: torch.from_numpy(values) for name, values in row.items()}

    def span(self, example: int) -> tuple[int, int]:
        """Where an example's tokens are."""
        return int(self.ends[example - 1]) if example else 0, int(self.ends[example])

    @property
    def digest(self) -> str:
        """A hash of all that is learned from."""
        found = hashlib.sha256(repr((self.groups, self.packed)).encode())
        for array in (self.ids, self.learned, self.ends):
            found.update(array.tobytes())
        return found.hexdigest()

    def split(self, share: float, seed: int) -> tuple[Rows, Rows]:
        """These rows but a share of them, and that share; chosen by a seed."""
        order = np.random.default_rng(seed).permutation(len(self))
        count = min(max(1, round(share * len(self))), len(self) - 1)
        held, left = sorted(order[:count].tolist()), sorted(order[count:].tolist())
        return self.pick(left), self.pick(held)

    def pick(self, rows: Sequence[int]) -> Rows:
        """Some of these rows."""
        return replace(self, groups=tuple(self.groups[row] for row in rows))

    def pack(self, length: int) -> Rows:
        """Examples put together into rows of at most this length: best fit, the longest first."""
        sizes = np.diff(self.ends, prepend=0)
        free: list[list[list[int]]] = [[] for _ in range(length + 1)]  # rows by what they lack
        chosen = sorted((i for row in self.groups for i in row), key=lambda i: (-sizes[i], i))
        for example in chosen:
            size = int(sizes[example])
            room = next((left for left in range(size, length + 1) if free[left]), length)
            row = free[room].pop() if free[room] else []
            row.append(example)
            free[room - size].append(row)
        rows = sorted(tuple(row) for same in free for row in same)
        return replace(self, groups=tuple(rows), packed=True)


def token_rows(examples: Sequence[Example], data: Data, tokenizer: Any, limit: int) -> Rows:
    """Examples as tokens.

    Args:
        examples: What to tokenize.
        data: What becomes of too long ones.
        tokenizer: transformers' tokenizer of the model.
        limit: The most tokens that the model takes.

    Raises:
        DataError: Examples are too long, or hold nothing that is learned.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "the model's tokenizer cannot say which characters a token is made of",
            where=data.data,
            fix="save it as tokenizer.json, as transformers' fast tokenizers are",
        )
    length = min(limit, data.max_length or limit)
    ids: list[np.ndarray[Any, Any]] = []
    masks: list[np.ndarray[Any, Any]] = []
    errors: list[PeftcError] = []
    longest, notes = 0, {"truncated": 0, "skipped": 0}
    for group in texts(list(examples), 1000):
        for example, row, mask in _tokenized(group, tokenizer):
            longest = max(longest, len(row))
            if len(row) > length:
                if data.too_long == "error":
                    errors.append(_too_long(example, len(row), length, data))
                    continue
                notes["truncated" if data.too_long == "truncate" else "skipped"] += 1
                if data.too_long == "skip":
                    continue
                row, mask = row[:length], mask[:length]
            if not mask[1:].any():
                if len(row) < length:
                    errors.append(
                        DataError(
                            "nothing of it is learned",
                            where=f"{data.data}, example {example.number}",
                            fix="take it out",
                        )
                    )
                else:  # its prompt alone fills the length
                    notes["skipped"] += 1
                continue
            ids.append(np.array(row, np.int32))
            masks.append(mask & (np.arange(len(row)) > 0))
    fix = f"--max-length {longest}, if the model takes so many, or --too-long truncate or skip"
    raise_shown(errors, data.data, fix if longest > length else "take them out")
    if not ids:
        raise DataError("no example is left", where=data.data, fix="raise --max-length")
    ends = np.cumsum([len(row) for row in ids])
    groups = tuple((i,) for i in range(len(ids)))
    return Rows(np.concatenate(ids), np.concatenate(masks), ends, groups, False, notes)


def _too_long(example: Example, count: int, length: int, data: Data) -> DataError:
    return DataError(
        f"is {count} tokens long, and {length} is the limit",
        where=f"{data.data}, example {example.number}",
        fix=f"--max-length {count}, if the model takes so many, or --too-long truncate or skip",
    )


def _tokenized(group: list[Example], tokenizer: Any) -> list[tuple[Example, list[int], Any]]:
    """Each example with its tokens and a mask of those that are learned."""
    result: dict[int, tuple[Example, list[int], Any]] = {}
    for whole in (False, True):
        alike = [i for i, example in enumerate(group) if example.whole == whole]
        if not alike:
            continue
        found = tokenizer(
            [group[i].text for i in alike], add_special_tokens=not whole,
            return_offsets_mapping=True, return_attention_mask=False,
        )  # fmt: skip
        end = None if whole else tokenizer.eos_token_id
        for i, row, offsets in zip(alike, found["input_ids"], found["offset_mapping"], strict=True):
            spans = np.array(offsets, np.int64).reshape(-1, 2)
            mask = np.zeros(len(row), bool)
            for low, high in group[i].learned:
                # A special token that the tokenizer adds has no characters.
                mask |= (spans[:, 0] < high) & (spans[:, 1] > low) & (spans[:, 1] > spans[:, 0])
            if end is not None:
                row = row if row and row[-1] == end else [*row, end]
                mask = np.append(mask[: len(row) - 1], True)
            result[i] = group[i], row, mask
    return [result[i] for i in range(len(group))]


def collate(rows: Sequence[Batch], pad: int) -> Batch:
    """A batch of rows, padded at the right.

    Args:
        rows: Each with `input_ids` and `labels`, and `position_ids` if packed: (length,), int64.
        pad: The id of the padding.

    Returns:
        The same, (rows, longest). With a mask of what is no padding; packed rows have none, for
        there the positions, which start anew with each example, tell what attends to what, and
        padding is one example more.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad, "labels": IGNORED}
    batch = {
        name: torch.stack([
            nn.functional.pad(row[name], (0, longest - len(row[name])), value=value)
            for row in rows
        ])
        for name, value in fill.items()
    }  # fmt: skip
    if "position_ids" in rows[0]:
        batch["position_ids"] = torch.stack([
            torch.cat([row["position_ids"], torch.arange(longest - len(row["position_ids"]))])
            for row in rows
        ])  # fmt: skip
    else:
        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(longest) < sizes[:, None]).long()
    return batch


def check_packing(model: nn.Module, vocabulary: int) -> None:
    """Tries whether packed examples are computed as they would be alone.

    Args:
        model: What is to be trained, on its device; without its cache.
        vocabulary: Of its ids, how many may be tried.

    Raises:
        TrainingError: One sees another, or its positions are not its own.
    """
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    first, second = (
        torch.randint(0, vocabulary, (1, n), generator=generator).to(device) for n in (7, 5)
    )
    places = torch.cat([torch.arange(7), torch.arange(5)])[None].to(device)
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = model(input_ids=torch.cat([first, second], 1), position_ids=places)[0][:, 7:]
            alone = model(input_ids=second)[0]
        scale = alone.abs().max()
        error: float | str = float((packed - alone).abs().max() / scale)
        good = float(error) <= TOLERANCE.get(alone.dtype, 5e-2)
        error = f"differs from what it is alone by {error:.1e} of its largest logit"
    except Exception as failure:  # a model may refuse positions in any way
        good, error = False, f"cannot be computed: {failure}"
    finally:
        model.train(mode)
    if not good:
        raise TrainingError(
            f"this model's attention does not keep packed examples apart: a second example {error}",
            where="--pack",
            fix="train without --pack",
        )
