"""Every method on every architecture: cells of docs/parity.md, and checkpoints."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open

import peftc
from peftc import registry
from peftc.errors import PassError, PeftcError, SelectionError
from peftc.passes.attach import Attach
from peftc.passes.lora import Lora
from peftc.passes.merge import Merge
from peftc.passes.tokens import TrainableTokens
from peftc.pipeline import Pipeline
from tests import parity, zoo
from tests.families import COMMON

CHOSEN = os.environ.get("PEFTC_MATRIX", "0")
SHOWN = parity.shown()
# Beside the part that was chosen, cells that once showed a defect.
MENDED = [
    ("lora", "jamba"), ("prefix tuning", "m2m_100"), ("bitfit", "gpt_oss"),
    ("bottleneck, houlsby", "convnext"), ("nf4 + lora", "switch"), ("peft", "bert"),
]  # fmt: skip
WANTED = parity.cells() if CHOSEN == "all" else [*parity.sample(int(CHOSEN)), *MENDED]
CELLS = [cell for cell in dict.fromkeys(WANTED) if SHOWN.get(cell) != parity.UNMEASURED]
MODELS = list(COMMON.values())
MIXTURES = [zoo.SPECIMENS[name] for name in ("mixtral", "qwen3_moe")]


@pytest.mark.parametrize(("method", "name"), CELLS, ids=[f"{m}-{n}" for m, n in CELLS])
def test_cell_is_what_the_page_shows(method: str, name: str) -> None:
    cell = parity.measure(method, name)
    assert cell.holds, (cell, cell.note)
    assert parity.told(bool(cell.figures), cell.note) == SHOWN[method, name]


def test_page_shows_every_cell() -> None:
    """`python -m tests.parity` writes the page anew."""
    assert SHOWN.keys() == set(parity.cells())


def test_every_registered_pass_is_in_a_row() -> None:
    assert set(registry.PASSES) == {name for row in parity.passes().values() for name in row}


def test_sample_is_of_every_row_and_column() -> None:
    parts = [parity.sample(number) for number in range(parity.SLICES)]
    assert sorted(c for part in parts for c in part) == sorted(
        (method, name) for method, name in parity.cells() if method in parity.METHODS
    )
    for part in parts:
        assert {name for _, name in part} == set(zoo.SPECIMENS)
        rare = {"experts", "layer replication"}  # which few architectures have
        assert {m for m, _ in part} >= {m for m in parity.METHODS if "convol" not in m} - rare


def saved(specimen: zoo.Specimen, path: Path) -> Path:
    specimen.build().save_pretrained(path)
    return path


def keys(folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            found |= {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("specimen", MODELS, ids=lambda s: s.name)
def test_checkpoint_keeps_its_layout_and_loads_with_the_unmerged_output(
    specimen: zoo.Specimen, tmp_path: Path
) -> None:
    base = saved(specimen, tmp_path / "base")
    theirs = zoo.adapter("lora", specimen)
    want = zoo.run(theirs, specimen)
    zoo.save(theirs, "lora", specimen, tmp_path / "adapter")
    artifact = peftc.export(
        base, tmp_path / "out", merge=True, adapters=[(str(tmp_path / "adapter"), 1.0)]
    )
    assert keys(tmp_path / "out") == keys(base)
    loaded = type(specimen.build()).from_pretrained(tmp_path / "out").eval()
    assert zoo.distance(zoo.run(loaded, specimen), want) <= 1e-5
    assert artifact.manifest["proof"]["site"]["relative_error"] <= 1e-5


@pytest.mark.parametrize("specimen", MIXTURES, ids=lambda s: s.name)
def test_experts_train_merge_and_load_per_expert(specimen: zoo.Specimen, tmp_path: Path) -> None:
    base = saved(specimen, tmp_path / "base")
    lora = Lora(rank=4, targets="q_proj", parameters=list(specimen.experts))
    program = Pipeline([lora]).run(peftc.capture(base))
    model = peftc.materialize(program)
    inputs = specimen.inputs()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        output = specimen.output(model(**inputs))
        loss = torch.nn.functional.cross_entropy(
            output.flatten(0, 1), inputs["input_ids"].flatten()
        )
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        optimizer.step()
    assert losses[-1] < losses[0]
    want = zoo.run(model, specimen)
    trained = peftc.absorb(program, model)
    peftc.to_peft(trained, tmp_path / "adapter")
    peftc.export(base, tmp_path / "out", merge=True, adapters=[(str(tmp_path / "adapter"), 1.0)])
    assert keys(tmp_path / "out") == keys(base)
    loaded = type(specimen.build()).from_pretrained(tmp_path / "out").eval()
    assert zoo.distance(zoo.run(loaded, specimen), want) <= 1e-5
    again = peft.PeftModel.from_pretrained(
        type(specimen.build()).from_pretrained(base), tmp_path / "adapter"
    )
    assert zoo.distance(zoo.run(again.eval(), specimen), want) <= 1e-5


@pytest.mark.parametrize("specimen", MIXTURES, ids=lambda s: s.name)
def test_experts_keep_their_adapter_factored_in_the_forward(specimen: zoo.Specimen) -> None:
    program = peftc.capture(specimen.build())
    lora = Lora(rank=2, targets=[], parameters=list(specimen.experts))
    site = next(s for s in Pipeline([lora]).run(program).sites.values() if not s.is_plain)
    targets = [str(node.target) for node in site.graph.nodes if node.op == "call_function"]
    assert sum("grouped_linear" in target for target in targets) == 3  # W, A and B
    assert not any("bmm" in target for target in targets)


COMPILED = ["lora", "dora", "vera", "loha", "lokr", "ia3", "adalora", "oft"]


@pytest.mark.parametrize("method", COMPILED)
def test_method_compiles_to_one_graph(method: str, tmp_path: Path) -> None:
    compiled_equals_eager(zoo.SPECIMENS["llama"], method, tmp_path)


@pytest.mark.parametrize("specimen", MIXTURES, ids=lambda s: s.name)
def test_experts_compile_to_one_graph(specimen: zoo.Specimen, tmp_path: Path) -> None:
    compiled_equals_eager(specimen, "experts", tmp_path)


def compiled_equals_eager(specimen: zoo.Specimen, method: str, folder: Path) -> None:
    theirs = zoo.adapter(method, specimen)
    zoo.save(theirs, method, specimen, folder / "adapter")
    attach = Attach(path=str(folder / "adapter"))
    model = peftc.materialize(Pipeline([attach]).run(peftc.capture(specimen.build())))
    want = zoo.run(model, specimen)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert zoo.distance(zoo.run(compiled, specimen), want) <= 1e-6
    assert len(graphs) == 1


def test_module_that_is_never_called_is_refused_when_it_is_targeted() -> None:
    program = peftc.capture(zoo.SPECIMENS["mamba"].build())
    with pytest.raises(PeftcError, match=r"dt_proj.*never called"):
        Pipeline([Lora(rank=2, targets="dt_proj")]).run(program)
    chosen, errors = Lora(rank=2).pick(program)
    assert not errors
    assert not [name for name in chosen if "dt_proj" in name]


@pytest.mark.parametrize(
    ("name", "roles", "suffixes"),
    [
        ("llama", "query,value", {"q_proj", "v_proj"}),
        ("gpt2", "query,value", {"c_attn"}),
        ("bloom", "key,down", {"query_key_value", "dense_4h_to_h"}),
        ("t5", "output", {"o"}),
        ("whisper", "query", {"q_proj"}),
    ],
)
def test_roles_select_layers_by_structure(name: str, roles: str, suffixes: set[str]) -> None:
    program = peftc.capture(zoo.SPECIMENS[name].build())
    chosen, errors = Lora(rank=2, targets=f"role:{roles}").pick(program)
    assert not errors
    assert {re.split(r"\.", fqn)[-1] for fqn in chosen} == suffixes


def test_role_is_refused_when_no_layer_has_it() -> None:
    program = peftc.capture(zoo.SPECIMENS["plain"].build())
    errors = Lora(rank=2, targets="role:query").pick(program)[1]
    assert errors and isinstance(errors[0], SelectionError)


def test_role_is_refused_when_it_is_misspelt() -> None:
    program = peftc.capture(zoo.SPECIMENS["llama"].build())
    errors = Lora(rank=2, targets="role:qurey").pick(program)[1]
    assert "query" in str(errors[0])


def test_adapters_are_refused_when_they_train_the_same_tensor() -> None:
    program = peftc.capture(zoo.SPECIMENS["gpt2"].build())
    first = Lora(rank=2, targets="c_attn", bias="lora_only", adapter="a")
    second = Lora(rank=2, targets="c_attn", bias="all", adapter="b")
    with pytest.raises(PeftcError, match=r"c_attn\.bias.*trained by the adapter 'a' already"):
        Pipeline([first, second]).run(program)


@pytest.mark.parametrize(
    ("method", "name", "targets"),
    [
        ("ia3", "llama", "embed_tokens"),
        ("oft", "vit", "patch_embeddings.projection"),
        ("dora", "mixtral", r".*experts\.down_proj"),
        ("loha", "gpt2", "c_attn"),
        ("lora", "grouped", "conv"),
    ],
)
def test_method_is_refused_on_a_kind_of_site_that_it_cannot_serve(
    method: str, name: str, targets: str
) -> None:
    program = peftc.capture(zoo.SPECIMENS[name].build())
    options: dict[str, Any] = {"targets": targets}
    if method == "ia3":
        options["feedforward"] = []
    errors = registry.load(method)(**options).check(program)
    assert errors
    assert all(isinstance(error, PassError) and error.where and error.fix for error in errors)


def test_patterns_are_refused_all_at_once_when_they_are_misspelt() -> None:
    program = peftc.capture(zoo.SPECIMENS["llama"].build())
    lora = Lora(
        rank=2, targets=["q_proj", "v_porj"], rank_pattern={"q_porj": 4},
        modules_to_save=["lm_haed"], exclude=["o_porj"],
    )  # fmt: skip
    text = "\n".join(map(str, lora.check(program)))
    assert all(typo in text for typo in ("v_porj", "q_porj", "lm_haed", "o_porj"))
    assert all(near in text for near in ("v_proj", "q_proj", "lm_head", "o_proj"))


def test_tokens_of_a_tied_head_are_trained_as_one() -> None:
    specimen = zoo.SPECIMENS["gpt2"]
    program = Pipeline([TrainableTokens(tokens=[5, 7], targets="wte")]).run(
        peftc.capture(specimen.build())
    )
    model = peftc.materialize(program)
    (parameter,) = (p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.normal_(generator=torch.Generator().manual_seed(0))
    merged = Pipeline([Merge()]).run(peftc.absorb(program, model))
    ours = zoo.run(peftc.materialize(merged), specimen)
    assert zoo.distance(ours, zoo.run(model, specimen)) <= 1e-5
