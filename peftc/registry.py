"""The registered passes: one line each, imported when they are used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from peftc.errors import AdapterError, PassError, did_you_mean

if TYPE_CHECKING:
    from peftc.contract import Method, Pass

PASSES = {
    "lora": "peftc.passes.lora:Lora",
    "dora": "peftc.passes.dora:Dora",
    "adalora": "peftc.passes.adalora:AdaLora",
    "vera": "peftc.passes.vera:Vera",
    "loha": "peftc.passes.loha:Loha",
    "lokr": "peftc.passes.lokr:Lokr",
    "oft": "peftc.passes.oft:Oft",
    "boft": "peftc.passes.boft:Boft",
    "ia3": "peftc.passes.ia3:Ia3",
    "bottleneck": "peftc.passes.bottleneck:Bottleneck",
    "bitfit": "peftc.passes.bitfit:BitFit",
    "layernorm": "peftc.passes.layernorm:LayerNorm",
    "full": "peftc.passes.full:Full",
    "prefix_tuning": "peftc.passes.prefix_tuning:PrefixTuning",
    "trainable_tokens": "peftc.passes.tokens:TrainableTokens",
    "prompt_tuning": "peftc.passes.prompt_tuning:PromptTuning",
    "p_tuning": "peftc.passes.p_tuning:PTuning",
    "router": "peftc.passes.router:Router",
    "nf4": "peftc.passes.nf4:Nf4",
    "dequantize": "peftc.passes.dequantize:Dequantize",
    "fuse": "peftc.passes.fuse:Fuse",
    "attach": "peftc.passes.attach:Attach",
    "combine": "peftc.passes.combine:Combine",
    "prune_ranks": "peftc.passes.prune_ranks:PruneRanks",
    "fold": "peftc.passes.fold:Fold",
    "merge": "peftc.passes.merge:Merge",
    "unmerge": "peftc.passes.unmerge:Unmerge",
    "untie": "peftc.passes.untie:Untie",
    "resize_vocabulary": "peftc.passes.resize_vocabulary:ResizeVocabulary",
    "replicate_layers": "peftc.passes.replicate_layers:ReplicateLayers",
}


def load(name: str) -> type[Pass]:
    """The class of a registered pass.

    Raises:
        PassError: There is no such pass.
    """
    if name not in PASSES:
        raise PassError(
            f"there is no pass {name!r}", where="peftc passes", fix=did_you_mean(name, PASSES)
        )
    module, _, attribute = PASSES[name].partition(":")
    found: type[Pass] = getattr(import_module(module), attribute)
    return found


def name_of(cls: type[Pass]) -> str:
    """The name under which a pass is registered; an unregistered one has its class's."""
    path = f"{cls.__module__}:{cls.__name__}"
    return next((name for name, entry in PASSES.items() if entry == path), cls.__name__.lower())


def method_for(config: Mapping[str, Any]) -> type[Method]:
    """The method that reads an adapter_config.json.

    Raises:
        AdapterError: None does.
    """
    from peftc.contract import Method

    methods = [cls for cls in map(load, PASSES) if issubclass(cls, Method)]
    for cls in methods:
        if cls.reads(config):
            return cls
    types = {name for cls in methods for name in (cls.peft_type, *cls.peft_kin) if name}
    known = ", ".join(sorted(types))
    raise AdapterError(
        f"adapters of type {config.get('peft_type')} cannot be attached", fix=f"there are: {known}"
    )
