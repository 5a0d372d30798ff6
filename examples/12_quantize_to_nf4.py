"""You want a checkpoint in 4 bits, for transformers with bitsandbytes or for peftc itself.

The same from a shell, streamed, in the memory of one tensor:

    peftc apply BASE -o OUT nf4 --double-quant
"""

import importlib.util

import torch
import transformers
from tiny import tiny_checkpoint, workplace

import peftc

folder = workplace()
base = tiny_checkpoint(folder)

artifact = peftc.apply(base, [peftc.Nf4(double_quant=True)], folder / "small")
figures = artifact.manifest["journal"][-1]["measured"]
print(f"{figures['weights']:,} weights in {figures['bits_per_weight']:.2f} bits each")

small = folder / "small" / "base"  # a checkpoint like any other, but for its 4-bit weights
model = peftc.materialize(peftc.capture(small), dtype=torch.float32)  # needs no bitsandbytes
ids = torch.arange(12)[None]
print("a layer:", model.get_submodule("model.layers.0.self_attn.q_proj"))

if importlib.util.find_spec("bitsandbytes") and importlib.util.find_spec("accelerate"):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(small)
    print("transformers loads it as", type(loaded.model.layers[0].self_attn.q_proj).__name__)

# It is a base like any other too: back to 16 bits, an adapter on top, a merge …
program = peftc.Pipeline([peftc.Dequantize()]).run(peftc.capture(small))
peftc.to_safetensors(program, folder / "plain")
plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32)
with torch.no_grad():
    error = (model(ids).logits - plain(ids).logits).abs().max().item()
print(f"4-bit layers and their values in 16 bits differ by {error:.1e}, one rounding")
