"""Encoders of text, and encoders with decoders: shared layers, relative positions, no attention."""

from __future__ import annotations

from .specimen import (
    BART,
    LABELS,
    SEQ2SEQ,
    T5,
    TEXT,
    UNCACHED,
    Specimen,
    model,
    sequences,
)

BERT = (
    "query key value attention.output.dense intermediate.dense output.dense",
    "key value / output.dense", "LayerNorm",
)  # fmt: skip
GLOBAL = "query_global key_global value_global "
WORDS = "word_embeddings"
UNSTARTED = {k: v for k, v in TEXT.items() if "bos" not in k and "eos" not in k}
CLASSES = "SEQ_CLS"
SQUEEZED = {f"{part}_groups": 2 for part in ("q", "k", "v", "intermediate", "output")}
T5_NORMS = ("layer_norm final_layer_norm", "decoder.final_layer_norm")

ENCODERS: tuple[Specimen, ...] = (
    model("bert", "BertForSequenceClassification", "Bert", *BERT, "classifier",
          options=LABELS | UNCACHED, embedding=WORDS, task=CLASSES),
    model("roberta", "RobertaForMaskedLM", "Roberta", *BERT, "lm_head.dense lm_head.layer_norm",
          options=TEXT | UNCACHED, embedding=WORDS, task="FEATURE_EXTRACTION"),
    model("albert", "AlbertForMaskedLM", "Albert",
          "query key value attention.dense ffn ffn_output", "key value / ffn_output",
          "LayerNorm full_layer_layer_norm", "predictions.dense predictions.LayerNorm",
          options={**TEXT, "embedding_size": 16}, embedding=WORDS, task="FEATURE_EXTRACTION"),
    model("deberta_v2", "DebertaV2ForSequenceClassification", "DebertaV2",
          "query_proj key_proj value_proj pos_key_proj pos_query_proj attention.output.dense "
          "intermediate.dense output.dense", "key_proj value_proj / output.dense", "LayerNorm",
          "classifier", embedding=WORDS, task=CLASSES,
          options={**UNSTARTED, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                   "position_biased_input": False}),
    model("modernbert", "ModernBertForMaskedLM", "ModernBert", "Wqkv Wo Wi", "Wqkv / mlp.Wo",
          "mlp_norm final_norm embeddings.norm head.norm", "head.dense head.norm",
          options={**TEXT, "cls_token_id": 1, "sep_token_id": 2}, embedding="tok_embeddings",
          task="FEATURE_EXTRACTION"),
    model("squeezebert", "SqueezeBertForSequenceClassification", "SqueezeBert", "pooler.dense",
          "pooler.dense / ", "layernorm LayerNorm", "classifier", embedding=WORDS,
          convolution="post_attention.conv1d", task=CLASSES,
          options={**TEXT, "embedding_size": 32, "post_attention_groups": 1, **SQUEEZED}),
    model("longformer", "LongformerForSequenceClassification", "Longformer",
          GLOBAL + BERT[0], BERT[1], BERT[2], "classifier.dense classifier.out_proj",
          options={**TEXT, "attention_window": 4}, embedding=WORDS, task=CLASSES),
    model("fnet", "FNetForSequenceClassification", "FNet", "intermediate.dense output.dense",
          " / output.dense", "LayerNorm", "classifier", options=TEXT, embedding=WORDS,
          task=CLASSES),
)  # fmt: skip

ENCODERS_DECODERS: tuple[Specimen, ...] = (
    sequences("t5", "T5", "q k v o wi wo", "k v / wo", *T5_NORMS, options=T5),
    sequences("bart", "Bart", *BART, "decoder.layernorm_embedding",
              options={**SEQ2SEQ, "max_position_embeddings": 32}),
    sequences("m2m_100", "M2M100", *BART, "decoder.layer_norm",
              options={**SEQ2SEQ, "max_position_embeddings": 32}),
)  # fmt: skip
