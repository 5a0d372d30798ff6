"""The checkpoint is too large for one machine's patience: each job merges its share of the files.

The same from a shell, the first three at once and on any machines that see the disk:

    peftc export BASE -o merged --merge --adapter ADAPTER --shards 1/3
    peftc export BASE -o merged --merge --adapter ADAPTER --shards 2/3
    peftc export BASE -o merged --merge --adapter ADAPTER --shards 3/3
    peftc finish merged
"""

from concurrent.futures import ThreadPoolExecutor

from tiny import tiny_adapter, tiny_checkpoint, workplace
from transformers import AutoModelForCausalLM

import peftc

folder = workplace()
whole = tiny_checkpoint(folder)
base, target = folder / "sharded", folder / "merged"
AutoModelForCausalLM.from_pretrained(whole).save_pretrained(base, max_shard_size="60KB")
adapter = tiny_adapter(folder, base, "adapter", seed=1)


def part(number: int) -> list[str]:
    """A job."""
    made = peftc.export_part(
        base, target, f"{number}/3", merge=True, adapters=[(str(adapter), 1.0)]
    )
    return list(made["files"])


with ThreadPoolExecutor() as jobs:
    for number, files in enumerate(jobs.map(part, range(1, 4)), 1):
        print(f"part {number} wrote", *files)
print("anything published?", target.exists())

artifact = peftc.finish(target)
print("proven, then published:", artifact.manifest["proof"]["site"])
