"""What validation examples say of a posterior before it is saved."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bayes_kernels.cli import app
from bayes_kernels.experiment import compare as co
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.folders import read_record
from bayes_kernels.experiment.held_out import harm_in
from bayes_kernels.experiment.recipe import METHODS, Experiment, Recipe, Source
from bayes_kernels.experiment.settings import recipes_of
from bayes_kernels.hf.tasks.task import Task
from experiment.tiny_runs import with_recipe

# TFB may change every prediction: no draw is anything like the mean.
WIDE = {"tolerance": 1.0, "low": 4.0, "high": 8.0, "anchors": 8}
SAID = r"4 draws raise the NLL of \d+ examples from .* deviations times 0\.\d+: NLL"


def wide(tiny: Experiment, **changes: Any) -> Experiment:
    one = dataclasses.replace(tiny, method="tfb")
    return with_recipe(one, options=WIDE, n_samples=4, steps=60, lr=1e-2, **changes)


@pytest.fixture(scope="module")
def task(source: Source) -> Task:
    """With enough validation examples for chance to be small."""
    found = source.load(0)
    return dataclasses.replace(found, validation=[*found.validation, *found.test])


def test_a_harmful_posterior_is_said_and_mended(
    tiny: Experiment, task: Task, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=SAID):
        one = ex.run(wide(tiny, scale="guard"), task, folder=tmp_path / "guard", progress=False)
    assert one.scale is not None and one.scale["factor"] < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kept = ex.run(wide(tiny, scale="keep"), task, folder=tmp_path / "keep", progress=False)
    assert kept.scale is None
    mean, drawn = (next(r for r in kept.rows if r.n_samples == n) for n in (0, 4))
    mended = next(r for r in one.rows if r.n_samples == 4)
    assert drawn.report.nll > mean.report.nll + 0.05 and mended.report.nll < drawn.report.nll
    assert harm_in(one.rows) is None
    assert "4 draws raise the NLL" in (harm_in(kept.rows) or "")
    # What was scored is what was saved.
    saved = read_record(tmp_path / "guard")
    assert saved is not None and saved.experiment.scale == "guard"
    for name, said in (("guard", False), ("keep", True)):
        options = [str(tmp_path / name), "--out", str(tmp_path / f"{name}-new")]
        result = CliRunner().invoke(app.app, ["evaluate", *options])
        assert result.exit_code == 0, result.output
        assert ("draws raise the NLL" in result.stderr) == said
        assert (
            f"{(mended if name == 'guard' else drawn).report.nll:.3f}".lstrip("0") in result.stdout
        )
    co.save_run(one, tmp_path / "result.json")
    assert co.load_run(tmp_path / "result.json").scale == one.scale


def test_a_scale_is_fitted_where_that_is_asked_for(tiny: Experiment, task: Task) -> None:
    fitted = ex.run(with_recipe(tiny, n_samples=4, scale="fit"), task, progress=False)
    assert fitted.scale is not None and len(fitted.scale["trials"]) >= 7


def test_nothing_is_said_without_draws_or_examples(tiny: Experiment, task: Task) -> None:
    plain = dataclasses.replace(tiny, method="mle", recipe=Recipe(steps=2, max_length=16))
    assert ex.run(plain, task, progress=False).scale is None
    bare = dataclasses.replace(task, validation=[])
    assert ex.run(wide(tiny), bare, progress=False).scale is None
    with pytest.raises(ValueError, match=r"recipe: scale must be one of .*, got 'wide'"):
        Recipe(scale="wide")


def test_what_is_done_where_nothing_is_said() -> None:
    found = {name: Experiment(method=name).scale for name in METHODS}
    assert {name for name, scale in found.items() if scale == "fit"} == {"tfb"}
    assert set(found.values()) == {"fit", "guard"}
    published = recipes_of({}, [], list(METHODS), "published")
    assert {recipe.scale for recipe in published.values()} == {"keep"}
