"""What happens at the steps of a training run: the bar, signals, the record beside a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from ..hf.tasks.encoder import TaskEncoder
from ..progress import progress_bar
from .folders import save_adapter, write_record
from .recipe import Experiment


class Interrupted(Exception):
    """Training was stopped by a signal after it had written a checkpoint.

    Attributes:
        checkpoint: Folder of the checkpoint; None where checkpoints were off.
        step: Number of steps done.
        signal: Number of the signal.
    """

    def __init__(self, checkpoint: str | None, step: int, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number} after step {step}")
        self.checkpoint, self.step, self.signal = checkpoint, step, signal_number


_finished_steps: Any = None  # in a worker process: the counter that it shares with its parent


def count_steps_in(counter: Any) -> None:
    """From now on, add every optimiser step of this process to a shared counter; None to stop.

    Args:
        counter: A `multiprocessing.Value` of an integer, which another process reads.
    """
    global _finished_steps
    _finished_steps = counter


class TrainingBar(TrainerCallback):
    """One bar over the steps, with the last loss."""

    def __init__(self, label: str, enabled: bool) -> None:
        self.label, self.enabled = label, enabled
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = progress_bar(
            self.enabled,
            total=state.max_steps,
            initial=state.global_step,
            desc=self.label,
            unit="step",
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)
        if _finished_steps is not None:
            with _finished_steps.get_lock():
                _finished_steps.value += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class StopOnSignal(TrainerCallback):
    """Turns SIGINT and SIGTERM into a checkpoint at the end of the running step, of all processes."""

    def __init__(self) -> None:
        self.received: int | None = None

    @contextlib.contextmanager
    def installed(self, enabled: bool) -> Iterator[None]:
        """Handles the signals inside the context; only the main thread can."""
        if not enabled or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            # A signal comes to each process at its own time, perhaps one step apart.
            number = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.received = int(number) or None
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True


class Snapshots(TrainerCallback):
    """Saves the adapter, as a folder of its own, after some steps."""

    def __init__(
        self,
        folders: Mapping[int, Path],
        experiment: Experiment,
        model: PeftModel,
        encoder: TaskEncoder,
    ) -> None:
        self.folders, self.experiment, self.model, self.encoder = (
            folders,
            experiment,
            model,
            encoder,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = self.folders.get(state.global_step)
        if folder is not None and state.is_world_process_zero:
            save_adapter(self.model, self.experiment, self.encoder.task, self.encoder, folder)


class RecordBesideCheckpoint(TrainerCallback):
    """Puts `experiment.json` into every checkpoint, so that it can be evaluated by itself."""

    def __init__(self, experiment: Experiment, encoder: TaskEncoder) -> None:
        self.experiment, self.encoder = experiment, encoder

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_record(folder, self.experiment, self.encoder.task, self.encoder, place=folder)
