"""You trained adapters and want to see what they change: how much, in how many directions, where.

The same from a shell:

    peftc inspect BASE --adapter a --adapter b --limit 10 --plot analysis.png
"""

from tiny import tiny_adapter, tiny_checkpoint, workplace

import peftc

folder = workplace()
base = tiny_checkpoint(folder)
a, b = (tiny_adapter(folder, base, name, seed) for seed, name in enumerate("ab"))

for site in peftc.analyse(base, [a, b]):
    change, pair = site.changes[0], site.pairs[0]
    print(
        f"{site.site:32} rank {change.rank}, effective {change.effective_rank:.1f}, "
        f"‖ΔW‖/‖W‖ {change.relative:.2f}, amplified {change.amplification:.0f}×, "
        f"a and b: cosine {pair.cosine:+.2f}, overlap {pair.overlap:.2f} "
        f"(by chance {pair.chance:.2f})"
    )
