"""A task: real text with labels, in splits that never change.

A :class:`Task` is what every experiment in this package runs on, and what the input of a model is made
for: training, validation and test examples, names of the classes, and out-of-distribution sets.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

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
        notes: Where test and validation examples come from, for people.
    """

    name: str
    kind: Kind
    label_names: tuple[str, ...]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    ood: dict[str, list[Example]] = field(default_factory=dict)
    template: Template | None = None
    notes: tuple[str, ...] = ()

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

    @functools.cached_property
    def digest(self) -> str:
        """A hash of training, validation and test examples: what adapters and scores depend on."""
        found = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for one in split:
                fields = [one.id, one.question, one.label, one.context, one.choices]
                found.update(json.dumps(fields).encode() + b"\n")
            found.update(b"\n")
        return found.hexdigest()[:16]

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
