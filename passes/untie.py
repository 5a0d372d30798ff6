"""Untying: weights that are one tensor become two, so that one of them may change.

Most small models use the embedding as their head. An adapter on either cannot be merged while they
are one: the other would change too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.contract import Effect, Pass, PassResult
from peftc.errors import PeftcError, TiedWeightError, Violations

if TYPE_CHECKING:
    from peftc.program import Program


class Untie(Pass):
    """Undo tied weights: the head gets a tensor of its own, and config.json says so."""

    effect: ClassVar[Effect] = Effect.IDENTITY
    structural: ClassVar[bool] = True

    def check(self, program: Program) -> list[PeftcError]:
        from peftc.structure import unfit

        if errors := unfit(program):
            return errors
        try:
            _untied(program)
        except Violations as found:
            return list(found.errors)
        except PeftcError as error:
            return [error]
        return []

    def run(self, program: Program) -> PassResult:
        untied = _untied(program)
        return PassResult(untied, modified=untied is not program)


def _untied(program: Program) -> Program:
    from peftc.structure import edited_outline, origin, restructure, stored_tensors

    tied = origin(program).outline.aliases
    if not tied:
        return program
    config = _config(program)
    outline = edited_outline(program, config)
    loosened = [name for name in tied if name not in outline.aliases]
    if not loosened or _depends(program):
        raise TiedWeightError(
            "is tied whatever config.json says"
            if not loosened
            else "is tied, and the model computes otherwise where it is not",
            where=next(iter(tied)),
            fix="leave untie out, and keep adapters on tied weights unmerged",
        )
    names = [name for one in loosened for name in program.names_of(one)]
    for adapter in program.adapters.values():
        if whole := sorted(set(adapter.tensors.values()) & set(names)):
            raise TiedWeightError(
                f"is trained whole, as a tied weight, by the adapter {adapter.name!r}",
                where=whole[0],
                fix="put untie before the pass that adds the adapter",
            )
    keys = {fqn: key for key, fqn in program.stored.items()}
    tensors, files = stored_tensors(program), program.source.layout()
    for name in dict.fromkeys(names):
        if name in keys or name in outline.aliases:
            continue
        twin = next(keys[other] for other in program.names_of(name) if other in keys)
        tensors[name] = tensors[twin]
        files = [
            replace(file, tensors=(*file.tensors, name)) if twin in file.tensors else file
            for file in files
        ]
    return restructure(program, config, tensors, files)


def _config(program: Program) -> dict[str, Any]:
    """The config without ties, at the top and wherever else a part of it speaks of them."""
    import copy

    from peftc.structure import origin

    config: dict[str, Any] = copy.deepcopy(dict(origin(program).checkpoint.config))
    for part in config.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    for name in ("text_config", "decoder"):
        if isinstance(config.get(name), dict):
            config[name]["tie_word_embeddings"] = False
    return {**config, "tie_word_embeddings": False}


def _depends(program: Program) -> bool:
    """Whether the model's forward looks at the flag, as some scale the logits by it."""
    import inspect

    from peftc.outline import architecture
    from peftc.structure import origin

    forward = architecture(origin(program).checkpoint).forward
    return "tie_word_embeddings" in inspect.getsource(forward)
