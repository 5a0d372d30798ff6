"""Capture: a checkpoint, or any module, as sites and constants, with no weight loaded."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from peftc import graphs
from peftc.attention import Attention, find
from peftc.checkpoint import Checkpoint, read_json, resolve
from peftc.constants import Constant, Held, Leaf, Packed, derive
from peftc.conversion import Arrangement, arrange
from peftc.errors import CaptureError
from peftc.evaluate import value
from peftc.four_bit import parts_of, turned, unpacked
from peftc.graphs import Builder, aten
from peftc.kinds import restore
from peftc.outline import (
    Outline,
    architecture,
    checkpoint_outline,
    config_of,
    outline_of,
    skeleton,
)
from peftc.program import OutputFile, Part, Program
from peftc.roles import Roles, trace
from peftc.sites import Site, template, tensor_name


def capture(source: str | Path | nn.Module) -> Program:
    """Captures a model for compilation.

    Args:
        source: A Hugging Face directory, a hub id, or a live module. A module is not changed, and
            its tensors are not copied.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or unsafe.
        CaptureError: transformers has no such architecture, or the checkpoint does not fit it.
    """
    if isinstance(source, nn.Module):
        return _capture_module(source)
    path = resolve(source)
    name = str(path.resolve()) if Path(source).exists() else str(source)
    return capture_checkpoint(Checkpoint.open(path), name)


@dataclass(frozen=True)
class CheckpointSource:
    """A program's origin in a Hugging Face directory."""

    checkpoint: Checkpoint
    name: str
    outline: Outline

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(map(str, self.checkpoint.config.get("architectures") or ()))

    def constants(self) -> dict[str, Constant]:
        """What is stored, by its names in the output; a quantized weight is one constant."""
        tensors = unpacked({key: Leaf(ref) for key, ref in self.checkpoint.tensors.items()})
        return _as_live(tensors, self.outline)

    def instantiate(self, dtype: torch.dtype | None) -> nn.Module:
        """Loads the model with transformers, in eval mode; quantized weights are left out."""
        if not parts_of(self.checkpoint.tensors):
            cls: Any = architecture(self.checkpoint)
            model: nn.Module = cls.from_pretrained(
                self.checkpoint.path, dtype=dtype or "auto", local_files_only=True,
                use_safetensors=True, trust_remote_code=False,
            )  # fmt: skip
            return model.eval()
        return self.build(self.constants(), dtype)

    def build(self, stored: Mapping[str, Constant], dtype: torch.dtype | None) -> nn.Module:
        """What transformers makes of stored tensors, which need not be written for it."""
        from transformers import GenerationConfig

        config = config_of(self.checkpoint)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        fused = _arranged(stored, self.outline).places
        state = {key: value(c) if key in fused else _placed(c) for key, c in stored.items()}
        model: Any = architecture(self.checkpoint).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype or "auto"
        )
        if (self.checkpoint.path / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(
                self.checkpoint.path, local_files_only=True
            )
        module: nn.Module = model.eval()
        return module

    def skeleton(self) -> nn.Module:
        return self._skeleton

    @cached_property
    def _skeleton(self) -> nn.Module:
        model: nn.Module = skeleton(self.checkpoint)
        return model

    def layout(self) -> list[OutputFile]:
        groups = parts_of(self.checkpoint.tensors)
        parts = {name for names in groups.values() for name in names}
        return [
            OutputFile(
                file.path.name,
                tuple(name for name in file.tensors if name not in parts),
                file.metadata,
                file,
            )
            for file in self.checkpoint.files
        ]

    def companions(self) -> dict[str, Path]:
        return self.checkpoint.companions

    def edited(self) -> dict[str, bytes]:
        return {}

    def pin(self) -> dict[str, Any]:
        return self.checkpoint.pin()

    def roles(self) -> Roles | None:
        return self.outline.roles

    def attention(self) -> Attention | None:
        return self._attention

    @cached_property
    def _attention(self) -> Attention | None:
        return find(self.skeleton())


@dataclass(frozen=True)
class ModuleSource:
    """A program's origin in a live module."""

    module: nn.Module
    name: None = None

    @property
    def architectures(self) -> tuple[str, ...]:
        return (type(self.module).__name__,)

    def instantiate(self, dtype: torch.dtype | None) -> nn.Module:
        """A copy of the module, in eval mode."""
        return copy.deepcopy(self.module).to(dtype=dtype).eval()

    def skeleton(self) -> nn.Module:
        made: dict[int, Any] = {id(x): x.to("meta") for x in self.module.buffers()}
        for x in self.module.parameters():
            made[id(x)] = nn.Parameter(x.detach().to("meta"), x.requires_grad)
        return copy.deepcopy(self.module, made)

    def layout(self) -> list[OutputFile]:
        outline = outline_of(self.module)
        names = tuple(name for name in outline.tensors if name not in outline.aliases)
        return [OutputFile("model.safetensors", names, {"format": "pt"})]

    def companions(self) -> dict[str, Path]:
        return {}

    def edited(self) -> dict[str, bytes]:
        return {}

    def pin(self) -> dict[str, Any]:
        return {"module": f"{type(self.module).__module__}.{type(self.module).__qualname__}"}

    def roles(self) -> Roles | None:
        return _traced(self.module)

    def attention(self) -> Attention | None:
        return find(self.module)


_roles: WeakKeyDictionary[nn.Module, Roles | None] = WeakKeyDictionary()


def _traced(module: nn.Module) -> Roles | None:
    """The roles of a live module, found out once."""
    if module not in _roles:
        _roles[module] = trace(module)
    return _roles[module]


def _arranged(tensors: Mapping[str, Constant], outline: Outline) -> Arrangement:
    shapes = {key: constant.spec.shape for key, constant in tensors.items()}
    return arrange(shapes, outline.conversions, outline.tensors, outline.prefix)


def _as_live(tensors: dict[str, Constant], outline: Outline) -> dict[str, Constant]:
    """Quantized weights, all stored as (out, in), as their modules have them."""
    packed = {key: c for key, c in tensors.items() if isinstance(c, Packed)}
    if not packed:
        return tensors
    stored = _arranged(tensors, outline).stored
    sites = {key: outline.sites.get(stored[key].removesuffix(".weight")) for key in packed}
    turning = {key for key, site in sites.items() if site and restore(site.kind).transposed}
    return {**tensors, **{key: turned(packed[key]) for key in turning}}


def _placed(constant: Constant) -> torch.Tensor:
    """A tensor to build a model of; for a quantized weight one that takes no memory."""
    if isinstance(constant, Packed):
        return torch.zeros((), dtype=constant.spec.dtype).expand(constant.spec.shape)
    return value(constant)


def capture_checkpoint(checkpoint: Checkpoint, name: str) -> Program:
    """Captures an opened checkpoint by its outline; its tensors become leaves.

    Raises:
        CaptureError: It is quantized in a way that peftc does not read.
    """
    _check_quantization(checkpoint)
    _check_depth(checkpoint)
    source = CheckpointSource(checkpoint, name, checkpoint_outline(checkpoint))
    return assemble(source, source.constants())


def capture_config(path: str | Path) -> Program:
    """Captures what a directory's config.json describes, where its weights are not to be had.

    Its constants have shapes and no values (they are fp32 on the meta device): adapters bind to
    the program, and nothing that reads a weight runs on it.

    Raises:
        CheckpointError: There is no config.json.
        CaptureError: transformers has no such architecture.
    """
    root = Path(path)
    checkpoint = Checkpoint(root, read_json(root / "config.json", "a checkpoint"), (), False)
    outline = checkpoint_outline(checkpoint)
    constants: dict[str, Constant] = {
        fqn: Held(torch.empty(shape, device="meta"))
        for fqn, shape in outline.tensors.items()
        if fqn not in outline.aliases
    }
    stored = {fqn: fqn for fqn in constants}
    constants |= {tied: constants[owner] for tied, owner in outline.aliases.items()}
    source = CheckpointSource(checkpoint, str(root.resolve()), outline)
    return _program(source, outline, constants, stored)


def without_files(program: Program) -> Program:
    """The program with shapes and dtypes in the place of what lies in files.

    It takes little memory, whatever the checkpoint's size. Nothing that reads a weight runs on it;
    4-bit weights and programs of live modules stay as they are.
    """
    source = program.source
    if not isinstance(source, CheckpointSource) or program.packed:
        return program
    empty = {
        fqn: Held(torch.empty(c.spec.shape, dtype=c.spec.dtype, device="meta"))
        for fqn, c in program.constants.items()
    }
    constants = empty | {tied: empty[owner] for tied, owner in program.aliases.items()}
    return replace(
        program,
        source=replace(source, checkpoint=replace(source.checkpoint, files=())),
        constants=constants,
        captured={f: constants[f] for f in program.captured if not program.touched(f)},
        stored={fqn: fqn for fqn in program.stored.values()},
        parts={},
    )


def _check_quantization(checkpoint: Checkpoint) -> None:
    config = checkpoint.config.get("quantization_config")
    if not isinstance(config, dict):
        return
    method = config.get("quant_method", "bitsandbytes")
    if method == "bitsandbytes" and not config.get("load_in_8bit"):
        return
    raise CaptureError(
        f"is quantized by {method}, and peftc reads 4-bit weights of bitsandbytes only",
        where=str(checkpoint.path / "config.json"),
        fix="start from the original, or save it dequantized: model.dequantize() in transformers",
    )


def _check_depth(checkpoint: Checkpoint) -> None:
    """Refuses a config of more layers than there are tensors, whose model could take for ever."""

    def counts(value: Any, at: str = "") -> Iterator[tuple[str, int]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from counts(inner, str(key))
        elif isinstance(value, int) and re.fullmatch(
            r"(num_|n_)?((encoder|decoder|hidden)_)?layers?|depth", at
        ):
            yield at, value

    there = len(checkpoint.tensors)
    most = max(64, there)  # a few are soon built, and what lacks is told better
    for name, count in counts(dict(checkpoint.config)):
        if count > most:
            raise CaptureError(
                f"asks for {count} layers ({name}), and there are {there} tensors",
                where=str(checkpoint.path / "config.json"),
                fix="use the config.json that belongs to these weights",
            )


def _check_layers(source: CheckpointSource, found: Collection[str]) -> None:
    """Refuses weights without a whole layer, which transformers would fill with random ones."""
    layers: dict[str, bool] = {}
    for fqn in source.outline.tensors:
        if match := re.match(r"(.*?\.\d+)\.", fqn):
            layers[match[1]] = layers.get(match[1], False) or fqn in found
    if empty := [layer for layer, there in layers.items() if not there]:
        raise CaptureError(
            f"holds nothing of {len(empty)} layers: {', '.join(empty[:3])}",
            where=str(source.checkpoint.path),
            fix="download all of it, or use the config.json that belongs to these weights",
        )


def assemble(source: CheckpointSource, tensors: Mapping[str, Constant]) -> Program:
    """The program of an outline and of stored tensors by their names in the checkpoint.

    Raises:
        CaptureError: The tensors are not what the outline asks for.
    """
    outline, checkpoint = source.outline, source.checkpoint
    found = _arranged(tensors, outline)
    # What is not read as the live tensor of its name must not be taken for it.
    stored = {
        k: f"{k} (as stored)" if k in found.unread else fqn for k, fqn in found.stored.items()
    }
    if not outline.tensors.keys() & stored.values():
        raise CaptureError(
            f"none of its tensors belongs to its architecture: it holds "
            f"{next(iter(tensors), 'nothing')}, and {min(outline.tensors)} is asked for",
            where=str(checkpoint.path),
            fix="use the config.json that belongs to these weights",
        )
    parts = {
        key: Part(tensors[key], place.index, place.low, place.high)
        for key, place in found.places.items()
    }
    constants: dict[str, Constant] = {
        fqn: tensors[key] for key, fqn in stored.items() if key not in parts
    }
    for fqn, matrices in found.fused.items():
        stacked = parts[matrices[0][0]].index is not None
        constants[fqn] = _fused([[tensors[key] for key in keys] for keys in matrices], stacked)
    wrong = [
        f"{fqn}: {list(constants[fqn].spec.shape)} instead of {list(shape)}"
        for fqn, shape in outline.tensors.items()
        if fqn in constants and constants[fqn].spec.shape != shape
    ]
    if wrong:
        raise CaptureError(
            f"{len(wrong)} tensors have shapes that config.json does not describe, such as "
            f"{wrong[0]}",
            where=str(checkpoint.path),
            fix="use the config.json that belongs to these weights",
        )
    for tied, owner in outline.aliases.items():
        if one := constants.get(owner) or constants.get(tied):
            constants.setdefault(owner, one)
            constants.setdefault(tied, one)
    _check_layers(source, constants)
    return replace(_program(source, outline, constants, stored), parts=parts)


def _capture_module(module: nn.Module) -> Program:
    outline = outline_of(module)
    state = module.state_dict(keep_vars=True)
    constants: dict[str, Constant] = {fqn: Held(state[fqn]) for fqn in outline.tensors}
    for tied, owner in outline.aliases.items():
        constants[tied] = constants[owner]
    stored = {fqn: fqn for fqn in outline.tensors}
    return _program(ModuleSource(module), outline, constants, stored)


def _fused(matrices: list[list[Constant]], stacked: bool) -> Constant:
    """What transformers makes of an expert's, or a packed layer's, parts when it loads them."""
    graph = _fusion(tuple(map(len, matrices)), stacked)
    leaves = [leaf for parts in matrices for leaf in parts]
    inputs = dict(zip(graphs.constant_names(graph), leaves, strict=True))
    return derive(graph, inputs, leaves[0].spec.dtype)


@cache
def _fusion(counts: tuple[int, ...], stacked: bool) -> fx.Graph:
    """The graph of matrices of so many parts each, once for all layers."""
    build, nodes = Builder(), []
    for index, count in enumerate(counts):
        pieces = [build.const(f"part_{index}_{number}") for number in range(count)]
        nodes.append(pieces[0] if count == 1 else build.op(aten.cat.default, pieces, 0))
    build.graph.output(build.op(aten.stack.default, nodes, 0) if stacked else nodes[0])
    return graphs.intern(build.graph)


def _program(
    source: CheckpointSource | ModuleSource,
    outline: Outline,
    constants: dict[str, Constant],
    stored: dict[str, str],
) -> Program:
    sites: dict[str, Site] = {}
    for fqn, found in outline.sites.items():
        kind = restore(found.kind)
        wanted = ("weight", "bias") if found.bias else ("weight",)
        names = [tensor_name(fqn, kind, local) for local in wanted]
        if not all(name in constants for name in names):
            continue  # a tensor may be missing from the file
        graph = graphs.restore(found.graph) if found.graph else template(kind, found.bias)
        shape = constants[names[0]].spec.shape
        sites[fqn] = Site(fqn, kind, graph, graph, shape, found.bias)
    return Program(
        source,
        sites,
        constants,
        constants,
        stored,
        aliases=outline.aliases,
        modules=frozenset(outline.modules),
        head=outline.head,
        embedding=outline.embedding,
        context=outline.context,
    )
