"""A tiny random Llama and a PEFT adapter for it, so that the examples run anywhere in seconds."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

logging.disable_progress_bar()


def workplace() -> Path:
    """The folder named on the command line, or a temporary one."""
    return Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="peftc-example-"))


def tiny_checkpoint(folder: Path, layers: int = 2) -> Path:
    """Writes a random Llama in bf16, as `save_pretrained` writes any model."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "base")
    return folder / "base"


def tiny_adapter(folder: Path, base: Path, name: str, seed: int) -> Path:
    """Trains nothing, but writes what PEFT writes after training: non-zero A and B."""
    import peft

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder / name)
    return folder / name


def tiny_talker(folder: Path) -> Path:
    """The tiny Llama with a tokenizer of bytes, for what reads text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=258, eos_token_id=0, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.lm_head.weight.data *= 8  # else no logit could be large
    model.save_pretrained(folder / "talker")
    tokens = ["</s>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(tokens[:2])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "talker")
    return folder / "talker"
