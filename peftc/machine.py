"""The kind of machine that a library is compiled for, and whether this is one."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from peftc.errors import ArtifactError, PeftcError

# Beginnings of the names of extensions that a compiler uses where it finds them.
EXTENSIONS = ("abm", "adx", "amx", "avx", "bmi", "f16c", "fma", "gfni", "movbe", "popcnt", "sse",
              "vaes", "vpclmul", "asimd", "sve", "i8mm", "bf16")  # fmt: skip


def here(device: str = "cpu") -> dict[str, Any]:
    """What of this machine and torch a library depends on.

    Args:
        device: Where the library runs: `cpu` or `cuda`.
    """
    told: dict[str, Any] = {
        "torch": torch.__version__,
        "device": device,
        "system": platform.system(),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "extensions": _extensions(),
    }
    if device == "cuda":
        there = torch.cuda.is_available()
        told["gpu"] = list(torch.cuda.get_device_capability()) if there else None
    return told


def differences(built: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[PeftcError]:
    """An error for each respect in which a machine cannot run what was built on another.

    Args:
        built: What `here` said there.
        now: What it says here.
        where: What was built.
    """
    errors: list[PeftcError] = []
    for part, name in (
        ("torch", "torch"), ("system", "the system"), ("machine", "processors of type"),
        ("capability", "a processor with"), ("gpu", "a GPU of compute capability"),
    ):  # fmt: skip
        if built.get(part) != now.get(part):
            fix = "export it again with this torch, or install that one"
            errors.append(
                ArtifactError(
                    f"was built for {name} {built.get(part)}, and here is {now.get(part)}",
                    where=where,
                    fix=fix if part == "torch" else "export it again on such a machine as this",
                )
            )
    if missing := sorted({*built["extensions"]} - {*now["extensions"]}):
        errors.append(
            ArtifactError(
                f"was built for a processor with {', '.join(missing)}, which this one has not",
                where=where,
                fix="export it again on such a machine as this",
            )
        )
    return errors


def _extensions() -> list[str]:
    """The processor's extensions, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted({flag for flag in flags.partition(":")[2].split() if flag.startswith(EXTENSIONS)})
