"""The table of ONNX rules: each operator computes in onnxruntime what torch does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc.calling import Port
from peftc.errors import CaptureError
from peftc.exporters.onnx_fusing import fuse
from peftc.exporters.onnx_lowering import Lowering
from peftc.exporters.onnx_table import TABLE
from peftc.normal import normalize
from peftc.whole import Whole

COLUMNS = 6
_noise = torch.Generator().manual_seed(4)
GIVEN = {  # five rows, where the capture has three
    "x": torch.randn(5, COLUMNS, generator=_noise),
    "y": torch.randn(5, COLUMNS, generator=_noise),
    "i": torch.tensor([4, 0, 2, 2, 1]),
}


Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Given(nn.Module):
    def __init__(self, functions: Mapping[str, Function]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor, y: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(x, y, i) for function in self.functions.values())


class NoWeights:
    def name(self, name: str) -> str:
        raise AssertionError(name)

    def value(self, name: str) -> onnx_ir.Value:
        raise AssertionError(name)

    def linear(self, *_: Any) -> None:
        return None

    linears = embedding = linear


def lowered(functions: Mapping[str, Function]) -> onnx_ir.Model:
    """One ONNX model of functions of x and y (rows, 6) and i (rows,)."""
    inputs = (
        Port("x", ("rows", COLUMNS), torch.float32),
        Port("y", ("rows", COLUMNS), torch.float32),
        Port("i", ("rows",), torch.int64),
    )
    example = tuple(port.example({"rows": 3}) for port in inputs)
    dynamic = {port.name: {0: torch.export.Dim.DYNAMIC} for port in inputs}
    exported = torch.export.export(Given(functions), example, dynamic_shapes=dynamic, strict=False)
    graph, held = normalize(exported, inputs)
    fuse(graph)
    results = next(n for n in graph.nodes if n.op == "output").args[0]
    ports = []
    for name, node in zip(functions, results, strict=True):
        value = node.meta["val"]
        dims = tuple(d if isinstance(d, int) else f"{name} {d}" for d in value.shape)
        ports.append(Port(name, dims, value.dtype))
    whole = Whole("function", graph, inputs, tuple(ports), held, {})
    return Lowering(whole, NoWeights(), TABLE).model()


def run(model: onnx_ir.Model) -> dict[str, Tensor]:
    """Every result in onnxruntime, of a model that the checker finds nothing wrong with."""
    proto = onnx_ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    results = session.run(names, {name: x.numpy() for name, x in GIVEN.items()})
    return {name: torch.from_numpy(x) for name, x in zip(names, results, strict=True)}


OPERATORS: dict[str, Function] = {
    "arithmetic": lambda x, y, i: (x + y) * 2 - x / (y.abs() + 1) + (3 - y),
    "alpha": lambda x, y, i: torch.add(x, y, alpha=0.5) + torch.sub(x, y, alpha=2),
    "integers and floats": lambda x, y, i: x * i[:, None] + (i + 1)[:, None],
    "division rounds": lambda x, y, i: torch.div(i, 4, rounding_mode="floor") + i // 3,
    "division truncates": lambda x, y, i: torch.div(x, 0.3, rounding_mode="trunc"),
    "functions": lambda x, y, i: x.exp().sqrt() + y.abs().log(),
    "powers": lambda x, y, i: x.abs().pow(2.5) + x**2 + (x.abs() + 1).rsqrt() + 2.0 ** x,
    "waves": lambda x, y, i: x.sin() * y.cos() + x.tanh() - y.sigmoid(),
    "activations": lambda x, y, i: F.relu(x) + F.silu(y) + F.gelu(x) + F.softplus(y),
    "gelu by tanh": lambda x, y, i: F.gelu(x, approximate="tanh") + torch.erf(y),
    "clamp": lambda x, y, i: x.clamp(-0.5, 0.5) + y.clamp(min=0) + x.clamp(max=0.1),
    "comparisons": lambda x, y, i: (x > y) | (x <= 0) & (y != 1) ^ (x < 2) | (i[:, None] >= 2),
    "logic": lambda x, y, i: torch.logical_not(x > 0) & ~(y > 0),
    "integer bits": lambda x, y, i: (i & 3) | 8,
    "where": lambda x, y, i: torch.where(x > 0, x, 0.0) + y.masked_fill(y > 0, -1.0),
    "minimum": lambda x, y, i: torch.minimum(x, y) + torch.max(x, y) - x.amax(-1, keepdim=True),
    "extreme and place": lambda x, y, i: x.max(-1).values + x.min(-1).indices + x.argmax(-1),
    "mean and sum": lambda x, y, i: x.mean(-1, keepdim=True) + y.sum((0, 1)) + x.sum(),
    "sum of booleans": lambda x, y, i: (x > 0).sum(-1) + (y > 0).cumsum(-1)[:, -1],
    "softmax": lambda x, y, i: x.softmax(-1) + y.softmax(0),
    "casts": lambda x, y, i: x.long().float() + (y > 0).to(torch.int32) + i.float()[:, None],
    "reshapes": lambda x, y, i: x.view(-1, 2, 3).transpose(1, 2).reshape(x.shape[0], 6) + y.view(
        x.shape[0], -1
    ),
    "reshape of two sizes": lambda x, y, i: (x[:, None] * y[None]).reshape(-1, x.shape[0], 6),
    "flatten": lambda x, y, i: torch.unflatten(x, 1, (2, -1)).flatten(1) + y.flatten().view(-1, 6),
    "flatten in front": lambda x, y, i: (x[:, None] * y[None]).flatten(0, 1),
    "permute": lambda x, y, i: x.view(-1, 2, 3).permute(2, 0, 1) + x.t().sum(),
    "expand": lambda x, y, i: x[:, None].expand(-1, x.shape[0], -1) + y[:1].expand(3, -1)[None, 0],
    "repeat": lambda x, y, i: x.repeat(1, 2) + y.repeat(1, 2),
    "squeeze": lambda x, y, i: x.unsqueeze(1).squeeze(1) + y[:, None].squeeze(),
    "slices": lambda x, y, i: x[1:, ::2] + y[: x.shape[0] - 1, 1:4],
    "select": lambda x, y, i: x[:, 2] + y[-1, 0] + x.select(1, -1),
    "cat and stack": lambda x, y, i: torch.cat([x, i[:, None]], 1) + torch.stack([x, y], 1).sum(),
    "cat of sizes": lambda x, y, i: torch.cat([x, y[:1]], 0),
    "split": lambda x, y, i: x.chunk(3, 1)[0] + torch.split(x, 4, 1)[1] + y.chunk(2, 1)[1][:, :2],
    "unbind": lambda x, y, i: x.unbind(1)[0] - y.unbind(1)[5],
    "arange": lambda x, y, i: torch.arange(x.shape[0]) + torch.arange(1, x.shape[0] * 2, 2),
    "arange of floats": lambda x, y, i: torch.arange(0, x.shape[0], dtype=torch.float32) * x[:, 0],
    "constants": lambda x, y, i: torch.ones(x.shape[0], 6) + torch.full_like(y, 2) + x.new_zeros(6),
    "full": lambda x, y, i: torch.full((x.shape[0], 1), -math.inf).exp() + torch.zeros_like(x),
    "index by one": lambda x, y, i: x[i] + y[:, torch.tensor([0, 2, 4, 1, 3, 5])],
    "index by two": lambda x, y, i: x[i[:, None], torch.arange(6)[None]] + y,
    "index select": lambda x, y, i: x.index_select(0, i) + x.gather(0, i[:, None].expand(-1, 6)),
    "embedding": lambda x, y, i: F.embedding(i, x) + y,
    "triangles": lambda x, y, i: x.tril() + y.triu(1) + x.tril(diagonal=-1),
    "pad": lambda x, y, i: F.pad(x, (1, 2)) + F.pad(y, (2, 1), value=1.5),
    "matmul": lambda x, y, i: x @ y.t() + torch.bmm(x[None], y.t()[None])[0] + x.mm(y.T),
    "addmm": lambda x, y, i: torch.addmm(y[0], x, y[:1].t() @ y[:1]),
    "baddbmm": lambda x, y, i: torch.baddbmm(x[None], x[None] @ y.t()[None], y[None], alpha=0.5),
    "linear": lambda x, y, i: F.linear(x, y) + F.linear(x, y, y[:, 0]),
    "layer norm": lambda x, y, i: F.layer_norm(x, (6,), y[0]) + F.layer_norm(y, (6,)),
    "convolution": lambda x, y, i: F.conv1d(x[:, None], x[:1].view(1, 1, 6)[..., :3], padding=1),
    "convolution of planes": lambda x, y, i: F.conv2d(
        x.view(-1, 1, 2, 3), y[:1].view(1, 1, 2, 3), stride=(2, 1), padding=(1, 0)
    ),
    "topk": lambda x, y, i: x.topk(3, -1).values + x.topk(3, -1).indices,
    "attention": lambda x, y, i: F.scaled_dot_product_attention(
        x.view(1, -1, 2, 3).transpose(1, 2), y.view(1, -1, 2, 3).transpose(1, 2),
        (x + y).view(1, -1, 2, 3).transpose(1, 2), scale=0.3, is_causal=True,
    ),
    "masked attention": lambda x, y, i: F.scaled_dot_product_attention(
        x.view(1, -1, 2, 3).transpose(1, 2), y[:, None, :3].transpose(0, 1)[None],
        x[:, None, :3].transpose(0, 1)[None], attn_mask=(y @ x.t() > -3)[None, None],
        enable_gqa=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def computed() -> dict[str, Tensor]:
    return run(lowered(OPERATORS))


@pytest.mark.parametrize("name", OPERATORS)
def test_rule_computes_what_torch_does_at_another_size(
    name: str, computed: dict[str, Tensor]
) -> None:
    want, got = OPERATORS[name](*GIVEN.values()), computed[name]
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    both = torch.cat([angles, angles], -1)
    cos, sin = both.cos().unsqueeze(1), both.sin().unsqueeze(1)
    turned = torch.cat([-x[..., 3:], x[..., :3]], -1)
    return x * cos + turned * sin


# What is one operator, and what only looks like it.
FUSED: dict[str, tuple[Function, bool]] = {
    "RMSNormalization": (lambda x, y, i: rms(x, y[0]), True),
    "RMSNormalization by 1 + w": (lambda x, y, i: rms(x, 1 + y[0]), True),
    "RMSNormalization of another": (
        lambda x, y, i: y[0] * (y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), False,
    ),
    "RMSNormalization by a matrix": (lambda x, y, i: rms(x, y), False),
    "RotaryEmbedding": (lambda x, y, i: rotated(x[None, None], y[None, :, :3]), True),
    "RotaryEmbedding of unlike halves": (
        lambda x, y, i: x[None, None]
        * torch.cat([y[None, :, :3], x[None, :, :3]], -1).cos()[:, None]
        + torch.cat([-x[None, None, :, 3:], x[None, None, :, :3]], -1)
        * torch.cat([y[None, :, :3], x[None, :, :3]], -1).sin()[:, None], False,
    ),
    "RotaryEmbedding the other way": (
        lambda x, y, i: x[None, None] * torch.cat([y[None, :, :3]] * 2, -1).cos()[:, None]
        + torch.cat([x[None, None, :, 3:], -x[None, None, :, :3]], -1)
        * torch.cat([y[None, :, :3]] * 2, -1).sin()[:, None], False,
    ),
}  # fmt: skip


def test_pattern_is_one_operator_only_where_every_node_is_as_it_must_be() -> None:
    functions = {name: function for name, (function, _) in FUSED.items()}
    model = lowered(functions)
    kinds = Counter(node.op_type for node in model.graph)
    for kind in ("RMSNormalization", "RotaryEmbedding"):
        assert kinds[kind] == sum(one for name, (_, one) in FUSED.items() if kind in name)
    for name, got in run(model).items():
        want = functions[name](*GIVEN.values())
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)


def test_operators_without_a_rule_are_all_named() -> None:
    with pytest.raises(CaptureError, match=r"aten\.digamma \(nor for lgamma\)"):
        lowered({"both": lambda x, y, i: torch.digamma(x) + torch.lgamma(y)})
