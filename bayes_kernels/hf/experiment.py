"""Whole runs: train a method on a task and score it, one run or several side by side.

:func:`run` trains an `Experiment` and scores it; :func:`run_many` does so for several at a time;
`bayes_kernels.hf.results` puts runs into tables and ``metrics.json``.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from .config import METHODS
from .machine import progress_bar
from .recipe import Experiment
from .scoring import Row, evaluate_model, known_labels
from .tasks import Task
from .tfb import check_layers, check_options
from .training import (
    CHECKPOINTS,
    Training,
    build,
    conversion_options,
    convert_model,
    count_steps_in,
    save_adapter,
    train_model,
)


@dataclass(frozen=True)
class Run:
    """One experiment, trained and scored. ``training`` is None for a model that was loaded.

    ``conversion`` is the report of `bayesianize` for methods that convert plain LoRA.
    """

    experiment: Experiment
    training: Training | None
    rows: list[Row]
    conversion: dict[str, Any] | None = None


def run(
    experiment: Experiment,
    task: Task,
    *,
    folder: Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    checkpoints: bool = True,
    temperature: bool = True,
    device: str | None = None,
    progress: bool = True,
    before_writing: Callable[[], None] = lambda: None,
) -> Run:
    """Train an experiment on its task, save the adapter, and score it.

    Args:
        experiment, task: What to run; the task comes from ``experiment.source.load(seed)``.
        folder: Where adapter and checkpoints go; None writes nothing.
        resume: Go on from the last complete checkpoint in the folder.
        save_every: Steps between checkpoints.
        checkpoints: Whether to write any.
        temperature: Whether to add the row with temperature scaling.
        device: "cpu", "cuda" or "auto".
        progress: Whether to show bars.
        before_writing: Called when data, model and adapter have been found to fit, before the first
            file is written.

    Raises:
        Interrupted: As `train_model`.
        ValueError, ImportError, OSError: Data, model and options do not fit.
    """
    if known_labels(task.test) is None:
        raise ValueError(f"task {task.name!r}: expected labelled test examples, got none")
    converts = METHODS[experiment.method].made == "convert"
    options = conversion_options(experiment) if converts else {}
    check_options(**options)
    model, encoder = build(experiment, task, device=device)
    check_layers(model, options.get("layers"))
    # Encoded here only to find what cannot be encoded before anything is written.
    encoder.dataset([examples[0] for examples in task.splits.values() if examples])
    before_writing()
    name = f"{METHODS[experiment.method].title}, seed {experiment.seed}"
    training = train_model(
        experiment,
        model,
        encoder,
        checkpoints=folder / CHECKPOINTS if folder is not None and checkpoints else None,
        save_every=save_every,
        resume=resume,
        progress=progress,
        label=f"{name}: train",
    )
    conversion = None
    if converts:
        conversion = convert_model(experiment, model, encoder, progress=progress).to_dict()
    if folder is not None:
        save_adapter(model, experiment, task, encoder, folder)
    rows = evaluate_model(
        model,
        encoder,
        task,
        method=experiment.method,
        n_samples=experiment.n_samples,
        seed=experiment.seed,
        batch_size=experiment.recipe.eval_batch_size,
        temperature=temperature,
        progress=progress,
        label=name,
    )
    return Run(experiment, training, rows, conversion)


# --- Side by side --------------------------------------------------------------------------------


class Job(NamedTuple):
    """An experiment to `run`: its task, where the adapter goes, whether to fit a temperature."""

    experiment: Experiment
    task: Task
    folder: Path | None = None
    temperature: bool = True


def run_many(
    jobs: Sequence[Job],
    *,
    processes: int = 1,
    device: str | None = None,
    progress: bool = True,
    done: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Run independent experiments, without checkpoints, several at a time.

    Small models use two cores far better as two processes than as two threads. Each process has its
    share of this process' threads; scores do not depend on what runs beside, only times do.

    Args:
        jobs: What to run.
        processes: How many at a time; 1 runs them one after the other in this process.
        device: "cpu", "cuda" or "auto".
        progress: Whether to show a bar.
        done: Called with every result, in the order of the jobs.

    Returns:
        The results in the order of the jobs.

    Raises:
        RuntimeError: A process was killed from outside, as by lack of memory.
        ValueError, ImportError, OSError: As `run`.
    """
    results = []
    processes = min(processes, len(jobs))
    if processes <= 1:
        for job in jobs:
            results.append(_run_job(job, device, progress))
            done(results[-1])
        return results
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    total = sum(job.experiment.recipe.steps for job in jobs)
    share = max(1, torch.get_num_threads() // processes)
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(share, counter)
    )
    bar = progress_bar(progress, total=total, desc=f"{len(jobs)} runs, {processes} at a time")
    try:
        waiting = [pool.submit(_run_pickled, job, device) for job in jobs]
        for future in waiting:
            while not future.done():
                wait([future], timeout=0.5)
                bar.update(counter.value - bar.n)
            # Pickled by hand: torch would pass tensors in shared memory, which containers limit.
            results.append(pickle.loads(future.result()))
            done(results[-1])
    except BrokenProcessPool:
        raise RuntimeError(
            "a run was killed from outside, perhaps for lack of memory; use fewer threads, so that "
            "fewer processes run side by side"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    return results


def _start_worker(threads: int, counter: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    count_steps_in(counter)
    torch.set_num_threads(threads)
    quiet_libraries()


def _run_job(job: Job, device: str | None, progress: bool) -> Run:
    return run(
        job.experiment,
        job.task,
        folder=job.folder,
        checkpoints=False,
        temperature=job.temperature,
        device=device,
        progress=progress,
    )


def _run_pickled(job: Job, device: str | None) -> bytes:
    return pickle.dumps(_run_job(job, device, progress=False))


def quiet_libraries() -> None:
    """No messages of transformers that mean nothing to users of the command line."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
