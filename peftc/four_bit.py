"""The 4-bit format of bitsandbytes on disk: a weight as codes, absmax and a description.

A weight `W` of shape (out, in) is stored as `W`, uint8 (⌈n/2⌉, 1), two codes a byte; `W.absmax`;
`W.quant_map`, the codebook; and `W.quant_state.bitsandbytes__nf4`, JSON as bytes. With double
quantization the absmax are bytes too, of which `W.nested_absmax` and `W.nested_quant_map` are the
scale and the map. Read off bitsandbytes' QuantState.as_dict and transformers' loading of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftc.constants import DTYPE_NAMES, Constant, Held, Leaf, Packed, derive
from peftc.errors import CheckpointError, PeftcError, raise_all
from peftc.graphs import Builder, Spec, intern, operator
from peftc.reading import read

STATE = ".quant_state.bitsandbytes__"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODEBOOKS = ("nf4", "fp4")
NESTED_BLOCK_SIZE = 256
_OFFSET_LENGTH = 24  # of a number in JSON, at most
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, RecursionError)
_MAPS = {".quant_map": "codebook", ".nested_quant_map": "dynamic"}


@dataclass(frozen=True)
class FourBit:
    """How a weight is quantized.

    Attributes:
        codebook: nf4 or fp4.
        block_size: Elements that share an absmax.
        nested: Double quantization: whether the absmax are quantized in turn.
        compute: The dtype in which bitsandbytes is to multiply; None for the weight's own.
    """

    codebook: str = "nf4"
    block_size: int = 64
    nested: bool = False
    compute: str | None = None

    def bits(self, count: int) -> float:
        """Bits a weight of `count` elements, its absmax included."""
        blocks = -(-count // self.block_size)
        scales = 8 * blocks + 32 * (-(-blocks // NESTED_BLOCK_SIZE)) if self.nested else 32 * blocks
        return (8 * -(-count // 2) + scales) / max(1, count)


@dataclass(frozen=True)
class _Stored:
    """The tensors that a quantized weight is made of."""

    codes: Constant
    absmax: Constant
    outer: Constant | None = None
    offset: Constant | None = None


def quantized(weight: Constant, form: FourBit, turned: bool = False) -> Packed:
    """A weight as it is after it was quantized; nothing is computed yet.

    Args:
        weight: A matrix (out, in).
        form: How to quantize it.
        turned: It is (in, out), as a `Conv1D` has it; it is stored as (out, in) all the same.
    """

    def made(name: str, source: Constant, dtype: torch.dtype, *options: Any) -> Constant:
        build = Builder()
        operand = build.const("weight")
        operand = build.t(operand) if turned and source is weight else operand
        build.graph.output(build.op(operator(name), operand, *options))
        return derive(build.graph, {"weight": source}, dtype)

    size, book = form.block_size, form.codebook
    codes = made("peftc.nf4_codes.default", weight, torch.uint8, size, book)
    absmax = made("peftc.nf4_absmax.default", weight, torch.float32, size)
    stored = _Stored(codes, absmax)
    if form.nested:
        stored = _Stored(
            codes,
            made("peftc.nf4_nest_codes.default", absmax, torch.uint8),
            made("peftc.nf4_nest_absmax.default", absmax, torch.float32),
            made("aten.mean.default", absmax, torch.float32),
        )
    shape = weight.spec.shape[::-1] if turned else weight.spec.shape
    spec = Spec(shape, weight.spec.dtype)
    return _packed(form, spec, stored, _parts(form, spec, stored), turned)


def origin(packed: Packed) -> Constant | None:
    """The weight that was quantized, where it was not read from a file as it is."""
    codes = packed.inputs["codes"]
    return getattr(codes, "inputs", {}).get("weight")


def turned(packed: Packed) -> Packed:
    """A weight that was read as (out, in), for a module that has it as (in, out)."""
    return _packed(packed.format, packed.spec, _Stored(**packed.inputs), packed.parts, True)


def _packed(
    form: FourBit, spec: Spec, stored: _Stored, parts: Mapping[str, Constant], turned: bool
) -> Packed:
    """The weight that stored tensors stand for; `spec` has its stored shape (out, in)."""
    build = Builder()
    codes, absmax = build.const("codes"), build.const("absmax")
    if form.nested:
        unnest = operator("peftc.nf4_unnest.default")
        absmax = build.op(unnest, absmax, build.const("outer"), build.const("offset"))
    matrix = build.op(
        operator("peftc.nf4_dequantize.default"), codes, absmax, list(spec.shape),
        form.block_size, form.codebook,
    )  # fmt: skip
    build.graph.output(build.t(matrix) if turned else matrix)
    live = Spec(spec.shape[::-1], spec.dtype) if turned else spec
    inputs = {name: constant for name, constant in vars(stored).items() if constant is not None}
    return Packed(intern(build.graph), inputs, live, parts, form)


def _parts(form: FourBit, spec: Spec, stored: _Stored) -> dict[str, Constant]:
    """What is stored of a weight that is quantized here, by what its name is followed by."""
    parts = {"": stored.codes, ".absmax": stored.absmax, ".quant_map": _map(form.codebook)}
    state = {
        "quant_type": form.codebook,
        "blocksize": form.block_size,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "shape": list(spec.shape),
    }
    if stored.outer is None or stored.offset is None:
        text = json.dumps(state).encode()
        padded = text.ljust(-(-len(text) // 8) * 8)
        held = Held(torch.tensor(list(padded), dtype=torch.uint8), origin=text.decode())
        return {**parts, STATE + form.codebook: held}
    nested = {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
    text_with_gap = json.dumps({**state, **nested})[:-1] + ', "nested_offset": OFFSET}'
    size = -(-(len(text_with_gap) + _OFFSET_LENGTH) // 8) * 8
    build = Builder()
    offset = build.const("offset")
    build.graph.output(build.op(operator("peftc.nf4_state.default"), offset, text_with_gap, size))
    return {
        **parts,
        ".nested_absmax": stored.outer,
        ".nested_quant_map": _map("dynamic"),
        STATE + form.codebook: derive(build.graph, {"offset": stored.offset}, torch.uint8),
    }


def _map(name: str) -> Constant:
    build = Builder()
    build.graph.output(build.op(operator("peftc.nf4_map.default"), name))
    return derive(build.graph, {}, torch.float32)


def parts_of(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names that make up each quantized weight, by the weight's own."""
    found: dict[str, list[str]] = {}
    for name in names:
        if STATE in name:
            found.setdefault(name[: name.index(STATE)], []).append(name)
    for name in names:
        for suffix in (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"):
            if name.endswith(suffix) and (owner := name.removesuffix(suffix)) in found:
                found[owner].append(name)
    return found


def unpacked(tensors: Mapping[str, Constant]) -> dict[str, Constant]:
    """The tensors of a checkpoint, its quantized weights as one constant each.

    Raises:
        CheckpointError: Parts of a weight are missing, or are not what its description says.
    """
    groups = parts_of(tensors)
    if not groups:
        return dict(tensors)
    errors: list[PeftcError] = []
    result: dict[str, Constant] = {}
    skipped = {name for names in groups.values() for name in names}
    for name, constant in tensors.items():
        if name not in groups:
            if name not in skipped:
                result[name] = constant
            continue
        try:
            result[name] = _read(name, tensors, groups[name])
        except CheckpointError as error:
            errors.append(error)
    errors += [
        _damaged(name, "there is a description of it, and no such tensor")
        for name in groups
        if name not in tensors
    ]
    raise_all(errors)
    return result


def _read(name: str, tensors: Mapping[str, Constant], names: list[str]) -> Packed:
    """One quantized weight.

    Raises:
        CheckpointError: It is not what its description says.
    """
    suffixes = {full.removeprefix(name): tensors[full] for full in names}
    key, *more = (suffix for suffix in suffixes if suffix.startswith(STATE))
    if more:
        raise _damaged(name, f"is described twice: {key} and {more[0]}")
    form, spec, offset = _description(name, key, suffixes[key])
    wanted = {".absmax", ".quant_map"}
    if form.nested:
        wanted |= {".nested_absmax", ".nested_quant_map"}
    if missing := sorted(wanted - suffixes.keys()):
        raise _damaged(name, f"lacks {', '.join(missing)}")
    codes = _bytes(name, tensors[name])
    count = math.prod(spec.shape)
    blocks = -(-count // form.block_size)
    sizes: list[tuple[str, Constant, int]] = [
        ("", codes, -(-count // 2)), (".absmax", suffixes[".absmax"], blocks)
    ]  # fmt: skip
    if form.nested:
        outer = suffixes[".nested_absmax"]
        sizes.append((".nested_absmax", outer, -(-blocks // NESTED_BLOCK_SIZE)))
    for suffix, constant, size in sizes:
        if math.prod(constant.spec.shape) != size:
            raise _damaged(
                name,
                f"{name}{suffix} has the shape {list(constant.spec.shape)}, and {size} elements "
                f"belong to {list(spec.shape)} in blocks of {form.block_size}",
            )
    if (suffixes[".absmax"].spec.dtype == torch.uint8) != form.nested:
        raise _damaged(name, "its absmax are bytes only with double quantization")
    scales = suffixes[".nested_absmax" if form.nested else ".absmax"].spec.dtype
    if not scales.is_floating_point:
        raise _damaged(name, f"its absmax are {scales}, which holds no scales")
    for suffix, what in _MAPS.items():
        if suffix in suffixes:
            book = form.codebook if what == "codebook" else what
            map_ = suffixes[suffix]
            assert isinstance(map_, Leaf)
            expected = operator("peftc.nf4_map.default")(book)
            if map_.spec.dtype != torch.float32 or not torch.equal(read(map_), expected):
                raise _damaged(name, f"{name}{suffix} is not the map of {book}")
    stored = _Stored(codes, suffixes[".absmax"])
    if form.nested:
        held = Held(torch.tensor(offset), origin=f"offset of {suffixes[key].key}")
        stored = replace(stored, outer=suffixes[".nested_absmax"], offset=held)
    return _packed(form, spec, stored, {"": tensors[name], **suffixes}, False)


def _description(name: str, key: str, state: Constant) -> tuple[FourBit, Spec, float]:
    """The format, the weight's spec and the nested offset, out of the JSON of a quant state."""
    try:
        if not isinstance(state, Leaf) or len(state.spec.shape) != 1 or state.spec.nbytes >> 16:
            raise ValueError(state.spec)
        content = json.loads(bytes(read(state).numpy()))
        shape, size = tuple(content["shape"]), content["blocksize"]
        form = FourBit(content["quant_type"], size, "nested_offset" in content)
        spec = Spec(shape, _DTYPES[content["dtype"]])
        offset = float(content.get("nested_offset", 0.0))
        fits = len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
        known = form.codebook in CODEBOOKS and type(size) is int and size in BLOCK_SIZES
        nested = content.get("nested_blocksize", NESTED_BLOCK_SIZE) == NESTED_BLOCK_SIZE
        finite = math.isfinite(offset)
        if not (fits and known and nested and finite and key == STATE + form.codebook):
            raise ValueError(content)
    except _MALFORMED as error:
        raise _damaged(
            name, f"{name}{key} does not describe a 4-bit weight of two dimensions"
        ) from error
    return form, spec, offset


def _bytes(name: str, codes: Constant) -> Constant:
    """Codes as bytes: bitsandbytes may store them as another dtype (`bnb_4bit_quant_storage`)."""
    assert isinstance(codes, Leaf)
    if codes.spec.dtype == torch.uint8:
        return codes
    ref = codes.ref
    return Leaf(replace(ref, dtype=DTYPE_NAMES[torch.uint8], shape=(ref.nbytes, 1)))


def _damaged(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        what, where=name,
        fix="download it again, or quantize the original: peftc apply ORIGINAL -o OUT nf4",
    )  # fmt: skip
