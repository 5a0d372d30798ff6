"""A program as libraries that AOTInductor compiled, beside its weights, proven against torch."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peftc.artifact import Artifact, staging
from peftc.calling import calls
from peftc.checkpoint import Checkpoint
from peftc.deltas import alone
from peftc.errors import raise_all
from peftc.exporters.cases import BOUND, compare
from peftc.exporters.inductor_compile import LIBRARY, compile_cuts, needs_compiler
from peftc.exporters.inductor_slots import Mode, Swap
from peftc.exporters.inductor_weights import OWN_FILE, FourBit, Table, Weights
from peftc.exporters.to_safetensors import folders, key_for, manifest, write_model
from peftc.exporters.virtual_constants import Virtual, settled
from peftc.libraries import Graph
from peftc.link import link, plan
from peftc.live import materialize
from peftc.machine import here
from peftc.pieces import Cut, cut
from peftc.program import Program
from peftc.progress import SILENT, Progress
from peftc.proof import Extent, affords_whole, loaded, site_proof, unfold, watch_file
from peftc.runtime import KIND, Runtime, load
from peftc.whole import Whole, capture_whole

# Texts at once, tokens before and tokens now, none of which the capture or the compiler had.
SHAPES = [[1, 0, 9], [3, 0, 6], [3, 11, 4], [1, 13, 1], [4, 21, 2], [2, 0, 1]]


def to_pt2(
    program: Program,
    target: str | Path,
    *,
    weights: Weights = "stored",
    adapters: Mode | None = None,
    slots: str | Sequence[str] | None = None,
    four_bit: FourBit = "kernel",
    overwrite: bool = False,
    proof: Extent = "auto",
    workers: int | None = None,
    progress: Progress = SILENT,
    remarks: Mapping[str, Any] | None = None,
) -> Artifact:
    """Writes a program's checkpoint and, beside it, libraries compiled for this kind of machine.

    `peftc.runtime.load` runs the directory with torch alone. It computes in fp32.

    Args:
        program: What to write; its adapters must be merged, or `adapters` say how they are given.
        target: A directory that does not exist.
        weights: `stored` maps the checkpoint's tensors, and casts those of another dtype than fp32
            when it is loaded; `fp32` writes them so, without a checkpoint, and nothing is cast.
        adapters: `swap` leaves slots for LoRAs, one for a whole batch; `rows`, one for each row.
        slots: Where; targets as of the pass lora. Default: where the program's adapters are, or
            all linear layers.
        four_bit: How weights in 4 bits are multiplied: `kernel`, by peftc's own, is the faster on
            every CPU that was measured; `aten` needs no kernel where it runs.
        overwrite: Replace an artifact that peftc wrote there.
        proof: `sites` compares each rewritten site; `whole` also what the libraries compute with
            what eager torch does, in fp32; `auto` does that up to 1 GiB of fp32 weights.
        workers: Threads that compute; default: one per core.
        progress: Told of the stages, and of every byte written.
        remarks: What else the manifest is to say.

    Raises:
        CaptureError: The model cannot be captured or compiled; it names the module.
        ArtifactError: The target cannot be written, or the program still carries adapters.
        ProofError: The libraries compute something else.
        MissingDependency: There is no C++ compiler.
    """
    raise_all(needs_compiler())
    target = Path(target)
    swap = Swap.of(program, adapters, slots) if adapters else None
    base, virtual = (swap.base, None) if swap else settled(program, target)
    progress.stage("capture")
    wholes, table = capture_whole(base), Table(base, weights)
    quantized = sum(table.quantized(whole.graph, four_bit) for whole in wholes)
    places = swap.insert(wholes) if swap else {}
    for whole in wholes:
        table.fill(whole)
    cuts = {whole.name: cut(whole, base.context) for whole in wholes}
    library = compile_cuts(cuts.values(), progress)
    shards = plan(base) if weights == "stored" else []
    need = len(library) + sum(shard.size for shard in (*shards, *table.shards()))
    key = key_for(program, proof, weights, adapters, slots, four_bit, here())
    with staging(
        target, key=key, need=need, sources=folders(program), overwrite=overwrite
    ) as stage:
        progress.stage("link", need)
        measured = write_model(base, stage, shards=shards, workers=workers, progress=progress)
        link(base, stage, shards=table.shards(), workers=workers, progress=progress)
        stage.add(LIBRARY, library)
        tokens = virtual.cache.tokens if virtual else 0
        told = _told(base, wholes, cuts, table, tokens)
        told["quantized"] = quantized
        told["four_bit"] = four_bit if quantized else None
        if swap:
            published = swap.write(stage, places)
            told["adapters"] = {"mode": swap.mode, "slots": places, "published": published}
        progress.stage("prove")
        proved: dict[str, Any] = {"site": site_proof(base, measured)} if shards else {}
        proved |= _proof(program, virtual, stage.path, told, proof, progress)
        progress.stage("publish")
        cached = {"constant_cache": virtual.report(OWN_FILE)} if virtual else {}
        how = {"format": "pt2", "weights": weights, "adapters": adapters, "slots": slots,
               "four_bit": four_bit}  # fmt: skip
        more = {"proof": proved, "pt2": told, "export": how, **cached, **(remarks or {})}
        stage.publish(manifest(program, KIND, **more))
    return Artifact.open(target)


def _told(
    program: Program, wholes: Sequence[Whole], cuts: Mapping[str, Cut], table: Table, tokens: int
) -> dict[str, Any]:
    """What the manifest says of the libraries: all that running them takes."""
    pieces = [piece for cut in cuts.values() for piece in cut.pieces.values()]
    operators = {
        str(node.target) for piece in pieces for node in piece.module.graph.nodes
        if node.op == "call_function" and "peftc" in str(node.target)
    }  # fmt: skip
    return {
        "library": LIBRARY,
        "built": here(),
        "compute": "float32",
        "weights": table.kind,
        "cast": sorted(table.cast),
        "operators": sorted(name.replace(".", "::", 1) for name in operators),
        "limits": {"past + sequence": program.context - tokens} if program.context else {},
        "graphs": {
            whole.name: {
                **_graph(whole, cuts[whole.name]).described(),
                "pieces": len(cuts[whole.name].pieces),
                "layers": {
                    path: {"captured": few, "of": all_}
                    for path, (few, all_) in whole.captured.items()
                },
            }
            for whole in wholes
        },
        "constants": {name: list(place) for name, place in table.places.items()},
    }


def _graph(whole: Whole, cut: Cut) -> Graph:
    steps = tuple((step.piece, step.takes, step.gives) for step in cut.steps)
    return Graph(whole.name, whole.inputs, whole.outputs, steps)


def _proof(
    program: Program,
    virtual: Virtual | None,
    path: Path,
    told: Mapping[str, Any],
    extent: Extent,
    progress: Progress,
) -> dict[str, Any]:
    """What a directory's libraries compute against eager torch: the base, and with each adapter.

    Raises:
        ProofError: It is something else.
    """
    if not affords_whole(program, extent):
        return {"pt2": {"skipped": "two whole models in fp32; --proof whole does it"}}
    progress.stage("compare with torch")
    runtime = Runtime(path, told)
    base = alone(program, []) if program.adapters and not virtual else program
    if told["weights"] == "fp32":
        model = materialize(unfold(base), dtype=torch.float32)
    elif virtual:
        model = virtual.tuned(path)
    else:
        model = loaded(Checkpoint.open(path))
    proved: dict[str, Any] = {"pt2": _compared(runtime, model)}
    del model
    for name in runtime.adapters:
        gc.collect()
        runtime.swap(name)
        model = materialize(alone(program, [name]), dtype=torch.float32)
        proved.setdefault("pt2_adapters", {})[name] = _compared(runtime, model)
    return proved


def _compared(runtime: Runtime, model: torch.nn.Module) -> dict[str, Any]:
    figures: dict[str, Any] = {"bound": BOUND, "input": "random, seed 0", "shapes": SHAPES}
    for call in calls(model):
        graph = runtime.graphs[call.name]
        figures[call.name] = compare(
            graph,
            call,
            model,
            lambda given, name=call.name: runtime.run(given, name),  # type: ignore[misc]
            where=f"{LIBRARY}, {call.name}",
            runtime="the library",
            shapes=SHAPES,
        )
    return figures


def verify_pt2(
    artifact: Artifact, program: Program, extent: Extent, progress: Progress
) -> dict[str, Any]:
    """Repeats an artifact's comparisons.

    Raises:
        ArtifactError: It was built for another machine.
        ProofError: The libraries compute something else.
    """
    load(artifact.path)
    told, report = artifact.manifest["pt2"], dict[str, Any]()
    swapped = "adapters" in told
    base, virtual = (alone(program, []), None) if swapped else settled(program, artifact.path)
    if told["weights"] == "stored":
        progress.stage("compare layers")
        report["site"] = site_proof(base, watch_file(base, Checkpoint.open(artifact.path)))
    return report | _proof(program, virtual, artifact.path, told, extent, progress)
