"""Conversions: how the names and tensors of a checkpoint become those of the live model.

transformers renames keys while it loads, and fuses tensors: the experts of a Mixtral are stored one
by one, and live as one stack. What it does is kept here as plain data, so that a model's outline
can be cached with it, and a checkpoint be written as it was read: in its own layout.

A fusion is expressed where each matrix of the live tensor is rows of stored ones. Others, such as
a transpose or a chunk, are only known, so that no key is taken for what it is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Operation = tuple[str, int | None]  # its name, and the dimension that it works on
Shapes = Mapping[str, tuple[int, ...]]

_OPERATIONS = {"MergeModulelist": "stack", "Concatenate": "concatenate"}
# What can be expressed, and whether the live tensor is a stack then.
_STACKED: dict[tuple[Operation, ...], bool] = {
    (("stack", 0), ("concatenate", 1)): True,
    (("stack", 0),): True,
    (("concatenate", 0),): False,
}
_NUMBER = re.compile(r"[0-9]+")
_FIT: tuple[Operation, ...] = (("fit", None),)  # transposes what has not the live shape already


class Conversion(BaseModel):
    """One renaming, or one fusion, of stored tensors.

    Attributes:
        pattern: What it finds in a key; one of its groups g0, g1 ... says which source it found.
        targets: What each source is replaced by.
        scopes: It is applied behind the first of these prefixes that a key has, or not at all.
        guarded: Its other sources are replaced only after the first was seen in a checkpoint.
        operations: What is done with the tensors; none for a renaming.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str
    targets: tuple[str, ...]
    scopes: tuple[str, ...] = ("",)
    guarded: bool = False
    operations: tuple[Operation, ...] = ()

    def rename(self, key: str) -> tuple[str, int] | None:
        """The key's new name and which source it was, or None where there is none in it."""
        scope = next((scope for scope in self.scopes if key.startswith(scope)), None)
        inner = key.removeprefix(scope or "")
        if scope is None or (found := _compiled(self.pattern).search(inner)) is None:
            return None
        group = next(name for name, text in found.groupdict().items() if text is not None)
        source, first = int(group[1:]), found.re.groupindex[group]
        target = re.sub(r"\\(\d)", lambda back: found[first + int(back[1])], self.targets[source])
        # As transformers does: the text's first occurrence, not the place where it was found.
        return scope + inner.replace(found[0], target, 1), source


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Looked up sooner than in the cache of `re`, for a hundred thousand keys."""
    return re.compile(pattern)


def conversions_of(model: PreTrainedModel) -> list[Conversion]:
    """What transformers does when it loads the model, in its order: the renamings come first."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found = [conversion_of(transform) for transform in get_model_conversion_mapping(model)]
    return sorted(found, key=lambda conversion: bool(conversion.operations))


def conversion_of(transform: Any) -> Conversion:
    """A transform of transformers as plain data."""
    kind = type(transform)
    guarded = kind.__name__ == "GroupWeightRename"
    operations = [_operation(operation) for operation in getattr(transform, "operations", ())]
    if "rename_source_key" in vars(kind) and not guarded:  # it does not rename as others do
        operations.append((kind.__name__, None))
    # Only a guarded one pairs its targets; of others the first names all that is made together.
    targets = transform.target_patterns
    scopes = [""]
    if (scope := getattr(transform, "scope_prefix", None)) is not None:
        inner, base = (f"{name}." if name else "" for name in (scope, transform.base_model_prefix))
        scopes = [base + inner, inner]
    return Conversion(
        pattern=transform.compiled_sources.pattern,
        targets=tuple(targets if guarded else targets[:1] * len(transform.source_patterns)),
        scopes=tuple(scopes),
        guarded=guarded,
        operations=tuple(operations),
    )


def _operation(operation: Any) -> Operation:
    if getattr(operation, "check_dims", False):
        return _FIT[0]
    name = type(operation).__name__
    return _OPERATIONS.get(name, name), getattr(operation, "dim", None)


@dataclass(frozen=True, slots=True)
class Place:
    """Rows low to high of a live tensor, or of its index-th matrix where it is a stack."""

    fqn: str
    index: int | None
    low: int
    high: int


@dataclass(frozen=True)
class Arrangement:
    """Where the tensors of a checkpoint lie in the live model.

    Attributes:
        stored: The live name of each key; a key that belongs to nothing is its own.
        places: Where the parts of fused tensors lie.
        fused: For each matrix of a fused live tensor the keys of its parts, in the order of rows.
        unread: Keys that are not the live tensor whose name they may have, with the one that they
            are for: how they are converted is not expressed, parts of it are missing or of other
            shapes, or another key comes first. In `stored` such a key is its own.
    """

    stored: dict[str, str]
    places: dict[str, Place]
    fused: dict[str, list[list[str]]]
    unread: dict[str, str]


def arrange(
    shapes: Shapes, conversions: Sequence[Conversion], live: Shapes, prefix: str
) -> Arrangement:
    """Finds the live tensor of each stored one, as transformers does when it loads them.

    Args:
        shapes: The stored tensors.
        conversions: Those of the model.
        live: The tensors of the model.
        prefix: What a headless checkpoint's names lack.
    """
    found = Arrangement({key: key for key in shapes}, {}, {}, {})
    owners: dict[str, Conversion | str] = {}
    parts: dict[tuple[str, Conversion], dict[int, list[str]]] = {}
    for key, name, by, source in _named(shapes, conversions, live, prefix):
        operations = by.operations if by else ()
        deeper = len(live[name]) - len(shapes[key])  # by one dimension, where it is a stack
        fusion = by if _STACKED.get(operations) == deeper and shapes[key] else None
        plain = not operations or (operations == _FIT and shapes[key] == live[name])
        owner = fusion or key
        if owners.setdefault(name, owner) != owner or not (fusion or plain):
            found.unread[key] = name
        elif fusion:
            parts.setdefault((name, fusion), {}).setdefault(source, []).append(key)
        else:
            found.stored[key] = name
    for (name, fusion), sources in parts.items():
        stacked = _STACKED[fusion.operations]
        ordered = [sources[source] for source in sorted(sources)]
        matrices = _matrices(ordered, stacked, shapes, live[name])
        if not matrices:
            found.unread.update(dict.fromkeys(chain(*ordered), name))
            continue
        found.fused[name] = matrices
        for index, keys in enumerate(matrices):
            bounds = accumulate((shapes[key][0] for key in keys), initial=0)
            for key, (low, high) in zip(keys, pairwise(bounds), strict=True):
                found.places[key] = Place(name, index if stacked else None, low, high)
                found.stored[key] = name
    return found


def _matrices(
    sources: list[list[str]], stacked: bool, shapes: Shapes, shape: tuple[int, ...]
) -> list[list[str]]:
    """The parts of each matrix of a live tensor; nothing where they do not make it whole."""
    count, rows, *width = shape if stacked else (1, *shape)
    if stacked and {len(keys) for keys in sources} != {count}:
        return []
    parts = [list(keys) for keys in (zip(*sources, strict=True) if stacked else [chain(*sources)])]
    fit = all([*shapes[key][1:]] == width for key in chain(*sources))
    heights = {sum(shapes[key][0] for key in keys) for keys in parts}
    return parts if fit and heights == {rows} else []


def _named(
    shapes: Shapes, conversions: Sequence[Conversion], live: Shapes, prefix: str
) -> Iterator[tuple[str, str, Conversion | None, int]]:
    """Each key with a live name, that name, what converts it, and as which of the sources.

    The keys come in transformers' order, which is that of a stack.
    """

    def fitting(name: str) -> str | None:
        candidates = (prefix + name, name.removeprefix(prefix), name)
        return next((candidate for candidate in candidates if candidate in live), None)

    awake: set[Conversion] = set()
    for key in sorted(shapes, key=_natural):
        name, by, source = key, None, 0
        for conversion in conversions:
            renamed = conversion.rename(name)
            if renamed is None or (conversion.guarded and renamed[1] and conversion not in awake):
                continue
            if conversion.guarded:
                awake.add(conversion)
            name, source = renamed
            if conversion.operations:  # at most one, and nothing after it
                by = conversion
                break
        if (known := fitting(name)) is None and key in live:  # renamed, though it is live already
            known, by = fitting(key), None
        if known is not None:
            yield key, known, by, source


def _natural(key: str) -> str:
    """Sorts numbers by their value: expert 10 comes behind expert 9."""
    return _NUMBER.sub(lambda found: f"\0{found[0]:0>12}", key)
