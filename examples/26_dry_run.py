"""What would this merge write, and is there room? Everything is checked, and nothing written.

The same from a shell, of checkpoints of any size in seconds:

    peftc export BASE -o merged --merge --adapter ADAPTER --dry-run
"""

from tiny import tiny_adapter, tiny_checkpoint, workplace

import peftc

folder = workplace()
base = tiny_checkpoint(folder)
adapter = tiny_adapter(folder, base, "adapter", seed=1)
job = {"merge": True, "adapters": [(str(adapter), 1.0)]}

told = peftc.dry_run(base, folder / "merged", **job)
print(f"{told['files']} files, {told['bytes']:,} bytes; {told['free'] / 1e9:.0f} GB are free")
print("computed:", told["computed"], "of", told["tensors"], "tensors; the others are copied")
print("anything written?", (folder / "merged").exists())

made = peftc.export(base, folder / "merged", **job)
print("and then written:", made.manifest["files"]["model.safetensors"]["size"], "bytes")
