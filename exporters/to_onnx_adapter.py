"""Adapters as files for the slots of an ONNX base that is there already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from peftc.artifact import MANIFEST, Artifact, staging
from peftc.errors import ArtifactError, CheckpointError, located, raise_all
from peftc.exporters.cases import BOUND
from peftc.exporters.onnx_adapters import (
    Branches,
    base_fingerprint,
    check,
    low_rank,
    size,
    unfitted,
    write,
)
from peftc.exporters.onnx_proof import prove
from peftc.exporters.onnx_slots import Slot, slots_of
from peftc.exporters.to_safetensors import folders, key_for, manifest
from peftc.live import materialize
from peftc.program import Program
from peftc.progress import SILENT, Progress
from peftc.proof import Extent
from peftc.whole import capture_whole

NAME = "adapter"  # of the file, before its ending


def to_onnx_adapter(
    program: Program,
    base: str | Path,
    target: str | Path,
    *,
    overwrite: bool = False,
    proof: Extent = "auto",
    progress: Progress = SILENT,
    remarks: Mapping[str, Any] | None = None,
) -> Artifact:
    """Writes what a program's adapters add together as one adapter of an ONNX base.

    It is a file `adapter.onnx_adapter`, or one for each graph of an encoder-decoder. Several
    adapters become one, their ranks side by side: of several that are active at once onnxruntime
    takes the first alone, and says nothing.

    Args:
        program: It carries the adapters; of its base nothing is read but names and shapes.
        base: What `to_onnx(…, adapters="swap")` wrote.
        target: A directory that does not exist.
        overwrite: Replace an artifact that peftc wrote there.
        proof: Every site's A and B, as written, are compared with what the adapters add to its
            weight; `whole` also what onnxruntime computes with them, for which the program is
            loaded in fp32.
        progress: Told of the stages.
        remarks: What else the manifest is to say.

    Raises:
        ArtifactError: The base has no slots, or the target cannot be written.
        PeftcError: An adapter is more than low-rank branches, or one has no slot.
        ProofError: What was written is something else.
    """
    home = slotted(Path(base))
    slots, branches = slots_of(home.manifest["onnx"]["slots"]), _branches(program, home)
    target, fits = Path(target), str(home.manifest["onnx"]["base"])
    key = key_for(program, fits, proof)
    sources = [*folders(program), home.path]
    with staging(
        target, key=key, need=size(branches), sources=sources, overwrite=overwrite
    ) as stage:
        progress.stage("write")
        report = {"base": fits, **write(stage, NAME, branches, slots, fits)}
        progress.stage("prove")
        proved = _proof(program, stage.path, report, home, branches, proof, progress)
        source = {"path": str(home.path.resolve())}
        told = {"format": "onnx-adapter", "proof": proof}
        more = {
            "source": source, "onnx": report, "proof": proved, "export": told, **(remarks or {})
        }  # fmt: skip
        stage.publish(manifest(program, "onnx-adapter", **more))
    return Artifact.open(target)


def base_of(artifact: Artifact) -> Path:
    """Where the ONNX base is that an adapter was made for.

    Raises:
        CheckpointError: There is another one now.
    """
    home = slotted(Path(artifact.manifest["source"]["path"]))
    if home.manifest["onnx"]["base"] != artifact.manifest["onnx"]["base"]:
        raise CheckpointError(
            f"is no longer the base that {artifact.path} was made for",
            where=str(home.path),
            fix="restore it, or export the adapter again",
        )
    return home.path


def slotted(path: Path) -> Artifact:
    """Opens an ONNX base with slots.

    Raises:
        ArtifactError: It is none, or its manifest contradicts itself.
    """
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            "is no ONNX base with slots, which an adapter is exported for",
            where=str(path),
            fix="peftc export ONNX -o OUT --adapter DIR --format onnx-adapter, where peftc export "
            "BASE -o ONNX --format onnx --adapters swap was before",
        )
    artifact = Artifact.open(path)
    with artifact.described():
        said = artifact.manifest.get("onnx") or {}
        slots_of(said.get("slots", {}))
    if "slots" not in said:
        raise ArtifactError(
            f"is an artifact of kind {artifact.manifest['kind']}, and has no slots for adapters",
            where=str(path),
            fix="export the base with --format onnx --adapters swap",
        )
    hashes = {name: file["blake3"] for name, file in artifact.manifest["files"].items()}
    if said.get("base") != base_fingerprint(hashes):
        raise ArtifactError(
            "does not have the files that its slots belong to",
            where=str(path),
            fix="export the base again",
        )
    return artifact


def _branches(program: Program, home: Artifact) -> Branches:
    """What the adapters add, where every site of it has a slot of the base."""
    slots: Mapping[str, Slot] = slots_of(home.manifest["onnx"]["slots"])
    if not program.adapters:
        raise ArtifactError(
            "no adapter is attached", where=str(home.path), fix="name one: --adapter DIR"
        )
    branches, errors = low_rank(program)
    raise_all(located([*errors, *unfitted(branches, slots)], ", ".join(program.adapters)))
    return branches


def _proof(
    program: Program,
    path: Path,
    report: Mapping[str, Any],
    home: Artifact,
    branches: Branches,
    extent: Extent,
    progress: Progress,
) -> dict[str, Any]:
    files, said = report["files"], home.manifest["onnx"]
    proved = {"site": check(path, files, branches, slots_of(said["slots"]), said["base"])}
    if extent != "whole":
        return proved
    progress.stage("compare with torch")
    bound = home.manifest["proof"]["onnx"].get("bound", BOUND)
    wholes, model = capture_whole(program), materialize(program, dtype=torch.float32)
    given = {graph: path / file for graph, file in files.items()}
    return {**proved, "onnx": prove(home.path, wholes, model, bound, given)}


def verify_onnx_adapter(
    artifact: Artifact, program: Program, extent: Extent, progress: Progress
) -> dict[str, Any]:
    """Checks that an adapter's base is the one that it was made for, and repeats its proof.

    Raises:
        CheckpointError: The base is another one.
        ProofError: The adapter's files hold something else.
    """
    report, home = artifact.manifest["onnx"], slotted(base_of(artifact))
    progress.stage("compare layers")
    branches = _branches(program, home)
    return _proof(program, artifact.path, report, home, branches, extent, progress)
