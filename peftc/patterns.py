"""Regular expressions over modules' names, which may be a stranger's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import regex

from peftc.errors import SelectionError


def short(text: str) -> str:
    """What an error shows of it."""
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def whole_match(pattern: str, name: str) -> Any:
    """A regular expression's match of a whole name, in bounded time: it may be a stranger's.

    Raises:
        SelectionError: It is none, or takes a second, which none that is meant for a module's name
            does.
    """
    try:
        return regex.fullmatch(pattern, name, timeout=1)
    except TimeoutError as error:
        raise SelectionError(
            f"the regular expression {short(pattern)} takes too long",
            where=name,
            fix="write one without repetitions of repetitions",
        ) from error
    except (regex.error, RecursionError) as error:
        raise SelectionError(
            f"{short(pattern)} is no regular expression: {error}", where=name, fix="correct it"
        ) from error


def pattern_key(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that names a module by its whole name or its last parts, as PEFT's does."""
    for pattern in patterns:
        if whole_match(rf"(.*\.)?({pattern})", name):
            return pattern
    return None
