"""Decoders of text: where they normalize, what is packed, tied, scaled, shared or parallel."""

from __future__ import annotations

from .specimen import (
    GEMMA,
    GPT,
    GPT2,
    GROUPED,
    LLAMA,
    OUT,
    TEXT,
    UNCACHED,
    Specimen,
    causal,
    model,
)

PACKED = "query_key_value dense dense_h_to_4h dense_4h_to_h"
BLOOM = (PACKED, "query_key_value / dense_4h_to_h", "input_layernorm post_attention_layernorm ln_f")
SANDWICH = " post_feedforward_layernorm"
WORDS = "embed_tokens"

DECODERS: tuple[Specimen, ...] = (
    causal("llama", "Llama", *LLAMA, "lm_head norm", options=GROUPED, embedding=WORDS),
    causal("qwen2", "Qwen2", *LLAMA, "lm_head", options=GROUPED, embedding=WORDS),
    causal("qwen3", "Qwen3", LLAMA[0], LLAMA[1], LLAMA[2] + " q_norm k_norm", "lm_head",
           options=GEMMA, embedding=WORDS),
    causal("gemma", "Gemma", *LLAMA, "lm_head", options=GEMMA, embedding=WORDS),
    causal("gemma3", "Gemma3", LLAMA[0], LLAMA[1],
           LLAMA[2] + " q_norm k_norm pre_feedforward_layernorm" + SANDWICH, "model.norm",
           config="Gemma3Text", embedding=WORDS,
           options={**GEMMA, "sliding_window": 4,
                    "layer_types": ["sliding_attention", "full_attention"]}),
    causal("phi3", "Phi3", "qkv_proj o_proj gate_up_proj down_proj", "qkv_proj / down_proj",
           LLAMA[2], "lm_head", options=GROUPED, embedding=WORDS),
    causal("cohere", "Cohere", LLAMA[0], LLAMA[1], "input_layernorm norm", "model.norm",
           options=GROUPED, embedding=WORDS),
    causal("olmo2", "Olmo2", LLAMA[0], LLAMA[1],
           "post_attention_layernorm norm q_norm k_norm" + SANDWICH, "lm_head",
           options=GROUPED, embedding=WORDS),
    model("gpt2", "GPT2LMHeadModel", "GPT2", "c_attn c_proj c_fc", "c_attn / mlp.c_proj",
          "ln_1 ln_2 ln_f", "ln_f", options=GPT2 | UNCACHED, embedding="wte",
          replication=True, task="CAUSAL_LM"),
    causal("gpt_bigcode", "GPTBigCode", "c_attn c_proj c_fc", "c_attn / mlp.c_proj",
           "ln_1 ln_2 ln_f", "ln_f", options=GPT2, embedding="wte"),
    causal("gpt_neox", "GPTNeoX", PACKED, "query_key_value / dense_4h_to_h",
           "input_layernorm post_attention_layernorm final_layer_norm", "final_layer_norm",
           options=TEXT, embedding="embed_in"),
    causal("opt", "OPT", OUT, "k_proj v_proj / fc2", "self_attn_layer_norm final_layer_norm",
           "decoder.final_layer_norm", embedding=WORDS,
           options={**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    causal("bloom", "Bloom", *BLOOM, "ln_f", embedding="word_embeddings",
           options={**GPT, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    causal("falcon", "Falcon", *BLOOM, "ln_f", options=TEXT, embedding="word_embeddings"),
    causal("mpt", "Mpt", "Wqkv out_proj up_proj down_proj", "Wqkv / down_proj",
           "norm_1 norm_2 norm_f", "norm_f", embedding="wte",
           options={"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4,
                    "max_seq_len": 32}),
)  # fmt: skip
