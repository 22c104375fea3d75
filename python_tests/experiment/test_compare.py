"""Comparisons of methods over seeds: failures, resuming, the command."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bayes_kernels import metrics
from bayes_kernels.cli import app
from bayes_kernels.experiment import compare as co
from bayes_kernels.experiment import folders, machine, results, scoring, sweep, tables, train
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.recipe import Experiment, Recipe, Source
from bayes_kernels.experiment.variants import VARIANTS
from bayes_kernels.hf import load
from bayes_kernels.hf.tasks import answers
from bayes_kernels.task import Task

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


FAST = Recipe(steps=2, lr=5e-3, rank=2, n_samples=2)


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory is not looked at here, and collecting garbage before each measurement takes 40 %."""
    monkeypatch.setattr(machine.gc, "collect", lambda: 0)


@pytest.fixture(scope="module")
def tasks(source: Source) -> dict[int, Task]:
    return {seed: source.load(seed) for seed in range(4)}


# --- Comparisons ---------------------------------------------------------------------------------

METHODS = ("mle", "temperature", "dropout", "ensemble", "tfb")


@pytest.fixture
def make(source: Source, tiny_model: Path) -> Any:
    def experiment(method: str, seed: int) -> Experiment:
        recipe = FAST
        if method == "tfb":
            recipe = dataclasses.replace(FAST, options={"anchors": 16})
        return Experiment(source, str(tiny_model), method=method, recipe=recipe, seed=seed)

    return experiment


def test_a_comparison_goes_on_after_a_failure(
    make: Any, tasks: dict[int, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int]] = []
    train_model = train.train_model
    broken = True

    def noted(experiment: Experiment, *args: Any, **options: Any) -> Any:
        trained.append((experiment.method, experiment.seed))
        if experiment.method == "dropout" and broken:
            raise RuntimeError("no\n room")
        return train_model(experiment, *args, **options)

    monkeypatch.setattr(ex, "train_model", noted)
    pieces = co.plan(METHODS, make, tasks, tmp_path, seeds=1)
    order = [(piece.experiment.method, piece.experiment.seed) for piece in pieces]
    assert order == [("mle", 0), ("dropout", 0), ("tfb", 0), ("mle", 1000), ("ensemble", 0)]
    runs, failures = co.compare(pieces, progress=False)
    assert failures == [tables.Failure("dropout", 0, "RuntimeError: no room")]
    # Plain LoRA once for all that needs it; the ensemble's second member sees the same examples.
    assert trained == [("mle", 0), ("dropout", 0), ("mle", 1000)]
    assert pieces[3].task is pieces[0].task and not pieces[3].score
    assert not (tmp_path / "dropout" / "seed-0" / co.RESULT_FILE).exists()
    plain, converted, joined = runs
    member = co.load_run(tmp_path / "ensemble" / "seed-0-member-1" / co.RESULT_FILE)
    assert not member.rows
    spent = [one.training.seconds for one in (plain, member) if one.training is not None]
    assert joined.training is not None and len(spent) == 2
    assert joined.training.seconds == pytest.approx(sum(spent))
    assert joined.training.steps == 2 * FAST.steps
    assert plain.parameters is not None and joined.parameters == 2 * plain.parameters
    assert [row.name for row in plain.rows] == ["LoRA (MLE)", "LoRA + temperature"]
    assert [row.name for row in joined.rows] == ["Ensemble N=2"]
    assert [row.name for row in converted.rows] == ["TFB N=2"]
    assert converted.conversion is not None and converted.conversion_seconds is not None
    assert converted.training == plain.training  # of the adapter that was converted

    # Only what is missing runs, and everything else stays as it was.
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob(co.RESULT_FILE))}
    trained.clear()
    broken = False
    again, failures = co.compare(pieces, progress=False)
    assert trained == [("dropout", 0)] and not failures and len(again) == 4
    assert [row.name for row in again[1].rows] == ["MC dropout mean", "MC dropout N=2"]
    assert all(path.read_bytes() == content for path, content in before.items())
    # The ensemble averages the probabilities of its members.
    alone, encoder = folders.load_adapter(
        tmp_path / "ensemble" / "seed-0-member-1", member.experiment, tasks[0]
    )
    second, _ = answers.predict_examples(alone, encoder, tasks[0].test)
    mean = (plain.rows[0].log_probs.exp() + second.probs) / 2
    torch.testing.assert_close(joined.rows[0].log_probs.exp(), mean, rtol=0, atol=1e-6)

    # Its folder, and those of its members, are loaded like an adapter's.
    texts = [example.question for example in tasks[0].test]
    members = [tmp_path / "mle" / "seed-0", tmp_path / "ensemble" / "seed-0-member-1"]
    for asked in (load(tmp_path / "ensemble" / "seed-0"), load(*members)):
        found = asked.predict(texts)
        assert (found.n_samples, asked.method.name) == (2, "ensemble")
        torch.testing.assert_close(found.probs, mean, rtol=0, atol=1e-6)

    def other(method: str, seed: int) -> Experiment:
        one = make(method, seed)
        return dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, rank=4))

    with pytest.raises(ValueError, match=r"recipe\.rank 2 -> 4; give the same options"):
        co.compare(co.plan(("mle",), other, tasks, tmp_path, seeds=1), progress=False)
    # A plain adapter that was trained for a conversion only is scored later, not trained again.
    trained.clear()
    only = tmp_path / "only"
    co.compare(co.plan(("tfb",), make, tasks, only, seeds=1), progress=False)
    assert trained == [("mle", 0)] and not co.load_run(only / "mle/seed-0" / co.RESULT_FILE).rows
    (scored,), _ = co.compare(co.plan(("mle",), make, tasks, only, seeds=1), progress=False)
    assert trained == [("mle", 0)] and scored.training is not None and scored.parameters
    numbers = [row.report.to_dict() for row in plain.rows]
    assert [row.report.to_dict() for row in scored.rows] == numbers
    damaged = tmp_path / "mle" / "seed-0" / co.RESULT_FILE
    damaged.write_text("{")
    with pytest.raises(ValueError, match="remove the file to run it again"):
        co.compare(pieces, progress=False)


def test_what_needs_a_plain_adapter_that_failed_says_so(
    make: Any, tasks: dict[int, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*args: Any, **options: Any) -> Any:
        raise ValueError("bad luck")

    monkeypatch.setattr(ex, "train_model", train)
    runs, failures = co.compare(
        co.plan(("temperature", "tfb"), make, tasks, tmp_path, seeds=1), progress=False
    )
    assert not runs and [failure.method for failure in failures] == ["mle", "tfb"]
    assert failures[0].error == "bad luck" and "whose training failed" in failures[1].error


def test_saved_checkpoints_wait_for_the_training_that_saves_them(
    make: Any, tasks: dict[int, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    waits: list[Any] = []
    places = [machine.Gpu("0", 1, 2)]

    def stop(*given: Any, after: Any, processes: int, gpus: Any, **options: Any) -> None:
        waits.extend(after)
        assert (processes, gpus) == (2, places)
        raise Stopped

    monkeypatch.setattr(co, "side_by_side", stop)
    monkeypatch.setattr(co, "gpus", lambda device: places)
    steps = sweep.Sweep(sweep.CHECKPOINT, (1, 2))
    one = lambda method, seed, item: make(method, seed)  # noqa: E731
    pieces = sweep.plan_sweep("blob", steps, one, tasks, tmp_path, seeds=2)
    with pytest.raises(Stopped):
        co.compare(pieces, processes=2, progress=False)
    assert waits == [set(), {0}, {0}, set(), {3}, {3}]


def test_a_run_without_memory_is_one_line(
    make: Any, tasks: dict[int, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(experiment: Experiment, *args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(ex, "train_model", train)
    pieces = co.plan(("blob",), make, tasks, tmp_path, seeds=1)
    _, (failure,) = co.compare(pieces, progress=False)
    assert failure.error == (
        "memory: expected enough for this run, got: CUDA out of memory. Tried to allocate 2.00 GiB; use "
        "smaller batches, a smaller --max-length, or fewer --processes"
    )


def test_results_survive_json(tmp_path: Path) -> None:
    log_probs = torch.tensor([[0.0, -math.inf], [math.log(0.25), math.log(0.75)]]).double()
    labels = torch.tensor([0, 1])
    row = scoring.Row(
        "BLoB N=2",
        "blob",
        2,
        None,
        metrics.evaluate(log_probs, labels),
        {"far": {"auroc": 0.5}},
        1.5,
        2.5,
        log_probs,
        labels,
        torch.tensor([0.1, 0.2]).double(),
    )
    spent = train.Training(1.0, 2, 3.0, [{"loss": 0.1}], {"r": 2})
    one = ex.Run(Experiment(seed=1), spent, [row], None, 0.5, 7)
    co.save_run(one, tmp_path / "result.json")
    found = co.load_run(tmp_path / "result.json")
    assert torch.equal(found.rows[0].log_probs, log_probs)
    assert found.rows[0].report == row.report and found.rows[0].ood == row.ood
    assert (found.experiment, found.training, found.parameters) == (one.experiment, spent, 7)


def test_methods_and_plans_are_checked(make: Any, tasks: dict[int, Task], tmp_path: Path) -> None:
    assert co.check_methods(["blob", "mle"]) == ("mle", "blob")
    with pytest.raises(ValueError, match="expected each once, got blob more than once"):
        co.check_methods(["blob", "mle", "blob"])
    assert co.check_methods(["all"])[:4] == ("mle", "temperature", "map", "dropout")
    with pytest.raises(ValueError, match="got magic"):
        co.check_methods(["mle", "magic"])
    with pytest.raises(ValueError, match="got none"):
        co.check_methods([])
    # Without anything that needs it plain LoRA is not trained.
    pieces = co.plan(("blob",), make, tasks, tmp_path, seeds=2)
    assert [piece.experiment.method for piece in pieces] == ["blob", "blob"]
    pieces = co.plan(("tfb",), make, tasks, tmp_path, seeds=1)
    assert [(p.experiment.method, p.score) for p in pieces] == [("mle", False), ("tfb", True)]
    pieces = co.plan(("ensemble",), make, tasks, tmp_path, seeds=2)
    labels = [piece.label for piece in pieces]
    assert labels[:2] == ["mle, seed 0", "mle, seed 1"] and labels[-1] == "ensemble, seed 1"
    assert "ensemble, seed 0, member 1" in labels
    with pytest.raises(ValueError, match="made of adapters of several seeds"):
        ex.run(make("ensemble", 0), tasks[0])
    with pytest.raises(ValueError, match="at least 2 for Ensemble, got 1"):
        few = lambda method, seed: dataclasses.replace(  # noqa: E731
            make(method, seed), recipe=dataclasses.replace(FAST, n_samples=1)
        )
        co.plan(("ensemble",), few, tasks, tmp_path, seeds=1)


def test_variants(make: Any, tasks: dict[int, Task], tmp_path: Path) -> None:
    words = ("temperature", "temperature-draws", "checkpoints", "blob-token", "tfb-on-blob")
    words = (*words, "laplace-sum")
    assert co.used_methods(words) == ("mle", "blob", "ensemble", "tfb", "laplace")
    assert not set(co.check_methods(["all"])) & set(VARIANTS)
    words = co.check_methods(words)
    pieces = co.plan(words, make, tasks, tmp_path, seeds=1)
    assert [(p.word, p.score) for p in pieces] == [
        ("mle", True),
        ("blob", False),
        ("blob-token", True),
        ("tfb-on-blob", True),
        ("laplace-sum", True),
        ("checkpoints", True),
    ]
    assert [len(p.plain) for p in pieces] == [0, 0, 1, 1, 1, 2]
    runs, failures = co.compare(pieces, progress=False)
    assert not failures
    rows = co.chosen(results.summarise(runs), words)
    names = [row.name for row in rows]
    draws = FAST.n_samples
    assert names[0] == "LoRA + temperature"
    assert {f"BLoB, token scope N={draws}", f"TFB on BLoB's mean N={draws}"} < set(names)
    assert f"BLoB, token scope N={draws} + temperature" in names
    assert any(name.startswith("Laplace-LoRA, evidence, sum") for name in names)
    assert "Checkpoint ensemble N=2" in names
    halfway, end = pieces[-1].plain
    assert halfway == end / "snapshots" / "step-1" and load(halfway) is not None
    again, _ = co.compare(pieces, progress=False)
    assert len(again) == len(runs)
    report = results.report(runs, tasks[0])
    assert {"blob-token", "tfb-on-blob", "laplace-sum"} < set(report["experiments"])
    assert report["experiments"]["laplace-sum"]["recipe"]["options"]["tokens"] == "sum"


def test_rows_of_one_adapter_are_scored_together(
    make: Any, tasks: dict[int, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    load_adapter, evaluate = co.load_adapter, co.evaluate_wanted
    broken = True

    def counted(path: Path, *args: Any, **options: Any) -> Any:
        loaded.append(path)
        return load_adapter(path, *args, **options)

    def failing(model: Any, encoder: Any, task: Task, wanted: Any, **options: Any) -> Any:
        found = evaluate(model, encoder, task, wanted, **options)
        errors = [broken and one.scope == "token" for one in wanted]
        return [RuntimeError("no room") if e else f for e, f in zip(errors, found, strict=True)]

    monkeypatch.setattr(co, "load_adapter", counted)
    monkeypatch.setattr(co, "evaluate_wanted", failing)
    words = ("blob", "blob-token", "blob-independent")
    pieces = co.plan(words, make, tasks, tmp_path, seeds=1)
    assert [len(call) for call in co.together(pieces, pieces)] == [1, 2]
    ended: list[tuple[str, bool]] = []
    runs, failures = co.compare(
        pieces,
        progress=False,
        done=lambda piece, result: ended.append((piece.word, isinstance(result, ex.Run))),
    )
    source = tmp_path / "blob" / "seed-0"
    assert loaded == [source]
    assert ended == [("blob", True), ("blob-token", False), ("blob-independent", True)]
    assert failures == [tables.Failure("blob-token", 0, "RuntimeError: no room")]
    assert [row.name for row in runs[1].rows] == ["BLoB, independent draws N=2"]
    assert runs[1].rows[0].method == "blob-independent"
    # Nothing is left of what failed.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blob", "blob-independent"]

    broken = False  # only what is missing runs
    again, failures = co.compare(pieces, progress=False)
    assert loaded == [source] * 2 and not failures
    assert [row.name for row in again[1].rows] == ["BLoB, token scope N=2"]
    # Adapters of other seeds, or with other settings, are others.
    two = co.plan(words, make, tasks, tmp_path, seeds=2)
    assert [len(call) for call in co.together(two, two)] == [1, 1, 2, 2]
    odd = pieces[1].experiment
    odd = dataclasses.replace(odd, recipe=dataclasses.replace(odd.recipe, eval_batch_size=3))
    mixed = [pieces[0], pieces[1]._replace(experiment=odd), pieces[2]]
    assert [len(call) for call in co.together(mixed, mixed)] == [1, 1, 1]


def test_rows_that_need_validation_rows(make: Any, tasks: dict[int, Task]) -> None:
    """Asked for they are an error before anything runs; of all rows they are left out."""
    bare = {seed: dataclasses.replace(tasks[seed], validation=[]) for seed in (0, 1)}
    every = co.check_methods(["all"])
    assert co.left_out(every, ["all"], make, tasks) == []
    assert co.left_out(every, ["all"], make, bare) == ["temperature"]
    assert co.left_out(every, ["all"], make, {0: tasks[0], 1: bare[1]}) == ["temperature"]
    for asked in (["temperature"], ["all", "temperature"]):
        with pytest.raises(ValueError, match=r"for temperature, got none in '\w+', which has 69"):
            co.left_out(co.check_methods(asked), asked, make, bare)
    words = ["temperature", "blob", "temperature-draws"]
    with pytest.raises(ValueError, match="leave temperature and temperature-draws out"):
        co.left_out(co.check_methods(words), words, make, bare)

    def greedy(method: str, seed: int) -> Experiment:
        one = make(method, seed)
        recipe = dataclasses.replace(one.recipe, train_on_validation=True)
        return dataclasses.replace(one, recipe=recipe)

    with pytest.raises(ValueError, match="for temperature, got train_on_validation=true"):
        co.left_out(["temperature"], ["temperature"], greedy, tasks)
    # Draws of this row have no rows to fit on, those of the other have.
    words = ["blob-all-labels", "temperature-draws"]
    with pytest.raises(ValueError, match="for temperature-draws, got train_on_validation=true"):
        co.left_out(words, words, lambda *key: co.varied(make(*key), "blob-all-labels"), tasks)
    assert co.left_out(["blob", *words], words, make, tasks) == []

    def chosen(method: str, seed: int) -> Experiment:
        one = make(method, seed)
        recipe = dataclasses.replace(one.recipe, options={"prior": "validation"})
        return dataclasses.replace(one, recipe=recipe)

    assert co.left_out(["laplace"], ["laplace"], chosen, tasks) == []
    with pytest.raises(ValueError, match="rows for prior=validation of laplace, got none"):
        co.left_out(["laplace"], ["laplace"], chosen, bare)
    for words in (["temperature-draws"], ["mle", "ensemble", "temperature-draws"]):
        with pytest.raises(
            ValueError, match="expected a method with draws beside temperature-draws"
        ):
            co.check_methods(words)


def test_draws_get_a_temperature_without_training_again(
    make: Any, tasks: dict[int, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("blob", "blob-token", "tfb", "ensemble")
    before, _ = co.compare(co.plan(words, make, tasks, tmp_path, seeds=1), progress=False)
    weights = {path: path.read_bytes() for path in tmp_path.rglob("adapter_model.safetensors")}
    assert len(weights) == 4
    bare = {0: dataclasses.replace(tasks[0], validation=[])}
    co.compare(co.plan(("blob",), make, bare, tmp_path / "bare", seeds=1), progress=False)
    for name in ("train_model", "convert_model"):
        monkeypatch.setattr(ex, name, pytest.fail)
    pieces = co.plan((*words, "temperature-draws"), make, tasks, tmp_path, seeds=1)
    after, failures = co.compare(pieces, progress=False)
    assert not failures and all(path.read_bytes() == old for path, old in weights.items())
    for old, new in zip(before, after, strict=True):
        names = [row.name for row in new.rows if row.temperature is None]
        assert names == [row.name for row in old.rows]
        more = [row.name for row in new.rows if row.temperature is not None]
        assert more == ([] if "Ensemble" in names[0] else [f"{names[-1]} + temperature"])
        assert new.rows[-1 - len(more)].report == old.rows[-1].report
        assert dataclasses.replace(new, rows=[]) == dataclasses.replace(old, rows=[])
    monkeypatch.setattr(co, "run_pieces", pytest.fail)  # nothing is left
    co.compare(pieces, progress=False)
    words = ("blob", "temperature-draws")
    co.compare(co.plan(words, make, bare, tmp_path / "bare", seeds=1), progress=False)
    with pytest.raises(ValueError, match="blob/seed-0 was made with, got data that have changed"):
        co.compare(co.plan(words, make, bare, tmp_path, seeds=1))


# --- The command ---------------------------------------------------------------------------------


def test_the_command(
    source: Source, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options: list[Any] = ["--data", source.data, "--model", tiny_model, "--seeds", 2]
    options += ["--ood", source.ood[0] if source.ood else "", "--steps", 2, "--out", out]
    options += ["--methods", "mle,temperature,blob,polar", "--set", "blob.n_samples=2"]
    options += ["--set", "rank=2", "--threads", 1]

    def call(*arguments: Any) -> Any:
        return CliRunner().invoke(app.app, ["compare", *map(str, arguments)])

    # A setting of one method that nobody can train is a line of the table.
    result = call(*options, "--set", 'polar.target_modules=["nothing"]')
    assert result.exit_code == 1, result.output
    table = (out / "table.md").read_text()
    assert table in result.stdout
    scores, beside = table.split("\n\n")
    assert [line.split("|")[1].strip() for line in beside.splitlines()[2:]] == [
        *("LoRA (MLE)", "LoRA + temperature", "BLoB mean", "BLoB N=2")
    ]
    assert "less MLE's" in beside and "[" in beside.splitlines()[-1]
    page = html.unescape((out / "report.html").read_text())
    assert "less MLE's" in page and ": 4 methods" in page
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in scores.splitlines()]
    width = len(lines[0])
    assert all(len(line) == width for line in lines)
    assert [line[0] for line in lines[2:]] == [
        *("LoRA (MLE)", "LoRA + temperature", "BLoB mean", "BLoB N=2"),
        *("PoLAR, seed 0", "PoLAR, seed 1"),
    ]
    assert lines[-1][1].startswith("failed: target-modules: expected names of linear layers")
    content = json.loads((out / "results.json").read_text())
    assert [one["method"] for one in content["failures"]] == ["polar", "polar"]
    assert content["experiments"]["blob"]["recipe"]["n_samples"] == 2
    assert content["experiments"]["mle"]["recipe"]["rank"] == 2
    headings = dict(zip(lines[0], range(width), strict=True))
    by_name = {one["name"]: one for one in content["methods"]}
    for line in lines[2:6]:
        found = by_name[line[0]]
        mean, spread = line[headings["NLL ↓"]].split("±")
        assert float(mean) == pytest.approx(found["mean"]["nll"], abs=5.1e-4)
        assert float(spread) == pytest.approx(found["std"]["nll"], abs=5.1e-4)
        auroc = [one["ood"]["ood"]["auroc"] for one in found["per_seed"]]
        text = line[headings["AUROC ood ↑"]].split("±")[0]
        assert float(text) == pytest.approx(sum(auroc) / 2, abs=5.1e-4)
    extra = headings["extra numbers"]
    # rho of two layers' query and value projections: 2 x 32 numbers each.
    assert [line[extra] for line in lines[2:6]] == ["0", "0", "+256", "+256"]
    for name in ("reliability.png", "risk_coverage.png"):
        assert (out / name).is_file()

    refused = call(*options)
    assert refused.exit_code == 2 and "use --overwrite, --resume" in refused.output
    changed = call(*options, "--resume", "--steps", 3)
    assert changed.exit_code == 2 and "recipe.steps 2 -> 3" in changed.output
    file = out / "mle" / "seed-0" / "experiment.json"  # as if the data had been others
    text = file.read_text()
    record = json.loads(text)
    for fields, message in (
        ({"rows": "0" * 16}, "the rows that .*seed-0 was made with, got data that have changed"),
        (
            {"task": {**record["task"], "label_names": ["1", "0"]}},
            "the classes of .*, 1, 0, got 0, 1",
        ),
    ):
        file.write_text(json.dumps({**record, **fields}))
        other = call(*options, "--resume")
        assert other.exit_code == 2 and re.search(message, other.output), other.output
    file.write_text(text)

    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(ex, "train_model", interrupt)
    finished = call(*options, "--resume", "--methods", "mle,temperature,blob")  # nothing is left
    assert finished.exit_code == 0, finished.output
    assert "failed" not in finished.stdout and "+256" in finished.stdout
    stopped = call(*options, "--resume", "--seeds", 3)
    assert stopped.exit_code == 130 and "--resume" in stopped.output
    assert len(list(out.rglob("result.json"))) == 4


@pytest.fixture
def few(tiny_data: Path, tmp_path: Path) -> Path:
    """A folder of so few training rows that none is split off for validation."""
    folder = tmp_path / "few"
    folder.mkdir()
    for name, rows in (("train", slice(16, 24)), ("test", slice(12))):
        lines = (tiny_data / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[rows]))
    return folder


def test_a_task_without_validation_rows(
    few: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["compare", "--data", few, "--model", tiny_model, "--seeds", 1, "--steps", 2]
    common += ["--set", "rank=2", "--threads", 1]

    def call(out: str, methods: str, *more: Any) -> Any:
        words = [*common, "--out", tmp_path / out, "--methods", methods, *more]
        return CliRunner().invoke(app.app, list(map(str, words)))

    for methods in ("mle,temperature", "temperature", "all,temperature"):
        refused = call("refused", methods)
        assert refused.exit_code == 2 and refused.stdout == ""
        error = refused.stderr.splitlines()[-1]
        assert error.startswith("error: methods: expected labelled validation rows for temperature")
        assert "got none in 'few', which has 8 training rows; give more rows" in error
        assert not (tmp_path / "refused").exists()
    every = co.METHODS
    monkeypatch.setattr(co, "METHODS", {name: every[name] for name in ("mle", "blob")})
    found = call("all", "all", "--set", "blob.n_samples=2")
    assert found.exit_code == 0, found.output
    assert "temperature is left out: it needs labelled validation rows" in found.stderr
    assert [
        line.split("|")[1].strip() for line in found.stdout.split("\n\n")[0].splitlines()[2:]
    ] == [*("LoRA (MLE)", "BLoB mean", "BLoB N=2")]
    assert "report.html" in found.stderr and (tmp_path / "all" / "report.html").is_file()


def test_what_is_not_there_is_said(
    source: Source, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["compare", "--data", source.data, "--model", tiny_model, "--steps", 2]
    common += ["--test-size", 8, "--set", "rank=2", "--threads", 1]

    def call(*more: Any) -> Any:
        return CliRunner().invoke(app.app, list(map(str, [*common, *more])))

    words = ["--methods", "blob,temperature-draws", "--n-samples", 0, "--seeds", 1]
    found = call(*words, "--out", tmp_path / "mean")
    assert found.exit_code == 0, found.output
    assert "no row for temperature-draws: the runs that it looks at have failed" in found.stderr
    train_model = train.train_model

    def second(experiment: Experiment, *args: Any, **options: Any) -> Any:
        if experiment.seed == 0:
            raise ValueError("bad luck")
        return train_model(experiment, *args, **options)

    # Page and pictures are of seed 0.
    monkeypatch.setattr(ex, "train_model", second)
    found = call("--methods", "mle", "--seeds", 2, "--out", tmp_path / "second")
    assert found.exit_code == 1 and "LoRA (MLE) (1 of 2)" in found.stdout
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("Wrote")]
    assert line.endswith("/second/: results.json, table.md, adapters")
    assert not (tmp_path / "second" / "report.html").exists()
