"""What an export writes: the formats, and the options that each of them has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

Format = Literal["safetensors", "onnx", "onnx-adapter", "pt2", "peft", "adapterhub", "cache"]
FORMATS: tuple[str, ...] = get_args(Format)
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "onnx": ("weights", "compute", "head_bits", "cache", "provider", "swap", "slots"),
    "pt2": ("weights", "swap", "slots", "four_bit"),
    "peft": ("canonical", "rank"),
}
# Options that mean nothing without another.
NEEDS = {"slots": "swap", "rank": "canonical"}


def misplaced(format: str, options: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first option that a format does not have, and what it needs.

    Args:
        format: What is to be written.
        options: Those that were given.

    Returns:
        Its name and the option that it goes with, as `name=value`, or None where all is well.
    """
    for name, value in options.items():
        homes = [home for home, names in OPTIONS.items() if name in names]
        if name == "swap" and value == "rows":
            homes = ["pt2"]
        if format not in homes:
            return name, " or ".join(f"format={home}" for home in homes) or "no format"
        if (other := NEEDS.get(name)) and other not in options:
            return name, other
    return None
