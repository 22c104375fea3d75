"""Tasks: real text with labels, in splits that never change.

A :class:`Task` is what every experiment in this package runs on: training, validation and test
examples, names of the classes, and out-of-distribution sets. It comes from one of three places.

``stdlib_docs()``
    Docstrings of the running interpreter's own standard library, sorted into eight areas. Needs no
    download, so that a complete Bayesian fine-tuning run works on any machine that has Python.
``load_jsonl(path)``
    Files with one JSON object a line: ``id``, ``question``, optional ``context``, ``choices``
    (multiple choice only) and ``label`` (an index from 0).
``load_hub(name)``
    The public data sets of the LoRA-uncertainty papers, through the ``datasets`` library.

``load_task(name_or_path)`` takes any of them.

Every split is decided by a hash of the example (never by its position), so it does not depend on
the order of the files, on the platform or on a random number generator. A small training subset
(``train_size``) is chosen by a hash of the example and the seed: what makes plain LoRA
overconfident, and hence what uncertainty methods are compared on, is a few hundred rows.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bayes_kernels.hf.docstrings import AREAS, LIBRARIES, library_corpus, normalise, stdlib_corpus

Kind = Literal["classification", "multiple_choice"]
Template = Literal["winogrande", "arc", "obqa", "boolq", "mmlu"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Example:
    """One labelled text.

    Attributes:
        id: Unique in its split.
        question: The text to classify, or the question of a multiple-choice example.
        label: Index of the class or of the right choice; None in out-of-distribution sets whose
            examples belong to no class of the task.
        context: A passage that the question refers to.
        choices: The candidate answers, for multiple choice only; their number may vary.
    """

    id: str
    question: str
    label: int | None
    context: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Context and question as one text."""
        return self.question if self.context is None else f"{self.context}\n{self.question}"


@dataclass(frozen=True)
class Task:
    """Examples in splits, and what their labels mean.

    Attributes:
        name: Short name, for reports and file names.
        kind: ``"classification"``: every example has the same classes, ``label_names``;
            ``"multiple_choice"``: every example brings its own ``choices``.
        label_names: Class names; for multiple choice the letters A, B, ... up to the largest
            number of choices.
        train, validation, test: Disjoint lists of examples.
        ood: Out-of-distribution sets by name. Labels may be None there.
        template: Which published prompt fits the data; None for data of the user's own.
    """

    name: str
    kind: Kind
    label_names: tuple[str, ...]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    ood: dict[str, list[Example]] = field(default_factory=dict)
    template: Template | None = None

    @property
    def n_classes(self) -> int:
        """C, the width of the logits."""
        return len(self.label_names)

    @property
    def splits(self) -> dict[str, list[Example]]:
        """Every list of examples by name: train, validation, test, then the ``ood`` sets."""
        return {
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
            **self.ood,
        }

    def class_counts(self) -> dict[str, list[int]]:
        """Examples per class, ``[count of label 0, ...]``, for every split (unlabelled: none)."""
        counts = {}
        for split, examples in self.splits.items():
            counter = Counter(example.label for example in examples)
            counts[split] = [counter[label] for label in range(self.n_classes)]
        return counts

    def warnings(self) -> list[str]:
        """What training on this task would be told too late: classes without examples."""
        if not self.train:
            return []
        trained = {example.label for example in self.train if example.label is not None}
        tested = {example.label for example in self.test if example.label is not None}
        found = []
        if len(trained) == 1:
            (only,) = trained
            found.append(f"every training example has label {only}; a model learns nothing else")
        if unseen := sorted(tested - trained):
            names = ", ".join(self.label_names[label] for label in unseen[:5])
            more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
            found.append(f"test examples of {names}{more} have no training example of their class")
        if self.kind == "classification":
            empty = [label for label in range(self.n_classes) if label not in trained | tested]
            if empty:
                names = ", ".join(self.label_names[label] for label in empty[:5])
                more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
                found.append(f"no training or test example is of class {names}{more}")
        return [f"{self.name}: {line}" for line in found]

    def summary(self) -> str:
        """One line per split: size and, for classification, the share of its largest class."""
        lines = [f"{self.name}: {self.kind}, {self.n_classes} classes"]
        for split, counts in self.class_counts().items():
            labelled = sum(counts)
            line = f"  {split}: {len(self.splits[split])} examples"
            if labelled and self.kind == "classification":
                largest = max(range(self.n_classes), key=counts.__getitem__)
                share = counts[largest] / labelled
                line += f", largest class {self.label_names[largest]!r} {share:.1%}"
            lines.append(line)
        return "\n".join(lines)


def _hash(text: str) -> int:
    """A 64-bit integer that depends on the text alone (Python's own ``hash`` is salted)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return _hash(text) / 2.0**64


def choose_subset(examples: Sequence[Example], size: int | None, seed: int = 0) -> list[Example]:
    """The ``size`` examples that come first in the order of a hash of the seed and the id.

    Nested: with the same seed a smaller subset is part of a larger one. ``None`` keeps all, in
    the same shuffled order.

    Raises:
        ValueError: ``size`` is not positive or there are fewer examples.
    """
    if size is not None and not 0 < size <= len(examples):
        raise ValueError(
            f"train_size: expected an integer from 1 to {len(examples)} (the training examples "
            f"there are) or None for all, got {size!r}"
        )
    return sorted(examples, key=lambda example: _hash(f"{seed}\n{example.id}"))[:size]


# --- Documentation of the standard library -------------------------------------------------------


def stdlib_docs(
    seed: int = 0,
    *,
    train_size: int | None = 400,
    ood_size: int = 1000,
) -> Task:
    """Docstrings of Python's standard library, classified into eight areas.

    About 5,000 texts (the number follows the interpreter's version): the first paragraph of the
    docstring of each public function, class and method, one area per text. Texts that are equal
    up to case and punctuation count once, and a text found in two areas is left out. Names of
    modules are masked, see :func:`bayes_kernels.hf.docstrings.first_paragraph`. Out of
    distribution (``ood["numpy_torch"]``, without labels): the same extraction from numpy and
    torch, half from each. Takes a few seconds at the first call, which the process remembers.

    Splits by hash of the text: 20 % test, 10 % validation, the rest for training, of which
    ``train_size`` are chosen by ``seed``. Deterministic for a given interpreter, numpy and torch.

    Args:
        seed: Chooses the training subset; splits do not depend on it.
        train_size: Number of training examples; None for all of them.
        ood_size: Number of out-of-distribution texts (fewer if the libraries have fewer).

    Raises:
        ValueError: ``train_size`` is out of range, or the interpreter has no sources.
    """
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    texts = set()
    for name, text, area in stdlib_corpus():
        key = normalise(text)
        texts.add(key)
        position = _fraction(f"stdlib-docs, second split\n{key}")
        split = "test" if position < 0.2 else "validation" if position < 0.3 else "train"
        parts[split].append(_doc_example(name, text, key, area))
    ood: list[Example] = []
    for library in sorted(LIBRARIES):
        found = [
            _doc_example(name, text, key, None)
            for name, text in library_corpus(library)
            if (key := normalise(text)) not in texts
        ]
        ood += choose_subset(found, min(len(found), (ood_size + 1) // 2)) if found else []
    return Task(
        name="stdlib-docs",
        kind="classification",
        label_names=tuple(AREAS),
        train=choose_subset(parts["train"], train_size, seed),
        validation=parts["validation"],
        test=parts["test"],
        ood={"numpy_torch": ood[:ood_size]},
    )


def _doc_example(name: str, text: str, key: str, label: int | None) -> Example:
    return Example(id=f"{name}#{_hash(key):016x}", question=text, label=label)


# --- Files of JSON lines -------------------------------------------------------------------------

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
    """The examples of one file of JSON lines, plain or ``.gz``; keys as in :func:`load_jsonl`.

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
            f"load_jsonl: expected one {words[0]} file in {folder}, got {names}; name the files"
        )
    if not files and required:
        raise ValueError(
            f"load_jsonl: expected {words[0]}.jsonl or {words[0]}.jsonl.gz (or a name that ends "
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


def load_jsonl(
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


def split_by_hash(
    examples: Iterable[Example], fraction: float, purpose: str
) -> tuple[list[Example], list[Example]]:
    """(rest, part): the examples whose hash of ``purpose`` and id is below ``fraction``.

    Whether an example is in the part depends on its id alone, not on the other examples.
    """
    rest: list[Example] = []
    part: list[Example] = []
    for example in examples:
        (part if _fraction(f"{purpose}\n{example.id}") < fraction else rest).append(example)
    return rest, part


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


# --- Data sets of the Hugging Face hub -----------------------------------------------------------


def convert_winogrande(row: Mapping[str, Any], index: int) -> Example:
    """A row of ``allenai/winogrande``: sentence, option1, option2, answer ("1", "2" or "")."""
    answer = str(row["answer"])
    return Example(
        id=f"winogrande-{_hash(row['sentence']):016x}",
        question=row["sentence"],
        label=int(answer) - 1 if answer in ("1", "2") else None,
        choices=(row["option1"], row["option2"]),
    )


def _convert_lettered(row: Mapping[str, Any], question: str) -> Example:
    """Rows with ``choices = {"text": [...], "label": [...]}`` and the right label's name."""
    labels = [str(label) for label in row["choices"]["label"]]
    key = str(row["answerKey"])
    if key and key not in labels:
        raise ValueError(f"answerKey: expected one of {labels} or '', got {key!r} in {row['id']!r}")
    return Example(
        id=str(row["id"]),
        question=row[question],
        label=labels.index(key) if key else None,
        choices=tuple(row["choices"]["text"]),
    )


def convert_arc(row: Mapping[str, Any], index: int) -> Example:
    """A row of ``allenai/ai2_arc``: id, question, choices {text, label}, answerKey.

    Labels are "A" to "E" in some rows and "1" to "5" in others.
    """
    return _convert_lettered(row, "question")


def convert_obqa(row: Mapping[str, Any], index: int) -> Example:
    """A row of ``allenai/openbookqa``: id, question_stem, choices {text, label}, answerKey."""
    return _convert_lettered(row, "question_stem")


def convert_boolq(row: Mapping[str, Any], index: int) -> Example:
    """A row of ``google/boolq``: question, passage, answer (a Boolean). Classes: false, true."""
    return Example(
        id=f"boolq-{_hash(row['question'] + chr(10) + row['passage']):016x}",
        question=row["question"],
        label=int(bool(row["answer"])),
        context=row["passage"],
    )


def convert_mmlu(row: Mapping[str, Any], index: int) -> Example:
    """A row of ``cais/mmlu``: question, subject, choices (four strings), answer (an index)."""
    return Example(
        id=f"{row['subject']}-{index}",
        question=row["question"],
        label=int(row["answer"]),
        choices=tuple(row["choices"]),
    )


@dataclass(frozen=True)
class HubDataset:
    """Where a data set lies on the hub and how its rows become examples."""

    repository: str
    configuration: str | None
    convert: Callable[[Mapping[str, Any], int], Example]
    template: Template
    train_split: str | None = "train"
    # The split with public labels that the papers report on.
    test_split: str = "test"
    label_names: tuple[str, ...] | None = None


_ARC, _WINOGRANDE, _MMLU = "allenai/ai2_arc", "allenai/winogrande", "cais/mmlu"

HUB_DATASETS: dict[str, HubDataset] = {
    "wg_s": HubDataset(
        _WINOGRANDE, "winogrande_s", convert_winogrande, "winogrande", test_split="validation"
    ),
    "wg_m": HubDataset(
        _WINOGRANDE, "winogrande_m", convert_winogrande, "winogrande", test_split="validation"
    ),
    "arc_c": HubDataset(_ARC, "ARC-Challenge", convert_arc, "arc"),
    "arc_e": HubDataset(_ARC, "ARC-Easy", convert_arc, "arc"),
    "obqa": HubDataset("allenai/openbookqa", "main", convert_obqa, "obqa"),
    "boolq": HubDataset(
        "google/boolq",
        None,
        convert_boolq,
        "boolq",
        test_split="validation",
        label_names=("false", "true"),
    ),
    "mmlu_chem": HubDataset(_MMLU, "college_chemistry", convert_mmlu, "mmlu", train_split=None),
    "mmlu_phys": HubDataset(_MMLU, "college_physics", convert_mmlu, "mmlu", train_split=None),
}

# The "small shift" and "large shift" sets of the papers, for models trained on OpenBookQA.
_HUB_OOD = {"obqa": ("arc_c", "arc_e", "mmlu_chem", "mmlu_phys")}


def convert_rows(
    rows: Iterable[Mapping[str, Any]], convert: Callable[[Mapping[str, Any], int], Example]
) -> list[Example]:
    """The examples of a split; a repeated id keeps its first example."""
    found: dict[str, Example] = {}
    for index, row in enumerate(rows):
        example = convert(row, index)
        found.setdefault(example.id, example)
    return list(found.values())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


def _hub_rows(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a split, through the ``datasets`` library and its cache."""
    entry = HUB_DATASETS[name]
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"load_hub: {name!r} needs the library datasets; "
            "run: pip install 'bayes-kernels[train]'"
        ) from None
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        # Without this question the library retries for half a minute before it uses its cache.
        huggingface_hub.HfApi().dataset_info(entry.repository, timeout=10)
        reason = ""
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        datasets.config.HF_HUB_OFFLINE = True
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            entry.repository, entry.configuration, split=split
        )
        return rows
    except Exception as error:
        # A dozen types are raised here (connection, missing cache, errors of the hub); all mean
        # the same to the user, and none of the tracebacks helps.
        reason = reason or f"{type(error).__name__}: {_first_line(error)}"
        raise ConnectionError(
            f"load_hub: {name!r} ({entry.repository}) is neither reachable nor in the cache "
            f"({reason}); connect to the hub once, or pass a JSONL file or folder instead, or "
            "use stdlib-docs, which needs no download"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def load_hub(
    name: str,
    *,
    ood: Sequence[str] | None = None,
    train_size: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> Task:
    """A public data set of the LoRA-uncertainty papers, through the ``datasets`` library.

    Names: wg_s, wg_m (WinoGrande), arc_c, arc_e, obqa, boolq, and the test-only sets mmlu_chem,
    mmlu_phys. The test examples are those of the public split with labels (for WinoGrande and
    BoolQ the hub's validation split); validation examples are split off the training data by hash.

    Args:
        name: One of the names above.
        ood: Names of out-of-distribution sets (their test splits); for obqa arc_c, arc_e,
            mmlu_chem and mmlu_phys by default, else none.
        train_size, validation, seed: As in :func:`load_jsonl`.

    Raises:
        ValueError: Unknown name, or sets of different kinds.
        ImportError: The ``datasets`` library is not installed (extra ``train``).
        ConnectionError: The hub cannot be reached and its cache has no copy.
    """
    names = _HUB_OOD.get(name, ()) if ood is None else tuple(ood)
    for wanted in (name, *names):
        if wanted not in HUB_DATASETS:
            raise ValueError(f"load_hub: expected one of {', '.join(HUB_DATASETS)}, got {wanted!r}")
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"validation: expected a fraction in [0, 1), got {validation!r}")
    entry = HUB_DATASETS[name]
    for wanted in names:
        if HUB_DATASETS[wanted].label_names != entry.label_names:
            raise ValueError(
                f"load_hub: ood set {wanted!r} must be of the kind of {name!r} (multiple choice "
                "or true/false), it is not"
            )

    def read(key: str, split: str) -> list[Example]:
        return convert_rows(_hub_rows(key, split), HUB_DATASETS[key].convert)

    train = read(name, entry.train_split) if entry.train_split else []
    test = read(name, entry.test_split)
    known = {example.id for example in test}
    train = [example for example in train if example.id not in known]
    ood_sets = {key: read(key, HUB_DATASETS[key].test_split) for key in names}
    train, held_out = split_by_hash(train, validation, "validation")
    if entry.label_names is None:
        everything = [*train, *held_out, *test, *(e for part in ood_sets.values() for e in part)]
        count = max(len(example.choices) for example in everything)
        label_names = tuple(LETTERS[:count])
    else:
        label_names = entry.label_names
    return Task(
        name=name,
        kind="multiple_choice" if entry.label_names is None else "classification",
        label_names=label_names,
        train=choose_subset(train, train_size, seed) if train or train_size else [],
        validation=held_out,
        test=test,
        ood=ood_sets,
        template=entry.template,
    )


def load_task(name_or_path: str | Path, **options: Any) -> Task:
    """A task by name or from a JSONL file or folder.

    Names are ``stdlib-docs`` and those of :func:`load_hub`. Options go to :func:`stdlib_docs`,
    :func:`load_hub` or :func:`load_jsonl`. A path that exists wins over a name.

    Raises:
        ValueError: Neither a known name nor an existing path.
    """
    text = str(name_or_path)
    if os.path.exists(text):
        return load_jsonl(text, **options)
    if text.replace("_", "-") == "stdlib-docs":
        return stdlib_docs(**options)
    if text in HUB_DATASETS:
        return load_hub(text, **options)
    raise ValueError(
        f"data: expected stdlib-docs, one of {', '.join(HUB_DATASETS)}, or a JSONL file or folder "
        f"that exists, got {text!r}"
    )
