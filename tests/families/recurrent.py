"""State spaces, linear recurrences and short convolutions, alone or beside attention."""

from __future__ import annotations

from .specimen import EXPERTS, EXPERTS_OF, GEMMA, GPT, GROUPED, LLAMA, MLP, QKVO, Specimen, causal

WORDS = "embed_tokens"
STATES = {**GPT, "pad_token_id": 0, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
JAMBA = {
    **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2,
    "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
}  # fmt: skip
HEADS = {
    f"mamba_{key}": n
    for key, n in {"d_ssm": 32, "n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 1,
                   "chunk_size": 8}.items()
}  # fmt: skip
DELTA = {
    **GEMMA, **EXPERTS_OF, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
UNPOSITIONED = {k: v for k, v in GROUPED.items() if k != "max_position_embeddings"}

RECURRENT: tuple[Specimen, ...] = (
    # Not dt_proj, of which it reads the weight: there PEFT's adapter is dead until merged.
    causal("mamba", "Mamba", "in_proj x_proj", "x_proj / in_proj", "norm norm_f", "norm_f",
           embedding="embeddings", convolution="conv1d",
           options={**GPT, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    causal("mamba2", "Mamba2", "in_proj", "in_proj / ", "norm norm_f", "norm_f",
           embedding="embeddings", convolution="conv1d",
           options={**STATES, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    causal("jamba", "Jamba", "in_proj x_proj out_proj " + QKVO + MLP, "k_proj v_proj / down_proj",
           "input_layernorm pre_ff_layernorm final_layernorm dt_layernorm b_layernorm c_layernorm",
           "lm_head", embedding=WORDS, convolution="conv1d", options=JAMBA,
           experts=tuple(f"feed_forward.experts.{part}_proj" for part in ("gate_up", "down"))),
    causal("falcon_h1", "FalconH1", "in_proj " + QKVO + MLP, "k_proj v_proj / down_proj",
           "input_layernorm pre_ff_layernorm final_layernorm", "lm_head", embedding=WORDS,
           convolution="conv1d", options={**GROUPED, **HEADS}),
    causal("qwen3_next", "Qwen3Next",
           QKVO + "in_proj_qkvz in_proj_ba linear_attn.out_proj",
           "k_proj v_proj / down_proj", LLAMA[2] + " q_norm k_norm linear_attn.norm", "lm_head",
           experts=EXPERTS, embedding=WORDS, convolution="conv1d", options=DELTA),
    causal("recurrent_gemma", "RecurrentGemma", QKVO + MLP + " linear_x linear_y linear_out",
           "k_proj v_proj / down_proj", "temporal_pre_norm channel_pre_norm final_norm",
           "final_norm", embedding=WORDS, convolution="conv_1d",
           options={**UNPOSITIONED, "lru_width": 32, "attention_window_size": 8,
                    "block_types": ["recurrent", "attention"]}),
    causal("rwkv", "Rwkv", "key value receptance output",
           "attention.key attention.value / feed_forward.value", "pre_ln ln1 ln2 ln_out", "ln_out",
           embedding="embeddings",
           options={"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 32,
                    "intermediate_size": 48, "num_hidden_layers": 2, "context_length": 32}),
)  # fmt: skip
