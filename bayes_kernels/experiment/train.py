"""Adapters: building, training, saving and loading them.

Training cost is the wall-clock time of the training loop, and peak memory as
`bayes_kernels.experiment.machine` measures it.
"""

from __future__ import annotations

import contextlib
import gc
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers import TrainingArguments as Arguments

from ..hf.checkpoint_folders import last_checkpoint
from ..hf.config import own_fields
from ..hf.kept_layers import KeptLayers, keeping
from ..hf.method import METHODS
from ..hf.tasks.answers import synchronise
from ..hf.tasks.encoder import EncodedDataset, TaskEncoder, batches_of
from ..hf.tokens import IGNORED
from ..hf.trainer import BayesTrainer
from ..launcher import launched
from ..progress import progress_bar
from .callbacks import Interrupted, RecordBesideCheckpoint, Snapshots, StopOnSignal, TrainingBar
from .folders import named_errors
from .machine import peak_memory
from .recipe import Experiment, trained_method

# Training examples that a method may look at before training.
_FIRST_LOOK = 32


@dataclass(frozen=True)
class Training:
    """What training cost and logged.

    Attributes:
        seconds: Wall-clock time of the training loop, of this process (a resumed run counts from
            where it resumed).
        steps: Optimiser steps of this process.
        peak_memory_mib: Peak memory, as `bayes_kernels.experiment.machine` measures it.
        log: What the trainer logged: step, loss, and for `BayesTrainer` nll, kl and elbo.
        adapter: The adapter's options with all defaults filled in.
    """

    seconds: float
    steps: int
    peak_memory_mib: float
    log: list[dict[str, float]]
    adapter: dict[str, Any]


def train_model(
    experiment: Experiment,
    model: PeftModel,
    encoder: TaskEncoder,
    *,
    checkpoints: Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    snapshots: Mapping[int, Path] | None = None,
    kept: KeptLayers | None = None,
    progress: bool = True,
    label: str = "train",
) -> Training:
    """Train an adapter, in place, with the stock Trainer (plain LoRA) or `BayesTrainer`.

    Under a launcher every process trains on its part of each step's examples; the process group that
    the trainer makes ends with the training.

    SIGINT and SIGTERM finish the running step, write a checkpoint and raise `Interrupted`; a second
    SIGINT stops at once, and the last complete checkpoint is the one before.

    Args:
        experiment: Method, recipe and seed.
        model, encoder: From `build`.
        checkpoints: Folder of checkpoints; None writes none.
        save_every: Steps between checkpoints; None for a fifth of the steps.
        resume: Go on from the last complete checkpoint where there is one.
        snapshots: Folders for the adapter after these steps.
        kept: Where outputs of lower layers are kept, if anywhere.
        progress: Whether to show a bar when it takes longer than two seconds.
        label: Name of the bar.

    Raises:
        Interrupted: A signal came, and the checkpoint is written.
        ValueError: No training examples, or a loss that is not finite.
        OSError: A checkpoint cannot be written.
    """
    recipe = experiment.recipe
    data = encoder.dataset(encoder.task.train, progress=progress)
    if not len(data):
        raise ValueError(f"task {encoder.task.name!r}: expected training examples, got none")
    method = METHODS[trained_method(experiment)]
    if method.before_training is not None:
        # Before a checkpoint is read: a resumed run begins with the same.
        batch = encoder.collate(data.items[:_FIRST_LOOK])
        device = next(model.parameters()).device
        method.before_training(model, {name: value.to(device) for name, value in batch.items()})
    with contextlib.ExitStack() as stack:
        if checkpoints is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bayes_kernels."))
        else:
            folder = str(checkpoints)
        arguments = Arguments(
            output_dir=folder,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size
            // (recipe.accumulation * launched().count),
            gradient_accumulation_steps=recipe.accumulation,
            learning_rate=experiment.lr,
            lr_scheduler_type="linear",
            warmup_steps=math.ceil(recipe.warmup * recipe.steps),
            weight_decay=experiment.weight_decay,
            adam_epsilon=recipe.adam_epsilon,
            max_grad_norm=recipe.max_grad_norm,
            optim="adamw_torch",
            seed=experiment.seed,
            data_seed=experiment.seed,
            logging_steps=max(1, recipe.steps // 10),
            save_strategy="no" if checkpoints is None else "steps",
            save_steps=save_every or max(1, recipe.steps // 5),
            save_total_limit=2,
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            disable_tqdm=True,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        options: dict[str, Any] = {
            "model": model,
            "args": arguments,
            "train_dataset": data,
            "data_collator": encoder.collate,
        }
        if not method.plain and (tokens := _learnt_tokens(data)):
            options["n_train"] = tokens
        trainer: Any = (_PlainTrainer if method.plain else _Trainer)(**options)
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(TrainingBar(label, progress))
        if snapshots:
            trainer.add_callback(Snapshots(snapshots, experiment, model, encoder))
        stop = StopOnSignal()
        if checkpoints is not None:
            trainer.add_callback(stop)
            trainer.add_callback(RecordBesideCheckpoint(experiment, encoder))
        last = last_checkpoint(folder) if resume else None
        start = _step_of(last)
        with peak_memory() as peak, stop.installed(checkpoints is not None):
            synchronise(model)
            begin = time.perf_counter()
            with keeping(kept):
                _train(trainer, last, folder)
            if arguments.world_size > 1:
                # What follows is one process's work, and must not wait for the others.
                _end_process_group(trainer)
            finished = trainer.state.global_step >= recipe.steps
            if finished:
                size = recipe.eval_batch_size
                batches = progress_bar(
                    progress,
                    batches_of(data, encoder, size),
                    total=-(-len(data) // size),
                    desc=f"{label}: after training",
                    unit="batch",
                )
                method.after_training(model, batches, **experiment.training_options)
            synchronise(model)
            seconds = time.perf_counter() - begin
        done = trainer.state.global_step
        if stop.received is not None and done < recipe.steps:
            raise Interrupted(last_checkpoint(folder), done, stop.received)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
    model.eval()
    return Training(seconds, done - start, peak.mib, log, _resolved(model))


def _end_process_group(trainer: Any) -> None:
    """Wait for all processes, then end their group and its threads.

    Threads of gloo take Python's lock to free tensors. DDP's reducer, as the last to hold the group,
    would wait for them while it has that lock: on a busy machine such a process never ended (torch
    2.13). So the reducer goes first, and the group here, which gives up the lock meanwhile.
    """
    group = torch.distributed.group.WORLD
    torch.distributed.barrier()
    trainer.accelerator.free_memory()  # of DeepSpeed, too, whose engine asks the group
    trainer.model_wrapped = trainer.model
    gc.collect()
    torch.distributed.destroy_process_group()
    del group


def _resolved(model: PeftModel) -> dict[str, Any]:
    """Rank, scaling, targets, and for a Bayesian adapter everything about its posterior."""
    config = model.peft_config["default"]
    own = (one.name for one in own_fields(type(config)))
    found = {
        name: getattr(config, name) for name in sorted(["r", "lora_alpha", "target_modules", *own])
    }
    targets = found["target_modules"]
    return {**found, "target_modules": sorted(targets) if isinstance(targets, set) else targets}


def _learnt_tokens(data: EncodedDataset) -> int:
    """Labels that the loss is a mean of, where an example has one for each token; 0 for classes."""
    rows = [item["labels"] for item in data.items if isinstance(item.get("labels"), list)]
    return sum(label != IGNORED for labels in rows for label in labels)


def _step_of(checkpoint: str | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])


class _WatchedMixin:
    """Stops a trainer at the first loss that is not finite.

    The host looks at the loss of every step on a CPU. On a GPU it would wait for each: there it
    looks whenever the trainer logs, which copies the loss anyway, and still names the first step.
    """

    _first_bad: Tensor | None = None  # step of the first loss that is not finite, -1 for none

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As the trainer's."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=loss.device)
            self._rates: list[float] = []
            self._first_step = self.state.global_step
        step = self.state.global_step
        if step - self._first_step == len(self._rates):
            self._rates.append(self.lr_scheduler.get_last_lr()[0])
        bad = ~loss.detach().isfinite().all() & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, step)
        if loss.device.type == "cpu":
            self.check_finite()
        return loss

    def log(self: Any, *args: Any, **kwargs: Any) -> None:
        """As the trainer's."""
        self.check_finite()
        super().log(*args, **kwargs)  # type: ignore[misc]

    def check_finite(self: Any) -> None:
        """Raise where a loss was not finite.

        Raises:
            ValueError: With step and learning rate.
        """
        if self._first_bad is None or (step := int(self._first_bad)) < 0:
            return
        rate = self._rates[step - self._first_step]
        raise ValueError(_diverged(f"loss at step {step + 1} of {self.state.max_steps}", rate))


class _PlainTrainer(_WatchedMixin, Trainer):
    """The stock Trainer, which would go on with a loss that is not finite."""


class _Trainer(_WatchedMixin, BayesTrainer):
    """`BayesTrainer`, likewise."""


def _diverged(what: str, rate: float) -> str:
    return (
        f"training: expected a finite {what}, got nan or inf, at learning rate {rate:.3g}; use a "
        "lower lr or a longer warmup"
    )


def _train(trainer: Any, checkpoint: str | None, folder: str) -> None:
    """Train, and see to it that what was trained is finite.

    Raises:
        ValueError: It is not.
        OSError: A checkpoint cannot be written.
    """
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (SafetensorError, RuntimeError, OSError):
        if not trainer.control.should_save:
            raise
        with named_errors(Path(folder), "a checkpoint"):
            raise
    trainer.check_finite()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    if not all(bool(p.isfinite().all()) for p in trained):
        raise ValueError(_diverged("adapter after the last step", trainer.args.learning_rate))
