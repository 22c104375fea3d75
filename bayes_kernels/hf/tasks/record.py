"""What `experiment.json` in a folder says of its adapter."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ...files import write_json
from ...task import Task
from ..checks import CONFIG_NAME, RECORD_NAME, read_json

# Version of every file of settings and results: experiment.json, metrics.json and others.
FORMAT = 2
MEMBERS_NAME = "members.json"


@dataclass(frozen=True)
class Record:
    """A record that has been read.

    Attributes:
        folder: The adapter's folder.
        fields: All of the file; `experiment` has the settings.
        task: The task, without examples.
        max_length: Largest number of tokens in training, where it is known.
    """

    folder: Path
    fields: Mapping[str, Any]
    task: Task
    max_length: int | None

    def path(self, name: str) -> str:
        """A relative path that leads nowhere from here, as the run saw it, if it leads somewhere there."""
        begin = os.path.join(os.path.realpath(self.folder), self.fields.get("cwd", "."))
        there = os.path.normpath(os.path.join(begin, name))
        return there if not os.path.lexists(name) and os.path.lexists(there) else name


def read_record(folder: str | os.PathLike[str], *, advice: str = "") -> Record | None:
    """The record of an adapter folder; None where there is none.

    Args:
        folder: The folder.
        advice: What to do where there is no adapter, for the message.

    Raises:
        ValueError: The folder has no adapter that can be read, or the record is damaged.
    """
    path = Path(folder)
    name = f"adapter {str(path)!r}"
    if not path.is_dir():
        raise ValueError(f"{name}: expected a folder that exists, found none")
    if not (path / CONFIG_NAME).is_file():
        inside = sorted(str(found.parent) for found in path.glob(f"*/{CONFIG_NAME}"))
        more = advice or (f"name one of {', '.join(inside[:5])}" if inside else "")
        raise ValueError(
            f"{name}: expected {CONFIG_NAME} in it, found none{f'; {more}' if more else ''}"
        )
    if not (path / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{name}: expected {SAFETENSORS_WEIGHTS_NAME} in it, found none; pickled weights (.bin) "
            "are not read"
        )
    file = path / RECORD_NAME
    if not file.is_file():
        return None
    fields = read_json(file)
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{file}: expected format {FORMAT}, got {fields.get('format')!r}; train the adapter again "
            "with this version"
        )
    with readable(path):
        length = fields["max_length"]
        if not (length is None or (isinstance(length, int) and length > 0)):
            raise ValueError(f"max_length {length!r} is no length")
        return Record(path, fields, _task_without_rows(fields["task"]), length)


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turns what goes wrong with the fields of a folder's record into one line."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / RECORD_NAME}: expected what `train` wrote, got {error!r}"
        ) from None


def task_fields(task: Task) -> dict[str, Any]:
    """What a record says of a task."""
    return {
        "name": task.name,
        "kind": task.kind,
        "label_names": list(task.label_names),
        "template": task.template,
    }


def _task_without_rows(record: Mapping[str, Any]) -> Task:
    names, kind = record["label_names"], record["kind"]
    if kind not in ("classification", "multiple_choice"):
        raise ValueError(f"kind {kind!r} of task")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"label_names {names!r}")
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"label_names {names!r}, which are not two or more")
    template = record["template"]
    return Task(str(record["name"]), kind, tuple(names), [], [], [], template=template)


def write_members(
    folder: Path, members: Sequence[str | os.PathLike[str]], *, method: str, place: Path
) -> None:
    """Name the adapters that predict together, as seen from the place where the folder will be."""
    seen = [os.path.relpath(member, place) for member in members]
    write_json(
        folder / MEMBERS_NAME,
        {"format": FORMAT, "method": method, "members": [Path(m).as_posix() for m in seen]},
    )


def read_members(folder: str | os.PathLike[str]) -> list[Path]:
    """The adapters of an ensemble's folder; none where the folder is no ensemble's.

    Raises:
        ValueError: The file is damaged.
    """
    file = Path(folder) / MEMBERS_NAME
    if not file.is_file():
        return []
    names = read_json(file).get("members")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: expected a list of members, got {names!r}")
    return [Path(os.path.normpath(Path(folder) / name)) for name in names]
