"""The rows of docs/parity.md that PEFT has no one configuration for: what peftc alone has.

Each row's reference is another's arithmetic: PEFT's where it has the method, else equations written
anew as hooks on transformers' model, or plain training of the base's own tensors.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftc
from peftc import Attach, Fold, Merge, Pass, Pipeline, Program, Unmerge, registry
from peftc.errors import PeftcError, Violations
from peftc.passes.bottleneck import PRESETS, Bottleneck
from peftc.passes.combine import Combine
from peftc.passes.dequantize import Dequantize
from peftc.passes.fuse import Fuse
from peftc.passes.nf4 import Nf4
from peftc.passes.prune_ranks import PruneRanks
from peftc.passes.resize_vocabulary import ResizeVocabulary
from peftc.passes.router import Router
from peftc.passes.untie import Untie

from . import zoo
from .bottleneck_reference import Hooked
from .families.specimen import Specimen, made

BOUND = 1e-5
UNSAVED = ("plain", "grouped")  # none of transformers'
# What PEFT does not read off some configs.
UNTOLD = ("mamba", "mamba2", "mpt", "rwkv")
SIZES = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4}
VIRTUAL = 3  # tokens of a prompt or prefix


@dataclass(frozen=True)
class Cell:
    """What was measured of one method on one architecture.

    Attributes:
        unmerged: peftc's output with the adapter attached against PEFT's, or the reference's.
        merged: peftc's merged output against its unmerged one.
        peft: peftc's merged output against PEFT's.
        note: Why a figure is missing.
    """

    unmerged: float | None = None
    merged: float | None = None
    peft: float | None = None
    note: str = ""

    @property
    def figures(self) -> list[float]:
        """Those that were measured."""
        return [f for f in (self.unmerged, self.merged, self.peft) if f is not None]

    @property
    def holds(self) -> bool:
        """Whether every figure is within the bound, and what has none has its reason."""
        return all(f <= BOUND for f in self.figures) and bool(self.figures or self.note)

    def __str__(self) -> str:
        return f"{max(self.figures):.0e}" if self.figures else ""


Measure = Callable[[Specimen, Path], Cell]


@cache
def captured(specimen: Specimen) -> Program:
    """The base, whose weights nothing may train."""
    return peftc.capture(specimen.build())


def saved(specimen: Specimen, folder: Path) -> Program:
    """The base, from a checkpoint."""
    made(specimen).save_pretrained(folder)
    return peftc.capture(folder)


def ran(program: Program, *passes: Pass) -> Program:
    return Pipeline(passes).run(program)


def output(program: Program, specimen: Specimen) -> Tensor:
    return zoo.run(peftc.materialize(program), specimen)


def shuffled(program: Program) -> Program:
    """The program with all that it trains random."""
    model = peftc.materialize(program)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return peftc.absorb(program, model)


def refusal(error: PeftcError) -> str:
    """What an error says, of several the first, without what is this model's alone."""
    first = error.errors[0] if isinstance(error, Violations) else error
    said = re.sub(r"none of the \d+ modules", "no module", first.what)
    return " ".join(re.sub(r"^pass \w+: ", "", said).split())


def merged(program: Program, ours: Tensor, specimen: Specimen) -> tuple[float | None, str]:
    """The merged output against the unmerged one, or why merging is refused."""
    try:
        done = ran(program, Merge())
    except PeftcError as refused:
        return None, f"merging is refused: {refusal(refused)}"
    return zoo.distance(output(done, specimen), ours), ""


def compared(program: Program, want: Tensor, specimen: Specimen) -> Cell:
    """Unmerged against what is wanted, and merged against unmerged."""
    ours = output(program, specimen)
    after, note = merged(program, ours, specimen)
    return Cell(zoo.distance(ours, want), after, note=note)


def adapters(
    method: str, specimen: Specimen, folder: Path, names: str = "a"
) -> tuple[Any, list[Attach]]:
    """PEFT's model with an adapter of each name, and passes that attach what it saved of them."""
    theirs = zoo.adapter(method, specimen)
    zoo.save(theirs, method, specimen, folder / "a")
    for name in names[1:]:
        theirs.load_adapter(folder / "a", adapter_name=name)
        torch.manual_seed(4)
        for key, parameter in theirs.named_parameters():
            if f".{name}." in key:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        zoo.uncarded(theirs).save_pretrained(folder / "more", selected_adapters=[name])
    paths = [folder / "a", *(folder / "more" / name for name in names[1:])]
    return theirs, [
        Attach(path=str(p), adapter=n) for p, n in zip(paths, names, strict=True)
    ]  # fmt: skip


def prompted(cls: str, **options: Any) -> Measure:
    """Virtual tokens, beside PEFT's."""

    def cell(specimen: Specimen, folder: Path) -> Cell:
        if specimen.task is None:
            return Cell(note="PEFT's prompts need text alone")
        told = SIZES if specimen.name in UNTOLD else {}
        config = getattr(peft, cls)(
            task_type=specimen.task, num_virtual_tokens=VIRTUAL, **options, **told
        )
        torch.manual_seed(1)
        try:
            theirs = peft.get_peft_model(specimen.build(), config).eval()
            want = zoo.run(theirs, specimen)
            zoo.uncarded(theirs).save_pretrained(folder / "a")
        except Exception as error:  # whatever PEFT's or the model's code raises
            said = str(error).partition("\n")[0].partition(". ")[0][:100]
            return Cell(note=f"PEFT raises {type(error).__name__}: {said}")
        if want.equal(zoo.plain(specimen)):
            return Cell(note="PEFT's prefix is not read: the model takes no past keys and values")
        program = ran(captured(specimen), Attach(path=str(folder / "a")))
        ours = output(program, specimen)
        return Cell(zoo.distance(ours, want), note="nothing to merge: it is input, not weight")

    return cell


def bottleneck(preset: str) -> Measure:
    """Bottlenecks where peftc finds sublayers, beside AdapterHub's equations as hooks there."""

    def cell(specimen: Specimen, folder: Path) -> Cell:
        adapter = Bottleneck.model_validate({"preset": preset, "reduction_factor": 4})
        program = shuffled(ran(captured(specimen), adapter))
        live, reference = peftc.materialize(program), specimen.build()
        own = {key: p.detach() for key, p in live.named_parameters() if p.requires_grad}
        roles = program.source.roles()
        assert roles is not None
        hooked = Hooked(reference, adapter, own)
        for one in roles.sublayers:
            hooked.add(one.role, one.entry, one.exit, one.norm)
        want = zoo.run(reference, specimen)
        assert zoo.distance(want, zoo.plain(specimen)) > 1e-4, "the adapters move nothing"
        return compared(program, want, specimen)

    return cell


def trained(name: str) -> Measure:
    """Two steps on the base's own tensors, beside as many on transformers' model alone."""

    def cell(specimen: Specimen, folder: Path) -> Cell:
        options = {"targets": list(specimen.linears)} if name == "full" else {}
        program = ran(peftc.capture(specimen.build()), registry.load(name)(**options))
        live, alone = peftc.materialize(program), specimen.build()
        ends = ("bias",) if name == "bitfit" else tuple(
            f".{linear}.{leaf}" for linear in specimen.linears for leaf in ("weight", "bias")
        )  # fmt: skip
        for key, parameter in alone.named_parameters():
            parameter.requires_grad_(f".{key}".endswith(ends))
        for model in (live, alone):
            fit(model, specimen)
        want = zoo.run(alone, specimen)
        assert zoo.distance(want, zoo.plain(specimen)) > 1e-4, "training moves nothing"
        return compared(peftc.absorb(program, live), want, specimen)

    return cell


def fit(model: nn.Module, specimen: Specimen) -> None:
    """Two steps of SGD, of a length that does not depend on the model's scale."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        loss = specimen.output(model(**specimen.inputs())).square().mean()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = sum(float(g.square().sum()) for g in found if g is not None) ** 0.5
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient, alpha=0.3 / norm)


def four_bit(*then: Pass, **options: Any) -> Measure:
    """LoRA over a base in four bits, beside PEFT's over the same weights dequantized."""

    def cell(specimen: Specimen, folder: Path) -> Cell:
        theirs, attach = adapters("lora", specimen, folder)
        packed = ran(captured(specimen), Nf4(**options))
        weights = peftc.materialize(ran(packed, Dequantize())).state_dict()
        for key, parameter in theirs.get_base_model().named_parameters():
            if (own := key.replace(".base_layer", "")) in weights:
                parameter.data = weights[own].clone()
        want = zoo.run(theirs, specimen)
        program = ran(packed, *attach)
        ours = output(ran(program, *then), specimen)
        after, note = merged(ran(program, Dequantize()), ours, specimen)
        return Cell(zoo.distance(ours, want), after, note=note)

    return cell


def combined(specimen: Specimen, folder: Path) -> Cell:
    """A weighted sum of two LoRAs."""
    theirs, attach = adapters("lora", specimen, folder, "ab")
    theirs.add_weighted_adapter(["default", "b"], [0.7, 0.4], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    program = ran(captured(specimen), *attach, Combine(weights={"a": 0.7, "b": 0.4}))
    return compared(program, zoo.run(theirs.eval(), specimen), specimen)


def routed(specimen: Specimen, folder: Path) -> Cell:
    """Two LoRAs, weighed by the input: y + Σ gₖ(x)·s·Bₖ(Aₖ(x)), g = softmax(R·x)."""
    _, attach = adapters("lora", specimen, folder, "ab")
    program = shuffled(ran(captured(specimen), *attach, Router()))
    live, reference = peftc.materialize(program), specimen.build()
    own = dict([*live.named_parameters(), *live.named_buffers()])

    def hook(fqn: str) -> Callable[..., Tensor]:
        def add(module: Any, args: Any, y: Tensor) -> Tensor:
            (x,) = args
            weights = (x @ own[f"{fqn}.router.router.weight"].T).softmax(-1)
            for k, name in enumerate("ab"):
                a, b = (own[f"{fqn}.lora_{side}.{name}.weight"] for side in "AB")
                y = y + weights[..., k : k + 1] * 1.5 * (x @ a.T @ b.T)
            return y

        return add

    for fqn in program.adapters["router"].sites:
        reference.get_submodule(fqn).register_forward_hook(hook(fqn))
    return compared(program, zoo.run(reference, specimen), specimen)


def pruned(specimen: Specimen, folder: Path) -> Cell:
    """An AdaLoRA of which every other rank is masked, without those."""
    theirs = zoo.adapter("adalora", specimen)
    for key, parameter in theirs.named_parameters():
        if "lora_E" in key:
            parameter.data[::2] = 0
    want = zoo.run(theirs, specimen)
    zoo.save(theirs, "adalora", specimen, folder / "a")
    attach = Attach(path=str(folder / "a"))
    return compared(ran(captured(specimen), attach, PruneRanks()), want, specimen)


def folded(specimen: Specimen, folder: Path) -> Cell:
    """A LoRA folded into derived weights."""
    theirs, attach = adapters("lora", specimen, folder)
    want = zoo.run(theirs, specimen)
    return compared(ran(captured(specimen), *attach, Fold()), want, specimen)


def unmerged(specimen: Specimen, folder: Path) -> Cell:
    """A LoRA merged and taken out again: the base."""
    _, attach = adapters("lora", specimen, folder)
    program = ran(captured(specimen), *attach, Merge(), Unmerge(path=attach[0].path))
    return Cell(zoo.distance(output(program, specimen), zoo.plain(specimen)))


def edited(*passes: Pass) -> Measure:
    """Structure edited: what the base computes for the tokens that it had."""

    def cell(specimen: Specimen, folder: Path) -> Cell:
        base = captured(specimen) if specimen.name in UNSAVED else saved(specimen, folder)
        try:
            program = ran(base, *passes)
        except PeftcError:  # T5 is tied whatever its config says, and is resized as it is
            if len(passes) == 1:
                raise
            program = ran(base, passes[-1])
        got, want = output(program, specimen), zoo.plain(specimen)
        return Cell(zoo.distance(got[..., : want.shape[-1]], want))

    return cell


@dataclass(frozen=True)
class Row:
    """A row of the table: the passes of the registry that it runs, and how."""

    passes: tuple[str, ...]
    measure: Measure


ROWS: dict[str, Row] = {
    "prompt tuning": Row(("prompt_tuning",), prompted("PromptTuningConfig")),
    "p-tuning": Row(("p_tuning",), prompted("PromptEncoderConfig", encoder_hidden_size=16)),
    "prefix tuning": Row(("prefix_tuning",), prompted("PrefixTuningConfig")),
    **{f"bottleneck, {p}": Row(("bottleneck",), bottleneck(p)) for p in PRESETS},
    "bitfit": Row(("bitfit",), trained("bitfit")),
    "full": Row(("full",), trained("full")),
    "nf4 + lora": Row(("nf4", "dequantize"), four_bit()),
    "nf4, nested + lora": Row(("nf4", "dequantize"), four_bit(double_quant=True)),
    "nf4 + lora, fused": Row(("fuse",), four_bit(Fuse())),
    "router": Row(("router",), routed),
    "combine": Row(("combine",), combined),
    "prune_ranks": Row(("prune_ranks",), pruned),
    "fold": Row(("fold",), folded),
    "unmerge": Row(("unmerge",), unmerged),
    "untie": Row(("untie",), edited(Untie())),
    "resize_vocabulary": Row(("resize_vocabulary",), edited(Untie(), ResizeVocabulary(size=72))),
}


# Cells in which PEFT computes something else, and why.
OTHERWISE = {
    ("prefix tuning", name): "PEFT's prefix slides out of the window's sight; peftc's stays"
    for name in ("gemma3", "gpt_oss")
}


def measure(row: str, name: str) -> Cell:
    """Runs one cell."""
    specimen = zoo.SPECIMENS[name]
    if reason := OTHERWISE.get((row, name)):
        return Cell(note=reason)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return ROWS[row].measure(specimen, Path(folder))
        except PeftcError as refused:
            return Cell(note=f"peftc: {refusal(refused)}")
