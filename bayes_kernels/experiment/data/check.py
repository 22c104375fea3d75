"""What was understood of data: `bayes-kernels data check`."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence

from ...table import Table
from ...task import Example, Task
from .splits import has_made_id

# Fewer labelled rows than these say little about a model's calibration.
FEW_TEST, FEW_TRAIN = 100, 50


def describe(task: Task) -> str:
    """Rows, classes, lengths, duplicates, an example and what is missing, for people.

    Args:
        task: The task, with all training examples.
    """
    parts = [f"{task.name}: {task.kind.replace('_', ' ')}, {task.n_classes} classes", ""]
    parts.append(_sizes(task).text())
    if task.kind == "classification":
        parts.append(_classes(task).text())
    first = next(iter(task.train or task.test))
    lines = ["first training example:", *_shown(task, first)]
    parts.append("\n".join(lines) + "\n")
    parts += [f"note: {line}" for line in _notes(task)]
    parts += [f"warning: {line}" for line in _warnings(task)]
    return "\n".join(parts).rstrip()


def _sizes(task: Task) -> Table:
    """Rows by split, and their lengths in words."""
    rows = []
    for split, examples in task.splits.items():
        lengths = sorted(len(example.text.split()) for example in examples)
        words = [str(lengths[len(lengths) // 2]), str(lengths[-1])] if lengths else ["–", "–"]
        rows.append([split, str(len(examples)), *words])
    return Table("", ["split", "rows", "words, median", "longest"], rows)


def _classes(task: Task) -> Table:
    """Rows by class and split."""
    counts = task.class_counts()
    rows = [
        [name, *(str(found[label]) for found in counts.values())]
        for label, name in enumerate(task.label_names)
    ]
    return Table("", ["class", *counts], rows)


def _shown(task: Task, example: Example) -> Iterator[str]:
    pairs = [("id", example.id), ("context", example.context), ("text", example.question)]
    pairs += [("choices", ", ".join(example.choices) or None)]
    if example.label is not None:
        pairs.append(("label", f"{example.label} ({task.label_names[example.label]})"))
    for name, value in pairs:
        if value is not None:
            text = textwrap.shorten(value, 300, placeholder=" …")
            yield textwrap.fill(text, 96, initial_indent=f"  {name}: ", subsequent_indent="    ")


def _notes(task: Task) -> Iterator[str]:
    """What is missing, and what is done about it."""
    inside = [*task.train, *task.validation, *task.test]
    if any(has_made_id(example) for example in inside):
        yield "no id: ids are made of the texts, which also decide their split"
    yield from task.notes
    if not task.ood:
        yield "no out-of-distribution data: name a file with --ood to see whether foreign texts are found"
    if not any(example.context for example in inside):
        yield "no context: the text is all that the model sees"


def _warnings(task: Task) -> Iterator[str]:
    texts: dict[tuple[str, tuple[str, ...]], set[int | None]] = defaultdict(set)
    inside = [*task.train, *task.validation, *task.test]
    for example in inside:
        texts[example.text, example.choices].add(example.label)
    if repeated := len(inside) - len(texts):
        clashing = sum(len(labels) > 1 for labels in texts.values())
        clash = f"; {clashing} of these texts have different labels" if clashing else ""
        yield f"{repeated} rows repeat the text of another row{clash}"
        if shared := repeated_in_test(task):
            yield f"{shared} test rows have the text of a training row: their scores are too good"
    if len(task.test) < FEW_TEST:
        yield f"{len(task.test)} test rows: an ECE of so few is mostly chance"
    if len(task.train) < FEW_TRAIN:
        yield f"{len(task.train)} training rows: fewer than {FEW_TRAIN} teach little"
    if not any(example.label is not None for example in task.validation):
        yield "no validation row: temperatures, priors and early choices need some; more data give some"
    yield from task.warnings()


def repeated_in_test(task: Task) -> int:
    """Number of test examples whose text (and choices) is that of a training or validation example."""

    def keys(examples: Sequence[Example]) -> list[tuple[str, tuple[str, ...]]]:
        return [(example.text, example.choices) for example in examples]

    known = {*keys(task.train), *keys(task.validation)}
    return sum(key in known for key in keys(task.test))
