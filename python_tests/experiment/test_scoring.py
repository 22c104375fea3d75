"""Predictions of data sets, and temperatures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bayes_kernels import metrics
from bayes_kernels.experiment import folders, scoring
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.recipe import Experiment
from bayes_kernels.hf.tasks.task import Task

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def test_predictions_keep_the_order_of_the_examples(
    finished: tuple[ex.Run, Path], tiny: Experiment, task: Task
) -> None:
    model, encoder = folders.load_adapter(finished[1], tiny, task)
    together, cost = scoring.predict_examples(model, encoder, task.test, n_samples=2, batch_size=7)
    assert cost > 0
    for index in (0, 11, len(task.test) - 1):
        alone, _ = scoring.predict_examples(model, encoder, [task.test[index]], n_samples=2)
        torch.testing.assert_close(together.log_probs[index], alone.log_probs[0], rtol=0, atol=1e-5)
    assert together.mutual_information.max() > 0


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
