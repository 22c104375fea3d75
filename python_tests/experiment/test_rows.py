"""Which rows feed what: no number that is fitted, and no gradient, has seen a row that it must not.

Every row is followed by its tokens from the files into training passes, conversions, temperatures and
scores of each command; and other labels of test rows change nothing but the scores.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import tiny_task
from typer.testing import CliRunner

from bayes_kernels.cli import app
from bayes_kernels.experiment import convert, scoring
from bayes_kernels.experiment.recipe import Source
from bayes_kernels.hf.heads import ClassLogits
from bayes_kernels.hf.tasks.encoder import TaskEncoder
from bayes_kernels.task import Task

pytestmark = pytest.mark.cpu_only

Rows = list[dict[str, Any]]


def distinct(rows: Rows, first: int) -> Rows:
    """The rows, each with two words that say its number: no two have the same tokens."""
    words = tiny_task.OTHER
    for number, row in enumerate(rows, start=first):
        row["question"] += f" {words[number // 12 % 12]} {words[number % 12]}"
    return rows


def write(folder: Path, flip: Callable[[dict[str, Any]], bool]) -> Path:
    folder.mkdir(parents=True)
    train = distinct(tiny_task.rows(70, "train", 1, noise=0.0), 0)
    test = distinct(tiny_task.rows(30, "test", 2, noise=0.0), 70)
    far = distinct(tiny_task.rows(20, "far", 3, noise=0.0), 100)
    for row in (*test, *far):
        if flip(row):
            row["label"] = 1 - row["label"]
    for name, rows in (("train", train), ("test", test), ("far", far)):
        tiny_task.write_rows(folder / f"{name}.jsonl", rows)
    return folder


class Ledger:
    """Ids of the rows that each use has seen, and the numbers that were fitted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.task: Task | None = None
        self.ids: dict[tuple[int, ...], str] = {}
        self.seen: dict[str, set[str]] = {
            "training pass": set(),
            "conversion": set(),
            "prior": set(),
            "temperature": set(),
        }
        self.scored: dict[str, set[str]] = {}
        self.temperatures: list[float] = []
        self.reports: list[dict[str, Any]] = []
        self.predicted: list[tuple[torch.Tensor, list[str]]] = []
        load, encode, forward = Source.load, TaskEncoder.__call__, ClassLogits.forward
        fit, conversion_of = scoring.fit_temperature, convert._conversion
        sample, score = scoring.sample_examples, scoring._score

        def spy_load(source: Source, *args: Any) -> Task:
            self.task = load(source, *args)
            return self.task

        def spy_encode(encoder: TaskEncoder, example: Any) -> dict[str, Any]:
            item = encode(encoder, example)
            other = self.ids.setdefault(tuple(item["input_ids"]), example.id)
            assert other == example.id, "rows of this test must differ"
            return item

        def spy_forward(model: Any, input_ids: Any = None, **inputs: Any) -> Any:
            if model.training:
                self.note("training pass", {"input_ids": input_ids, **inputs})
            return forward(model, input_ids=input_ids, **inputs)

        def spy_conversion(experiment: Any) -> Any:
            conversion = conversion_of(experiment)

            @functools.wraps(conversion.convert)  # whose arguments are the options
            def spy_convert(model: Any, batches: Any, **options: Any) -> Any:
                for name, rows in (
                    ("conversion", batches),
                    ("prior", options.get("validation") or ()),
                ):
                    for batch in rows:
                        self.note(name, batch)
                report = conversion.convert(model, batches, **options)
                self.reports.append(report.to_dict())
                return report

            return dataclasses.replace(conversion, convert=spy_convert)

        def spy_sample(model: Any, encoder: Any, examples: Any, *given: Any, **options: Any) -> Any:
            found = sample(model, encoder, examples, *given, **options)
            ids = [example.id for example in examples]
            self.predicted += [(one.prediction.log_probs, ids) for one in found]
            return found

        def spy_fit(log_probs: torch.Tensor, labels: torch.Tensor) -> float:
            for known, ids in self.predicted:
                if known is log_probs:
                    self.seen["temperature"].update(ids)
                    truth = {example.id: example.label for example in self.rows()}
                    assert labels.tolist() == [truth[one] for one in ids]
            self.temperatures.append(fit(log_probs, labels))
            return self.temperatures[-1]

        def spy_score(name: str, method: str, t: Any, test: Any, ood: Any, *rest: Any) -> Any:
            if t is None:  # tempered predictions are made of these
                for key, one in {"test": test, **ood}.items():
                    ids = [ids for known, ids in self.predicted if known is one.log_probs]
                    self.scored.setdefault(key, set()).update(*ids)
            return score(name, method, t, test, ood, *rest)

        patch.setattr(Source, "load", spy_load)
        patch.setattr(TaskEncoder, "__call__", spy_encode)
        patch.setattr(ClassLogits, "forward", spy_forward)
        patch.setattr(convert, "_conversion", spy_conversion)
        patch.setattr(scoring, "sample_examples", spy_sample)
        patch.setattr(scoring, "fit_temperature", spy_fit)
        patch.setattr(scoring, "_score", spy_score)

    def rows(self) -> Iterator[Any]:
        assert self.task is not None
        for examples in self.task.splits.values():
            yield from examples

    def note(self, use: str, batch: Any) -> None:
        mask = batch.get("attention_mask")
        mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
        for row, kept in zip(batch["input_ids"], mask, strict=True):
            self.seen[use].add(self.ids[tuple(row[kept.bool()].tolist())])

    def split(self, name: str) -> set[str]:
        assert self.task is not None
        return {example.id for example in self.task.splits[name]}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Path:
    return tiny_model


def call(*words: Any) -> None:
    ended = CliRunner().invoke(app.app, [str(word) for word in words])
    assert ended.exit_code == 0, ended.output


def fitted(folder: Path) -> dict[str, Any]:
    """Every tensor of the adapters in a folder, and numbers of their configurations."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        if "checkpoints" not in file.parts:
            tensors = load_file(file)
            found |= {f"{file.relative_to(folder)}:{key}": value for key, value in tensors.items()}
    for file in sorted(folder.rglob("adapter_config.json")):
        sigma = json.loads(file.read_text()).get("sigma_q")
        if sigma is not None and "checkpoints" not in file.parts:
            found[f"{file.relative_to(folder)}:sigma_q"] = torch.tensor(sigma)
    return found


METHODS = (
    "mle",
    "dropout",
    "blob",
    "scalabl",
    "polar",
    "polar-vbll",
    "tfb",
    "laplace",
    "laplace-last",
)
COMMANDS = [*(f"train {name}" for name in METHODS), "compare", "demo"]
COMMANDS += [f"bayesianize {name}" for name in ("tfb", "laplace", "laplace-last")]
COMMANDS += ["evaluate", "predict"]


def run(command: str, data: Path, model: Path, adapter: Path, out: Path) -> None:
    """The command on the data; where it needs an adapter, one that exists."""
    word, _, method = command.partition(" ")
    far = ["--ood", data / "far.jsonl"]
    short = ["--model", model, "--steps", 2, "--out", out]
    trials = ["--set", "max_trials=2"] if method == "tfb" else []
    draws = ["--n-samples", 2] if method not in ("mle", "polar") else []
    if word == "train":
        options = ["--method", method, "--lr", "0.01", "--save-every", 9, *trials]
        call(word, data, *short, *far, *draws, *options)
    elif word == "compare":
        options = ["--methods", "mle,temperature,blob,tfb,laplace,ensemble", "--members", 2]
        options += ["--seeds", 1, "--threads", 1, "--n-samples", 2]
        call(word, "--data", data, *short, *far, *options)
    elif word == "demo":
        options = ["--train-size", 40, "--n-samples", 2, "--threads", 1, "--method", "laplace"]
        call(word, "--data", data, *short, *options)
    elif word == "bayesianize":
        options = ["--data", data, *far, "--method", method, *draws, *trials, "--out", out]
        call(word, adapter, *options)
    elif word == "evaluate":
        call(word, adapter, "--data", data, *far, "--out", out)
    else:
        call(word, adapter, "--data", data / "test.jsonl")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain LoRA, trained on the rows whose labels stay."""
    root = tmp_path_factory.mktemp("adapter")
    data = write(root / "data", lambda row: False)
    call("train", data, "--model", model, "--method", "mle", "--steps", 3, "--out", root / "run")
    return root / "run"


@pytest.mark.parametrize("command", COMMANDS)
def test_rows_never_meet(
    command: str, model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledgers = []
    for name, flip in (("as it is", lambda row: False), ("flipped", lambda row: True)):
        data = write(tmp_path / name / "data", flip)
        with monkeypatch.context() as patch:
            ledger = Ledger(patch)
            run(command, data, model, adapter, tmp_path / name / "out")
        ledgers.append(ledger)
    ledger = ledgers[0]
    word, _, method = command.partition(" ")
    if word == "predict":
        assert not any(ledger.seen.values()) and not ledger.temperatures
        return
    train, validation, test = (ledger.split(name) for name in ("train", "validation", "test"))
    far = set().union(*(ledger.split(name) for name in ledger.task.ood))
    parts = [train, validation, test, far]
    assert sum(map(len, parts)) == len(set().union(*parts)) and all((train, validation, test))
    trains = word in ("train", "compare", "demo")
    converts = method in ("tfb", "laplace", "laplace-last") or word in ("compare", "demo")
    expected = {
        "training pass": train if trains else set(),
        "conversion": train if converts else set(),
        "prior": validation if converts else set(),
        "temperature": validation if word in ("train", "compare", "demo", "evaluate") else set(),
    }
    for use, ids in expected.items():
        if (use == "training pass" and trains) or (use == "prior" and converts):
            assert ledger.seen[use] and ledger.seen[use] <= ids, use
        else:
            assert ledger.seen[use] == ids, use
    sets = {"test": test, **{name: ledger.split(name) for name in ledger.task.ood}}
    assert ledger.scored == sets
    # Other labels of test and out-of-distribution rows: other scores, the same fit.
    other = ledgers[1]
    assert other.temperatures == pytest.approx(ledger.temperatures, rel=1e-3)
    before, after = (fitted(tmp_path / name / "out") for name in ("as it is", "flipped"))
    assert before.keys() == after.keys() and (before or word == "evaluate")
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-3, atol=1e-5, msg=key)
    assert len(ledger.reports) == len(other.reports)
    for one, two in zip(ledger.reports, other.reports, strict=True):
        assert numbers_of(one) == pytest.approx(numbers_of(two), rel=1e-3, abs=1e-6)
    files = sorted((tmp_path / "as it is" / "out").glob("*.json"))
    scores = [file for file in files if file.name in ("metrics.json", "results.json")]
    assert scores
    for file in scores:
        flipped = tmp_path / "flipped" / "out" / file.name
        one, two = (json.loads(path.read_text())["methods"][0]["mean"] for path in (file, flipped))
        assert one["accuracy"] == pytest.approx(1 - two["accuracy"], abs=1e-6)


def numbers_of(report: Any) -> list[float]:
    """Every finite number in a report."""
    if isinstance(report, dict):
        return [x for key in sorted(report) for x in numbers_of(report[key])]
    if isinstance(report, list | tuple):
        return [x for item in report for x in numbers_of(item)]
    is_number = isinstance(report, int | float) and not isinstance(report, bool)
    return [float(report)] if is_number and math.isfinite(report) else []
