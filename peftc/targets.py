"""Which sites a pass works on, said the way PEFT's users say it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from peftc.errors import PeftcError, SelectionError, did_you_mean
from peftc.patterns import pattern_key, short, whole_match

if TYPE_CHECKING:
    from peftc.program import Program

ALL_LINEAR = "all-linear"
ROLES = "role:"
ROLE_NAMES = ("query", "key", "value", "output", "up", "down")
MOST_LAYERS = 99_999
LINEARS = {"linear", "conv1d"}  # the kinds of site that all-linear means


def _layer_ranges(value: Any) -> Any:
    """`0-3,8` is layers 0, 1, 2, 3 and 8."""
    if not isinstance(value, str):
        return [value] if isinstance(value, int) else value
    layers: list[int] = []
    for part in value.split(","):
        low, _, high = part.strip().partition("-")
        if not low.isdigit() or (high and not high.isdigit()):
            raise ValueError(f"{short(part)} is no layer or range of layers, such as 4 or 0-3")
        if max(len(low), len(high)) > len(str(MOST_LAYERS)) or int(high or low) > MOST_LAYERS:
            raise ValueError(f"{short(part)} is beyond layer {MOST_LAYERS}, which no model has")
        layers.extend(range(int(low), int(high or low) + 1))
    return layers


def _names(value: Any) -> Any:
    """`q_proj,v_proj` is two names; a string with regular-expression signs is one expression."""
    if not isinstance(value, str) or value == ALL_LINEAR or value.startswith(ROLES):
        return value
    if not re.search(r"[\\()\[\]{}|*+?^$]", value):
        return [part.strip() for part in value.split(",")]
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression: {error}") from error
    return value


def _expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression: {error}") from error
    return value


def listed(names: str | list[str]) -> list[str]:
    """Names that an option gives, of which one need not be a list."""
    return [names] if isinstance(names, str) else list(names)


Pattern = Annotated[str, AfterValidator(_expression)]
Names = Annotated[str | list[str], BeforeValidator(_names)]
Layers = Annotated[list[int], BeforeValidator(_layer_ranges)]


class Targets(BaseModel):
    """The fields by which a pass selects its sites, with PEFT's meaning."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: Names = Field(
        ALL_LINEAR,
        description="module names or suffixes (q_proj,v_proj), a regular expression that matches "
        "the whole name; all-linear: every linear layer but the output head; or role:query,value: "
        "the layers in these roles (query, key, value, output, up, down), by the model's structure",
    )
    exclude: Names | None = Field(None, description="modules to leave alone, written like targets")
    layers: Layers | None = Field(None, description="only these layers: 0-3,8")
    layers_pattern: Pattern | None = Field(
        None, description="the name before the layer's number, where it is not the first number"
    )

    def pick(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        """The selected sites' names, in the model's order, and what matched nothing."""
        # A module that a method opened for itself is no site of another's.
        names = [name for name, site in program.sites.items() if site.kind.opened]
        return self.select(program, names)

    def select(self, program: Program, names: Sequence[str]) -> tuple[list[str], list[PeftcError]]:
        """The selected ones of some modules' names, and what matched nothing."""
        others = program.modules
        errors: list[PeftcError] = []
        if self.targets == ALL_LINEAR:
            chosen = _linears(program)
        elif isinstance(self.targets, str) and self.targets.startswith(ROLES):
            chosen, errors = _of_roles(program, self.targets.removeprefix(ROLES))
        else:
            chosen = [name for name in names if _matches(self.targets, name)]
            errors += _idle("target", self.targets, names, names, others)
        if self.exclude is not None:
            chosen = [name for name in chosen if not _matches(self.exclude, name)]
            errors += _idle("exclusion", self.exclude, (*names, *others), names, others)
        if self.layers is not None:
            numbers = {name: self._layer(name) for name in chosen}
            for layer in self.layers:
                if layer not in numbers.values():
                    errors.append(_no_layer(layer, numbers.values()))
            chosen = [name for name in chosen if numbers[name] in self.layers]
        if not chosen and not errors:
            errors.append(
                SelectionError(
                    f"no site is left to work on ({len(names)} in the model)",
                    fix="widen targets, or narrow exclude and layers",
                )
            )
        return chosen, errors

    def _layer(self, name: str) -> int | None:
        pattern = self.layers_pattern
        expression = rf"(?:^|.*?\.){pattern}\.(\d+)\..*" if pattern else r".*?\.[^.]*\.(\d+)\..*"
        found = whole_match(expression, name)
        return int(found[1]) if found else None


def _linears(program: Program) -> list[str]:
    """Every linear layer that is called, but for the head."""
    roles = program.source.roles()
    return [
        name
        for name, site in program.sites.items()
        if site.kind.name in LINEARS
        and name != program.head
        and (roles is None or roles.may_run(name))
    ]


def _of_roles(program: Program, wanted: str) -> tuple[list[str], list[PeftcError]]:
    """The linear layers that the model's own structure shows in one of these roles."""
    names = [role.strip() for role in wanted.split(",")]
    errors: list[PeftcError] = [
        SelectionError(f"there is no role {name!r}", fix=did_you_mean(name, ROLE_NAMES))
        for name in names
        if name not in ROLE_NAMES
    ]
    roles = program.source.roles()
    if roles is None:
        errors.append(
            SelectionError(
                "the model cannot be run on sample input to see what its layers are for",
                fix="name the targets",
            )
        )
        return [], errors
    linears = _linears(program)
    inner = [name for name in linears if re.search(r"\.\d+\.", name)] or linears
    chosen = [name for name in inner if roles.roles.get(name, frozenset()) & set(names)]
    for name in names if not errors else ():
        if not any(name in roles.roles.get(fqn, ()) for fqn in chosen):
            errors.append(SelectionError(f"no layer is a {name}", fix="name the targets"))
    return chosen, errors


def holders(program: Program) -> list[str]:
    """The modules that have tensors, of their own or of modules within them."""
    owners = {fqn.rpartition(".")[0] for fqn in program.constants}
    return [
        module
        for module in sorted(program.modules)
        if any(owner == module or owner.startswith(f"{module}.") for owner in owners)
    ]


def named_modules(
    patterns: str | list[str], program: Program
) -> tuple[list[str], list[PeftcError]]:
    """The modules with tensors of their own whose names end so, and patterns that name none."""
    names = holders(program)
    listed = [patterns] if isinstance(patterns, str) else patterns
    chosen = [name for name in names if any(name.endswith(pattern) for pattern in listed)]
    errors: list[PeftcError] = [
        SelectionError(f"module {pattern!r} matches none", fix=did_you_mean(pattern, names))
        for pattern in listed
        if not any(name.endswith(pattern) for name in names)
    ]
    return chosen, errors


def idle_modules(program: Program, names: Sequence[str]) -> list[PeftcError]:
    """An error for each chosen module that no forward pass calls: what is added is never run."""
    roles = program.source.roles()
    if roles is None:
        return []
    return [
        SelectionError(
            "is never called in a forward pass: its weight is read without it, so that an "
            "adapter there would do nothing",
            where=name,
            fix="exclude it",
        )
        for name in names
        if not roles.may_run(name)
    ]


def unbound_patterns(
    option: str, patterns: Iterable[str], names: Sequence[str]
) -> list[PeftcError]:
    """An error for each pattern that names none of the modules."""
    return [
        _unmatched(option, pattern, names, ())
        for pattern in patterns
        if not any(pattern_key([pattern], name) for name in names)
    ]


def _matches(patterns: str | list[str], name: str) -> bool:
    if isinstance(patterns, str):
        return whole_match(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _idle(
    what: str,
    patterns: str | list[str],
    scope: Sequence[str],
    names: Sequence[str],
    others: Iterable[str],
) -> list[PeftcError]:
    """An error for each pattern that matches nothing in scope."""
    singles = [patterns] if isinstance(patterns, str) else [[p] for p in patterns]
    return [
        _unmatched(what, single if isinstance(single, str) else single[0], names, others)
        for single in singles
        if not any(_matches(single, name) for name in scope)
    ]


def _unmatched(
    what: str, pattern: str, names: Sequence[str], others: Iterable[str]
) -> SelectionError:
    if any(_matches([pattern], name) for name in others):
        return SelectionError(
            f"{what} {pattern!r} names a module that is no site of any kind",
            fix=did_you_mean(pattern, names),
        )
    return SelectionError(f"{what} {pattern!r} matches no site", fix=did_you_mean(pattern, names))


def _no_layer(layer: int, known: Iterable[int | None]) -> SelectionError:
    numbers = sorted({n for n in known if n is not None})
    there = f"0 to {numbers[-1]}" if numbers else "none"
    return SelectionError(f"layer {layer} matches no site", fix=f"layers with targets: {there}")
