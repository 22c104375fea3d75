"""Rows of files: JSON lines, CSV and TSV, plain or ``.gz``; and of data sets of the library ``datasets``."""

from __future__ import annotations

import csv
import gzip
import io
import json
import operator
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ...task import LETTERS, Example
from .splits import content_id

_MAX_PROBLEMS = 10
# How columns of tables are divided, by the end of the file's name.
_TAB = "\t"
SEPARATORS = {".csv": ",", ".tsv": _TAB}
LINES = ".jsonl"
SUFFIXES = (LINES, *SEPARATORS)
# Other names of the columns, those of most public data sets among them.
_TEXT = ("question", "text", "sentence")
_LABEL = ("label", "labels")
# What public data sets write where the label is held back.
NO_LABEL = -1


class Problems:
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


class Row(NamedTuple):
    """One row that has been read.

    Attributes:
        place: ``file:line``.
        example: Its label is None where there is none, or a name stands for it.
        name: The name of its class, where the file names classes.
    """

    place: str
    example: Example
    name: str | None = None

    @property
    def labelled(self) -> bool:
        """Whether it says which class it is of."""
        return self.example.label is not None or self.name is not None


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- From a row to an example --------------------------------------------------------------------


class _Bad(Exception):
    """What is wrong with a row."""


def _refuse(message: str) -> NoReturn:
    raise _Bad(message)


def _parse(row: object, need_label: bool) -> tuple[Example, str | None]:
    """The example in one decoded row, and the name of its class where it has a name."""
    if not isinstance(row, Mapping):
        _refuse(f"expected a JSON object, got {shown(row)}")
    key, question = _one(row, _TEXT)
    if not (isinstance(question, str) and question.strip()):
        if key is None:
            _refuse(f"expected 'text' or 'question', got {shown(', '.join(map(str, row)))}")
        _refuse(f"{key!r} must be a non-empty string, got {shown(question)}")
    context = row.get("context")
    if context is not None and not isinstance(context, str):
        _refuse(f"'context' must be a string, got {shown(context)}")
    choices = row.get("choices")
    if choices is None:
        choices = []
    elif not (
        isinstance(choices, list)
        and 2 <= len(choices) <= len(LETTERS)
        and all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        _refuse(f"'choices' must be a list of 2 to 26 non-empty strings, got {shown(choices)}")
    identity = row.get("id")
    if identity is None:
        identity = content_id(question, context)
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    if not (isinstance(identity, str) and identity):
        _refuse(f"'id' must be a non-empty string or an integer, got {shown(identity)}")
    label_key, label = _one(row, _LABEL)
    name = label if isinstance(label, str) else None
    number = whole_number(label)
    texts: dict[str | None, list[str | None]] = {
        "id": [identity],
        key: [question],
        "context": [context],
        "choices": choices,
    }
    texts[label_key] = [name]
    for column, words in texts.items():
        for text in words:
            if isinstance(text, str) and not is_unicode(text):
                _refuse(f"{column!r} must be Unicode text, got a lone surrogate in {shown(text)}")
    example = Example(identity, question, None, context, tuple(choices))
    if (label is None or name == "" or number == NO_LABEL) and not need_label:
        return example, None
    if name is not None and name.strip():
        return example, name.strip()
    if number is None or number < 0:
        hint = ", which stands for no label; leave such rows out" if number == NO_LABEL else ""
        _refuse(f"'label' must be an integer from 0, or a name, got {shown(label)}{hint}")
    if choices and number >= len(choices):
        _refuse(f"'label' must be below the number of choices, {len(choices)}, got {number}")
    return replace(example, label=number), None


def whole_number(value: object) -> int | None:
    """An integer of Python, NumPy or torch as one of Python; None for anything else."""
    if isinstance(value, bool | str) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array
        return None


def _one(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str | None, Any]:
    """The first of some columns that a row has, and its value."""
    found = [name for name in names if row.get(name) is not None]
    if len(found) > 1:
        _refuse(f"expected one of {' and '.join(map(repr, found))}, got both")
    return (
        (found[0], row[found[0]]) if found else (next((n for n in names if n in row), None), None)
    )


# --- From files to rows --------------------------------------------------------------------------


def _lines(stream: io.BufferedReader, hint: str) -> Iterator[tuple[int, object | _Bad]]:
    """(number, decoded JSON) of every line; the hint ends what is said of a first line that is none."""
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        found: object | _Bad
        try:
            found = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        except json.JSONDecodeError as error:
            found = _Bad(f"expected JSON, got {error.msg} at column {error.colno}")
        except UnicodeDecodeError as error:
            found = _Bad(f"expected UTF-8, got {error.reason} at byte {error.start}")
        except ValueError as error:  # an integer of thousands of digits
            found = _Bad(f"expected JSON that can be read, got: {error}")
        except RecursionError:
            found = _Bad("expected a flat JSON object, got lists or objects nested too deep")
        if isinstance(found, _Bad) and number == 1:
            found = _Bad(f"{found}{hint}")
        yield number, found


def _columns(
    stream: io.BufferedReader, separator: str, need_label: bool
) -> Iterator[tuple[int, object | _Bad]]:
    """(number of the last line, cells by column) of every row of a table; its first row names them."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=separator)
    try:
        head = [name.strip() for name in next(reader, [])]
        if len(set(head)) < len(head):
            twice = next(name for name, count in Counter(head).items() if count > 1)
            yield 1, _Bad(f"expected a name for each column, got {shown(twice)} twice")
            return
        wanted = (_TEXT, _LABEL) if need_label else (_TEXT,)
        if head and not all(set(head) & set(names) for names in wanted):
            divided = ""
            if len(head) == 1:
                divided = f", divided by {'tabs' if separator == _TAB else 'commas'}"
            yield (
                1,
                _Bad(
                    f"expected columns text and label in the first line{divided}, got {shown(head)}"
                ),
            )
            return
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(head):
                open_mark = any("\n" in cell for cell in cells)
                hint = "; a quotation mark above may lack its end" if open_mark else ""
                yield reader.line_num, _Bad(f"expected {len(head)} columns, got {len(cells)}{hint}")
                continue
            # An empty cell is a missing one.
            yield (
                reader.line_num,
                {k: v if v.strip() else None for k, v in zip(head, cells, strict=True)},
            )
    except UnicodeDecodeError as error:
        # It decodes many lines at once.
        stream.seek(0)
        lines = enumerate(stream, start=1)
        number = next((i for i, line in lines if not _is_utf8(line)), reader.line_num + 1)
        yield number, _Bad(f"expected UTF-8, got {error.reason}; save the file as UTF-8")
    except csv.Error as error:
        yield reader.line_num, _Bad(f"expected a table that can be read, got: {error}")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def kind_of(path: Path) -> str:
    """The ending that says what a file is: one of `SUFFIXES`; anything else is JSON lines."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in SEPARATORS else LINES


def _ending_hint(path: Path) -> str:
    """What to say of a file whose name says nothing of what it is, and which is no JSON."""
    if Path(path.name.removesuffix(".gz")).suffix.lower() in (LINES, ".json"):
        return ""
    return "; a file is read as JSON lines unless its name ends in .csv or .tsv"


def read_rows(path: Path, problems: Problems, need_label: bool = True) -> list[Row]:
    """Every good row of a file; the bad ones go to ``problems``."""
    kind = kind_of(path)
    what = "a table" if kind in SEPARATORS else "JSON lines"
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for who writes to it
            other = "a folder" if path.is_dir() else "a pipe or device"
            problems.add(str(path), f"expected a file of {what}, got {other}")
            return []
        opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as stream:
            separator = SEPARATORS.get(kind)
            decoded = (
                _lines(stream, _ending_hint(path))
                if separator is None
                else _columns(stream, separator, need_label)
            )
            rows = rows_of(decoded, str(path), problems, need_label)
    except (OSError, EOFError, zlib.error) as error:
        problems.add(str(path), f"expected a file that can be read, got: {error}")
        return []
    if not rows and not problems.lines:
        each = "a row for each text" if kind in SEPARATORS else "one JSON object a line"
        problems.add(str(path), f"expected {each}, got an empty file")
    return rows


def rows_of(
    decoded: Iterable[tuple[int, object]], name: str, problems: Problems, need_label: bool = True
) -> list[Row]:
    """Rows of something, by their numbers there; a repeated text without an id gets one of its own."""
    rows: list[Row] = []
    seen: dict[str, int] = {}
    times: Counter[str] = Counter()
    for number, content in decoded:
        place = f"{name}:{number}"
        try:
            if isinstance(content, _Bad):
                raise content
            example, label_name = _parse(content, need_label)
        except _Bad as bad:
            problems.add(place, str(bad))
            continue
        if isinstance(content, Mapping) and content.get("id") is None:
            times[example.id] += 1
            if times[example.id] > 1:
                example = replace(example, id=f"{example.id}-{times[example.id]}")
        if example.id in seen:
            problems.add(
                place,
                f"'id' must be new, got {shown(example.id)}, which is also on line "
                f"{seen[example.id]}",
            )
            continue
        seen[example.id] = number
        rows.append(Row(place, example, label_name))
    return rows


def read_examples(path: str | Path, *, need_label: bool = False) -> list[Example]:
    """The examples of one file; names of classes are not read.

    Args:
        path: The file, see :func:`bayes_kernels.experiment.data.files.load_files`.
        need_label: Whether every row must have a label.

    Raises:
        ValueError: The first ten bad rows, one a line, each with its file and line number; or the
            file is missing, damaged or empty.
    """
    problems = Problems()
    rows = read_rows(Path(path), problems, need_label)
    problems.raise_if_any()
    return [row.example for row in rows]
