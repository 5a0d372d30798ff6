"""You want to know before you train what it takes in memory, and which methods fit.

The same from a shell:

    peftc plan BASE --batch 4 --length 512 --memory 24GB
    peftc plan BASE --batch 4 --data FILE.jsonl nf4 lora --rank 64
"""

from tiny import tiny_checkpoint, workplace

import peftc
from peftc.footprint import Step, footprint
from peftc.planning import METHODS, plan

program = peftc.capture(tiny_checkpoint(workplace()))

# One step is run on tensors without data, and what lives is counted: no formula, any model.
lora = peftc.Pipeline([peftc.Lora(rank=8, targets="all-linear")]).run(program)
found = footprint(lora, Step(batch=4, length=64))
print(f"LoRA trains {found.trainable:,} of {found.parameters:,} numbers, peak {found.peak:,} bytes")

names = ("full", "lora 8, all linear", "lora 8, query, value", "nf4, lora 8, query, value")
chosen = {name: METHODS[name] for name in names}
for verdict in plan(program, Step(batch=4, length=64), chosen, memory=1_600_000):
    print(f"{verdict.method}: {'fits' if verdict.fits else 'does not fit'}: {verdict.reason}")
