"""Put bottlenecks behind a model's sublayers, train them, and write them for AdapterHub."""

import torch
from tiny import tiny_checkpoint, workplace

import peftc
from peftc.passes.bottleneck import Bottleneck

folder = workplace()
base = tiny_checkpoint(folder)
plain = peftc.capture(base)

for preset in ("houlsby", "pfeiffer", "parallel"):
    program = peftc.Pipeline([Bottleneck(preset=preset, reduction_factor=8)]).run(plain)
    count = sum(program.constants[name].spec.nbytes // 4 for name in program.trainable)
    print(f"{preset}: {count:,} trained, at {', '.join(program.adapters['default'].sites)}")

model = peftc.materialize(program)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
for step in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

trained = peftc.absorb(program, model)
peftc.to_adapterhub(trained, folder / "adapter")
again = peftc.Pipeline([peftc.Attach(path=str(folder / "adapter"))]).run(plain)
same = torch.equal(peftc.materialize(again)(ids).logits, model(ids).logits)
print("read again:", "equal" if same else "different")

# Behind any module by its name, whatever it is.
behind = Bottleneck(targets=["self_attn"], non_linearity="gelu", scaling="learned")
print(peftc.Pipeline([behind]).run(plain).adapters["default"].sites)
