"""Typed errors: what is wrong, where, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

SAVE_AGAIN = "save the adapter again, from the model it was trained in"


class PeftcError(Exception):
    """What every error of peftc is.

    Args:
        what: The fact that is wrong, in one sentence.
        where: The file, tensor, site or option it is wrong in.
        fix: What the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.__dict__)


class CheckpointError(PeftcError):
    """A checkpoint that cannot be read, or must not be."""


class CaptureError(PeftcError):
    """A model that cannot be captured as sites and constants."""


class AdapterError(PeftcError):
    """An adapter directory that cannot be read or does not fit the model."""


class SelectionError(PeftcError):
    """A target, pattern or name that binds to nothing."""


class PassError(PeftcError):
    """A pass whose options or result are wrong."""


class FoldError(PeftcError):
    """A site whose output is not affine in its input, so that it cannot be merged."""


class TiedWeightError(PeftcError):
    """A change to one side of a tied weight."""


class RecipeError(PeftcError):
    """A recipe that does not follow the schema."""


class ArtifactError(PeftcError):
    """An output directory that cannot be written, or an artifact that is not whole."""


class DataError(PeftcError):
    """Examples that cannot be read, or cannot be learned from."""


class TrainingError(PeftcError):
    """A training that cannot begin, or broke off."""


class Interrupted(TrainingError):
    """A training that was asked to stop; it can go on."""

    exit_code = 130


class RunError(PeftcError):
    """A model that cannot be run as it is asked to."""


class InputError(PeftcError):
    """What a compiled model is given is not what it takes."""


class ProofError(PeftcError):
    """An artifact that is not equal to what it came from, within its bound."""

    exit_code = 3


class MissingDependency(PeftcError):
    """An optional library that is not installed."""


class Violations(PeftcError):
    """Several errors at once, all found before any work began."""

    def __init__(self, errors: Sequence[PeftcError]) -> None:
        self.errors = tuple(errors)
        super().__init__(f"{len(self.errors)} errors")
        self.exit_code = max(error.exit_code for error in self.errors)

    def __str__(self) -> str:
        return "\n".join(f"{i}. {error}" for i, error in enumerate(self.errors, 1))


def located(errors: Sequence[PeftcError], where: str) -> list[PeftcError]:
    """The errors; those that name no place of their own get this one."""
    for error in errors:
        error.where = error.where or where
    return list(errors)


def raise_all(errors: Sequence[PeftcError]) -> None:
    """Raises nothing, the one error, or all of them as `Violations`."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Violations(errors)


def near_misses(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates most like `name`: by the whole, then by their last parts."""
    known = sorted(set(candidates))
    tails = sorted({c.rsplit(".", 1)[-1] for c in known})
    close = difflib.get_close_matches(name, tails, count, 0.6)
    return close or difflib.get_close_matches(name, known[:20_000], count, 0.6)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """A sentence naming the near misses of `name`, or what there is to choose from."""
    known = list(candidates)
    if close := near_misses(name, known):
        return f"did you mean {', '.join(close)}?"
    tails = sorted({c.rsplit(".", 1)[-1] for c in known})
    return f"there are: {', '.join(tails[:12])}{' …' if len(tails) > 12 else ''}"


def _rebuild(cls: type[PeftcError], state: dict[str, object]) -> PeftcError:
    error = cls.__new__(cls)
    error.__dict__.update(state)
    return error
