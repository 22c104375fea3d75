"""What chance adds to a calibration error, and which side it is on: against exact distributions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from bayes_kernels import metrics
from test_metrics.cases import make_case


def two_classes(confidence) -> torch.Tensor:
    """Probabilities whose first class has these confidences."""
    top = torch.as_tensor(confidence, dtype=torch.float64)
    return torch.stack([top, 1 - top], dim=1)


def bins_of(confidence: np.ndarray, n_bins: int = 15) -> np.ndarray:
    edges = np.linspace(0, 1, n_bins + 1, dtype=np.float32)
    return np.digitize(confidence.astype(np.float32), edges) - 1


# The floor


def test_floor_against_every_outcome():
    """4,096 outcomes of twelve rows, each with its probability."""
    confidence = np.r_[np.linspace(0.52, 0.97, 11), 1.0]
    index = bins_of(confidence)
    values, weights = [], []
    for outcome in itertools.product([0, 1], repeat=12):
        gaps = np.bincount(index, np.array(outcome) - confidence, minlength=16)
        values.append(np.abs(gaps).sum() / 12)
        weights.append(np.where(outcome, confidence, 1 - confidence).prod())
    values, weights = np.array(values), np.array(weights)
    floor = metrics.ece_floor(two_classes(confidence), n_draws=40_000, kind="probs")
    assert floor.mean == pytest.approx(values @ weights, rel=0.01)
    # The distribution has steps: the quantile lies where its cumulative probability passes .95.
    assert weights[values < floor.q95 - 1e-3].sum() < 0.955
    assert weights[values < floor.q95 + 1e-3].sum() > 0.945


def test_floor_of_equal_confidences_is_binomial():
    stats = pytest.importorskip("scipy.stats")
    right = stats.binom(300, 0.7)
    counts = np.arange(301)
    gaps = np.abs(counts / 300 - 0.7)
    floor = metrics.ece_floor(two_classes([0.7] * 300), n_draws=20_000, kind="probs")
    assert floor.mean == pytest.approx(right.pmf(counts) @ gaps, rel=0.02)
    order = gaps.argsort()
    exact = gaps[order][np.searchsorted(right.pmf(counts)[order].cumsum(), 0.95)]
    assert floor.q95 == pytest.approx(exact, abs=1.01 / 300)


@pytest.mark.parametrize("n_bins", [1, 15, 40])
def test_floor_of_any_confidences_is_poisson_binomial(n_bins: int):
    log_probs, _ = make_case(n=500, sharpness=1.0)
    confidence = log_probs.exp().amax(1).numpy()
    index, expected = bins_of(confidence, n_bins), 0.0
    for b in np.unique(index):
        law = np.ones(1)
        for c in confidence[index == b]:
            law = np.convolve(law, [1 - c, c])
        expected += law @ np.abs(np.arange(len(law)) - confidence[index == b].sum()) / 500
    floor = metrics.ece_floor(log_probs, n_bins=n_bins)
    # Four deviations of a mean over 1,000 draws, for one bin whose size varies most.
    assert floor.mean == pytest.approx(expected, rel=4 * 0.76 / math.sqrt(1000 * min(n_bins, 8)))


def test_floor_is_what_calibrated_labels_give():
    """Labels drawn from the predictions themselves: the ECE's mean, and one in twenty above q95."""
    log_probs, _ = make_case(n=200, sharpness=1.0)
    generator = torch.Generator().manual_seed(1)
    draws = torch.multinomial(log_probs.exp(), 800, replacement=True, generator=generator)
    found = np.array([metrics.ece(log_probs, labels) for labels in draws.T])
    floor = metrics.ece_floor(log_probs)
    assert found.mean() == pytest.approx(floor.mean, rel=0.04)
    assert 0.02 < (found > floor.q95).mean() < 0.09


def test_floor_follows_from_the_confidences_alone():
    log_probs, _ = make_case(n=300)
    floor = metrics.ece_floor(log_probs)
    assert 0 < floor.mean < floor.q95 < 1
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert metrics.ece_floor(log_probs[order]) == floor
    assert metrics.ece_floor(log_probs.flip(1)) == floor
    assert metrics.reliability_bins(log_probs, torch.zeros(300).long()).floor == floor
    assert metrics.ece_floor(log_probs, seed=1) != floor
    four = metrics.ece_floor(log_probs.repeat(4, 1))
    assert four.mean == pytest.approx(floor.mean / 2, rel=0.05)  # it falls with the root of n
    assert metrics.ece_floor(two_classes([1.0, 1.0, 1.0]), kind="probs") == (0.0, 0.0)


# Debiased


@pytest.mark.parametrize("sharpness", [1.0, 2.0])
def test_debiased_ece_against_drawn_gaps(sharpness: float):
    """The estimator as it was published: gaps drawn from normals around those that were seen."""
    log_probs, labels = make_case(n=500, sharpness=sharpness)
    bins = metrics.reliability_bins(log_probs, labels)
    full = bins.count > 0
    count, accuracy, confidence = (
        t[full].double().numpy() for t in (bins.count, bins.accuracy, bins.confidence)
    )
    share = count / 500
    generator = np.random.default_rng(0)
    deviation = np.sqrt(accuracy * (1 - accuracy) / count)
    drawn = generator.normal(accuracy, deviation, (100_000, len(count)))
    resampled = np.abs(drawn - confidence) @ share
    ece = share @ np.abs(accuracy - confidence)
    found = metrics.debiased_ece(log_probs, labels)
    assert found == pytest.approx(2 * ece - resampled.mean(), abs=2e-4)
    assert found < metrics.ece(log_probs, labels)


def binomial_expectation(n: int, confidence: float, right: float, score) -> float:
    """Expectation of a score of n rows of one confidence, each right with a probability."""
    stats = pytest.importorskip("scipy.stats")
    probs, total = two_classes([confidence] * n), 0.0
    for k, weight in enumerate(stats.binom(n, right).pmf(np.arange(n + 1))):
        if weight > 1e-12:
            total += weight * score(probs, torch.tensor([0] * k + [1] * (n - k)))
    return total


def test_squared_error_has_no_bias():
    """Of a gap of .3: the plain estimate is .004 too large, the debiased one exact."""

    def debiased(probs, labels):
        return metrics.debiased_ece(probs, labels, norm="l2", kind="probs") ** 2

    def plain(probs, labels):
        return metrics.ece(probs, labels, kind="probs") ** 2

    assert binomial_expectation(60, 0.9, 0.6, debiased) == pytest.approx(0.09, abs=1e-5)
    assert binomial_expectation(60, 0.9, 0.6, plain) == pytest.approx(0.09 + 0.24 / 60, abs=1e-9)


def test_debiased_ece_of_a_calibrated_and_of_a_wrong_predictor():
    """.59 = 2 - sqrt(2) of chance is left where all is chance, nothing where the gap is large."""

    def debiased(probs, labels):
        return metrics.debiased_ece(probs, labels, kind="probs")

    def plain(probs, labels):
        return metrics.ece(probs, labels, kind="probs")

    chance = binomial_expectation(300, 0.7, 0.7, plain)
    left = binomial_expectation(300, 0.7, 0.7, debiased)
    assert left / chance == pytest.approx(2 - math.sqrt(2), abs=0.02)
    assert binomial_expectation(50, 0.9, 0.5, debiased) == pytest.approx(0.4, abs=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_bins_of_one_row_and_of_certain_rows(norm: str):
    """All right or all wrong: there is no spread, and nothing to take off."""
    probs = two_classes([0.6] * 4 + [0.95] * 5)
    labels = torch.tensor([0] * 4 + [1] * 5)
    gaps, share = np.array([0.4, 0.95]), np.array([4, 5]) / 9
    expected = share @ gaps if norm == "l1" else math.sqrt(share @ gaps**2)
    found = metrics.debiased_ece(probs, labels, norm=norm, kind="probs")
    assert found == pytest.approx(expected, rel=1e-12)
    one = metrics.debiased_ece(probs[:1], labels[:1], norm=norm, kind="probs")
    assert one == pytest.approx(0.4 if norm == "l1" else 0.0)


@pytest.mark.parametrize("n_bins", [1, 15])
def test_quadratic_norm_against_torchmetrics(n_bins: int):
    """With the part of chance put back, it is torchmetrics' l2 error."""
    oracle = pytest.importorskip("torchmetrics.functional.classification")
    log_probs, labels = make_case(n=400, sharpness=3.0)
    probs = log_probs.exp().float()
    plain = float(oracle.multiclass_calibration_error(probs, labels, 5, n_bins, "l2"))
    bins = metrics.reliability_bins(probs, labels, n_bins=n_bins, kind="probs")
    full = bins.count > 1
    count, accuracy = bins.count[full].double(), bins.accuracy[full]
    chance = float((count / 400 * accuracy * (1 - accuracy) / (count - 1)).sum())
    found = metrics.debiased_ece(probs, labels, n_bins=n_bins, norm="l2", kind="probs")
    assert found == pytest.approx(math.sqrt(plain**2 - chance), rel=1e-4)


# The sign


@pytest.mark.parametrize(("sharpness", "sign"), [(0.3, -1), (3.0, 1)])
@pytest.mark.parametrize("n_bins", [1, 15])
def test_signed_error_tells_over_from_underconfidence(sharpness: float, sign: int, n_bins: int):
    log_probs, labels = make_case(sharpness=sharpness)
    found = metrics.signed_calibration_error(log_probs, labels)
    confidence, correct = metrics.confidence_and_correct(log_probs, labels)
    assert found == pytest.approx(float(confidence.mean() - correct.double().mean()), rel=1e-12)
    assert sign * found > 0.1
    bins = metrics.reliability_bins(log_probs, labels, n_bins=n_bins)
    assert bins.overconfidence + bins.underconfidence == pytest.approx(bins.ece, rel=1e-12)
    assert bins.overconfidence - bins.underconfidence == pytest.approx(found, rel=1e-12)
    assert abs(found) <= metrics.ece(log_probs, labels) + 1e-12


def test_both_signs_at_once():
    """Two bins whose errors cancel in the signed error and add up in the ECE."""
    probs = two_classes([0.6] * 10 + [0.9] * 10)
    labels = torch.tensor([0] * 9 + [1] + [0] * 6 + [1] * 4)
    bins = metrics.reliability_bins(probs, labels, kind="probs")
    assert (bins.overconfidence, bins.underconfidence) == pytest.approx((0.15, 0.15))
    assert metrics.signed_calibration_error(probs, labels, kind="probs") == pytest.approx(0.0)
    assert bins.ece == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: metrics.ece_floor(p, n_draws=0), "ece_floor: n_draws must be an integer >= 1"),
        (
            lambda p: metrics.ece_floor(p, seed=-1),
            "ece_floor: seed must be an integer >= 0, got -1",
        ),
        (lambda p: metrics.ece_floor(p, n_bins=True), "ece_floor: n_bins must be an integer"),
        (lambda p: metrics.ece_floor(p.exp()), 'ece_floor: .*kind="probs"'),
        (lambda p: metrics.debiased_ece(p, [0, 0], norm="l3"), 'norm must be "l1" or "l2"'),
        (lambda p: metrics.debiased_ece(p, [0, 2]), r"debiased_ece: labels must lie in \[0, 2\)"),
        (lambda p: metrics.signed_calibration_error(p, [0]), r"must have shape \(2,\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(torch.full((2, 2), math.log(0.5)))
    assert "\n" not in str(caught.value)
