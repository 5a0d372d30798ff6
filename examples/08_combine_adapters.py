"""You have several adapters for one base and want one: their sum, or TIES, DARE, an SVD of it.

The same from a shell:

    peftc apply BASE -o both attach a --adapter a attach b --adapter b \\
        combine --method svd --rank 8 --weights a=0.7,b=0.3
"""

from tiny import tiny_adapter, tiny_checkpoint, workplace

import peftc

folder = workplace()
base = tiny_checkpoint(folder)
a, b = (tiny_adapter(folder, base, name, seed) for seed, name in enumerate("ab"))
attach = [peftc.Attach(path=str(path), adapter=path.name) for path in (a, b)]
program = peftc.Pipeline(attach).run(peftc.capture(base))

for options in (
    {"method": "cat"},
    {"method": "svd", "rank": 4},
    {"method": "ties", "density": 0.2},
    {"method": "dare_ties", "density": 0.5, "rank": 8},
):
    combine = peftc.Combine(weights={"a": 0.7, "b": 0.3}, **options)
    combined = peftc.Pipeline([combine]).run(program)
    figures = combined.journal[-1].measured["deviation_from_weighted_sum"]
    print(f"{options}: off the exact weighted sum by at most {max(figures.values()):.1e}")
    peftc.to_peft(combined, folder / f"combined-{options['method']}")
