"""Paired bootstrap: against scipy, against resampling one at a time, and its coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayes_kernels import metrics
from bayes_kernels.metrics.bootstrap import SCORES
from test_metrics.cases import make_case


def pair(n: int = 300, seed: int = 0):
    """Overconfident log-probabilities, calibrated ones that err elsewhere, and labels."""
    log_probs, labels = make_case(n=n, seed=seed)
    other, _ = make_case(n=n, seed=seed + 100, sharpness=1.0)
    return log_probs, (0.4 * log_probs + 0.3 * other).log_softmax(-1), labels


def test_values_are_differences_of_the_scores():
    first, second, labels = pair()
    found = metrics.paired_bootstrap(first, second, labels, scores=SCORES, n_resamples=20)
    assert tuple(found) == SCORES
    for score, difference in found.items():
        function = getattr(metrics, score)
        expected = function(first, labels) - function(second, labels)
        assert difference.value == pytest.approx(expected, abs=1e-12)
        assert difference.low <= difference.high
    default = metrics.paired_bootstrap(first, second, labels, n_resamples=2)
    assert list(default) == ["accuracy", "nll", "brier", "ece"]


def test_every_score_against_resampling_one_at_a_time():
    first, second, labels = pair(n=60)
    found = metrics.paired_bootstrap(
        first, second, labels, scores=SCORES, n_resamples=40, level=0.8, seed=3, n_bins=10
    )
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(60, (40, 60), generator=generator)
    for score, difference in found.items():
        function = getattr(metrics, score)
        options = {"n_bins": 10} if score == "ece" else {}
        differences = np.array(
            [
                function(first[rows], labels[rows], **options)
                - function(second[rows], labels[rows], **options)
                for rows in drawn
            ]
        )
        low, high = np.quantile(differences, [0.1, 0.9]) - differences.mean() + difference.value
        assert (difference.low, difference.high) == pytest.approx((low, high), abs=1e-12)


def test_scores_of_several_trainings_are_means():
    """Values are means of those of each training, and rows are drawn once for all of them."""
    first, second, labels = pair()
    a = torch.stack([first, (0.5 * second).log_softmax(-1)])
    b = torch.stack([second, (0.5 * first).log_softmax(-1)])
    found = metrics.paired_bootstrap(a, b, labels, scores=SCORES)
    for score, difference in found.items():
        each = [
            metrics.paired_bootstrap(x, y, labels, scores=[score])[score]
            for x, y in zip(a, b, strict=True)
        ]
        assert difference.value == pytest.approx(sum(one.value for one in each) / 2, abs=1e-12)
    # The same training twice says no more than once.
    once = metrics.paired_bootstrap(a[0], b[0], labels, scores=SCORES)
    twice = metrics.paired_bootstrap(a[[0, 0]], b[[0, 0]], labels, scores=SCORES)
    for score in SCORES:
        assert tuple(twice[score]) == pytest.approx(tuple(once[score]), abs=1e-12)
    with pytest.raises(ValueError, match=r"shape of log_probs, \(2, 300, .*got \(300, "):
        metrics.paired_bootstrap(a, b[0], labels)


@pytest.mark.parametrize("score", ["accuracy", "nll", "brier"])
def test_interval_against_scipy(score: str):
    stats = pytest.importorskip("scipy.stats")
    first, second, labels = pair()
    rows = range(len(labels))
    function = getattr(metrics, score)
    a, b = (
        np.array([function(p[i : i + 1], labels[i : i + 1]) for i in rows]) for p in (first, second)
    )
    expected = stats.bootstrap(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=5000,
        random_state=0,
    ).confidence_interval
    found = metrics.paired_bootstrap(first, second, labels, scores=[score], n_resamples=5000)[score]
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.06 * width)
    assert found.high == pytest.approx(expected.high, abs=0.06 * width)


def test_many_rows_in_several_parts_have_the_interval_of_the_normal():
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(2, 40_000, generator=generator) < torch.tensor([[0.8], [0.7]])
    first, second = (torch.stack([~r, r], dim=1).double() for r in right)
    labels = torch.ones(40_000, dtype=torch.int64)
    options = {"scores": ["accuracy"], "n_resamples": 200, "kind": "probs"}
    found = metrics.paired_bootstrap(first, second, labels, **options)["accuracy"]
    expected = 1.96 * math.sqrt((0.8 * 0.2 + 0.7 * 0.3) / 40_000)
    assert found.high - found.low == pytest.approx(2 * expected, rel=0.25)
    assert found.significant and found.value == pytest.approx(0.1, abs=0.01)


def test_equal_predictors_differ_by_nothing_and_swapping_changes_signs():
    first, second, labels = pair(n=100)
    options = {"scores": SCORES, "n_resamples": 100}
    for difference in metrics.paired_bootstrap(first, first.clone(), labels, **options).values():
        assert difference == (0.0, 0.0, 0.0) and not difference.significant
    one = metrics.paired_bootstrap(first, second, labels, **options)
    two = metrics.paired_bootstrap(second, first, labels, **options)
    for score in SCORES:
        swapped = (-two[score].value, -two[score].high, -two[score].low)
        assert one[score] == pytest.approx(swapped, abs=1e-12)
    assert metrics.paired_bootstrap(first, second, labels, **options) == one
    assert metrics.paired_bootstrap(first, second, labels, **options, seed=1) != one


def test_pairing_takes_out_what_rows_have_in_common():
    """Predictors that err alike: far narrower than the interval of either."""
    first, _, labels = pair()
    alike = (0.95 * first).log_softmax(-1)
    paired = metrics.paired_bootstrap(first, alike, labels, scores=["nll"])["nll"]
    uniform = torch.full_like(first, -math.log(5))
    alone = metrics.paired_bootstrap(first, uniform, labels, scores=["nll"])["nll"]
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)
    assert paired.significant and paired.low > 0


@pytest.mark.parametrize("score", ["nll", "ece"])
def test_nineteen_of_twenty_intervals_hold_the_expectation(score: str):
    """Test sets of one population: an overconfident predictor less a calibrated one."""
    found = []
    for seed in range(150):
        first, labels = make_case(n=150, seed=seed)
        options = {"scores": [score], "n_resamples": 200, "seed": seed}
        calibrated = (first / 2).log_softmax(-1)
        found.append(metrics.paired_bootstrap(first, calibrated, labels, **options)[score])
    expected = np.mean([difference.value for difference in found])
    held = np.mean([difference.low <= expected <= difference.high for difference in found])
    assert 0.89 <= held <= 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": ["f1"]}, "scores must be some of .*got 'f1'"),
        ({"scores": []}, r"scores must be some of .*got \[\]"),
        ({"level": 1.0}, r"level must lie in \(0, 1\), got 1.0"),
        ({"n_resamples": 0}, "n_resamples must be an integer >= 1, got 0"),
        ({"n_bins": 0}, "n_bins must be an integer >= 1"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"other": torch.zeros(3, 2)}, r"other_log_probs\): each row of log_probs must sum"),
        (
            {"other": torch.full((2, 2), -math.log(2))},
            r"\(other_log_probs\): labels must have shape",
        ),
        (
            {"other": torch.full((3, 4), -math.log(4))},
            r"must have the shape of log_probs, \(3, 2\)",
        ),
        ({"other": torch.tensor([[0.0, -math.inf]] * 3)}, "label of probability zero"),
    ],
)
def test_bad_input(options, message):
    log_probs = torch.full((3, 2), -math.log(2))
    other = options.pop("other", log_probs)
    with pytest.raises(ValueError, match=message) as caught:
        metrics.paired_bootstrap(log_probs, other, [1, 1, 1], **options)
    assert str(caught.value).startswith("paired_bootstrap") and "\n" not in str(caught.value)


def test_auroc_interval_is_that_of_resampled_groups():
    generator = torch.Generator().manual_seed(3)
    inside = torch.randn(40, generator=generator).round(decimals=1)  # with ties
    outside = torch.randn(30, generator=generator).round(decimals=1) + 0.5
    found = metrics.auroc_interval(inside, outside, n_resamples=4000)
    assert found.value == pytest.approx(metrics.ood_auroc(inside, outside), abs=1e-12)
    draws = np.random.default_rng(0)
    drawn = [
        metrics.ood_auroc(inside[draws.integers(40, size=40)], outside[draws.integers(30, size=30)])
        for _ in range(4000)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.01) and found.high == pytest.approx(high, abs=0.01)
    assert str(found) == f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    narrow = metrics.auroc_interval(inside, outside, level=0.5)
    assert found.low < narrow.low < narrow.value < narrow.high < found.high
    assert metrics.auroc_interval(inside, outside, n_resamples=4000) == found


def test_auroc_interval_of_extremes():
    assert metrics.auroc_interval([0.0, 1.0], [2.0]) == (1.0, 1.0, 1.0)
    assert metrics.auroc_interval([math.inf], [math.inf, math.inf]) == (0.5, 0.5, 0.5)
    for options in ({"level": 1.0}, {"n_resamples": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"auroc_interval: {next(iter(options))} must"):
            metrics.auroc_interval([0.0], [1.0], **options)
    with pytest.raises(ValueError, match="auroc_interval"):
        metrics.auroc_interval([], [1.0])
