"""The command methods: every method, and every option of each."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from bayes_kernels.cli import app
from bayes_kernels.cli.methods import LISTING, listing
from bayes_kernels.experiment.recipe import Experiment, Recipe
from bayes_kernels.hf.method import METHODS


def call(*words: str) -> Any:
    result = CliRunner().invoke(app.app, ["methods", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_is_shown_without_torch_is_the_table() -> None:
    stored = json.loads(LISTING.read_text(encoding="utf-8"))
    again = json.loads(json.dumps(listing()))
    assert stored == again, "run: python -m bayes_kernels.cli.methods"
    assert list(stored) == list(again)


def test_all_methods_are_listed() -> None:
    _, *lines = call().splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    for line, row in zip(lines, METHODS.values(), strict=True):
        draws = str(row.n_samples) if row.bayesian else "none"
        assert row.title in line and line.endswith(f" {draws}")


@pytest.mark.parametrize("method", METHODS)
def test_options_are_listed_with_type_default_and_meaning(method: str) -> None:
    text = call(method)
    found = re.findall(r"^(\w+): (.+), by default (.+)\n((?:    .+\n)*)", text, re.M)
    assert [name for name, *_ in found] == list(METHODS[method].options)
    for name, kind, default, meaning in found:
        one = METHODS[method].options[name]
        assert (kind, json.loads(default)) == (one.type, one.default)
        assert meaning.split() == one.help.split() and one.help, name


@pytest.mark.parametrize("method", METHODS)
def test_options_are_what_recipes_take(method: str) -> None:
    defaults = {name: one.default for name, one in METHODS[method].options.items()}
    assert Experiment(method=method, recipe=Recipe(options=defaults)).recipe.options == defaults
    with pytest.raises(ValueError, match=rf"options: expected those of {method} \(.*, got speed$"):
        Experiment(method=method, recipe=Recipe(options={"speed": 1}))


@pytest.mark.parametrize("method", METHODS)
def test_options_that_a_field_of_the_recipe_hides_are_named(method: str) -> None:
    hidden = [name for name in METHODS[method].options if name in {f.name for f in fields(Recipe)}]
    note = f"In train and compare {', '.join(hidden)} also name fields of the recipe"
    assert (note in " ".join(call(method).split())) == bool(hidden)
    if METHODS[method].made == "convert":
        assert "batch_size" in hidden
