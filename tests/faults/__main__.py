"""Disturbs every command that writes, and reports what it left and whether it could be finished.

    python -m tests.faults --kills 200 --interrupts 60 --full 60
    python -m tests.faults --kills 30 --job tune

Exit code 1 if anything looked complete and was not, or could not be finished to the same bytes.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.faults.child import Child, warm_up
from tests.faults.trials import DONE, GOES_ON, NOTHING, Failure, Undisturbed, share, tried
from tests.faults.world import Job, jobs, make


def disturb(
    folder: Path, chosen: Sequence[Job], counts: dict[str, dict[str, int]], seed: int
) -> list[str]:
    """Disturbs jobs, and prints a row of the table for each; what failed.

    Args:
        folder: Holds the sources.
        chosen: The jobs.
        counts: For each kind of fault how many each job gets.
        seed: Of the moments.
    """
    failures = []
    print("| command | takes | fault | times | left nothing | left work to go on from | "
          "had published |\n|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    for job in chosen:
        try:
            run = Undisturbed.of(job, folder / "runs" / job.name)
        except Failure as failure:
            failures.append(f"{job.name}: {failure}")
            print("FAILED", failures[-1], flush=True)
            continue
        for kind, each in counts.items():
            rng = random.Random(f"{job.name} {kind} {seed}")
            found, failed = tried(kind, run, each[job.name], rng)
            failures += failed
            row = job.name, f"{run.seconds:.1f} s", kind, each[job.name]
            lefts = (found[outcome] for outcome in (NOTHING, GOES_ON, DONE))
            print("|", " | ".join(map(str, (*row, *lefts))), "|", flush=True)
        shutil.rmtree(run.folder, ignore_errors=True)
    return failures


def prepare(folder: Path, slots: bool) -> None:
    """Makes the sources in a child: this process must compute nothing before it forks."""
    os.environ["PEFTC_CACHE"] = str(folder / "cache")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    warm_up()

    def work() -> int:
        make(folder, slots)
        return 0

    ended = Child(work, folder).wait()
    if ended.code:
        raise Failure(ended.said)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for kind in ("kills", "interrupts", "full"):
        parser.add_argument(f"--{kind}", type=int, default=0, help="of all jobs together")
    parser.add_argument("--job", nargs="*", default=[], help="names, or parts of them")
    parser.add_argument("--without", nargs="*", default=[], help="the same, to be left out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [
            job for job in jobs(folder)
            if (not given.job or any(part in job.name for part in given.job))
            and not any(part in job.name for part in given.without)
        ]  # fmt: skip
        prepare(folder, any("onnx-adapter" in job.name for job in chosen))
        totals = {"kills": given.kills, "interrupts": given.interrupts, "full disks": given.full}
        counts = {kind: share(total, chosen) for kind, total in totals.items() if total}
        failures = disturb(folder, chosen, counts, given.seed)
    return int(bool(failures))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
