"""Tasks from files, and from data sets of the library ``datasets``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ...task import LETTERS, Example, Kind, Task, Template
from .rows import (
    NO_LABEL,
    SUFFIXES,
    Problems,
    Row,
    is_unicode,
    read_rows,
    rows_of,
    shown,
    whole_number,
)
from .splits import choose_subset, has_made_id, split_by_hash, test_note, validation_note

# What `save_to_disk` of the library datasets leaves in a folder.
_SAVED = ("dataset_dict.json", "dataset_info.json")
_TEST = ("test",)
_VALIDATION = ("dev", "validation", "val")
_OWN = ("train", "validation", "test")  # all but those out of distribution


def _files_of(folder: Path, words: tuple[str, ...]) -> list[Path]:
    """Files whose name says that they hold the split, such as ``obqa_train.jsonl.gz``."""
    ends = "|".join(re.escape(suffix) for suffix in SUFFIXES)
    pattern = re.compile(rf"(?:^|[_.-])(?:{'|'.join(words)})(?:{ends})(?:\.gz)?$")
    return [path for path in sorted(folder.iterdir()) if pattern.search(path.name)]


def _one_file(folder: Path, words: tuple[str, ...], required: bool) -> Path | None:
    files = _files_of(folder, words)
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:5])
        raise ValueError(
            f"load_files: expected one {words[0]} file in {folder}, got {names}; name the files"
        )
    if not files and required:
        raise ValueError(
            f"{folder}: expected a file {' or '.join(words[0] + end for end in SUFFIXES)} (plain or .gz, "
            f"or a name that ends in _{words[0]}) in this folder, got none"
        )
    return files[0] if files else None


def _dataset_name(path: Path) -> str:
    """``obqa`` for ``obqa_train.jsonl.gz``, the folder's name for ``train.jsonl``."""
    stem = path.name.removesuffix(".gz")
    for suffix in SUFFIXES:
        stem = stem.removesuffix(suffix)
    stem = re.sub(r"[_.-]?(?:train|test|dev|validation|val)(?:[_.-][a-z]{1,2})?$", "", stem)
    return stem or Path(os.path.realpath(path)).parent.name


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
    train: str | Path | Iterable[Mapping[str, Any]],
    test: str | Path | Iterable[Mapping[str, Any]] | None = None,
    *,
    ood: Mapping[str, str | Path | Iterable[Mapping[str, Any]]] | Sequence[str | Path] = (),
    label_names: Sequence[str] | None = None,
    train_size: int | None = None,
    validation: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    name: str | None = None,
) -> Task:
    """A task from files: JSON objects (``.jsonl``) or tables (``.csv``, ``.tsv``), plain or ``.gz``.

    A row has ``text`` (or ``question``) and ``label``: a number from 0, or the name of a class. Numbers
    that are all among ``label_names`` are names, as in a scale from 1 to 5.
    Optional are ``id`` (unique; made of the text where it is missing), ``context`` (a passage that the
    text refers to) and, in JSON lines, ``choices`` (a list of strings). The first line of a table
    names its columns. Without ``choices``, or where all rows of training and test files have the same
    ones, the task is a classification, else multiple choice, whose label may also be the letter or
    the text of a choice. Rows of out-of-distribution files may leave the label out.

    Rows that have no id and the same text are in one split.

    Everything is read and checked before anything else happens.

    Args:
        train: A file; or a folder with ``train.jsonl`` or the like and possibly ``test.jsonl`` (also
            ``<anything>_train.csv.gz``) and ``dev`` or ``validation``, which serves as test file where there
            is no ``test``; or a ``Dataset`` or ``DatasetDict`` of the library ``datasets``, or a folder that
            it saved; or a ``DataFrame`` of pandas, or a list of rows. A split ``test`` of a ``DatasetDict``
            whose labels are all -1 is left out.
        test: The test file or data set. Where there is none, ``test_fraction`` of the training rows.
        ood: Out-of-distribution files or data sets by name; or a list of files, which name them.
        label_names: Names of the classes of a classification without choices; by default those of a
            ``ClassLabel`` in its order, or of the file in alphabetical order, or "0", "1", ...
        train_size: Number of training examples, chosen by hash of id and seed; None for all.
        validation: Fraction of the training rows split off for validation by hash of the id,
            before ``train_size`` is applied; where the data have no validation split beside their test split.
        test_fraction: Fraction of the training rows split off for testing by hash of the id, where there
            are no test data; 1 tests on all rows.
        seed: Chooses the training subset; splits do not depend on it.
        name: Name of the task; from the file name by default.

    Raises:
        ValueError: The first ten bad rows, one a line, each with its file and line number; an
            id in two of the splits; an out-of-distribution example that is one of theirs;
            labels out of range or with gaps; a fraction or size out of range; a file that is
            missing or cannot be told from the folder.
        ImportError: The folder is one of ``datasets``, which is not installed (extra ``train``).
    """
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"validation: expected a fraction in [0, 1), got {validation!r}")
    if not 0.0 <= test_fraction <= 1.0:
        raise ValueError(f"test_fraction: expected a fraction in [0, 1], got {test_fraction!r}")
    name = name or (_dataset_name(Path(train)) if isinstance(train, str | Path) else "data")
    if not isinstance(ood, Mapping):
        ood = {_dataset_name(Path(path)): path for path in ood}
    train, held_out, test, notes = _splits(train, test, list(ood.values()))
    if test is None and test_fraction == 1.0:
        notes = ["all rows are for testing"]
    elif test is None:
        notes.append(test_note(test_fraction))
    if isinstance(train, Path):
        name = _dataset_name(train) if train.is_file() else name

    problems = Problems()
    train_rows = _read(train, "train", problems)
    test_rows = [] if test is None else _read(test, "test", problems)
    held_out_rows = [] if held_out is None else _read(held_out, "validation", problems)
    ood_rows = {
        key: _read(Path(rows) if isinstance(rows, str) else rows, key, problems, need_label=False)
        for key, rows in ood.items()
    }
    known: dict[str, tuple[str, str]] = {}
    for split, rows in (
        ("training", train_rows),
        ("validation", held_out_rows),
        ("test", test_rows),
    ):
        for place, example, _ in rows:
            if example.id in known:
                made = has_made_id(example)
                what = f"text must be new, got {shown(example.question)}" if made else ""
                what = what or f"'id' must be new, got {shown(example.id)}"
                other = "the {} data, {}".format(*known[example.id])
                hint = "; leave it out, or name the files themselves (--data, --test)" * (
                    held_out is not None
                )
                problems.add(place, f"{what}, which is also in {other}{hint}")
        known |= {row.example.id: (split, row.place) for row in rows}
    inside = {_content(row.example): row.place for row in train_rows + held_out_rows + test_rows}
    for place, example, _ in (row for part in ood_rows.values() for row in part):
        # Other data may count from 0 as well; the same text of the same id is the same example.
        if (twin := inside.get(_content(example))) is not None:
            problems.add(place, f"expected data of another kind, got the example of {twin}")
    problems.raise_if_any()

    parts = {"train": train_rows, "validation": held_out_rows, "test": test_rows}
    parts |= {f"ood {key}": rows for key, rows in ood_rows.items()}
    if label_names is None and not any(row.example.choices for row in train_rows):
        label_names = next(filter(None, _class_labels(train).values()), None)
    label_names = _name_labels(parts, label_names, problems)
    problems.raise_if_any()
    train_rows, held_out_rows, test_rows = (parts[split] for split in _OWN)
    ood_rows = {key: parts[f"ood {key}"] for key in ood_rows}
    kind, names = _kind_of(train_rows + held_out_rows + test_rows, ood_rows, label_names, problems)
    problems.raise_if_any()

    def examples(rows: Sequence[Row]) -> list[Example]:
        if kind == "multiple_choice":
            return [row.example for row in rows]
        # The choices of a classification are its classes, known from the task.
        return [replace(row.example, choices=()) for row in rows]

    train_examples = examples(train_rows)
    if test is None:
        train_examples, test_examples = split_by_hash(train_examples, test_fraction, "test")
    else:
        test_examples = examples(test_rows)
    if held_out is not None:
        validation_examples = examples(held_out_rows)
    else:
        train_examples, validation_examples = split_by_hash(
            train_examples, validation, "validation"
        )
        if validation_examples:
            notes.append(validation_note(validation))
    return Task(
        name=name,
        kind=kind,
        label_names=names,
        train=choose_subset(train_examples, train_size, seed),
        validation=validation_examples,
        test=test_examples,
        ood={key: examples(rows) for key, rows in ood_rows.items()},
        template=_template(name),
        notes=tuple(notes),
    )


class _Splits(NamedTuple):
    """A file's path each, or something to go through; validation and test data may be None."""

    train: Any
    validation: Any
    test: Any
    notes: list[str]


def _splits(train: Any, test: Any, ood: Sequence[Any]) -> _Splits:
    """What a folder or a DatasetDict holds; validation data are tested on where nothing else is.

    Beside test data, validation data that cannot be used are left out, as are files that are named otherwise.
    """
    notes: list[str] = []
    validation = None
    if isinstance(train, str | Path):
        train = Path(train)
        if train.is_dir() and any((train / name).is_file() for name in _SAVED):
            train = _load_from_disk(train)
        elif train.is_dir():
            folder, train = train, _one_file(train, ("train",), required=True)
            test = _one_file(folder, _TEST, required=False) if test is None else test
            validation = _validation_file(folder, [test, *ood], test is not None, notes)
    if isinstance(train, Mapping):  # a DatasetDict
        if "train" not in train:
            raise ValueError(f"load_files: expected a split train, got {', '.join(train)}")
        validation, own = (
            next((train[word] for word in words if word in train), None)
            for words in (_VALIDATION, _TEST)
        )
        if test is None and own is not None and _without_labels(own):
            notes.append("the split test has no labels: it is left out")
        elif test is None:
            test = own
        if test is not None and validation is not None and _without_labels(validation, empty=True):
            notes.append("the validation split has no labels: it is left out")
            validation = None
        train = train["train"]
    if test is None and validation is not None:
        notes.append("no test data: the validation data are tested on")
        test, validation = validation, None
    return _Splits(train, validation, Path(test) if isinstance(test, str) else test, notes)


def _validation_file(
    folder: Path, named: Sequence[Any], has_test: bool, notes: list[str]
) -> Path | None:
    # Not `Path.resolve`, which raises where links lead round.
    taken = [os.path.realpath(one) for one in named if isinstance(one, str | Path)]
    files = [path for path in _files_of(folder, _VALIDATION) if os.path.realpath(path) not in taken]
    if len(files) > 1 and has_test:
        names = ", ".join(path.name for path in files[:5])
        notes.append(f"expected one validation file, got {names}: they are left out")
        return None
    if len(files) > 1:
        return _one_file(folder, _VALIDATION, required=False)  # says so
    return files[0] if files else None


def _load_from_disk(folder: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"load_files: {str(folder)!r} was saved by the library datasets, which is not installed; "
            "run: pip install 'bayes-kernels[train]'"
        ) from None
    return datasets.load_from_disk(str(folder))


def _read(source: Any, name: str, problems: Problems, need_label: bool = True) -> list[Row]:
    """Every good row of a file or of a data set; the bad ones go to ``problems``."""
    if isinstance(source, Path):
        return read_rows(source, problems, need_label)
    if callable(getattr(source, "itertuples", None)):  # pandas, where NaN stands for nothing
        source = source.astype(object).where(source.notna(), None).to_dict("records")
    classes = _class_labels(source)
    if callable(getattr(source, "with_format", None)):  # whose rows may be tensors, or tables
        source = source.with_format(None)

    def named(row: Any) -> Any:
        found = dict(row) if isinstance(row, Mapping) else row
        for key, words in classes.items():
            number = whole_number(found.get(key)) if words else None
            if words and number is not None and 0 <= number < len(words):
                found[key] = words[number]
        return found

    rows = rows_of(((i, named(row)) for i, row in enumerate(source)), name, problems, need_label)
    if not rows and not problems.lines:
        problems.add(name, "expected a data set with rows, got an empty one")
    return rows


def _class_labels(source: Any) -> dict[str, Sequence[str] | None]:
    """The library's names of classes, which it stores as numbers, by column."""
    features = getattr(source, "features", None) or {}
    return {key: getattr(features.get(key), "names", None) for key in ("label", "labels")}


def _without_labels(rows: Any, *, empty: bool = False) -> bool:
    """Whether no row of a split says which class it is of, as where a public test keeps its labels back.

    Args:
        rows: The split.
        empty: What is said of none.
    """
    for row in rows.with_format(None) if hasattr(rows, "with_format") else rows:
        labels = [row.get(key) for key in ("label", "labels")] if isinstance(row, Mapping) else [0]
        if any(label is not None and whole_number(label) != NO_LABEL for label in labels):
            return False
        empty = True
    return empty


def _content(example: Example) -> tuple[str, str, str | None]:
    return example.id, example.question, example.context


def _written(row: Row) -> str | None:
    """The label as a table has it; None where there is none."""
    return str(row.example.label) if row.name is None and row.labelled else row.name


def _name_labels(
    parts: dict[str, list[Row]], label_names: Sequence[str] | None, problems: Problems
) -> Sequence[str] | None:
    """Replace names of classes in all parts by numbers; the names of the classes, if they are known.

    Names that are all numbers, as those of tables are, count as numbers; and numbers that are all among the
    names of the classes count as names.
    """
    choices = any(row.example.choices for rows in parts.values() for row in rows)
    if label_names is not None and not choices:
        inside = [_written(row) for split in _OWN for row in parts[split]]
        if set(inside) <= {*label_names, None}:
            for part, rows in parts.items():
                parts[part] = [row._replace(name=_written(row)) for row in rows]
    named = [row for rows in parts.values() for row in rows if row.name is not None]
    if not named:
        return label_names
    digits = all(re.fullmatch(r"\d{1,9}", row.name or "") for row in named)
    numbered = any(
        row.name is None and row.example.label is not None
        for rows in parts.values()
        for row in rows
    )
    own = sorted({row.name for split in _OWN for row in parts[split] if row.name})
    names = list(own if label_names is None else label_names)
    plain = digits and not choices and (label_names is None or not set(own) <= set(label_names))
    if numbered and not choices and not plain:
        for row in named:
            problems.add(
                row.place,
                f"'label' must be an integer from 0 as in other rows, got {shown(row.name)}",
            )
        return label_names

    def number(row: Row) -> int | None:
        if row.name is None:
            return row.example.label
        if row.example.choices:
            letters = list(LETTERS[: len(row.example.choices)])
            for words in (letters, list(row.example.choices)):
                if row.name in words:
                    return words.index(row.name)
            allowed = [*letters, *row.example.choices]
        elif row.name in names:
            return names.index(row.name)
        else:
            allowed = names
        problems.add(
            row.place, f"'label' must be one of {shown(', '.join(allowed))}, got {shown(row.name)}"
        )
        return None

    for part, rows in parts.items():
        parts[part] = [
            row._replace(
                example=replace(
                    row.example,
                    label=int(row.name) if plain and row.name is not None else number(row),
                )
            )
            for row in rows
        ]
    return label_names if plain or choices else names


def _kind_of(
    rows: list[Row],
    ood_rows: dict[str, list[Row]],
    label_names: Sequence[str] | None,
    problems: Problems,
) -> tuple[Kind, tuple[str, ...]]:
    """Kind and label names that fit all rows; what does not fit goes to ``problems``."""
    all_rows = rows + [row for part in ood_rows.values() for row in part]
    choice_sets = {example.choices for _, example, _ in rows}
    if len(choice_sets) > 1:
        for place, example, _ in all_rows:
            if not example.choices:
                problems.add(place, "'choices' is missing, but other lines have choices")
        if label_names is not None:
            problems.add("label_names", "expected None for multiple choice, got names")
        count = max(len(example.choices) for _, example, _ in all_rows)
        return "multiple_choice", tuple(LETTERS[:count])
    shared = next(iter(choice_sets), ())
    if label_names is None and not shared:
        # Numbers are the only names: the largest says how many classes there are.
        labels = {example.label for _, example, _ in rows if example.label is not None}
        count = next(label for label in range(len(labels) + 1) if label not in labels)
        for place, example, _ in rows:
            if example.label is not None and example.label > count:
                problems.add(
                    place,
                    f"'label' must be 0, 1, ... without gaps, got {shown(example.label)} where no "
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
            "label_names", f"expected two or more distinct names, got {shown(list(names))}"
        )
        return "classification", ()
    for place, example, _ in all_rows:
        if example.label is not None and example.label >= len(names):
            problems.add(
                place,
                f"'label' must be below {len(names)}, the number of classes, got "
                f"{shown(example.label)}",
            )
        if example.choices not in (shared, ()):
            problems.add(
                place,
                f"'choices' must be those of the training data, {shown(list(shared))}, got "
                f"{shown(list(example.choices))}",
            )
    return "classification", names
