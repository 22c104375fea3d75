"""Settings of commands: what each method gets, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from typer.testing import CliRunner

from bayes_kernels.cli import app
from bayes_kernels.experiment import compare as co
from bayes_kernels.experiment.settings import method_options, parse_value, recipes_of


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
