"""Readers of what is run, learned from and gone on with: texts, engines, data, logs."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from peftc.artifact import Artifact, staging
from peftc.constant_cache import ConstantCache
from peftc.constants import Held, Leaf
from peftc.errors import ArtifactError, raise_all
from peftc.evaluate import value
from peftc.examples import read_examples
from peftc.exporters.in_parts import _told
from peftc.exporters.onnx_adapters import base_fingerprint, read
from peftc.exporters.to_onnx_adapter import slotted
from peftc.four_bit import FourBit, quantized, unpacked
from peftc.libraries import Graph, mapped
from peftc.resident import Slots
from peftc.running_onnx import adapter_file, dangers
from peftc.runs import Run
from peftc.safetensors_file import read_header
from peftc.text import Text
from peftc.tuning import Data
from tests.fuzz.reader import Reader, as_bytes, zeros

TURNS = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ eos_token }}{% endif %}"
)
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}{{ raise_exception('no') }}{{ 1 / 0 }}{{ range(10) | list }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}{{ strftime_now('%Y') }}",
)
SLOT = {"layer": {"A": "a", "B": "b", "in": 6, "out": 6, "dtype": "float32", "graphs": ["model"]}}
CONSTANTS = zeros(**{"0.key": [1, 2, 3, 4], "0.value": [1, 2, 3, 4]})
LORA_OF_SLOT = zeros(base_model__model__q__lora_A__weight=[2, 6],
                     base_model__model__q__lora_B__weight=[6, 2])  # fmt: skip
PORT = [["input_ids", ["batch", "sequence"], "int64"]]


def told(kind: str, files: dict[str, bytes] | None = None, **more: Any) -> bytes:
    """A manifest, of files with these bytes."""
    sealed = {
        name: {"size": len(data), "blake3": blake3(data).hexdigest()}
        for name, data in (files or {}).items()
    }
    return as_bytes({"peftc": 1, "kind": kind, "source": {"path": "/base"}, "files": sealed,
                     "journal": [], **more})  # fmt: skip


@functools.cache
def tokenizer() -> bytes:
    """A tokenizer of a few letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.BPE({"h": 0, "i": 1, "hi": 2, "</s>": 3}, [("h", "i")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["</s>"])
    return bytes(made.to_str().encode())


def chat(root: Path) -> Any:
    """A prompt in a chat, by what the configs say."""
    text = Text(root)
    return text.chat(TURNS), text.ends, text.context, list(text.pieces([0, 1, 2]))


@functools.cache
def onnx_adapter() -> bytes:
    """An adapter of one slot, as onnxruntime writes it."""
    import tempfile

    import numpy as np
    import onnxruntime

    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(7)
    arrays = {name: np.ones((2, 3), np.float32) for name in ("a", "b")}
    make = onnxruntime.OrtValue.ortvalue_from_numpy
    form.set_parameters({name: make(array) for name, array in arrays.items()})
    with tempfile.TemporaryDirectory() as folder:
        form.export_adapter(f"{folder}/x")
        return Path(folder, "x").read_bytes()


def slots(root: Path) -> Any:
    """A base with slots, and its adapter's file."""
    return slotted(root), adapter_file(root, "one")


def compiled(root: Path) -> Any:
    """What a manifest says of libraries, which are not loaded."""
    artifact = Artifact.open(root)
    with artifact.described():
        said = artifact.manifest["pt2"]
        graphs = {name: Graph.read(name, graph) for name, graph in said["graphs"].items()}
        return graphs, mapped(root, said)


def resident(root: Path) -> Any:
    """PEFT's LoRA for the slots of a compiled model."""
    return Slots(root, {"slots": {"q": [6, 6]}, "mode": "swap"}).read(root)


def log(root: Path) -> Any:
    """What an interrupted export left."""
    try:
        with staging(root.parent / "out", key="k", need=0, sources=[], claim=root) as stage:
            return stage.files
    except IsADirectoryError as error:  # typed by who claims a directory of work
        raise ArtifactError(str(error), where=str(root), fix="remove it") from error


def run(root: Path) -> Any:
    """What an interrupted training left."""
    training = Run(root)
    training.begin({"settings": {"rank": 2}, "model": "m"}, restart=False)
    return training.metrics


def examples(root: Path) -> Any:
    """A data file's examples."""
    (file,) = root.glob("data.*")
    return read_examples(Data(data=str(file)), str(file), None)


@functools.cache
def parquet() -> bytes:
    """A table of two texts."""
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), out)
    return out.getvalue()


@functools.cache
def four_bit(nested: bool) -> bytes:
    """A weight in 4 bits, as bitsandbytes stores it."""
    from safetensors.torch import save

    weight = Held(torch.linspace(-1, 1, 128).reshape(2, 64))
    packed = quantized(weight, FourBit("nf4", 64, nested))
    tensors = {f"w.weight{suffix}": value(part) for suffix, part in packed.parts.items()}
    return bytes(save(tensors))


def weights(root: Path) -> Any:
    """Quantized weights, and their numbers."""
    file = read_header(root / "x.safetensors")
    found = unpacked({name: Leaf(ref) for name, ref in file.tensors.items()})
    return [value(constant) for constant in found.values()]


def running_readers() -> list[Reader]:
    """All of them."""
    config = as_bytes({"eos_token": "</s>", "chat_template": TEMPLATE})
    ends = as_bytes({"eos_token_id": [3], "text_config": {"max_position_embeddings": 9}})
    model = {"config.json": ends, "tokenizer.json": tokenizer(), "tokenizer_config.json": config}
    decoder = {
        "session_options": {"log_id": "x", "provider_options": []}, "filename": "model.onnx",
        "head_size": 4, "inputs": {"input_ids": "input_ids"}, "outputs": {"logits": "logits"},
    }  # fmt: skip
    genai = {"type": "llama", "context_length": 9, "eos_token_id": [3], "decoder": decoder}
    file = {"constant_cache.safetensors": CONSTANTS}
    numbering = {"numbering": None, "shapes": {"hidden_size": 8}, "layers": [["0.key", "0.value"]]}
    onnx = {
        "base": base_fingerprint({}), "slots": SLOT,
        "adapters": {"one": {"files": {"model.onnx": "adapters/one.onnx_adapter"}, "sites": 1}},
    }  # fmt: skip
    graph = {"inputs": PORT, "outputs": PORT, "steps": [["piece", ["input_ids"], ["input_ids"]]]}
    pt2 = {
        "library": "x.pt2", "graphs": {"model": graph}, "operators": [], "built": {},
        "constants": {"w": ["constant_cache.safetensors", "0.key", "float32", [1, 2, 3, 4]]},
    }  # fmt: skip
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"^q$": 8},
            "target_modules": ["q"], "bias": "none", "use_rslora": True}  # fmt: skip
    line = {"file": "a.json", "size": 2, "blake3": "0", "note": None}
    part = {"key": "k", "overwrite": False, "proof": "auto", "arguments": {"source": "x"}}
    step = {"step": 1, "loss": 0.5, "eval_loss": 0.4, "seconds": 1.0}
    jsonl = b'{"text": "one"}\n{"text": "two"}\n'
    pairs = b'{"prompt": "a", "completion": "b"}\n'
    turns = as_bytes({"messages": [*TURNS, {"role": "assistant", "content": "ho"}]})
    return [
        Reader("template", "chat_template.jinja", model, chat,
               (TEMPLATE.encode(), *(text.encode() for text in ESCAPES)), share=0.3),
        Reader("tokens", "tokenizer_config.json", model, chat, (config,), share=0.3),
        Reader("tokenizer", "tokenizer.json", model, chat, (tokenizer(),), share=0.3),
        Reader("endings", "config.json", model, chat, (ends,), share=0.3),
        Reader("genai", "genai_config.json", {}, lambda root: raise_all(dangers(root)),
               (as_bytes({"model": genai, "search": {"max_length": 9}}),), share=3),
        Reader("cache", "peftc.json", file, ConstantCache.open,
               (told("cache", file, **numbering),), share=0.3),
        Reader("slots", "peftc.json", {"adapters/one.onnx_adapter": onnx_adapter()}, slots,
               (told("onnx", onnx=onnx),), share=2),
        Reader("onnx_adapter", "x.onnx_adapter", {}, lambda root: read(root / "x.onnx_adapter"),
               (onnx_adapter(),), share=0.3),
        Reader("pt2", "peftc.json", file, compiled, (told("pt2", pt2=pt2),)),
        Reader("resident", "adapter_config.json", {"adapter_model.safetensors": LORA_OF_SLOT},
               resident, (as_bytes(lora),), share=0.3),
        Reader("log", "done.jsonl", {"tree/a.json": b"{}"}, log,
               (as_bytes({"key": "k"}) + b"\n" + as_bytes(line) + b"\n",), share=0.3),
        Reader("part", "part.json", {}, _told, (as_bytes(part),), share=2),
        Reader("settings", "run.json", {"checkpoint-1/sealed": b""}, run,
               (as_bytes({"settings": {"rank": 2}, "model": "m"}),)),
        Reader("metrics", "metrics.jsonl", {"checkpoint-1/sealed": b""}, run,
               (as_bytes(step) + b"\n" + as_bytes({**step, "step": 2}) + b"\n",), share=0.3),
        Reader("four_bit", "x.safetensors", {}, weights, (four_bit(False), four_bit(True)), 0.3),
        Reader("jsonl", "data.jsonl", {}, examples, (jsonl, pairs, turns), share=0.01),
        Reader("json", "data.json", {}, examples, (b'[{"text": "one"}, {"text": "two"}]', jsonl),
               share=0.01),
        Reader("csv", "data.csv", {}, examples, (b"text\none\ntwo\n",), share=0.01),
        Reader("parquet", "data.parquet", {}, examples, (parquet(),), share=0.01),
    ]  # fmt: skip
