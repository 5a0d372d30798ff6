"""Families of architectures, chosen for how they are built: tiny random models of each."""

from __future__ import annotations

from .decoders import DECODERS
from .encoders import ENCODERS, ENCODERS_DECODERS
from .experts import MIXTURES
from .recurrent import RECURRENT
from .senses import MODULES, SEVERAL, SPEECH, VISION
from .specimen import Specimen

KINDS: dict[str, tuple[Specimen, ...]] = {
    "Decoders": DECODERS,
    "Encoders": ENCODERS,
    "Encoders with decoders": ENCODERS_DECODERS,
    "Mixtures of experts": MIXTURES,
    "State spaces and recurrences": RECURRENT,
    "Vision": VISION,
    "Speech": SPEECH,
    "Several of them at once": SEVERAL,
    "Plain modules, none of transformers'": MODULES,
}
SPECIMENS: dict[str, Specimen] = {s.name: s for kind in KINDS.values() for s in kind}
# Of transformers', those on which tests of one thing run too, beside the table of all.
COMMON: dict[str, Specimen] = {
    name: SPECIMENS[name]
    for name in (
        "llama", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "opt", "bloom", "falcon", "bert",
        "roberta", "t5", "bart", "vit", "clip", "whisper", "qwen2_5_vl", "mixtral", "qwen3_moe",
        "mamba",
    )
}  # fmt: skip
