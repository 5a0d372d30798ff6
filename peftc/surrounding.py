"""Surrounding: a module that stays what it is, and computes a graph around what it gives.

Its class is changed on the spot, so that it is the same object with the same parameters under the
same names, and code that knows its class still does. Where a graph asks for a stream (the first
input of another module), that module's class is changed too, to hand over what it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from peftc import graphs
from peftc.functions import function_of

_HEARD, _TOLD = "_peftc_heard", "_peftc_told"  # names in a module's state of what it hears, tells


class Stream:
    """What flowed into one module, until another one takes it; a copy of it is empty."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Stream, ()


def surround(module: nn.Module, graph: fx.Graph) -> None:
    """Makes a module compute a graph of its first input `x` and its own (first) output `y`."""
    _become(module, graphs.dump(graph))


def listen(entry: nn.Module, module: nn.Module) -> None:
    """Makes `entry`'s first input the `stream` of a module that runs after it."""
    stream = entry.__dict__.setdefault(_TOLD, Stream())
    module.__dict__[_HEARD] = stream
    if entry is not module:
        _become(entry, None)


def _become(module: nn.Module, rows: list[Any] | None) -> None:
    cls = type(module)
    plain, before = _made.get(cls, (cls, None))
    module.__class__ = _class(plain, rows or before)


_classes: dict[tuple[type[nn.Module], fx.Graph | None], type[nn.Module]] = {}
_made: dict[type[nn.Module], tuple[type[nn.Module], list[Any] | None]] = {}


def _class(cls: type[nn.Module], rows: list[Any] | None) -> type[nn.Module]:
    """The subclass of a module's class that computes a graph around it, and tells what it takes."""
    key = cls, graphs.restore(rows) if rows else None
    if key not in _classes:
        around = _around(cls, key[1]) if key[1] else None

        @functools.wraps(cls.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            x = _first(args, kwargs)
            if _TOLD in self.__dict__:
                self._peftc_told.value = x
            return around(self, x, args, kwargs) if around else cls.forward(self, *args, **kwargs)

        def reduce(self: Any) -> tuple[Any, ...]:
            return _rebuild, (cls, rows), self.__dict__

        members = {"forward": forward, "__reduce__": reduce, "__module__": cls.__module__}
        made = type(cls.__name__, (cls,), members)
        _classes[key] = made
        _made[made] = cls, rows
    return _classes[key]


def _around(cls: type[nn.Module], graph: fx.Graph) -> Callable[..., Any]:
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    function = function_of(graph)

    def run(self: Any, x: torch.Tensor, args: Any, kwargs: Mapping[str, Any]) -> Any:
        out = cls.forward(self, *args, **kwargs) if "y" in names else None
        given = {"x": x, "y": _first((out,), {})}
        if "stream" in names:
            heard = self._peftc_heard
            given["stream"], heard.value = heard.value, None
            if given["stream"] is None:
                raise RuntimeError("the module whose input is this one's stream did not run before")
        return _replaced(out, given["y"], function(self, *(given[name] for name in names)))

    return run


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first tensor among a call's arguments, or in what a module returned."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, (tuple, list)) and (found := _first(tuple(value), {})) is not None:
            return found
        if isinstance(value, Mapping) and (found := _first((), value)) is not None:
            return found
    return None


def _replaced(out: Any, old: torch.Tensor | None, new: torch.Tensor) -> Any:
    """What a module returned, with one of its tensors replaced."""
    if out is old:
        return new
    if isinstance(out, Mapping):
        items: Any = {key: _replaced(item, old, new) for key, item in out.items()}
        return items if type(out) is dict else type(out)(**items)
    if isinstance(out, (tuple, list)):
        parts = [_replaced(item, old, new) for item in out]
        return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)
    return out


def _rebuild(cls: type[nn.Module], rows: list[Any] | None) -> nn.Module:
    made = _class(cls, rows)
    return made.__new__(made)
