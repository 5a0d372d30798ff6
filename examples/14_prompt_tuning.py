"""You want a prompt that is trained: vectors before every input, and the model itself untouched."""

import torch
from tiny import tiny_checkpoint, workplace
from transformers import AutoModelForCausalLM

import peftc

folder = workplace()
base = tiny_checkpoint(folder)

# Or peftc.PTuning(virtual_tokens=8, encoder="LSTM"), whose vectors a small network makes.
prompt = peftc.PromptTuning(virtual_tokens=8, init="vocabulary")
program = peftc.Pipeline([prompt]).run(peftc.capture(base))

model = peftc.materialize(program)  # it puts the virtual tokens before its inputs by itself
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=3e-2)
ids = torch.randint(0, 256, (4, 16))
model.train()
for step in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}, {sum(p.numel() for p in trained)} parameters")

# Beams, sampling and static caches work as without it; what is returned has no virtual tokens.
model.eval()
one, two = (
    model.generate(ids[:1], max_new_tokens=6, do_sample=False, cache_implementation=cache)
    for cache in (None, "static")
)
print("generated", one[0, 16:].tolist(), "- with a static cache the same:", torch.equal(one, two))

program = peftc.absorb(program, model)
peftc.to_peft(program, folder / "prompt")  # PEFT loads it: one tensor, prompt_embeddings

# To serve it, ship what its tokens compute: the plain model goes on from there without them.
peftc.export(folder / "prompt", folder / "served", merge=True, format="cache")
plain = AutoModelForCausalLM.from_pretrained(folder / "served").eval()
cache = peftc.ConstantCache.open(folder / "served")
again = plain.generate(**cache.before(plain, ids[:1]), max_new_tokens=6, do_sample=False)
print("from the constant cache the same:", torch.equal(again, one))
