"""You trained with PEFT and want one model to deploy, proven equal to what you trained.

The same from a shell:

    peftc export BASE -o merged --merge --adapter ADAPTER
    peftc verify merged
"""

from tiny import tiny_adapter, tiny_checkpoint, workplace
from transformers import AutoModelForCausalLM

import peftc

folder = workplace()
base = tiny_checkpoint(folder)
adapter = tiny_adapter(folder, base, "adapter", seed=1)

artifact = peftc.export(base, folder / "merged", merge=True, adapters=[(str(adapter), 1.0)])
print("per layer:", artifact.manifest["proof"]["site"])
print("logits:   ", artifact.manifest["proof"]["whole"])

# Plain transformers loads it: same names, same files, same dtype as the base.
model = AutoModelForCausalLM.from_pretrained(folder / "merged")
print("loaded:   ", type(model).__name__, model.dtype)
print("verified: ", peftc.verify(folder / "merged")["files"], "files")
