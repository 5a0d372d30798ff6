"""You want ranks where they help: AdaLoRA in your own loop and in Trainer, pruned to plain LoRA.

The same of any trained LoRA, from a shell:

    peftc inspect ADAPTER --prune 64                            each site's error, before it is done
    peftc apply ADAPTER -o OUT prune_ranks --budget 64          done; OUT/adapter is what PEFT loads
"""

import torch
from tiny import tiny_checkpoint, workplace
from transformers import Trainer, TrainingArguments

import peftc

STEPS = 12
folder = workplace()
base = tiny_checkpoint(folder)
adalora = peftc.AdaLora(init_r=6, target_r=2, targets="all-linear")
program = peftc.Pipeline([adalora]).run(peftc.capture(base))
ids = torch.randint(0, 256, (4, 16))

# In your own loop: two calls. Warm-up, pruning and the rest follow from the number of steps.
model = peftc.materialize(program).train()
budget = peftc.schedule(program, model, STEPS)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(1, STEPS + 1):
    loss = model(input_ids=ids, labels=ids).loss + budget.loss(model)
    loss.backward()
    optimizer.step()
    budget.step(model, step)  # while the gradients are there
    optimizer.zero_grad()
done = budget.by_adapter["default"]
print("ranks of all sites, by step:", done.history)
peftc.plot_ranks(done.ranks, folder / "ranks.png", done.history)

# In transformers' Trainer: one callback.
rows = [{"input_ids": row, "labels": row} for row in ids]
arguments = TrainingArguments(
    str(folder / "run"), max_steps=STEPS, report_to=[], disable_tqdm=True, save_strategy="no"
)
callback = peftc.callback(program)
other = peftc.materialize(program)
Trainer(other, arguments, train_dataset=rows, callbacks=[callback]).train()
print("ranks after Trainer:", sum(callback.schedules.by_adapter["default"].ranks.values()))

# What was masked is removed for real; sites of rank 0 are gone, and what is left is plain LoRA.
trained = peftc.absorb(program, model)
pruned = peftc.Pipeline([peftc.PruneRanks()]).run(trained)
for name, found in (("masked", trained), ("pruned", pruned)):
    count = sum(found.constants[fqn].spec.nbytes for fqn in found.trainable) // 4
    print(f"{name}: {len(found.adapters['default'].sites)} sites, {count} parameters")
peftc.to_peft(pruned, folder / "lora")  # with a rank pattern; canonical=True for vLLM

# Further, by singular values: the error of each site is known before anything is done.
outlook = peftc.PruneRanks(budget=16).outlook(pruned)
worst = max(outlook, key=lambda one: one.error)
print(f"16 ranks would cost up to {worst.error:.0%} of ΔW, at {worst.site}")
