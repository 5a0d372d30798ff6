"""You have several adapters for one base and want their exact weighted sum in one model.

The same from a shell:

    peftc export BASE -o merged --merge --adapter a=0.7 --adapter b=0.3

and one of them taken out again:

    peftc apply merged -o without-b unmerge b --weight 0.3
"""

from tiny import tiny_adapter, tiny_checkpoint, workplace

import peftc

folder = workplace()
base = tiny_checkpoint(folder)
a, b = (tiny_adapter(folder, base, name, seed) for seed, name in enumerate("ab"))

both = peftc.export(base, folder / "both", merge=True, adapters=[(str(a), 0.7), (str(b), 0.3)])
print("both:     ", both.manifest["proof"]["site"])

without = peftc.Unmerge(path=str(b), weight=0.3)
taken = peftc.apply(folder / "both", [without], folder / "without-b")
print("without b:", taken.manifest["proof"]["site"])
