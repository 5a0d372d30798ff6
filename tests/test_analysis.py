"""The analysis of adapters: against dense arithmetic, known spectra and known subspaces."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftc
from peftc import (
    Effect,
    Lora,
    Method,
    Pipeline,
    Program,
    analyse,
    analysis,
    analysis_view,
    spectra,
)  # fmt: skip
from peftc.algebra import fold_sites
from peftc.cli import cli
from peftc.constants import Held
from peftc.contract import ALL_KINDS
from peftc.deltas import alone
from peftc.errors import ArtifactError, CheckpointError, MissingDependency, PassError, PeftcError
from peftc.evaluate import chunks, value
from peftc.graphs import aten
from peftc.sites import SiteEditor
from peftc.spectra import Change, Figures, Pair
from peftc.terminal import Terminal

from .conftest import MakeAdapter, MakeCheckpoint
from .test_combine import Model, mixture

few = settings(max_examples=40, deadline=None, database=None, derandomize=True)


ALL = ["embed", "conv", "wide", "turned"]


class Renormed(Method):
    """Scale the rows of W + B·A to learned lengths, as DoRA does."""

    effect = Effect.CHANGES
    kinds = ALL_KINDS

    def inject(self, site: SiteEditor) -> None:
        low = site.mm(site.up("b.weight", 2), site.down("a.weight", 2))
        turned = site.add(site.weight, low)
        squares = site.op(aten.sum.dim_IntList, site.mul(turned, turned), [1], True)
        length = site.parameter("length.weight", (site.out_features, 1))
        scaled = site.op(
            aten.div.Tensor, site.mul(turned, length), site.op(aten.sqrt.default, squares)
        )
        site.add_to_output(site.apply(site.op(aten.sub.Tensor, scaled, site.weight)))


class Bent(Method):
    """Add a branch with a bend in it."""

    def inject(self, site: SiteEditor) -> None:
        a = site.parameter("bend.weight", (site.out_features, site.in_features))
        site.add_to_output(site.op(aten.relu.default, site.apply(a)))


class Gain(Method):
    """Multiply each output feature, bias and all."""

    effect = Effect.CHANGES

    def inject(self, site: SiteEditor) -> None:
        gain = site.parameter("gain.weight", (site.out_features,))
        site.y = site.scale_output(site.y, gain)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(program: Program, seed: int = 0) -> Program:
    """The program with random values in every tensor that training changes."""
    made = {
        fqn: Held(random(*program.constants[fqn].spec.shape, seed=seed + i))
        for i, fqn in enumerate(sorted(program.trainable))
    }
    return program.rewrite(constants=made)


def carrying(*methods: Method, model: nn.Module | None = None, seed: int = 0) -> Program:
    torch.manual_seed(1)
    return trained(Pipeline(methods).run(peftc.capture(model or Model())), seed)


def layer(out: int, inside: int, **factors: tuple[torch.Tensor, torch.Tensor]) -> Program:
    """One linear layer `m` with LoRA adapters of given B and A."""
    module = nn.ModuleDict({"m": nn.Linear(inside, out, bias=False)})
    module["m"].weight.data = random(out, inside, seed=9)
    methods = [Lora(adapter=n, rank=len(a), targets="m") for n, (_, a) in factors.items()]
    program = Pipeline(methods).run(peftc.capture(module))
    made = {
        f"m.lora_{part}.{name}.weight": Held(tensor.float())
        for name, (b, a) in factors.items()
        for part, tensor in (("B", b), ("A", a))
    }
    return program.rewrite(constants=made)


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    q: torch.Tensor = torch.linalg.qr(random(rows, columns, seed=seed).double())[0]
    return q


def matrix(program: Program, site: str, weight: torch.Tensor) -> np.ndarray:
    """A stored weight as matrices (experts, out, in) in fp64."""
    kind = program.sites[site].kind
    stacked = weight.double() if kind.name == "experts" else weight.double().flatten(1)[None]
    turned = kind.transposed or kind.name == "embedding"
    return np.asarray(stacked.mT if turned else stacked)


def dense(program: Program) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """By adapter and site, ΔW and W, from the folded weight less the base's."""
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name in program.adapters:
        folded = fold_sites(alone(program, [name]))[0]
        found[name] = {}
        for fqn in program.adapters[name].sites:
            own = program.sites[fqn].name("weight")
            before = matrix(program, fqn, value(program.constants[own]))
            found[name][fqn] = matrix(program, fqn, value(folded.constants[own])) - before, before
    return found


def agrees(change: Change, delta: np.ndarray, weight: np.ndarray) -> None:
    """Every figure against numpy's SVD."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    k = change.directions
    energy, total = np.square(s), float(np.linalg.norm(delta))
    assert change.norm == pytest.approx(total, rel=1e-4)
    assert change.relative == pytest.approx(total / np.linalg.norm(weight), rel=1e-4)
    count = len(change.singular_values)
    assert np.allclose(
        change.singular_values, np.sqrt(energy.mean(0))[:count], atol=1e-4 * float(s.max())
    )
    p = s[:, :count] / s[:, :count].sum(1, keepdims=True)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    assert change.effective_rank == pytest.approx(float(np.exp(entropy).mean()), rel=1e-3)
    held = np.cumsum(energy, 1) / energy.sum(1, keepdims=True)
    assert change.rank_99 == int((held < 0.99).sum(1).max()) + 1
    within = u.swapaxes(1, 2)[:, :k] @ weight @ vt.swapaxes(1, 2)[:, :, :k]
    assert change.amplification == pytest.approx(total / float(np.linalg.norm(within)), rel=1e-3)


def only(program: Program) -> tuple[Change, ...]:
    """What the adapters of a program of one site add."""
    (site,) = analyse(program)
    return site.changes


def pair_of(program: Program) -> Pair:
    (site,) = analyse(program)
    (pair,) = site.pairs
    return pair


@pytest.mark.parametrize("method", [Lora(rank=3, alpha=6, targets=ALL), Renormed(targets=ALL)])
def test_figures_equal_dense_ones_at_every_kind_of_site(method: Method) -> None:
    program = carrying(method)
    want, found = dense(program)["default"], analyse(program)
    assert [site.site for site in found] == list(want) and len(found) == 4
    for site in found:
        (change,) = site.changes
        assert change.how == ("factors" if isinstance(method, Lora) else "eigen")
        assert change.rank == (3 if isinstance(method, Lora) else None)
        assert site.norm == pytest.approx(float(np.linalg.norm(want[site.site][1])), rel=1e-5)
        agrees(change, *want[site.site])


def test_figures_of_experts_equal_dense_ones_of_each(tmp_path: Path) -> None:
    program = trained(mixture(tmp_path))
    want = dense(program)
    for site in analyse(program):
        assert site.kind == "experts" and len(site.shape) == 3
        for change in site.changes:
            agrees(change, *want[change.adapter][site.site])
        (a, _), (b, _) = (want[name][site.site] for name in "ab")
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        assert site.pairs[0].cosine == pytest.approx(float(cosine), abs=1e-5)


def test_comparison_equals_a_dense_one_whatever_form_the_changes_have() -> None:
    methods = [
        Lora(adapter="a", rank=2, targets=ALL), Renormed(adapter="b", targets=ALL),
        Lora(adapter="c", rank=3, targets=ALL), Renormed(adapter="d", targets=["wide"]),
    ]  # fmt: skip
    program = Pipeline(methods[:1]).run(peftc.capture(Model()))
    program = trained(Pipeline(methods[1:]).run(program))
    want = dense(program)
    for site in analyse(program):
        assert len(site.pairs) == (6 if site.site == "wide" else 3)
        for pair in site.pairs:
            (x, _), (y, _) = (want[name][site.site] for name in pair.adapters)
            cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
            assert pair.cosine == pytest.approx(float(cosine), abs=1e-5)
            vx, vy = (np.linalg.svd(d[0], full_matrices=False)[2] for d in (x, y))
            for i, row in enumerate(pair.similarity, 1):
                for j, phi in enumerate(row, 1):
                    expected = np.square(vx[:i] @ vy[:j].T).sum() / min(i, j)
                    assert phi == pytest.approx(float(expected), abs=1e-3)
            assert pair.overlap == pytest.approx(pair.similarity[-1][-1])


def test_weight_read_in_pieces_gives_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"m": nn.Linear(50, 70), "t": Conv1D(70, 50)})
    program = carrying(Lora(targets=["m", "t"], rank=3), model=model)
    want = dense(program)["default"]
    small = partial(chunks, elements=1000)
    monkeypatch.setattr(analysis, "chunks", small)
    assert len(small((70, 50))) > 3
    for site in analyse(program):
        agrees(site.changes[0], *want[site.site])


def test_ranks_of_experts_are_the_largest() -> None:
    figures = Figures(3)
    for count in (1, 3, 2):
        lengths = (torch.arange(3) < count).double()
        b, a = orthonormal(9, 3, 0) * lengths, orthonormal(8, 3, 1).t()
        figures.see(spectra.of_product(b, a), 1.0)
    assert figures.change("a", 1.0, None).rank_99 == 3


def test_large_change_without_factors_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    decaying = orthonormal(90, 80, 0) * 0.7 ** torch.arange(80) @ orthonormal(120, 80, 1).t()
    exact = spectra.of_dense(decaying.float())
    monkeypatch.setattr(spectra, "EXACT", 50)
    before = torch.get_rng_state()
    sampled = spectra.of_dense(decaying.float())
    assert torch.equal(torch.get_rng_state(), before), "no one else's numbers are drawn"
    assert (exact.how, sampled.how, len(sampled.values)) == ("eigen", "randomized", 64)
    assert torch.allclose(sampled.values, exact.values[:64], atol=1e-5)
    assert sampled.energy == pytest.approx(exact.energy) and sampled.effective_rank() is None
    assert sampled.rank_of(0.99) == exact.rank_of(0.99)
    assert sampled.similarity(exact)[-1, -1] == pytest.approx(1, abs=1e-4)
    assert spectra.of_dense(random(90, 120, seed=2)).rank_of(0.99) is None, "more than are known"


def test_spectrum_is_the_one_it_was_made_with() -> None:
    s = torch.tensor([4.0, 2.0, 1.0, 1.0])
    b, a = orthonormal(20, 4, 0) * s, orthonormal(30, 4, 1).t()
    (change,) = only(layer(20, 30, default=(b, a)))
    p = s / s.sum()
    assert change.singular_values == pytest.approx(s.tolist(), abs=1e-5)
    assert change.norm == pytest.approx(math.sqrt(22), abs=1e-5)
    assert change.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()), abs=1e-5)
    assert (change.rank, change.rank_99, change.directions) == (4, 4, 4)


def test_effective_rank_is_the_rank_when_all_singular_values_are_equal() -> None:
    b, a = orthonormal(20, 6, 0), orthonormal(30, 6, 1).t()
    (change,) = only(layer(20, 30, default=(b, a)))
    assert change.effective_rank == pytest.approx(6, abs=1e-4) and change.rank_99 == 6


def test_directions_are_fewer_than_the_rank_when_factors_repeat() -> None:
    b, a = random(20, 2, seed=0), random(2, 30, seed=1)
    (change,) = only(layer(20, 30, default=(b.repeat(1, 3), a.repeat(3, 1))))
    assert (change.rank, change.directions) == (6, 2)


def test_amplification_is_that_of_the_weight_s_own_directions() -> None:
    program = layer(20, 30, default=(torch.zeros(20, 2), torch.zeros(2, 30)))
    u, s, vh = torch.linalg.svd(value(program.constants["m.weight"]).double(), full_matrices=False)
    scaled = layer(20, 30, default=(3 * u[:, :2] * s[:2], vh[:2]))
    (change,) = only(scaled)
    assert change.amplification == pytest.approx(3, rel=1e-4)


def test_fresh_adapter_adds_nothing() -> None:
    program = Pipeline([Lora(targets="wide", rank=2)]).run(peftc.capture(Model()))
    (change,) = only(program)
    assert (change.norm, change.effective_rank, change.rank_99) == (0, 0, 0)
    assert change.amplification is None and change.obstacle is None


def test_similarity_is_one_for_the_same_subspace_and_zero_for_orthogonal_ones() -> None:
    basis = orthonormal(30, 8, 0).t()
    mixed = random(4, 4, seed=1).double() @ basis[:4]
    up = [random(20, 4, seed=seed) for seed in (2, 3)]
    same = pair_of(layer(20, 30, a=(up[0], basis[:4]), b=(up[1], mixed)))
    apart = pair_of(layer(20, 30, a=(up[0], basis[:4]), b=(up[1], basis[4:])))
    assert same.overlap == pytest.approx(1, abs=1e-5)
    assert apart.overlap == pytest.approx(0, abs=1e-5) and apart.chance == pytest.approx(4 / 30)
    assert apart.cosine == pytest.approx(0, abs=1e-6)


def test_similarity_counts_the_directions_that_are_shared() -> None:
    basis = orthonormal(30, 5, 0).t()
    equal = orthonormal(20, 4, 1)
    pair = pair_of(layer(20, 30, a=(equal, basis[:4]), b=(equal[:, :2], basis[[3, 4]])))
    assert pair.overlap == pytest.approx(1 / 2, abs=1e-5), "one of two"


def test_cosine_is_one_of_itself_and_minus_one_of_its_opposite() -> None:
    b, a = random(20, 3, seed=0), random(3, 30, seed=1)
    assert pair_of(layer(20, 30, a=(b, a), b=(2 * b, a))).cosine == pytest.approx(1, abs=1e-6)
    assert pair_of(layer(20, 30, a=(b, a), b=(-b, a))).cosine == pytest.approx(-1, abs=1e-6)


@few
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(5, 12), st.integers(5, 12))
def test_figures_do_not_depend_on_how_the_product_is_factored(
    seed: int, rank: int, out: int, inside: int
) -> None:
    b, a = random(out, rank, seed=seed).double(), random(rank, inside, seed=seed + 1).double()
    turn = orthonormal(rank, rank, seed + 2) * (torch.rand(rank).double() + 0.5)
    one, other = (
        only(layer(out, inside, default=f))[0]
        for f in ((b, a), (b @ torch.linalg.inv(turn), turn @ a))
    )
    assert one.singular_values == pytest.approx(other.singular_values, rel=1e-3, abs=1e-4)
    assert one.effective_rank == pytest.approx(other.effective_rank, rel=1e-3)
    assert one.amplification == pytest.approx(other.amplification, rel=1e-2)
    assert pair_of(
        layer(out, inside, a=(b, a), b=(b @ torch.linalg.inv(turn), turn @ a))
    ).cosine == pytest.approx(1, abs=1e-4)


def test_row_says_why_when_a_site_does_not_fold() -> None:
    program = carrying(Bent(targets=["wide"]))
    (change,) = only(program)
    assert change.norm is None and change.how is None
    assert change.obstacle is not None and "is not affine" in change.obstacle


def test_row_says_that_the_bias_changes_too() -> None:
    (change,) = only(carrying(Gain(targets=["wide"])))
    assert change.remark == "its bias changes too" and change.how == "eigen"


def test_module_trained_whole_is_analysed_by_itself() -> None:
    program = carrying(Lora(targets="wide", rank=2, modules_to_save="turned"))
    want = value(program.constants["turned.weight"]) - value(program.captured["turned.weight"])
    found = {site.site: site.changes[0] for site in analyse(program)}
    assert set(found) == {"wide", "turned"}
    assert found["turned"].norm == pytest.approx(float(want.norm()), rel=1e-5)
    assert found["turned"].rank is None


def test_nothing_to_analyse_is_an_error() -> None:
    with pytest.raises(PassError, match="no adapter"):
        analyse(peftc.capture(Model()))


@pytest.fixture(scope="module")
def base(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint("llama", torch.bfloat16)


@pytest.fixture(scope="module")
def adapters(base: Path, adapter: MakeAdapter) -> list[str]:
    return [str(adapter(base)), str(adapter(base, seed=1, r=8))]


def test_directories_are_analysed_each_by_itself(base: Path, adapters: list[str]) -> None:
    both, one = analyse(base, adapters), analyse(base, adapters[1:])
    assert len(both) == len(one) == 14
    assert [change.rank for change in both[0].changes] == [4, 8]
    assert [site.changes[1] for site in both] == [site.changes[0] for site in one]
    assert all(len(site.pairs) == 1 and abs(site.pairs[0].cosine or 1) < 0.2 for site in both)


def test_same_directory_twice_gets_two_names(base: Path, adapters: list[str]) -> None:
    found = analyse(base, [adapters[0], adapters[0]])
    names = [change.adapter for change in found[0].changes]
    assert len(set(names)) == 2 and found[0].pairs[0].overlap == pytest.approx(1, abs=1e-6)


def test_unknown_adapter_is_a_typed_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        analyse(base, [tmp_path / "nowhere"])


def invoke(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["inspect", *map(str, args)], env={"COLUMNS": "140"})
    if isinstance(done.exception, PeftcError):
        raise done.exception
    return done.exit_code, done.stdout


def test_command_prints_json(base: Path, adapters: list[str]) -> None:
    _, out = invoke(base, "--adapter", adapters[0], "--adapter", adapters[1], "--json")
    data = json.loads(out)["sites"]
    found = analyse(base, adapters)
    assert [site["site"] for site in data] == [site.site for site in found]
    assert data[0]["changes"][1]["singular_values"] == list(found[0].changes[1].singular_values)
    assert len(data[0]["pairs"][0]["similarity"]) == 4


def test_command_prints_a_table_of_the_sites_that_change_most(
    base: Path, adapters: list[str]
) -> None:
    code, out = invoke(base, "--adapter", adapters[0], "--adapter", adapters[1], "--limit", 2)
    most = sorted(analyse(base, adapters), key=lambda s: -max(c.relative or 0 for c in s.changes))
    assert code == 0 and "the 2 of 14 that change most" in out and "φ(all)" in out
    for site in most[:2]:
        assert site.site.rpartition(".")[2] in out
    assert out.count("_proj") == 6, "two sites in three tables"


def test_table_says_why_a_site_has_no_figures() -> None:
    program = carrying(Bent(targets=["wide"]))
    found = analyse(program)
    runner = CliRunner()
    with runner.isolation(env={"COLUMNS": "200"}) as (out, *_):
        analysis_view.show(found, Terminal())
    assert b"is not affine" in out.getvalue()


@pytest.mark.parametrize("several", [False, True])
def test_command_draws_a_picture(
    base: Path, adapters: list[str], tmp_path: Path, several: bool
) -> None:
    pytest.importorskip("matplotlib")
    chosen = [x for path in adapters[: 1 + several] for x in ("--adapter", path)]
    code, _ = invoke(base, *chosen, "--plot", tmp_path / "a.png", "-q")
    assert code == 0 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_picture_without_matplotlib_is_a_typed_error(
    base: Path, adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency) as caught:
        invoke(base, "--adapter", adapters[0], "--plot", tmp_path / "a.png")
    assert caught.value.fix == "pip install 'peftc[train]'"


def test_picture_in_no_folder_is_an_error_before_the_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis_view, "find_spec", lambda name: object())
    with pytest.raises(ArtifactError):
        invoke(base, "--adapter", "nowhere", "--plot", tmp_path / "no" / "a.png")


@pytest.mark.parametrize("options", [["--plot", "x.png"], ["--limit", "3"]])
def test_options_of_the_analysis_without_an_adapter_are_refused(
    base: Path, options: list[str]
) -> None:
    assert invoke(base, *options)[0] == 2
