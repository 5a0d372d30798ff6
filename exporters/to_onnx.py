"""A program as ONNX: graphs beside the merged weights, proven against eager torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from peftc.artifact import Artifact, Staging, staging, versions
from peftc.checkpoint import Checkpoint, contained
from peftc.errors import ArtifactError, PeftcError, raise_all
from peftc.exporters import onnx_grouped, onnx_needs
from peftc.exporters.onnx_adapters import size
from peftc.exporters.onnx_fusing import fuse
from peftc.exporters.onnx_genai import FILE, Provider, genai_config
from peftc.exporters.onnx_lowering import OPSET, Lowering
from peftc.exporters.onnx_needs import onnx, onnx_ir
from peftc.exporters.onnx_proof import BOUNDS, prove
from peftc.exporters.onnx_quantized import Cache, Compute, Form, OwnWeights, Weights, weights_of
from peftc.exporters.onnx_slots import Slots
from peftc.exporters.onnx_swap import Swap
from peftc.exporters.onnx_table import TABLE
from peftc.exporters.onnx_weights import OWN_FILE, StoredWeights
from peftc.exporters.to_safetensors import folders, key_for, manifest, write_model
from peftc.exporters.virtual_constants import Virtual, settled
from peftc.link import link, plan
from peftc.live import materialize
from peftc.program import Program
from peftc.progress import SILENT, Progress
from peftc.proof import Extent, affords_whole, loaded, site_proof, unfold, watch_file
from peftc.whole import Whole, capture_whole

STORED = Form()


@dataclass(frozen=True)
class Lowered:
    """A program's graphs, and where their constants lie."""

    form: Form
    wholes: list[Whole]
    models: dict[str, onnx_ir.Model]
    weights: StoredWeights

    @property
    def files(self) -> dict[str, bytes]:
        """The .onnx files."""
        return {
            name: onnx_ir.to_proto(model).SerializeToString() for name, model in self.models.items()
        }


def to_onnx(
    program: Program,
    target: str | Path,
    *,
    weights: Weights = "stored",
    compute: Compute | None = None,
    head_bits: int = 8,
    cache: Cache = "grown",
    provider: Provider = "cpu",
    adapters: Literal["swap"] | None = None,
    slots: str | Sequence[str] | None = None,
    overwrite: bool = False,
    proof: Extent = "auto",
    workers: int | None = None,
    progress: Progress = SILENT,
    remarks: Mapping[str, Any] | None = None,
) -> Artifact:
    """Writes a program's checkpoint and, beside it, graphs that onnxruntime runs on its weights.

    The graphs' initializers are ranges of the safetensors files, so that one directory serves
    transformers and onnxruntime. Weights of another dtype than the graph computes in are cast when
    a session is made.

    Args:
        program: What to write; its adapters must be merged, or are to be swapped. A prompt or a
            prefix stays: the graph starts from its keys and values.
        target: A directory that does not exist.
        weights: `stored` refers to the merged checkpoint's; the others are in a file of the graph's
            own, and no checkpoint is written: `fp32`, `fp16`, `bf16`; `int8` and `int4`, linear
            layers in steps of their own for each 32 weights of a row; `nf4-int8`, the layers that
            are in NF4 with their codes rounded to 8 bits.
        compute: The float type of the graph, its cache too: `fp32`, `fp16` or `bf16`; default: that
            of `weights`, or fp32. Logits are fp32 always.
        head_bits: Of an output head, 8 or 4, where `weights` are `int4`.
        cache: `grown` by every run; or `shared`, into which onnxruntime-genai writes a token's keys
            and values without copying those before: quicker in long texts, of which several go on
            together only token by token.
        provider: Whom onnxruntime-genai is to run it by: `cpu` or `cuda`.
        adapters: `swap` leaves slots for low-rank adapters in the graphs, which are given at run
            time, and writes each of the program's adapters as a file for them.
        slots: Which layers have one, as a pass's targets say it, beside those that the adapters
            change; default: just these, or all linear layers where there is no adapter.
        overwrite: Replace an artifact that peftc wrote there.
        proof: `sites` compares each rewritten site; `whole` also what onnxruntime computes with
            what eager torch does, in fp32, for which the model is loaded twice; `auto` does that up
            to 1 GiB of fp32 weights.
        workers: Threads that compute; default: one per core.
        progress: Told of the stages capture, link, prove and publish, and of every byte written.
        remarks: What else the manifest is to say.

    Raises:
        CaptureError: The model cannot be captured, or an operator has no ONNX; it names the module.
        ArtifactError: The target cannot be written, or the program still carries adapters.
        PeftcError: An adapter that is to be swapped is more than low-rank branches.
        ProofError: onnxruntime computes something else.
        MissingDependency: onnx, onnx-ir or onnxruntime is not installed.
    """
    target = Path(target)
    swap = None if adapters is None else Swap.of(program, slots)
    onnx_needs.check()
    form = Form(weights, compute, head_bits, cache)
    form.check(program)
    progress.stage("capture")
    base, virtual = (swap.base, None) if swap else settled(program, target)
    lowered = lower(base, form, swap.slots if swap else None)
    own = lowered.weights.own_shards()
    shards = plan(base) if weights == "stored" else []
    need = sum(shard.size for shard in (*shards, *own))
    need += sum(map(size, swap.branches.values())) if swap else 0
    asked = proof, vars(form), provider, adapters, slots
    key = key_for(program, tool_versions(), asked)
    with staging(
        target, key=key, need=need, sources=folders(program), overwrite=overwrite
    ) as stage:
        progress.stage("link", need)
        measured = write_model(base, stage, shards=shards, workers=workers, progress=progress)
        link(base, stage, shards=own, workers=workers, progress=progress)
        for name, content in lowered.files.items():
            stage.add(name, content)
        known: dict[str, Any] = {"provider": provider, "shared": cache == "shared"}
        tokens = virtual.cache.tokens if virtual else 0
        if (config := genai_config(base, lowered.wholes, before=tokens, **known)) is not None:
            stage.add(FILE, config)
        swapped = swap.write(stage) if swap else {}
        progress.stage("check")
        check(stage)
        progress.stage("prove")
        proved: dict[str, Any] = {}
        if weights == "stored":
            proved["site"] = site_proof(base, measured)
        proved |= _proof(base, virtual, stage.path, lowered, proof, progress)
        if swap:
            figures = proved["onnx"]
            proved["onnx_adapters"] = swap.prove(
                stage.path, swapped, lowered.wholes, figures, progress
            )
        progress.stage("publish")
        report = {
            "opset": OPSET,
            **lowered.weights.report,
            "cache": cache,
            **swapped,
            "graphs": {name: _described(lowered, name) for name in lowered.models},
        }
        cached = {"constant_cache": virtual.report(OWN_FILE)} if virtual else {}
        told = {
            "format": "onnx", **vars(form), "provider": provider, "adapters": adapters,
            "slots": slots,
        }  # fmt: skip
        more = {"proof": proved, "onnx": report, "export": told, **cached, **(remarks or {})}
        tools = {**versions(), **tool_versions()}
        stage.publish(manifest(program, "onnx", **{"versions": tools, **more}))
    return Artifact.open(target)


def _proof(
    program: Program,
    virtual: Virtual | None,
    path: Path,
    lowered: Lowered,
    extent: Extent,
    progress: Progress,
) -> dict[str, Any]:
    """What a directory's graphs are compared with: its checkpoint, or the program itself.

    Raises:
        ProofError: They compute something else.
    """
    own, proved = lowered.weights, dict[str, Any]()
    quantized = isinstance(own, OwnWeights) and own.form.approximate
    if isinstance(own, OwnWeights) and quantized:
        proved["weights"] = own.check(path)
    if own.dtype not in BOUNDS:
        return {**proved, "onnx": {"skipped": "onnxruntime has no bf16 on a CPU"}}
    if not affords_whole(program, extent):
        return {**proved, "onnx": {"skipped": "two whole models in fp32; --proof whole does it"}}
    progress.stage("compare with torch")
    if isinstance(own, OwnWeights):
        tuned = virtual.program if virtual else program
        model = materialize(unfold(tuned), dtype=torch.float32)
    elif virtual:
        model = virtual.tuned(path)
    else:
        model = loaded(Checkpoint.open(path))
    shared = lowered.form.cache == "shared"
    bound = None if quantized else BOUNDS[own.dtype]
    return {**proved, "onnx": prove(path, lowered.wholes, model, bound, shared=shared)}


def lower(program: Program, form: Form = STORED, slots: Slots | None = None) -> Lowered:
    """A program's graphs as ONNX; no weight is read.

    Raises:
        CaptureError: The model cannot be captured, an operator has no ONNX, or a layer no slot.
    """
    wholes = capture_whole(program, form.dtype)
    weights, table = weights_of(program, form), slots.table if slots else TABLE
    if form.cache == "shared":
        table = {**table, **onnx_grouped.GROUPED}
    models = {}
    for whole in wholes:
        fuse(whole.graph)
        if form.cache == "shared":
            onnx_grouped.check(whole)
        model = Lowering(whole, weights, table).model()
        models[f"{whole.name}.onnx"] = slots.open(model) if slots else model
    raise_all(slots.lacking() if slots else [])
    weights.bind()
    return Lowered(form, wholes, models, weights)


def _described(lowered: Lowered, name: str) -> dict[str, Any]:
    model = lowered.models[name]
    whole = next(whole for whole in lowered.wholes if f"{whole.name}.onnx" == name)
    return {
        "nodes": len(model.graph),
        "inputs": [port.name for port in whole.inputs if ".key" not in port.name
                   and ".value" not in port.name],
        "layers": {path: {"captured": few, "of": all_} for path, (few, all_)
                   in whole.captured.items()},
    }  # fmt: skip


def check(stage: Staging) -> None:
    """Runs onnx's checker, shape inference too, over the graphs that are staged."""
    for name in stage.files:
        if name.endswith(".onnx"):
            try:
                onnx.checker.check_model(str(stage.path / name), full_check=True)
            except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
                raise ArtifactError(
                    f"onnx's checker refuses it: {str(error).splitlines()[0]}",
                    where=name,
                    fix="this is a bug of peftc; please report it",
                ) from error


def external_data(path: Path) -> list[PeftcError]:
    """An error for each tensor of a directory's graphs that is not wholly inside of its files."""
    errors: list[PeftcError] = []
    for file in sorted(path.glob("*.onnx")):
        try:
            proto = onnx.load(str(contained(path, file.name)), load_external_data=False)
        except Exception:  # protobuf's, whose class depends on how it was built
            errors.append(ArtifactError("is no graph", where=str(file), fix="export it again"))
            continue
        for tensor in _held(proto):
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            try:
                data = contained(path, place["location"])
                end = int(place.get("offset", 0)) + int(place["length"])
                good = int(place.get("offset", 0)) >= 0 and end <= data.stat().st_size
            except (PeftcError, OSError, KeyError, TypeError, ValueError):
                good = False
            if not good:
                errors.append(
                    ArtifactError(
                        f"the data of {tensor.name} is not in a file beside it",
                        where=str(file),
                        fix="export it again",
                    )
                )
    return errors


def _held(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model holds, in its functions and its training too."""
    for graph in (proto.graph, *(g for t in proto.training_info
                                 for g in (t.initialization, t.algorithm))):  # fmt: skip
        yield from _tensors(graph)
    for function in proto.functions:
        yield from _attributes(function.node)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _attributes(graph.node)


def _attributes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def verify_onnx(
    artifact: Artifact, program: Program, extent: Extent, progress: Progress
) -> dict[str, Any]:
    """Checks where an artifact's data lies, and repeats its comparisons.

    Raises:
        ArtifactError: A graph's data is not inside of the directory.
        ProofError: onnxruntime computes something else.
    """
    raise_all(external_data(artifact.path)[:5])
    said = artifact.manifest["onnx"]
    kind, report = said["weights"], dict[str, Any]()
    form = Form(kind, said.get("compute"), said.get("head_bits", 8), said.get("cache", "grown"))
    swap = Swap.of(program, list(said["slots"])) if "slots" in said else None
    base, virtual = (swap.base, None) if swap else settled(program, artifact.path)
    if kind == "stored":
        progress.stage("compare layers")
        written = Checkpoint.open(artifact.path)
        report["site"] = site_proof(base, watch_file(base, written))
    lowered = lower(base, form, swap.slots if swap else None)
    report |= _proof(base, virtual, artifact.path, lowered, extent, progress)
    if swap:
        figures = report["onnx"]
        report["onnx_adapters"] = swap.prove(artifact.path, said, lowered.wholes, figures, progress)
    return report


def tool_versions() -> dict[str, str]:
    """The versions of what makes and runs the graphs."""
    names = "onnx", "onnx-ir", *onnx_needs.RUNTIMES
    return {name: found for name in names if (found := onnx_needs.installed(name))}
