"""The command sweep: what is trained, what is scored, its table and picture."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bayes_kernels.cli import app
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment import train
from bayes_kernels.experiment.results import Summary
from bayes_kernels.experiment.sweep import curves, parse_sweep

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app.app, ["sweep", *map(str, arguments)])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Method and rank of every training."""
    found: list[tuple[str, int]] = []
    train_model = train.train_model

    def noted(experiment: Any, *args: Any, **options: Any) -> Any:
        found.append((experiment.method, experiment.recipe.rank))
        return train_model(experiment, *args, **options)

    monkeypatch.setattr(ex, "train_model", noted)
    return found


@pytest.fixture
def common(tiny_data: Path, tiny_model: Path, tmp_path: Path) -> list[Any]:
    given = ["--data", tiny_data, "--model", tiny_model, "--steps", 2, "--set", "lr=5e-3"]
    return [*given, "--threads", 1, "--out", tmp_path / "out"]


def table(out: Path) -> list[str]:
    lines = (out / "table.md").read_text().splitlines()
    return [line.split("|")[1].strip() for line in lines[2:]]


def test_draws_of_one_adapter(
    common: list[Any],
    trained: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    result = call(*common, "--vary", "n_samples=0,2,4", "--resume")
    assert result.exit_code == 0, result.output
    assert "nothing to go on from" in result.stderr
    assert trained == [("blob", 8)]
    names = [f"BLoB n_samples={n} N={n}" for n in (2, 4)]
    assert table(out) == ["BLoB n_samples=0 mean", *names]
    assert (out / "sweep.png").is_file() and "sweep.png" in result.stdout
    page = (out / "report.html").read_text()
    assert "NLL ↓ against n_samples.<" in page and "BLoB n_samples=4 N=4" in page
    notes = [line for line in result.stderr.splitlines() if line.startswith("  BLoB, seed 0: ")]
    assert len(notes) == 1
    content = json.loads((out / "results.json").read_text())
    assert content["experiments"]["n_samples=4"]["recipe"]["n_samples"] == 4
    more = call(*common, "--vary", "n_samples=0,2,4,6", "--resume")
    assert more.exit_code == 0 and "nothing to go on" not in more.stderr, more.output
    assert trained == [("blob", 8)] and len(table(out)) == 4
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    bare = call(*common, "--vary", "n_samples=0,2,4,6", "--resume")
    assert bare.exit_code == 0 and "no pictures: matplotlib is missing" in bare.stderr
    assert "sweep.png" not in bare.stdout and not (out / "sweep.png").exists()


@pytest.mark.parametrize(
    ("vary", "expected"),
    [
        ("tolerance=0.1,0.5", [("mle", 8)]),
        ("rank=2,3", [("mle", 2), ("mle", 3)]),
        ("n_samples=2,3", [("mle", 8)]),
    ],
)
def test_plain_adapters_are_trained_as_often_as_needed(
    common: list[Any], trained: list[tuple[str, int]], vary: str, expected: list[Any]
) -> None:
    result = call(*common, "--method", "tfb", "--set", "anchors=8", "--vary", vary)
    assert result.exit_code == 0, result.output
    assert trained == expected
    name, _, values = vary.partition("=")
    assert [line.partition(" N=")[0] for line in table(common[-1])] == [
        f"TFB {name}={value}" for value in values.split(",")
    ]


@pytest.mark.parametrize("method", ["laplace", "blob", "mle"])
def test_checkpoints_of_one_training(
    common: list[Any], trained: list[tuple[str, int]], method: str, tmp_path: Path
) -> None:
    """The adapter at each step is the one that a training had there, and the last one its end."""
    draws = [] if method == "mle" else ["--set", "n_samples=4"]
    result = call(*common, "--method", method, *draws, "--steps", 3, "--vary", "checkpoint=3,2")
    assert result.exit_code == 0, result.output
    assert trained == [("mle" if method == "laplace" else method, 8)]
    title = {"laplace": "Laplace-LoRA", "blob": "BLoB", "mle": "LoRA (MLE)"}[method]
    kinds = [""] if method == "mle" else [" mean", " N=4"]
    wanted = [f"{title} checkpoint={step}{kind}" for step in (3, 2) for kind in kinds]
    assert table(tmp_path / "out") == wanted
    rows = {one["name"]: one for one in results_of(tmp_path / "out")["methods"]}
    nll = [rows[name]["mean"]["nll"] for name in wanted]
    assert len(set(nll)) == len(nll)
    if method == "mle":
        words = ["--task", common[1], "--model", common[3], "--method", "mle", "--steps", "3"]
        words += ["--set", "lr=5e-3", "--out", tmp_path / "mle"]
        again = CliRunner().invoke(app.app, ["train", *map(str, words)])
        assert again.exit_code == 0, again.output
        whole = json.loads((tmp_path / "mle" / "metrics.json").read_text())["methods"][0]
        assert whole["mean"]["nll"] == pytest.approx(nll[0], rel=1e-5)


def test_a_value_that_fails_is_a_line(common: list[Any], tmp_path: Path) -> None:
    """The others have their rows, the table and the page, also where the command is given again."""
    out, words = tmp_path / "out", [*common[:4], *common[8:], "--steps", 6]
    for more in ([], ["--resume"]):
        result = call(*words, "--vary", "lr=1e-3,1e30", *more)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
        assert "lr=1e+30, seed 0: failed: training: expected a finite loss" in result.stderr
        assert table(out) == ["BLoB lr=0.001 mean", "BLoB lr=0.001 N=10", "BLoB lr=1e+30, seed 0"]
        assert "failed: training: expected a finite loss" in (out / "table.md").read_text()
        assert [one["method"] for one in results_of(out)["failures"]] == ["lr=1e+30"]
        assert "BLoB lr=0.001 N=10" in (out / "report.html").read_text()
    more = call(*words, "--vary", "lr=1e-3,2e-3", "--resume")
    assert more.exit_code == 0 and len(table(out)) == 4, more.output


def test_curves_of_mean_and_draws() -> None:
    """Two curves where each value has both rows, one where values have rows of different numbers."""
    both = parse_sweep("checkpoint=5,9")
    rows = [
        summary(f"BLoB {item} {kind}", item, nll=i + (kind == "mean") / 10)
        for i, item in enumerate(both.items)
        for kind in ("mean", "N=2")
    ]
    found = curves(rows, both)
    assert found.values == ["5", "9"]
    assert found.scores["NLL ↓"] == {"mean": [(0.1, 0.5), (1.1, 0.5)], "N=2": [(0, 0.5), (1, 0.5)]}
    draws = parse_sweep("n_samples=0,2,4")
    rows = [summary(f"BLoB {i} N={i}", i, nll=0.5) for i in draws.items if i != "n_samples=2"]
    found = curves(rows, draws)
    assert found.values == ["0", "4"] and list(found.scores["NLL ↓"]) == [""]


def summary(name: str, word: str, nll: float) -> Summary:
    return Summary(name, (0, 1), {"nll": nll}, {"nll": 0.5}, {}, {}, method=word)


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vary", "rank"], "vary: expected NAME=VALUE,VALUE,... with two"),
        (["--vary", "rank=2"], "vary: expected NAME=VALUE,VALUE,... with two"),
        (["--vary", "rank=2,2"], "vary: expected NAME=VALUE,VALUE,... with two"),
        (["--vary", "magic=1,2"], "expected a field of the recipe"),
        (["--vary", "rank=0,2"], "rank must be an integer >= 1, got 0"),
        (["--vary", "rank=2,4", "--method", "ensemble"], "made of adapters of several seeds"),
        (["--vary", "rank=2,4", "--set", "rank=3"], "expected a setting once, got it twice"),
        (["--vary", "rank=2,4", "--rank", "3"], "expected a setting once"),
        (["--vary", "rank=2,4", "--resume", "--overwrite"], "exclude each other"),
        (["--vary", "checkpoint=1,9", "--steps", "8"], "checkpoints from 1 to 8, .* got 9"),
        (["--vary", "checkpoint=0,9"], "checkpoints from 1 to 600, .* got 0"),
        (["--vary", "checkpoint=1.5,2"], "checkpoints from 1 to 600, .* got 1.5"),
    ],
)
def test_what_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    result = call(*options, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert re.search(message.replace("...", r"\.\.\."), result.stderr), result.output
    assert not (tmp_path / "out").exists()


def test_values_are_read_as_settings_are() -> None:
    found = parse_sweep("kl-lr=0.1, 1e-3,auto")
    assert found.name == "kl_lr" and found.values == (0.1, 1e-3, "auto")
    assert found.items[0] == "kl_lr=0.1"
