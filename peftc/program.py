"""The program: a model's sites and constants, and the journal of what was done to them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import fx

from peftc import graphs
from peftc.checkpoint import PEFT_PREFIX
from peftc.constants import Constant, Derived, Packed, derive, widened
from peftc.errors import SAVE_AGAIN, AdapterError, PeftcError, raise_all
from peftc.graphs import Builder, Spec
from peftc.kinds import ExpertsKind
from peftc.layout import element, rows
from peftc.safetensors_file import SafetensorsFile
from peftc.sites import Site, SiteEditor

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftc.attention import Attention
    from peftc.roles import Roles


PROMPTS = "prompt_encoder"  # the module of a live model that has what belongs to no site
MIX = "adapter_mix.rows"  # the table (rows, adapters) of a site that mixes adapters


@dataclass(frozen=True)
class OutputFile:
    """One weight file of the source's layout: its tensors by their stored names, in order."""

    name: str
    tensors: tuple[str, ...]
    metadata: Mapping[str, str]
    original: SafetensorsFile | None = None


class Source(Protocol):
    """Where a program came from, and how its output is laid out."""

    @property
    def name(self) -> str | None:
        """The path or hub id by which the source is found again."""

    @property
    def architectures(self) -> tuple[str, ...]:
        """The names of the model's classes."""

    def instantiate(self, dtype: torch.dtype | None) -> nn.Module:
        """The live, unmodified model."""

    def skeleton(self) -> nn.Module:
        """The same on the meta device, its weights unread; it may be shared, so copy it first."""

    def layout(self) -> list[OutputFile]:
        """The weight files to write."""

    def companions(self) -> dict[str, Path]:
        """Files to carry over as they are, by their names relative to the output."""

    def edited(self) -> dict[str, bytes]:
        """Files to write in the place of these, such as the config of another structure."""

    def pin(self) -> dict[str, Any]:
        """What identifies the source."""

    def roles(self) -> Roles | None:
        """Which modules a forward pass calls and what for, where that can be found out."""

    def attention(self) -> Attention | None:
        """Where it attends to its text, where that can be found out."""


class Schedule(Protocol):
    """What a method has a training loop do."""

    def loss(self, model: nn.Module) -> torch.Tensor | None:
        """What is added to the training loss, once an optimizer step."""

    def step(self, model: nn.Module, number: int) -> None:
        """What follows an optimizer step, before its gradients are cleared; the first is 1."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a run that goes on later needs to go on as it would have."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up what `state_dict` gave."""


class Injector(Protocol):
    """What `Program.inject` needs of a method (see `peftc.contract.Method`)."""

    @property
    def adapter(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def times(self) -> float: ...
    @property
    def prefixed(self) -> bool: ...
    @property
    def apart(self) -> str | None: ...
    def inject(self, site: SiteEditor) -> None: ...
    def settled(self, program: Program) -> Injector: ...
    def peft_config(self) -> dict[str, Any]: ...
    def common(self, program: Program, sites: Sequence[str]) -> dict[str, Constant]: ...
    def written(self, tensors: Mapping[str, Constant]) -> Mapping[str, Constant]: ...
    def enliven(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None: ...
    def schedule(self, program: Program, model: nn.Module, total_steps: int) -> Schedule | None: ...
    def withdraw(self, model: nn.Module) -> None: ...
    def trains(self, program: Program, sites: list[str]) -> list[str]: ...
    def infix(self, program: Program, fqn: str) -> str: ...
    def freezes(self, program: Program) -> Sequence[str]: ...


@dataclass(frozen=True)
class Adapter:
    """What one method added to a program.

    Attributes:
        config: PEFT's adapter_config.json.
        tensors: The name in PEFT's file of every tensor that belongs to it, and its name here.
        frozen: Which of them, by their names here, training leaves alone.
        sites: The names of the sites that it rewrote.
        method: What added it, by which it can be added to other graphs again.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, str]
    frozen: frozenset[str] = frozenset()
    sites: tuple[str, ...] = ()
    method: Injector | None = None

    @property
    def prefixed(self) -> bool:
        """Whether it puts virtual tokens before a sequence."""
        return self.method is not None and self.method.prefixed

    @property
    def prompts(self) -> dict[str, str]:
        """Its tensors that belong to the model as a whole, by their names without the adapter's."""
        own = f"{PROMPTS}.{self.name}."
        names = (fqn for fqn in self.tensors.values() if fqn.startswith(own))
        return {fqn.removeprefix(own): fqn for fqn in names}


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor that is a part of a live one.

    Attributes:
        leaf: The stored tensor.
        index: Which matrix of the stack, if the whole is one.
        low: Its first row in that matrix.
        high: Behind its last row.
    """

    leaf: Constant
    index: int | None
    low: int
    high: int


@dataclass(frozen=True)
class Unfolded:
    """A site as it was before it was folded: what the folded one must be equal to."""

    site: Site
    constants: Mapping[str, Constant]


@dataclass(frozen=True)
class Entry:
    """One line of the journal."""

    title: str
    options: Mapping[str, Any]
    effect: str
    sites: int
    modified: bool
    measured: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Program:
    """A model under compilation. It is never changed: a pass returns another one.

    Attributes:
        source: Where it came from.
        sites: The places that may be rewritten, by name, in the model's order.
        constants: Every tensor of the model by its name in the live model.
        captured: The constants as they were captured; what differs from them was rewritten.
        stored: The name in the live model of each stored tensor, by its name in the checkpoint;
            several may be parts of one, as the matrices of fused experts are.
        parts: How such a part is taken from the whole: a graph over the constant `whole`.
        aliases: For each tied tensor, the name of the tensor that it shares memory with.
        modules: The names of all modules, to tell a wrong name from a wrong kind of module.
        head: The name of the output head, which `all-linear` leaves alone.
        embedding: The name of the embedding that token ids go into.
        context: How many positions the model has, where its config says so.
        adapters: What methods added, by name.
        unfolded: For each folded site, what it was.
        mixed: The adapters among which each row of a batch chooses, if any: the columns of `MIX`.
        fused: The sites whose LoRA is to be computed with their quantized weight by one operator.
        journal: What was done.
    """

    source: Source
    sites: Mapping[str, Site]
    constants: Mapping[str, Constant]
    captured: Mapping[str, Constant]
    stored: Mapping[str, str]
    parts: Mapping[str, Part] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    head: str | None = None
    embedding: str | None = None
    context: int | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    unfolded: Mapping[str, Unfolded] = field(default_factory=dict)
    mixed: tuple[str, ...] = ()
    fused: frozenset[str] = frozenset()
    journal: tuple[Entry, ...] = ()

    def bindings(self, site: Site) -> dict[str, Constant]:
        """The constants of a site by their names relative to it."""
        names = graphs.constant_names(site.graph)
        return {name: self.constants[site.name(name)] for name in names}

    def plain_bindings(self, site: Site) -> dict[str, Constant]:
        """The constants that a site had when it was captured."""
        names = graphs.constant_names(site.plain)
        return {name: self.constants[site.name(name)] for name in names}

    def specs(self, site: Site) -> dict[str, Spec]:
        """Shapes and dtypes of a site's constants."""
        return {name: constant.spec for name, constant in self.bindings(site).items()}

    def weight_of(self, site: Site) -> Constant | None:
        """The weight of a site's own map, where the site has one."""
        return self.constants[site.name("weight")] if site.kind.opened else None

    @property
    def packed(self) -> dict[str, Packed]:
        """The quantized weights, by the names of their sites."""
        return {
            fqn: weight
            for fqn, site in self.sites.items()
            if isinstance(weight := self.weight_of(site), Packed)
        }

    def rewrite(
        self,
        sites: Iterable[Site] = (),
        constants: Mapping[str, Constant] | None = None,
        **changes: Any,
    ) -> Program:
        """A program with some sites and constants replaced or added."""
        return replace(
            self,
            sites={**self.sites, **{site.fqn: site for site in sites}},
            constants={**self.constants, **(constants or {})},
            **changes,
        )

    def inject(
        self,
        method: Injector,
        names: Sequence[str],
        given: Mapping[str, Mapping[str, Constant]] | None = None,
        common: Mapping[str, Constant] | None = None,
    ) -> Program:
        """A program whose named sites carry what a method adds.

        Args:
            method: Says what it adds to one site.
            names: The sites.
            given: Trained tensors for each site, by their names relative to it.
            common: Given tensors that all sites share, by their names in PEFT's file.

        Raises:
            AdapterError: Given tensors are missing, have other shapes, or are not asked for.
        """
        sites: list[Site] = []
        constants: dict[str, Constant] = {}
        tensors: dict[str, str] = {}
        frozen: set[str] = set()
        commons: dict[str, str] = {}
        aliases = dict(self.aliases)
        errors: list[PeftcError] = []
        shared = {**method.common(self, names), **(common or {})}
        method = method.settled(self)
        for name in names:
            trained = None if given is None else given[name]
            site = self.sites[name]
            bound = {**self.bindings(site), **self.plain_bindings(site)}
            editor = SiteEditor(
                site, method.adapter, method.seed, trained, shared, bound, method.times
            )
            try:
                method.inject(editor)
            except AdapterError as error:
                errors.append(error)
                continue
            for extra in sorted(set(trained or ()) - set(editor.created)):
                errors.append(
                    AdapterError(
                        f"{extra} is not part of this method",
                        where=name,
                        fix=SAVE_AGAIN,
                    )
                )
            sites.append(editor.finish())
            for local, constant in editor.created.items():
                fqn = site.name(local)
                constants[fqn] = constant
                if local in editor.frozen:
                    frozen.add(fqn)
                    if (kept := editor.frozen[local]) is not None:
                        tensors.setdefault(f"base_model.{kept}", fqn)
                elif local in editor.common and local in commons:
                    aliases[fqn] = commons[local]
                else:
                    key = _peft_key(peft_path(self, names, name), local, method.adapter)
                    tensors[key] = commons[local] = fqn
            constants |= {site.name(local): c for local, c in editor.held.items()}
            frozen |= {site.name(local) for local in editor.held}
            constants |= {site.name(local): c for local, c in editor.rebound.items()}
            for local, other in editor.ties.items():
                owner = site.name(other)
                aliases[site.name(local)] = aliases.get(owner, owner)
        if method.prefixed:
            own_names = {key: f"{PROMPTS}.{method.adapter}.{key}" for key in shared}
            constants |= {own_names[key]: constant for key, constant in shared.items()}
            tensors |= own_names
        errors += [
            AdapterError(
                f"is trained by the adapter {other.name!r} already",
                where=own,
                fix="attach one of the two, or merge the first before",
            )
            for own in method.trains(self, list(names))
            for other in self.adapters.values()
            if own in other.tensors.values()
        ]
        raise_all(errors)
        for own in method.trains(self, list(names)):
            for alias in self.names_of(own):
                owner, _, leaf = alias.rpartition(".")
                infix = "base_layer." if owner in names else method.infix(self, own)
                tensors[f"{PEFT_PREFIX}{owner}.{infix}{leaf}"] = own
        adapter = Adapter(
            method.adapter, method.peft_config(), tensors, frozenset(frozen), tuple(names), method
        )
        adapters = {**self.adapters, adapter.name: adapter}
        for name in method.freezes(self):
            held = frozenset(self.adapters[name].tensors.values())
            adapters[name] = replace(adapters[name], frozen=adapters[name].frozen | held)
        return self.rewrite(sites, constants, adapters=adapters, aliases=aliases)

    def without(self, fqns: Iterable[str]) -> Program:
        """A program without these constants; an adapter that is left with none is gone."""
        gone, stored = set(fqns), set(self.stored.values())
        adapters = {}
        for adapter in self.adapters.values():
            left = {key: fqn for key, fqn in adapter.tensors.items() if fqn not in gone}
            if any(fqn not in stored for fqn in left.values()):
                adapters[adapter.name] = replace(adapter, tensors=left)
        kept = {fqn: c for fqn, c in self.constants.items() if fqn not in gone}
        aliases = {tied: owner for tied, owner in self.aliases.items() if tied not in gone}
        return replace(self, constants=kept, adapters=adapters, aliases=aliases)

    def written(self, key: str) -> Constant:
        """What is to be written for a stored tensor, by its name in the checkpoint."""
        fqn, part = self.stored[key], self.parts.get(key)
        if part is None:
            return self.constants[fqn]
        whole = self.constants[fqn]
        return part_of(whole, part) if self.touched(fqn) else part.leaf

    def touched(self, fqn: str) -> bool:
        """Whether a tensor is not what was captured."""
        return self.constants[fqn] is not self.captured.get(fqn)

    def site_of(self, fqn: str) -> tuple[str | None, str]:
        """The site that a tensor or module belongs to, and its name relative to it."""
        parts = fqn.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            if (head := ".".join(parts[:cut])) in self.sites:
                return head, ".".join(parts[cut:])
        return None, fqn

    def tensors_of(self, modules: Iterable[str]) -> list[str]:
        """The stored tensors of some modules, by their names in the live model."""
        owners = tuple(f"{module}." for module in modules)
        names = dict.fromkeys((*self.stored.values(), *self.aliases))
        return [fqn for fqn in names if owners and fqn.startswith(owners)]

    def names_of(self, fqn: str) -> list[str]:
        """All names of a tensor: its own and those that are tied to it."""
        owner = self.aliases.get(fqn, fqn)
        return [owner, *(tied for tied, other in self.aliases.items() if other == owner)]

    @property
    def trainable(self) -> set[str]:
        """The names of the tensors that training changes."""
        return {
            fqn
            for adapter in self.adapters.values()
            for fqn in adapter.tensors.values()
            if fqn not in adapter.frozen
        }

    @property
    def rewritten(self) -> list[str]:
        """The stored tensors, by their names in the model, that passes changed and none trains."""
        trained = self.trainable
        return [f for f in self.stored.values() if self.touched(f) and f not in trained]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that determines the output: graphs, constants, adapters."""
        digest = hashlib.sha256()
        for fqn in sorted(self.sites):
            site = self.sites[fqn]
            digest.update(f"{fqn}\n{graphs.text(site.graph)}\n{dict(site.dropouts)}\n".encode())
        for fqn in sorted(self.constants):
            digest.update(f"{fqn} {self.constants[fqn].key}\n".encode())
        digest.update(repr(sorted(self.fused)).encode())
        digest.update(
            repr(sorted((a.name, sorted(a.tensors)) for a in self.adapters.values())).encode()
        )
        for name, content in sorted(self.source.edited().items()):
            digest.update(f"{name}\n".encode() + content)
        return digest.hexdigest()


def part_of(whole: Constant, part: Part) -> Constant:
    """A part of a constant, of which nothing but that part is evaluated."""
    inputs: Mapping[str, Constant] = {"whole": whole}
    graph = _itself()
    if isinstance(whole, Derived):
        graph, inputs = whole.graph, whole.inputs
    if part.index is not None:
        graph = _element(graph, part.index)
    names = graphs.constant_names(graph)
    build = Builder(graphs.copy(graph))
    output = next(node for node in build.graph.nodes if node.op == "output")
    specs = graphs.propagate(build.graph, {name: widened(inputs[name].spec) for name in names})
    build.graph.inserting_before(output)
    taken = rows(build, output.args[0], part.low, part.high, lambda n: (specs[n].shape or (1,))[0])
    output.args = (taken,)
    return derive(build.graph, inputs, whole.spec.dtype)


@cache
def _itself() -> fx.Graph:
    build = Builder()
    build.graph.output(build.const("whole"))
    return graphs.intern(build.graph)


@cache
def _element(graph: fx.Graph, index: int) -> fx.Graph:
    """The graph of one matrix of a stack, once for all layers that share the stack's graph."""
    build = Builder(graphs.copy(graph))
    output = next(node for node in build.graph.nodes if node.op == "output")
    build.graph.inserting_before(output)
    output.args = (element(build, output.args[0], index),)
    return graphs.intern(build.graph)


def peft_path(program: Program, names: Sequence[str], fqn: str) -> str:
    """The module under which PEFT keeps a site's tensors.

    Fused experts have one module and several parameters: PEFT wraps it once for each, and those
    that come later in the module lie further out.
    """
    site = program.sites[fqn]
    if not isinstance(site.kind, ExpertsKind):
        return fqn
    owner = fqn.rpartition(".")[0]
    members = [n for n in program.sites if n.rpartition(".")[0] == owner and n in set(names)]
    return owner + ".base_layer" * (len(members) - 1 - members.index(fqn))


def _peft_key(site: str, local: str, adapter: str) -> str:
    head, _, tail = local.partition(f".{adapter}")
    return f"{PEFT_PREFIX}{site}.{head}{tail}"
