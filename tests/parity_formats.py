"""Round trips through the formats, family by family: what docs/parity.md shows of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from safetensors import safe_open

import peftc
from peftc import Attach, Merge
from peftc.errors import PeftcError
from peftc.passes.nf4 import Nf4

from . import zoo
from .families.specimen import Specimen, made
from .parity_rows import Cell, adapters, captured, output, ran, refusal

Measure = Callable[[Specimen, Path], Cell]


def to_peft(specimen: Specimen, folder: Path) -> Cell:
    """Attached, written as PEFT's directory, and attached again: to the bit; PEFT loads it too."""
    _, attach = adapters("lora", specimen, folder)
    program = ran(captured(specimen), *attach)
    ours = output(program, specimen)
    peftc.to_peft(program, folder / "out")
    again = output(ran(captured(specimen), Attach(path=str(folder / "out"))), specimen)
    assert ours.equal(again), "not the same bits"
    theirs = peft.PeftModel.from_pretrained(specimen.build(), folder / "out").eval()
    return Cell(zoo.distance(zoo.run(theirs, specimen), ours))


def to_safetensors(specimen: Specimen, folder: Path) -> Cell:
    """Merged, written, and loaded by transformers; the checkpoint's layout is the base's."""
    theirs, attach = adapters("lora", specimen, folder)
    want = zoo.run(theirs, specimen)
    made(specimen).save_pretrained(folder / "base")
    program = ran(peftc.capture(folder / "base"), *attach, Merge())
    peftc.to_safetensors(program, folder / "out")
    assert shapes(folder / "out") == shapes(folder / "base"), "another layout"
    loaded = type(made(specimen)).from_pretrained(folder / "out").eval()
    return Cell(zoo.distance(zoo.run(loaded, specimen), want))


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint."""
    found: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            found |= {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    return found


def canonical(specimen: Specimen, folder: Path) -> Cell:
    """A LoRA whose ranks differ, as one plain LoRA that PEFT loads."""
    options = zoo.RECIPES["lora"](specimen)
    options.rank_pattern = {specimen.linears[0]: 2}
    theirs = zoo.shaken(peft.get_peft_model(specimen.build(), options).eval())
    want = zoo.run(theirs, specimen)
    zoo.uncarded(theirs).save_pretrained(folder / "a")
    program = ran(captured(specimen), Attach(path=str(folder / "a")))
    peftc.to_peft(program, folder / "out", canonical=True)
    assert not json.loads((folder / "out" / "adapter_config.json").read_text())["rank_pattern"]
    again = peft.PeftModel.from_pretrained(specimen.build(), folder / "out").eval()
    return Cell(zoo.distance(zoo.run(again, specimen), want))


def four_bit(specimen: Specimen, folder: Path) -> Cell:
    """In nested NF4, with bitsandbytes' names, as transformers and bitsandbytes compute it."""
    from .test_four_bit_interop import loaded, sound

    made(specimen).save_pretrained(folder / "base")
    peftc.apply(folder / "base", [Nf4(double_quant=True)], folder / "out")
    theirs: Any = loaded(folder / "out" / "base")
    with sound():
        want = zoo.run(theirs, specimen)
        got = output(peftc.capture(folder / "out" / "base"), specimen)
    return Cell(zoo.distance(got, want))


FORMATS: dict[str, Measure] = {
    "peft": to_peft,
    "safetensors": to_safetensors,
    "canonical": canonical,
    "nf4": four_bit,
}


def measure(row: str, name: str) -> Cell:
    """Runs one cell."""
    if name in ("plain", "grouped") and row in ("safetensors", "nf4"):
        return Cell(note="no checkpoint: none of transformers'")
    with tempfile.TemporaryDirectory() as folder:
        try:
            return FORMATS[row](zoo.SPECIMENS[name], Path(folder))
        except PeftcError as refused:
            return Cell(note=f"peftc: {refusal(refused)}")
