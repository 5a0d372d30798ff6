"""What a directory holds, from headers and JSON alone; no torch is needed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftc import adapterhub
from peftc.artifact import MANIFEST, Artifact
from peftc.checkpoint import Checkpoint, contained, read_json, resolve
from peftc.safetensors_file import TensorRef, read_header
from peftc.terminal import Terminal


def inspect(source: str, terminal: Terminal) -> None:
    """Shows a checkpoint, a PEFT adapter, or an artifact of peftc.

    Raises:
        CheckpointError: It is none of these, or is damaged.
    """
    path = resolve(source)
    found: dict[str, Any] = {"path": str(path)}
    if (path / MANIFEST).is_file():
        found["artifact"] = _artifact(path)
    if (path / "adapter_config.json").is_file():
        found["adapter"] = _adapter(path)
    elif (
        "artifact" not in found
        or found["artifact"]["kind"] == "model"
        or any(path.glob("model*.safetensors"))
    ):
        found["checkpoint"] = _checkpoint(path)
    if terminal.as_json:
        terminal.data(found)
        return
    for kind in ("artifact", "adapter", "checkpoint"):
        if part := found.get(kind):
            facts = [(key, value) for key, value in part.items() if key != "tensors"]
            terminal.table(f"{kind} {path}", ("", ""), facts)
            if tensors := part.get("tensors"):
                rows = [(t["name"], t["shape"], t["dtype"], t["count"]) for t in tensors]
                terminal.table("tensors", ("name", "shape", "dtype", "count"), rows)


def _checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(path)
    names = checkpoint.config.get("architectures")
    refs = list(checkpoint.tensors.values())
    return {
        "architecture": ", ".join(map(str, names)) if isinstance(names, list) else "?",
        "files": len(checkpoint.files),
        "bytes": checkpoint.nbytes,
        "parameters": sum(_parameters(ref, checkpoint) for ref in refs),
        "dtypes": _dtypes(refs),
        **_quantization(checkpoint),
        "tied embeddings": checkpoint.config.get("tie_word_embeddings"),
        "tensors": _grouped(refs),
    }


def _parameters(ref: TensorRef, checkpoint: Checkpoint) -> int:
    """How many of the model's numbers a stored tensor holds; of a quantized weight: its codes."""
    owner = _owner(ref.name, checkpoint)
    if owner is None:
        return math.prod(ref.shape)
    return 2 * ref.nbytes if owner == ref.name else 0


def _owner(name: str, checkpoint: Checkpoint) -> str | None:
    """The quantized weight that a stored tensor is a part of."""
    weight = re.sub(
        r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$", "", name
    )
    states = (f"{weight}.quant_state.bitsandbytes__{book}" for book in ("nf4", "fp4"))
    return weight if any(state in checkpoint.tensors for state in states) else None


def _quantization(checkpoint: Checkpoint) -> dict[str, str]:
    """How the weights are quantized, and how many bits each then takes."""
    config = checkpoint.config.get("quantization_config")
    parts = [ref for name, ref in checkpoint.tensors.items() if _owner(name, checkpoint)]
    if not isinstance(config, dict) or not parts:
        return {}
    count = sum(_parameters(ref, checkpoint) for ref in parts)
    bits = 8 * sum(ref.nbytes for ref in parts) / max(1, count)
    nested = ", double quantization" if config.get("bnb_4bit_use_double_quant") else ""
    kind = config.get("bnb_4bit_quant_type", "4-bit")
    return {"quantization": f"{kind}{nested}: {count:,} weights, {bits:.2f} bits each"}


def _adapter(path: Path) -> dict[str, Any]:
    config = read_json(path / "adapter_config.json", "a PEFT adapter")
    hub = adapterhub.is_hub(config)
    weights = adapterhub.WEIGHTS if hub else "adapter_model.safetensors"
    refs = list(read_header(contained(path, weights)).tensors.values())
    config = {**config, **config["config"]} if hub else config
    shown = ("peft_type", "r", "lora_alpha", "use_rslora", "bias", "target_modules",
             "base_model_name_or_path", "model_name", "model_type", "reduction_factor",
             "non_linearity", "is_parallel")  # fmt: skip
    return {
        **{key: config[key] for key in shown if config.get(key) is not None},
        "parameters": sum(math.prod(ref.shape) for ref in refs),
        "dtypes": _dtypes(refs),
        "tensors": _grouped(refs),
    }


def _artifact(path: Path) -> dict[str, Any]:
    artifact = Artifact.open(path)
    with artifact.described():
        return _facts(artifact.manifest)


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    proof = manifest.get("proof", {})
    graphs = proof.get("onnx", {})
    parts = {"sites": proof.get("site", {}), "logits": proof.get("whole", {})}
    parts |= {
        name: {**seen, "bound": graphs["bound"]}
        for name, seen in graphs.items()
        if isinstance(seen, dict)
    }
    return {
        "kind": manifest["kind"],
        "source": manifest["source"].get("path", manifest["source"].get("module")),
        "passes": " → ".join(entry["title"] for entry in manifest["journal"]),
        "adapters": ", ".join(manifest.get("adapters", {})) or "none",
        "proof": ", ".join(
            f"{name} {part['relative_error']:.1e} of {part['bound']:.0e}"
            for name, part in parts.items()
            if part.get("bound")
        )
        or ("an approximation" if "bound" in graphs else "nothing was rewritten"),
    }


def _dtypes(refs: list[TensorRef]) -> str:
    return ", ".join(f"{dtype} ×{n}" for dtype, n in Counter(r.dtype for r in refs).most_common())


def _grouped(refs: list[TensorRef]) -> list[dict[str, Any]]:
    """Tensors that differ by their layer's number only, as one line."""
    groups: Counter[tuple[str, str, str]] = Counter()
    for ref in refs:
        name = re.sub(r"\.\d+\.", ".*.", ref.name)
        groups[name, str(list(ref.shape)), ref.dtype] += 1
    return [
        {"name": name, "shape": shape, "dtype": dtype, "count": count}
        for (name, shape, dtype), count in groups.items()
    ]
