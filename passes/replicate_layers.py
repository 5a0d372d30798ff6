"""Replicating layers: a deeper model of the same weights, as PEFT's `layer_replication` makes it.

Every new layer is a copy with sites, and so adapters, of its own. Merged, each gets weights of its
own, where PEFT's merge adds the adapters of all copies to the one weight that they share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from peftc.contract import Effect, Pass, PassResult
from peftc.errors import AdapterError, PassError, PeftcError, raise_all

if TYPE_CHECKING:
    from peftc.constants import Constant
    from peftc.outline import Outline
    from peftc.program import OutputFile, Program

# Lists that name layers by their numbers, where others have one item a layer.
_NUMBERS = ("mlp_only_layers",)


def _ranges(value: Any) -> Any:
    """`0-4,2-6` is [[0, 4], [2, 6]]."""
    if isinstance(value, str):
        found = [re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part) for part in value.split(",")]
        if not all(found):
            raise ValueError(f"{value!r} are no ranges of layers, such as 0-4,2-6")
        value = [[int(match[1]), int(match[2])] for match in found if match]
    for low, high in value:
        if low >= high:
            raise ValueError(f"{low}-{high} is empty: a range's end is exclusive")
    return value


Number = Annotated[int, Field(ge=0)]
Ranges = Annotated[list[tuple[Number, Number]], BeforeValidator(_ranges)]


class ReplicateLayers(Pass):
    """Repeat decoder layers: copies share weights, and get adapters of their own."""

    effect: ClassVar[Effect] = Effect.CHANGES
    structural: ClassVar[bool] = True

    ranges: Ranges = Field(
        min_length=1,
        description="the layers in their new order, each range's end exclusive: 0-4,2-6",
    )

    @property
    def order(self) -> list[int]:
        """For each new layer, the old one that it copies."""
        return [layer for low, high in self.ranges for layer in range(low, high)]

    def check(self, program: Program) -> list[PeftcError]:
        from peftc.structure import unfit

        if errors := unfit(program):
            return errors
        if program.adapters or program.unfolded or any(map(program.touched, program.captured)):
            return [
                PassError(
                    "the layers were rewritten by an earlier pass",
                    fix="put replicate_layers before it",
                )
            ]
        try:
            self._replicated(program, _stack(program))
        except PeftcError as error:
            return list(getattr(error, "errors", [error]))
        return []

    def run(self, program: Program) -> PassResult:
        stack = _stack(program)
        if self.order == list(range(stack.count)):
            return PassResult(program, modified=False)
        after = self._replicated(program, stack)
        origins = {
            f"{stack.name}.{new}.{rest}": f"{stack.name}.{old}.{rest}"
            for fqn in after.sites
            for new, rest in stack.inside(fqn)
            for old in (self.order[new],)
        }
        return PassResult(after, True, origins=origins)

    def _replicated(self, program: Program, stack: _Stack) -> Program:
        from peftc.structure import EditedSource, origin, peft_finds, restructure, stored_tensors

        order = self.order
        if beyond := [layer for layer in order if layer >= stack.count]:
            raise PassError(
                f"there is no layer {beyond[0]}: {stack.name} has {stack.count}",
                where="ranges",
                fix=f"layers go from 0, and a range's end, which is exclusive, to {stack.count}",
            )
        config, listed = _config(program, order)
        names = _names(program, stack, order)
        stored = stored_tensors(program)
        tensors: dict[str, Constant] = {}
        files: list[OutputFile] = []
        for file in program.source.layout():
            held = {new: key for key in file.tensors for new in names[key]}
            tensors |= {new: stored[key] for new, key in held.items()}
            files += [replace(file, tensors=tuple(held))] if held else []
        source = origin(program)
        edited = isinstance(source, EditedSource)
        layers = getattr(source, "layers", ()) or range(stack.count)
        after = restructure(
            program,
            config,
            tensors,
            files,
            layers=tuple(layers[layer] for layer in order),
            replicable=(source.replicable if isinstance(source, EditedSource) else not edited)
            and peft_finds(stack.name)
            and not listed,
        )
        raise_all(_unlike(source.outline, origin(after).outline, stack, order))
        return after


def needed(program: Program, config: Mapping[str, Any]) -> list[ReplicateLayers]:
    """What must run before an adapter is attached whose adapter_config.json replicates layers.

    Raises:
        AdapterError: The model was replicated otherwise.
    """
    wanted = config.get("layer_replication")
    if not wanted:
        return []
    replicate = ReplicateLayers(ranges=wanted)
    layers = getattr(program.source, "layers", ())
    if not layers:
        return [replicate]
    if list(layers) != replicate.order:
        raise AdapterError(
            f"was trained with layer_replication {wanted}, and the model's layers are {layers}",
            where="adapter_config.json",
            fix="attach it to the base as it was, or to one that was replicated so",
        )
    return []


@dataclass(frozen=True)
class _Stack:
    """The list of decoder layers: its name, and how many there are."""

    name: str
    count: int

    def inside(self, fqn: str) -> list[tuple[int, str]]:
        """The layer that a name lies in, and the rest of it; nothing where it lies elsewhere."""
        found = re.match(rf"{re.escape(self.name)}\.(\d+)\.(.+)", fqn)
        return [(int(found[1]), found[2])] if found else []


def _stack(program: Program) -> _Stack:
    from peftc.outline import config_of
    from peftc.structure import origin

    text = config_of(origin(program).checkpoint).get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    lists: dict[str, int] = {}
    for module in program.modules:
        name, _, number = module.rpartition(".")
        if number.isdigit():
            lists[name] = max(lists.get(name, 0), int(number) + 1)
    found = [n for n, length in lists.items() if length == count and not re.search(r"\.\d+\.", n)]
    if len(found) != 1:
        what = f"has {len(found)} lists of {count} layers" if found else "has no list of layers"
        raise PassError(
            f"the model {what}{': ' if found else ''}{', '.join(sorted(found))}",
            where="replicate_layers",
            fix="leave this pass out: it works on models with one stack of decoder layers",
        )
    return _Stack(found[0], lists[found[0]])


def _config(program: Program, order: Sequence[int]) -> tuple[dict[str, Any], bool]:
    """The config of that many layers, and whether it had to tell of single ones."""
    from peftc.outline import config_of
    from peftc.structure import edited_config, origin, text_parts

    text = config_of(origin(program).checkpoint).get_text_config()
    config = edited_config(program, "num_hidden_layers", len(order))
    part = next(text_parts(config))
    listed = False
    for key, old in text.to_dict().items():
        if key in _NUMBERS and old:
            part[key] = [new for new, layer in enumerate(order) if layer in old]
            listed = True
        elif "layer" in key and isinstance(old, list) and len(old) == text.num_hidden_layers:
            part[key] = [old[layer] for layer in order]  # also where the config only implies it
            listed = True
    return config, listed


def _names(program: Program, stack: _Stack, order: Sequence[int]) -> dict[str, list[str]]:
    """For each stored tensor, the names of its copies; one of no layer keeps its own."""
    last = re.escape(stack.name.rpartition(".")[2])
    places = {key: re.match(rf"((?:.*?\.)?{last}\.)(\d+)(\..+)", key) for key in program.stored}
    heads = {
        place[1]
        for key, fqn in program.stored.items()
        if (place := places[key]) and [int(place[2])] == [n for n, _ in stack.inside(fqn)]
    }
    return {
        key: [f"{place[1]}{n}{place[3]}" for n, old in enumerate(order) if old == int(place[2])]
        if place and place[1] in heads
        else [key]
        for key, place in places.items()
    }


def _unlike(was: Outline, now: Outline, stack: _Stack, order: Sequence[int]) -> list[PeftcError]:
    """An error for each layer that is not built as the one that it copies."""

    def layers(outline: Outline) -> dict[int, set[Any]]:
        found: dict[int, set[Any]] = {}
        for fqn, shape in outline.tensors.items():
            for number, rest in stack.inside(fqn):
                found.setdefault(number, set()).add((rest, shape))
        return found

    before, after = layers(was), layers(now)
    return [
        PassError(
            f"would not be built as layer {old}, which it copies",
            where=f"{stack.name}.{new}",
            fix="choose ranges that keep each kind of layer at its places",
        )
        for new, old in enumerate(order)
        if before.get(old) != after.get(new)
    ]
