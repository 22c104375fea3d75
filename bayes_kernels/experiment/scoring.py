"""Predictions of adapters, and their scores.

All rows of one adapter are computed in one loop over the batches of each set: what several of them need
is computed once, and counts for each of them (`bayes_kernels.hf.predict_several`).

The cost of a prediction is milliseconds per example, each batch timed by itself (after
synchronising the GPU), batches visited in an order independent of their length, the first five (at
most half) discarded. Peak memory is as `bayes_kernels.experiment.machine` measures it, step by step.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayes_kernels import metrics

from ..hf.draws import Sampling
from ..hf.logits import Prediction
from ..hf.method import METHODS, PLAIN
from ..hf.tasks.answers import Sampled, sample_examples
from ..hf.tasks.encoder import TaskEncoder
from ..task import Example, Task
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


def untempered(task: Task) -> str | None:
    """What to say of a run, of a task as its method sees it, that has nothing to fit a temperature on."""
    if known_labels(task.validation) is not None:
        return None
    return (
        f"no row with a temperature: it is fitted on labelled validation rows, and this run of {task.name!r} "
        "has none"
    )


class Wanted(NamedTuple):
    """Rows that are made of one adapter.

    Attributes:
        n_samples, draws, scope: Of the row with draws, as `bayes_kernels.hf.predict` takes them.
        mean: Whether methods with draws have a row for the mean, too.
        temperature: Whether the single set of weights has a row with a temperature, too.
        temper_draws: Whether the draws have one.
    """

    n_samples: int = 10
    draws: str = "antithetic"
    scope: str = "example"
    mean: bool = True
    temperature: bool = True
    temper_draws: bool = False


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
    wanted = Wanted(n_samples, draws, scope, mean, temperature, temper_draws)
    (rows,) = evaluate_wanted(
        model,
        encoder,
        task,
        [wanted],
        method=method,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        label=label,
    )
    assert not isinstance(rows, Exception)
    return rows


def evaluate_wanted(
    model: nn.Module,
    encoder: TaskEncoder,
    task: Task,
    wanted: Sequence[Wanted],
    *,
    method: str,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    label: str = "",
) -> list[list[Row] | Exception]:
    """`evaluate_model` for several numbers or kinds of draws, in one loop over the examples.

    Args:
        model, encoder, task, method, seed, batch_size, progress, label: As in `evaluate_model`.
        wanted: What each list of rows is made of.

    Returns:
        For each of `wanted` its rows. Where it fails its exception, if there are others; a single one raises.

    Raises:
        ValueError: There are no labelled test examples.
    """
    if known_labels(task.test) is None:
        raise ValueError(f"task {task.name!r}: expected labelled test examples, got none")
    row = METHODS[method]
    # The checkpoints of a run that converts plain LoRA have no posterior yet.
    own = row.predictor(model)
    bayesian = own is not None and own.draws
    name = (row if bayesian or row.made == "train" else METHODS[PLAIN]).title
    held_out = known_labels(task.validation)

    def counts(one: Wanted) -> list[int]:
        if one.n_samples and bayesian and (row.made == "join" or not one.mean):
            return [one.n_samples]
        return [0] if not bayesian or one.n_samples == 0 else [0, one.n_samples]

    def sampling(one: Wanted, count: int) -> Sampling:
        return Sampling(count, one.draws, one.scope) if count else Sampling(0)

    def tempered(one: Wanted, count: int) -> bool:
        return held_out is not None and (one.temper_draws if count else one.temperature)

    # In their order, each once.
    asked = [(one, count) for one in wanted for count in counts(one)]
    scored = list(dict.fromkeys(sampling(*pair) for pair in asked))
    fitted = list(dict.fromkeys(sampling(*pair) for pair in asked if tempered(*pair)))
    sets = {"test": (task.test, scored)}
    sets.update({f"ood {key}": (part, scored) for key, part in task.ood.items() if part})
    if fitted:
        sets["validation"] = (task.validation, fitted)
    gc.collect()  # else what is left of training would count as memory
    found: dict[str, dict[Sampling, Sampled]] = {}
    failed: dict[Sampling, Exception] = {}
    # On validation rows, which not all that is wanted needs.
    unfitted: dict[Sampling, Exception] = {}
    for key, (examples, samplings) in sets.items():
        left = [one for one in samplings if one not in failed]
        if not left:
            continue
        watched = {} if key == "validation" else {"watch": functools.partial(peak_memory, False)}
        results = sample_examples(
            model,
            encoder,
            examples,
            left,
            seed=seed,
            batch_size=batch_size,
            apart=len(wanted) > 1,
            progress=progress,
            label=f"{label or name}: {key.removeprefix('ood ')}",
            **watched,
        )
        for one, given in zip(left, results, strict=True):
            if isinstance(given, Exception):
                (unfitted if key == "validation" else failed)[one] = given
            else:
                found.setdefault(key, {})[one] = given

    def rows_of(one: Wanted) -> list[Row]:
        rows = []
        for count in counts(one):
            key = sampling(one, count)
            test = found["test"][key]
            ood = {far: found[f"ood {far}"][key] for far, part in task.ood.items() if part}
            memory = max(part.peak for part in (test, *ood.values()))
            outside = {far: part.prediction for far, part in ood.items()}
            costs = task, test.milliseconds, memory
            row_name = f"{name} N={count}" if count else f"{name} mean" if bayesian else name
            rows.append(_score(row_name, method, None, test.prediction, outside, *costs))
            if tempered(one, count):
                assert held_out is not None
                t = fit_temperature(found["validation"][key].prediction.log_probs, held_out)
                cooled = {far: _tempered(part, t) for far, part in outside.items()}
                short = f"{row_name.removesuffix(' (MLE)')} + temperature"
                rows.append(_score(short, method, t, _tempered(test.prediction, t), cooled, *costs))
        return rows

    def result(one: Wanted) -> list[Row] | Exception:
        for count in counts(one):
            key = sampling(one, count)
            error = failed.get(key) or (unfitted.get(key) if tempered(one, count) else None)
            if error is not None:
                return error
        return rows_of(one)

    return [result(one) for one in wanted]


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
