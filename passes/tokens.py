"""Trainable tokens: some rows of the embedding are trained, and all others stay.

As PEFT's TrainableTokensConfig: the trained rows take the place of the base's. Where the head is
tied to the embedding, it sees them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator, Field

from peftc.contract import Method
from peftc.errors import PassError, PeftcError
from peftc.targets import Names

if TYPE_CHECKING:
    from peftc.program import Program
    from peftc.sites import SiteEditor


def _numbers(value: object) -> object:
    """`32000,32001` is two ids."""
    return [int(part) for part in value.split(",")] if isinstance(value, str) else value


Ids = Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_numbers)]


class TrainableTokens(Method):
    """Train the embeddings of some tokens, such as newly added ones, and no others."""

    peft_type: ClassVar[str | None] = "TRAINABLE_TOKENS"
    peft_fields: ClassVar[Mapping[str, str]] = {"token_indices": "tokens"}
    peft_neutral: ClassVar[frozenset[str]] = frozenset({"init_weights"})
    kinds: ClassVar[frozenset[str]] = frozenset({"embedding", "linear"})

    tokens: Ids = Field(min_length=1, description="the ids of the tokens")
    targets: Names = Field(["embed_tokens"], description="the embedding's name")

    def inject(self, site: SiteEditor) -> None:
        replace_rows(site, "trainable_tokens_delta", self.tokens)

    def pick(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        chosen, errors = super().pick(program)
        return with_tied(program, chosen), errors

    def check(self, program: Program) -> list[PeftcError]:
        return super().check(program) + unknown_tokens(program, self.pick(program)[0], self.tokens)


def replace_rows(site: SiteEditor, name: str, tokens: list[int]) -> None:
    """Rewrites an embedding, or a head, so that some rows of its table are trained ones."""
    import torch

    from peftc.constants import Initial, derive
    from peftc.graphs import Builder, Spec, aten

    ids = Initial("tokens", Spec((len(tokens),), torch.int64), "values", values=tuple(tokens))
    index = site.hold("tokens", ids)
    build = Builder()
    build.graph.output(
        build.op(aten.index_select.default, build.const("weight"), 0, build.const("tokens"))
    )
    base = site.bound["weight"]
    start = derive(build.graph, {"weight": base, "tokens": ids}, base.spec.dtype)
    rows = site.share(name, start, trained=True)
    table = site.op(aten.index_copy.default, site.const("weight"), 0, index, rows)
    matrix = site.kind.matrix(site, table)
    site.y = site.kind.apply(site, site.x, matrix, site.const("bias") if site.site.bias else None)


def with_tied(program: Program, embeddings: list[str]) -> list[str]:
    """Embeddings, and the heads that are tied to them."""
    tables = {alias for fqn in embeddings for alias in program.names_of(f"{fqn}.weight")}
    return [fqn for fqn in program.sites if f"{fqn}.weight" in tables]


def unknown_tokens(program: Program, sites: list[str], tokens: list[int]) -> list[PeftcError]:
    """An error for each token that an embedding does not have."""
    return [
        PassError(
            f"has no token {token}: its vocabulary is of {program.sites[fqn].shape[0]}",
            where=fqn,
            fix="resize the vocabulary first, or correct the id",
        )
        for fqn in sites
        for token in tokens
        if token >= program.sites[fqn].shape[0]
    ]
