"""The main jobs in one call each: load, apply, export, verify. The command line calls these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftc.artifact import MANIFEST, Artifact, staging
from peftc.capturing import capture, capture_config
from peftc.checkpoint import Checkpoint, read_json, resolve, subfolder
from peftc.contract import Pass, safe_name
from peftc.deltas import alone
from peftc.devices import device_of
from peftc.early import HeadStart
from peftc.errors import (
    ArtifactError,
    CheckpointError,
    ProofError,
    did_you_mean,
    located,
    raise_all,
)
from peftc.exporters.to_adapterhub import to_adapterhub
from peftc.exporters.to_peft import to_peft, write_adapter
from peftc.exporters.to_safetensors import (
    folders,
    inputs,
    key_for,
    manifest,
    to_safetensors,
    write_model,
)
from peftc.formats import FORMATS, Format, misplaced
from peftc.link import plan
from peftc.merging import MergeBase, Then
from peftc.merging import merge as merge_adapters
from peftc.passes.attach import Attach
from peftc.pipeline import Pipeline
from peftc.program import Entry, Program
from peftc.progress import SILENT, Progress
from peftc.proof import Extent, site_proof, wants_whole, watch_file, whole_proof
from peftc.recipe import build
from peftc.storage import edited
from peftc.structure import peft_edits

ADAPTER_CONFIG = "adapter_config.json"


def load(source: str | Path, progress: Progress = SILENT) -> Program:
    """The program that a source stands for, its adapters attached.

    Args:
        source: A checkpoint's directory or hub id, a PEFT adapter's (its config names its base),
            or what `apply` wrote.
        progress: Told of each adapter.

    Raises:
        PeftcError: It is none of these, or a part of it is missing or damaged.
    """
    path = resolve(source)
    if (path / MANIFEST).is_file() and (artifact := Artifact.open(path)).manifest[
        "kind"
    ] == "apply":
        return _load_applied(artifact, progress)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").exists():
        config = read_json(path / ADAPTER_CONFIG, "a PEFT adapter")
        base = config.get("base_model_name_or_path") or config.get("model_name")  # AdapterHub's
        if not isinstance(base, str) or not base:
            raise CheckpointError(
                "names no base_model_name_or_path",
                where=str(path / ADAPTER_CONFIG),
                fix="name the base yourself: peftc export BASE --adapter " + str(path),
            )
        return Pipeline([Attach(path=str(path))]).run(capture(base), progress)
    return capture(source)


def _load_applied(artifact: Artifact, progress: Progress) -> Program:
    content = artifact.manifest
    own = artifact.path / "base"
    base = own if own.is_dir() else Path(content["source"]["path"])
    program = capture(base)
    if base != own and program.source.pin() != content["source"]:
        raise CheckpointError(
            f"is no longer the base that {artifact.path} was made from",
            where=str(base),
            fix="restore it, or run apply again",
        )
    attach = [
        ("attach", {"path": str(subfolder(artifact.path, folder)), "adapter": name})
        for name, folder in content["adapters"].items()
    ]
    return Pipeline(build(attach, str(artifact.path / MANIFEST))).run(program, progress)


def apply(
    base: str | Path,
    passes: Sequence[Pass],
    target: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Artifact:
    """Rewrites a checkpoint: runs passes, and writes what they made.

    The directory holds `adapter/` (for several, `adapters/NAME/`), which PEFT loads, `base/` if a
    pass changed the weights, else a pinned reference to the base, and `peftc.json`.

    Raises:
        PeftcError: A pass cannot run, or the target cannot be written.
    """
    program = Pipeline(passes).run(load(base, progress), progress)
    return write_applied(program, target, overwrite=overwrite, progress=progress)


def write_applied(
    program: Program,
    target: str | Path,
    *,
    files: Mapping[str, bytes] | None = None,
    remarks: Mapping[str, Any] | None = None,
    home: Path | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Artifact:
    """Writes what passes made of a checkpoint; see `apply`.

    Args:
        program: What passes made, fresh or trained.
        target: A directory that does not exist.
        files: What else the directory is to hold.
        remarks: What else its manifest is to say.
        home: Where it will lie, which its adapters' configs name; default: the target.
        overwrite: Replace an artifact that peftc wrote there.
        progress: Told of every byte.

    Raises:
        ArtifactError: The passes changed nothing, or the target cannot be written.
    """
    target = Path(target)
    trained, edits = program.trainable, edited(program)
    rewritten = program.rewritten
    names = list(program.adapters)
    # A structure that PEFT makes itself needs no base of its own.
    written = bool(rewritten) or (peft_edits(program) is None if names else bool(edits))
    places = {name: "adapter" if len(names) == 1 else f"adapters/{name}" for name in names}
    if not (names or written):
        raise ArtifactError("the passes changed nothing", fix="add a pass, such as lora")
    need = sum(shard.size for shard in plan(program)) if written else 0
    need += sum(program.constants[fqn].spec.nbytes for fqn in trained)
    key = key_for(program, "apply")
    with staging(
        target, key=key, need=need, sources=folders(program), overwrite=overwrite
    ) as stage:
        proof = {}
        if written:
            progress.stage("link", need)
            proof = {
                "site": site_proof(program, write_model(program, stage, "base/", None, progress))
            }
        own = str((home or target).absolute() / "base") if written else None
        for name, place in places.items():
            write_adapter(program, name, stage, f"{place}/", own)
        for name, content in (files or {}).items():
            stage.add(name, content)
        more = {"adapters": places, "proof": proof, "export": {"format": "apply"}}
        stage.publish(manifest(program, "apply", **more, **(remarks or {})))
    return Artifact.open(target)


def verify(
    path: str | Path, extent: Extent = "auto", progress: Progress = SILENT
) -> dict[str, Any]:
    """Repeats an artifact's proof: the hashes of its files, then its numbers.

    Args:
        path: What `export` or `apply` wrote.
        extent: See `to_safetensors`.
        progress: Told of each stage.

    Returns:
        The figures, as the manifest has them.

    Raises:
        ProofError: A file is not what was published, or the numbers are above their bound.
        PeftcError: The artifact or its source cannot be read.
    """
    artifact = Artifact.open(Path(path))
    progress.stage("hash")
    if damage := artifact.damage():
        raise_all([ProofError(d.what, where=d.where, fix=d.fix) for d in damage])
    report: dict[str, Any] = {"files": len(artifact.manifest["files"])}
    if artifact.manifest["kind"] == "apply":
        program = load(artifact.path)
        if (artifact.path / "base").is_dir():
            built = rebuild(artifact)
            written = Checkpoint.open(artifact.path / "base")
            report["site"] = site_proof(built, watch_file(built, written))
        return {**report, "adapters": list(program.adapters), "sites": len(program.sites)}
    if artifact.manifest["kind"] == "onnx-adapter":
        from peftc.exporters.to_onnx_adapter import base_of, slotted, verify_onnx_adapter

        program = rebuild_onto(artifact, slotted(base_of(artifact)), extent)
        return report | verify_onnx_adapter(artifact, program, extent, progress)
    if not (artifact.path / "config.json").is_file():  # no weights
        return report
    progress.stage("rebuild")
    program = rebuild(artifact)
    if artifact.manifest["kind"] == "pt2":
        from peftc.exporters.to_inductor import verify_pt2

        return report | verify_pt2(artifact, program, extent, progress)
    if artifact.manifest["kind"] == "onnx":
        from peftc.exporters.to_onnx import verify_onnx

        return report | verify_onnx(artifact, program, extent, progress)
    progress.stage("compare layers")
    written = Checkpoint.open(artifact.path)
    report["site"] = site_proof(program, watch_file(program, written))
    if artifact.manifest["kind"] == "model" and wants_whole(program, extent):
        progress.stage("compare logits")
        report["whole"] = whole_proof(program, artifact.path)
    return report


def rebuild(artifact: Artifact) -> Program:
    """The program that an artifact was made from, by its manifest.

    Raises:
        CheckpointError: The source is no longer what it was.
    """
    pin = artifact.manifest["source"]
    if "path" not in pin:
        raise CheckpointError(
            f"was made from a live {pin.get('module')}, which is gone",
            where=str(artifact.path),
            fix="its hashes hold; its numbers can be compared only where the module is",
        )
    program = capture(pin["path"])
    if program.source.pin() != pin:
        raise CheckpointError(
            f"is no longer what {artifact.path} was made from", where=pin["path"], fix="restore it"
        )
    steps = [(entry["title"], entry["options"]) for entry in artifact.manifest["journal"]]
    built = Pipeline(build(steps, str(artifact.path / MANIFEST))).run(replace(program, journal=()))
    _unmoved(artifact, built)
    return built


def rebuild_onto(artifact: Artifact, home: Artifact, extent: Extent) -> Program:
    """The program that an adapter for the slots of an ONNX base was made from, by its manifest.

    Raises:
        CheckpointError: An adapter is no longer what it was.
    """
    steps = [(entry["title"], entry["options"]) for entry in artifact.manifest["journal"]]
    program = _onto(home, build(steps, str(artifact.path / MANIFEST)), extent)
    _unmoved(artifact, program)
    return program


def _unmoved(artifact: Artifact, built: Program) -> None:
    """Checks that the adapters that an artifact was made from are what they were."""
    now = inputs(built)
    if moved := sorted(p for p, d in artifact.manifest["inputs"].items() if now.get(p) != d):
        raise CheckpointError(
            f"is no longer what {artifact.path} was made from", where=moved[0], fix="restore it"
        )


def _onto(home: Artifact, attach: Sequence[Pass], extent: Extent) -> Program:
    """The program of an ONNX base with adapters attached, whose weights are not read.

    Args:
        home: The base.
        attach: The passes that attach the adapters. Their numbers are not checked: for that the
            base's weights would have to be there.
        extent: `whole` needs a program with values.
    """
    if home.manifest["onnx"]["weights"] == "stored":
        program = capture(home.path)
    else:
        program = alone(rebuild(home), []) if extent == "whole" else capture_config(home.path)
    program = replace(program, journal=())
    for step in attach:
        raise_all(located(step.check(program), "--adapter"))
        options = step.model_dump(mode="json", exclude_defaults=True)
        entry = Entry("attach", options, step.effect.value, 0, True, {})
        program = step.run(program).program
        program = replace(program, journal=(*program.journal, entry))
    return program


def prepare(
    source: str | Path,
    merge: bool = False,
    adapters: Sequence[tuple[str, float]] = (),
    merge_base: MergeBase | None = None,
    then: Then | None = None,
    original: str | Path | None = None,
    force: bool = False,
    keep_virtual: bool = False,
    named: bool = False,
    progress: Progress = SILENT,
) -> tuple[Program, dict[str, Any] | None]:
    """The program that an export writes, and what was measured of a merge; see `export`."""
    steps = build(_attaching(adapters, named), "--adapter")
    program = Pipeline(steps).run(load(source, progress), progress)
    if merge:
        if not program.adapters:
            raise ArtifactError(
                "there is nothing to merge", where=str(source), fix="name an adapter: --adapter DIR"
            )
        return merge_adapters(
            program, merge_base, then, original, force, keep_virtual, progress=progress
        )
    if merge_base or then or original:
        raise ArtifactError(
            "merge_base, then and original say how to merge, and nothing is merged",
            where=str(source),
            fix="add merge=True, or leave them out",
        )
    return program, None


def export(
    source: str | Path,
    target: str | Path,
    *,
    merge: bool = False,
    adapters: Sequence[tuple[str, float]] = (),
    merge_base: MergeBase | None = None,
    then: Then | None = None,
    original: str | Path | None = None,
    force: bool = False,
    format: Format = "safetensors",
    proof: Extent = "auto",
    overwrite: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    progress: Progress = SILENT,
    head: HeadStart | None = None,
    **options: Any,
) -> Artifact:
    """Makes an artifact: attaches adapters, merges them, writes and proves the result.

    Args:
        source: See `load`.
        target: A directory that does not exist.
        merge: Merge every adapter into the weights; with `cache` and `onnx`, all but the prompt or
            prefix.
        adapters: Further PEFT adapters to attach, each with its weight.
        merge_base: What to merge into where the base is in 4 bits; see `peftc.merging.merge`.
        then: What to make of it then: 4 bits again, or 16.
        original: Where the base's weights are as they were before they were quantized.
        force: Write 4 bits even where most of what was trained is lost.
        format: `safetensors`, a checkpoint that transformers loads; `onnx`, that and graphs that
            onnxruntime runs on it; `onnx-adapter`, the adapters as one for the slots of the ONNX
            base that the source is; `pt2`, a checkpoint and libraries that `peftc.runtime` runs on
            it; one adapter, as `peft` or, a bottleneck, as `adapterhub` has it; or `cache`, a
            prompt or prefix as constant keys and values, with `merge` beside the checkpoint that
            they belong to.
        proof: See `to_safetensors`.
        overwrite: Replace an artifact that peftc wrote.
        workers: Threads that compute; default: one per core.
        device: What computes the weights that are written to safetensors: `cpu` or `cuda`.
        progress: Told of every pass, stage and byte.
        head: What the caller began to copy before it imported this, with the same arguments.
        options: Of the format. `onnx` and `pt2`: swap=True leaves slots for adapters, and writes
            those that are attached beside ("rows": for one of each row, with `pt2`), and what
            `to_onnx` and `to_pt2` take: slots, weights, four_bit, compute, head_bits, cache and
            provider.
            `peft`: canonical=True makes all adapters one plain LoRA, for vLLM and llama.cpp too,
            of `rank`; see `to_canonical`.

    Raises:
        PeftcError: A part is missing or does not fit, the target cannot be written, or the proof
            failed.
    """
    if format not in FORMATS:
        raise ArtifactError(
            f"there is no format {format!r}", where=str(target), fix=did_you_mean(format, FORMATS)
        )
    device_of(device)
    if device != "cpu" and format != "safetensors":
        raise ArtifactError(
            f"device={device!r} is for the format safetensors",
            where=str(target),
            fix="leave it out",
        )
    options = {name: value for name, value in options.items() if value not in (None, False)}
    if wrong := misplaced(format, options):
        name, needed = wrong
        raise ArtifactError(
            f"{name}={options[name]!r} goes with {needed}", where=str(target), fix=f"add {needed}"
        )
    if mode := options.pop("swap", None):
        options["adapters"] = "swap" if mode is True else mode
    if format == "pt2":
        from peftc.exporters.to_inductor import to_pt2
    if format == "onnx":  # before any work: its libraries may be missing
        from peftc.exporters.to_onnx import to_onnx
    if format == "onnx-adapter":
        from peftc.exporters.to_onnx_adapter import slotted, to_onnx_adapter

        if merge:
            raise ArtifactError(
                "an adapter for slots is not merged", where=str(target), fix="leave out merge"
            )
        home = slotted(resolve(source))
        program = _onto(home, build(_attaching(adapters, named=True), "--adapter"), proof)
        return to_onnx_adapter(
            program, home.path, target, overwrite=overwrite, proof=proof, progress=progress
        )
    virtual = format in ("cache", "onnx", "pt2")  # which have a place for a prompt
    program, report = prepare(
        source, merge, adapters, merge_base, then, original, force, virtual, bool(mode), progress
    )
    how: dict[str, Any] = {
        "overwrite": overwrite,
        "workers": workers,
        "progress": progress,
        "remarks": {"merge": report} if report else {},
    }
    if format == "cache":
        from peftc.exporters.to_cache import to_cache  # which imports transformers

        return to_cache(program, target, model=merge, **how)
    if format == "peft":
        return to_peft(program, target, overwrite=overwrite, **options)
    if format == "adapterhub":
        return to_adapterhub(program, target, overwrite=overwrite)
    if format == "pt2":
        return to_pt2(program, target, proof=proof, **how, **options)
    if format == "onnx":
        return to_onnx(program, target, proof=proof, **how, **options)
    return to_safetensors(program, target, proof=proof, head=head, device=device, **how)


def _attaching(
    adapters: Sequence[tuple[str, float]], named: bool
) -> list[tuple[str, dict[str, Any]]]:
    """Steps that attach adapters; named, by their folders' names and so that no two are alike."""
    steps: list[tuple[str, dict[str, Any]]] = []
    names: set[str] = set()
    for path, weight in adapters:
        options: dict[str, Any] = {"path": path, "weight": weight}
        if named:
            name = safe_name(Path(path).absolute().name)
            found = (name, *(f"{name}-{number}" for number in range(2, len(adapters) + 1)))
            options["adapter"] = next(one for one in found if one not in names)
            names.add(options["adapter"])
        steps.append(("attach", options))
    return steps
