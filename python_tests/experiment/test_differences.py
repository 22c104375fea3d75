"""The table of a comparison beside plain LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bayes_kernels import metrics
from bayes_kernels.experiment import compare as co
from bayes_kernels.experiment.differences import _interval, difference_table, markdown, runs_in
from bayes_kernels.experiment.recipe import Experiment
from bayes_kernels.experiment.run import Run
from bayes_kernels.experiment.scoring import Row

LABELS = torch.arange(60) % 3


def row(
    name: str, method: str, seed: int, sharpness: float, temperature: float | None = None
) -> Row:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    logits[torch.arange(60), LABELS] += 1.0
    log_probs = (sharpness * logits).log_softmax(-1)
    report = metrics.evaluate(log_probs, LABELS)
    ood = {"far": {"auroc": 0.6, "fpr95": 0.9}, "near": {"auroc": 0.5, "fpr95": 0.9, "nll": 1.5}}
    entropy = metrics.predictive_entropy(log_probs)
    return Row(name, method, 0, temperature, report, ood, 1.0, 1.0, log_probs, LABELS, entropy)


def runs() -> list[Run]:
    found = []
    for seed in (0, 1):
        rows = [
            row("LoRA (MLE)", "mle", seed, 3.0),
            row("LoRA + temperature", "mle", seed, 1.0, 3.0),
        ]
        found.append(Run(Experiment(method="mle", seed=seed), None, rows))
        found.append(
            Run(Experiment(method="blob", seed=seed), None, [row("BLoB N=10", "blob", seed, 1.2)])
        )
    return found


def test_differences_are_those_of_the_paired_bootstrap() -> None:
    table = difference_table(runs())
    assert [cells[0] for cells in table.rows] == ["LoRA (MLE)", "LoRA + temperature", "BLoB N=10"]
    assert table.headings[:5] == ["method", "accuracy ↑", "less MLE's", "NLL ↓", "less MLE's"]
    assert table.headings[-3:] == ["AUROC far ↑", "AUROC near ↑", "NLL near ↓"]
    plain, _, blob = table.rows
    assert [plain[i] for i in (2, 4, 6, 8)] == [""] * 4
    pairs = [
        torch.stack([row("", "", seed, sharpness).log_probs for seed in (0, 1)])
        for sharpness in (1.2, 3.0)
    ]
    for key, place in (("nll", 4), ("brier", 6), ("ece", 8)):
        found = metrics.paired_bootstrap(*pairs, LABELS)[key]
        words = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        assert blob[place] == words.replace("-", "−").replace("0.", ".")
    large = metrics.Difference(-10.5, -20.25, 0.125)
    assert _interval(large) == "−10.500 [−20.250, +.125]"
    assert blob[2] == "+.000 [+.000, +.000]"  # the same classes
    nll = [one.rows[0].report.nll for one in runs()[1::2]]
    assert blob[3] == f"{sum(nll) / 2:.3f}±{abs(nll[0] - nll[1]) / 2**0.5:.3f}".replace("0.", ".")


def test_a_folder_that_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected METHOD/seed-N/result.json of compare, found none"
    ):
        markdown(tmp_path)
    for one in reversed(runs()[:3]):  # BLoB has one seed so far
        co.save_run(
            one, tmp_path / one.rows[0].method / f"seed-{one.experiment.seed}" / "result.json"
        )
    found = runs_in(tmp_path)
    assert [(one.rows[0].method, one.experiment.seed) for one in found] == [
        ("mle", 0),
        ("mle", 1),
        ("blob", 0),
    ]
    text = markdown(tmp_path)
    assert "BLoB N=10" in text and "±" in text and "**" not in text
    first = row("", "", 0, 1.2).log_probs, row("", "", 0, 3.0).log_probs
    nll = metrics.paired_bootstrap(*first, LABELS)["nll"]
    assert f"{nll.value:+.3f}".replace("-", "−").replace("0.", ".") in text


def test_without_plain_lora_and_with_an_infinite_loss() -> None:
    (_, cells) = (None, difference_table(runs()[1::2]).rows[0])
    assert [cells[i] for i in (2, 4, 6, 8)] == [""] * 4
    broken = runs()
    log_probs = broken[1].rows[0].log_probs
    log_probs[0, int(LABELS[0])] = -torch.inf
    log_probs[0] = log_probs[0].log_softmax(-1)
    report = metrics.evaluate(log_probs, LABELS)
    object.__setattr__(broken[1].rows[0], "report", report)
    cells = difference_table(broken).rows[-1]
    assert cells[4] == "" and cells[6] != ""
