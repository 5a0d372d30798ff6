"""A tiny model that talks: a random Llama with a tokenizer of bytes and a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from peftc import Lora, Tuning

TEMPLATE = (
    "{% for m in messages %}<|im|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def byte_tokenizer() -> Any:
    """One token a byte, and three special ones."""
    special = ["<s>", "</s>", "<|im|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate([*special, *alphabet])}
    plain = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", model_max_length=128
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def talker(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Writes the model and its tokenizer."""
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259,
            "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, **options,
        }
    )  # fmt: skip
    torch.manual_seed(3)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def lines(file: Path, records: Iterable[Mapping[str, Any] | str]) -> Path:
    """Writes records as JSONL; a text is a line as it is."""
    written = (r if isinstance(r, str) else json.dumps(r) for r in records)
    file.write_text("".join(f"{line}\n" for line in written))
    return file


def sums(file: Path, count: int = 40) -> Path:
    """Prompts and completions that can be learned."""
    return lines(file, ({"prompt": f"{i}+1=", "completion": f"{i + 1}."} for i in range(count)))


def tuning(data: Path, **options: Any) -> Tuning:
    """Ten steps of eight examples on the CPU."""
    given = {"steps": 10, "batch_size": 8, "lr": 5e-3, "device": "cpu", "plot": False, **options}
    return Tuning(data=str(data), **given)


LORA = Lora(rank=4, dropout=0.1)
