"""The memory of a step over time, of which alike layers are run only a few.

How far the memory rises in a layer, and what stays, is noted in both directions. Layers of one kind
take alike, but for the first, whose input may need no gradient, and the last; so four of a kind are
run, and the third stands for all between. The whole model's memory is then played from the notes.
Where that could be wrong `Unlike` is raised, and the whole model is to be run.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftc.repeated import Stack, Unlike, shorten

_FIRST = 3  # layers of a kind that are run, and the last one; the third stands for the rest


Layer = tuple[str | None, int]  # its list's name, and its place among those that are run


@dataclass(frozen=True)
class Span:
    """A stretch of time.

    Attributes:
        stack: The list of layers one of which runs; None outside of all.
        backward: Whether its gradients are computed.
        place: Which layer of those that are run.
        rise: Bytes by which the memory goes up at most, from the start.
        net: Bytes by which it is up at the end.
        late: Outside of all layers, bytes of theirs that end only then, by list and place.
    """

    stack: str | None
    backward: bool
    place: int
    rise: int
    net: int
    late: Mapping[Layer, int] = field(default_factory=dict)


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operators make, as long as they live.

    Attributes:
        live: Bytes that live now.
        spans: What was counted, from one `mark` to the next.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self._start = self._peak = 0
        self._here: tuple[str | None, bool, int] = None, False, 0
        self._late: Counter[Layer] = Counter()
        self.spans: list[Span] = []
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def watch(self, tensor: torch.Tensor) -> None:
        """Leaves a tensor out that was there before."""
        self._known.add(tensor.untyped_storage())

    def mark(self, stack: str | None = None, backward: bool = False, place: int = 0) -> None:
        """A span ends, and one of this place begins."""
        rise, net = self._peak - self._start, self.live - self._start
        self.spans.append(Span(*self._here, rise, net, self._late))
        self._here, self._late = (stack, backward, place), Counter()
        self._start = self._peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operator, and counts what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self._peak = max(self._peak, self.live)
        weakref.finalize(storage, self._free, size, (self._here[0], self._here[2]))

    def _free(self, size: int, layer: Layer) -> None:
        self.live -= size
        if self._here[0] is None:
            self._late[layer] += size


def shortened(model: nn.Module) -> tuple[list[Stack], dict[nn.Parameter, nn.Parameter]]:
    """Leaves out of a model the layers that others stand for.

    Returns:
        What was left out; and for each parameter that is gone, the one that stands for it.
    """
    lists = {n: [*m] for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    stacks = shorten(model, _FIRST, last=True)
    standing: dict[nn.Parameter, nn.Parameter] = {}
    for stack in stacks:
        layers = lists[stack.path]
        for layer, place in zip(layers, stack.stands, strict=True):
            other = layers[stack.kept[place]]
            standing |= zip(layer.parameters(), other.parameters(), strict=True)
    return stacks, standing


def listen(meter: Meter, model: nn.Module, stacks: Sequence[Stack]) -> None:
    """Has the layers of shortened lists mark their begin, and their gradients' begin and end."""
    for stack in stacks:
        layers = [*model.get_submodule(stack.path).children()]
        for place, layer in enumerate(layers):
            _listen(meter, layer, stack.path, place, place == len(layers) - 1)


def _listen(meter: Meter, layer: nn.Module, stack: str, place: int, last: bool) -> None:
    """Around the whole call, where a hook would be within the checkpoint and be called again."""
    cls = type(layer)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (x := _trained((args, kwargs))) is not None and place == 0:
            x.register_hook(lambda _: meter.mark())  # type: ignore[no-untyped-call]
        meter.mark(stack, False, place)
        out = cls.__call__(self, *args, **kwargs)
        if (y := _trained(out)) is not None:
            y.register_hook(  # type: ignore[no-untyped-call]
                lambda _: meter.mark(stack, True, place)
            )
        if last:
            meter.mark()
        return out

    layer.__class__ = type(cls.__name__, (cls,), {"__call__": call})


def _trained(values: Any) -> torch.Tensor | None:
    """The first of the tensors in a value that have gradients."""
    tensors = (x for x in tree_leaves(values) if isinstance(x, torch.Tensor))
    return next((x for x in tensors if x.requires_grad), None)


def played(spans: Sequence[Span], stacks: Sequence[Stack]) -> list[Span]:
    """The spans of the whole model.

    Raises:
        Unlike: The layers are not run each once and one behind the other, or of those of one kind
            only some have gradients.
    """
    known = {stack.path: stack for stack in stacks}
    times: Counter[Layer] = Counter(
        (stack.path, place) for stack in stacks for place in stack.stands
    )
    whole: list[Span] = []
    seen: set[tuple[str, bool]] = set()
    for (path, backward), group in groupby(spans, lambda span: (span.stack, span.backward)):
        found = list(group)
        if path is None:
            for span in found:
                more = sum(size * (times[at] - 1) for at, size in span.late.items() if times[at])
                whole.append(replace(span, net=span.net - more))
            continue
        stack, places = known[path], [span.place for span in found]
        every = range(len(stack.kept))
        wanted = [*reversed(every[-len(places) :])] if backward else [*every]
        halved = any(len({place in places for place in kind}) > 1 for kind in stack.alike)
        if places != wanted or halved or (path, backward) in seen:
            raise Unlike
        seen.add((path, backward))
        by_place = dict(zip(places, found, strict=True))
        order = reversed(stack.stands) if backward else stack.stands
        whole += [by_place[place] for place in order if place in by_place]
    return whole


def peak(spans: Sequence[Span]) -> int:
    """The most that lives at once."""
    live = most = 0
    for span in spans:
        most = max(most, live + span.rise)
        live += span.net
    return most
