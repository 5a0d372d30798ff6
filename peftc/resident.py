"""Adapters at the run time of a compiled model: read once, padded to one rank, and handed over.

Beside the linear layers that have a slot a library computes y + B(A(x)), and takes A and B as it
takes any weight. The rank may vary from call to call; within one adapter, slots of a lower rank are
filled up with zeros. The scale is in B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc.calling import Tensors
from peftc.checkpoint import PEFT_PREFIX, contained, read_json
from peftc.errors import (
    SAVE_AGAIN,
    AdapterError,
    InputError,
    PeftcError,
    did_you_mean,
    raise_all,
)
from peftc.patterns import pattern_key
from peftc.reading import tensors

ROWS, SWAP = "rows", "swap"
CANONICAL = "make a plain LoRA of it: peftc export … --format peft --canonical"
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # starts that are of a changed base
TENSOR = re.compile(r"(.*)\.lora_([AB])\.weight$")


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        name: Of its directory or file.
        rank: Of all its slots.
        tensors: A (rank, in) and B (out, rank) of every slot, fp32, by their names.
    """

    name: str
    rank: int
    tensors: Mapping[str, Tensor]


class Slots:
    """Where a compiled model takes adapters.

    Args:
        path: Its directory.
        told: What the manifest says of them; None where it takes none.

    Attributes:
        sites: The in and out features of each layer with a slot.
        published: The files of adapters in the directory, by name.
        rows: Whether each row of a batch may have its own.
        active: The adapter of all rows, or of each.
    """

    def __init__(self, path: Path, told: Mapping[str, Any] | None) -> None:
        self.path, self.told = path, told or {}
        self.sites: dict[str, tuple[int, int]] = {
            site: (wide, high) for site, (wide, high) in self.told.get("slots", {}).items()
        }
        self.published: dict[str, str] = self.told.get("published", {})
        self.rows = self.told.get("mode") == ROWS
        self.base = self._padded("base", {}, 1) if self.sites else Adapter("base", 0, {})
        self.active: list[Adapter] = [self.base]

    @property
    def tensor_names(self) -> list[str]:
        """What the library calls A and B."""
        return [name for site in self.sites for name in names_of(site)]

    def choose(self, which: Any) -> None:
        """Puts an adapter on, or one for each row, as `Runtime.swap` takes them.

        Raises:
            AdapterError: It does not fit.
        """
        several = isinstance(which, Sequence) and not isinstance(which, str)
        if several and not (self.rows and which):
            raise AdapterError(
                "the library takes one adapter for a whole batch",
                where=str(self.path),
                fix="export it with --adapters rows, or name one",
            )
        self.active = [self._adapter(one) for one in (which if several else [which])]

    def tensors(self, batch: int) -> Tensors:
        """What libraries are given for a batch with the adapters that are on."""
        if not self.rows:
            return dict(self.active[0].tensors)
        rows = self.active if len(self.active) > 1 else self.active * batch
        rank = max(adapter.rank for adapter in rows)
        wide = {id(a): self._padded(a.name, a.tensors, rank).tensors for a in rows}
        return {name: torch.stack([wide[id(a)][name] for a in rows]) for name in self.tensor_names}

    def misfits(self, batch: int | None) -> list[PeftcError]:
        """An error where adapters were chosen for another number of rows."""
        if len(self.active) < 2 or batch in (None, len(self.active)):
            return []
        return [
            InputError(
                f"has {batch} rows, and adapters were chosen for {len(self.active)}",
                where="input input_ids",
                fix="choose one for each row: swap([…])",
            )
        ]

    def read(self, which: str | Path) -> Adapter:
        """An adapter of a name or a directory.

        Raises:
            AdapterError: There is none, it is no LoRA, or does not fit (all that is wrong).
        """
        if not self.sites:
            raise AdapterError(
                "takes no adapters",
                where=str(self.path),
                fix="export it with --adapters swap, or merge the adapter",
            )
        if str(which) in self.published:
            file = contained(self.path, self.published[str(which)])
            return self._fitting(str(which), _load(file), lambda site, rank: 1.0, str(file))
        folder = Path(which)
        if not (folder / "adapter_config.json").is_file():
            raise AdapterError(
                "is neither an adapter that was published with this model nor PEFT's directory",
                where=str(which),
                fix=did_you_mean(str(which), self.published)
                if self.published
                else "name the directory that holds adapter_config.json",
            )
        config = read_json(folder / "adapter_config.json", "a PEFT adapter")
        raise_all(_unlike_lora(config, str(folder)))
        stored = {
            name.removeprefix(PEFT_PREFIX): tensor
            for name, tensor in _load(folder / "adapter_model.safetensors").items()
        }
        return self._fitting(folder.name, stored, _scales(config), str(folder))

    def _adapter(self, which: Any) -> Adapter:
        if which is None:
            return self.base
        if not isinstance(which, Adapter):
            return self.read(which)
        if which.tensors.keys() != self.base.tensors.keys():
            raise AdapterError(
                "was read for another model", where=which.name, fix="read it again: load_adapter"
            )
        return which

    def _fitting(self, name: str, stored: Tensors, scale: Any, where: str) -> Adapter:
        """An adapter of a file's tensors, if they fit."""
        found: dict[str, dict[str, Tensor]] = {}
        errors: list[PeftcError] = []
        for key, tensor in stored.items():
            match = TENSOR.match(key)
            if match is None:
                errors.append(_misfit(key, where, "is no A or B of a LoRA", CANONICAL))
            elif match[1] not in self.sites:
                fix = did_you_mean(match[1], self.sites)
                errors.append(_misfit(key, where, "is of a layer that has no slot here", fix))
            else:
                found.setdefault(match[1], {})[match[2]] = tensor
        for site, pair in found.items():
            errors += self._misshapen(site, pair, where)
        if not found and not errors:
            errors.append(AdapterError("holds no LoRA", where=where, fix=SAVE_AGAIN))
        raise_all(errors[:5])
        tensors: Tensors = {}
        for site, pair in found.items():
            a, b = names_of(site)
            try:
                factor = scale(site, pair["A"].shape[0])
            except (TypeError, ValueError, ArithmeticError) as error:
                raise _misfit(site, where, f"has no scale: {error}", SAVE_AGAIN) from error
            tensors |= {a: pair["A"].float(), b: pair["B"].float() * factor}
        rank = max(pair["A"].shape[0] for pair in found.values())
        return self._padded(name, tensors, rank)

    def _misshapen(self, site: str, pair: Tensors, where: str) -> list[PeftcError]:
        wide, high = self.sites[site]
        if pair.keys() != {"A", "B"}:
            return [_misfit(site, where, "has only one of A and B", SAVE_AGAIN)]
        a, b = pair["A"], pair["B"]
        if a.dim() != 2 or list(b.shape) != [high, a.shape[0]] or a.shape[1] != wide:
            had = f"A {list(a.shape)} and B {list(b.shape)}"
            taken = f"the slot takes A [rank, {wide}] and B [{high}, rank]"
            return [_misfit(site, where, f"has {had}, and {taken}", "use one of this base model")]
        if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
            return [_misfit(site, where, "holds a NaN or an infinity", "train it again")]
        return []

    def _padded(self, name: str, tensors: Mapping[str, Tensor], rank: int) -> Adapter:
        """An adapter whose slots all have one rank."""
        full: Tensors = {}
        zeros: dict[tuple[int, int], Tensor] = {}  # which slots of one shape share
        for site, (wide, high) in self.sites.items():
            a, b = names_of(site)
            for key, shape in ((a, (rank, wide)), (b, (high, rank))):
                given = tensors.get(key)
                if given is None:
                    full[key] = zeros.setdefault(shape, torch.zeros(shape))
                elif tuple(given.shape) == shape:
                    full[key] = given.contiguous()
                else:
                    full[key] = torch.zeros(shape)
                    full[key][: given.shape[0], : given.shape[1]] = given
        return Adapter(name, rank, full)


def names_of(site: str) -> tuple[str, str]:
    """The names of a slot's A and B, which are PEFT's."""
    return f"{site}.lora_A.weight", f"{site}.lora_B.weight"


def _misfit(key: str, where: str, what: str, fix: str) -> AdapterError:
    return AdapterError(f"{key} {what}", where=where, fix=fix)


def _load(file: Path) -> Tensors:
    if not file.exists():
        raise AdapterError("is missing", where=str(file), fix=SAVE_AGAIN)
    return tensors(file)


def _unlike_lora(config: Mapping[str, Any], where: str) -> list[PeftcError]:
    """What of an adapter is more than A and B beside linear layers."""
    kind, start = config.get("peft_type"), str(config.get("init_lora_weights", True))
    more = {
        f"is of type {kind}": kind != "LORA",
        "scales weights too (DoRA)": bool(config.get("use_dora")),
        "trains biases too": config.get("bias", "none") != "none" or bool(config.get("lora_bias")),
        "trains whole modules too": bool(config.get("modules_to_save")),
        "trains tokens too": bool(config.get("trainable_token_indices")),
        f"starts from a part of the base's weights ({start})": start.startswith(CHANGES_BASE),
    }
    return [
        AdapterError(f"{what}, and a slot takes plain LoRA", where=where, fix=CANONICAL)
        for what, wrong in more.items()
        if wrong
    ]


def _scales(config: Mapping[str, Any]) -> Any:
    """The scale of a site's LoRA of a rank: α/r, or α/√r, as PEFT has it."""
    patterns = config.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}

    def scale(site: str, rank: int) -> float:
        key = pattern_key(patterns, site)
        alpha = config.get("lora_alpha", 8) if key is None else patterns[key]
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale
