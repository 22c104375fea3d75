"""Tasks from JSON lines."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...hf.tasks.task import LETTERS, Example, Kind, Task, Template
from .splits import choose_subset, split_by_hash

_MAX_PROBLEMS = 10


class _Problems:
    """Collects what is wrong with the data, so that one error shows the first ten lines at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, place: str, message: str) -> None:
        self.lines.append(f"{place}: {message}")

    def raise_if_any(self) -> None:
        if self.lines:
            shown = self.lines[:_MAX_PROBLEMS]
            if len(self.lines) > len(shown):
                shown.append(f"... and {len(self.lines) - len(shown)} more")
            raise ValueError("\n".join(shown))


def _open_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as stream:
        yield from enumerate(stream, start=1)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode_row(line: bytes, need_label: bool) -> Example | str:
    """The example in one line, or what is wrong with it."""
    try:
        return _parse_row(json.loads(line), need_label)
    except json.JSONDecodeError as error:
        return f"expected JSON, got {error.msg} at column {error.colno}"
    except UnicodeDecodeError as error:
        return f"expected UTF-8, got {error.reason} at byte {error.start}"
    except ValueError as error:  # an integer of thousands of digits
        return f"expected JSON that can be read, got: {error}"
    except RecursionError:
        return "expected a flat JSON object, got lists or objects nested too deep"


def _parse_row(row: object, need_label: bool) -> Example | str:
    """The example in one decoded line, or what is wrong with it."""
    if not isinstance(row, dict):
        return f"expected a JSON object, got {_shorten(row)}"
    identity = row.get("id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    if not (isinstance(identity, str) and identity):
        return f"'id' must be a non-empty string or an integer, got {_shorten(identity)}"
    question = row.get("question")
    if not (isinstance(question, str) and question.strip()):
        return f"'question' must be a non-empty string, got {_shorten(question)}"
    context = row.get("context")
    if context is not None and not isinstance(context, str):
        return f"'context' must be a string, got {_shorten(context)}"
    choices = row.get("choices")
    if choices is None:
        choices = []
    elif not (
        isinstance(choices, list)
        and 2 <= len(choices) <= len(LETTERS)
        and all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        return f"'choices' must be a list of 2 to 26 non-empty strings, got {_shorten(choices)}"
    for key in ("id", "question", "context", "choices"):
        texts = choices if key == "choices" else [row.get(key)]
        for text in texts:
            if isinstance(text, str) and not is_unicode(text):
                return f"{key!r} must be Unicode text, got a lone surrogate in {_shorten(text)}"
    label = row.get("label")
    if label is None and not need_label:
        return Example(identity, question, None, context, tuple(choices))
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        return f"'label' must be an integer from 0, got {_shorten(label)}"
    if choices and label >= len(choices):
        found = _shorten(label)
        return f"'label' must be below the number of choices, {len(choices)}, got {found}"
    return Example(identity, question, label, context, tuple(choices))


def _read_jsonl(
    path: Path, problems: _Problems, need_label: bool = True
) -> list[tuple[str, Example]]:
    """(``file:line``, example) of every good line; the bad ones go to ``problems``."""
    rows: list[tuple[str, Example]] = []
    seen: dict[str, int] = {}
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for who writes to it
            what = "a folder" if path.is_dir() else "a pipe or device"
            problems.add(str(path), f"expected a file of JSON lines, got {what}")
            return rows
        for number, line in _open_lines(path):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            parsed = _decode_row(line, need_label)
            if isinstance(parsed, str):
                problems.add(place, parsed)
            elif parsed.id in seen:
                problems.add(
                    place,
                    f"'id' must be new, got {_shorten(parsed.id)}, which is also on line {seen[parsed.id]}",
                )
            else:
                seen[parsed.id] = number
                rows.append((place, parsed))
    except (OSError, EOFError, zlib.error) as error:
        problems.add(str(path), f"expected a file that can be read, got: {error}")
        return rows
    if not rows and not problems.lines:
        problems.add(str(path), "expected one JSON object a line, got an empty file")
    return rows


def read_examples(path: str | Path, *, need_label: bool = False) -> list[Example]:
    """The examples of one file of JSON lines, plain or ``.gz``; keys as in :func:`load_files`.

    Args:
        path: The file.
        need_label: Whether every line must have a label.

    Raises:
        ValueError: The first ten bad lines, one a line, each with its file and line number; or the
            file is missing, damaged or empty.
    """
    problems = _Problems()
    rows = _read_jsonl(Path(path), problems, need_label)
    problems.raise_if_any()
    return [example for _, example in rows]


def _jsonl_files(folder: Path, words: tuple[str, ...]) -> list[Path]:
    """Files whose name says that they hold the split, such as ``obqa_train.jsonl.gz``."""
    pattern = re.compile(rf"(?:^|[_.-])(?:{'|'.join(words)})\.jsonl(?:\.gz)?$")
    return [path for path in sorted(folder.iterdir()) if pattern.search(path.name)]


def _one_file(folder: Path, words: tuple[str, ...], required: bool) -> Path | None:
    files = _jsonl_files(folder, words)
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:5])
        raise ValueError(
            f"load_files: expected one {words[0]} file in {folder}, got {names}; name the files"
        )
    if not files and required:
        raise ValueError(
            f"load_files: expected {words[0]}.jsonl or {words[0]}.jsonl.gz (or a name that ends "
            f"in _{words[0]}) in {folder}, got none"
        )
    return files[0] if files else None


def _dataset_name(path: Path) -> str:
    """``obqa`` for ``obqa_train.jsonl.gz``, the folder's name for ``train.jsonl``."""
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    stem = re.sub(r"[_.-]?(?:train|test|dev|validation|val)(?:[_.-][a-z]{1,2})?$", "", stem)
    return stem or path.resolve().parent.name


_TEMPLATE_NAMES: dict[str, Template] = {
    "winogrande": "winogrande",
    "wg": "winogrande",
    "arc": "arc",
    "obqa": "obqa",
    "openbookqa": "obqa",
    "boolq": "boolq",
    "mmlu": "mmlu",
}


def _template(name: str) -> Template | None:
    return _TEMPLATE_NAMES.get(re.split(r"[_-]", name.lower())[0])


def load_files(
    train: str | Path,
    test: str | Path | None = None,
    *,
    ood: Mapping[str, str | Path] | Sequence[str | Path] = (),
    label_names: Sequence[str] | None = None,
    train_size: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
    name: str | None = None,
) -> Task:
    """A task from files with one JSON object a line, plain or ``.gz``.

    Keys of a line: ``id`` (unique), ``question``, optional ``context``, ``choices`` (a list of
    strings) and ``label`` (an index from 0). Without ``choices``, or where all lines of training
    and test files have the same ones, the task is a classification, else multiple choice. Lines of
    out-of-distribution files may leave the label out.

    Everything is read and checked before anything else happens.

    Args:
        train: A file, or a folder with ``train.jsonl`` and possibly ``test.jsonl`` (also
            ``<anything>_train.jsonl.gz``; ``dev`` and ``validation`` serve as test files where
            there is no ``test``).
        test: The test file. Where there is none, 20 % of the training file by hash of the id.
        ood: Out-of-distribution files, by name or as a list (then named after the file).
        label_names: Names of the classes of a classification without choices; "0", "1", ...
            by default.
        train_size: Number of training examples, chosen by hash of id and seed; None for all.
        validation: Fraction of the training file split off for validation by hash of the id,
            before ``train_size`` is applied.
        seed: Chooses the training subset; splits do not depend on it.
        name: Name of the task; from the file name by default.

    Raises:
        ValueError: The first ten bad lines, one a line, each with its file and line number; an
            id in both training and test file; an out-of-distribution example that is one of theirs;
            labels out of range or with gaps; a fraction or size out of range; a file that is
            missing or cannot be told from the folder.
    """
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"validation: expected a fraction in [0, 1), got {validation!r}")
    train_path = Path(train)
    test_path = None if test is None else Path(test)
    if train_path.is_dir():
        folder = train_path
        found = _one_file(folder, ("train",), required=True)
        assert found is not None
        train_path = found
        if test_path is None:
            test_path = _one_file(folder, ("test",), required=False) or _one_file(
                folder, ("dev", "validation", "val"), required=False
            )
    if not isinstance(ood, Mapping):
        ood = {_dataset_name(Path(path)): path for path in ood}

    problems = _Problems()
    train_rows = _read_jsonl(train_path, problems)
    test_rows = [] if test_path is None else _read_jsonl(test_path, problems)
    ood_rows = {
        key: _read_jsonl(Path(path), problems, need_label=False) for key, path in ood.items()
    }
    train_places = {example.id: place for place, example in train_rows}
    for place, example in test_rows:
        if example.id in train_places:
            other = train_places[example.id]
            problems.add(
                place,
                f"'id' must be new, got {_shorten(example.id)}, which is also in the training data, {other}",
            )
    inside = {_content(example): place for place, example in train_rows + test_rows}
    for place, example in (row for part in ood_rows.values() for row in part):
        # Other data may count from 0 as well; the same text of the same id is the same example.
        if (twin := inside.get(_content(example))) is not None:
            problems.add(place, f"expected data of another kind, got the example of {twin}")
    problems.raise_if_any()

    kind, names = _kind_of(train_rows + test_rows, ood_rows, label_names, problems)
    problems.raise_if_any()
    if kind == "classification":
        # The choices of a classification are its classes, known from the task.
        train_rows, test_rows = _drop_choices(train_rows), _drop_choices(test_rows)
        ood_rows = {key: _drop_choices(rows) for key, rows in ood_rows.items()}
    task_name = name or _dataset_name(train_path)
    train_examples = [example for _, example in train_rows]
    if test_path is None:
        train_examples, test_examples = split_by_hash(train_examples, 0.2, "test")
    else:
        test_examples = [example for _, example in test_rows]
    train_examples, validation_examples = split_by_hash(train_examples, validation, "validation")
    return Task(
        name=task_name,
        kind=kind,
        label_names=names,
        train=choose_subset(train_examples, train_size, seed),
        validation=validation_examples,
        test=test_examples,
        ood={key: [example for _, example in rows] for key, rows in ood_rows.items()},
        template=_template(task_name),
    )


def _content(example: Example) -> tuple[str, str, str | None]:
    return example.id, example.question, example.context


def _drop_choices(rows: list[tuple[str, Example]]) -> list[tuple[str, Example]]:
    return [(place, replace(example, choices=())) for place, example in rows]


def _kind_of(
    rows: list[tuple[str, Example]],
    ood_rows: dict[str, list[tuple[str, Example]]],
    label_names: Sequence[str] | None,
    problems: _Problems,
) -> tuple[Kind, tuple[str, ...]]:
    """Kind and label names that fit all rows; what does not fit goes to ``problems``."""
    all_rows = rows + [row for part in ood_rows.values() for row in part]
    choice_sets = {example.choices for _, example in rows}
    if len(choice_sets) > 1:
        for place, example in all_rows:
            if not example.choices:
                problems.add(place, "'choices' is missing, but other lines have choices")
        if label_names is not None:
            problems.add("label_names", "expected None for multiple choice, got names")
        count = max(len(example.choices) for _, example in all_rows)
        return "multiple_choice", tuple(LETTERS[:count])
    shared = next(iter(choice_sets), ())
    if label_names is None and not shared:
        # Numbers are the only names: the largest says how many classes there are.
        labels = {example.label for _, example in rows if example.label is not None}
        count = next(label for label in range(len(labels) + 1) if label not in labels)
        for place, example in rows:
            if example.label is not None and example.label > count:
                problems.add(
                    place,
                    f"'label' must be 0, 1, ... without gaps, got {_shorten(example.label)} where no "
                    f"row has {count}; name all classes (label-names) where some have no example",
                )
                return "classification", ()
        names = tuple(str(label) for label in range(max(count, 2)))
    else:
        names = tuple(label_names if label_names is not None else shared)
    if label_names is not None and not (
        len(names) >= 2
        and all(isinstance(name, str) and name.strip() and is_unicode(name) for name in names)
        and len(set(names)) == len(names)
    ):
        problems.add(
            "label_names", f"expected two or more distinct names, got {_shorten(list(names))}"
        )
        return "classification", ()
    for place, example in all_rows:
        if example.label is not None and example.label >= len(names):
            problems.add(
                place,
                f"'label' must be below {len(names)}, the number of classes, got "
                f"{_shorten(example.label)}",
            )
        if example.choices not in (shared, ()):
            problems.add(
                place,
                f"'choices' must be those of the training data, {_shorten(list(shared))}, got "
                f"{_shorten(list(example.choices))}",
            )
    return "classification", names
