"""You want a compiled model that needs no model code, and adapters that are swapped in place.

The same from a shell (it needs a C++ compiler; the machine that runs the result needs none):

    peftc export BASE -o compiled --format pt2 --adapters swap --adapter FR --slots all-linear
"""

import time

import torch
from tiny import tiny_adapter, tiny_checkpoint, workplace

import peftc
import peftc.runtime

folder = workplace()
base = tiny_checkpoint(folder, layers=6)  # which are one library, called six times
fr, de = (tiny_adapter(folder, base, name, seed) for seed, name in enumerate(["fr", "de"]))

artifact = peftc.export(
    base, folder / "compiled", format="pt2", swap=True, slots="all-linear",
    adapters=[(str(fr), 1.0)],
)  # fmt: skip
print("compiled against eager torch:", artifact.manifest["proof"]["pt2"]["model"])

# From here on no transformers: torch, the libraries, and the weights, which are mapped.
model = peftc.runtime.load(folder / "compiled")
ids = torch.tensor([[5, 17, 3]])
print("base:", model.generate(ids, 8, stop=[]).tolist())
model.swap("fr")  # published with it
print("fr:  ", model.generate(ids, 8, stop=[]).tolist())

handle = model.load_adapter(de)  # PEFT's own directory, trained later
start = time.perf_counter()
model.swap(handle)
print(f"swapped in {1e6 * (time.perf_counter() - start):.0f} µs")
print("de:  ", model.generate(ids, 8, stop=[]).tolist())
