"""AdapterHub's directories of bottleneck adapters, as its library `adapters` 1.3.0 has them.

`adapter_config.json` holds the options under `config`; `adapter.safetensors` holds, for each
sublayer, `PREFIX.adapters.NAME.adapter_down.0.weight` and its kin. PREFIX is the module that gives
the sublayer's result and normalizes it, where there is one (BERT), else the layer's
`attention_adapters` or `output_adapters` (GPT-2, Llama).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from peftc.checkpoint import PEFT_PREFIX
from peftc.errors import AdapterError

if TYPE_CHECKING:
    from peftc.program import Program

WEIGHTS, PICKLED = "adapter.safetensors", "pytorch_adapter.bin"
VERSION = "adapters.1.3.0"  # of the library whose format this is
CONVERT = (
    "if you trust it, convert it there: python -c \"import torch, safetensors.torch as s; "
    "s.save_file({k: v.clone() for k, v in torch.load('pytorch_adapter.bin', weights_only=True)"
    ".items()}, 'adapter.safetensors')\""
)  # fmt: skip

# Options that mean the same here and there.
_SAME = (
    "mh_adapter", "output_adapter", "is_parallel", "non_linearity", "dropout", "ln_before",
    "ln_after", "original_ln_before", "original_ln_after", "adapter_residual_before_ln",
)  # fmt: skip
# What peftc does not have, and the values that ask for none of it.
_ABSENT: Mapping[str, Any] = {
    "cross_adapter": False, "inv_adapter": None, "phm_layer": False, "stochastic_depth": 0.0,
    "use_gating": False,
}  # fmt: skip
_MODULES = {"attention": "attention_adapters", "feed_forward": "output_adapters"}


def is_hub(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is AdapterHub's."""
    return "peft_type" not in config and isinstance(config.get("config"), dict)


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `Bottleneck` that AdapterHub's adapter_config.json describes.

    Raises:
        AdapterError: It describes another method, or asks for what peftc does not have.
    """
    given = config["config"]
    if method := given.get("architecture"):
        raise AdapterError(
            f"is an adapter of AdapterHub's method {method!r}; bottlenecks only are read",
            fix="save it with PEFT, if PEFT has the method",
        )
    if lacks := [k for k, none in _ABSENT.items() if given.get(k, none) not in (none, None)]:
        raise AdapterError(
            f"uses {', '.join(lacks)}, which peftc does not have", fix="train it without"
        )
    options = {key: given[key] for key in _SAME if key in given}
    factor = given.get("reduction_factor", 16)
    if isinstance(factor, dict):
        layers = {key: value for key, value in factor.items() if key != "default"}
        options["layer_factors"] = layers
        factor = factor.get("default", 16)
    if given.get("leave_out"):
        options["leave_out"] = given["leave_out"]
    residual = given.get("residual_before_ln", True)
    return {
        **options,
        "reduction_factor": factor,
        "scaling": str(given.get("scaling", 1.0)),
        "non_linearity": str(given.get("non_linearity", "relu")).lower(),
        "residual_before_ln": str(residual).lower(),
        "init": "mam_adapter" if given.get("init_weights") == "mam_adapter" else "bert",
    }


def config_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """AdapterHub's `config` of a bottleneck's options, all of them given."""
    factor: Any = options["reduction_factor"]
    if layers := options["layer_factors"]:
        factor = {**{str(layer): value for layer, value in layers.items()}, "default": factor}
    scaling = options["scaling"]
    residual = options["residual_before_ln"]
    return {
        **{key: options[key] for key in _SAME},
        **_ABSENT,
        "reduction_factor": factor,
        "scaling": scaling if scaling in ("learned", "channel") else float(scaling),
        "residual_before_ln": residual if residual == "post_add" else residual == "true",
        "leave_out": list(options["leave_out"] or ()),
        "init_weights": options["init"],
    }


def prefixes(program: Program) -> dict[str, str]:
    """For each module that may have a sublayer's adapter, AdapterHub's name of its place."""
    roles = program.source.roles()
    found: dict[str, str] = {}
    for sublayer in roles.sublayers if roles else ():
        owner = sublayer.exit.rpartition(".")[0]
        layer = re.match(r"(?:.*\.)?\d+(?=\.)", sublayer.exit)
        prefix = f"{layer[0] if layer else owner}.{_MODULES[sublayer.role]}"
        if sublayer.norm and sublayer.norm.rpartition(".")[0] == owner and layer:
            prefix = prefix if owner == layer[0] else owner
        found |= {fqn: prefix for fqn in (sublayer.exit, sublayer.norm) if fqn}
    return found


def read_names(
    program: Program, config: Mapping[str, Any], sites: Iterable[str], keys: Iterable[str]
) -> dict[str, str]:
    """For each of AdapterHub's tensors, its name as PEFT would have it; strays keep theirs."""
    known = prefixes(program)
    places = {known[fqn]: fqn for fqn in sites if fqn in known}
    normed = config["config"].get("ln_before")
    names = {}
    for key in keys:
        prefix, _, rest = key.partition(f".adapters.{config.get('name')}.")
        site = next((fqn for place, fqn in places.items() if _same_place(place, prefix)), None)
        if site is not None and rest:
            names[key] = f"{PEFT_PREFIX}{site}.{_local(rest, bool(normed))}"
    return names


def written_names(
    program: Program, name: str, local: Mapping[str, tuple[str, str]], normed: bool
) -> dict[str, str]:
    """AdapterHub's names of tensors, each with the one that it is to be taken from.

    Args:
        program: Has the adapter.
        name: The adapter's.
        local: For each tensor, its site and its name there, as in PEFT's files.
        normed: Whether a new normalization stands before `down`.
    """
    known = prefixes(program)
    names = {}
    for key, (site, rest) in local.items():
        head = f"{known[site]}.adapters.{name}."
        first, _, leaf = rest.rpartition(".")
        if first == "adapter_down":
            names[f"{head}adapter_down.{int(normed)}.{leaf}"] = key
        elif rest == "adapter_scaling":
            names[f"{head}scaling"] = key
        else:
            names[head + rest] = key
        if first == "adapter_norm_before":  # the library has this module under two names
            names[f"{head}adapter_down.0.{leaf}"] = key
    return names


def _local(rest: str, normed: bool) -> str:
    first, _, leaf = rest.rpartition(".")
    if first == "adapter_down.0" and normed:
        return f"adapter_norm_before.{leaf}"
    if first in ("adapter_down.0", "adapter_down.1"):
        return f"adapter_down.{leaf}"
    return "adapter_scaling" if rest == "scaling" else rest


def _same_place(place: str, prefix: str) -> bool:
    """Whether two names are the same but for the base model's own name in front of one."""
    short, long = sorted((place, prefix), key=len)
    return short == long or (long.endswith(f".{short}") and "." not in long[: -len(short) - 1])
