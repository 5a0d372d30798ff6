"""Storage: what is written for a program, tensor by tensor, and the JSON files that tell of it.

A quantized weight is one constant of the program and several tensors of a file. The config and the
index say which weights are quantized, and where everything lies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from peftc.capturing import CheckpointSource
from peftc.checkpoint import INDEX, read_json
from peftc.constants import Constant, Packed
from peftc.four_bit import FourBit
from peftc.program import OutputFile, Program
from peftc.structure import as_json
from peftc.targets import LINEARS

CONFIG = "config.json"
QUANTIZATION = "quantization_config"


def packed_weights(program: Program) -> dict[str, Packed]:
    """The weights that are written in 4 bits, by their names in the checkpoint."""
    return {
        key: constant
        for key, fqn in program.stored.items()
        # A part of what a pass changed is a graph of its own, which takes time to make.
        if not (key in program.parts and program.touched(fqn))
        and isinstance(constant := program.written(key), Packed)
    }


def contents(program: Program, file: OutputFile) -> list[tuple[str, Constant]]:
    """The tensors to write into a file of the source's layout, in order.

    The source's own order is kept where it has these tensors. Where a tensor's bytes would not
    start at a multiple of its elements' size, those of large elements come first, as safetensors
    itself writes them: its readers map files into memory.
    """
    written = {key: program.written(key) for key in file.tensors}
    found: list[tuple[str, Constant]] = []
    for key, constant in written.items():
        parts = constant.parts if isinstance(constant, Packed) else {"": constant}
        found += [(key + suffix, part) for suffix, part in parts.items()]
    if any(isinstance(constant, Packed) for constant in written.values()):
        before = {key: i for i, key in enumerate(file.original.tensors if file.original else ())}
        if dict(found).keys() == before.keys():
            found.sort(key=lambda item: before[item[0]])
        position, aligned = 0, True
        for _, part in found:
            aligned &= position % part.spec.dtype.itemsize == 0
            position += part.spec.nbytes
        if not aligned:
            found.sort(key=lambda item: -item[1].spec.dtype.itemsize)
    return found


def edited(program: Program) -> dict[str, bytes]:
    """The source's JSON files as they must be for what is written."""
    files = dict(program.source.edited())
    if not isinstance(program.source, CheckpointSource):
        return files
    checkpoint = program.source.checkpoint
    config = dict(checkpoint.config)
    quantization = quantization_config(program, config.get(QUANTIZATION))
    if quantization != config.get(QUANTIZATION):
        config.pop(QUANTIZATION, None)
        if quantization is not None:
            config[QUANTIZATION] = quantization
        files[CONFIG] = as_json(config)
    if checkpoint.indexed:
        index = read_json(checkpoint.path / INDEX, "a sharded checkpoint")
        written = {file.name: contents(program, file) for file in program.source.layout()}
        places = {key: name for name, tensors in written.items() for key, _ in tensors}
        if places != index.get("weight_map"):
            files[INDEX] = as_json(_index(index, places, written))
    return files


def _index(
    index: Mapping[str, Any],
    places: Mapping[str, str],
    written: Mapping[str, list[tuple[str, Constant]]],
) -> dict[str, Any]:
    specs = [constant.spec for tensors in written.values() for _, constant in tensors]
    sizes = {
        "total_size": sum(spec.nbytes for spec in specs),
        "total_parameters": sum(math.prod(spec.shape) for spec in specs),
    }
    old = index.get("metadata") or {}
    known = {key: size for key, size in sizes.items() if key in old}
    return {**index, "metadata": {**old, **known}, "weight_map": places}


def quantization_config(program: Program, old: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What transformers needs to load the quantized weights by bitsandbytes; None without any."""
    packed = packed_weights(program)
    if not packed:
        return None
    if old and _as_captured(program, packed) and not program.source.edited():
        return dict(old)
    first = next(iter(packed.values()))
    form: FourBit = first.format
    asked = [constant.format.compute for constant in packed.values() if constant.format.compute]
    known = (old or {}).get("bnb_4bit_compute_dtype")
    fresh = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": form.codebook,
        "bnb_4bit_use_double_quant": form.nested,
        "bnb_4bit_compute_dtype": (asked or [known or _name(first.spec.dtype)])[0],
        "bnb_4bit_quant_storage": _name(_look(first)[1]),
        "llm_int8_skip_modules": _skipped(program, packed),
    }
    return {**(old or {}), **fresh}


def _skipped(program: Program, packed: Mapping[str, Packed]) -> list[str]:
    """The linear layers that are not quantized, so written that transformers finds just those."""
    sites = [site for site in program.sites.values() if site.kind.name in LINEARS]
    names = {program.stored[key] for key in packed}
    kept = [site.fqn for site in sites if site.name("weight") not in names]
    others = {site.fqn for site in sites} - set(kept)
    # It matches beginnings up to a dot, and any ending.
    return sorted(
        f"^{re.escape(fqn)}$"
        if any(other.startswith(f"{fqn}.") or other.endswith(fqn) for other in others)
        else fqn
        for fqn in kept
    )


def _as_captured(program: Program, packed: Mapping[str, Packed]) -> bool:
    """Whether just those weights are quantized that were, and in no other way."""
    before = {
        key: program.parts[key].leaf if key in program.parts else program.captured[fqn]
        for key, fqn in program.stored.items()
    }
    were = {key: _look(c) for key, c in before.items() if isinstance(c, Packed)}
    return were == {key: _look(constant) for key, constant in packed.items()}


def _look(packed: Packed) -> tuple[FourBit, torch.dtype]:
    """What the config says of a weight: its format, and the dtype that its codes are stored as."""
    return packed.format, packed.parts[""].spec.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
