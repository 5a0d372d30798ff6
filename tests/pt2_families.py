"""Tiny models of several architectures, compiled: `python -m tests.pt2_families [NAME…]`.

It prints a table of docs/pt2.md: how many libraries a model took and the largest error of its
proof, or why it was not exported. With `--real` it prints that of real models (see `pt2_real`).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import peftc
from peftc.errors import PeftcError

from . import pt2_real
from .onnx_families import FAMILIES, Family, saved

CHOSEN = (
    "Llama", "Qwen2", "Phi-3", "Gemma 3", "GPT-2", "Mixtral", "Qwen3-MoE", "Mamba", "BERT", "T5",
    "Whisper", "ViT",
)  # fmt: skip


def row(family: Family, folder: Path) -> str:
    """What the table says of an architecture."""
    try:
        artifact = peftc.to_pt2(peftc.capture(saved(family, folder / "base")), folder / "out")
    except PeftcError as error:
        return f"no | {error.what}"
    graphs, proof = artifact.manifest["pt2"]["graphs"], artifact.manifest["proof"]["pt2"]
    errors = ", ".join(f"{proof[name]['relative_error']:.0e}" for name in graphs)
    counts = ", ".join(f"{g['pieces']} for {len(g['steps'])} calls" for g in graphs.values())
    return f"{errors} | {counts}"


def main() -> None:
    if sys.argv[1:] == ["--real"]:
        with tempfile.TemporaryDirectory() as folder:
            pt2_real.main(Path(folder))
        return
    for name in sys.argv[1:] or CHOSEN:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {name} | {row(FAMILIES[name], Path(folder))} |", flush=True)


if __name__ == "__main__":
    main()
