"""Runs of a few steps, and what they are compared by."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch

from bayes_kernels import metrics
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.recipe import METHODS, Experiment, Recipe
from bayes_kernels.experiment.scoring import Row
from bayes_kernels.experiment.train import Training

SHORT = Recipe(steps=12, lr=5e-3, n_samples=3, rank=4)


def with_recipe(experiment: Experiment, **changes: Any) -> Experiment:
    recipe = dataclasses.replace(experiment.recipe, **changes)
    return dataclasses.replace(experiment, recipe=recipe)


def alike(a: ex.Run, b: ex.Run) -> bool:
    """Whether two runs found the same, up to how torch's products round, without what they cost."""

    def numbers(run: ex.Run) -> dict[str, Any]:
        found = {}
        for row in run.rows:
            values = {**row.report.to_dict(), "temperature": row.temperature or 0.0}
            for name, scores in row.ood.items():
                values.update({f"{name}.{score}": value for score, value in scores.items()})
            found.update({f"{row.name}.{name}": value for name, value in values.items()})
        return found

    return numbers(a) == pytest.approx(numbers(b), rel=1e-3, abs=1e-4)


# An ensemble is made of several runs.
TRAINED = [name for name, row in METHODS.items() if row.made != "join"]


def fake_run(method: str, seed: int, ece: float, nll: float, accuracy: float = 0.8) -> ex.Run:
    report = metrics.Report(10, 2, accuracy, nll, ece, ece, 0.3, 0.1, 0.1, 0.2, None, 0.7, 0.9)
    empty = torch.empty(0)
    names = {"mle": ["LoRA (MLE)", "LoRA + temperature"], "blob": ["BLoB mean", "BLoB N=10"]}
    rows = [
        Row(name, method, 0, 1.5 if "+" in name else None, report, {}, 2.0, 100.0, *[empty] * 3)
        for name in names[method]
    ]
    cost = Training(10.0 + seed, 5, 200.0, [], {})
    return ex.Run(Experiment(method=method, seed=seed), cost, rows)


def seen_gpu(number: int, *, progress: bool) -> str:
    """What CUDA of this process looks at: a call for `side_by_side`."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all")
