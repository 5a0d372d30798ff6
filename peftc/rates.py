"""LoRA+: parameter groups with a higher learning rate for B (Hayou et al. 2024, arXiv:2402.12354).

Section 4.2: a rate for B of a multiple of A's, 16 in the paper's experiments.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def optimizer_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer, as PEFT's `create_loraplus_optimizer` has them.

    Args:
        model: What is trained: a materialized program, or a PEFT model.
        lr: The learning rate of A, and of all that is neither B nor a vector.
        ratio: How many times that B's and vectors' is.
        weight_decay: Of all but biases and norms.
        embedding_lr: The learning rate of an embedding's A and B.

    Returns:
        The groups that have parameters.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding_" in name:
            key = embedding_lr, weight_decay
        elif "lora_B" in name or parameter.ndim == 1:
            kept = "bias" in name or _in_norm(model, name)
            key = lr * ratio, 0.0 if kept else weight_decay
        else:
            key = lr, weight_decay
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _in_norm(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return type(owner).__name__.endswith("Norm")
