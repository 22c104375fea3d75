"""Where a task comes from, as a command is told. Imports no torch: data are checked while one writes them."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from ...task import Example, Task
from .hub import HUB_DATASETS, SPLITS
from .load import load_task
from .splits import choose_subset


@dataclass(frozen=True)
class Source:
    """Where a task comes from: the arguments of `load_task`.

    Attributes:
        data: "stdlib-docs", a name of the hub, or a file (JSONL, CSV, TSV) or folder.
        test: A file of test examples, for files only.
        ood: Out-of-distribution sets: Files, or names for data of the hub; None for the sets
            that the task itself brings.
        train_size: Number of training examples; None for the task's default, 0 for all.
        test_size, ood_size: Largest number of test examples, and of examples of each
            out-of-distribution set, chosen by hash; None for all.
        label_names: Names of the classes, for files only.
        test_fraction: Part of a file's rows that is tested on where there is no test data, for files only;
            None for the default of `load_files`.
        split: "test", or "published" for the rows that the papers score, for data of the hub.
    """

    data: str = "stdlib-docs"
    test: str | None = None
    ood: tuple[str, ...] | None = None
    train_size: int | None = None
    test_size: int | None = None
    ood_size: int | None = None
    label_names: tuple[str, ...] | None = None
    test_fraction: float | None = None
    split: str = "test"

    def __post_init__(self) -> None:
        for name in ("ood", "label_names"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
            value = getattr(self, name)
            words = value is None or isinstance(value, tuple)
            if not words or not all(isinstance(word, str) and word for word in value or ()):
                raise ValueError(f"{name}: expected a list of words, got {value!r}")
        for name in ("data", "test"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and (name == "data" or value is not None):
                raise ValueError(f"{name}: expected a name or path, got {value!r}")
        if self.split not in SPLITS:
            raise ValueError(f"split: expected {' or '.join(SPLITS)}, got {self.split!r}")
        for name, least in (("train_size", 0), ("test_size", 1), ("ood_size", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not whole or value < least):
                raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")

    def load(self, seed: int = 0) -> Task:
        """The task, with the training examples that the seed chooses.

        Raises:
            ValueError: The data is missing or malformed, or an option does not go with it.
            ImportError, ConnectionError: As `load_task`.
        """
        options: dict[str, Any] = {"seed": seed}
        if self.train_size is not None:
            options["train_size"] = self.train_size or None
        is_file = os.path.exists(self.data)
        for name in ("test", "label_names", "test_fraction"):
            if getattr(self, name) is not None:
                if not is_file:
                    raise ValueError(
                        f"{name.replace('_', '-')}: expected data of your own beside it, got "
                        f"{self.data!r}, which is not an existing file or folder; leave it out"
                    )
                options[name] = getattr(self, name)
        if self.ood is not None:
            if not is_file and self.data not in HUB_DATASETS:
                raise ValueError(
                    f"ood: expected data of your own or of the hub beside it, got {self.data!r}, "
                    "which brings its own; leave it out"
                )
            options["ood"] = self.ood
        if self.split != "test":
            if is_file or self.data not in HUB_DATASETS:
                raise ValueError(
                    f"split: expected data of the hub beside {self.split!r}, got {self.data!r}; leave "
                    "it out"
                )
            options["split"] = self.split
        task = load_task(self.data, **options)
        return dataclasses.replace(
            task,
            test=_at_most(task.test, self.test_size),
            ood={name: _at_most(examples, self.ood_size) for name, examples in task.ood.items()},
        )


def _at_most(examples: list[Example], size: int | None) -> list[Example]:
    return examples if size is None or size >= len(examples) else choose_subset(examples, size)
