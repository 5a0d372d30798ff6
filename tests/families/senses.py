"""Vision and speech, several of them with text, and modules that are none of transformers'."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .specimen import (
    BART,
    GEMMA,
    GROUPED,
    IDS,
    IMAGE,
    LLAMA,
    MLP,
    OUT,
    QKVO,
    SEQ2SEQ,
    TEXT,
    TOWER,
    UNCACHED,
    Inputs,
    Specimen,
    ids,
    model,
    noise,
    pictures,
    random_,
    specimen,
)

QWEN_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
    "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
PICTURE = [[5, 62, 60, 60, 60, 60, 63, 7, 11, 23]]  # 62: an image begins, 60: a part of it
WAVES = {
    **TEXT, "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4],
    "window_size": 4, "num_labels": 5,
}  # fmt: skip
RESNET = {
    "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
    "num_labels": 5,
}  # fmt: skip
SOUND = {
    "num_mel_bins": 8, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "max_source_positions": 16, "model_type": "qwen2_audio_encoder",
}  # fmt: skip
BOTH = OUT + " o_proj " + MLP  # of a tower and of a language model
VIT = (QKVO + "fc1 fc2", "k_proj v_proj / fc2")
PATCHES, LABEL = "projection", "classifier"


def waves() -> Inputs:
    return {"input_values": noise(2, 400)}


VISION: tuple[Specimen, ...] = (
    model("vit", "ViTForImageClassification", "ViT", *VIT,
          "layernorm_before layernorm_after vit.layernorm", LABEL, options=IMAGE,
          convolution=PATCHES, inputs=pictures(2, 3, 16, 16)),
    model("swin", "SwinForImageClassification", "Swin", VIT[0] + " reduction", VIT[1],
          "layernorm_before layernorm_after downsample.norm swin.layernorm", LABEL, options=SWIN,
          convolution=PATCHES, inputs=pictures(2, 3, 16, 16)),
    model("convnext", "ConvNextForImageClassification", "ConvNext", "pwconv1 pwconv2",
          " / pwconv2", "layernorm", LABEL, convolution="patch_embeddings",
          options={"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "num_labels": 5},
          inputs=pictures(2, 3, 32, 32)),
    model("resnet", "ResNetForImageClassification", "ResNet", "classifier.1", "classifier.1 / ",
          "normalization", "shortcut.normalization", options=RESNET, convolution="convolution",
          inputs=pictures(2, 3, 32, 32)),
)  # fmt: skip

SPEECH: tuple[Specimen, ...] = (
    model("whisper", "WhisperForConditionalGeneration", "Whisper", *BART, "decoder.layer_norm",
          embedding="embed_tokens", convolution="conv1",
          options={**SEQ2SEQ, **UNCACHED, "num_mel_bins": 8, "max_source_positions": 16,
                   "max_target_positions": 16},
          inputs=lambda: {"input_features": noise(2, 8, 32),
                          "decoder_input_ids": torch.tensor(IDS)}),
    model("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2",
          "k_proj v_proj q_proj out_proj intermediate_dense output_dense "
          "feature_projection.projection", "k_proj v_proj / output_dense",
          "layer_norm final_layer_norm", "lm_head", convolution="conv_layers.1.conv",
          options=WAVES, inputs=waves),
    model("conformer", "Wav2Vec2ConformerForCTC", "Wav2Vec2Conformer",
          "linear_q linear_k linear_v linear_out linear_pos intermediate_dense output_dense",
          "linear_k linear_v / output_dense", "ffn1_layer_norm self_attn_layer_norm "
          "conv_module.layer_norm ffn2_layer_norm final_layer_norm", "lm_head",
          convolution="pointwise_conv1", options={**WAVES, "conv_depthwise_kernel_size": 3},
          inputs=waves),
)  # fmt: skip

SEVERAL: tuple[Specimen, ...] = (
    model("clip", "CLIPModel", "CLIP", OUT + " visual_projection text_projection",
          "k_proj v_proj / fc2",
          "layer_norm1 layer_norm2 pre_layrnorm post_layernorm final_layer_norm",
          "visual_projection", embedding="token_embedding", convolution="patch_embedding",
          options={"projection_dim": 16, "text_config": TEXT, "vision_config": IMAGE},
          inputs=lambda: ids() | pictures(3, 3, 16, 16)(), output=lambda o: o.logits_per_image),
    model("blip", "BlipForConditionalGeneration", "Blip",
          "qkv projection fc1 fc2 query key value attention.output.dense crossattention.output."
          "dense intermediate.dense output.dense", "key value qkv / output.dense",
          "layer_norm1 layer_norm2 LayerNorm post_layernorm", "predictions.transform.dense",
          embedding="word_embeddings", convolution="patch_embedding",
          options={"text_config": {**TEXT, "encoder_hidden_size": 32, "projection_dim": 16},
                   "vision_config": {**TOWER, "projection_dim": 16}, "projection_dim": 16},
          inputs=lambda: {"input_ids": torch.tensor(IDS)[:, :4], **pictures(2, 3, 16, 16)()}),
    model("llava", "LlavaForConditionalGeneration", "Llava", BOTH + " linear_1 linear_2",
          "k_proj v_proj / down_proj fc2", LLAMA[2] + " layer_norm1 layer_norm2 pre_layrnorm",
          "lm_head", embedding="embed_tokens", convolution="patch_embedding",
          options={"text_config": {**GROUPED, **UNCACHED, "model_type": "llama"},
                   "vision_config": {**TOWER, "model_type": "clip_vision_model"},
                   "image_token_id": 60, "vision_feature_layer": -1},
          inputs=lambda: {"input_ids": torch.tensor([[1] + [60] * 16 + [7, 11]]),
                          **pictures(1, 3, 16, 16)()}),
    model("paligemma", "PaliGemmaForConditionalGeneration", "PaliGemma",
          BOTH + " multi_modal_projector.linear", "k_proj v_proj / down_proj fc2",
          LLAMA[2] + " layer_norm1 layer_norm2 post_layernorm", "language_model.norm",
          embedding="embed_tokens", convolution="patch_embedding",
          options={"text_config": {**GEMMA, **UNCACHED, "model_type": "gemma"},
                   "vision_config": {**TOWER, "model_type": "siglip_vision_model",
                                     "vision_use_head": False, "projection_dim": 32},
                   "image_token_id": 60, "projection_dim": 32},
          inputs=lambda: {"input_ids": torch.tensor([[60] * 16 + [1, 7, 11]]),
                          **pictures(1, 3, 16, 16)()}),
    model("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VL",
          QKVO + MLP + " qkv attn.proj merger.mlp.0 merger.mlp.2",
          "k_proj v_proj qkv / down_proj", LLAMA[2] + " norm1 norm2 ln_q", "lm_head",
          embedding="embed_tokens", convolution="patch_embed.proj",
          options={"vision_config": QWEN_VISION, **UNCACHED,
                   "text_config": {**GROUPED, "rope_parameters": ROPE},
                   "image_token_id": 60, "video_token_id": 61,
                   "vision_start_token_id": 62, "vision_end_token_id": 63},
          inputs=lambda: {"input_ids": torch.tensor(PICTURE),
                          "mm_token_type_ids": (torch.tensor(PICTURE) == 60).int(),
                          "pixel_values": noise(16, 96),
                          "image_grid_thw": torch.tensor([[1, 4, 4]])}),
    model("qwen2_audio", "Qwen2AudioForConditionalGeneration", "Qwen2Audio",
          BOTH + " multi_modal_projector.linear", "k_proj v_proj / down_proj fc2",
          LLAMA[2] + " self_attn_layer_norm final_layer_norm", "lm_head",
          embedding="embed_tokens", convolution="conv1",
          options={"text_config": {**GROUPED, **UNCACHED, "model_type": "qwen2"},
                   "audio_config": SOUND, "audio_token_id": 60},
          inputs=lambda: {"input_ids": torch.tensor([[1] + [60] * 8 + [7, 11]]),
                          "input_features": noise(1, 8, 32),
                          "feature_attention_mask": torch.ones(1, 32, dtype=torch.long)}),
)  # fmt: skip


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


def plain(groups: int) -> Any:
    torch.manual_seed(0)
    return random_(Plain(groups))


MODULES: tuple[Specimen, ...] = tuple(
    specimen(name, partial(plain, groups), "body.0 body.2 head", "body.0 / body.2", "norm",
             "norm", embedding="embed", convolution="conv",
             inputs=lambda: ids() | {"pixel_values": noise(2, 4, 8, 8)}, output=lambda o: o)
    for name, groups in (("plain", 1), ("grouped", 2))
)  # fmt: skip
