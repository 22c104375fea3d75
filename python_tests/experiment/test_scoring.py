"""Predictions of data sets, and temperatures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bayes_kernels import metrics
from bayes_kernels.experiment import folders, scoring
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.recipe import Experiment
from bayes_kernels.hf.tasks import answers
from bayes_kernels.hf.tasks.encoder import TaskEncoder
from bayes_kernels.task import Example, Task

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def test_predictions_keep_the_order_of_the_examples(
    finished: tuple[ex.Run, Path], tiny: Experiment, task: Task
) -> None:
    model, encoder = folders.load_adapter(finished[1], tiny, task)
    together, cost = answers.predict_examples(model, encoder, task.test, n_samples=2, batch_size=7)
    assert cost > 0
    for index in (0, 11, len(task.test) - 1):
        alone, _ = answers.predict_examples(model, encoder, [task.test[index]], n_samples=2)
        torch.testing.assert_close(together.log_probs[index], alone.log_probs[0], rtol=0, atol=1e-5)
    assert together.mutual_information.max() > 0


def rows_through(model: torch.nn.Module, run: Any) -> int:
    """Texts that go through the model's first layer in `run`, one for each draw."""
    layer = next(m for m in model.modules() if type(m).__name__ == "BertIntermediate")
    seen: list[int] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    run()
    hook.remove()
    return sum(seen)


def test_all_rows_of_an_adapter_come_from_one_loop(
    finished: tuple[ex.Run, Path],
    tiny: Experiment,
    task: Task,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, encoder = folders.load_adapter(finished[1], tiny, task)
    wanted = [
        scoring.Wanted(4, temper_draws=True, temperature=False),
        scoring.Wanted(2, mean=False),
        scoring.Wanted(0, temperature=False),
        scoring.Wanted(2, "independent", mean=False),
        scoring.Wanted(2, scope="token", mean=False),
    ]
    options: dict[str, Any] = {"method": "blob", "progress": False}
    encoded: list[str] = []
    encode = TaskEncoder.__call__

    def counted(self: TaskEncoder, example: Example) -> dict[str, Any]:
        encoded.append(example.id)
        return encode(self, example)

    monkeypatch.setattr(TaskEncoder, "__call__", counted)
    found: list[Any] = []
    run = lambda: found.append(scoring.evaluate_wanted(model, encoder, task, wanted, **options))  # noqa: E731
    tests, fitted = len(task.test) + len(task.ood["ood"]), len(task.validation)
    # The mean, 4 draws of which 2 are those of 2, and 2 of each other kind; 4 for the temperature.
    assert rows_through(model, run) == tests * (1 + 4 + 2 + 2) + fitted * 4
    assert len(encoded) == len(set(encoded)) == tests + fitted
    names = [[row.name for row in rows] for rows in found[0]]
    two = ["BLoB N=2"]
    assert names == [
        ["BLoB mean", "BLoB N=4", "BLoB N=4 + temperature"],
        two,
        ["BLoB mean"],
        two,
        two,
    ]
    for one, rows in zip(wanted, found[0], strict=True):
        alone = scoring.evaluate_model(model, encoder, task, **one._asdict(), **options)
        for row, same in zip(rows, alone, strict=True):
            torch.testing.assert_close(row.log_probs, same.log_probs, rtol=1e-4, atol=1e-5)
            assert row.ms_per_example > 0 and row.peak_memory_mib > 0
            assert (row.n_samples, row.name) == (same.n_samples, same.name)
    few, many = found[0][1][0], found[0][0][1]
    assert many.ms_per_example > few.ms_per_example  # whose draws are its own, too


def test_what_fails_leaves_the_other_rows(
    finished: tuple[ex.Run, Path],
    tiny: Experiment,
    task: Task,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, encoder = folders.load_adapter(finished[1], tiny, task)
    steps = answers.prediction_steps

    def broken(model: Any, batch: Any, samplings: Any, **options: Any) -> Any:
        for step in steps(model, batch, samplings, **options):
            yield step
            if step.number is not None and samplings[step.number].scope == "token":
                raise RuntimeError("no room")

    monkeypatch.setattr(answers, "prediction_steps", broken)
    wanted = [scoring.Wanted(2, scope="token"), scoring.Wanted(2)]
    options: dict[str, Any] = {"method": "blob", "progress": False}
    failed, rows = scoring.evaluate_wanted(model, encoder, task, wanted, **options)
    assert isinstance(failed, RuntimeError) and str(failed) == "no room"
    assert not isinstance(rows, Exception)
    alone = scoring.evaluate_model(model, encoder, task, n_samples=2, **options)
    assert [row.name for row in rows] == ["BLoB mean", "BLoB mean + temperature", "BLoB N=2"]
    assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(rows, alone, strict=True))
    with pytest.raises(RuntimeError, match="no room"):
        scoring.evaluate_wanted(model, encoder, task, wanted[:1], **options)


def test_what_fails_on_validation_rows_leaves_rows_without_a_temperature(
    finished: tuple[ex.Run, Path],
    tiny: Experiment,
    task: Task,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, encoder = folders.load_adapter(finished[1], tiny, task)
    sample = scoring.sample_examples

    def broken(model: Any, encoder: Any, examples: Any, samplings: Any, **options: Any) -> Any:
        if examples is task.validation:
            return [RuntimeError("no room")] * len(samplings)
        return sample(model, encoder, examples, samplings, **options)

    monkeypatch.setattr(scoring, "sample_examples", broken)
    wanted = [
        scoring.Wanted(2, mean=False, temper_draws=True),
        scoring.Wanted(2, mean=False),
        scoring.Wanted(2),
    ]
    options: dict[str, Any] = {"method": "blob", "progress": False}
    tempered, rows, mean = scoring.evaluate_wanted(model, encoder, task, wanted, **options)
    assert isinstance(tempered, RuntimeError) and isinstance(mean, RuntimeError)
    assert not isinstance(rows, Exception) and [row.name for row in rows] == ["BLoB N=2"]


def test_temperature_is_the_minimum_of_the_nll() -> None:
    from scipy.optimize import minimize_scalar

    torch.manual_seed(0)
    logits = torch.randn(500, 4, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits).sample()
    for factor in (0.3, 1.0, 5.0):
        sharp = (logits * factor).log_softmax(-1)
        found = scoring.fit_temperature(sharp, labels)

        def loss(log_t: float, sharp: torch.Tensor = sharp) -> float:
            return metrics.nll((sharp / math.exp(log_t)).log_softmax(-1), labels)

        best = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
        assert found == pytest.approx(math.exp(best.x), rel=1e-4)
        assert found == pytest.approx(factor, rel=0.25)
    certain = torch.eye(4).double()[labels].mul(30).log_softmax(-1)
    assert scoring.fit_temperature(certain, labels) == pytest.approx(1 / 20, rel=1e-6) or (
        0.05 <= scoring.fit_temperature(certain, labels) <= 20
    )
