"""Runs readers on hostile inputs, and reports what is neither read nor refused as it ought to be.

    python -m tests.fuzz --runs 1000000                  mutations, spread over all readers
    python -m tests.fuzz --reader header --engine atheris --runs 100000

What fails is kept in tests/fuzz/corpus/, which the tests read again. Exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import random
import re
import resource
import sys
import time
from collections import Counter
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

from peftc.errors import PeftcError
from tests.fuzz.mutate import mutated
from tests.fuzz.reader import Reader
from tests.fuzz.readers import readers

CORPUS = Path(__file__).parent / "corpus"
COVERAGE = Path(__file__).parent / "coverage"
INSTRUMENTED = ("peftc", "json", "yaml", "jinja2", "pydantic")
SLOW = 2.0  # seconds of the processor that an input may take
GROWTH = 256 << 20  # bytes that a reader may need above what it began with
FEWEST = 5  # inputs of each reader, however short the time
KEPT = 500  # inputs that a reader begins from, at most


class Failure(Exception):
    """An input that brought something else than a PeftcError, or took too long or too much."""


def tried(reader: Reader, root: Path, data: bytes) -> tuple[str, str]:
    """Reads an input.

    Returns:
        `read`, or the class of the typed error, and the kind of what it says.

    Raises:
        Failure: It failed otherwise.
    """
    start = time.process_time()
    try:
        reader.feed(root, data)
        outcome = "read", ""
    except PeftcError as error:
        outcome = type(error).__name__, re.sub(r"[\d.]+|'.*?'", "#", str(error.what))[:30]
    except BaseException as error:
        raise Failure(f"{type(error).__name__}: {error}") from error
    if (seconds := time.process_time() - start) > SLOW:
        raise Failure(f"it took {seconds:.1f} s")
    return outcome


def limit(more: int) -> None:
    """Makes what would take all of the machine's memory a MemoryError."""
    status = Path("/proc/self/status").read_text()
    (taken,) = re.findall(r"VmData:\s*(\d+) kB", status)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(taken) * 1024 + more, most))


def corpus(reader: Reader) -> list[bytes]:
    """What failed once."""
    return [path.read_bytes() for path in sorted(CORPUS.glob(f"{reader.name}-*"))]


def keep(reader: Reader, data: bytes) -> Path:
    """Adds an input to the corpus."""
    CORPUS.mkdir(exist_ok=True)
    path = CORPUS / f"{reader.name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def by_mutation(reader: Reader, runs: int, seed: int, seconds: float = math.inf) -> int:
    """Reads mutations of the seeds, and of what was new in its outcome; prints what failed."""
    rng, failures, seen = random.Random(f"{reader.name} {seed}"), set[str](), Counter[str]()
    sound, pool, kinds = reader.seeds, [*reader.seeds, *corpus(reader)], set[tuple[str, str]]()
    done, slowest = 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with reader.folder() as root:
        for data in reader.seeds:  # the first imports what it needs, and counts for nothing
            with suppress(PeftcError):
                reader.feed(root, data)
        limit(8 * GROWTH)
        end = time.monotonic() + seconds
        while done < min(runs, FEWEST) or (done < runs and time.monotonic() < end):
            done += 1
            # What is broken already is refused early: half of the inputs are one step off.
            data = mutated(rng.choice(sound if rng.random() < 0.5 else pool), rng)
            began = time.process_time()
            try:
                outcome = tried(reader, root, data)
            except Failure as failure:
                if (kind := re.sub(r"\d+|'.*?'|:.*", "#", str(failure))[:60]) not in failures:
                    failures.add(kind)
                    print(f"  {reader.name}: {failure}\n    {keep(reader, data)}", flush=True)
                continue
            slowest = max(slowest, time.process_time() - began)
            if outcome not in kinds or rng.random() < 0.002:
                pool = [*pool, data[:4096]][-KEPT:]
            kinds.add(outcome)
            seen[outcome[0]] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > GROWTH:
        failures.add("memory")
    read = seen.pop("read", 0)
    refused = ", ".join(f"{name} {count:,}" for name, count in seen.most_common())
    cells = (reader.name, f"{done:,}", f"{read:,}", refused, str(len(kinds)),
             f"{1000 * slowest:.0f} ms", f"{grown / 1e6:.0f} MB", str(len(failures)))  # fmt: skip
    print(f"| {' | '.join(cells)} |", flush=True)
    return len(failures)


def by_atheris(reader: Reader, runs: int, seed: int) -> None:
    """Lets libFuzzer look for new paths through peftc's readers; it ends the process.

    What brings new paths is left in tests/fuzz/coverage/, for the next run to begin from.
    """
    atheris: Any = import_module("atheris")
    for function in gc.get_objects():  # no more than these: all of torch would take minutes
        if isinstance(function, FunctionType) and str(function.__module__).startswith(INSTRUMENTED):
            atheris.instrument_func(function)
    kept = COVERAGE / reader.name
    kept.mkdir(parents=True, exist_ok=True)
    with reader.folder() as root:

        def one(data: bytes) -> None:
            tried(reader, root, data)

        first = root / "seeds"
        first.mkdir()
        for number, data in enumerate([*reader.seeds, *corpus(reader)]):
            (first / str(number)).write_bytes(data)
        options = [f"-runs={runs}", f"-seed={seed + 1}", "-max_len=4096", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, str(kept), str(first)], one)
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reader", choices=sorted(readers()), nargs="*", default=[])
    parser.add_argument("--runs", type=int, default=1_000_000, help="of all readers together")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of all together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["mutation", "atheris"], default="mutation")
    given = parser.parse_args()
    chosen = {name: r for name, r in readers().items() if not given.reader or name in given.reader}
    if given.engine == "atheris":
        if len(chosen) != 1:
            parser.error("libFuzzer ends its process: name one --reader")
        by_atheris(next(iter(chosen.values())), given.runs, given.seed)
    heads = "reader", "inputs", "read", "refused by", "kinds", "slowest", "growth", "failures"
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    each = given.runs / sum(reader.share for reader in chosen.values())
    seconds = given.seconds / len(chosen)
    failed = [
        by_mutation(r, math.ceil(each * r.share), given.seed, seconds) for r in chosen.values()
    ]
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
