"""Whole runs: train a method on a task and score it, one run or several side by side.

:func:`run` trains an `Experiment` and scores it; :func:`run_many` does so for several at a time;
`bayes_kernels.experiment.results` puts runs into tables and ``metrics.json``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from ..batches import to_device
from ..hf.card import write_card
from ..hf.kept_layers import KeptLayers, keeping
from ..hf.method import METHODS
from ..hf.tasks.answers import synchronise
from ..hf.tasks.encoder import TaskEncoder
from ..launcher import launched
from ..task import Task
from .build import build
from .convert import conversion_options, convert_model
from .folders import CHECKPOINTS, save_adapter, stored_numbers
from .held_out import check_posterior
from .machine import gpus
from .processes import side_by_side
from .recipe import Experiment
from .scoring import Row, evaluate_model, known_labels
from .train import Training, train_model

# Folder of the adapters that were saved on the way of a training.
SNAPSHOTS = "snapshots"


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
        scale: What validation examples said of the posterior: numbers of `bayes_kernels.hf.scale`.
        notes: What the conversion and the validation examples said, as sentences.
    """

    experiment: Experiment
    training: Training | None
    rows: list[Row]
    conversion: dict[str, Any] | None = None
    conversion_seconds: float | None = None
    parameters: int | None = None
    scale: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def run(
    experiment: Experiment,
    task: Task,
    *,
    folder: Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    checkpoints: bool = True,
    snapshots: Sequence[int] = (),
    temperature: bool = True,
    temper_draws: bool = False,
    mean: bool = True,
    score: bool = True,
    device: str | None = None,
    progress: bool = True,
    before_writing: Callable[[], None] = lambda: None,
) -> Run:
    """Train an experiment on its task, save the adapter, and score it.

    Under a launcher (``torchrun``, ``accelerate launch``) all processes train, each on its part of a
    step's examples. The first converts, saves and scores; the result of the others has no rows.

    Args:
        experiment, task: What to run; the task comes from ``experiment.source.load(seed)``.
        folder: Where adapter and checkpoints go; None writes nothing.
        resume: Go on from the last complete checkpoint in the folder.
        save_every: Steps between checkpoints.
        checkpoints: Whether to write any.
        snapshots: Steps after which the adapter is saved in ``folder/snapshots``.
        temperature: Whether to add the row with temperature scaling.
        temper_draws: Whether draws have a row with temperature scaling.
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
    check_processes(experiment)
    task = experiment.seen(task)
    conversion = METHODS[experiment.method].conversion
    options = conversion_options(experiment) if conversion is not None else {}
    model, encoder = build(experiment, task, device=device)
    if conversion is not None:
        conversion.check_model(model, **conversion.fixed, **options)
    # Encoded here only to find what cannot be encoded before anything is written.
    encoder.dataset([examples[0] for examples in task.splits.values() if examples])
    kept = None
    if experiment.recipe.keep_lower_layers:
        kept = KeptLayers(model, experiment.recipe.keep_lower_layers)
        place = next(model.parameters()).device
        few = encoder.collate(encoder.dataset(task.train[:2]).items)
        kept.check(to_device(few, place))
    before_writing()
    name = f"{METHODS[experiment.method].title}, seed {experiment.seed}"
    training = train_model(
        experiment,
        model,
        encoder,
        kept=kept,
        checkpoints=folder / CHECKPOINTS if folder is not None and checkpoints else None,
        save_every=save_every,
        resume=resume,
        snapshots={}
        if folder is None
        else {n: folder / SNAPSHOTS / f"step-{n}" for n in snapshots},
        progress=progress,
        label=f"{name}: train",
    )
    if not launched().first:
        return Run(experiment, training, [])
    return finish(
        experiment,
        task,
        model,
        encoder,
        training,
        folder=folder,
        temperature=temperature,
        temper_draws=temper_draws,
        mean=mean,
        score=score,
        kept=kept,
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
    temper_draws: bool = False,
    mean: bool = True,
    score: bool = True,
    kept: KeptLayers | None = None,
    progress: bool = True,
) -> Run:
    """What follows training: convert the adapter, look at its posterior, save and score it.

    Args:
        experiment, task: What is run.
        model, encoder: A trained adapter, plain LoRA for methods that convert it.
        training: What its training cost.
        folder, temperature, temper_draws, mean, score, progress: As `run`.
        kept: Outputs of lower layers from training, which scores use too.

    Raises:
        ValueError: The conversion's options do not fit.
    """
    conversion, seconds = None, None
    notes: list[str] = []
    if METHODS[experiment.method].conversion is not None:
        begin = time.perf_counter()
        report = convert_model(experiment, model, encoder, progress=progress)
        synchronise(model)
        seconds = time.perf_counter() - begin
        conversion = report.to_dict()
        notes.append(str(report))
    with keeping(kept):
        verdict = check_posterior(experiment, model, encoder, progress=progress)
    if verdict is not None:
        notes.append(verdict.text)
    if verdict is not None and verdict.harmful:
        warnings.warn(verdict.text, stacklevel=2)
    parameters = None
    if folder is not None:
        save_adapter(model, experiment, task, encoder, folder)
        parameters = stored_numbers(folder)
    rows = []
    if score:
        with keeping(kept):
            rows = evaluate_model(
                model,
                encoder,
                task,
                method=experiment.method,
                n_samples=experiment.n_samples,
                seed=experiment.seed,
                draws=experiment.recipe.draws,
                scope=experiment.recipe.draw_scope,
                batch_size=experiment.recipe.eval_batch_size,
                temperature=temperature,
                temper_draws=temper_draws,
                mean=mean,
                progress=progress,
                label=f"{METHODS[experiment.method].title}, seed {experiment.seed}",
            )
        own = [row for row in rows if row.method == experiment.method and row.temperature is None]
        if folder is not None and own:
            write_card(folder, scores=own[-1].report.to_dict())
    scale = None if verdict is None else verdict.report
    return Run(
        experiment, training, rows, conversion, seconds, parameters, scale, notes=tuple(notes)
    )


def check_trainable(method: str) -> None:
    """Whether a single run makes an adapter of the method.

    Raises:
        ValueError: The method is unknown, or joins several adapters.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if METHODS[method].made == "join":
        raise ValueError(
            f"method: {method} is made of adapters of several seeds; expected a method that trains "
            "one; use the command compare"
        )


def check_processes(experiment: Experiment) -> None:
    """Whether the processes of a launcher can share the examples of each step.

    Raises:
        ValueError: A step cannot be divided evenly, or there is a process group already.
    """
    count, recipe = launched().count, experiment.recipe
    if count == 1:
        return
    if recipe.batch_size % (recipe.accumulation * count):
        raise ValueError(
            f"batch_size: expected a multiple of accumulation x processes = {recipe.accumulation} x "
            f"{count}, got {recipe.batch_size}; change one of them"
        )
    if torch.distributed.is_initialized():
        raise ValueError(
            "run: expected no process group, since training makes one and ends it, got one; call "
            "torch.distributed.destroy_process_group before"
        )


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
        gpus=gpus(device),
        steps=sum(job.experiment.recipe.steps for job in jobs),
        progress=progress,
    )
    return results


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
