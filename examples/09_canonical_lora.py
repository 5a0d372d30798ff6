"""You trained an rsLoRA, a DoRA or several adapters, and want a LoRA that vLLM and llama.cpp take.

The same from a shell:

    peftc export BASE --adapter ADAPTER --format peft --canonical -o plain
"""

import json

from tiny import tiny_adapter, tiny_checkpoint, workplace

import peftc

folder = workplace()
base = tiny_checkpoint(folder)
a, b = (tiny_adapter(folder, base, name, seed) for seed, name in enumerate("ab"))
steps = [peftc.Attach(path=str(a), weight=0.7), peftc.Attach(path=str(b), weight=0.3)]
program = peftc.Pipeline(steps).run(peftc.capture(base))

exact = peftc.to_peft(program, folder / "plain", canonical=True)
config = json.loads((folder / "plain" / "adapter_config.json").read_text())
print("r and lora_alpha:", config["r"], config["lora_alpha"], config["target_modules"])
print("exact:", exact.manifest["canonical"]["exact"])

cut = peftc.to_peft(program, folder / "smaller", canonical=True, rank=4)
print(f"rank 4 leaves out up to {cut.manifest['canonical']['relative_error']:.0%} of it")
