"""Descriptions of experiments: written, read, refused."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_task

from bayes_kernels.experiment.recipe import METHODS, Experiment, Recipe, Source

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def test_experiments_survive_json(tiny: Experiment) -> None:
    recipe = Recipe(target_modules=("query",), lora={"use_rslora": True}, options={"kl_time": 0.01})
    one = dataclasses.replace(tiny, recipe=recipe, seed=3)
    text = json.dumps(one.to_dict())
    assert Experiment.from_dict(json.loads(text)) == one
    with pytest.raises(ValueError, match="does not fit this version"):
        Experiment.from_dict({"recipe": {"speed": 1}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"warmup": 1.0}, "warmup must be in"),
        ({"batch_size": 8, "accumulation": 3}, "multiple of accumulation, got 8 and 3"),
        ({"n_samples": -1}, "n_samples must be an integer >= 0"),
        ({"keep_lower_layers": -1}, "keep_lower_layers must be an integer >= 0"),
        ({"keep_lower_layers": "1GB"}, "keep_lower_layers must be an integer >= 0"),
    ],
)
def test_recipes_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


IDLE = [
    (method, name, other)
    for method, row in METHODS.items()
    for name, option in row.options.items()
    for other in option.needs
]


# What options of conversions take that make others idle; those of configurations have it in their types.
TAKEN = {
    "search": ("auto", "validation", "bisection", "grid"),
    "fisher": ("ggn", "mc", "empirical"),
}


@pytest.mark.parametrize(("method", "name", "other"), IDLE)
def test_options_that_another_makes_idle_are_refused(method: str, name: str, other: str) -> None:
    row = METHODS[method].options
    useful = row[name].needs[other]
    taken = TAKEN.get(other) or ast.literal_eval(row[other].type.replace(" or ", ","))
    idle = [word for word in taken if word not in useful]
    assert idle and row[other].default in (None, *idle, *useful)
    for value in (*idle, *useful):
        options = {name: row[name].default, other: value}
        one = Experiment(method=method, recipe=Recipe(options=options))
        if value in useful:
            one.check_options()
            continue
        with pytest.raises(ValueError, match=f"{name}: expected {other} .* with it, got '{value}'"):
            one.check_options()


def test_sources_reject_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data of your own"):
        Source(data="stdlib-docs", test="x.jsonl").load()
    with pytest.raises(ValueError, match="brings its own"):
        Source(data="stdlib-docs", ood=("x.jsonl",)).load()
    folder = tiny_task.write_data(tmp_path)
    limited = Source(data=str(folder), test_size=7, ood=(str(folder / "ood.jsonl"),), ood_size=5)
    task = limited.load(0)
    assert len(task.test) == 7 and [len(part) for part in task.ood.values()] == [5]
    assert task.test == limited.load(1).test  # the seed chooses training examples only


def test_weight_decay_is_the_only_difference_of_map(tiny: Experiment) -> None:
    found = {name: dataclasses.replace(tiny, method=name) for name in ("mle", "map", "blob")}
    assert [one.weight_decay for one in found.values()] == [0.0, 1e-5, 0.0]
    for name in ("lr", "dropout", "n_samples"):
        given = {getattr(found[method], name) for method in ("mle", "map")}
        assert len(given) == 1
    own = dataclasses.replace(found["map"], recipe=Recipe(weight_decay=0.0))
    assert own.weight_decay == 0.0


def test_training_on_validation_rows(tiny: Experiment, source: Source) -> None:
    task = source.load(0)
    assert tiny.seen(task) is task
    one = dataclasses.replace(tiny, recipe=Recipe(train_on_validation=True))
    seen = one.seen(task)
    assert [e.id for e in seen.train] == [e.id for e in [*task.train, *task.validation]]
    assert not seen.validation and seen.test == task.test


def test_rows_of_the_papers_are_for_data_of_the_hub(tiny_data: Path) -> None:
    for data in (str(tiny_data), "stdlib-docs"):
        with pytest.raises(ValueError, match="split: expected data of the hub beside 'published'"):
            Source(data=data, split="published").load(0)
