"""One method at several values of one setting: a table, and a picture of its scores against the values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..hf.method import METHODS, PLAIN
from ..task import Task
from .compare import Piece
from .recipe import Experiment
from .results import Summary
from .run import SNAPSHOTS
from .settings import FIELDS, parse_value

# Settings of predictions: one adapter is scored at all of their values.
PREDICTION = ("n_samples", "draws", "draw_scope")
# Values are steps of one training: its adapter is scored, or converted, as it was after each of them.
CHECKPOINT = "checkpoint"
PICTURE_FILE = "sweep.png"
# Scores of the picture, with their headings.
SHOWN = {"accuracy": "accuracy ↑", "nll": "NLL ↓", "ece": "ECE ↓", "brier": "Brier ↓"}


class Sweep(NamedTuple):
    """A setting and its values.

    Attributes:
        name: As `--set` takes it, or `CHECKPOINT`.
        values: At least two, each once.
    """

    name: str
    values: tuple[Any, ...]

    @property
    def items(self) -> list[str]:
        """A text for each value, such as "rank=4"."""
        return [f"{self.name}={value}" for value in self.values]

    @property
    def settings(self) -> dict[str | None, list[str]]:
        """What `--set` takes more for each text of `items`, and for None."""
        fixed = self.name == CHECKPOINT
        return {None: [], **{item: [] if fixed else [item] for item in self.items}}

    def check_steps(self, steps: int) -> None:
        """Whether checkpoints are steps of a training of so many.

        Raises:
            ValueError: One is not.
        """
        bad = [x for x in self.values if type(x) is not int or not 1 <= x <= steps]
        if self.name == CHECKPOINT and bad:
            raise ValueError(
                f"vary: expected checkpoints from 1 to {steps}, the steps of the training, got {bad[0]!r}"
            )


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

    def add(
        name: str, seed: int, item: str | None, made_of: tuple[Path, ...], row: bool, **more: Any
    ) -> Path:
        place = folder / (item or name if name == method else f"{name}-{item or 'default'}")
        place = place / f"seed-{seed}"
        one = experiments(name, seed, item)
        word, title = (item, f"{METHODS[method].title} {item}") if row and item else ("", "")
        pieces.append(Piece(one, tasks[seed], place, made_of, row, word, title, **more))
        return place

    for seed in range(seeds):
        if sweep.name == CHECKPOINT:
            name = PLAIN if convert else method
            last = experiments(name, seed, None).recipe.steps
            sweep.check_steps(last)
            on_the_way = tuple(sorted(value for value in sweep.values if value != last))
            whole = add(name, seed, None, (), False, snapshots=on_the_way)
            for step, item in zip(sweep.values, sweep.items, strict=True):
                at = whole if step == last else whole / SNAPSHOTS / f"step-{step}"
                add(method, seed, item, (at,), True, mean=True)
            continue
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
    """The rows of each value, without those with a temperature; fewer where a value failed."""
    return [
        one
        for item in sweep.items
        for one in summaries
        if one.method == item and not one.temperature
    ]


class Curves(NamedTuple):
    """Scores against the values of a setting.

    Attributes:
        values: The values that have scores.
        scores: By heading and name of the curve, mean and standard deviation at each value. There is a
            curve for the mean and one for the draws where every value has both, else one without a name.
    """

    values: list[str]
    scores: dict[str, dict[str, list[tuple[float, float]]]]


def curves(shown: Sequence[Summary], sweep: Sweep) -> Curves:
    """What the pictures of a sweep show of its rows, which `swept` found."""
    rows = {item: [one for one in shown if one.method == item] for item in sweep.items}
    rows = {item: own for item, own in rows.items() if own}
    kinds = {tuple(one.name.rpartition(" ")[2] for one in own) for own in rows.values()}
    names = next(iter(kinds)) if len(kinds) == 1 else ("",)
    if len(names) == 1:
        names = ("",)

    def points(key: str, place: int) -> list[tuple[float, float]]:
        found = [own[place - len(names)] for own in rows.values()]
        return [(one.mean.get(key, math.nan), one.std.get(key, math.nan)) for one in found]

    scores = {
        heading: {name: points(key, i) for i, name in enumerate(names)}
        for key, heading in SHOWN.items()
    }
    return Curves([item.partition("=")[2] for item in rows], scores)
