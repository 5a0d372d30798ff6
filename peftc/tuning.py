"""What a training is told: data, length, optimizer, schedule; one field for each option."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from peftc.contract import Place

# Those of bitsandbytes, which need a GPU, and what does the same without it.
ON_GPU = {
    "adamw_8bit": "adamw",
    "paged_adamw": "adamw",
    "paged_adamw_8bit": "adamw",
    "lion_8bit": "adamw",
    "paged_lion_8bit": "adamw",
}
OPTIMIZERS = {  # by transformers' names of them
    "adamw": "adamw_torch",
    "adamw_fused": "adamw_torch_fused",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "rmsprop": "rmsprop",
    "adagrad": "adagrad",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion_8bit": "lion_8bit",
    "paged_lion_8bit": "paged_lion_8bit",
}


class Data(BaseModel):
    """Examples and what becomes of them.

    Each has a text (`text`), a prompt and its completion (`prompt`, `completion`), or a chat
    (`messages`, each with a `role` and a `content`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Place = Field(
        description="a .jsonl, .json, .csv or .parquet file, or the hub id of a dataset"
    )
    subset: str | None = Field(None, description="of a dataset on the hub")
    split: str = Field("train", description="of a dataset on the hub")
    columns: dict[str, str] = Field(
        {}, description="other names of columns: prompt=question,completion=answer"
    )
    chat: bool = Field(
        False, description="ask the prompt and answer it in the model's chat template"
    )
    loss_on: Literal["completion", "all"] = Field(
        "completion",
        description="learn completions and the assistant's turns only, or every token; of a plain "
        "text always every token",
    )
    max_length: int | None = Field(
        None, gt=1, description="tokens of an example at most; default: what the model takes"
    )
    too_long: Literal["error", "truncate", "skip"] = Field(
        "error", description="what to do with a longer example"
    )


class Tuning(Data):
    """A training: its data, and how it learns from them."""

    eval_data: Place | None = Field(None, description="examples to evaluate on, as --data")
    eval_share: float = Field(
        0.0, ge=0, lt=1, description="share of the examples that is held out to evaluate on"
    )
    pack: bool = Field(
        False,
        description="put several examples into one row; none attends to another, which is tried "
        "on the model first",
    )
    steps: int | None = Field(None, gt=0, description="steps of the optimizer, instead of epochs")
    epochs: float = Field(1.0, gt=0, allow_inf_nan=False, description="passes over the examples")
    batch_size: int = Field(
        16, gt=0, description="rows of a step, over all processes and accumulated gradients"
    )
    micro_batch: int | None = Field(
        None, gt=0, description="rows at once on one device; default: all, nothing accumulated"
    )
    lr: float = Field(2e-4, gt=0, allow_inf_nan=False, description="learning rate")
    lr_ratio: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="how many times that B's is (LoRA+)"
    )
    schedule: Literal["linear", "cosine", "constant", "polynomial", "inverse_sqrt"] = Field(
        "linear", description="of the learning rate, behind the warm-up"
    )
    warmup: float = Field(
        0.03, ge=0, allow_inf_nan=False, description="steps, or below 1 the share of all steps"
    )
    optimizer: Literal[
        "adamw", "adamw_fused", "adafactor", "sgd", "rmsprop", "adagrad", "adamw_8bit",
        "paged_adamw", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit",
    ] = Field(
        "adamw", description="the paged and 8-bit ones are bitsandbytes', and need a GPU"
    )  # fmt: skip
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="AdamW's")
    clip: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="largest norm of the gradients; 0: any"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the frozen weights; auto: as they are stored"
    )
    precision: Literal["none", "bf16", "fp16"] = Field(
        "none", description="mixed precision: what is computed in, by autocast"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep no activations within layers, and compute them again"
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto: the GPU where there is one")
    eval_steps: int | None = Field(
        None, gt=0, description="steps between evaluations; default: at the end alone"
    )
    patience: int | None = Field(
        None, gt=0, description="stop after so many evaluations without a better one, and take it"
    )
    save_steps: int = Field(50, gt=0, description="steps between checkpoints")
    keep: int = Field(2, gt=0, description="how many checkpoints are kept")
    seed: int = Field(0, ge=0, description="of the examples' order, of dropout and of the split")
    plot: bool = Field(True, description="draw the loss curve")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.eval_data and self.eval_share:
            raise ValueError("eval_data and eval_share are two ways to say one thing: give one")
        evaluated = self.eval_data or self.eval_share
        if (self.eval_steps or self.patience) and not evaluated:
            raise ValueError("eval_steps and patience need eval_data or eval_share")
        if self.patience and not self.eval_steps:
            raise ValueError("patience counts evaluations: give eval_steps too")
        return self


class Evaluation(Data):
    """An evaluation: its data, and what is measured on them."""

    compare: bool = Field(
        False,
        description="of an adapter evaluate its base and its merge too: before, after, merged",
    )
    limit: int | None = Field(None, gt=0, description="evaluate on so many examples at most")
    batch_size: int = Field(8, gt=0, description="examples at once")
    generate: int = Field(
        0,
        ge=0,
        description="write the completions of so many examples, and compare (BLEU, ROUGE-L)",
    )
    max_new_tokens: int = Field(64, gt=0, description="tokens of such a completion at most")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights; auto: as they are stored"
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto: the GPU where there is one")
