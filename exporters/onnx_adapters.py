"""Adapters for the slots of ONNX graphs: low-rank branches as onnxruntime's `.onnx_adapter` files.

What an adapter adds is read off the folded graphs, so that LoRA, AdaLoRA, VeRA and several of them
at once are the same here: B·A, the scale in B, ranks side by side.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from peftc.artifact import Staging, digest, key_of
from peftc.checkpoint import within
from peftc.constants import Held
from peftc.deltas import deltas, deviation, untold
from peftc.errors import (
    AdapterError,
    ArtifactError,
    PeftcError,
    ProofError,
    did_you_mean,
)
from peftc.evaluate import single_threaded, value
from peftc.exporters.onnx_lowering import ONNX_TYPES
from peftc.exporters.onnx_needs import onnxruntime
from peftc.exporters.onnx_slots import Slot
from peftc.factors import Delta, product
from peftc.files import opened
from peftc.program import Program
from peftc.targets import LINEARS

SUFFIX = ".onnx_adapter"
BOUND = {torch.float32: 1e-5}  # of ΔW, of each site; other dtypes: two spacings, A's and B's
SHOWN = 5  # how many of many alike errors are spelled out
Branches = Mapping[str, Delta]  # what an adapter adds, by site


def no_slot(program: Program, fqn: str) -> PeftcError:
    """An error for a site of a kind that has no slots."""
    return AdapterError(
        f"is a site of kind {program.sites[fqn].kind.name}, and slots are beside linear layers",
        where=fqn,
        fix="merge what changes it (--merge), or leave it out",
    )


def low_rank(program: Program) -> tuple[Branches, list[PeftcError]]:
    """What a program's adapters add together, by site, and what of it is no low-rank branch."""
    names = list(program.adapters)
    if errors := untold(program, names):
        return {}, errors
    found, refused = deltas(program)
    errors = [*refused[:SHOWN]]
    for fqn, delta in found.items():
        if program.sites[fqn].kind.name not in LINEARS:
            errors.append(no_slot(program, fqn))
        elif delta.bias is not None:
            errors.append(
                AdapterError(
                    "what the adapter adds changes the bias too, for which there is no slot",
                    where=fqn,
                    fix="merge it (--merge), or train it without a bias of its own",
                )
            )
        elif delta.factors is None:
            kinds = {str(program.adapters[name].config.get("peft_type")) for name in names}
            errors.append(
                AdapterError(
                    f"what the adapter ({', '.join(sorted(kinds))}) adds is no product of two "
                    "small matrices, as a slot takes them",
                    where=fqn,
                    fix="merge it (--merge), or make a LoRA of it first: --format peft --canonical",
                )
            )
    if not (found or errors):
        return {}, [ArtifactError("adds nothing", fix="train it, or leave it out")]
    return found, errors[:SHOWN]


def unfitted(branches: Iterable[str], slots: Iterable[str]) -> list[PeftcError]:
    """An error for the sites that an adapter changes and an existing base has no slot for."""
    known = list(slots)
    lacking = [fqn for fqn in branches if fqn not in known]
    if not lacking:
        return []
    kinds = ",".join(sorted({fqn.rpartition(".")[2] for fqn in lacking}))
    return [
        AdapterError(
            f"the base has no slot for {len(lacking)} of the layers that the adapter changes, such "
            f"as {lacking[0]}",
            fix=f"{did_you_mean(lacking[0], known)} Or export the base again, with slots for these "
            f"too: --slots {kinds}",
        )
    ]


def size(branches: Branches) -> int:
    """About the bytes that an adapter's files take, fp32."""
    pairs = [delta.factors for delta in branches.values() if delta.factors]
    return sum(factor.spec.nbytes for pair in pairs for factor in pair)


def base_fingerprint(files: Mapping[str, str]) -> str:
    """What an adapter's file is for: graphs and weights, by the hashes of their files."""
    kept = {
        name: blake3
        for name, blake3 in files.items()
        if "/" not in name and name.endswith((".onnx", ".safetensors"))
    }
    return key_of(sorted(kept.items()))


def write(
    stage: Staging, stem: str, branches: Branches, slots: Mapping[str, Slot], base: str
) -> dict[str, Any]:
    """Writes an adapter: one file, or one for each graph of the base that it goes into.

    Args:
        stage: Where.
        stem: The file's name without its ending.
        branches: What the adapter adds; every site has a slot.
        slots: The base's, by site.
        base: Its fingerprint, of which the file holds 31 bits as its model version.

    Returns:
        What the manifest says of it, the file of each graph among it.
    """
    graphs = sorted({graph for slot in slots.values() for graph in slot.graphs})
    tensors: dict[str, dict[str, torch.Tensor]] = {graph: {} for graph in graphs}
    ranks = []
    for fqn, delta in branches.items():
        slot = slots[fqn]
        with single_threaded():  # small tensors, for which threads cost more than they do
            up, down = _factors(delta)
        ranks.append(down.shape[0])
        for graph in slot.graphs if down.shape[0] else ():
            tensors[graph] |= {
                slot.down: down.t().to(slot.dtype).contiguous(),
                slot.up: up.t().to(slot.dtype).contiguous(),
            }
    if not any(ranks):
        raise ArtifactError("adds nothing", where=stem, fix="train it, or leave it out")
    files = {}
    for graph in graphs:
        if tensors[graph]:
            name = f"{stem}{SUFFIX}" if len(graphs) == 1 else f"{stem}.{graph}{SUFFIX}"
            files[f"{graph}.onnx"] = name
            _write(stage, name, tensors[graph], _version(base))
    return {"files": files, "sites": len(branches), "ranks": [min(ranks), max(ranks)]}


def _factors(delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, rank) and A (rank, in), without ranks that are nothing, as pruned ones are."""
    assert delta.factors is not None
    up, down = (value(factor).float() for factor in delta.factors)
    used = up.ne(0).any(0) & down.ne(0).any(1)
    return up[:, used], down[used]


def _version(base: str) -> int:
    """A base's fingerprint as far as a file's model version holds it."""
    return int(base[:8], 16) >> 1


def _write(
    stage: Staging, name: str, tensors: Mapping[str, torch.Tensor], model_version: int
) -> None:
    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(model_version)
    # Values refer to their arrays' memory, and numpy has no bf16.
    arrays = {
        key: (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
        for key, x in tensors.items()
    }
    make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    form.set_parameters(
        {key: make(array, int(ONNX_TYPES[tensors[key].dtype])) for key, array in arrays.items()}
    )
    path = stage.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    form.export_adapter(str(path))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    stage.seal(name, digest(path))


def read(path: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of an `.onnx_adapter` file by the inputs that they go to, and its model version.

    Raises:
        AdapterError: It is none.
    """
    try:
        opened(path).close()  # which a pipe or a device does not let by
        form = onnxruntime.AdapterFormat.read_adapter(str(path))
        found = form.get_parameters()
        tensors = {name: from_dlpack(value).clone() for name, value in found.items()}
        return tensors, int(form.get_model_version())
    except Exception as error:  # onnxruntime's have no class in common
        raise AdapterError(
            f"is no adapter that onnxruntime {onnxruntime.__version__} reads",
            where=str(path),
            fix="export it again",
        ) from error


def check(
    path: Path,
    files: Mapping[str, str],
    branches: Branches,
    slots: Mapping[str, Slot],
    base: str,
) -> dict[str, Any]:
    """Compares what lies in an adapter's files with what the adapter adds to each weight.

    Args:
        path: The folder.
        files: The file of each graph.
        branches: What the adapter adds.
        slots: The base's, by site.
        base: Its fingerprint.

    Raises:
        ProofError: A site differs by more than rounding explains, a tensor has no slot, or a file
            is for another base.
        AdapterError: A file is damaged.
    """
    worst: dict[str, Any] = {"relative_error": 0.0, "at": None}
    for graph, name in files.items():
        found, version = read(within(path, name))
        for fqn, delta in branches.items():
            slot = slots[fqn]
            if graph.removesuffix(".onnx") not in slot.graphs:
                continue
            down = found.pop(slot.down, torch.zeros(slot.inputs, 0)).float()
            up = found.pop(slot.up, torch.zeros(0, slot.outputs)).float()
            bound = BOUND.get(slot.dtype, 2 * torch.finfo(slot.dtype).eps)
            error = deviation(product(Held(up.t()), Held(down.t())), delta.matrix)
            if not error <= bound:
                raise ProofError(
                    f"what {name} adds differs from the adapter's by {error:.2e} (bound {bound:g})",
                    where=fqn,
                    fix="look for values that overflow "
                    f"{str(slot.dtype).removeprefix('torch.')}, or export it again",
                )
            if error >= worst["relative_error"]:
                worst = {"relative_error": error, "at": fqn, "bound": bound}
        if found:
            raise ProofError(
                f"holds {len(found)} tensors that its adapter does not have, such as {min(found)}",
                where=str(path / name),
                fix="export it again",
            )
        if version != _version(base):
            raise ProofError("is for another base", where=str(path / name), fix="export it again")
    return {"sites": len(branches), **worst}
