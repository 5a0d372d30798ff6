"""What a family of architectures is to the tests: a tiny random model, and what is where in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Inputs = dict[str, Tensor]
# Small, and multiples of 4 everywhere, which (B)OFT's blocks have to divide.
TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED, LABELS = {**TEXT, "num_key_value_heads": 2}, {**TEXT, "num_labels": 5}
GEMMA = {**GROUPED, "head_dim": 8}
GPT = {k: TEXT[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")}
GPT2 = {**GPT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
HALF = {"layers": 2, "ffn_dim": 48, "attention_heads": 4}
HALVES = {f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in HALF.items()}
SEQ2SEQ = {**GPT, **HALVES, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 1}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
IMAGE: dict[str, Any] = {**TOWER, "num_labels": 5}
EXPERTS_OF = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
UNCACHED = {"use_cache": False}  # which some configs do not know

IDS = [[5, 7, 11, 23, 42, 8, 5, 30, 17], [9, 7, 50, 12, 33, 3, 21, 11, 40]]


def random_(model: nn.Module) -> Any:
    """The model with all weights random: noise on norms and biases too, so nothing is 0 or 1."""
    model.eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def tiny(cls: str, config: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return random_(getattr(transformers, cls)(getattr(transformers, config)(**options)))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def ids() -> Inputs:
    return {"input_ids": torch.tensor(IDS)}


def pairs() -> Inputs:
    return ids() | {"decoder_input_ids": torch.tensor(IDS)[:, 3:]}


def pictures(*shape: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": noise(*shape)}


def logits(output: Any) -> Tensor:
    return output.logits  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Specimen:
    """An architecture: a tiny model of it, and what in it each kind of method applies to.

    Attributes:
        name: Its name in the tables.
        make: Makes the model: float32, eval, all weights random.
        linears: Suffixes of linear layers, packed ones by their own names.
        keys_values: Suffixes of what IA3 scales at the output.
        feedforward: Suffixes of what IA3 scales at the input.
        norms: Suffixes of normalizations.
        saved: Suffixes of modules that `modules_to_save` trains as a whole.
        embedding: Suffix of the token embedding, or of all that are tied and called.
        tokens: The same for trainable tokens, where PEFT follows ties from another name.
        convolution: Suffix of a convolution.
        experts: Fused parameters of experts.
        replication: Whether it is one stack of decoder layers, which PEFT may replicate.
        task: PEFT's name of what it does with text, which its prompts have to be told.
        inputs: Makes the inputs of a forward, the same at every call.
        output: The tensor to compare, from what the model returns.
    """

    name: str
    make: Callable[[], Any]
    linears: tuple[str, ...]
    keys_values: tuple[str, ...]
    feedforward: tuple[str, ...]
    norms: tuple[str, ...]
    saved: tuple[str, ...]
    embedding: str | None = None
    tokens: str | None = None
    convolution: str | None = None
    experts: tuple[str, ...] = ()
    replication: bool = False
    task: str | None = None
    inputs: Callable[[], Inputs] = ids
    output: Callable[[Any], Tensor] = logits

    def build(self) -> Any:
        """The model, the same at every call."""
        torch.manual_seed(0)
        return copy.deepcopy(made(self))


@cache
def made(specimen: Specimen) -> Any:
    """A specimen's model, made once, to be copied."""
    return specimen.make()


def specimen(
    name: str, make: Callable[[], Any], linears: str, ia3: str, norms: str, saved: str, **rest: Any
) -> Specimen:
    """A specimen from words; `ia3` is `keys values / feedforward`."""
    words: list[Any] = [tuple(s.split()) for s in (linears, *ia3.split(" / "), norms, saved)]
    return Specimen(name, make, *words, **{"tokens": rest.get("embedding"), **rest})


def model(name: str, cls: str, config: str, *words: str, options: Any, **rest: Any) -> Specimen:
    """A specimen of transformers', from the names of its class and its config."""
    return specimen(name, partial(tiny, cls, f"{config}Config", **options), *words, **rest)


def causal(name: str, cls: str, *words: str, options: dict[str, Any], **rest: Any) -> Specimen:
    rest = {"replication": True, "task": "CAUSAL_LM", "config": cls, **rest}
    config, options = rest.pop("config"), options | UNCACHED
    return model(name, f"{cls}ForCausalLM", config, *words, options=options, **rest)


def sequences(name: str, cls: str, *words: str, options: dict[str, Any], **rest: Any) -> Specimen:
    """An encoder and a decoder of text."""
    rest = {"tokens": "shared", "task": "SEQ_2_SEQ_LM", "inputs": pairs, **rest}
    return model(
        name, f"{cls}ForConditionalGeneration", cls, *words, embedding="embed_tokens",
        options=options | UNCACHED, **rest,
    )  # fmt: skip


QKVO, MLP = "q_proj k_proj v_proj o_proj ", "gate_proj up_proj down_proj"
OUT = "q_proj k_proj v_proj out_proj fc1 fc2"
LLAMA = (QKVO + MLP, "k_proj v_proj / down_proj", "input_layernorm post_attention_layernorm norm")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
BART = (OUT, "k_proj v_proj / fc2", "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm")
