"""Bottleneck adapters: two small linear layers and a nonlinearity, behind or beside other modules.

Houlsby et al. 2019 (arXiv:1902.00751, fig. 2), Pfeiffer et al. 2020 (arXiv:2005.00247, §3), He et
al. 2021 (arXiv:2110.04366, table 1). The options are those of AdapterHub's `adapters` 1.3.0, which
says what each of them computes where the papers leave it open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from peftc import adapterhub
from peftc.contract import Effect, Method, PassResult
from peftc.errors import PassError, PeftcError
from peftc.passes.placement import module_sites, sublayer_sites
from peftc.targets import LINEARS, Layers, Names

if TYPE_CHECKING:
    from torch import fx

    from peftc.constants import Constant
    from peftc.program import Program
    from peftc.sites import Site, SiteEditor

SUBLAYERS = "role:sublayers"
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "houlsby": {
        "mh_adapter": True, "output_adapter": True, "original_ln_before": False,
        "is_parallel": False, "reduction_factor": 16.0, "non_linearity": "swish", "scaling": "1.0",
    },
    "pfeiffer": {
        "mh_adapter": False, "output_adapter": True, "original_ln_before": True,
        "is_parallel": False, "reduction_factor": 16.0, "non_linearity": "relu", "scaling": "1.0",
    },
    "parallel": {
        "mh_adapter": False, "output_adapter": True, "original_ln_before": False,
        "is_parallel": True, "reduction_factor": 2.0, "non_linearity": "relu", "scaling": "4.0",
    },
}  # fmt: skip
LEARNED = ("learned", "channel")
NON_LINEARITIES = Literal[
    "relu", "gelu", "gelu_new", "swish", "silu", "tanh", "sigmoid", "leakyrelu", "mish", "linear"
]
_OPTIONS = (
    "mh_adapter", "output_adapter", "is_parallel", "reduction_factor", "layer_factors",
    "non_linearity", "scaling", "dropout", "ln_before", "ln_after", "original_ln_before",
    "original_ln_after", "residual_before_ln", "adapter_residual_before_ln", "init", "leave_out",
    "width",
)  # fmt: skip
_EPS = 1e-5  # of the adapter's own normalizations, as torch's LayerNorm has it


class Bottleneck(Method):
    """Inject bottlenecks: h + s·up(σ(down(h))), behind or beside sublayers or any modules."""

    peft_type: ClassVar[str | None] = "BOTTLENECK"
    peft_fields: ClassVar[Mapping[str, str]] = {name: name for name in _OPTIONS}
    kinds: ClassVar[frozenset[str]] = frozenset({*LINEARS, "module", "norm"})

    targets: Names = Field(
        SUBLAYERS,
        description="role:sublayers: behind or beside attention and feed-forward, where the "
        "model's own structure shows them; or any modules: names, suffixes (mlp), an expression",
    )
    preset: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "pfeiffer",
        description="what the options below are unless given: houlsby (arXiv:1902.00751, behind "
        "both sublayers), pfeiffer (arXiv:2005.00247, behind the feed-forward and its residual), "
        "parallel (arXiv:2110.04366, beside the feed-forward)",
    )
    mh_adapter: bool | None = Field(None, description="an adapter at each attention")
    output_adapter: bool | None = Field(None, description="an adapter at each feed-forward")
    is_parallel: bool | None = Field(
        None, description="beside: a function of what the sublayer takes, not of what it gives"
    )
    reduction_factor: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="features over those of the bottleneck"
    )
    layer_factors: dict[int, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        {}, description="reduction factors of single layers: 0=8,11=4"
    )
    non_linearity: NON_LINEARITIES | None = Field(None, description="σ; linear: none")
    scaling: str | None = Field(
        None,
        pattern=r"^(learned|channel|-?\d+(\.\d*)?(e-?\d+)?)$",
        description="s: a number, learned, or learned for each feature (channel)",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout behind up, in training")
    ln_before: bool = Field(False, description="a new layer normalization before down")
    ln_after: bool = Field(False, description="a new layer normalization behind up")
    original_ln_before: bool | None = Field(
        None, description="the sublayer's residual and normalization before the adapter"
    )
    original_ln_after: bool = Field(
        True, description="the sublayer's residual and normalization behind the adapter"
    )
    residual_before_ln: Literal["true", "false", "post_add"] = Field(
        "true",
        description="with original_ln_before, the adapter's residual: the sublayer's result; "
        "false: what the adapter reads; post_add: their sum before the normalization",
    )
    adapter_residual_before_ln: bool = Field(
        False, description="with ln_after: add the adapter's residual before it"
    )
    init: Literal["mam_adapter", "bert"] = Field(
        "mam_adapter",
        description="mam_adapter: up starts at zero, so that nothing changes; bert: both are drawn "
        "with deviation 0.02, AdapterHub's default",
    )
    leave_out: Layers | None = Field(None, description="layers without an adapter: 0-3,8")
    width: int | None = Field(
        None, gt=0, description="features of targets that no pass on sample input reaches"
    )

    @model_validator(mode="after")
    def _keeps_residual(self) -> Self:
        if self.original_ln_after:
            return self
        good = self.option("original_ln_before") and self.residual_before_ln == "false"
        if not good or self.option("is_parallel") or self.adapter_residual_before_ln:
            raise ValueError(
                "original_ln_after=False loses the model's residual, unless original_ln_before is "
                "true and residual_before_ln false"
            )
        return self

    def option(self, name: str) -> Any:
        """An option's value, or the preset's."""
        value = getattr(self, name)
        return PRESETS[self.preset][name] if value is None else value

    def declared(self) -> Effect:
        moved = self.option("original_ln_before") and self.original_ln_after
        exact = self.option("is_parallel") or not (
            (moved and self.residual_before_ln != "true")
            or (self.ln_after and self.adapter_residual_before_ln)
        )
        return Effect.IDENTITY if exact and self.init == "mam_adapter" else Effect.CHANGES

    def inject(self, site: SiteEditor) -> None:
        if self.option("is_parallel"):
            whole = self.targets != SUBLAYERS  # beside a module: a function of its own input
            read, width = (site.x, site.in_features) if whole else (site.stream, site.out_features)
            site.y = _sum(site, site.y, self.branch(site, read, width))
            return
        frame = self.frame(site)
        if self.ln_after and self.adapter_residual_before_ln:
            out = self.branch(site, frame.read, site.out_features, frame.residual())
            site.y = frame.finish(_sum(site, frame.stream, out) if frame.stream else out)
        else:
            branch = self.branch(site, frame.read, site.out_features)
            site.y = frame.finish(_sum(site, frame.rest(), branch))

    def branch(
        self, site: SiteEditor, read: fx.Node, width: int, residual: fx.Node | None = None
    ) -> fx.Node:
        """s·up(σ(down(LN(read)))), where LN, and one behind it, are options.

        Args:
            site: Where; up has the site's output features.
            read: (…, width), of any floating dtype.
            width: How many features that has.
            residual: What is added before the normalization behind up.

        Returns:
            (…, out), in fp32, or the wider dtype of the two.
        """
        rank = max(1, int(width // self.factor_at(site.site.fqn)))
        start = ("kaiming_uniform", 1.0) if self.init == "mam_adapter" else ("gaussian", 0.02)
        down = site.parameter("adapter_down.weight", (rank, width), *start)  # type: ignore[arg-type]
        h = site.type_as(read, down)
        if self.ln_before:
            h = _normalized(site, "adapter_norm_before", h, width)
        h = site.linear(h, down, site.parameter("adapter_down.bias", (rank,)))
        h = _activated(site, h, self.option("non_linearity"))
        up = ("zeros", 1.0) if self.init == "mam_adapter" else ("gaussian", 0.02)
        matrix = site.parameter("adapter_up.weight", (site.out_features, rank), *up)  # type: ignore[arg-type]
        h = site.linear(h, matrix, site.parameter("adapter_up.bias", (site.out_features,)))
        h = site.dropout("adapter_dropout", self.dropout, self.scaled(site, h))
        if residual is not None:
            h = site.add(h, residual)
        return _normalized(site, "adapter_norm_after", h, site.out_features) if self.ln_after else h

    def scaled(self, site: SiteEditor, h: fx.Node) -> fx.Node:
        """H times s."""
        scaling = self.option("scaling")
        if scaling in LEARNED:
            size = 1 if scaling == "learned" else site.out_features
            return site.mul(h, site.parameter("adapter_scaling", (size,), "full"))
        return h if float(scaling) == 1 else site.mul(h, float(scaling))

    def frame(self, site: SiteEditor) -> _Frame:
        """What a sequential adapter at this site reads, and what it stands between."""
        y = site.y
        kept = self.residual_before_ln
        if self.targets != SUBLAYERS or not self.option("original_ln_before"):
            return _Frame(y, lambda: y, lambda: y)
        if site.kind.name != "norm":
            total = site.add(y, site.stream)
            residual = y if kept == "true" else total
            rest = residual if self.original_ln_after else y  # the model adds the stream itself
            return _Frame(total, lambda: residual, lambda: rest)
        if not self.original_ln_after:
            return _Frame(y, lambda: y, lambda: y)
        if str(y.target) != "aten.layer_norm.default":
            raise PassError(
                "another adapter stands behind this normalization, and this one within it",
                where=site.site.fqn,
                fix="add the other one later",
            )
        total, norm = y.all_input_nodes[0], y.args[1:]
        residuals: dict[str, Callable[[], fx.Node]] = {
            "true": lambda: _difference(site, total), "post_add": lambda: total, "false": lambda: y,
        }  # fmt: skip

        def rest_of_norm() -> fx.Node:
            return total if kept == "true" else site.add(residuals[kept](), site.stream)

        return _Frame(
            y,
            residuals[kept],
            rest_of_norm,
            site.stream if self.ln_after and self.adapter_residual_before_ln else None,
            lambda node: site.op(y.target, node, *norm),  # type: ignore[arg-type]
        )

    def peft_config(self) -> dict[str, Any]:
        options = {key: self.option(key) for key in PRESETS[self.preset]}
        chosen = {key: getattr(self, key) for key in _OPTIONS} | options
        return {
            "peft_type": self.peft_type,
            **chosen,
            "at_sublayers": self.targets == SUBLAYERS,
            "exclude_modules": self.exclude,
            "layers_to_transform": self.layers,
            "layers_pattern": self.layers_pattern,
            "modules_to_save": self.modules_to_save,
        }

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return super().reads(config) or adapterhub.is_hub(config)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        if adapterhub.is_hub(config):
            return cls(targets=SUBLAYERS, **adapterhub.options_of(config))
        plain = {key: value for key, value in config.items() if key != "at_sublayers"}
        if config.get("at_sublayers"):
            plain["target_modules"] = SUBLAYERS
        return super().from_peft(plain)

    def from_file(
        self, program: Program, config: Mapping[str, Any], tensors: Mapping[str, Constant]
    ) -> Mapping[str, Constant]:
        if not adapterhub.is_hub(config):
            return tensors
        names = adapterhub.read_names(program, config, self.pick(program)[0], list(tensors))
        return {names.get(key, key): constant for key, constant in tensors.items()}

    def factor_at(self, fqn: str) -> float:
        """The reduction factor at one site."""
        layer = self._layer(f"{fqn}.")
        default: float = self.option("reduction_factor")
        return default if layer is None else self.layer_factors.get(layer, default)

    def opened(self, program: Program) -> Program:
        return program.rewrite(self.places(program)[0])

    def pick(self, program: Program) -> tuple[list[str], list[PeftcError]]:
        sites, errors = self.places(program)
        return [site.fqn for site in sites], errors

    def places(self, program: Program) -> tuple[list[Site], list[PeftcError]]:
        """The sites to work on, made where there are none yet, and what keeps from it."""
        beside = self.option("is_parallel")
        if self.targets != SUBLAYERS:
            names, errors = self.select(program, sorted(program.modules - {""}))
            sites, more = module_sites(program, names, self.kinds, beside, self.width)
            return sites, [*errors, *more]
        roles = {
            "attention": self.option("mh_adapter"),
            "feed_forward": self.option("output_adapter"),
        }
        normed = self.option("original_ln_before") and not beside
        wanted = [name for name, chosen in roles.items() if chosen]
        found = sublayer_sites(program, wanted, normed, self.left)
        blind = [] if self.reads_output else [site for site in found[0] if site.kind.opened]
        return found[0], found[1] + [
            PassError(
                f"is a site of kind {site.kind.name}, to which no sublayer's stream can be led",
                where=site.fqn,
                fix="use preset=houlsby, which reads this layer's result only",
            )
            for site in blind
        ]

    def left(self, program: Program, names: list[str]) -> tuple[list[str], list[PeftcError]]:
        """Those of the sublayers' names that exclude, layers and leave_out leave."""
        chosen, errors = self.model_copy(update={"targets": names}).select(program, names)
        return [f for f in chosen if self._layer(f"{f}.") not in (self.leave_out or ())], errors

    @property
    def reads_output(self) -> bool:
        """Whether all that the adapter reads is what its sublayer gives."""
        return not (self.option("is_parallel") or self.option("original_ln_before"))

    def check(self, program: Program) -> list[PeftcError]:
        errors = super().check(self.opened(program))
        normed = any(s.kind.name == "norm" for s in self.places(program)[0])
        sequential = not self.option("is_parallel")
        if self.residual_before_ln == "post_add" and sequential and not normed:
            errors.append(
                PassError(
                    "residual_before_ln=post_add needs a model that normalizes behind its "
                    "sublayers, and original_ln_before",
                    fix="use true or false",
                )
            )
        return errors

    def run(self, program: Program) -> PassResult:
        return super().run(self.opened(program))


@dataclass(frozen=True)
class _Frame:
    """Where a sequential adapter stands; what is not asked for is not built.

    Attributes:
        read: What it reads.
        residual: What it adds to its own result.
        rest: That, with all that the model adds before `finish`.
        stream: What the model adds beside the residual, where the adapter must keep them apart.
        finish: What the model makes of the sum.
    """

    read: fx.Node
    residual: Callable[[], fx.Node]
    rest: Callable[[], fx.Node]
    stream: fx.Node | None = None
    finish: Callable[[fx.Node], fx.Node] = lambda node: node


def _sum(site: SiteEditor, rest: fx.Node, branch: fx.Node) -> fx.Node:
    """Rest + branch in the wider of their dtypes, then in that of the rest."""
    return site.type_as(site.add(rest, branch), rest)


def _difference(site: SiteEditor, total: fx.Node) -> fx.Node:
    from peftc.graphs import aten

    return site.op(aten.sub.Tensor, total, site.stream)


def _normalized(site: SiteEditor, name: str, h: fx.Node, width: int) -> fx.Node:
    """A new layer normalization."""
    from peftc.graphs import aten

    weight = site.parameter(f"{name}.weight", (width,), "full")
    bias = site.parameter(f"{name}.bias", (width,))
    return site.op(aten.layer_norm.default, h, [width], weight, bias, _EPS)


def _activated(site: SiteEditor, h: fx.Node, name: str) -> fx.Node:
    """σ(h), as transformers has it under that name."""
    from peftc.graphs import aten

    if name == "linear":
        return h
    if name == "gelu_new":  # by tanh: ½h(1 + tanh(√(2/π)(h + 0.044715h³)))
        cube = site.mul(site.mul(site.mul(h, h), h), 0.044715)
        inner = site.op(aten.tanh.default, site.mul(site.add(h, cube), math.sqrt(2 / math.pi)))
        return site.add(site.mul(h, 0.5), site.mul(site.mul(h, 0.5), inner))
    operators = {
        "relu": aten.relu, "gelu": aten.gelu, "swish": aten.silu, "silu": aten.silu,
        "tanh": aten.tanh, "sigmoid": aten.sigmoid, "leakyrelu": aten.leaky_relu,
        "mish": aten.mish,
    }  # fmt: skip
    return site.op(operators[name].default, h)
