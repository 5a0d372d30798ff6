"""You have a plain PyTorch module, nothing of Hugging Face, and want LoRA in it, then merged."""

import torch
from tiny import workplace
from torch import nn

import peftc

folder = workplace()
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))

program = peftc.Pipeline([peftc.Lora(rank=2, targets=["0", "2"])]).run(peftc.capture(module))
model = peftc.materialize(program)  # a copy: `module` stays as it is
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.1)  # stands for training

program = peftc.Pipeline([peftc.Merge()]).run(peftc.absorb(program, model))
merged = peftc.materialize(program)
x = torch.randn(3, 16)
print("largest difference:", (merged(x) - model(x)).abs().max().item())
peftc.to_safetensors(program, folder / "merged")
print("wrote", folder / "merged" / "model.safetensors")
