"""Summaries over seeds, and the verdict."""

from __future__ import annotations

import json
import statistics

import pytest

from bayes_kernels.experiment import results
from bayes_kernels.task import Task
from experiment.tiny_runs import fake_run

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def test_summaries_are_means_and_standard_deviations(task: Task) -> None:
    eces = [0.1, 0.15, 0.3]
    runs = [fake_run("mle", seed, ece, 1.0) for seed, ece in enumerate(eces)]
    (first, _) = results.summarise(runs)
    assert first.seeds == (0, 1, 2) and first.per_seed["ece"] == eces
    assert first.mean["ece"] == pytest.approx(statistics.mean(eces))
    assert first.std["ece"] == pytest.approx(statistics.stdev(eces))
    assert first.mean["train_seconds"] == pytest.approx(11.0)
    assert results.summarise(runs[:1])[0].std == {}
    content = results.report(runs, task, command=["bayes-kernels", "demo"])
    assert content["seeds"] == [0, 1, 2] and content["command"] == ["bayes-kernels", "demo"]
    method = content["methods"][0]
    assert [entry["metrics"]["ece"] for entry in method["per_seed"]] == eces
    assert "train_seconds" not in method["mean"] and method["cost"]["train_seconds"] == 11.0
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_the_verdict_is_what_the_numbers_say() -> None:
    def words(map_scores: tuple[float, float], blob_scores: tuple[float, float]) -> str:
        runs = [fake_run("mle", 0, *map_scores), fake_run("blob", 0, *blob_scores)]
        return results.verdict(results.summarise(runs), "LoRA (MLE)", "BLoB N=10")

    better = words((0.2, 1.0), (0.1, 0.8))
    assert better.startswith("BLoB N=10 was better calibrated than LoRA (MLE)")
    assert "lower on 1 of 1 seed)" in better and "single seed" in better
    assert "was NOT better" in words((0.1, 0.8), (0.2, 1.0))
    assert "was NOT better" in words((0.1, 0.8), (0.1, 0.8))
    assert "ECE and NLL disagree" in words((0.1, 1.0), (0.2, 0.9))
    assert "0.200 (no lower than BLoB N=10)" in better
