"""Resizing the vocabulary: embedding, head and its bias get rows for new tokens.

New rows are the mean of the old, so that new tokens begin as an average one (Hewitt 2021,
https://nlp.stanford.edu/~johnhew/vocab-expansion.html). transformers draws them around that mean,
with 1e-9 of the covariance of the old; here they are the mean itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftc.contract import Effect, Pass, PassResult
from peftc.errors import PassError, PeftcError, TiedWeightError, raise_all

if TYPE_CHECKING:
    from peftc.constants import Constant
    from peftc.program import Program


class ResizeVocabulary(Pass):
    """Give embedding and head another number of rows; the old ones keep every bit."""

    effect: ClassVar[Effect] = Effect.IDENTITY
    structural: ClassVar[bool] = True

    size: int = Field(gt=0, description="how many tokens there are then")
    pad_to_multiple_of: int | None = Field(
        None, gt=0, description="round the number of rows up to a multiple of this"
    )
    init: Literal["mean", "zeros"] = Field("mean", description="new rows: the old ones' mean, or 0")
    drop_rows: bool = Field(False, description="allow a smaller size, which drops the last rows")

    @property
    def rows(self) -> int:
        """How many rows there are then, padding included."""
        multiple = self.pad_to_multiple_of or 1
        return -(-self.size // multiple) * multiple

    def check(self, program: Program) -> list[PeftcError]:
        from peftc.structure import unfit

        if errors := unfit(program):
            return errors
        if not (count := _count(program)):
            return [
                PassError("config.json names no vocab_size", fix="this model takes no token ids")
            ]
        if errors := self._dropped(program, count):
            return errors
        try:
            self._resized(program, count)
        except PeftcError as error:
            return list(getattr(error, "errors", [error]))
        return []

    def run(self, program: Program) -> PassResult:
        count = _count(program)
        assert count is not None
        return PassResult(self._resized(program, count), modified=count != self.rows)

    def _dropped(self, program: Program, count: int) -> list[PeftcError]:
        """What a smaller vocabulary would lose."""
        if self.rows >= count:
            return []
        if not self.drop_rows:
            return [
                PassError(
                    f"the vocabulary has {count} rows, and {self.rows} are asked for",
                    where="size",
                    fix="to drop the last rows for good: --drop-rows (drop_rows: true)",
                )
            ]
        return [
            PassError(
                f"token {token} would be dropped, and it is the {key}",
                where=place,
                fix=f"keep more rows than {token}, or give the model another {key} first",
            )
            for place, key, token in _special(program)
            if token >= self.rows
        ]

    def _resized(self, program: Program, count: int) -> Program:
        from peftc.structure import edited_config, edited_outline, origin, restructure
        from peftc.structure import stored_tensors as stored

        if count == self.rows:
            return program
        config = edited_config(program, "vocab_size", self.rows)
        was, now = origin(program).outline, edited_outline(program, config)
        known = [fqn for fqn in now.tensors if fqn in was.tensors and fqn in program.captured]
        changed = {f: now.tensors[f] for f in known if now.tensors[f] != was.tensors[f]}
        raise_all(_obstacles(program, changed))
        made: dict[str, Constant] = {}
        for fqn, shape in changed.items():
            owner = now.aliases.get(fqn, fqn)
            if owner not in made:
                made[owner] = self._constant(fqn, program.captured[owner], shape)
            made[fqn] = made[owner]
        tensors = {key: made.get(program.stored[key], old) for key, old in stored(program).items()}
        return restructure(program, config, tensors, program.source.layout())

    def _constant(self, fqn: str, old: Constant, shape: tuple[int, ...]) -> Constant:
        """A tensor with another number of rows; of a buffer, columns."""
        from peftc.constants import Initial, derive
        from peftc.graphs import Builder, Spec, aten

        dim = next(d for d, (a, b) in enumerate(zip(old.spec.shape, shape, strict=True)) if a != b)
        count = shape[dim] - old.spec.shape[dim]
        if count < 0:
            return _cut(old, dim, shape)
        build, inputs = Builder(), {"old": old}
        rows = build.const("old")
        if self.init == "mean" and dim == 0:
            mean = build.op(aten.mean.dim, rows, [0], True)
            new = build.op(aten.expand.default, mean, [count, *shape[1:]])
        else:
            added = (*shape[:dim], count, *shape[dim + 1 :])
            inputs["new"] = Initial(f"{fqn} (new)", Spec(added, old.spec.dtype), "zeros")
            new = build.const("new")
        build.graph.output(build.op(aten.cat.default, [rows, new], dim))
        return derive(build.graph, inputs, old.spec.dtype)


def _cut(old: Constant, dim: int, shape: tuple[int, ...]) -> Constant:
    """The first rows of a tensor; those of a file's are a shorter piece of it."""
    from dataclasses import replace
    from math import prod

    from peftc.constants import Leaf, derive
    from peftc.graphs import Builder, aten

    if isinstance(old, Leaf) and dim == 0:
        nbytes = prod(shape) * old.spec.dtype.itemsize
        return Leaf(replace(old.ref, shape=shape, nbytes=nbytes))
    build = Builder()
    build.graph.output(build.op(aten.slice.Tensor, build.const("old"), dim, 0, shape[dim]))
    return derive(build.graph, {"old": old}, old.spec.dtype)


def _count(program: Program) -> int | None:
    from peftc.outline import config_of
    from peftc.structure import origin

    count = getattr(config_of(origin(program).checkpoint).get_text_config(), "vocab_size", None)
    return count if isinstance(count, int) else None


def _obstacles(program: Program, changed: Mapping[str, tuple[int, ...]]) -> list[PeftcError]:
    """What was done to the vocabulary's tensors already, and ties that are none."""
    from peftc.evaluate import value

    if not changed:
        return [
            PassError(
                "no tensor's shape depends on vocab_size", fix="this model takes no token ids"
            )
        ]
    errors: list[PeftcError] = []
    for fqn in changed:
        site, local = program.site_of(fqn)
        worked = site is not None and not program.sites[site].is_plain
        if program.touched(fqn) or (worked and local in ("weight", "bias")):
            errors.append(
                PassError(
                    "was rewritten by an earlier pass",
                    where=fqn,
                    fix="put resize_vocabulary before it",
                )
            )
        owner = program.aliases.get(fqn, fqn)
        one, other = program.captured[fqn], program.captured[owner]
        if one.key != other.key and not value(one).equal(value(other)):
            errors.append(
                TiedWeightError(
                    f"is tied to {owner} by config.json, and the file has another tensor for it",
                    where=fqn,
                    fix="put the pass untie before this one",
                )
            )
    return errors


def _special(program: Program) -> list[tuple[str, str, int]]:
    """The tokens that the configs name: where, as what, and which."""
    from peftc.checkpoint import read_json
    from peftc.structure import origin, text_parts

    checkpoint = origin(program).checkpoint
    parts: list[tuple[str, Any]] = [("config.json", p) for p in text_parts(checkpoint.config)]
    file = checkpoint.path / "generation_config.json"
    if file.exists():
        parts.append((file.name, read_json(file, "a checkpoint")))
    return [
        (place, key, token)
        for place, part in parts
        for key, found in part.items()
        if key.endswith("_token_id")
        for token in (found if isinstance(found, list) else [found])
        if isinstance(token, int)
    ]
