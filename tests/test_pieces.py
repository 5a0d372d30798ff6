"""Whole-model graphs cut into pieces: the same numbers, and one piece for layers that are alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc.calling import Tensors
from peftc.pieces import Cut, cut
from peftc.whole import Whole, capture_whole

from .onnx_families import FAMILIES, saved


def values(program: peftc.Program, whole: Whole, names: list[str]) -> Tensors:
    """What constants are, by name."""
    from peftc.evaluate import value

    return {
        name: whole.held[name] if name in whole.held else value(program.constants[name])
        for name in names
    }


def run(cut: Cut, given: Tensors) -> Tensors:
    """What the pieces compute in turn."""
    held = dict(given)
    for step in cut.steps:
        made = cut.pieces[step.piece].module(*(held[name] for name in step.takes))
        held |= dict(zip(step.gives, made, strict=True))
    return held


@pytest.mark.parametrize(
    ("name", "pieces", "calls"), [("Llama", 3, 5), ("Gemma 3", 3, 8), ("T5", 4, 6)]
)
def test_pieces_compute_what_the_whole_does(
    name: str, pieces: int, calls: int, tmp_path: Path
) -> None:
    program = peftc.capture(saved(FAMILIES[name], tmp_path))
    whole = capture_whole(program)[0]
    found = cut(whole, program.context, least=1)
    assert (len(found.pieces), len(found.steps)) == (pieces, calls)
    assert len(cut(whole, program.context, least=3).pieces) == 1
    generator = torch.Generator().manual_seed(1)
    sizes = {"batch": 3, "sequence": 4, "past": 6, "past + sequence": 10}
    given: Tensors = {}
    for port in whole.inputs:
        x = port.example(sizes)
        given[port.name] = (
            torch.randn(x.shape, generator=generator)
            if x.is_floating_point()
            else torch.randint(0, 4, x.shape, generator=generator).clamp(max=1)
        )
    constants = values(program, whole, list(found.constants))
    with torch.no_grad():
        got = run(found, {**constants, **given})
        want = _whole(whole, {**constants, **given})
    for port, x in zip(whole.outputs, want, strict=True):
        torch.testing.assert_close(got[port.name], x, rtol=0, atol=0)


def _whole(whole: Whole, named: Tensors) -> tuple[torch.Tensor, ...]:
    """The graph as it is, node by node."""
    env: dict[torch.fx.Node, Any] = {}
    for node in whole.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            env[node] = named[str(node.target)]
        elif node.op == "output":
            return tuple(env[n] for n in node.args[0])
        else:
            args: Any = torch.fx.node.map_arg(node.args, env.__getitem__)
            kwargs: Any = torch.fx.node.map_arg(node.kwargs, env.__getitem__)
            call: Any = node.target
            env[node] = call(*args, **kwargs)
    raise AssertionError


def test_a_slot_s_rank_is_a_size_that_varies(tmp_path: Path) -> None:
    from peftc.exporters.inductor_slots import Swap

    program = peftc.capture(saved(FAMILIES["Llama"], tmp_path))
    whole = capture_whole(program)[0]
    swap = Swap.of(program, "swap", "q_proj,v_proj")
    assert len(swap.insert([whole])) == 6
    found = cut(whole, program.context, least=1)
    assert len(found.pieces) == 3
    shape: tuple[Any, ...] = found.constants["model.layers.2.self_attn.v_proj.lora_A.weight"].shape
    assert not isinstance(shape[0], int) and shape[1] == 32


def test_codes_are_decoded_alike_by_torch_and_by_the_kernel(tmp_path: Path) -> None:
    from peftc.constants import Packed
    from peftc.evaluate import value
    from peftc.exporters.inductor_weights import FourBit, Table

    program = peftc.Pipeline([peftc.Nf4(double_quant=True, block_size=32)]).run(
        peftc.capture(saved(FAMILIES["Llama"], tmp_path))
    )
    results = []
    hows: tuple[FourBit, ...] = ("kernel", "aten")
    for how in hows:
        (whole,) = capture_whole(program)
        table = Table(program)
        assert table.quantized(whole.graph, how) == 21
        assert ("peftc" in str(whole.graph)) == (how == "kernel")
        found = cut(whole, program.context, least=1)
        named: Tensors = dict(whole.held)
        for name, like in found.constants.items():
            constant = table.own.get(name) or program.constants.get(name)
            if isinstance(constant, Packed) and like.dtype == torch.uint8:
                constant = constant.inputs["codes"]
            if constant is not None:
                named[name] = value(constant).reshape(like.shape)
        generator = torch.Generator().manual_seed(1)
        for port in whole.inputs:
            x = port.example({"batch": 2, "sequence": 3, "past": 4, "past + sequence": 7})
            named[port.name] = (
                torch.randn(x.shape, generator=generator)
                if x.is_floating_point()
                else torch.ones_like(x)
            )
        with torch.no_grad():
            results.append(run(found, named)["logits"])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
