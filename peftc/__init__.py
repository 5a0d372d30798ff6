"""peftc: a compiler for parameter-efficient fine-tuning.

Everything here is imported when it is used, so that `peftc --help` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc.analysis import SiteAnalysis, analyse
    from peftc.api import apply, export, load, verify
    from peftc.artifact import Artifact
    from peftc.callbacks import callback
    from peftc.capturing import capture
    from peftc.constant_cache import ConstantCache
    from peftc.contract import Effect, Method, Pass, PassResult
    from peftc.errors import PeftcError
    from peftc.evaluation import Scores, score
    from peftc.exporters.to_adapterhub import to_adapterhub
    from peftc.exporters.to_cache import to_cache
    from peftc.exporters.to_inductor import to_pt2
    from peftc.exporters.to_onnx import to_onnx
    from peftc.exporters.to_onnx_adapter import to_onnx_adapter
    from peftc.exporters.to_peft import to_peft
    from peftc.exporters.to_safetensors import to_safetensors
    from peftc.live import absorb, materialize
    from peftc.mixing import together
    from peftc.parts import export_part, finish
    from peftc.passes.attach import Attach
    from peftc.passes.combine import Combine
    from peftc.passes.fold import Fold
    from peftc.passes.lora import Lora
    from peftc.passes.merge import Merge
    from peftc.passes.starts import restore_base
    from peftc.passes.unmerge import Unmerge
    from peftc.pipeline import Pipeline
    from peftc.program import Program
    from peftc.ranks_view import plot_ranks
    from peftc.rates import optimizer_groups
    from peftc.recipe import Recipe
    from peftc.rehearsal import dry_run
    from peftc.schedules import schedule
    from peftc.switching import Adapters
    from peftc.training import tune
    from peftc.tuning import Evaluation, Tuning
    from peftc.warm import load_compile_cache, save_compile_cache

_HOMES = {
    "analysis": ("SiteAnalysis", "analyse"),
    "api": ("apply", "export", "load", "verify"),
    "artifact": ("Artifact",),
    "callbacks": ("callback",),
    "capturing": ("capture",),
    "constant_cache": ("ConstantCache",),
    "contract": ("Effect", "Method", "Pass", "PassResult"),
    "errors": ("PeftcError",),
    "evaluation": ("Scores", "score"),
    "exporters.to_adapterhub": ("to_adapterhub",),
    "exporters.to_cache": ("to_cache",),
    "exporters.to_inductor": ("to_pt2",),
    "exporters.to_onnx": ("to_onnx",),
    "exporters.to_onnx_adapter": ("to_onnx_adapter",),
    "exporters.to_peft": ("to_peft",),
    "exporters.to_safetensors": ("to_safetensors",),
    "live": ("absorb", "materialize"),
    "mixing": ("together",),
    "parts": ("export_part", "finish"),
    "passes.attach": ("Attach",),
    "passes.combine": ("Combine",),
    "passes.fold": ("Fold",),
    "passes.lora": ("Lora",),
    "passes.merge": ("Merge",),
    "passes.starts": ("restore_base",),
    "passes.unmerge": ("Unmerge",),
    "pipeline": ("Pipeline",),
    "program": ("Program",),
    "ranks_view": ("plot_ranks",),
    "rates": ("optimizer_groups",),
    "recipe": ("Recipe",),
    "rehearsal": ("dry_run",),
    "schedules": ("schedule",),
    "switching": ("Adapters",),
    "training": ("tune",),
    "tuning": ("Evaluation", "Tuning"),
    "warm": ("load_compile_cache", "save_compile_cache"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "Adapters", "Artifact", "Attach", "Combine", "ConstantCache", "Effect", "Evaluation", "Fold",
    "Lora", "Merge", "Method", "Pass", "PassResult", "PeftcError", "Pipeline", "Program", "Recipe",
    "Scores", "SiteAnalysis", "Tuning", "Unmerge", "absorb", "analyse", "apply", "callback",
    "capture", "dry_run", "export", "export_part", "finish", "load", "load_compile_cache",
    "materialize", "optimizer_groups", "plot_ranks", "restore_base", "save_compile_cache",
    "schedule", "score", "to_adapterhub", "to_cache", "to_onnx", "to_onnx_adapter", "to_peft",
    "to_pt2", "to_safetensors", "together", "tune", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Everything that is exported, and the class of every registered pass."""
    home = _HOME.get(name) or _pass_home(name)
    if home is None:
        raise AttributeError(f"module 'peftc' has no attribute {name!r}")
    found = getattr(import_module(f"peftc.{home}"), name)
    globals()[name] = found  # `capture` and others would else be shadowed by their modules
    return found


def _pass_home(name: str) -> str | None:
    passes = import_module("peftc.registry").PASSES
    entries = (entry.removeprefix("peftc.").split(":") for entry in passes.values())
    return next((home for home, found in entries if found == name), None)
