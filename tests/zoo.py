"""Tiny random models of many architectures, and PEFT adapters that change what they compute.

The raw material of a parity table, each PEFT method on each architecture: `adapter(method,
specimen)` gives what PEFT makes of it, `save` writes it. Where PEFT itself cannot, `UNSUPPORTED`
says why; where PEFT's own merge computes something else than its adapter, `PEFT_MERGE_WRONG`.

`python -m tests.zoo` tries everything, prints the table, and fails if it is not as recorded here.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
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
HALF = {"layers": 2, "ffn_dim": 48, "attention_heads": 4}
HALVES = {f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in HALF.items()}
SEQ2SEQ = {**GPT, **HALVES, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 1}
IMAGE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4, "num_labels": 5,
}  # fmt: skip
QWEN_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
    "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}

TOKENS = [5, 7, 11]  # which the trainable tokens' methods train
IDS = [[5, 7, 11, 23, 42, 8, 5, 30, 17], [9, 7, 50, 12, 33, 3, 21, 11, 40]]
PICTURE = [[5, 62, 60, 60, 60, 60, 63, 7, 11, 23]]  # 62: an image begins, 60: a part of it


class Plain(nn.Module):
    """None of transformers': a picture and tokens through convolution, embedding and linears."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups)
        self.body = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16, bias=False))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 8)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        picture = self.conv(pixel_values).relu().mean((2, 3))
        tokens = self.embed(input_ids).mean(1)
        y: Tensor = self.head(self.norm(self.body(torch.cat([picture, tokens], 1))))
        return y


def random_(model: nn.Module) -> Any:
    """The model with all weights random: noise on norms and biases too, so nothing is 0 or 1."""
    model.eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def tiny(cls: str, config: str, **options: Any) -> Any:
    torch.manual_seed(0)
    options |= {} if config in ("CLIPConfig", "ViTConfig") else {"use_cache": False}
    return random_(getattr(transformers, cls)(getattr(transformers, config)(**options)))


def plain(groups: int) -> Any:
    torch.manual_seed(0)
    return random_(Plain(groups))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def ids() -> Inputs:
    return {"input_ids": torch.tensor(IDS)}


def pairs() -> Inputs:
    return ids() | {"decoder_input_ids": torch.tensor(IDS)[:, 3:]}


def logits(output: Any) -> Tensor:
    return output.logits  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Specimen:
    """An architecture: a tiny model of it, and what in it each kind of method applies to.

    Attributes:
        name: Its name in the tables.
        build: Makes the model, the same at every call: float32, eval, all weights random.
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
        inputs: Makes the inputs of a forward, the same at every call.
        output: The tensor to compare, from what the model returns.
    """

    name: str
    build: Callable[[], Any]
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
    inputs: Callable[[], Inputs] = ids
    output: Callable[[Any], Tensor] = logits


def specimen(
    name: str, build: Callable[[], Any], linears: str, ia3: str, norms: str, saved: str, **rest: Any
) -> Specimen:
    """A specimen from words; `ia3` is `keys values / feedforward`."""
    words: list[Any] = [tuple(s.split()) for s in (linears, *ia3.split(" / "), norms, saved)]
    return Specimen(name, build, *words, **{"tokens": rest.get("embedding"), **rest})


def causal(name: str, cls: str, *words: str, options: dict[str, Any], **rest: Any) -> Specimen:
    build = partial(tiny, f"{cls}ForCausalLM", f"{cls}Config", **options)
    return specimen(name, build, *words, replication=True, **rest)


QKVO, MLP = "q_proj k_proj v_proj o_proj ", "gate_proj up_proj down_proj"
OUT = "q_proj k_proj v_proj out_proj fc1 fc2"
LLAMA = (QKVO + MLP, "k_proj v_proj / down_proj", "input_layernorm post_attention_layernorm norm")
PACKED = "query_key_value dense dense_h_to_4h dense_4h_to_h"
BLOOM = (PACKED, "query_key_value / dense_4h_to_h", "input_layernorm post_attention_layernorm ln_f")
BERT = (
    "query key value attention.output.dense intermediate.dense output.dense",
    "key value / output.dense", "LayerNorm",
)  # fmt: skip
BART = (OUT, "k_proj v_proj / fc2", "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

SPECIMENS: dict[str, Specimen] = {
    s.name: s
    for s in (
        causal("llama", "Llama", *LLAMA, "lm_head norm", options=GROUPED, embedding="embed_tokens"),
        causal("qwen2", "Qwen2", *LLAMA, "lm_head", options=GROUPED, embedding="embed_tokens"),
        causal("qwen3", "Qwen3", LLAMA[0], LLAMA[1], LLAMA[2] + " q_norm k_norm", "lm_head",
               options=GEMMA, embedding="embed_tokens"),
        causal("gemma", "Gemma", *LLAMA, "lm_head", options=GEMMA, embedding="embed_tokens"),
        causal("phi3", "Phi3", "qkv_proj o_proj gate_up_proj down_proj", "qkv_proj / down_proj",
               LLAMA[2], "lm_head", options=GROUPED, embedding="embed_tokens"),
        specimen("gpt2", partial(tiny, "GPT2LMHeadModel", "GPT2Config", **GPT, n_embd=32, n_layer=2,
                                 n_head=4, n_positions=32),
                 "c_attn c_proj c_fc", "c_attn / mlp.c_proj", "ln_1 ln_2 ln_f", "ln_f",
                 embedding="wte", replication=True),
        causal("opt", "OPT", OUT, "k_proj v_proj / fc2", "self_attn_layer_norm final_layer_norm",
               "decoder.final_layer_norm", embedding="embed_tokens",
               options={**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
        causal("bloom", "Bloom", *BLOOM, "ln_f", embedding="word_embeddings",
               options={**GPT, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
        causal("falcon", "Falcon", *BLOOM, "ln_f", options=TEXT, embedding="word_embeddings"),
        specimen("bert", partial(tiny, "BertForSequenceClassification", "BertConfig", **LABELS),
                 *BERT, "classifier", embedding="word_embeddings"),
        specimen("roberta", partial(tiny, "RobertaForMaskedLM", "RobertaConfig", **TEXT),
                 *BERT, "lm_head.dense lm_head.layer_norm", embedding="word_embeddings"),
        specimen("t5", partial(tiny, "T5ForConditionalGeneration", "T5Config", vocab_size=64,
                               d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
                 "q k v o wi wo", "k v / wo", "layer_norm final_layer_norm",
                 "decoder.final_layer_norm", embedding="embed_tokens", tokens="shared",
                 inputs=pairs),
        specimen("bart", partial(tiny, "BartForConditionalGeneration", "BartConfig", **SEQ2SEQ,
                                 max_position_embeddings=32),
                 *BART, "decoder.layernorm_embedding", embedding="embed_tokens", tokens="shared",
                 inputs=pairs),
        specimen("vit", partial(tiny, "ViTForImageClassification", "ViTConfig", **IMAGE),
                 QKVO + "fc1 fc2", "k_proj v_proj / fc2",
                 "layernorm_before layernorm_after vit.layernorm", "classifier",
                 convolution="projection", inputs=lambda: {"pixel_values": noise(2, 3, 16, 16)}),
        specimen("clip", partial(tiny, "CLIPModel", "CLIPConfig", projection_dim=16,
                                 text_config=TEXT, vision_config=IMAGE),
                 OUT + " visual_projection text_projection", "k_proj v_proj / fc2",
                 "layer_norm1 layer_norm2 pre_layrnorm post_layernorm final_layer_norm",
                 "visual_projection", embedding="token_embedding", convolution="patch_embedding",
                 inputs=lambda: ids() | {"pixel_values": noise(3, 3, 16, 16)},
                 output=lambda o: o.logits_per_image),
        specimen("whisper", partial(tiny, "WhisperForConditionalGeneration", "WhisperConfig",
                                    **SEQ2SEQ, num_mel_bins=8, max_source_positions=16,
                                    max_target_positions=16),
                 *BART, "decoder.layer_norm", embedding="embed_tokens", convolution="conv1",
                 inputs=lambda: {"input_features": noise(2, 8, 32),
                                 "decoder_input_ids": torch.tensor(IDS)}),
        specimen("qwen2_5_vl", partial(tiny, "Qwen2_5_VLForConditionalGeneration",
                                       "Qwen2_5_VLConfig", vision_config=QWEN_VISION,
                                       text_config={**GROUPED, "rope_parameters": ROPE},
                                       image_token_id=60, video_token_id=61,
                                       vision_start_token_id=62, vision_end_token_id=63),
                 QKVO + MLP + " qkv attn.proj merger.mlp.0 merger.mlp.2",
                 "k_proj v_proj qkv / down_proj", LLAMA[2] + " norm1 norm2 ln_q", "lm_head",
                 embedding="embed_tokens", convolution="patch_embed.proj",
                 inputs=lambda: {"input_ids": torch.tensor(PICTURE),
                                 "mm_token_type_ids": (torch.tensor(PICTURE) == 60).int(),
                                 "pixel_values": noise(16, 96),
                                 "image_grid_thw": torch.tensor([[1, 4, 4]])}),
        causal("mixtral", "Mixtral", QKVO, "k_proj v_proj / ", LLAMA[2], "lm_head", experts=EXPERTS,
               options=GROUPED | {"num_local_experts": 4}, embedding="embed_tokens"),
        causal("qwen3_moe", "Qwen3Moe", QKVO, "k_proj v_proj / ", LLAMA[2] + " q_norm k_norm",
               "lm_head", experts=EXPERTS,
               options={**GEMMA, "num_experts": 4, "num_experts_per_tok": 2,
                        "moe_intermediate_size": 24}, embedding="embed_tokens"),
        # Not dt_proj, of which it reads the weight: there PEFT's adapter is dead until merged.
        causal("mamba", "Mamba", "in_proj x_proj", "x_proj / in_proj", "norm norm_f", "norm_f",
               embedding="embeddings", convolution="conv1d",
               options={**GPT, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
        *(specimen(name, partial(plain, groups), "body.0 body.2 head", "body.0 / body.2", "norm",
                   "norm", embedding="embed", convolution="conv",
                   inputs=lambda: ids() | {"pixel_values": noise(2, 4, 8, 8)}, output=lambda o: o)
          for name, groups in (("plain", 1), ("grouped", 2))),
    )
}  # fmt: skip


def config(cls: str, targets: tuple[str | None, ...], **options: Any) -> Any:
    return getattr(peft, cls)(target_modules=list(targets), **options)


lora = partial(config, "LoraConfig", r=4, lora_alpha=6)
ia3 = partial(config, "IA3Config")
ADALORA = {"init_r": 6, "target_r": 4, "lora_alpha": 8, "total_step": 10}
RECIPES: dict[str, Callable[[Specimen], Any]] = {
    "lora": lambda s: lora(s.linears),
    "rslora": lambda s: lora(s.linears, use_rslora=True),
    "dora": lambda s: lora(s.linears, use_dora=True),
    "lora bias=all": lambda s: lora(s.linears, bias="all"),
    "lora_bias": lambda s: lora(s.linears, lora_bias=True),
    "lora on embedding": lambda s: lora((s.embedding,)),
    "dora on embedding": lambda s: lora((s.embedding,), use_dora=True),
    "lora on convolution": lambda s: lora((s.convolution,)),
    "dora on convolution": lambda s: lora((s.convolution,), use_dora=True),
    "pissa": lambda s: lora(s.linears, init_lora_weights="pissa"),
    "olora": lambda s: lora(s.linears, init_lora_weights="olora"),
    "vera": lambda s: config("VeraConfig", s.linears, r=8),
    "loha": lambda s: config("LoHaConfig", s.linears, r=4, alpha=6),
    "lokr": lambda s: config("LoKrConfig", s.linears, r=4, alpha=6),
    "loha on convolution": lambda s: config("LoHaConfig", (s.convolution,), r=4, alpha=6),
    "lokr on convolution": lambda s: config("LoKrConfig", (s.convolution,), r=4, alpha=6),
    "ia3": lambda s: ia3(s.keys_values + s.feedforward, feedforward_modules=list(s.feedforward)),
    "adalora": lambda s: config("AdaLoraConfig", s.linears, **ADALORA),
    "oft": lambda s: config("OFTConfig", s.linears, oft_block_size=4),
    "boft": lambda s: config("BOFTConfig", s.linears, boft_block_size=4, boft_n_butterfly_factor=2),
    "lora + tokens": lambda s: lora(s.linears, trainable_token_indices={s.tokens: TOKENS}),
    "tokens": lambda s: config("TrainableTokensConfig", (s.tokens,), token_indices=TOKENS),
    "modules_to_save": lambda s: lora(s.linears, modules_to_save=list(s.saved)),
    "layernorm": lambda s: config("LNTuningConfig", s.norms),
    "experts": lambda s: lora(s.linears, target_parameters=list(s.experts)),
    "layer replication": lambda s: lora(s.linears, layer_replication=[(0, 2), (1, 2)]),
}
# What a specimen must have for a method with that word in its name.
NEEDS = ("embedding", "tokens", "convolution", "experts", "replication")


def per_pair(*rows: tuple[str, str, str]) -> dict[tuple[str, str], str]:
    """By method and specimen, from rows of `methods, specimens, text`."""
    return {(m, s): text for ms, ss, text in rows for m in ms.split(", ") for s in ss.split()}


# By method and specimen, why there is no adapter: it lacks what the method applies to, or PEFT's
# own adapter cannot be made, or does not survive PEFT's own saving and loading.
UNSUPPORTED: dict[tuple[str, str], str] = {
    (method, s.name): f"has no {need}"
    for method in RECIPES
    for need in NEEDS
    for s in SPECIMENS.values()
    if need in method and not getattr(s, need)
} | per_pair(
    (", ".join(m for m in RECIPES if "convolution" in m), "whisper",
     "the encoder reads conv1.stride, which PEFT's wrapper has not"),
    ("lora on convolution, dora on convolution", "mamba", "PEFT refuses conv1d of Mamba models"),
    ("loha on convolution, lokr on convolution", "mamba",
     "the adapter is dead: Mamba reads conv1d.weight and never calls the layer"),
    ("loha on convolution, lokr on convolution", "qwen2_5_vl", "PEFT has it not for Conv3d"),
    ("loha, lokr, oft, boft", "gpt2", "PEFT has it not for Conv1D"),
    ("olora", "gpt2", "PEFT does not transpose Conv1D's weight"),
    ("layer replication", "gpt2 opt bloom falcon mamba",
     "PEFT finds layers only at model.layers and, without a head, at h"),
    ("layer replication", "qwen2 qwen3",
     "PEFT does not lengthen config.layer_types, which the forward indexes"),
)  # fmt: skip

# By method and specimen, what is wrong with PEFT's merge_and_unload.
PEFT_MERGE_WRONG: dict[tuple[str, str], str] = per_pair(
    ("lora_bias", "llama qwen2 qwen3 gemma phi3 falcon t5 clip whisper qwen2_5_vl mixtral qwen3_moe"
     " mamba plain grouped", "raises: a layer without a bias gets none"),
    ("lora on embedding, dora on embedding",
     "gemma gpt2 opt bloom falcon roberta t5 bart whisper mamba",
     "the tied head, which has no adapter, changes with the embedding"),
    ("tokens, lora + tokens", "roberta",
     "unmerged is wrong, merged right: the forward of a tied head leaves its bias out"),
    ("lora on convolution, dora on convolution", "grouped", "raises: groups > 1"),
    ("layer replication", "llama gemma phi3 mixtral qwen3_moe",
     "all copies' updates are added to the one weight that they share"),
)  # fmt: skip


def configure(method: str, specimen: Specimen) -> Any:
    return None if (method, specimen.name) in UNSUPPORTED else RECIPES[method](specimen)


METHODS: dict[str, Callable[[Specimen], Any]] = {m: partial(configure, m) for m in RECIPES}
INITIAL = ("pissa", "olora")  # which change the base, and are saved as plain LoRA


def untrained(method: str, specimen: Specimen) -> Any:
    """The adapter as PEFT initializes it, the same at every call."""
    options = METHODS[method](specimen)
    if options is None:
        raise ValueError(f"{method} on {specimen.name}: {UNSUPPORTED[method, specimen.name]}")
    model = specimen.build()
    torch.manual_seed(1)
    return peft.get_peft_model(model, options).eval()


def adapter(method: str, specimen: Specimen) -> Any:
    """A PEFT model with every trained tensor random, which computes something else than its base.

    Noise is added in proportion and absolutely, so what starts at 0 moves and what scales is kept
    near 1. AdaLoRA's triplets start near 0 three times over, so its E gets more of it.
    """
    model = untrained(method, specimen)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1 + 0.2 * torch.randn_like(parameter))
            parameter.data.add_(torch.randn_like(parameter), alpha=1 if "lora_E" in name else 0.1)
    moved = distance(run(model, specimen), run(specimen.build(), specimen))
    assert moved > 1e-3, f"{method} on {specimen.name} moves the output by only {moved:.1e}"
    return model


def save(model: Any, method: str, specimen: Specimen, path: Path) -> None:
    """Writes the adapter as PEFT does, at `path`; PiSSA and OLoRA as plain LoRA.

    PEFT changes the model's config while it converts, so the model serves for nothing after that.
    """
    initial = None
    if method in INITIAL:
        initial = path.with_name(f"{path.name}-initial")
        start = untrained(method, specimen)
        start.peft_config["default"].init_lora_weights = True  # or loading would change the base
        start.save_pretrained(initial)
    model.save_pretrained(path, path_initial_model_for_weight_conversion=initial)


def run(model: Any, specimen: Specimen) -> Tensor:
    with torch.no_grad():
        return specimen.output(model(**specimen.inputs()))


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference over the largest absolute value of the second."""
    if a.shape != b.shape or not a.isfinite().all():
        return float("inf")
    return float((a - b).abs().max() / b.abs().max())


def attempt(job: Callable[[], float], most: float) -> tuple[float, str]:
    """A job's error, and what is wrong with it, or nothing."""
    try:
        error = job()
        return error, "" if error <= most else f"relative error {error:.1e}"
    except Exception as raised:
        return float("nan"), f"{type(raised).__name__}: {str(raised).splitlines()[0][:150]}"


def trial(method: str, specimen: Specimen) -> tuple[str, str, str]:
    """What the table says; then what fails in the round trip, and what in the merge."""

    def round_trip() -> float:
        model = adapter(method, specimen)
        want = run(model, specimen)
        with tempfile.TemporaryDirectory() as folder:
            save(model, method, specimen, Path(folder, "adapter"))
            again = peft.PeftModel.from_pretrained(specimen.build(), Path(folder, "adapter"))
            return distance(run(again.eval(), specimen), want)

    def merge() -> float:
        model = adapter(method, specimen)
        want = run(model, specimen)
        return distance(run(model.merge_and_unload().eval(), specimen), want)

    _, lost = attempt(round_trip, 1e-5 if method in INITIAL else 1e-6)
    if lost:
        return "trip", lost, ""
    error, wrong = attempt(merge, 1e-4)
    return ("raises" if error != error else f"{'!' if wrong else ''}{error:.0e}"), "", wrong


def main() -> int:
    """Prints the table, and says what is not as recorded."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    chosen = [SPECIMENS[name] for name in sys.argv[1:] or SPECIMENS]
    surprises = []
    print(" " * 20, *(f"{s.name[:7]:>7}" for s in chosen))
    for method in METHODS:
        row = []
        for s in chosen:
            reason = UNSUPPORTED.pop((method, s.name), "")  # what PEFT cannot is tried too
            if reason.startswith("has no"):
                row.append("-")
                continue
            cell, lost, wrong = trial(method, s)
            row.append(cell)
            known = (method, s.name) in PEFT_MERGE_WRONG
            if bool(lost) != bool(reason) or bool(wrong) != known:
                surprises.append(f"{method} on {s.name}: {lost or wrong or 'is right'}")
        print(f"{method:20}", *(f"{cell:>7}" for cell in row), flush=True)
    print(*surprises, sep="\n")
    return len(surprises) > 0


if __name__ == "__main__":
    sys.exit(main())
