"""Memory as `peftc plan` foretells it, and as torch then allocates it, on SmolLM2-135M.

Prints, for five configurations, the peak that was planned, the one measured in the second step by
torch's own record of its CPU allocator, and how long planning took.

    python -m benchmarks.plan
"""

from __future__ import annotations

import time

from peftc import Lora, Pass, capture
from peftc.demo_model import demo_checkpoint
from peftc.footprint import Step, footprint
from peftc.passes.adalora import AdaLora
from peftc.passes.nf4 import Nf4
from tests.test_planning import applied, measured

CONFIGURATIONS: dict[str, tuple[list[Pass], Step]] = {
    "lora 16": ([Lora(rank=16)], Step(2, 128)),
    "lora 16, checkpointing": ([Lora(rank=16)], Step(2, 128, checkpointing=True)),
    "full": ([], Step(1, 64)),
    "nf4, lora 64": ([Nf4(), Lora(rank=64)], Step(2, 64)),
    "adalora": ([AdaLora()], Step(2, 64)),
}


def main() -> None:
    base = capture(demo_checkpoint("float32"))
    for name, (passes, step) in CONFIGURATIONS.items():
        program = applied(base, *passes)
        start = time.perf_counter()
        planned = footprint(program, step).peak
        took = time.perf_counter() - start
        found = measured(program, step)
        print(
            f"{name}: planned {planned / 1e6:.2f} MB in {took:.1f} s, measured {found / 1e6:.2f} MB"
            f" ({planned / found - 1:+.2%})"
        )


if __name__ == "__main__":
    main()
