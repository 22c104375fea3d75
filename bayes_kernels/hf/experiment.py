"""Whole runs: train a method on a task and score it, one run or several side by side.

:func:`run` trains an `Experiment` and scores it; :func:`run_many` does so for several at a time;
`bayes_kernels.hf.results` puts runs into tables and ``metrics.json``.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel

from .bayesianize import CONVERSIONS
from .card import write_card
from .config import METHODS
from .machine import progress_bar, synchronise
from .models import TaskEncoder
from .recipe import Experiment
from .scoring import Row, evaluate_model, known_labels
from .tasks import Task
from .training import (
    CHECKPOINTS,
    Training,
    build,
    conversion_options,
    convert_model,
    count_steps_in,
    save_adapter,
    stored_numbers,
    train_model,
)


@dataclass(frozen=True)
class Run:
    """One experiment, trained and scored.

    Attributes:
        experiment: What was run.
        training: What it cost; None for a model that was loaded. That of the plain adapter for
            methods that convert it, and the sum over the members of an ensemble.
        rows: Its scores.
        conversion: Report of `bayesianize` for methods that convert plain LoRA.
        conversion_seconds: Wall-clock time of the conversion.
        parameters: Numbers that the adapter's file holds; of an ensemble all of its files.
    """

    experiment: Experiment
    training: Training | None
    rows: list[Row]
    conversion: dict[str, Any] | None = None
    conversion_seconds: float | None = None
    parameters: int | None = None


def run(
    experiment: Experiment,
    task: Task,
    *,
    folder: Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    checkpoints: bool = True,
    temperature: bool = True,
    mean: bool = True,
    score: bool = True,
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
        mean: Whether methods with draws have a row for the mean, see `evaluate_model`.
        score: Whether to score the adapter at all.
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
    check_trainable(experiment.method)
    converts = METHODS[experiment.method].made == "convert"
    options = conversion_options(experiment) if converts else {}
    model, encoder = build(experiment, task, device=device)
    if converts:
        conversion = CONVERSIONS[experiment.method]
        conversion.check_model(model, **conversion.fixed, **options)
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
    return finish(
        experiment,
        task,
        model,
        encoder,
        training,
        folder=folder,
        temperature=temperature,
        mean=mean,
        score=score,
        progress=progress,
    )


def finish(
    experiment: Experiment,
    task: Task,
    model: PeftModel,
    encoder: TaskEncoder,
    training: Training | None,
    *,
    folder: Path | None = None,
    temperature: bool = True,
    mean: bool = True,
    score: bool = True,
    progress: bool = True,
) -> Run:
    """What follows training: convert the adapter where the method does that, save and score it.

    Args:
        experiment, task: What is run.
        model, encoder: A trained adapter, plain LoRA for methods that convert it.
        training: What its training cost.
        folder, temperature, mean, score, progress: As `run`.

    Raises:
        ValueError: The conversion's options do not fit.
    """
    conversion, seconds = None, None
    if METHODS[experiment.method].made == "convert":
        begin = time.perf_counter()
        conversion = convert_model(experiment, model, encoder, progress=progress).to_dict()
        synchronise(model)
        seconds = time.perf_counter() - begin
    parameters = None
    if folder is not None:
        save_adapter(model, experiment, task, encoder, folder)
        parameters = stored_numbers(folder)
    rows = []
    if score:
        rows = evaluate_model(
            model,
            encoder,
            task,
            method=experiment.method,
            n_samples=experiment.n_samples,
            seed=experiment.seed,
            batch_size=experiment.recipe.eval_batch_size,
            temperature=temperature,
            mean=mean,
            progress=progress,
            label=f"{METHODS[experiment.method].title}, seed {experiment.seed}",
        )
        own = [row for row in rows if row.method == experiment.method and row.temperature is None]
        if folder is not None and own:
            write_card(folder, scores=own[-1].report.to_dict())
    return Run(experiment, training, rows, conversion, seconds, parameters)


def check_trainable(method: str) -> None:
    """Raise for methods that are made of several adapters."""
    if METHODS[method].made == "join":
        raise ValueError(
            f"method: {method} is made of adapters of several seeds; expected a method that trains "
            "one; use the command compare"
        )


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

    Args:
        jobs: What to run.
        processes: How many at a time, see `side_by_side`.
        device: "cpu", "cuda" or "auto".
        progress: Whether to show a bar.
        done: Called with every result, in the order of the jobs.

    Returns:
        The results in the order of the jobs.

    Raises:
        RuntimeError: A process was killed from outside, as by lack of memory.
        ValueError, ImportError, OSError: As `run`.
    """
    ready: dict[int, Run] = {}
    results: list[Run] = []

    def finished(index: int, result: Any) -> None:
        if isinstance(result, BaseException):
            raise result
        ready[index] = result
        while len(results) in ready:
            results.append(ready[len(results)])
            done(results[-1])

    side_by_side(
        _run_job,
        [(job, device) for job in jobs],
        finished,
        processes=processes,
        steps=sum(job.experiment.recipe.steps for job in jobs),
        progress=progress,
    )
    return results


def side_by_side(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    finished: Callable[[int, Any], None],
    *,
    after: Sequence[Collection[int]] | None = None,
    processes: int = 1,
    steps: int = 0,
    progress: bool = True,
) -> None:
    """Call a function with each of several arguments, some at a time, each in its own process.

    Small models use two cores far better as two processes than as two threads. Each process has its
    share of this process' threads; scores do not depend on what runs beside, only times do. A call
    that fails, or whose process is killed, does not touch the others.

    Args:
        function: Of a module, so that another process finds it; called as
            ``function(*arguments[i], progress=...)``. What it returns is pickled.
        arguments: Of every call; the first in the list that can begin does.
        finished: Called with the number of the call and its result, or its exception, as they come.
            Where it raises, all that runs is stopped.
        after: For every call the numbers of those that must have finished before.
        processes: How many at a time; 1 makes the calls one after the other in this process.
        steps: Optimiser steps of all calls together, for the bar.
        progress: Whether to show bars.
    """
    needs = [set(numbers) for numbers in after] if after else [set() for _ in arguments]
    left = list(range(len(arguments)))
    over: set[int] = set()

    def next_call() -> int | None:
        found = next((i for i in left if needs[i] <= over), None)
        if found is not None:
            left.remove(found)
        return found

    processes = min(processes, len(arguments))
    if processes <= 1:
        while (index := next_call()) is not None:
            try:
                result = function(*arguments[index], progress=progress)
            except Exception as error:
                result = error
            over.add(index)
            finished(index, result)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    share = max(1, torch.get_num_threads() // processes)

    def start_process() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1, mp_context=context, initializer=_start_worker, initargs=(share, counter)
        )

    free = [start_process() for _ in range(processes)]
    running: dict[Future[bytes], tuple[int, ProcessPoolExecutor]] = {}
    bar = progress_bar(progress, total=steps, desc=f"{len(arguments)} runs, {processes} at a time")
    try:
        while left or running:
            while free and (index := next_call()) is not None:
                process = free.pop()
                try:
                    future = process.submit(_call_pickled, function, arguments[index])
                except BrokenProcessPool:  # killed while it waited for a call
                    process.shutdown(wait=False)
                    process = start_process()
                    future = process.submit(_call_pickled, function, arguments[index])
                running[future] = index, process
            if not running:
                raise ValueError(f"side_by_side: calls {left} wait for calls that never come")
            ended, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(counter.value - bar.n)
            for future in ended:
                index, process = running.pop(future)
                try:
                    # Pickled by hand: torch would pass tensors in shared memory, which containers
                    # limit.
                    result = pickle.loads(future.result())
                except BrokenProcessPool:
                    result = RuntimeError(
                        "a run was killed from outside, perhaps for lack of memory; use fewer "
                        "threads, so that fewer processes run side by side"
                    )
                    process.shutdown(wait=False)
                    process = start_process()
                except Exception as error:
                    result = error
                free.append(process)
                over.add(index)
                finished(index, result)
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        bar.close()
        for process in [*free, *(process for _, process in running.values())]:
            process.shutdown(cancel_futures=True)


def _start_worker(threads: int, counter: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    count_steps_in(counter)
    torch.set_num_threads(threads)
    quiet_libraries()


def _end_with_parent() -> None:
    """End this process when its parent is gone, in whatever way: nobody waits for its result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_job(job: Job, device: str | None, *, progress: bool) -> Run:
    return run(
        job.experiment,
        job.task,
        folder=job.folder,
        checkpoints=False,
        temperature=job.temperature,
        device=device,
        progress=progress,
    )


def _call_pickled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps(function(*arguments, progress=False))
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # would arrive as a process that was killed
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


def quiet_libraries() -> None:
    """No messages of transformers that mean nothing to users of the command line."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
