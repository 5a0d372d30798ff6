"""(IA)³: activations times learned vectors (Liu et al. 2022, arXiv:2205.05638, §3.3)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from peftc.contract import Method
from peftc.errors import PeftcError, SelectionError, did_you_mean
from peftc.patterns import whole_match
from peftc.targets import Names

if TYPE_CHECKING:
    from torch import fx

    from peftc.program import Program
    from peftc.sites import SiteEditor

DOWN = "role:down"


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


class Ia3(Method):
    """Inject vectors of ones that multiply outputs, or the inputs of feed-forward layers."""

    peft_type: ClassVar[str | None] = "IA3"
    peft_fields: ClassVar[Mapping[str, str]] = {"feedforward_modules": "feedforward"}
    peft_neutral: ClassVar[frozenset[str]] = frozenset({"init_ia3_weights"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "convolution"})

    targets: Names = Field(
        "role:key,value,down", description="as everywhere; default: keys, values, and the layers "
        "behind the feed-forward's nonlinearity",
    )  # fmt: skip
    feedforward: Names = Field(
        DOWN,
        description="those of the targets whose input is multiplied, not their output: ends of "
        "names (down_proj), a regular expression, or role:down",
    )

    def inject(self, site: SiteEditor) -> None:
        if self.feeds_forward(site.site.fqn):
            site.change_input(lambda x: site.scale_input(x, self.vector(site, site.in_features, 1)))
            return
        factors = self.vector(site, site.out_features, 0)
        site.y = site.type_as(site.scale_output(site.y, factors), site.y)

    def vector(self, site: SiteEditor, size: int, dim: int) -> fx.Node:
        """The learned vector, stored as PEFT stores it, which differs by kind and by place."""
        shape: tuple[int, ...] = (1, size) if dim else (size, 1)
        if site.kind.name == "convolution":
            shape = (1, size, *(1 for _ in site.site.shape[2:]))
        return site.flatten(site.parameter("ia3_l", shape, "full"), 0)

    def settled(self, program: Program) -> Self:
        if self.feedforward != DOWN:
            return self
        roles = program.source.roles()
        named = (
            fqn for fqn in self.pick(program)[0] if roles and "down" in roles.roles.get(fqn, ())
        )
        return self.model_copy(update={"feedforward": list(named)})

    def feeds_forward(self, fqn: str) -> bool:
        """Whether a module is one of the feed-forward ones, as PEFT tells it."""
        if isinstance(self.feedforward, str):
            return whole_match(self.feedforward, fqn) is not None
        return fqn.endswith(tuple(self.feedforward))

    def check(self, program: Program) -> list[PeftcError]:
        errors, chosen = super().check(program), self.pick(program)[0]
        names = [self.feedforward] if isinstance(self.feedforward, str) else self.feedforward
        if self.feedforward == DOWN:
            return errors
        for name in names:
            one = self.model_copy(
                update={"feedforward": name if name is self.feedforward else [name]}
            )
            if not any(map(one.feeds_forward, chosen)):
                errors.append(
                    SelectionError(
                        f"feedforward {name!r} names no target", fix=did_you_mean(name, chosen)
                    )
                )
        return errors

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        return super().from_peft({"feedforward_modules": [], **_given(config)})

    def peft_config(self) -> dict[str, Any]:
        names = self.feedforward
        if names and not isinstance(names, str):  # PEFT asks of a list that targets have it too
            names = f".*({'|'.join(map(re.escape, names))})"
        return {**super().peft_config(), "feedforward_modules": names}
