"""The most memory that something took."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reset_peak() -> None:
    """Begins to watch anew. On a CPU only Linux can; elsewhere it is the process's whole life."""
    torch = sys.modules.get("torch")  # whoever has not imported it has nothing on a GPU
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")


def peak(device: torch.device | None = None) -> int:
    """The most bytes since then: of tensors on a GPU, of the whole process on a CPU."""
    if device is not None and device.type == "cuda":
        return int(sys.modules["torch"].cuda.max_memory_allocated(device))
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
