"""One method at several values of one setting: a table, and a picture of its scores against the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..hf.method import METHODS, PLAIN
from ..hf.tasks.task import Task
from .compare import Piece
from .recipe import Experiment
from .results import Summary
from .settings import FIELDS, parse_value

# Settings of predictions: one adapter is scored at all of their values.
PREDICTION = ("n_samples", "draws", "draw_scope")
PICTURE_FILE = "sweep.png"
# Scores of the picture, with their headings.
SHOWN = {"accuracy": "accuracy ↑", "nll": "NLL ↓", "ece": "ECE ↓", "brier": "Brier ↓"}


class Sweep(NamedTuple):
    """A setting and its values.

    Attributes:
        name: As `--set` takes it.
        values: At least two, each once.
    """

    name: str
    values: tuple[Any, ...]

    @property
    def items(self) -> list[str]:
        """The texts of `--set`, one for each value."""
        return [f"{self.name}={value}" for value in self.values]


def parse_sweep(text: str) -> Sweep:
    """NAME=VALUE,VALUE,...

    Raises:
        ValueError: The text has another form, or fewer than two values, or one twice.
    """
    name, equals, rest = text.partition("=")
    name = name.strip().replace("-", "_")
    values = tuple(parse_value(part.strip()) for part in rest.split(",") if part.strip())
    if not name or not equals or len(values) < 2 or len(set(map(str, values))) < len(values):
        raise ValueError(
            f"vary: expected NAME=VALUE,VALUE,... with two different values or more, got {text!r}"
        )
    return Sweep(name, values)


def used_methods(method: str) -> tuple[str, ...]:
    """Names of `METHODS` that the sweep of a method runs."""
    return (method,) if METHODS[method].made == "train" else (PLAIN, method)


def plan_sweep(
    method: str,
    sweep: Sweep,
    experiments: Callable[[str, int, str | None], Experiment],
    tasks: Mapping[int, Task],
    folder: Path,
    *,
    seeds: int,
) -> list[Piece]:
    """Every (value, seed), those first that others need.

    Args:
        method: A name of `METHODS` that is trained or converts plain LoRA.
        sweep: The setting.
        experiments: Settings of a method, a seed, and a text of `Sweep.items`; None for the default.
        tasks: The task of every seed.
        folder: Where the results go.
        seeds: Number of seeds.
    """
    convert = METHODS[method].made == "convert"
    pieces: list[Piece] = []

    def add(name: str, seed: int, item: str | None, made_of: tuple[Path, ...], row: bool) -> Path:
        place = folder / (item or name if name == method else f"{name}-{item or 'default'}")
        place = place / f"seed-{seed}"
        one = experiments(name, seed, item)
        word, title = (item, f"{METHODS[method].title} {item}") if row and item else ("", "")
        pieces.append(Piece(one, tasks[seed], place, made_of, row, word, title))
        return place

    for seed in range(seeds):
        again = sweep.name in PREDICTION
        plain: tuple[Path, ...] = ()
        if convert and (again or sweep.name not in FIELDS):  # what plain LoRA is trained without
            plain = (add(PLAIN, seed, None, (), False),)
        if again:
            base = add(method, seed, None, plain, False)
        for item in sweep.items:
            if again:
                add(method, seed, item, (base,), True)
                continue
            own = plain
            if convert and not plain:
                own = (add(PLAIN, seed, item, (), False),)
            add(method, seed, item, own, True)
    return pieces


def swept(summaries: Sequence[Summary], sweep: Sweep) -> list[Summary]:
    """For each value the row with draws, or the only one; fewer where a value failed."""
    found = []
    for item in sweep.items:
        own = [one for one in summaries if one.method == item]
        found.extend(own[-1:])
    return found
