"""A batch whose rows have several LoRAs: peftc's compiled model beside PEFT's mixed batches.

SmolLM2-135M, rank 8 on q and v, one token of 64 rows at a time behind a past of 32: tokens/s with
1, 4, 16 and 64 adapters in the batch, medians.

    python benchmarks/multi_lora.py --rounds 5 [--threads 1] [--keep DIR]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROWS, PAST, RANK, COUNTS = 64, 32, 8, (1, 4, 16, 64)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--keep", type=Path, help="where the compiled model is, or is to be")
    given = arguments.parse_args()
    import peft
    import transformers

    import peftc
    import peftc.runtime
    from peftc.demo_model import demo_checkpoint

    torch.set_num_threads(given.threads)
    base = demo_checkpoint("float32")
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), (given.keep or Path(name)) / "rows"
        if not out.exists():
            peftc.export(base, out, format="pt2", swap="rows", slots="q_proj,v_proj", proof="sites")
        runtime = peftc.runtime.load(out)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        config = peft.LoraConfig(
            r=RANK, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        wrapped = peft.get_peft_model(model, config, adapter_name="a0")
        for number in range(1, max(COUNTS)):
            wrapped.add_adapter(f"a{number}", config)
        wrapped.save_pretrained(folder)
        handles = [runtime.load_adapter(folder / f"a{n}") for n in range(max(COUNTS))]
    wrapped.eval()
    ids = torch.randint(0, 4000, (ROWS, 1))
    mask = torch.ones(ROWS, PAST + 1, dtype=torch.int64)
    ports = runtime.graphs["model"].inputs
    past = {p.name: torch.randn(p.example({"batch": ROWS, "past": PAST}).shape)
            for p in ports if "past" in p.dims}  # fmt: skip
    pairs = list(zip(*[iter(past.values())] * 2, strict=True))
    step = {"input_ids": ids, "attention_mask": mask,
            "position_ids": torch.full((ROWS, 1), PAST), **past}  # fmt: skip

    def ours() -> torch.Tensor:
        return runtime.run(step)["logits"]

    def theirs(names: list[str]) -> torch.Tensor:
        cache = transformers.DynamicCache(pairs)
        more = {"adapter_names": names} if len(set(names)) > 1 else {}
        with torch.no_grad():
            return wrapped(input_ids=ids, attention_mask=mask, past_key_values=cache, **more).logits

    print(f"{given.threads} threads, {ROWS} rows, medians of {given.rounds} rounds\n")
    print("| adapters | pt2 tok/s | of one | PEFT tok/s | of one | pt2 / PEFT | difference |")
    print("|---|---|---|---|---|---|---|")
    one: list[float] = []
    for count in COUNTS:
        rows = [n % count for n in range(ROWS)]
        runtime.swap([handles[n] for n in rows])
        wrapped.set_adapter("a0")
        names = [f"a{n}" for n in rows]
        got, want = ours(), theirs(names)
        error = float((got - want).abs().max() / want.abs().max())
        seconds: list[list[float]] = [[], []]
        calls: list[Callable[[], torch.Tensor]] = [ours, lambda names=names: theirs(names)]
        for _ in range(given.rounds):
            for call, times in zip(calls, seconds, strict=True):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        speeds = [ROWS / statistics.median(times) for times in seconds]
        one = one or speeds
        print(
            f"| {count} | {speeds[0]:.0f} | {speeds[0] / one[0]:.2f} | {speeds[1]:.0f} | "
            f"{speeds[1] / one[1]:.2f} | {speeds[0] / speeds[1]:.2f} | {error:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
