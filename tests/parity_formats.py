"""Round trips through the formats, family by family: what docs/parity.md shows of them."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from functools import cache
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
from .parity_rows import UNSAVED, Cell, adapters, captured, output, ran, refusal

DOCS = Path(__file__).parent.parent / "docs"
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


def quoted(page: str, script: str) -> Measure:
    """What another page's table of architectures says, which a script of its own measures."""

    def cell(specimen: Specimen, folder: Path) -> Cell:
        found = architectures(page).get(plain(specimen.name))
        if found is None:
            return Cell(note=f"not in the table of [{page}]({page}), by `python -m {script}`")
        figures = [float(word) for word in found[0].split(", ")] if found[0] != "no" else []
        note = "" if figures else f"peftc: {found[1]}"
        return Cell(max(figures, default=None), note=note)

    return cell


@cache
def architectures(page: str) -> dict[str, list[str]]:
    """A page's table of architectures, by their plain names."""
    text = (DOCS / page).read_text().partition("| architecture |")[2].partition("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    return {plain(name.partition(",")[0]): rest for name, *rest in lines}


def plain(name: str) -> str:
    """A name without what is written in two ways: GPT-2 and gpt2, Qwen3-MoE and qwen3_moe."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


FORMATS: dict[str, Measure] = {
    "peft": to_peft,
    "safetensors": to_safetensors,
    "canonical": canonical,
    "nf4": four_bit,
    "onnx": quoted("onnx.md", "tests.onnx_families"),
    "pt2": quoted("pt2.md", "tests.pt2_families"),
}


def measure(row: str, name: str) -> Cell:
    """Runs one cell."""
    if name in UNSAVED and row in ("safetensors", "nf4"):
        return Cell(note="no checkpoint: none of transformers'")
    with tempfile.TemporaryDirectory() as folder:
        try:
            return FORMATS[row](zoo.SPECIMENS[name], Path(folder))
        except PeftcError as refused:
            return Cell(note=f"peftc: {refusal(refused)}")
