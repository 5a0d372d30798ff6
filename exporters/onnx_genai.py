"""genai_config.json: what onnxruntime-genai has to know of a decoder to generate with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from peftc.calling import MASK, POSITIONS
from peftc.capturing import CheckpointSource
from peftc.checkpoint import read_json
from peftc.program import Program
from peftc.structure import as_json
from peftc.whole import Whole

Provider = Literal["cpu", "cuda"]
FILE = "genai_config.json"
TYPE = "llama"  # its word for any decoder over a cache of keys and values
SEARCH = {
    "do_sample": False, "early_stopping": True, "length_penalty": 1.0, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "num_return_sequences": 1,
    "repetition_penalty": 1.0, "temperature": 1.0,
    "top_k": 1, "top_p": 1.0,
}  # fmt: skip


def genai_config(
    program: Program,
    wholes: list[Whole],
    *,
    before: int = 0,
    provider: Provider = "cpu",
    shared: bool = False,
) -> bytes | None:
    """The file's content, or None for a model that onnxruntime-genai does not run so.

    It runs decoders whose layers all have the same heads, and that end their texts by a token.

    Args:
        program: What is written.
        wholes: Its graphs.
        before: How many virtual tokens the graph has, which take positions too.
        provider: Whom it runs them by.
        shared: Whether it keeps their cache.
    """
    whole = wholes[0]
    names = {port.name for port in whole.inputs}
    caches = {port.dims for port in whole.inputs if "past" in port.dims}
    source = program.source
    if len(wholes) != 1 or len(caches) != 1:
        return None
    assert isinstance(source, CheckpointSource)
    config = _text(source.checkpoint.config)
    generation = _generation(source.checkpoint.path)
    vocabulary = next(port.dims[-1] for port in whole.outputs if port.name == "logits")
    assert isinstance(vocabulary, int)
    ends, start, pad = (
        [token for token in _ids(generation.get(name, config.get(name))) if token < vocabulary]
        for name in ("eos_token_id", "bos_token_id", "pad_token_id")
    )
    if not ends:
        return None
    heads, size = next(iter(caches))[1], next(iter(caches))[3]
    length = (program.context or 2048) - before
    queries = config.get("num_attention_heads") or config.get("n_head") or heads
    providers: list[dict[str, Any]] = [] if provider == "cpu" else [{provider: {}}]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
        "filename": f"{whole.name}.onnx",
        "head_size": size,
        "hidden_size": config.get("hidden_size") or config.get("n_embd"),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": MASK,
            **({"position_ids": POSITIONS} if POSITIONS in names else {}),
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": queries,
        "num_hidden_layers": sum(port.name.endswith(".key") for port in whole.inputs),
        "num_key_value_heads": heads,
    }
    model = {
        "type": TYPE,
        "context_length": length,
        "vocab_size": vocabulary,
        "bos_token_id": (start or ends)[0],
        "eos_token_id": ends,
        "pad_token_id": (pad or ends)[0],
        "decoder": decoder,
    }
    search = {**SEARCH, "max_length": length, "past_present_share_buffer": shared}
    return as_json({"model": model, "search": search})


def _ids(given: Any) -> list[int]:
    ids = given if isinstance(given, list) else [given]
    return [token for token in ids if isinstance(token, int) and token >= 0]


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _generation(path: Path) -> Mapping[str, Any]:
    file = path / "generation_config.json"
    return read_json(file, "a checkpoint") if file.is_file() else {}
