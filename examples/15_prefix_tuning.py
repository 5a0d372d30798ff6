"""You want a prefix trained, used with any cache, and loaded by PEFT or by plain transformers."""

import torch
import transformers
from tiny import tiny_checkpoint, workplace

import peftc

folder = workplace()
base = tiny_checkpoint(folder)

# Without the perceptron (projection=True) this is P-tuning v2.
prefix = peftc.PrefixTuning(virtual_tokens=10)
program = peftc.Pipeline([prefix]).run(peftc.capture(base))

model = peftc.materialize(program)  # a Hugging Face model; only the prefix requires gradients
model.gradient_checkpointing_enable()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
ids = torch.randint(0, 256, (4, 16))
model.train()
for step in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
model.gradient_checkpointing_disable()
model.eval()

program = peftc.absorb(program, model)
peftc.to_peft(program, folder / "prefix")  # PEFT loads it

# The prefix never enters the cache, so any cache will do.
options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
made = model.generate(ids[:1, :4], cache_implementation="static", **options)
print("peftc:       ", made[0].tolist())

# The plain model of transformers starts from it as constant keys and values.
peftc.to_cache(program, folder / "cache")
plain = transformers.AutoModelForCausalLM.from_pretrained(base)
cache = peftc.ConstantCache.open(folder / "cache")
again = plain.generate(**cache.before(plain, ids[:1, :4]), **options)
print("transformers:", again[0].tolist())
