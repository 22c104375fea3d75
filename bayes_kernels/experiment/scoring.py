"""Predictions of adapters, and their scores.

The cost of a prediction is milliseconds per example, each batch timed by itself (after
synchronising the GPU), batches visited in an order independent of their length, the first five (at
most half) discarded. Peak memory is as `bayes_kernels.experiment.machine` measures it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kernels import metrics

from ..hf.logits import Prediction
from ..hf.method import METHODS, PLAIN
from ..hf.tasks.answers import predict_examples
from ..hf.tasks.encoder import TaskEncoder
from ..hf.tasks.task import Example, Task
from .machine import peak_memory


@dataclass(frozen=True)
class Row:
    """One predictor's scores on the test set: a line of the table.

    Attributes:
        name: What the table calls it.
        method: A name of `bayes_kernels.hf.method.METHODS`.
        n_samples: Posterior draws; 0 for one set of weights.
        temperature: Temperature fitted on the validation split; None for none.
        report: Every metric on the test examples, with out-of-distribution detection over all sets
            together.
        ood: By set: auroc, fpr95, and scores where its examples have labels.
        ms_per_example: Cost of a prediction.
        peak_memory_mib: Peak memory of predicting.
        log_probs: (n, C) test predictions.
        labels: (n,) test labels.
        entropy_ood: Predictive entropies of all out-of-distribution examples.
    """

    name: str
    method: str
    n_samples: int
    temperature: float | None
    report: metrics.Report
    ood: dict[str, dict[str, float]]
    ms_per_example: float
    peak_memory_mib: float
    log_probs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    entropy_ood: Tensor = field(repr=False)


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """The temperature T that minimises the NLL of softmax(log_probs / T).

    Args:
        log_probs: (n, C) log-probabilities or logits of held-out examples.
        labels: (n,) their labels.

    Returns:
        T, within [0.05, 20]: where every prediction is right, or none, the minimum is at infinity.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    logits = log_probs.double().clamp(min=-1e4)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_t], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )
    bound = math.log(20)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(logits * (-log_t).exp(), labels)
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    found = float(log_t.detach())
    return math.exp(min(max(found, -bound), bound)) if math.isfinite(found) else 1.0


# --- Scores --------------------------------------------------------------------------------------


def known_labels(examples: Sequence[Example]) -> Tensor | None:
    """(n,) labels of examples; None where there are none, or not all have one."""
    labels = [example.label for example in examples]
    return None if None in labels or not labels else torch.tensor(labels)


def evaluate_model(
    model: nn.Module,
    encoder: TaskEncoder,
    task: Task,
    *,
    method: str,
    n_samples: int = 10,
    seed: int = 0,
    draws: str = "antithetic",
    scope: str = "example",
    batch_size: int = 16,
    temperature: bool = True,
    temper_draws: bool = False,
    mean: bool = True,
    progress: bool = True,
    label: str = "",
) -> list[Row]:
    """Scores of a trained adapter on the task's test and out-of-distribution examples.

    Rows: the single set of weights (plain LoRA, or the posterior mean); with ``temperature`` the
    same with a temperature fitted on the validation split, where there is one; for Bayesian methods
    with n_samples > 0 the mean prediction of that many draws. The same seed gives the same draws
    for every set of examples, and ``temper_draws`` adds a temperature to them. Methods that join
    adapters have the last row only, and without ``mean`` so have all methods with draws. ``draws`` and
    ``scope`` are those of `bayes_kernels.hf.predict`.

    Raises:
        ValueError: There are no labelled test examples.
    """
    labels = known_labels(task.test)
    if labels is None:
        raise ValueError(f"task {task.name!r}: expected labelled test examples, got none")
    row = METHODS[method]
    # The checkpoints of a run that converts plain LoRA have no posterior yet.
    own = row.predictor(model)
    bayesian = own is not None and own.draws
    name = (row if bayesian or row.made == "train" else METHODS[PLAIN]).title
    rows = []
    counts = [0] if not bayesian or n_samples == 0 else [0, n_samples]
    if n_samples and bayesian and (row.made == "join" or not mean):
        counts = [n_samples]
    for count in counts:
        options: dict[str, Any] = {
            "n_samples": count,
            "seed": seed,
            "draws": draws,
            "scope": scope,
            "batch_size": batch_size,
            "progress": progress,
        }
        with peak_memory() as peak:
            what = f"{label or name} N={count}" if bayesian else label or name
            test, cost = predict_examples(
                model, encoder, task.test, label=f"{what}: test", **options
            )
            ood = {
                key: predict_examples(model, encoder, part, label=f"{what}: {key}", **options)[0]
                for key, part in task.ood.items()
                if part
            }
        row_name = f"{name} N={count}" if count else f"{name} mean" if bayesian else name
        rows.append(_score(row_name, method, None, test, ood, task, cost, peak.mib))
        held_out = known_labels(task.validation)
        if (temper_draws if count else temperature) and held_out is not None:
            validation, _ = predict_examples(
                model, encoder, task.validation, label=f"{what}: validation", **options
            )
            t = fit_temperature(validation.log_probs, held_out)
            short = row_name.removesuffix(" (MLE)")
            rows.append(
                _score(
                    f"{short} + temperature",
                    method,
                    t,
                    _tempered(test, t),
                    {key: _tempered(part, t) for key, part in ood.items()},
                    task,
                    cost,
                    peak.mib,
                )
            )
    return rows


def _tempered(prediction: Prediction, temperature: float) -> Prediction:
    log_probs = (prediction.log_probs / temperature).log_softmax(-1)
    entropy = metrics.predictive_entropy(log_probs)
    return Prediction(log_probs, entropy, entropy, n_samples=0)


def _score(
    name: str,
    method: str,
    temperature: float | None,
    test: Prediction,
    ood: dict[str, Prediction],
    task: Task,
    cost: float,
    memory: float,
) -> Row:
    labels = known_labels(task.test)
    assert labels is not None
    everything = torch.cat([part.log_probs for part in ood.values()]) if ood else None
    found = metrics.evaluate(test.log_probs, labels, ood_log_probs=everything)
    # "probit" and "bridge" have no draws whose entropies could be compared.
    if test.n_samples and not bool(test.mutual_information.isnan().any()):
        found = dataclasses.replace(found, mutual_information=float(test.mutual_information.mean()))
    by_set: dict[str, dict[str, float]] = {}
    entropy = metrics.predictive_entropy(test.log_probs)
    for key, part in ood.items():
        outside = metrics.predictive_entropy(part.log_probs)
        scores = {
            "auroc": metrics.ood_auroc(entropy, outside),
            "fpr95": metrics.fpr95(entropy, outside),
        }
        truth = known_labels(task.ood[key])
        if truth is not None:
            shifted = metrics.evaluate(part.log_probs, truth)
            scores.update({k: getattr(shifted, k) for k in ("accuracy", "nll", "ece", "brier")})
        by_set[key] = scores
    entropies = [metrics.predictive_entropy(part.log_probs) for part in ood.values()]
    return Row(
        name,
        method,
        test.n_samples,
        temperature,
        found,
        by_set,
        cost,
        memory,
        test.log_probs,
        labels,
        torch.cat(entropies) if entropies else torch.empty(0, dtype=torch.float64),
    )
