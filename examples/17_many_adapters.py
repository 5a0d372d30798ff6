"""You have adapters for several tasks, and want to serve and train them on one base at once."""

import torch
from tiny import tiny_adapter, tiny_checkpoint, workplace

import peftc

folder = workplace()
path = tiny_checkpoint(folder)
folders = {name: tiny_adapter(folder, path, name, seed) for seed, name in enumerate(["fr", "de"])}

base = peftc.capture(path)
tasks = [
    peftc.Pipeline([peftc.Attach(path=str(place), adapter=name)]).run(base)
    for name, place in folders.items()
]
tasks.append(peftc.Pipeline([peftc.Ia3(adapter="style")]).run(base))  # any mix of methods
program = peftc.together(*tasks)
model = peftc.materialize(program)
adapters = peftc.Adapters(model, program)

ids = torch.randint(0, 256, (4, 8))
adapters.use(["fr", None, "de", "fr"])  # a row each
with torch.no_grad():
    mixed = model(ids).logits
    adapters.use("de")  # for all rows
    print("row 2 by itself differs by", float((model(ids[2:3]).logits - mixed[2]).abs().max()))

adapters.use({"fr": 0.7, "style": 1.0})
adapters.load("fr", folders["de"])  # another in its place: compiled models compile nothing again
print("on:", adapters.active)

# Tasks with one A and a B each, trained by mixed batches.
steps = [peftc.Lora(adapter="fr", rank=4), peftc.Lora(adapter="de", rank=4, share_a="fr")]
program = peftc.together(peftc.Pipeline(steps).run(base))
model = peftc.materialize(program)
adapters = peftc.Adapters(model, program)
adapters.use(["fr", "fr", "de", "de"])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(3):
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
peftc.to_peft(peftc.absorb(program, model), folder / "trained-de", "de")

# A router that learns which adapter suits a token.
attach = [peftc.Attach(path=str(place), adapter=name) for name, place in folders.items()]
routed = peftc.Pipeline([*attach, peftc.Router(top=1)]).run(base)
print("the router trains", len(routed.trainable), "tensors, and its experts stay as they are")
