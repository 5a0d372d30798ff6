"""Sites: the places of a model that passes may rewrite, each one submodule as its own fx graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import fx, nn

from peftc import graphs
from peftc.constants import Constant, Distribution, Initial
from peftc.errors import SAVE_AGAIN, AdapterError
from peftc.graphs import Builder, Spec, aten


@dataclass(frozen=True)
class Kind:
    """How a class of modules keeps its linear map.

    Attributes:
        name: What users call it.
        transposed: The weight is stored as (in, out), so that y = x·W + b.
    """

    name: str
    transposed: bool


LINEAR = Kind("linear", transposed=False)
CONV1D = Kind("conv1d", transposed=True)
KINDS = {kind.name: kind for kind in (LINEAR, CONV1D)}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module of exactly known class; a subclass may compute something else."""
    if type(module) is nn.Linear:
        return LINEAR
    if (
        type(module).__name__ == "Conv1D"
        and type(module).__module__ == "transformers.pytorch_utils"
    ):
        return CONV1D
    return None


@cache
def template(kind: Kind, bias: bool) -> fx.Graph:
    """The graph of an untouched site, in normal form: one `aten.linear`."""
    build = Builder()
    x = build.graph.placeholder("x")
    weight = build.const("weight")
    matrix = build.t(weight) if kind.transposed else weight
    build.graph.output(build.linear(x, matrix, build.const("bias") if bias else None))
    return graphs.intern(build.graph)


@dataclass(frozen=True)
class Site:
    """One submodule as a graph from x (…, in_features) to y (…, out_features).

    Attributes:
        fqn: The submodule's name in the model; the graph's constants are named relative to it.
        bias: Whether the submodule has a bias, whatever the graph makes of it.
        dropouts: The probability of each dropout module that the graph calls.
    """

    fqn: str
    kind: Kind
    graph: fx.Graph
    in_features: int
    out_features: int
    bias: bool
    dropouts: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the graph is what was captured, or folded back to it."""
        return self.graph is self.plain

    @property
    def plain(self) -> fx.Graph:
        """The graph of the site as it was captured."""
        return template(self.kind, self.bias)


class SiteEditor(Builder):
    """What a method sees of a site: x, y, and the vocabulary to say what it adds.

    Args:
        site: The site to rewrite.
        adapter: The adapter's name, part of each new constant's name.
        seed: For the start values of new constants.
        given: Trained tensors by their names in this site; none of them is drawn then.
    """

    def __init__(
        self, site: Site, adapter: str, seed: int = 0, given: Mapping[str, Constant] | None = None
    ) -> None:
        super().__init__(graphs.copy(site.graph))
        self.site, self.adapter, self.seed, self.given = site, adapter, seed, given
        self.created: dict[str, Constant] = {}
        self.dropouts = dict(site.dropouts)
        self._output = next(n for n in self.graph.nodes if n.op == "output")
        self.graph.inserting_before(self._output)
        self.x: fx.Node = next(n for n in self.graph.nodes if n.op == "placeholder")

    @property
    def y(self) -> fx.Node:
        """The site's output; assign to it to change what the site computes."""
        node = self._output.args[0]
        assert isinstance(node, fx.Node)
        return node

    @y.setter
    def y(self, node: fx.Node) -> None:
        self._output.args = (node,)

    def parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        distribution: Distribution = "zeros",
        scale: float = 1.0,
    ) -> fx.Node:
        """A new trainable fp32 constant, drawn from a distribution or taken from the given tensors.

        Args:
            name: As in PEFT's files, e.g. `lora_A.weight`; the adapter's name goes after its first
                part, as in a live PEFT model: `lora_A.default.weight`.
            shape: Its shape, which a given tensor must have.
            distribution: Its start values.
            scale: Standard deviation of a gaussian.
        """
        local = local_name(name, self.adapter)
        fqn = f"{self.site.fqn}.{local}"
        if self.given is None:
            constant: Constant = Initial(
                fqn, Spec(shape, torch.float32), distribution, self.seed, scale
            )
        elif local not in self.given:
            raise AdapterError(
                f"the adapter lacks {name}",
                where=self.site.fqn,
                fix=SAVE_AGAIN,
            )
        else:
            constant = self.given[local]
            if constant.spec.shape != shape:
                raise AdapterError(
                    f"{name} has shape {list(constant.spec.shape)}, "
                    f"this site and the adapter's config ask for {list(shape)}",
                    where=self.site.fqn,
                    fix="use the adapter with the model it was trained on",
                )
        self.created[local] = constant
        return self.const(local)

    def dropout(self, name: str, p: float, x: fx.Node) -> fx.Node:
        """`x` through dropout in training; a module of its own, so that train and eval reach it."""
        if p == 0:
            return x
        local = local_name(name, self.adapter)
        self.dropouts[local] = p
        return self.graph.call_module(local, (x,))

    def add_to_output(self, branch: fx.Node) -> None:
        """Adds a branch to y, in the wider of their dtypes; several are summed, then cast once."""
        y = self.y
        total, like = y.args if y.target is aten.type_as.default else (y, y)
        assert isinstance(total, fx.Node) and isinstance(like, fx.Node)
        self.y = self.type_as(self.add(total, branch), like)

    def finish(self) -> Site:
        """The rewritten site."""
        return replace(self.site, graph=graphs.intern(self.graph), dropouts=self.dropouts)


def local_name(name: str, adapter: str) -> str:
    """PEFT's name of a tensor in a live model: `lora_A.weight` is `lora_A.default.weight`."""
    head, dot, tail = name.partition(".")
    return f"{head}.{adapter}{dot}{tail}"
