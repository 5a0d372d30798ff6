"""NF4 (Dettmers et al. 2023): linear layers in 4 bits, as bitsandbytes and transformers load them.

A quantized weight is the constant dequantize(quantize(W)): nothing else of the program changes, so
that adapters attach to it, fold into it and leave it as they do any weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from peftc.contract import Effect, Pass, PassResult
from peftc.errors import PassError, PeftcError
from peftc.targets import ALL_LINEAR, LINEARS, Targets

if TYPE_CHECKING:
    from peftc.program import Program
    from peftc.sites import Site


class Nf4(Targets, Pass):
    """Quantize linear layers to 4 bits, as bitsandbytes does."""

    effect: ClassVar[Effect] = Effect.BOUNDED

    codebook: Literal["nf4", "fp4"] = Field(
        "nf4", description="nf4, the quantiles of normal weights, or fp4, a 4-bit float"
    )
    block_size: int = Field(
        64, description="elements that share an absmax: 32, 64, 128 … 4096; fewer are more exact"
    )
    double_quant: bool = Field(
        False, description="quantize the absmax too: 4.13 in the place of 4.5 bits a weight"
    )
    compute_dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="what bitsandbytes multiplies in (default: the weights' own dtype)"
    )

    @field_validator("block_size")
    @classmethod
    def _known(cls, size: int) -> int:
        from peftc.four_bit import BLOCK_SIZES

        if size not in BLOCK_SIZES:
            raise ValueError(f"must be one of {', '.join(map(str, BLOCK_SIZES))}")
        return size

    def pick(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        chosen, errors = super().pick(program)
        if self.targets == ALL_LINEAR:  # what transformers would quantize itself
            chosen = [fqn for fqn in chosen if not _obstacle(program, program.sites[fqn])]
            if not chosen and not errors:
                errors.append(PassError("no linear layer is left to quantize", fix="name targets"))
        return chosen, errors

    def check(self, program: Program) -> list[PeftcError]:
        chosen, errors = self.pick(program)
        for fqn in chosen:
            if found := _obstacle(program, program.sites[fqn]):
                what, fix = found
                errors.append(PassError(what, where=fqn, fix=fix))
        return errors

    def run(self, program: Program) -> PassResult:
        from peftc.four_bit import FourBit, quantized

        form = FourBit(self.codebook, self.block_size, self.double_quant, self.compute_dtype)
        chosen, _ = self.pick(program)
        sites = [program.sites[fqn] for fqn in chosen]
        names = {site.name("weight"): site.kind.transposed for site in sites}
        packed = {
            name: quantized(program.constants[name], form, turned) for name, turned in names.items()
        }
        # They were equal to something before, and are near it now: nothing is left to prove.
        unfolded = {fqn: old for fqn, old in program.unfolded.items() if fqn not in set(chosen)}
        count = sum(site.shape[0] * site.shape[1] for site in sites)
        bits = sum(form.bits(s.shape[0] * s.shape[1]) * s.shape[0] * s.shape[1] for s in sites)
        measured = {"weights": count, "bits_per_weight": bits / count}
        return PassResult(
            program.rewrite(constants=packed, unfolded=unfolded), modified=True, measured=measured
        )


# Parts of names whose weights a model's own code reads, by the start of its class's name. T5's kin
# cast their input to wo's dtype, which is uint8 in 4 bits; transformers keeps T5's wide and forgets
# these. RWKV divides two weights in place.
_READ = {
    "SwitchTransformers": ("wo",), "LongT5": ("wo",), "Pix2Struct": ("wo",), "Kosmos2_5": ("wo",),
    "Rwkv": ("attention.output", "feed_forward.value"),
}  # fmt: skip


def _wide(program: Program) -> tuple[str, ...]:
    """Parts of names whose modules transformers keeps in fp32, or should."""
    for start, parts in _READ.items():
        if any(name.startswith(start) for name in program.source.architectures):
            return parts
    if (outline := getattr(program.source, "outline", None)) is not None:
        return tuple(outline.wide)
    module = getattr(program.source, "module", None)
    return tuple(getattr(module, "_keep_in_fp32_modules", None) or ())


def _obstacle(program: Program, site: Site) -> tuple[str, str] | None:
    """Why a site cannot be quantized so that transformers loads it, and what to do."""
    from peftc.constants import Packed
    from peftc.sites import template

    weight = site.name("weight")
    wide = _wide(program)
    keys = [key for key, fqn in program.stored.items() if fqn == weight]
    if site.kind.name not in LINEARS or site.plain is not template(site.kind, site.bias):
        return f"is of a kind that is not quantized ({site.kind.name})", "exclude it"
    if isinstance(program.constants[weight], Packed):
        return "is in 4 bits already", "leave it out, or put the pass dequantize before"
    if len(program.names_of(weight)) > 1:
        return "is tied to another layer, which needs it as it is", "exclude it, or untie it first"
    if len(keys) != 1 or keys[0] in program.parts:
        return "is stored in parts that the model fuses when it loads them", "exclude it"
    if weight in program.trainable:
        return "is trained whole by an adapter", "exclude it, or merge the adapter first"
    if any(part in site.fqn for part in wide):
        return "is read as fp32 by the model's own code", "exclude it"
    return None
