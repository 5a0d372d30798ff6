"""Structure: a program over an edited config.json, its tensors in the source's files.

A structural pass says three things: the edited config, the stored tensors by their names in the
output, and which file holds which. The rest is capture anew: transformers builds the outline of the
edited config, and every tensor must have a place and the right shape in it. What earlier passes
rewrote is carried over.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from peftc.capturing import CheckpointSource, assemble
from peftc.constants import Constant
from peftc.errors import CaptureError, PassError, PeftcError
from peftc.outline import Outline, checkpoint_outline, config_of
from peftc.program import OutputFile, Program

_TEXT = ("text_config", "text_encoder", "decoder", "generator")  # as get_text_config looks for it
# What PEFT's `replicate_layers` finds layers under.
_STACKS = ("layers", "h", "encoder.layer", "bert.encoder.layer")


@dataclass(frozen=True, eq=False)
class EditedSource(CheckpointSource):
    """A checkpoint with another config and other tensors; `pin` still names the original.

    Attributes:
        tensors: What is stored, by its names in the output.
        files: Which file holds which.
        layers: For each layer, the original's that it is a copy of; empty unless replicated.
        replicable: Whether PEFT makes all these edits itself when it is told the layers.
    """

    tensors: Mapping[str, Constant]
    files: tuple[OutputFile, ...]
    layers: tuple[int, ...] = ()
    replicable: bool = False

    def constants(self) -> dict[str, Constant]:
        return dict(self.tensors)

    def instantiate(self, dtype: torch.dtype | None) -> nn.Module:
        return self.build(self.tensors, dtype)

    def layout(self) -> list[OutputFile]:
        return list(self.files)

    def edited(self) -> dict[str, bytes]:
        return {"config.json": as_json(self.checkpoint.config)}


def as_json(content: Mapping[str, Any]) -> bytes:
    """A JSON file as Hugging Face's libraries write it."""
    return (json.dumps(content, indent=2) + "\n").encode()


def unfit(program: Program) -> list[PeftcError]:
    """Why no structural pass can run on a program."""
    if isinstance(program.source, CheckpointSource):
        return []
    return [
        PassError(
            "a live module has no config.json to edit",
            where=str(program.source.pin().get("module")),
            fix="save it (save_pretrained), and capture the directory",
        )
    ]


def origin(program: Program) -> CheckpointSource:
    """The source of a program that is not unfit."""
    assert isinstance(program.source, CheckpointSource)
    return program.source


def stored_tensors(program: Program) -> dict[str, Constant]:
    """The stored tensors of a program by their names, as only structural passes changed them."""
    return {
        key: program.parts[key].leaf if key in program.parts else program.captured[fqn]
        for key, fqn in program.stored.items()
    }


def edited_outline(program: Program, config: Mapping[str, Any]) -> Outline:
    """The outline of an edited config.

    Raises:
        CaptureError: transformers cannot build a model from it.
    """
    return checkpoint_outline(replace(origin(program).checkpoint, config=config))


def restructure(
    program: Program,
    config: Mapping[str, Any],
    tensors: Mapping[str, Constant],
    files: Sequence[OutputFile],
    *,
    layers: tuple[int, ...] | None = None,
    replicable: bool = False,
) -> Program:
    """A program over an edited config, with what earlier passes rewrote.

    Args:
        program: What to edit; its source is a checkpoint.
        config: All of config.json.
        tensors: What is stored, by its names in the output.
        files: Which file holds which.
        layers: See `EditedSource`; default: as before.
        replicable: See `EditedSource`.

    Raises:
        CaptureError: The edited config asks for other tensors.
    """
    old = origin(program)
    checkpoint = replace(old.checkpoint, config=config)
    if layers is None:
        layers = old.layers if isinstance(old, EditedSource) else ()
    outline = checkpoint_outline(checkpoint)
    source = EditedSource(checkpoint, old.name, outline, tensors, tuple(files), layers, replicable)
    fresh = assemble(source, tensors)
    were = {fqn for fqn in old.outline.tensors if fqn not in program.captured}
    if lost := sorted(outline.tensors.keys() - fresh.constants.keys() - were):
        raise CaptureError(
            f"the edited config asks for {len(lost)} tensors that there are not, such as {lost[0]}",
            where=str(checkpoint.path / "config.json"),
            fix="leave this pass out: peftc cannot edit this architecture so",
        )
    return _carried(program, fresh)


def _carried(program: Program, fresh: Program) -> Program:
    """The fresh program with what was rewritten; what is as before stays the same object."""
    captured, constants = dict(fresh.captured), dict(fresh.constants)
    for fqn, constant in fresh.captured.items():
        before = program.captured.get(fqn)
        if before is not None and before.key == constant.key:
            captured[fqn], constants[fqn] = before, program.constants[fqn]
    constants |= {f: c for f, c in program.constants.items() if f not in program.captured}
    sites = {}
    for fqn, site in fresh.sites.items():
        old = program.sites.get(fqn)
        like = old and (old.kind, old.shape, old.plain) == (site.kind, site.shape, site.plain)
        sites[fqn] = old if old and like else site
    kept = {
        fqn: site
        for fqn, site in program.sites.items()
        if not site.kind.opened and fqn in fresh.modules
    }
    added = {t: owner for t, owner in program.aliases.items() if t not in program.captured}
    return replace(
        fresh,
        sites={**sites, **kept},
        constants=constants,
        captured=captured,
        aliases={**fresh.aliases, **added},
        adapters=program.adapters,
        unfolded=program.unfolded,
        fused=program.fused,
        journal=program.journal,
    )


def peft_edits(program: Program) -> dict[str, Any] | None:
    """What an adapter's config says so that PEFT edits the original's structure itself.

    Returns:
        Nothing for a structure that is the original's, and None where PEFT cannot edit it so.
    """
    source = program.source
    if not isinstance(source, EditedSource):
        return {}
    lora = all(a.config.get("peft_type") == "LORA" for a in program.adapters.values())
    return {"layer_replication": runs(source.layers)} if source.replicable and lora else None


def runs(layers: Sequence[int]) -> list[list[int]]:
    """Layers as ranges, of which the end is exclusive: 0,1,2,1,2 is [[0,3],[1,3]]."""
    found: list[list[int]] = []
    for layer in layers:
        if found and found[-1][1] == layer:
            found[-1][1] += 1
        else:
            found.append([layer, layer + 1])
    return found


def peft_finds(stack: str) -> bool:
    """Whether PEFT finds the layers under this name when it replicates them."""
    inner = stack
    while inner.startswith("model."):
        inner = inner.removeprefix("model.")
    return inner in _STACKS


def text_parts(config: Mapping[str, Any]) -> Iterator[Any]:
    """The parts of a config that may describe a language model: its nested ones, then itself."""
    yield from (config[name] for name in _TEXT if isinstance(config.get(name), dict))
    yield config


def edited_config(program: Program, key: str, new: Any) -> dict[str, Any]:
    """The program's config with a key of its language model changed, wherever it stands.

    Args:
        program: Its source is a checkpoint.
        key: By its common name; the config's own may differ, as GPT-2's n_layer does.
        new: Its value; the old one is replaced wherever it stands under this name.
    """
    checkpoint = origin(program).checkpoint
    text = config_of(checkpoint).get_text_config()
    names = (key, (getattr(text, "attribute_map", None) or {}).get(key, key))
    old = getattr(text, key, None)
    config: dict[str, Any] = copy.deepcopy(dict(checkpoint.config))
    places = [(p, n) for p in text_parts(config) for n in names if n in p and p[n] == old]
    for part, name in places or [(next(text_parts(config)), names[1])]:
        part[name] = new
    return config
