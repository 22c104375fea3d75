"""Runs put together: means over seeds, the verdict, ``metrics.json`` and pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bayes_kernels import metrics

from ..hf.tasks.record import FORMAT
from ..task import Task
from .machine import machine, versions
from .run import Run
from .scoring import Row

METRICS_FILE = "metrics.json"
# Names of costs, with their headings and digits in tables; parameters are shown beyond plain LoRA's.
COSTS = {
    "train_seconds": ("train s", 0),
    "conversion_seconds": ("convert s", 0),
    "ms_per_example": ("ms/text", 1),
    "train_memory_mib": ("train MiB", 0),
    "predict_memory_mib": ("predict MiB", 0),
    "parameters": ("extra numbers", 0),
}


@dataclass(frozen=True)
class Summary:
    """A predictor over seeds: mean and standard deviation (n - 1) of each number.

    Attributes:
        name: What the table calls it.
        seeds: The seeds.
        mean, std: By metric, and by `COSTS` where known; std is empty for a single seed.
        per_seed: Values by metric, in the order of the seeds.
        ood: By set, the mean of its scores.
        ood_std: By set, their standard deviation; empty for a single seed.
        method: A name of `bayes_kernels.hf.method.METHODS`.
        temperature: Whether a temperature was fitted.
    """

    name: str
    seeds: tuple[int, ...]
    mean: dict[str, float]
    std: dict[str, float]
    per_seed: dict[str, list[float]]
    ood: dict[str, dict[str, float]]
    ood_std: dict[str, dict[str, float]] = field(default_factory=dict)
    method: str = ""
    temperature: bool = False


def _costs(run: Run, row: Row) -> dict[str, float]:
    costs = {"ms_per_example": row.ms_per_example, "predict_memory_mib": row.peak_memory_mib}
    if run.training is not None:
        costs["train_seconds"] = run.training.seconds
        costs["train_memory_mib"] = run.training.peak_memory_mib
    if run.conversion_seconds is not None:
        costs["conversion_seconds"] = run.conversion_seconds
    if run.parameters is not None:
        costs["parameters"] = run.parameters
    return costs


def _word(run: Run) -> str:
    """The method, or of a variant in a comparison its word."""
    return run.rows[0].method if run.rows else run.experiment.method


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """Runs that differ in the seed only, put together by name of the row, in their order."""
    found: dict[str, list[tuple[Run, Row]]] = {}
    for one in runs:
        for row in one.rows:
            found.setdefault(row.name, []).append((one, row))
    summaries = []
    for name, pairs in found.items():
        numbers = [{**row.report.to_dict(), **_costs(one, row)} for one, row in pairs]
        # Costs that every run has: a run without a folder has no file whose numbers can be counted.
        shared = set.intersection(*(set(v) for v in numbers)) - {"n", "n_classes"}
        keys = [key for key in numbers[0] if key in shared]
        table = {key: [float(v[key]) for v in numbers] for key in keys}
        stacked = {key: torch.tensor(v, dtype=torch.float64) for key, v in table.items()}
        scores = {
            name: {
                score: torch.tensor([row.ood[name][score] for _, row in pairs], dtype=torch.float64)
                for score in found_scores
            }
            for name, found_scores in pairs[0][1].ood.items()
        }
        several = len(pairs) > 1
        summaries.append(
            Summary(
                name=name,
                seeds=tuple(one.experiment.seed for one, _ in pairs),
                mean={key: float(v.mean()) for key, v in stacked.items()},
                std={key: float(v.std()) for key, v in stacked.items()} if several else {},
                per_seed=table,
                ood={
                    key: {score: float(v.mean()) for score, v in values.items()}
                    for key, values in scores.items()
                },
                ood_std={
                    key: {score: float(v.std()) for score, v in values.items()}
                    for key, values in scores.items()
                    if several
                },
                method=pairs[0][1].method,
                temperature=pairs[0][1].temperature is not None,
            )
        )
    return summaries


def report(runs: Sequence[Run], task: Task, *, command: Sequence[str] = ()) -> dict[str, Any]:
    """The contents of ``metrics.json``.

    Keys: ``format``; ``command``; ``created`` (UTC); ``task`` (name, kind, label names, examples of
    each split); ``experiments`` (settings by method); ``methods``: for each predictor ``name``,
    ``method``, ``n_samples``, ``mean``, ``std`` (empty for one seed) and ``per_seed``, a list of
    ``seed``, ``metrics``, ``ood``, ``temperature`` and ``cost``; ``training``: by run the steps,
    the adapter's options with defaults filled in, the log, and the report of a conversion;
    ``versions``; ``machine``. Everything but ``created`` and ``cost`` is the same in every run with
    the same settings on the same machine with the same number of threads. Numbers that are not
    finite are null.
    """
    methods = []
    for summary in summarise(runs):
        per_seed = []
        for one in runs:
            for row in one.rows:
                if row.name != summary.name:
                    continue
                per_seed.append(
                    {
                        "seed": one.experiment.seed,
                        "metrics": row.report.to_dict(),
                        "ood": row.ood,
                        "temperature": row.temperature,
                        "cost": _costs(one, row),
                    }
                )
                method, n_samples = row.method, row.n_samples
        methods.append(
            {
                "name": summary.name,
                "method": method,
                "n_samples": n_samples,
                "mean": {k: v for k, v in summary.mean.items() if k not in COSTS},
                "std": {k: v for k, v in summary.std.items() if k not in COSTS},
                "cost": {k: v for k, v in summary.mean.items() if k in COSTS},
                "per_seed": per_seed,
            }
        )
    return {
        "format": FORMAT,
        "command": list(command),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "task": {
            "name": task.name,
            "kind": task.kind,
            "label_names": list(task.label_names),
            "examples": {split: len(examples) for split, examples in task.splits.items()},
        },
        "experiments": {_word(one): one.experiment.to_dict() for one in reversed(runs)},
        "seeds": sorted({one.experiment.seed for one in runs}),
        "methods": methods,
        "training": [
            {
                "method": one.experiment.method,
                "seed": one.experiment.seed,
                "steps": one.training.steps,
                "adapter": one.training.adapter,
                "log": one.training.log,
                "conversion": one.conversion,
                "scale": one.scale,
                "notes": list(one.notes),
            }
            for one in runs
            if one.training is not None
        ],
        "versions": versions(),
        "machine": machine(),
    }


def verdict(summaries: Sequence[Summary], plain: str, bayesian: str) -> str:
    """One paragraph on whether the Bayesian predictor was better calibrated than the plain one.

    Better means a lower ECE and a lower NLL, as means over seeds.
    """
    by_name = {summary.name: summary for summary in summaries}
    a, b = by_name[plain], by_name[bayesian]
    lower = {key: b.mean[key] < a.mean[key] for key in ("ece", "nll")}
    wins = sum(x < y for x, y in zip(b.per_seed["ece"], a.per_seed["ece"], strict=True))
    figures = (
        f"ECE {b.mean['ece']:.3f} against {a.mean['ece']:.3f} (lower on {wins} of {len(a.seeds)} "
        f"seed{'s' if len(a.seeds) > 1 else ''}), NLL {b.mean['nll']:.3f} against "
        f"{a.mean['nll']:.3f}, accuracy {b.mean['accuracy']:.3f} against {a.mean['accuracy']:.3f}"
    )
    if all(lower.values()):
        text = f"{bayesian} was better calibrated than {plain}: {figures}."
    elif not any(lower.values()):
        text = f"{bayesian} was NOT better calibrated than {plain}: {figures}."
    else:
        text = f"{bayesian} and {plain} are undecided, ECE and NLL disagree: {figures}."
    scaled = next((s for s in summaries if s.temperature), None)
    if scaled is not None:
        relation = "lower" if scaled.mean["ece"] < b.mean["ece"] else "no lower"
        relation_nll = "lower" if scaled.mean["nll"] < b.mean["nll"] else "no lower"
        text += (
            f" Plain LoRA with a temperature fitted on the validation split: ECE "
            f"{scaled.mean['ece']:.3f} ({relation} than {bayesian}), NLL {scaled.mean['nll']:.3f} "
            f"({relation_nll})."
        )
    if len(a.seeds) == 1:
        text += " A single seed: differences may be chance."
    return text


def save_plots(rows: Sequence[Row], folder: Path, *, uncertain: Row | None = None) -> list[Path]:
    """`reliability.png` and `risk_coverage.png` of all rows; `entropy.png` of one of them.

    Args:
        rows: Predictors on the same test examples, from one seed.
        folder: Where to write.
        uncertain: Whose entropies in and out of distribution to show; the last row by default.
            There is no such picture without out-of-distribution examples.

    Raises:
        ImportError: matplotlib is not installed (extra ``plots``).
    """
    from bayes_kernels import plots

    bins = {row.name: metrics.reliability_bins(row.log_probs, row.labels) for row in rows}
    curves = {
        row.name: metrics.risk_coverage_curve(
            *metrics.confidence_and_correct(row.log_probs, row.labels)
        )
        for row in rows
    }
    written = [
        plots.save(plots.reliability_diagram(bins), folder / "reliability.png"),
        plots.save(plots.risk_coverage(curves), folder / "risk_coverage.png"),
    ]
    shown = uncertain or rows[-1]
    if len(shown.entropy_ood):
        inside = metrics.predictive_entropy(shown.log_probs)
        figure = plots.entropy_histogram(
            inside, shown.entropy_ood, xlabel=f"predictive entropy of {shown.name} (nats)"
        )
        written.append(plots.save(figure, folder / "entropy.png"))
    return written
