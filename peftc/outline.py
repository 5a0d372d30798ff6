"""Outlines: what a model is made of, without its weights, and remembered between runs.

Building a transformers model on the meta device is quick; importing what builds it takes seconds.
So the outline of a configuration is kept in the cache, under a key of all that it depends on.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from peftc import graphs
from peftc.checkpoint import Checkpoint, cache_folder, digest_bytes, read_json
from peftc.conversion import Conversion, conversions_of
from peftc.errors import CaptureError
from peftc.files import LARGEST, content
from peftc.kinds import LINEAR, dump, expert_kinds, kind_of
from peftc.roles import Roles, trace
from peftc.tracing import trace_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 8  # of a cached outline


class SiteOutline(BaseModel):
    """What can be a site: a module, or a parameter of fused experts.

    Attributes:
        kind: As `kinds.dump` writes it down.
        bias: Whether there is one.
        graph: As `graphs.dump` writes it down, where it is not the kind's own template.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: dict[str, Any]
    bias: bool
    graph: list[Any] | None = None


class Outline(BaseModel):
    """A model's skeleton as plain data.

    Attributes:
        modules: Every module's name.
        sites: What can be a site, by name.
        tensors: The shape of every saved tensor by its name, tied ones by each of theirs.
        aliases: For each tied tensor, the name of the one that it shares memory with.
        prefix: What a headless checkpoint's names lack.
        head: The name of the output head.
        embedding: The name of the embedding that token ids go into.
        context: How many positions there are, where the config says so.
        conversions: How transformers renames and fuses what is stored.
        roles: Which modules a forward pass calls and what for, where that can be found out.
        wide: Parts of names whose modules transformers keeps in fp32, and so never quantizes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    modules: list[str]
    sites: dict[str, SiteOutline]
    tensors: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    prefix: str
    head: str | None
    embedding: str | None = None
    context: int | None = None
    conversions: tuple[Conversion, ...] = ()
    roles: Roles | None = None
    wide: tuple[str, ...] = ()


def outline_of(module: nn.Module) -> Outline:
    """The outline of a live module, or of one on the meta device."""
    state = {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }
    modules = dict(module.named_modules(remove_duplicate=False))
    head = getattr(module, "get_output_embeddings", lambda: None)()
    prefix = getattr(module, "base_model_prefix", "")
    sites: dict[str, SiteOutline] = {}
    for fqn, found in modules.items():
        if site := _site(fqn, found):
            sites[fqn] = site
        for name, kind in expert_kinds(found).items():
            sites[f"{fqn}.{name}"] = SiteOutline(kind=dump(kind), bias=False)
    return Outline(
        modules=list(modules),
        sites=sites,
        tensors={name: tuple(tensor.shape) for name, tensor in state.items()},
        aliases=_aliases(state),
        prefix=f"{prefix}." if prefix else "",
        head=next(
            (fqn for fqn, found in modules.items() if head is not None and found is head), None
        ),
        embedding=_embedding(module, modules),
        context=_context(module),
    )


def _embedding(module: Any, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the embedding that ids go into: the encoder's, where there is one."""
    config = getattr(module, "config", None)
    try:
        owner = module.get_encoder() if getattr(config, "is_encoder_decoder", False) else module
        table = owner.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    place = next((fqn for fqn, found in modules.items() if found is owner), "")
    names = [fqn for fqn, found in modules.items() if found is table]
    return next((name for name in names if name.startswith(place)), None)


def _context(module: Any) -> int | None:
    """How many positions a model's config gives it."""
    config = getattr(module, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _site(fqn: str, module: nn.Module) -> SiteOutline | None:
    """A module as a site; a lone module has no name to address it by."""
    if not fqn:
        return None
    bias = getattr(module, "bias", None) is not None
    if kind := kind_of(module):
        return SiteOutline(kind=dump(kind), bias=bias)
    if isinstance(module, nn.Linear) and (graph := trace_linear(module)):
        return SiteOutline(kind=dump(LINEAR), bias=bias, graph=graphs.dump(graph))
    return None


def checkpoint_outline(checkpoint: Checkpoint) -> Outline:
    """The outline of a checkpoint's architecture, from the cache where it is known.

    Raises:
        CaptureError: transformers has no such architecture, or cannot build it.
    """
    config = json.dumps(checkpoint.config).encode()
    parts = [str(FORMAT), *(version(name) for name in ("torch", "transformers"))]
    key = digest_bytes("|".join(parts).encode() + config)
    path = cache_folder() / "outlines" / f"{key}.json"
    try:
        return Outline.model_validate_json(content(path, LARGEST))
    except (OSError, ValidationError):
        model = skeleton(checkpoint)
        outline = outline_of(model)
        more = {
            "conversions": tuple(conversions_of(model)),
            "roles": trace(model),
            "wide": tuple(getattr(model, "_keep_in_fp32_modules", None) or ()),
        }
        outline = outline.model_copy(update=more)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(f".{os.getpid()}")
        staged.write_text(outline.model_dump_json())
        staged.replace(path)
    except OSError:
        pass  # without a cache every run takes as long as the first
    return outline


def architecture(checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """The transformers class that config.json names; code from the checkpoint is never run.

    Raises:
        CaptureError: It names none, or one that transformers does not have.
    """
    import transformers

    _check_kernels(checkpoint)
    names = checkpoint.config.get("architectures") or []
    if not isinstance(names, list) or not names:
        raise CaptureError(
            "names no architecture",
            where=str(checkpoint.path / "config.json"),
            fix='add it, for instance "architectures": ["LlamaForCausalLM"]',
        )
    cls = getattr(transformers, str(names[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        remote = "auto_map" in checkpoint.config
        raise CaptureError(
            f"transformers {transformers.__version__} has no architecture {names[0]!r}"
            + (", and code that comes with a checkpoint is not run" if remote else ""),
            where=str(checkpoint.path / "config.json"),
            fix="capture the live model instead: peftc.capture(model)"
            if remote
            else "check the name, or upgrade transformers",
        )
    return cls


def _check_kernels(checkpoint: Checkpoint) -> None:
    """Refuses a config that has transformers fetch kernels from the hub: they are code."""

    def named(value: Any, at: str = "") -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from named(inner, at if "implementation" in at else str(key))
        elif isinstance(value, str) and "implementation" in at and not value.isidentifier():
            yield f"{at}: {value[:80]!r}"

    if found := list(named(dict(checkpoint.config))):
        raise CaptureError(
            f"names code to fetch from the hub, which is not run ({', '.join(found)})",
            where=str(checkpoint.path / "config.json"),
            fix="take it out, and choose an implementation where you load the model yourself",
        )


def config_of(checkpoint: Checkpoint) -> Any:
    """The config as transformers has it, edited where a pass edited the checkpoint's."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(
        checkpoint.path, local_files_only=True, trust_remote_code=False
    )
    if checkpoint.config != read_json(checkpoint.path / "config.json", "a checkpoint"):
        config = type(config).from_dict(copy.deepcopy(dict(checkpoint.config)))
        config._name_or_path = str(checkpoint.path)
    return config


def skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model that a checkpoint's config describes, on the meta device.

    Raises:
        CaptureError: transformers has no such architecture, or cannot build it.
    """
    cls = architecture(checkpoint)
    try:
        config = config_of(checkpoint)
        with torch.device("meta"):
            model: PreTrainedModel = cls(config)
            return model
    except Exception as error:  # any library code may fail on a config from outside
        raise CaptureError(
            f"transformers cannot build {cls.__name__} from it: {error}",
            where=str(checkpoint.path / "config.json"),
            fix="check the config, or upgrade transformers",
        ) from error


def _aliases(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    owners: dict[int, str] = {}
    aliases = {}
    for name, tensor in state.items():
        if (owner := owners.setdefault(id(tensor), name)) != name:
            aliases[name] = owner
    return aliases
