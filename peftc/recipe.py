"""Recipes: a pipeline as a YAML file with a versioned schema."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftc import registry
from peftc.contract import Pass
from peftc.errors import (
    PassError,
    PeftcError,
    RecipeError,
    TrainingError,
    Violations,
    did_you_mean,
    raise_all,
)
from peftc.files import content

MAX_BYTES = 1 << 20
Settings = TypeVar("Settings", bound=BaseModel)


class Recipe(BaseModel):
    """A recipe as written: `peftc: 1`, and passes with their options.

    Example:
        peftc: 1
        passes:
          - lora: {rank: 16, targets: [q_proj, v_proj]}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    peftc: Literal[1] = Field(description="version of the schema")
    passes: list[str | dict[str, dict[str, Any] | None]] = Field(min_length=1)
    tune: dict[str, Any] | None = Field(None, description="the options of `peftc tune`")

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Reads a recipe.

        Raises:
            RecipeError: The file cannot be read, or does not follow the schema.
        """
        content = _read(path)
        errors: list[PeftcError] = []
        try:
            recipe = cls.model_validate(content)
        except ValidationError as error:
            errors += explained(error, str(path), list(cls.model_fields), RecipeError)
        # What can be told of the passes is told in the same breath.
        try:
            cls(peftc=1, passes=content["passes"]).build(str(path))
        except (ValidationError, TypeError, KeyError):
            pass  # said above
        except PeftcError as found:
            errors += found.errors if isinstance(found, Violations) else [found]
        raise_all(errors)
        return recipe

    def build(self, where: str = "recipe") -> list[Pass]:
        """The passes, every wrong option of any of them reported at once."""
        steps: list[tuple[str, Mapping[str, Any]]] = []
        for step in self.passes:
            if isinstance(step, str):
                steps.append((step, {}))
            elif len(step) == 1:
                steps += [(name, options or {}) for name, options in step.items()]
            else:
                raise RecipeError(
                    f"a step holds {len(step)} passes", where=where, fix="one pass for each dash"
                )
        return build(steps, where)


class _Loader(yaml.SafeLoader):
    """YAML without aliases, a few of which make a file of a hundred bytes into gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            name = cast(Any, self).get_event().anchor
            raise yaml.YAMLError(f"an alias, *{name}, which recipes do not have")
        return super().compose_node(parent, index)


def _read(path: Path) -> Any:
    try:
        return yaml.load(content(path, MAX_BYTES), _Loader)  # a safe one
    except OSError as error:
        raise RecipeError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(
            f"is not valid YAML: {error}", where=str(path), fix="correct that line"
        ) from error


def build(steps: Sequence[tuple[str, Mapping[str, Any]]], where: str) -> list[Pass]:
    """Passes from their names and options.

    Raises:
        PassError: Everything that is wrong with any of them.
    """
    passes: list[Pass] = []
    errors: list[PeftcError] = []
    for name, options in steps:
        try:
            cls = registry.load(name)
            passes.append(cls(**options))
        except ValidationError as error:
            errors += explained(error, f"{where}: {name}", list(cls.model_fields), PassError)
        except PeftcError as error:
            errors.append(type(error)(error.what, where=where, fix=error.fix))
    raise_all(errors)
    return passes


def settings(cls: type[Settings], options: Mapping[str, Any], where: str, command: str) -> Settings:
    """A command's settings from its options.

    Raises:
        TrainingError: Everything that is wrong with any of them.
    """
    try:
        return cls(**options)
    except ValidationError as error:
        fields = list(cls.model_fields)
        raise_all(explained(error, where, fields, TrainingError, f"{command} --help"))
        raise


def explained(
    error: ValidationError,
    where: str,
    fields: list[str],
    kind: type[PeftcError],
    shown: str = "peftc passes",
) -> list[PeftcError]:
    """Pydantic's complaints as ours; `shown` is the command that shows what there is."""
    found: list[PeftcError] = []
    for problem in error.errors():
        at = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            name = str(problem["loc"][-1])
            found.append(
                kind(f"unknown option {at!r}", where=where, fix=did_you_mean(name, fields))
            )
        elif problem["type"] == "missing":
            found.append(kind(f"{at} is missing", where=where, fix=f"give {at}"))
        else:
            got = "" if isinstance(problem["input"], dict) else f", not {_shown(problem['input'])}"
            text = problem["msg"].removeprefix("Value error, ")
            fix = f"correct {at or 'them'}; `{shown}` shows what there is"
            if not at and kind is RecipeError:
                fix = "begin with peftc: 1, then passes: and a list"
            named = f"{at}: " if at else ""
            found.append(kind(f"{named}{text[0].lower() + text[1:]}{got}", where=where, fix=fix))
    return found


def _shown(value: Any) -> str:
    """A value as it was given, where that is short."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 120
    return brief.repr(value)
