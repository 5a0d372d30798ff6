"""transformers' Trainer, for live models of peftc.

It saves what is trained and no more, orders examples by seed and epoch alone, evaluates by tokens,
and stops between two steps when it is asked to.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback

from peftc.errors import CheckpointError, TrainingError
from peftc.progress import Progress
from peftc.rates import optimizer_groups
from peftc.reading import tensors
from peftc.runs import PREFIX, Run, best_of
from peftc.scoring import perplexity, token_loss
from peftc.token_rows import Rows
from peftc.tuning import Tuning

WEIGHTS = "trained.safetensors"  # in a checkpoint's directory


class Order(torch.utils.data.Sampler[int]):
    """The order of the rows in each epoch, by the seed and the epoch's number alone.

    What fills no batch is left out; each epoch leaves out others.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch, self.seed, self.epoch = count, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count - self.count % self.batch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        return iter(torch.randperm(self.count, generator=generator)[: len(self)].tolist())


class Tuner(Trainer):  # type: ignore[misc]  # transformers has no types
    """The Trainer of `peftc tune`.

    Args:
        tuning: The settings.
        run: Where checkpoints go.
        rows: What to learn from; also the Trainer's `train_dataset`.
        held: What to evaluate on.
        options: The Trainer's own.
    """

    optimizer: torch.optim.Optimizer | None
    control: Any

    def __init__(
        self, tuning: Tuning, run: Run, rows: Rows, held: Rows | None, **options: Any
    ) -> None:
        self.tuning, self.run, self.held = tuning, run, held
        self.evaluating = 0.0  # seconds
        self.order = Order(len(rows), tuning.batch_size, tuning.seed)
        super().__init__(train_dataset=rows, eval_dataset=held, **options)

    def _get_train_sampler(self, *_: Any) -> Order:
        return self.order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer; with a ratio of rates in LoRA+'s groups."""
        if self.tuning.lr_ratio is None or self.optimizer is not None:
            optimizer: torch.optim.Optimizer = super().create_optimizer(model)
            return optimizer
        cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups = optimizer_groups(
            model or self.model, options.pop("lr"), self.tuning.lr_ratio, self.tuning.weight_decay
        )
        made: torch.optim.Optimizer = cls(groups, **options)
        self.optimizer = made
        return made

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss per learned token of all that is held out."""
        assert self.held is not None
        began = time.perf_counter()
        model = self.model_wrapped if self.is_in_train else self.model
        total, count = token_loss(
            model, self.held, self.args.per_device_train_batch_size, self.data_collator,
            self.args.device, self.args.process_index, self.args.world_size,
        )  # fmt: skip
        sums = torch.tensor([total, count], device=self.args.device, dtype=torch.float64)
        total, count = self.accelerator.reduce(sums).tolist()
        metrics = {"eval_loss": total / count}
        self.evaluating += time.perf_counter() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError) as error:
            raise self.run.unwritten(error) from error
        except RuntimeError as error:
            if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
                raise self.run.unwritten(error) from error
            raise

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.trained(), folder / WEIGHTS)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.restore(Path(resume_from_checkpoint))

    def trained(self) -> dict[str, torch.Tensor]:
        """The trained tensors, by their names in the model."""
        model = self.accelerator.unwrap_model(self.model)
        parameters = model.named_parameters()
        return {name: p.detach().contiguous() for name, p in parameters if p.requires_grad}

    def restore(self, checkpoint: Path) -> None:
        """Takes the trained tensors of a checkpoint.

        Raises:
            CheckpointError: It cannot be read, or does not hold them.
        """
        try:
            saved = tensors(checkpoint / WEIGHTS)
        except CheckpointError as error:
            raise CheckpointError(
                error.what,
                where=error.where,
                fix="remove its directory, to go on from an earlier one",
            ) from error
        trained = self.trained()
        if trained.keys() != saved.keys():
            raise CheckpointError(
                "holds other tensors than are trained",
                where=str(checkpoint / WEIGHTS),
                fix="add --restart to begin anew",
            )
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(saved[name])

    def state_of_all(self) -> dict[str, torch.Tensor]:
        """The whole model's tensors, gathered from all processes where they are in parts."""
        if self.is_fsdp_enabled:
            state: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model)
            return state
        return self.trained()


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Writes figures down, shows progress, seals checkpoints, and stops when that is wanted.

    Args:
        tuner: Whose steps these are.
        progress: Told of every step.
    """

    def __init__(self, tuner: Tuner, progress: Progress) -> None:
        self.tuner, self.run, self.tuning = tuner, tuner.run, tuner.tuning
        self.progress = progress
        self.signal: str | None = None
        self.stopped = False
        # Earlier sessions of this run count too.
        self.spent = max((line.get("seconds", 0.0) for line in self.run.metrics), default=0.0)
        self.began, self.tokens = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began, self.tokens = time.perf_counter(), state.num_input_tokens_seen

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tuner.order.set_epoch(state.global_step // self.steps_per_epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._asked():
            self.stopped = control.should_training_stop = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        seconds = time.perf_counter() - self.began - self.tuner.evaluating
        rate = (state.num_input_tokens_seen - self.tokens) / max(seconds, 1e-9)
        if "eval_loss" in logs:
            line |= {"eval_loss": logs["eval_loss"], "perplexity": perplexity(logs["eval_loss"])}
        elif "loss" in logs:
            line |= {
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "gradient_norm": logs.get("grad_norm"),
                "tokens": state.num_input_tokens_seen,
                "seconds": round(self.spent + seconds, 3),
            }
            remark = f"loss {logs['loss']:.3f}, {rate:,.0f} tokens/s"
            self.progress.step(state.global_step, state.max_steps, remark)
        else:
            return
        if state.is_world_process_zero:
            self.run.log(line)
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"the loss of step {state.global_step} is {logs['loss']}",
                where="peftc tune",
                fix="lower --lr, warm up longer, or compute in another precision; the same command "
                f"would go on {self.run.point}",
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.tuning.patience is None:
            return
        if state.global_step == best_of(state.log_history):
            control.should_save = True
        if self.exhausted(state.log_history):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tuner.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            best = best_of(state.log_history) if self.tuning.patience else None
            self.run.seal(self.run.root / f"{PREFIX}{state.global_step}", self.tuning.keep, best)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.tuner.order) // self.tuning.batch_size

    def exhausted(self, metrics: Sequence[Mapping[str, Any]]) -> bool:
        """Whether patience is: whether as many evaluations as that followed the best."""
        best = best_of(metrics) or 0
        worse = sum("eval_loss" in line and line["step"] > best for line in metrics)
        return self.tuning.patience is not None and worse >= self.tuning.patience

    def _asked(self) -> bool:
        """Whether any process was asked to stop; all of them must stop at the same step."""
        if self.tuner.args.world_size == 1:
            return self.signal is not None
        flag = torch.tensor([float(self.signal is not None)], device=self.tuner.args.device)
        return bool(self.tuner.accelerator.reduce(flag).item() > 0)

    def listen(self) -> None:
        """Takes interrupts until the training ends; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for number in self.before:
            signal.signal(number, self._take)

    def deafen(self) -> None:
        """Gives interrupts back to whom they belonged."""
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
