"""Making an artifact again from nothing but its manifest, to see that the bytes are the same."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from peftc.api import rebuild, write_applied
from peftc.artifact import Artifact, versions
from peftc.errors import ArtifactError, ProofError, raise_all
from peftc.progress import SILENT, Progress

# The exporter of each format, and what it is told to save the time of another proof.
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    "safetensors": ("to_safetensors", {"proof": "sites"}),
    "onnx": ("to_onnx", {"proof": "sites"}),
    "cache": ("to_cache", {}),
    "peft": ("to_peft", {}),
    "adapterhub": ("to_adapterhub", {}),
}


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
            else "is of a kind whose bytes differ each time (a compiler's), or has no such record",
            where=str(artifact.path),
            fix="verify it without --rebuild",
        )
    program = rebuild(artifact)
    where = artifact.path.absolute()
    with tempfile.TemporaryDirectory(prefix=f".{where.name}.peftc-", dir=where.parent) as scratch:
        target = Path(scratch) / where.name
        if form == "apply":
            made = write_applied(program, target, home=where, progress=progress)
        else:
            name, more = WRITERS[form]
            write = getattr(import_module(f"peftc.exporters.{name}"), name)
            if form in ("safetensors", "onnx", "cache"):
                more = {**more, "progress": progress}
            made = write(program, target, **asked, **more)
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
                fix=f"compare with the same versions: {changed}" if changed else "report it",
            )
            for file in sorted(now.keys() | then.keys())
            if now.get(file) != then.get(file)
        ]
    )
    return {"files": len(then), "format": form}
