"""Sites: the places of a model that passes may rewrite, each one submodule as its own fx graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import fx

from peftc import graphs
from peftc.constants import Constant, Distribution, Initial
from peftc.errors import SAVE_AGAIN, AdapterError
from peftc.evaluate import value
from peftc.graphs import Builder, Spec, aten
from peftc.kinds import EmbeddingKind, ExpertsKind, Kind


@cache
def template(kind: Kind, bias: bool) -> fx.Graph:
    """The graph of an untouched site, in normal form: its kind's map by its stored weight."""
    build = Builder()
    build.graph.output(kind.plain(build, bias))
    return graphs.intern(build.graph)


@dataclass(frozen=True)
class Site:
    """One submodule, or one parameter of fused experts, as a graph from x to y.

    A submodule that is not opened (`ModuleKind`) has y as an input of its graph.

    Attributes:
        fqn: Its name in the model; the graph's constants are named relative to it.
        plain: The graph of the site as it was captured.
        shape: Of the stored weight; where there is none, the features of y and of x.
        bias: Whether there is a bias, whatever the graph makes of it.
        dropouts: The probability of each dropout module that the graph calls.
    """

    fqn: str
    kind: Kind
    graph: fx.Graph
    plain: fx.Graph
    shape: tuple[int, ...]
    bias: bool
    dropouts: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the graph is what was captured, or folded back to it."""
        return self.graph is self.plain

    @property
    def in_features(self) -> int:
        """How many features x has; for an embedding, how many ids there are."""
        return self.kind.sizes(self.shape)[0]

    @property
    def out_features(self) -> int:
        """How many features y has."""
        return self.kind.sizes(self.shape)[1]

    def name(self, local: str) -> str:
        """The name in the model of one of the site's tensors."""
        return tensor_name(self.fqn, self.kind, local)


def tensor_name(fqn: str, kind: Kind, local: str) -> str:
    """The name in the model of a site's tensor; a parameter of experts has no module of its own."""
    if not isinstance(kind, ExpertsKind):
        return f"{fqn}.{local}"
    return fqn if local == "weight" else f"{fqn}_{local}"


class SiteEditor(Builder):
    """What a method sees of a site: x, y, and the vocabulary to say what it adds.

    Args:
        site: The site to rewrite.
        adapter: The adapter's name, part of each new constant's name.
        seed: For the start values of new constants.
        given: Trained tensors by their names in this site; none of them is drawn then.
        shared: Constants that all sites of an adapter share, by name.
        bound: The site's constants.
        times: What each branch that is added to the output is multiplied by.
    """

    def __init__(
        self,
        site: Site,
        adapter: str,
        seed: int = 0,
        given: Mapping[str, Constant] | None = None,
        shared: dict[str, Constant] | None = None,
        bound: Mapping[str, Constant] | None = None,
        times: float = 1.0,
    ) -> None:
        super().__init__(graphs.copy(site.graph))
        self.site, self.adapter, self.seed, self.given = site, adapter, seed, given
        self.shared = {} if shared is None else shared
        self.bound, self.times = bound or {}, times
        self.common: set[str] = set()
        self.held: dict[str, Constant] = {}
        self.created: dict[str, Constant] = {}
        self.frozen: dict[str, str | None] = {}
        self.rebound: dict[str, Constant] = {}
        self.ties: dict[str, str] = {}
        self.dropouts = dict(site.dropouts)
        self._output = next(n for n in self.graph.nodes if n.op == "output")
        self.graph.inserting_before(self._output)
        self.x: fx.Node = self.input("x")

    @property
    def kind(self) -> Kind:
        """The site's kind."""
        return self.site.kind

    @property
    def in_features(self) -> int:
        """How many features x has."""
        return self.site.in_features

    @property
    def out_features(self) -> int:
        """How many features y has."""
        return self.site.out_features

    @property
    def stream(self) -> fx.Node:
        """The first input of the site's `entry`, a module that runs before this one."""
        return self.input("stream")

    @property
    def y(self) -> fx.Node:
        """The site's output; assign to it to change what the site computes."""
        node = self._output.args[0]
        assert isinstance(node, fx.Node)
        return node

    @y.setter
    def y(self, node: fx.Node) -> None:
        self._output.args = (node,)

    @property
    def weight(self) -> fx.Node:
        """The base's weight as a matrix (out, in)."""
        return self.kind.matrix(self, self.const("weight"))

    def apply(
        self, matrix: fx.Node, x: fx.Node | None = None, bias: fx.Node | None = None
    ) -> fx.Node:
        """The site's own map, of x or what was made of it, by another matrix (rows, in)."""
        return self.kind.apply(self, self.x if x is None else x, matrix, bias)

    def mix(self, h: fx.Node, matrix: fx.Node, bias: fx.Node | None = None) -> fx.Node:
        """Features h mapped by a matrix (rows, features), place by place."""
        return self.kind.mix(self, h, matrix, bias)

    def scale_output(self, h: fx.Node, vector: fx.Node) -> fx.Node:
        """H times a vector of one factor an output feature."""
        return self.mul(h, self.kind.along_output(self, vector))

    def scale_input(self, x: fx.Node, vector: fx.Node) -> fx.Node:
        """The input x times a vector of one factor an input feature."""
        return self.mul(x, self.kind.along_input(self, vector))

    def change_input(self, change: Callable[[fx.Node], fx.Node]) -> None:
        """Makes all of the site see `change(x)`, in the dtype of x, in the place of x."""
        users = list(self.x.users)
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(first):
            changed = self.type_as(change(self.x), self.x)
        for user in users:
            user.replace_input_with(self.x, changed)

    def cast_input(self, like: fx.Node) -> fx.Node:
        """X in the dtype of a parameter; ids stay as they are."""
        return self.x if isinstance(self.kind, EmbeddingKind) else self.type_as(self.x, like)

    def down(
        self, name: str, rank: int, distribution: Distribution = "zeros", scale: float = 1.0
    ) -> fx.Node:
        """A new matrix (rank, in), stored as PEFT stores it at this kind of site."""
        shape = self.kind.down(rank, self.site.shape)
        parameter = self.parameter(name, shape, distribution, scale)
        return self.kind.down_matrix(self, parameter, self.site.shape)

    def up(
        self, name: str, rank: int, distribution: Distribution = "zeros", scale: float = 1.0
    ) -> fx.Node:
        """A new matrix (out, rank), stored as PEFT stores it at this kind of site."""
        shape = self.kind.up(rank, self.site.shape)
        parameter = self.parameter(name, shape, distribution, scale)
        return self.kind.up_matrix(self, parameter, self.site.shape)

    def parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        distribution: Distribution = "zeros",
        scale: float = 1.0,
        start: Constant | None = None,
    ) -> fx.Node:
        """A new trainable fp32 constant, drawn from a distribution or taken from the given tensors.

        Args:
            name: As in PEFT's files, e.g. `lora_A.weight`; the adapter's name goes after its first
                part, as in a live PEFT model: `lora_A.default.weight`.
            shape: Its shape, which a given tensor must have.
            distribution: Its start values.
            scale: Of a gaussian, the standard deviation; of `full`, the value.
            start: Start values of its own, such as ones derived from the weight.
        """
        local = local_name(name, self.adapter)
        if self.given is None:
            constant = start or Initial(
                self.site.name(local), Spec(shape, torch.float32), distribution, self.seed, scale
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

    def share(
        self, name: str, start: Constant | None = None, *, trained: bool = False, saved: bool = True
    ) -> fx.Node:
        """A constant that sites of the adapter share.

        Args:
            name: As in PEFT's files; of a frozen one without a site.
            start: Its values, unless they are given, here or by the method's `common`.
            trained: Whether it is trained, and kept with the first site that has it.
            saved: Whether it is a part of PEFT's files.
        """
        local = local_name(name, self.adapter)
        own = (self.given or {}).get(local, start)
        if name not in self.shared:
            assert own is not None
            self.shared[name] = own
        self.created[local] = self.shared[name]
        if trained:
            self.common.add(local)
        else:
            self.frozen[local] = name if saved else None
        return self.const(local)

    def tie(self, name: str, adapter: str) -> None:
        """Makes a parameter one with that of another adapter, where this site has that.

        A given one has to be equal to it already.
        """
        own, other = local_name(name, self.adapter), local_name(name, adapter)
        if other not in self.bound:
            return
        if self.given is None or value(self.given[own]).equal(value(self.bound[other])):
            self.created[own] = self.bound[other]
            self.ties[own] = other

    def hold(self, name: str, constant: Constant) -> fx.Node:
        """A constant that is a part of the method and not of its files, such as an index."""
        local = local_name(name, self.adapter)
        self.held[local] = constant
        return self.const(local)

    def rebind(self, local: str, constant: Constant) -> None:
        """Gives one of the base's own tensors another value, as a start that takes from it does."""
        self.rebound[local] = constant

    def dropout(self, name: str, p: float, x: fx.Node) -> fx.Node:
        """`x` through dropout in training; a module of its own, so that train and eval reach it."""
        if p == 0:
            return x
        local = local_name(name, self.adapter)
        self.dropouts[local] = p
        return self.graph.call_module(local, (x,))

    def add_to_output(self, branch: fx.Node) -> None:
        """Adds a branch to y, in the wider of their dtypes; several are summed, then cast once."""
        if self.times != 1:
            branch = self.mul(branch, self.times)
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
