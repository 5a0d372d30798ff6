"""A compiled model on a 4-bit base, of which each row of a batch has its own adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftc
from peftc.errors import AdapterError, InputError
from peftc.runtime import Runtime, load

from .conftest import MakeAdapter, MakeCheckpoint

IDS = torch.randint(0, 97, (8, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def adapters(checkpoint: MakeCheckpoint, adapter: MakeAdapter) -> list[Path]:
    base = checkpoint("qwen2")
    return [adapter(base, seed=seed, r=1 + seed) for seed in range(7)]


@pytest.fixture(scope="module")
def runtime(
    checkpoint: MakeCheckpoint, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Runtime:
    program = peftc.Pipeline([peftc.Nf4(double_quant=True, block_size=32)]).run(
        peftc.capture(checkpoint("qwen2"))
    )
    out = tmp_path_factory.mktemp("rows") / "out"
    artifact = peftc.to_pt2(program, out, adapters="rows")
    assert artifact.manifest["pt2"]["operators"] == ["peftc::nf4_linear.default"]
    assert artifact.manifest["proof"]["pt2"]["model"]["relative_error"] < 1e-5
    return load(out)


def first(runtime: Runtime, ids: torch.Tensor) -> torch.Tensor:
    ports = runtime.graphs["model"].inputs
    past = {p.name: p.example({"batch": len(ids), "past": 0}) for p in ports if "past" in p.dims}
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    return runtime.run({**given, **past})["logits"]


def test_rows_of_eight_adapters_answer_as_eight_runs(
    runtime: Runtime, adapters: list[Path]
) -> None:
    chosen = [runtime.load_adapter(path) for path in adapters]
    runtime.swap([*chosen, None])
    got = first(runtime, IDS)
    texts = runtime.generate(IDS, 6, stop=[])
    for row, which in enumerate([*chosen, None]):
        runtime.swap(which)
        want = first(runtime, IDS[row : row + 1])
        assert float((got[row] - want[0]).abs().max() / want.abs().max()) < 1e-5
        assert texts[row].tolist() == runtime.generate(IDS[row : row + 1], 6, stop=[])[0].tolist()


def test_one_adapter_is_for_batches_of_any_size(runtime: Runtime, adapters: list[Path]) -> None:
    runtime.swap(adapters[3])
    both = first(runtime, IDS[:2])
    for row in range(2):
        torch.testing.assert_close(both[row], first(runtime, IDS[row : row + 1])[0])


def test_a_batch_of_other_rows_is_refused(runtime: Runtime, adapters: list[Path]) -> None:
    runtime.swap([adapters[0], None])
    with pytest.raises(InputError, match="chosen for 2"):
        first(runtime, IDS[:3])
    with pytest.raises(AdapterError):
        runtime.swap([])
