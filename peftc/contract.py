"""The contract that every pass signs: its options, what it does to the numbers, check and run."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from peftc.errors import AdapterError, PassError, PeftcError
from peftc.targets import Targets

if TYPE_CHECKING:
    from peftc.program import Program
    from peftc.sites import SiteEditor


class Effect(StrEnum):
    """What a pass declares to do to a site's output, checked by number after it ran."""

    IDENTITY = "identity"  # not one bit, such as a fresh LoRA
    EQUAL = "equal"  # nothing but rounding, such as folding
    BOUNDED = "bounded"  # a measured error, such as quantizing
    CHANGES = "changes"  # something, such as attaching trained weights


@dataclass(frozen=True)
class PassResult:
    """The rewritten program and whether it differs from the one that came in."""

    program: Program
    modified: bool


class Pass(BaseModel, ABC):
    """A frozen, validated configuration that rewrites programs.

    Subclasses have a one-line docstring that says what they do, for the command line's help.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    effect: ClassVar[Effect]
    # Which option the command line takes as an argument, if any.
    positional: ClassVar[str | None] = None

    def check(self, program: Program) -> list[PeftcError]:
        """Everything that keeps this pass from running on this program, before any work."""
        return []

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """The rewritten program; `program` itself is never changed."""


def _absolute(value: Any) -> Any:
    """A path that is there, made absolute, so that a journal holds wherever it is read."""
    try:
        path = Path(value).expanduser() if isinstance(value, (str, Path)) else None
        return str(path.absolute()) if path and path.exists() else value
    except (OSError, RuntimeError):
        return value


Place = Annotated[str, BeforeValidator(_absolute)]
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=64)]


class Method(Targets, Pass):
    """A fine-tuning method: it says what it adds to a site, and all else follows by algebra."""

    effect: ClassVar[Effect] = Effect.IDENTITY
    peft_type: ClassVar[str | None] = None  # None: PEFT has no such method

    adapter: AdapterName = Field("default", description="the adapter's name")
    seed: int = Field(0, ge=0, description="seed of the start values")

    @abstractmethod
    def inject(self, site: SiteEditor) -> None:
        """Adds this method's nodes to one site."""

    def peft_config(self) -> dict[str, Any]:
        """This configuration as PEFT's adapter_config.json has it."""
        return {"peft_type": self.peft_type}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """The configuration that PEFT's adapter_config.json describes."""
        raise AdapterError(f"{cls.__name__} reads no adapter_config.json")

    def weighted(self, weight: float) -> Self:
        """This method with what it adds multiplied by `weight`."""
        if weight != 1:
            raise PassError(f"{type(self).__name__} cannot be weighed by {weight}")
        return self

    def trainable_biases(self, program: Program, sites: list[str]) -> list[str]:
        """The base's own biases that this method trains, by name."""
        return []

    def check(self, program: Program) -> list[PeftcError]:
        errors = self.pick(program)[1]
        if self.adapter in program.adapters:
            errors.append(
                PassError(
                    f"there is an adapter named {self.adapter!r} already",
                    fix="give this one another name: adapter=…",
                )
            )
        return errors

    def run(self, program: Program) -> PassResult:
        chosen, _ = self.pick(program)
        return PassResult(program.inject(self, chosen), modified=True)


def safe_name(path: str) -> str:
    """An adapter's name from its folder's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path).strip("-")[:64] or "default"
