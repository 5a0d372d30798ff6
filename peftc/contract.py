"""The contract that every pass signs: its options, what it does to the numbers, check and run."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from peftc.errors import AdapterError, PassError, PeftcError, did_you_mean
from peftc.targets import LINEARS, Names, Targets, idle_modules, named_modules

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftc.constants import Constant
    from peftc.program import Program, Schedule
    from peftc.sites import SiteEditor


ALL_KINDS = frozenset({"linear", "conv1d", "embedding", "convolution", "experts"})


class Effect(StrEnum):
    """What a pass declares to do to a site's output, checked by number after it ran."""

    IDENTITY = "identity"  # not one bit, such as a fresh LoRA
    EQUAL = "equal"  # nothing but rounding, such as folding
    BOUNDED = "bounded"  # a measured error, such as quantizing
    CHANGES = "changes"  # something, such as attaching trained weights


@dataclass(frozen=True)
class PassResult:
    """The rewritten program and whether it differs from the one that came in.

    Attributes:
        measured: Figures of the pass's own, for the journal.
        origins: Of a structural pass, for each site that is a copy: the site that it must equal.
    """

    program: Program
    modified: bool
    measured: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)


class Pass(BaseModel, ABC):
    """A frozen, validated configuration that rewrites programs.

    Subclasses have a one-line docstring that says what they do, for the command line's help.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    effect: ClassVar[Effect]
    # Which option the command line takes as an argument, if any.
    positional: ClassVar[str | None] = None
    # Whether it edits the config: which sites there are, their shapes, and what is tied.
    structural: ClassVar[bool] = False

    def needs(self, program: Program) -> Sequence[Pass]:
        """Passes that the pipeline runs before this one, such as what an adapter's config names."""
        return ()

    def declared(self) -> Effect:
        """The effect, where it depends on the options."""
        return self.effect

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


# Keys of every PEFT config that do not change what a trained adapter computes.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out",
    "inference_mode", "peft_type", "peft_version", "revision", "task_type",
}  # fmt: skip
_TARGETS = {
    "target_modules": "targets", "exclude_modules": "exclude", "layers_to_transform": "layers",
    "layers_pattern": "layers_pattern",
}  # fmt: skip
_HEADS = {"classifier", "score"}  # both of which PEFT saves of any classifier, whichever it has


class Method(Targets, Pass):
    """A fine-tuning method: it says what it adds to a site, and all else follows by algebra.

    Attributes:
        peft_type: PEFT's name of it, or ours where PEFT has no such method; None where its files
            are not PEFT's.
        peft_kin: PEFT's names of other methods whose trained adapters are adapters of this one.
        peft_fields: PEFT's name of each option, by which its config is read and written.
        peft_defaults: What PEFT takes where a config leaves a key out.
        peft_neutral: Keys of its config that do not change what a trained adapter computes.
        kinds: The kinds of site that it can serve.
        grouped: Whether it can serve a convolution of several groups.
        additive: Whether all that it does is `add_to_output`, so that a number can weigh it.
        prefixed: Whether it puts virtual tokens before a sequence: PEFT's config of it names no
            target modules, and its file has `base_model.` before a module where others have more.
            What it has in `common` belongs to the model as a whole.
        apart: Why its sites are no place for weights or for other methods after it, if so.
    """

    effect: ClassVar[Effect] = Effect.IDENTITY
    peft_type: ClassVar[str | None] = None
    peft_kin: ClassVar[frozenset[str]] = frozenset()
    peft_fields: ClassVar[Mapping[str, str]] = {}
    peft_defaults: ClassVar[Mapping[str, Any]] = {}
    peft_neutral: ClassVar[frozenset[str]] = frozenset()
    kinds: ClassVar[frozenset[str]] = frozenset(LINEARS)
    grouped: ClassVar[bool] = True
    additive: ClassVar[bool] = False
    prefixed: ClassVar[bool] = False
    apart: ClassVar[str | None] = None
    _times: float = PrivateAttr(1.0)

    adapter: AdapterName = Field("default", description="the adapter's name")
    seed: int = Field(0, ge=0, description="seed of the start values")
    modules_to_save: Names | None = Field(
        None,
        description="modules that are trained whole and saved with the adapter, such as a head",
    )

    @abstractmethod
    def inject(self, site: SiteEditor) -> None:
        """Adds this method's nodes to one site."""

    def peft_config(self) -> dict[str, Any]:
        """This configuration as PEFT's adapter_config.json has it."""
        options = {key: getattr(self, field) for key, field in self.peft_fields.items()}
        return {"peft_type": self.peft_type, **options, "modules_to_save": self.modules_to_save}

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether this is the method of an adapter_config.json."""
        return config.get("peft_type") in {cls.peft_type, *cls.peft_kin} - {None}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """The configuration that PEFT's adapter_config.json describes.

        Raises:
            AdapterError: The config asks for something that peftc does not have.
        """
        fields = {**_TARGETS, **cls.peft_fields, "modules_to_save": "modules_to_save"}
        known = _NEUTRAL | cls.peft_neutral | set(fields)
        if unknown := sorted(k for k, v in config.items() if v and k not in known):
            raise AdapterError(
                f"the adapter uses {', '.join(unknown)}, which peftc cannot attach yet",
                fix="merge it with PEFT",
            )
        given = {**cls.peft_defaults, **{k: v for k, v in config.items() if v is not None}}
        if isinstance(pattern := given.get("layers_pattern"), list):
            given["layers_pattern"] = "|".join(pattern) or None
        return cls(**{field: given[key] for key, field in fields.items() if key in given})

    def weighted(self, weight: float) -> Self:
        """This method with what it adds multiplied by `weight`.

        Raises:
            PassError: It does not only add to the output, so that no number weighs it.
        """
        if weight != 1 and not self.additive:
            raise PassError(
                f"{type(self).__name__} cannot be weighed by {weight}: it does not only add",
                fix="attach it with weight 1, or merge it by itself",
            )
        weighted = self.model_copy()
        weighted._times = self._times * weight
        return weighted

    @property
    def times(self) -> float:
        """What the method's branches are multiplied by, beside its own scale."""
        return self._times

    def settled(self, program: Program) -> Self:
        """This method with what it has to know of the whole model, before it sees single sites."""
        return self

    def opened(self, program: Program) -> Program:
        """The program with the sites that this method works on and that others do not see.

        Most methods work on sites that every program has; one that works on whole modules makes
        sites of them (`ModuleKind`), which no other method sees.
        """
        return program

    def common(self, program: Program, sites: Sequence[str]) -> dict[str, Constant]:
        """The start of each constant that these sites share, by its name in PEFT's files."""
        return {}

    def from_file(
        self, program: Program, config: Mapping[str, Any], tensors: Mapping[str, Constant]
    ) -> Mapping[str, Constant]:
        """The adapter's tensors by name, of what a file holds; the inverse of `written`."""
        return tensors

    def written(self, tensors: Mapping[str, Constant]) -> Mapping[str, Constant]:
        """What PEFT's file holds, by name, of the adapter's tensors by theirs."""
        return tensors

    def enliven(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Changes what a live model does beyond its sites.

        Args:
            model: Its sites are in place already.
            tensors: Of a prefixed method: those that belong to the model as a whole.
        """

    def schedule(self, program: Program, model: nn.Module, total_steps: int) -> Schedule | None:
        """What the training loop does for this method beside its own steps, if anything.

        Args:
            program: What the model was materialized from.
            model: The live model.
            total_steps: How many steps the optimizer will take.
        """
        return None

    def withdraw(self, model: nn.Module) -> None:
        """Takes back what `enliven` did, if it did; the model keeps its tensors."""

    def trains(self, program: Program, sites: list[str]) -> list[str]:
        """The base's own tensors that this method trains, by name."""
        return program.tensors_of(self.saved(program)[0])

    def freezes(self, program: Program) -> Sequence[str]:
        """The other adapters that are trained no more beside this one, by name."""
        return ()

    def infix(self, program: Program, fqn: str) -> str:
        """What PEFT's files have between a module and a trained tensor of its own: `name.`."""
        return ""

    def pick(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        chosen, errors = super().pick(program)
        whole = self.saved(program)[0]
        return [
            fqn
            for fqn in chosen
            if not any(fqn == name or fqn.startswith(f"{name}.") for name in whole)
        ], errors

    def saved(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        """The modules that are trained whole, and patterns that match none."""
        given = self.modules_to_save or []
        names = dict.fromkeys([given] if isinstance(given, str) else given)
        found = [name for name in names if name in _HEADS and named_modules(name, program)[0]]
        # Of the heads' names that PEFT adds by itself one is enough.
        wanted = [name for name in names if name not in _HEADS or name in found or not found]
        return named_modules(wanted, program) if wanted else ([], [])

    def check(self, program: Program) -> list[PeftcError]:
        chosen, errors = self.pick(program)
        errors += self.unserved(program, chosen) + self.saved(program)[1]
        errors += idle_modules(program, chosen)
        if self.adapter in program.adapters:
            errors.append(
                PassError(
                    f"there is an adapter named {self.adapter!r} already",
                    fix="give this one another name: adapter=…",
                )
            )
        return errors

    def unserved(self, program: Program, names: Sequence[str]) -> list[PeftcError]:
        """An error for each site of a kind that this method cannot serve."""
        errors: list[PeftcError] = []
        for fqn in names:
            kind = program.sites[fqn].kind
            if kind.name not in self.kinds:
                errors.append(
                    PassError(
                        f"{type(self).__name__} cannot serve a site of kind {kind.name}",
                        where=fqn,
                        fix=f"it serves {', '.join(sorted(self.kinds))}: exclude this one",
                    )
                )
            elif not self.grouped and getattr(kind, "groups", 1) > 1:
                errors.append(
                    PassError(
                        "is a grouped convolution: what a low-rank branch adds to one is none",
                        where=fqn,
                        fix="exclude it",
                    )
                )
            errors += [
                PassError(
                    f"carries the adapter {other.name!r}, after which nothing may be added: "
                    f"{other.method.apart}",
                    where=fqn,
                    fix="add that one last, and only one such",
                )
                for other in program.adapters.values()
                if fqn in other.sites and other.method and other.method.apart
            ]
        return errors

    def run(self, program: Program) -> PassResult:
        chosen, _ = self.pick(program)
        return PassResult(program.inject(self, chosen), modified=True)


def absent(names: Sequence[str], program: Program) -> list[PeftcError]:
    """An error for each adapter that is named and not attached."""
    there = program.adapters
    return [
        PassError(
            f"there is no adapter {name!r}",
            fix=did_you_mean(name, there) if there else "attach it before this pass",
        )
        for name in dict.fromkeys(names)
        if name not in there
    ]


def trained_biases(program: Program, which: str, sites: Sequence[str]) -> list[str]:
    """The biases that PEFT's option `bias` trains: `none`, `all`, or only those of the sites."""
    own = {f"{fqn}.bias" for fqn in sites}
    found = (fqn for fqn in program.stored.values() if fqn.endswith(".bias") and which != "none")
    return [fqn for fqn in dict.fromkeys(found) if which == "all" or fqn in own]


def safe_name(path: str) -> str:
    """An adapter's name from its folder's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path).strip("-")[:64] or "default"
