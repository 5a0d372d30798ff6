"""Training what was applied: from a checkpoint and a data file to what `apply` writes, trained.

transformers' Trainer does the steps, on accelerate; the rest is here: what it is given, how it goes
on after a kill, and how what it trained is published.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerState, TrainingArguments

from peftc.api import load, write_applied
from peftc.artifact import Artifact, obstacles
from peftc.callbacks import callback
from peftc.checkpoint import intruders
from peftc.contract import Pass
from peftc.curve import draw
from peftc.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    PeftcError,
    TrainingError,
    raise_all,
)
from peftc.examples import read_examples
from peftc.exporters.to_safetensors import folders
from peftc.extras import lacking
from peftc.link import plan
from peftc.live import absorb, materialize
from peftc.memory import peak, reset_peak
from peftc.pipeline import Pipeline
from peftc.program import Program
from peftc.progress import SILENT, Progress
from peftc.runs import METRICS, SETTINGS, Run, best_of, step_of, working
from peftc.scoring import perplexity
from peftc.sources import limit_of, pad_of, tokenizer_of
from peftc.token_rows import Rows, check_packing, collate, token_rows
from peftc.tuner import Tuner, Watch
from peftc.tuning import ON_GPU, OPTIMIZERS, Tuning

FIGURES = "training/"  # in the artifact
# What the same training measures otherwise each time, and its artifact therefore does not hold.
MEASURED = (
    "seconds", "tokens_per_second", "seconds_per_step", "peak_memory", "went_on_at_step",
)  # fmt: skip


def tune(
    source: str | Path,
    tuning: Tuning,
    target: str | Path,
    passes: Sequence[Pass] = (),
    *,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = SILENT,
) -> Artifact:
    """Trains adapters, and publishes them as `apply` does, with the training's figures.

    A training that was killed, or stopped by an interrupt, goes on when this is called again with
    the same arguments: until it is published, its checkpoints lie beside the target. In a launched
    process group (`accelerate launch -m peftc tune …`) every process calls this.

    Args:
        source: What `apply` wrote, or any other source that `load` takes.
        tuning: The data and the settings.
        target: A directory that does not exist.
        passes: Run on the source first, such as `Lora(rank=8)`.
        overwrite: Replace an artifact that peftc wrote.
        restart: Throw away what an unfinished run left.
        progress: Told of every pass and step.

    Returns:
        The artifact; its manifest's `training` has the settings and figures, and here, not on the
        disk, also what this run took: time, memory, and the step that it went on at.

    Raises:
        DataError: The examples cannot be read, or cannot be learned from.
        TrainingError: The settings do not go with this machine or model, or the training broke off.
        Interrupted: It was asked to stop; its last step is saved.
        PeftcError: The source cannot be read, a pass cannot run, or the target cannot be written.
    """
    target = Path(target)
    raise_all(_obstacles(tuning))
    program = Pipeline(passes).run(load(source, progress), progress)
    raise_all(_untrainable(program, source))
    sizes = [program.constants[fqn].spec.nbytes for fqn in program.trainable]
    # The adapter, and in each checkpoint that and AdamW's two moments.
    need = sum(sizes) * (1 + 3 * (tuning.keep + 1))
    need += sum(shard.size for shard in plan(program)) if program.rewritten else 0
    first = os.environ.get("RANK", "0") == "0"
    if first:
        raise_all(obstacles(target, need, folders(program), overwrite))
    tokenizer = tokenizer_of(program)
    progress.stage("read the examples")
    rows, held = _data(tuning, program, tokenizer)
    what = {
        "settings": tuning.model_dump(exclude={"data", "eval_data"}),
        "model": program.fingerprint,
        "data": [rows.digest, held.digest if held else None],
    }
    job = _Job(program, tuning, rows, held, *_batches(tuning, len(rows)), pad_of(tokenizer))
    with working(target, claim=first) as run:
        if first:
            run.begin(what, restart)
        progress.stage("load the model")
        dtype = None if tuning.dtype == "auto" else getattr(torch, tuning.dtype)
        figures, state = _train(job, materialize(program, dtype=dtype), run, progress)
        if not first:
            return Artifact(target, {"training": figures})
        progress.stage("publish")
        lines = [{k: v for k, v in line.items() if k not in MEASURED} for line in run.metrics]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        files = {FIGURES + METRICS: text.encode()}
        if tuning.plot:
            files[FIGURES + "loss.png"] = draw(run.metrics)
        artifact = write_applied(
            absorb(program, state), target, files=files, overwrite=overwrite, progress=progress,
            remarks={
                "training": {
                    "settings": tuning.model_dump(),
                    **{name: value for name, value in figures.items() if name not in MEASURED},
                }
            },
        )  # fmt: skip
        (run.root / SETTINGS).unlink()  # `working` removes what is not in use
    said = {**artifact.manifest["training"], **figures}
    return Artifact(artifact.path, {**artifact.manifest, "training": said})


@dataclass(frozen=True)
class _Job:
    """What is trained, on what, and how.

    Attributes:
        rows: What is learned from.
        held: What is evaluated on.
        micro: Rows at once on one device.
        accumulated: How often gradients are accumulated.
        pad: The id of the padding.
    """

    program: Program
    tuning: Tuning
    rows: Rows
    held: Rows | None
    micro: int
    accumulated: int
    pad: int

    @property
    def steps(self) -> int:
        """All steps of the optimizer."""
        per_epoch = len(self.rows) // self.tuning.batch_size
        return self.tuning.steps or max(1, round(self.tuning.epochs * per_epoch))


def _data(tuning: Tuning, program: Program, tokenizer: Any) -> tuple[Rows, Rows | None]:
    """What is learned from, and what is held out."""
    limit = limit_of(program, tokenizer)

    def read(source: str) -> Rows:
        data = tuning.model_copy(update={"data": source})
        return token_rows(read_examples(data, source, tokenizer), data, tokenizer, limit)

    rows, held = read(tuning.data), None
    if tuning.eval_data:
        held = read(tuning.eval_data)
    elif tuning.eval_share:
        if len(rows) < 2:
            raise DataError(
                "holds one example, of which no share can be held out", where=tuning.data,
                fix="leave --eval-share out, or give --eval-data",
            )  # fmt: skip
        rows, held = rows.split(tuning.eval_share, tuning.seed)
    return (rows.pack(min(limit, tuning.max_length or limit)) if tuning.pack else rows), held


def _obstacles(tuning: Tuning) -> list[PeftcError]:
    """What of the settings does not go with this machine."""
    errors = lacking("peftc tune", "train", "accelerate", "datasets")
    if tuning.plot:
        errors += lacking("the loss curve (--no-plot goes without)", "train", "matplotlib")
    gpu = tuning.device != "cpu" and torch.cuda.is_available()
    if tuning.optimizer in ON_GPU:
        if gpu:
            errors += lacking(f"--optimizer {tuning.optimizer}", "train", "bitsandbytes")
        else:
            errors.append(
                TrainingError(
                    "is bitsandbytes', whose states live on a GPU, and there is none",
                    where=f"--optimizer {tuning.optimizer}",
                    fix=f"--optimizer {ON_GPU[tuning.optimizer]}",
                )
            )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true") and not gpu:
        errors.append(
            TrainingError(
                "is done by accelerate on GPUs alone; on CPUs it would be left out in silence",
                where="--use_fsdp", fix="launch with --multi_gpu, which on CPUs uses gloo",
            )
        )  # fmt: skip
    if tuning.precision == "fp16" and not gpu:
        errors.append(
            TrainingError(
                "mixed precision in fp16 needs a GPU", where="--precision fp16",
                fix="--precision bf16",
            )
        )  # fmt: skip
    return errors


def _untrainable(program: Program, source: str | Path) -> list[PeftcError]:
    """Why there is nothing that this loop could train."""
    if not program.trainable:
        return [
            TrainingError(
                "carries no adapter, so that nothing is trained", where=str(source),
                fix=f"add a method: peftc tune {source} --data FILE -o OUT lora --rank 8",
            )
        ]  # fmt: skip
    names = program.source.architectures
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return [
            TrainingError(
                f"is a {', '.join(names) or 'model'}, and peftc tune trains causal language models",
                where=str(source),
                fix="materialize it, and train it in a loop of your own: "
                "examples/03_train_in_your_own_loop.py",
            )
        ]
    return []


def _batches(tuning: Tuning, rows: int) -> tuple[int, int]:
    """Rows at once on a device, and how often gradients are accumulated."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = tuning.micro_batch or tuning.batch_size // world
    if not micro or tuning.batch_size % (micro * world):
        raise TrainingError(
            f"{tuning.batch_size} rows of a step are no multiple of {micro or 1} rows on each of "
            f"{world} processes",
            where="--batch-size",
            fix=f"a multiple of {(micro or 1) * world}",
        )
    if rows < tuning.batch_size:
        raise TrainingError(
            f"there are {rows} rows, and a step takes {tuning.batch_size}",
            where=tuning.data,
            fix=f"--batch-size {rows}, or more examples",
        )
    return micro, tuning.batch_size // (micro * world)


def _train(
    job: _Job, model: nn.Module, run: Run, progress: Progress
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Runs the steps that are left; the figures, and what was trained."""
    tuner, watch = _tuner(job, model, run, progress)
    tuner.accelerator.wait_for_everyone()  # until the first process has looked at what was left
    start = run.last
    tuner.args.eval_on_start = job.held is not None and start is None
    finished = False
    if start is not None:
        raise_all(intruders(start))
    if start is not None and not tuner.is_fsdp_enabled:
        try:
            tuner.state = TrainerState.load_from_json(str(start / "trainer_state.json"))
        except (OSError, ValueError, TypeError) as error:
            raise _unfit(start, error) from error
        finished = step_of(start) >= job.steps or watch.exhausted(tuner.state.log_history)
    reset_peak()
    watch.listen()
    try:
        if finished and start is not None:
            tuner.restore(start)  # it was killed between its last step and its publication
        else:
            tuner.train(resume_from_checkpoint=str(start) if start else None)
        done = {line["step"] for line in tuner.state.log_history if "eval_loss" in line}
        if job.held is not None and not watch.stopped and tuner.state.global_step not in done:
            tuner.evaluate()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the device's memory is full: {str(error).splitlines()[0]}", where="peftc tune",
            fix="a smaller --micro-batch, --gradient-checkpointing, or a 4-bit base: nf4 lora",
        ) from error  # fmt: skip
    except RuntimeError as error:
        raise_lost(error, run)
        raise
    except UnpicklingError as error:  # transformers has its pickles read as weights only
        raise _unfit(start or run.root, error) from error
    finally:
        watch.deafen()
    if watch.stopped:
        raise Interrupted(
            f"stopped by {watch.signal or 'another process'} behind step {tuner.state.global_step}",
            where=str(run.root),
            fix="the same command goes on from there",
        )
    best = best_of(tuner.state.log_history) if job.tuning.patience else None
    if best is not None and best != tuner.state.global_step:
        tuner.restore(next(path for path in run.checkpoints if step_of(path) == best))
    went_on = step_of(start) if start else None
    return _figures(job, tuner, run, went_on, best), tuner.state_of_all()


def _unfit(checkpoint: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot be gone on from: {str(error).strip().splitlines()[0]}",
        where=str(checkpoint),
        fix="remove its directory to go on from an earlier one, or add --restart",
    )


def _tuner(job: _Job, model: nn.Module, run: Run, progress: Progress) -> tuple[Tuner, Watch]:
    """The Trainer and its watch."""
    tuning, live = job.tuning, model
    config: Any = live.config
    config.use_cache = False  # a cache would hide packed examples from the mask
    if tuning.gradient_checkpointing:
        enable: Any = live.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    tuner = Tuner(
        tuning, run, job.rows, job.held, model=model, args=_arguments(job, run),
        data_collator=partial(collate, pad=job.pad), callbacks=[callback(job.program)],
    )  # fmt: skip
    errors: list[PeftcError] = []
    if tuner.is_fsdp_enabled and tuning.patience:
        errors.append(
            TrainingError(
                "the best checkpoint cannot be taken up where FSDP keeps it in parts",
                where="--patience", fix="leave it out, and give --steps",
            )
        )  # fmt: skip
    launched = tuner.accelerator.mixed_precision
    if launched != {"none": "no"}.get(tuning.precision, tuning.precision):
        errors.append(
            TrainingError(
                f"is {tuning.precision}, and accelerate was launched with {launched}",
                where="--precision", fix="say the same to both",
            )
        )  # fmt: skip
    raise_all(errors)
    for own in (PrinterCallback, ProgressCallback):
        tuner.remove_callback(own)
    watch = Watch(tuner, progress)
    tuner.add_callback(watch)
    if job.rows.packed:
        check_packing(tuner.model, config.get_text_config().vocab_size)
    return tuner, watch


def _figures(
    job: _Job, tuner: Tuner, run: Run, went_on: int | None, best: int | None
) -> dict[str, Any]:
    """What a training measured, over all its sessions."""
    lines = [line for line in run.metrics if "loss" in line]
    losses = [line["loss"] for line in lines]
    last = lines[-1]
    figures: dict[str, Any] = {
        "steps": last["step"],
        "epochs": last["epoch"],
        "examples": sum(len(group) for group in job.rows.groups),
        "rows": len(job.rows),
        **{name: count for name, count in job.rows.notes.items() if count},
        "trained_parameters": sum(tensor.numel() for tensor in tuner.trained().values()),
        "first_loss": losses[0],
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "tokens_per_second": round(last["tokens"] / max(last["seconds"], 1e-9), 1),
        "seconds_per_step": round(last["seconds"] / last["step"], 4),
        "peak_memory": peak(tuner.args.device),
        "processes": tuner.args.world_size,
        "went_on_at_step": went_on,
    }
    if evaluations := [line["eval_loss"] for line in run.metrics if "eval_loss" in line]:
        after = min(evaluations[1:]) if best is not None else evaluations[-1]
        figures["evaluation"] = {
            "before": evaluations[0],
            "after": after,
            "perplexity": [perplexity(evaluations[0]), perplexity(after)],
            **({"best_step": best} if best is not None else {}),
        }
    return figures


def _arguments(job: _Job, run: Run) -> Any:
    """The settings as transformers' Trainer takes them."""
    tuning, total = job.tuning, job.steps
    warmup = tuning.warmup if tuning.warmup >= 1 else math.ceil(tuning.warmup * total)
    cpu = tuning.device == "cpu" or not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(run.root),
        per_device_train_batch_size=job.micro,
        gradient_accumulation_steps=job.accumulated,
        max_steps=total,
        learning_rate=tuning.lr,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(
            tuning.schedule, tuning.schedule
        ),
        warmup_steps=int(warmup),
        optim=OPTIMIZERS[tuning.optimizer],
        weight_decay=tuning.weight_decay,
        max_grad_norm=tuning.clip,
        bf16=tuning.precision == "bf16",
        fp16=tuning.precision == "fp16",
        seed=tuning.seed,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        eval_strategy="steps" if job.held is not None and tuning.eval_steps else "no",
        eval_steps=tuning.eval_steps,
        save_strategy="steps",
        save_steps=tuning.save_steps,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show an earlier loss in the place of a NaN
        include_num_input_tokens_seen="all" if tuning.pack else "non_padding",
        average_tokens_across_devices=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )


def raise_lost(error: RuntimeError, run: Run) -> None:
    """Says so where an error means that another process is gone.

    Raises:
        TrainingError: It does.
    """
    signs = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if grouped and any(sign in str(error).lower() for sign in signs):
        raise TrainingError(
            f"another process is gone: {str(error).strip().splitlines()[0]}",
            where="peftc tune",
            fix=f"look into its output; the same command goes on {run.point}",
        ) from error


def summary(figures: Mapping[str, Any]) -> str:
    """A training's figures in a sentence or two."""
    text = (
        f"{figures['steps']} steps on {figures['examples']} examples: loss "
        f"{figures['first_loss']:.3f} → {figures['last_loss']:.3f}"
    )
    with suppress(KeyError):
        evaluation = figures["evaluation"]
        text += f", on what was held out {evaluation['before']:.3f} → {evaluation['after']:.3f}"
    if (step := figures["went_on_at_step"]) is not None:
        text += f"; went on at step {step}"
    return f"{text}; {figures['tokens_per_second']:,.0f} tokens/s, {figures['seconds']:.0f} s"
