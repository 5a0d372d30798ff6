"""PEFT adapters of every method that change what a tiny random model (`tests.families`) computes.

The raw material of a parity table, each PEFT method on each architecture: `adapter(method,
specimen)` gives what PEFT makes of it, `save` writes it. Where PEFT itself cannot, `UNSUPPORTED`
says why; where PEFT's own merge computes something else than its adapter, `PEFT_MERGE_WRONG`.

`python -m tests.zoo` tries everything, prints the table, and fails if it is not as recorded here.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from .families import SPECIMENS as SPECIMENS
from .families.specimen import Specimen as Specimen

TOKENS = [5, 7, 11]  # which the trainable tokens' methods train


def config(cls: str, targets: tuple[str | None, ...], **options: Any) -> Any:
    return getattr(peft, cls)(target_modules=list(targets), **options)


lora = partial(config, "LoraConfig", r=4, lora_alpha=6)
ia3 = partial(config, "IA3Config")
ADALORA = {"init_r": 6, "target_r": 4, "lora_alpha": 8, "total_step": 10}
RECIPES: dict[str, Callable[[Specimen], Any]] = {
    "lora": lambda s: lora(s.linears),
    "rslora": lambda s: lora(s.linears, use_rslora=True),
    "dora": lambda s: lora(s.linears, use_dora=True),
    "lora bias=all": lambda s: lora(s.linears, bias="all"),
    "lora_bias": lambda s: lora(s.linears, lora_bias=True),
    "lora on embedding": lambda s: lora((s.embedding,)),
    "dora on embedding": lambda s: lora((s.embedding,), use_dora=True),
    "lora on convolution": lambda s: lora((s.convolution,)),
    "dora on convolution": lambda s: lora((s.convolution,), use_dora=True),
    "pissa": lambda s: lora(s.linears, init_lora_weights="pissa"),
    "olora": lambda s: lora(s.linears, init_lora_weights="olora"),
    "vera": lambda s: config("VeraConfig", s.linears, r=8),
    "loha": lambda s: config("LoHaConfig", s.linears, r=4, alpha=6),
    "lokr": lambda s: config("LoKrConfig", s.linears, r=4, alpha=6),
    "loha on convolution": lambda s: config("LoHaConfig", (s.convolution,), r=4, alpha=6),
    "lokr on convolution": lambda s: config("LoKrConfig", (s.convolution,), r=4, alpha=6),
    "ia3": lambda s: ia3(s.keys_values + s.feedforward, feedforward_modules=list(s.feedforward)),
    "adalora": lambda s: config("AdaLoraConfig", s.linears, **ADALORA),
    "oft": lambda s: config("OFTConfig", s.linears, oft_block_size=4),
    "boft": lambda s: config("BOFTConfig", s.linears, boft_block_size=4, boft_n_butterfly_factor=2),
    "lora + tokens": lambda s: lora(s.linears, trainable_token_indices={s.tokens: TOKENS}),
    "tokens": lambda s: config("TrainableTokensConfig", (s.tokens,), token_indices=TOKENS),
    "modules_to_save": lambda s: lora(s.linears, modules_to_save=list(s.saved)),
    "layernorm": lambda s: config("LNTuningConfig", s.norms),
    "experts": lambda s: lora(s.linears, target_parameters=list(s.experts)),
    "layer replication": lambda s: lora(s.linears, layer_replication=[(0, 2), (1, 2)]),
}
# What a specimen must have for a method with that word in its name.
NEEDS = ("embedding", "tokens", "convolution", "experts", "replication")


def per_pair(*rows: tuple[str, str, str]) -> dict[tuple[str, str], str]:
    """By method and specimen, from rows of `methods, specimens, text`."""
    return {(m, s): text for ms, ss, text in rows for m in ms.split(", ") for s in ss.split()}


LOW_RANK, PRODUCTS = (f"{a} on convolution, {b} on convolution"
                      for a, b in (("lora", "dora"), ("loha", "lokr")))  # fmt: skip
CONVOLUTION = f"{LOW_RANK}, {PRODUCTS}"


# By method and specimen, why there is no adapter: it lacks what the method applies to, or PEFT's
# own adapter cannot be made, or does not survive PEFT's own saving and loading.
UNSUPPORTED: dict[tuple[str, str], str] = {
    (method, s.name): f"has no {need}"
    for method in RECIPES
    for need in NEEDS
    for s in SPECIMENS.values()
    if need in method and not getattr(s, need)
} | per_pair(
    (CONVOLUTION, "whisper qwen2_audio",
     "the encoder reads conv1.stride, which PEFT's wrapper has not"),
    (LOW_RANK, "mamba mamba2 falcon_h1", "PEFT refuses conv1d of Mamba models"),
    (LOW_RANK, "jamba qwen3_next recurrent_gemma",
     "PEFT refuses a convolution of more groups than ranks"),
    (PRODUCTS, "mamba mamba2 jamba falcon_h1 qwen3_next",
     "the adapter is dead: the model reads the convolution's weight and never calls the layer"),
    (PRODUCTS, "qwen2_5_vl", "PEFT has it not for Conv3d"),
    ("loha, lokr, oft, boft", "gpt2", "PEFT has it not for Conv1D"),
    ("olora", "gpt2", "PEFT does not transpose Conv1D's weight"),
    ("oft", "convnext deepseek_v3", "PEFT takes whatever has four dimensions for a picture"),
    ("layer replication", "gpt2 opt bloom falcon mamba gpt_bigcode gpt_neox mpt mamba2 rwkv",
     "PEFT finds layers only at model.layers and, without a head, at h"),
    ("layer replication", "qwen2 qwen3 gemma3 gpt_oss qwen3_next",
     "PEFT does not lengthen config.layer_types, which the forward indexes"),
)  # fmt: skip

# By method and specimen, what is wrong with PEFT's merge_and_unload.
PEFT_MERGE_WRONG: dict[tuple[str, str], str] = per_pair(
    ("lora_bias", "llama qwen2 qwen3 gemma phi3 falcon t5 clip whisper qwen2_5_vl mixtral qwen3_moe"
     " mamba plain grouped gemma3 cohere olmo2 mpt modernbert switch"
     " mamba2 jamba falcon_h1 recurrent_gemma rwkv swin conformer llava paligemma qwen2_audio"
     " deepseek_v3 qwen3_next", "raises: a layer without a bias gets none"),
    ("lora on embedding, dora on embedding",
     "gemma gpt2 opt bloom falcon roberta t5 bart whisper mamba gemma3 cohere gpt_bigcode mpt"
     " albert modernbert m2m_100 switch recurrent_gemma blip paligemma",
     "the tied head, which has no adapter, changes with the embedding"),
    ("tokens, lora + tokens", "roberta albert modernbert blip",
     "unmerged is wrong, merged right: the forward of a tied head leaves its bias out"),
    ("lora on convolution, dora on convolution", "grouped", "raises: groups > 1"),
    ("layer replication", "llama gemma phi3 mixtral qwen3_moe cohere olmo2 deepseek_v3"
     " jamba falcon_h1 recurrent_gemma",
     "all copies' updates are added to the one weight that they share"),
)  # fmt: skip


def configure(method: str, specimen: Specimen) -> Any:
    return None if (method, specimen.name) in UNSUPPORTED else RECIPES[method](specimen)


METHODS: dict[str, Callable[[Specimen], Any]] = {m: partial(configure, m) for m in RECIPES}
INITIAL = ("pissa", "olora")  # which change the base, and are saved as plain LoRA


def untrained(method: str, specimen: Specimen) -> Any:
    """The adapter as PEFT initializes it, the same at every call."""
    options = METHODS[method](specimen)
    if options is None:
        raise ValueError(f"{method} on {specimen.name}: {UNSUPPORTED[method, specimen.name]}")
    model = specimen.build()
    torch.manual_seed(1)
    return peft.get_peft_model(model, options).eval()


def adapter(method: str, specimen: Specimen) -> Any:
    """A PEFT model with every trained tensor random, which computes something else than its base.

    Noise is added in proportion and absolutely, so what starts at 0 moves and what scales is kept
    near 1. AdaLoRA's triplets start near 0 three times over, so its E gets more of it.
    """
    model = shaken(untrained(method, specimen))
    moved = distance(run(model, specimen), plain(specimen))
    assert moved > 1e-3, f"{method} on {specimen.name} moves the output by only {moved:.1e}"
    return model


def shaken(model: Any) -> Any:
    """The model with noise on what it trains."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1 + 0.2 * torch.randn_like(parameter))
            parameter.data.add_(torch.randn_like(parameter), alpha=1 if "lora_E" in name else 0.1)
    return model


def save(model: Any, method: str, specimen: Specimen, path: Path) -> None:
    """Writes the adapter as PEFT does, at `path`; PiSSA and OLoRA as plain LoRA.

    PEFT changes the model's config while it converts those two, which then serve for nothing.
    """
    initial = None
    if method in INITIAL:
        initial = path.with_name(f"{path.name}-initial")
        start = untrained(method, specimen)
        start.peft_config["default"].init_lora_weights = True  # or loading would change the base
        uncarded(start).save_pretrained(initial)
    uncarded(model).save_pretrained(path, path_initial_model_for_weight_conversion=initial)


def uncarded(model: Any) -> Any:
    """The model, which writes no README beside its adapter: that takes as long as all else."""
    model.create_or_update_model_card = lambda folder: None
    return model


@cache
def plain(specimen: Specimen) -> Tensor:
    """The output of the model without any adapter."""
    return run(specimen.build(), specimen)  # the one that is copied must never have run


def run(model: Any, specimen: Specimen) -> Tensor:
    with torch.no_grad():
        return specimen.output(model(**specimen.inputs()))


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference over the largest absolute value of the second."""
    if a.shape != b.shape or not a.isfinite().all():
        return float("inf")
    return float((a - b).abs().max() / b.abs().max())


def attempt(job: Callable[[], float], most: float) -> tuple[float, str]:
    """A job's error, and what is wrong with it, or nothing."""
    try:
        error = job()
        return error, "" if error <= most else f"relative error {error:.1e}"
    except Exception as raised:
        return float("nan"), f"{type(raised).__name__}: {str(raised).partition(chr(10))[0][:150]}"


def trial(method: str, specimen: Specimen) -> tuple[str, str, str]:
    """What the table says; then what fails in the round trip, and what in the merge."""

    def round_trip() -> float:
        model = adapter(method, specimen)
        want = run(model, specimen)
        with tempfile.TemporaryDirectory() as folder:
            save(model, method, specimen, Path(folder, "adapter"))
            again = peft.PeftModel.from_pretrained(specimen.build(), Path(folder, "adapter"))
            return distance(run(again.eval(), specimen), want)

    def merge() -> float:
        model = adapter(method, specimen)
        want = run(model, specimen)
        return distance(run(model.merge_and_unload().eval(), specimen), want)

    _, lost = attempt(round_trip, 1e-5 if method in INITIAL else 2e-6)
    if lost:
        return "trip", lost, ""
    error, wrong = attempt(merge, 1e-4)
    return ("raises" if error != error else f"{'!' if wrong else ''}{error:.0e}"), "", wrong


def main() -> int:
    """Prints the table, and says what is not as recorded."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    chosen = [SPECIMENS[name] for name in sys.argv[1:] or SPECIMENS]
    surprises = []
    print(" " * 20, *(f"{s.name[:7]:>7}" for s in chosen))
    for method in METHODS:
        row = []
        for s in chosen:
            reason = UNSUPPORTED.pop((method, s.name), "")  # what PEFT cannot is tried too
            if reason.startswith("has no"):
                row.append("-")
                continue
            cell, lost, wrong = trial(method, s)
            row.append(cell)
            known = (method, s.name) in PEFT_MERGE_WRONG
            if bool(lost) != bool(reason) or bool(wrong) != known:
                surprises.append(f"{method} on {s.name}: {lost or wrong or 'is right'}")
        print(f"{method:20}", *(f"{cell:>7}" for cell in row), flush=True)
    print(*surprises, sep="\n")
    return len(surprises) > 0


if __name__ == "__main__":
    sys.exit(main())
