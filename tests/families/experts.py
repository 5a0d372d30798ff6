"""Mixtures of experts: fused or one by one, transposed, with biases, shared ones, in a group."""

from __future__ import annotations

from .specimen import (
    EXPERTS,
    EXPERTS_OF,
    GEMMA,
    GROUPED,
    LLAMA,
    QKVO,
    T5,
    TEXT,
    Specimen,
    causal,
    sequences,
)

WORDS = "embed_tokens"
ATTENTION = (QKVO, "k_proj v_proj / ")
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
SPARSE = {
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 2,
    "num_experts": 4, "expert_capacity": 64, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip

MIXTURES: tuple[Specimen, ...] = (
    causal("mixtral", "Mixtral", *ATTENTION, LLAMA[2], "lm_head", experts=EXPERTS,
           options=GROUPED | {"num_local_experts": 4}, embedding=WORDS),
    causal("qwen3_moe", "Qwen3Moe", *ATTENTION, LLAMA[2] + " q_norm k_norm",
           "lm_head", experts=EXPERTS, options={**GEMMA, **EXPERTS_OF}, embedding=WORDS),
    causal("gpt_oss", "GptOss", *ATTENTION, LLAMA[2], "lm_head", experts=EXPERTS,
           options={**GEMMA, **FOUR, "sliding_window": 4}, embedding=WORDS),
    # Not gate_proj and its kin, which PEFT takes for parameters of the fused experts.
    causal("deepseek_v3", "DeepseekV3",
           "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj", "kv_b_proj / down_proj",
           LLAMA[2] + " q_a_layernorm kv_a_layernorm", "lm_head", experts=EXPERTS,
           options={**TEXT, **LATENT}, embedding=WORDS),
    sequences("switch", "SwitchTransformers", "q k v o", "k v / ", "layer_norm final_layer_norm",
              "decoder.final_layer_norm", options={**T5, **SPARSE}),
)  # fmt: skip
