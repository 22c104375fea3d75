"""Folders of adapters: the adapter, its experiment.json, and what reads them again."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from safetensors import SafetensorError, safe_open

from ..files import updating_folder, write_json
from ..hf.card import write_card
from ..hf.checkpoint_folders import last_checkpoint
from ..hf.checks import CONFIG_NAME, RECORD_NAME
from ..hf.method import METHODS
from ..hf.tasks import adapters
from ..hf.tasks.encoder import TaskEncoder
from ..hf.tasks.record import FORMAT, Record, readable, task_fields
from ..hf.tasks.record import read_record as record_of
from ..task import Task
from .machine import versions
from .output import method_files, stopped_run
from .recipe import Experiment

EXPERIMENT_FILE = RECORD_NAME
CHECKPOINTS = "checkpoints"


def save_adapter(
    model: PeftModel, experiment: Experiment, task: Task, encoder: TaskEncoder, folder: Path
) -> None:
    """Write the adapter and its `experiment.json` into a folder, all files or none.

    `PeftModel.from_pretrained` and `load_adapter` read it.
    """
    # Files of methods are of what was there before, unless they are written again.
    with updating_folder(folder, CONFIG_NAME, method_files()) as temporary:
        with named_errors(folder, "the adapter"):
            model.save_pretrained(str(temporary), save_embedding_layers=False)
        METHODS[experiment.method].save(model, temporary)
        write_record(temporary, experiment, task, encoder, place=folder)
        write_card(temporary, place=folder)


@contextlib.contextmanager
def named_errors(folder: Path, what: str) -> Iterator[None]:
    """Errors of libraries that write in native code, as an OSError that says what is missing."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{folder}: expected room to write {what} to, got: {reason}; make room, or choose "
            "another folder"
        ) from error


def stored_numbers(folder: Path) -> int:
    """How many numbers the files of an adapter hold, those of its posterior included."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return count


def write_record(
    folder: Path, experiment: Experiment, task: Task, encoder: TaskEncoder, place: Path
) -> None:
    """Write experiment.json into a folder that will be at a place."""
    record = {
        "format": FORMAT,
        "experiment": experiment.to_dict(),
        "task": task_fields(task),
        "rows": task.digest,
        "max_length": encoder.max_length,
        # Where relative paths begin, as seen from the adapter.
        "cwd": os.path.relpath(os.getcwd(), os.path.realpath(place)),
        "versions": versions(),
    }
    write_json(folder / EXPERIMENT_FILE, record)


class Saved(NamedTuple):
    """What `read_record` finds in a folder: the experiment, its task without examples, a length.

    `rows` is `Task.digest` of the task as the method saw it; None in a folder that does not say it.
    """

    experiment: Experiment
    task: Task
    max_length: int | None
    rows: str | None = None


def read_record(folder: str | Path) -> Saved | None:
    """`experiment.json` of an adapter folder; None where there is none.

    Raises:
        ValueError: The folder has no adapter that can be read, or the file is damaged.
    """
    path = Path(folder)
    last = last_checkpoint(path / CHECKPOINTS)
    advice = [stopped_run(path), f"name its last checkpoint instead: {last}" if last else ""]
    record = record_of(folder, advice="; ".join(words for words in advice if words))
    if record is None:
        return None
    with readable(path):
        experiment = Experiment.from_dict(record.fields["experiment"])
        one = _with_paths_from(experiment, record)
        return Saved(one, record.task, record.max_length, record.fields.get("rows"))


def _with_paths_from(experiment: Experiment, record: Record) -> Experiment:
    """Relative paths that lead nowhere from the current folder, as the record's folder sees them."""
    found, source = record.path, experiment.source
    source = replace(
        source,
        data=found(source.data),
        test=source.test and found(source.test),
        ood=source.ood and tuple(map(found, source.ood)),
    )
    return replace(experiment, model=found(experiment.model), source=source)


def load_adapter(
    folder: str | Path,
    experiment: Experiment,
    task: Task,
    *,
    max_length: int | None = None,
    device: str | None = None,
) -> tuple[PeftModel, TaskEncoder]:
    """A trained adapter of an experiment, see `bayes_kernels.hf.tasks.adapters.load_adapter`.

    Args:
        folder: What `save_adapter` or PEFT wrote, or a checkpoint.
        experiment: What was run.
        task: Classes of the model, and examples that show how many choices there are.
        max_length: That of training; the recipe's by default.
        device: "cpu", "cuda" or "auto".
    """
    length = max_length or experiment.recipe.max_length
    return adapters.load_adapter(folder, experiment.base, task, max_length=length, device=device)


def check_resumable(folder: Path, experiment: Experiment, task: Task | None = None) -> None:
    """Whether the last checkpoint of a folder, if it has one, belongs to the same experiment.

    Args:
        folder: Of the run.
        experiment: What is to go on.
        task: Its data, if they are to be compared too.

    Raises:
        ValueError: Its experiment or its data differ; the message says where.
    """
    last = last_checkpoint(folder / CHECKPOINTS)
    saved = None if last is None else read_record(last)
    if last is None or saved is None:
        return
    changed = changed_settings(saved.experiment, experiment)
    if changed:
        raise ValueError(
            f"resume: expected the settings of {last}, got others: {', '.join(changed)}; give the "
            "same options as before"
        )
    if task is not None:
        check_data(Path(last), saved, experiment.seen(task))


def check_data(place: Path, saved: Saved, task: Task) -> None:
    """Whether what is there was made with the classes and rows of a task.

    Args:
        place: Where it is, for the message.
        saved: What is there.
        task: As the method is to see it.

    Raises:
        ValueError: It was not.
    """
    before, now = saved.task.label_names, task.label_names
    if (saved.task.kind, before) != (task.kind, now):
        raise ValueError(
            f"resume: expected the classes of {place}, {', '.join(before)}, got {', '.join(now)}; name "
            "them in that order (--label-names), or use another folder"
        )
    if saved.rows not in (None, task.digest):
        raise ValueError(
            f"resume: expected the rows that {place} was made with, got data that have changed, or are "
            "split otherwise; use another folder"
        )


def changed_settings(before: Experiment, now: Experiment) -> list[str]:
    """What differs between two experiments, as ``recipe.lr 0.001 -> 0.002``."""
    a, b = _flat(before.to_dict()), _flat(now.to_dict())
    return [
        f"{key} {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a | b)
        if a.get(key) != b.get(key)
    ]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
