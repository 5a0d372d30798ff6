"""You train LoRA on a 4-bit base (QLoRA), and want a merge that does not lose what was learned.

The same from a shell:

    peftc apply BASE -o OUT nf4 lora --rank 8
    … train OUT/adapter on OUT/base …
    peftc export OUT -o merged --merge                                     16 bits, what was trained
    peftc export OUT -o merged4 --merge --merge-base original --then nf4   4 bits again
"""

import torch
from tiny import tiny_checkpoint, workplace

import peftc
from peftc.errors import ProofError

folder = workplace()
base = tiny_checkpoint(folder)
lora = peftc.Lora(rank=8, alpha=16, targets="all-linear")
peftc.apply(base, [peftc.Nf4(), lora], folder / "qlora")

program = peftc.load(folder / "qlora")
model = peftc.materialize(program)  # codes and absmax; only A and B require gradients
model.gradient_checkpointing_enable()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)
ids = torch.randint(0, 256, (4, 16))
model.train()
for step in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
peftc.to_peft(peftc.absorb(program, model), folder / "adapter")
adapter = [(str(folder / "adapter"), 1.0)]
quantized = folder / "qlora" / "base"


def merge(name: str, **how: str) -> None:
    try:
        report = peftc.export(
            quantized, folder / name, merge=True, adapters=adapter, **how
        ).manifest["merge"]
    except ProofError as error:
        print(f"{name}: refused: {error.what}")
        return
    print(f"{name}: {report['share']:.0%} of the update is left, "
          f"output error {report['output_error']:.1e}")  # fmt: skip


merge("plain", merge_base="dequantized", then="none")
merge("again", merge_base="dequantized", then="nf4")  # a small update snaps back
merge("from-original", merge_base="original", then="nf4")
