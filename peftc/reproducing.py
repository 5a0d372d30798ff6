"""Making an artifact again from nothing but its manifest, to see that the bytes are the same."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from peftc.api import rebuild, rebuild_onto, write_applied
from peftc.artifact import Artifact, claimed, versions
from peftc.errors import ArtifactError, ProofError, raise_all
from peftc.progress import SILENT, Progress

# The exporter of each format, and what it is told to save the time of another proof.
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    "safetensors": ("to_safetensors", {"proof": "sites"}),
    "onnx": ("to_onnx", {"proof": "sites"}),
    "cache": ("to_cache", {}),
    "peft": ("to_peft", {}),
    "adapterhub": ("to_adapterhub", {}),
    "pt2": ("to_inductor", {"proof": "sites"}),
    "onnx-adapter": ("to_onnx_adapter", {}),
}
NAMES = {"to_inductor": "to_pt2"}  # of exporters that are not called as their modules are
# What bytes depend on that no manifest holds.
UNLIKE = {
    "pt2": "set TORCHINDUCTOR_CACHE_DIR as it was, and use that compiler: the library names its "
    "sources by their places",
}
TOLD = ("safetensors", "onnx", "cache", "pt2", "onnx-adapter")  # what takes a progress


def reproduce(path: str | Path, progress: Progress = SILENT) -> dict[str, Any]:
    """Makes an artifact again beside it, compares every file's hash, and removes it.

    Args:
        path: What `export` or `apply` wrote.
        progress: Told of every stage and byte.

    Returns:
        How many files were made again, byte for byte.

    Raises:
        ArtifactError: The manifest does not hold what it takes, or there is no room.
        CheckpointError: What it was made from has changed.
        ProofError: A file is another one now.
    """
    artifact = Artifact.open(Path(path))
    asked = dict(artifact.manifest.get("export") or {})
    form = asked.pop("format", None)
    if "training" in artifact.manifest or form not in (*WRITERS, "apply"):
        raise ArtifactError(
            "holds what was trained, which its manifest cannot make again"
            if "training" in artifact.manifest
            else "has no record of how it was exported: an earlier peftc wrote it",
            where=str(artifact.path),
            fix="verify it without --rebuild",
        )
    where = artifact.path.absolute()
    with claimed(where, "rebuilt") as scratch:
        target = scratch / where.name
        shutil.rmtree(target, ignore_errors=True)  # of a run that was killed
        made = _again(artifact, form, asked, target, progress)
    now, then = made.manifest["files"], artifact.manifest["files"]
    tools = versions()
    changed = {
        tool: f"{was} then, {tools[tool]} now"
        for tool, was in artifact.manifest["versions"].items()
        if tool in tools and tools[tool] != was
    }
    raise_all(
        [
            ProofError(
                "is another file when it is made again",
                where=str(artifact.path / file),
                fix=f"compare with the same versions: {changed}"
                if changed
                else UNLIKE.get(form, "report it"),
            )
            for file in sorted(now.keys() | then.keys())
            if now.get(file) != then.get(file)
        ]
    )
    return {"files": len(then), "format": form}


def _again(
    artifact: Artifact, form: str, asked: dict[str, Any], target: Path, progress: Progress
) -> Artifact:
    """An artifact made a second time, elsewhere."""
    if form == "apply":
        home = artifact.path.absolute()
        return write_applied(rebuild(artifact), target, home=home, progress=progress)
    name, more = WRITERS[form]
    module = import_module(f"peftc.exporters.{name}")
    write = getattr(module, NAMES.get(name, name))
    if form in TOLD:
        more = {**more, "progress": progress}
    if form == "onnx-adapter":
        home = module.base_of(artifact)
        program = rebuild_onto(artifact, module.slotted(home), asked["proof"])
        return write(program, home, target, **asked, **more)  # type: ignore[no-any-return]
    return write(rebuild(artifact), target, **asked, **more)  # type: ignore[no-any-return]
