"""Settings of commands: what each method gets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from hf.story_task import choice_task
from typer.testing import CliRunner

from bayes_kernels.cli import app
from bayes_kernels.experiment import build
from bayes_kernels.experiment import compare as co
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.recipe import Experiment
from bayes_kernels.experiment.settings import method_options, parse_value, recipes_of
from bayes_kernels.hf.method import METHODS


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("null", None),
        ('["a", "b"]', ["a", "b"]),
        ("qr", "qr"),
        ("", ""),
        ("a=b", "a=b"),
        ("[" * 10_000, "[" * 10_000),
    ],
)
def test_values_are_json_where_they_can_be(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("magic=1", "expected a field of the recipe (rank, "),
        ("blob.magic=1", "or an option of blob (sample_at_inference, "),
        ("rank", "NAME=VALUE"),
        ("tfb.options.a.b=1", "expected NAME, METHOD.NAME or lora.NAME before ="),
        ("rank.a=1", "expected NAME, METHOD.NAME or lora.NAME before ="),
        ("lr=abc", "recipe: lr must be a positive number, got 'abc'"),
        ("blob.rank=true", "recipe: rank must be an integer >= 1, got True"),
        ("lora=3", "expected NAME, METHOD.NAME or lora.NAME before =, got lora"),
        ("target_modules=query", "target_modules must be a list of names, got 'query'"),
        ("polar.stiefel=magic", "stiefel must be one of"),
        ("polar.n_samples=3", "--set polar.n_samples=3: expected a setting that polar uses"),
        ("mle.prior_std=1", "expected a setting that mle uses"),
        ("tfb.lr=0.1", "expected a setting that tfb uses"),
        ("laplace.rank=3", "; use options.rank for the method's option of that name"),
        ("ensemble.n_samples=4", "expected a setting that ensemble uses"),
        ("blob.kl_lr=1", "kl_lr: expected kl_schedule published or constant with it, got 'auto'"),
        ("tfb.anchrs=1", "or an option of tfb (anchors, metric, "),
        ("tfb.metric=foo", "metric must be one of"),
        ("anchors=none", "anchors must be an integer >= 1, got 'none'"),
        ("lora.r=4", "lora: expected options that have no name of their own here, got r; use rank"),
        ("max_length=a", "recipe: max_length must be an integer >= 1, got 'a'"),
    ],
)
def test_settings_that_are_refused(setting: str, message: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app.app, ["compare", "--set", setting, *out])
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--methods", "mle", "--n-samples", "3"],
            "n-samples: expected a setting that mle uses, got one of dropout, blob",
        ),
        (
            ["--methods", "mle,blob", "--set", "tfb.anchors=3"],
            "expected a method that is run (mle, blob), got tfb",
        ),
        (
            ["--methods", "mle,blob", "--set", "stiefel=qr"],
            "expected a setting that mle or blob uses, got one of polar, polar-vbll",
        ),
        (["--methods", "mle", "--members", "3"], "members: expected ensemble among --methods"),
        (["--methods", "mle", "--set", "magic=1"], "or an option of mle (none), got magic"),
        (["--rank", "4", "--set", "rank=8"], "--set rank=8: expected a setting once, got it twice"),
        (["--set", "lr=1", "--set", "lr=2"], "--set lr=2: expected a setting once, got it twice"),
        (["--style", "foo"], "style: expected one of blob, laplace, plain, got 'foo'"),
        (["--kind", "foo"], "kind: expected one of auto, causal, classifier, multiple_choice"),
        (["--alpha", "nan"], "recipe: alpha must be a positive number, got nan"),
    ],
)
def test_options_that_do_nothing_are_refused(
    options: list[str], message: str, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app.app, ["compare", *options, *out])
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out").exists()


def test_a_setting_of_one_method_stands_wherever_it_is_said() -> None:
    for order in (1, -1):
        found = recipes_of({}, ["blob.lr=0.5", "lr=0.25"][::order], ("mle", "blob"))
        assert (found["mle"].lr, found["blob"].lr) == (0.25, 0.5)


def test_options_of_one_method_come_once() -> None:
    assert method_options(["a-b=1", "c=x=y"], "tfb") == {"a_b": 1, "c": "x=y"}
    with pytest.raises(ValueError, match="--set a_b=2: expected a setting once, got it twice"):
        method_options(["a-b=1", "a_b=2"], "tfb")
    with pytest.raises(ValueError, match="expected NAME=VALUE, got 'a'"):
        method_options(["a"], "tfb")


@pytest.mark.parametrize("text", ["true", "True"])
def test_true_is_a_word_for_options_whose_values_are_texts(text: str) -> None:
    items = [f"labels={text}", f"per_anchor={text}"]
    expected = {"labels": "true", "per_anchor": True}
    assert method_options(items, "tfb") == expected
    assert recipes_of({}, items, ["tfb"])["tfb"].options == expected
    assert recipes_of({}, [f"tfb.{item}" for item in items], ["tfb"])["tfb"].options == expected


def test_settings_of_all_methods_go_to_those_that_have_them() -> None:
    used = co.used_methods(("blob", "tfb", "ensemble"))
    assert used == ("mle", "blob", "tfb", "ensemble")
    options = ["prior_std=0.3", "blob.prior_std=0.4", "tfb.anchors=9", "rank=2"]
    options += ["lora.use_rslora=true", "blob.lora.bias=none", "options.metric=nll", "warmup=0"]
    found = recipes_of({"n_samples": 7, "steps": None, "lr": 0.5}, options, used)
    plain = {"use_rslora": True}
    assert {name: (one.options, one.lora) for name, one in found.items()} == {
        "mle": ({}, plain),
        "blob": ({"prior_std": 0.4}, {**plain, "bias": "none"}),
        "tfb": ({"anchors": 9, "metric": "nll"}, plain),
        "ensemble": ({}, plain),
    }
    assert [one.n_samples for one in found.values()] == [None, 7, 7, None]
    assert {(one.rank, one.lr, one.steps, one.warmup) for one in found.values()} == {
        (2, 0.5, 600, 0)
    }


@pytest.mark.parametrize("name", METHODS)
def test_published_recipes_are_accepted(name: str) -> None:
    recipe = recipes_of({}, [], [name], "published")[name]
    one = Experiment(model="causal", method=name, recipe=recipe)
    build.check_experiment(one)
    assert recipe.steps >= 5000 and one.lr != 1e-3
    assert ("lm_head" in (recipe.target_modules or ())) == (not name.startswith("polar"))


def test_settings_change_a_published_recipe() -> None:
    published = METHODS["blob"].published
    before = json.dumps(published)
    found = recipes_of({"steps": 3}, ["blob.kl_lr=0.5", "lr=0.25"], ["blob", "mle"], "published")
    blob = found["blob"]
    assert (blob.steps, blob.lr, blob.batch_size) == (3, 0.25, 4)
    assert blob.options == {**published["options"], "kl_lr": 0.5}
    assert json.dumps(published) == before and found["mle"].options == {}
    with pytest.raises(ValueError, match="recipe: expected default or published, got 'magic'"):
        recipes_of({}, [], ["blob"], "magic")


@pytest.mark.parametrize("name", ["blob", "scalabl", "polar", "polar-vbll", "laplace", "tfb"])
def test_published_recipes_train_a_causal_model(name: str, models_dir: Path) -> None:
    short: dict[str, Any] = {"steps": 2, "batch_size": 2, "max_length": 64}
    if name != "polar":
        short["n_samples"] = 2
    recipe = recipes_of(short, [], [name], "published")[name]
    model = str(models_dir / "stories260K")
    one = Experiment(model=model, style="plain", method=name, recipe=recipe)
    (*_, row) = ex.run(one, choice_task(), progress=False).rows
    assert row.report.nll < 5


def test_laws_of_draws_go_to_the_methods_that_have_them() -> None:
    used = ("mle", "blob", "tfb", "scalabl", "dropout", "laplace")
    found = recipes_of({"draws": "independent", "draw_scope": "token"}, ["tfb.draws=shared"], used)
    assert {name: (one.draws, one.draw_scope) for name, one in found.items()} == {
        "mle": ("antithetic", "example"),
        "blob": ("independent", "token"),
        "tfb": ("shared", "token"),
        "scalabl": ("independent", "example"),
        "dropout": ("antithetic", "example"),
        "laplace": ("antithetic", "example"),
    }
    for fields, message in (
        ({"draws": "pairs"}, "draws must be one of"),
        ({"draw_scope": "none"}, "draw_scope must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            recipes_of(fields, [], used)
    with pytest.raises(ValueError, match="draw-scope: expected a setting that scalabl uses"):
        recipes_of({"draw_scope": "token"}, [], ["scalabl"])
    with pytest.raises(ValueError, match="draws: expected a setting that laplace uses"):
        recipes_of({"draws": "shared"}, [], ["laplace"])
