"""What validation examples say of a posterior before it is saved."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bayes_kernels.cli import app
from bayes_kernels.experiment import compare as co
from bayes_kernels.experiment import held_out as module
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.folders import read_record
from bayes_kernels.experiment.held_out import harm_in, held_out
from bayes_kernels.experiment.recipe import METHODS, Experiment, Recipe, Source
from bayes_kernels.experiment.settings import recipes_of
from bayes_kernels.hf import DrawsReport, ScaleReport
from bayes_kernels.task import Example, Task
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


def test_few_examples_change_nothing_unasked(tiny: Experiment, task: Task) -> None:
    few = dataclasses.replace(task, validation=task.validation[:25])
    with pytest.warns(UserWarning, match=r"raise the NLL of \d\d examples.*scale=fit fits them\)"):
        guarded = ex.run(wide(tiny, scale="guard"), few, progress=False)
    assert guarded.scale is not None and guarded.scale["factor"] == 1
    assert "trials" not in guarded.scale
    with pytest.warns(UserWarning, match="4 draws raise the NLL"):
        fitted = ex.run(wide(tiny, scale="fit"), few, progress=False)
    assert fitted.scale is not None and len(fitted.scale["trials"]) >= 5


@pytest.mark.parametrize("count", [29, 30])
def test_thirty_examples_are_enough_to_change_a_posterior(
    tiny: Experiment, task: Task, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    before, fitted = DrawsReport(count, 4, 0.5, 0.6, 0.05, 0.15), []
    monkeypatch.setattr(module, "compare_draws", lambda *_, **__: before)
    monkeypatch.setattr(
        module,
        "fit_scale_",
        lambda *_, **__: fitted.append(count) or ScaleReport(1.0, before, 0.6, ()),
    )
    few = dataclasses.replace(task, validation=task.validation[:count])
    assert len(held_out(tiny, few).checking) == count
    with pytest.warns(UserWarning, match="draws raise the NLL"):
        ex.run(with_recipe(tiny, n_samples=4), few, progress=False)
    assert bool(fitted) == (count == 30)


def test_what_cannot_be_rescaled_is_advised_against_where_it_harms(
    tiny: Experiment, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = with_recipe(dataclasses.replace(tiny, method="dropout"), n_samples=4)
    for low, advised in ((0.01, True), (-0.01, False)):
        report = DrawsReport(20, 4, 0.5, 0.52, low, 0.03)
        monkeypatch.setattr(module, "compare_draws", lambda *_, report=report, **__: report)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            notes = ex.run(one, task, progress=False).notes
        assert ("predict with n_samples=0" in notes[-1]) == advised


def test_a_scale_is_fitted_where_that_is_asked_for(tiny: Experiment, task: Task) -> None:
    fitted = ex.run(with_recipe(tiny, n_samples=4, scale="fit"), task, progress=False)
    assert fitted.scale is not None and len(fitted.scale["trials"]) >= 7


@pytest.mark.parametrize(
    ("method", "options", "choosing", "checking"),
    [
        ("blob", {}, 0, 200),
        ("tfb", {}, 294, 200),
        ("tfb", {"search": "validation"}, 294, 200),
        ("tfb", {"tolerance": 0.1}, 0, 200),
        ("tfb", {"search": "grid"}, 0, 200),
        ("laplace", {}, 294, 200),
        ("laplace", {"prior": "mackay"}, 0, 200),
        ("laplace-last", {"structure": "layer"}, 0, 200),
    ],
)
def test_what_has_chosen_does_not_check(
    method: str, options: dict[str, Any], choosing: int, checking: int
) -> None:
    rows = [Example(str(i), f"text {i}", i % 2) for i in range(500)]
    rows[7:13] = [dataclasses.replace(row, label=None) for row in rows[7:13]]
    task = Task("task", "classification", ("a", "b"), [], rows, [], {})
    one = Experiment(method=method, recipe=Recipe(options=options))
    found = held_out(one, task)
    assert (len(found.choosing), len(found.checking)) == (choosing, checking)
    ids = [row.id for row in (*found.choosing, *found.checking)]
    assert len(set(ids)) == len(ids) and all(row.label is not None for row in found.checking)
    few = held_out(one, dataclasses.replace(task, validation=rows[:3]))
    assert len(few.checking) == (1 if choosing else 3)
    assert held_out(one, dataclasses.replace(task, validation=[])) == ([], [])


def test_what_a_conversion_and_the_rows_say_is_said(
    tiny: Experiment, task: Task, tmp_path: Path
) -> None:
    one = dataclasses.replace(tiny, method="tfb")
    found = ex.run(with_recipe(one, n_samples=4, steps=12), task, progress=False)
    assert found.conversion is not None and found.conversion["search"] == "validation"
    searched, compared = found.notes
    assert re.match(r"TFB: \d+ layers, sigma_q=.* validation examples", searched)
    assert re.match(r"TFB, seed 0: 4 draws (raise|lower) the NLL of \d+ examples from", compared)
    co.save_run(found, tmp_path / "result.json")
    assert co.load_run(tmp_path / "result.json").notes == found.notes


def test_nothing_is_said_without_draws_or_examples(tiny: Experiment, task: Task) -> None:
    plain = dataclasses.replace(tiny, method="mle", recipe=Recipe(steps=2, max_length=16))
    assert ex.run(plain, task, progress=False).scale is None
    bare = dataclasses.replace(task, validation=[])
    assert ex.run(wide(tiny), bare, progress=False).scale is None
    with pytest.raises(ValueError, match=r"recipe: scale must be one of .*, got 'wide'"):
        Recipe(scale="wide")


def test_what_is_done_where_nothing_is_said() -> None:
    found = {name: Experiment(method=name).scale for name in METHODS}
    assert set(found.values()) == {"guard"}
    published = recipes_of({}, [], list(METHODS), "published")
    assert {recipe.scale for recipe in published.values()} == {"keep"}
