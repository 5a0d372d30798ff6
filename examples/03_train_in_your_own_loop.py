"""You want LoRA injected by peftc, trained by your own loop, and saved for PEFT and for merging."""

import torch
from tiny import tiny_checkpoint, workplace

import peftc

folder = workplace()
base = tiny_checkpoint(folder)

# Ranks, exclusions and layers are said as PEFT's users say them.
lora = peftc.Lora(rank=8, alpha=16, targets=["q_proj", "v_proj"], rank_pattern={"v_proj": 4})
program = peftc.Pipeline([lora]).run(peftc.capture(base))

model = peftc.materialize(program)  # a Hugging Face model; only A and B require gradients
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
ids = torch.randint(0, 256, (4, 16))
model.train()
for step in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}, {sum(p.numel() for p in trained)} parameters")

program = peftc.absorb(program, model)
peftc.to_peft(program, folder / "adapter")  # PEFT loads it
peftc.export(folder / "adapter", folder / "merged", merge=True)  # its config names the base
print("merged into", folder / "merged")
