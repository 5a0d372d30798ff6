"""The tokenizer that belongs to a program's model, and how many tokens the model takes."""

from __future__ import annotations

from typing import Any

from peftc.errors import TrainingError
from peftc.program import Program

LONGEST = 1 << 20  # a model that names no limit of its own


def tokenizer_of(program: Program) -> Any:
    """The tokenizer that lies with a program's model.

    Raises:
        TrainingError: There is none.
    """
    from transformers import AutoTokenizer

    path = program.source.checkpoint.path if hasattr(program.source, "checkpoint") else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises what it pleases
        raise TrainingError(
            f"has no tokenizer that transformers loads: {str(error).splitlines()[0]}",
            where=str(path),
            fix="put tokenizer.json and tokenizer_config.json there",
        ) from error
    return tokenizer


def limit_of(program: Program, tokenizer: Any) -> int:
    """The most tokens that a model takes."""
    config: Any = program.source.checkpoint.config if hasattr(program.source, "checkpoint") else {}
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    known = (text.get(name) for name in ("max_position_embeddings", "n_positions"))
    numbers = [n for n in (*known, tokenizer.model_max_length) if isinstance(n, int)]
    return min([*numbers, LONGEST])


def pad_of(tokenizer: Any) -> int:
    """The id that fills rows up; what it is does not matter, for nothing attends to it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)
