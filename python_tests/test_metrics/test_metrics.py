"""Metrics against torchmetrics, scikit-learn, brute force and cases worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from bayes_kernels import metrics
from test_metrics.cases import make_case


def brute_force_risk(confidence, correct):
    """Risk at every coverage, averaged over every order of equal confidences."""
    runs = [list(run) for _, run in itertools.groupby(
        sorted(zip(confidence, correct, strict=True), key=lambda pair: -pair[0]),
        key=lambda pair: pair[0],
    )]  # fmt: skip
    risks = [
        np.cumsum([1 - hit for run in order for _, hit in run]) / np.arange(1, len(correct) + 1)
        for order in itertools.product(*(itertools.permutations(run) for run in runs))
    ]
    return np.mean(risks, axis=0)


# Proper scores


def test_accuracy_nll_brier_by_hand():
    probs = [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]
    labels = [0, 1]
    assert metrics.accuracy(probs, labels, kind="probs") == 0.5
    expected_nll = -(math.log(0.7) + math.log(0.3)) / 2
    assert metrics.nll(probs, labels, kind="probs") == pytest.approx(expected_nll, rel=1e-14)
    expected_brier = (0.09 + 0.04 + 0.01 + 0.01 + 0.49 + 0.36) / 2
    assert metrics.brier(probs, labels, kind="probs") == pytest.approx(expected_brier, rel=1e-14)


def test_proper_scores_against_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    log_probs, labels = make_case()
    probs = log_probs.exp().numpy()
    assert metrics.accuracy(log_probs, labels) == pytest.approx(
        sklearn_metrics.accuracy_score(labels, probs.argmax(1)), abs=1e-15
    )
    assert metrics.nll(log_probs, labels) == pytest.approx(
        sklearn_metrics.log_loss(labels, probs), rel=1e-12
    )
    binary, binary_labels = make_case(n_classes=2)
    assert metrics.brier(binary, binary_labels) == pytest.approx(
        2 * sklearn_metrics.brier_score_loss(binary_labels, binary[:, 1].exp()), rel=1e-12
    )


def test_nll_survives_underflow_of_the_probability():
    log_probs = torch.tensor([[0.0, -2000.0]])
    assert metrics.nll(log_probs, [1]) == 2000.0
    assert metrics.nll(log_probs.exp(), [1], kind="probs") == math.inf
    certain = metrics.nll(log_probs, [0])
    assert certain == 0.0 and math.copysign(1.0, certain) == 1.0


def test_rounding_above_one_costs_nothing():
    assert metrics.nll([[1e-7, -math.inf]], [0]) == 0.0
    assert metrics.nll([[1 + 1e-7, 0.0]], [0], kind="probs") == 0.0
    assert metrics.reliability_bins([[1 + 1e-7, 0.0]], [0], kind="probs").count[-1] == 1


def test_first_class_wins_a_tie():
    assert metrics.accuracy([[math.log(0.5), math.log(0.5)]], [0]) == 1.0
    assert metrics.accuracy([[math.log(0.5), math.log(0.5)]], [1]) == 0.0


def test_mean_is_over_examples_not_over_batches():
    log_probs, labels = make_case(n=10)
    weighted = 7 * metrics.nll(log_probs[:7], labels[:7]) + 3 * metrics.nll(
        log_probs[7:], labels[7:]
    )
    assert metrics.nll(log_probs, labels) == pytest.approx(weighted / 10, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_computed_in_float64_whatever_the_input(dtype):
    log_probs, labels = make_case(n=200)
    given = log_probs.to(dtype)
    picked = given.double()[torch.arange(200), labels]
    assert metrics.nll(given, labels) == pytest.approx(-float(picked.mean()), rel=1e-14)


def test_input_types_agree():
    log_probs, labels = make_case(n=50)
    expected = metrics.evaluate(log_probs, labels)
    array = log_probs.numpy()
    array.flags.writeable = False
    reversed_twice = array[::-1].copy()[::-1]  # negative strides
    unsigned = labels.numpy().astype(np.uint8)
    for given, given_labels in (
        (array, unsigned),
        (reversed_twice, labels.int()),
        (array.tolist(), labels.tolist()),
        (log_probs.clone().requires_grad_(), labels),
    ):
        assert metrics.evaluate(given, given_labels) == expected
    from_probs = metrics.evaluate(log_probs.exp(), labels, kind="probs").to_dict()
    assert from_probs == pytest.approx(expected.to_dict(), rel=1e-12)


# Calibration


@pytest.mark.parametrize("n_bins", [1, 10, 15, 20])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_ece_against_torchmetrics(n_bins, n_classes):
    oracle = pytest.importorskip("torchmetrics.functional.classification")
    for seed, sharpness in ((0, 0.5), (1, 2.0), (2, 30.0)):
        log_probs, labels = make_case(700, n_classes, seed, sharpness)
        probs = log_probs.exp().float()
        expected = oracle.multiclass_calibration_error(probs, labels, n_classes, n_bins, "l1")
        actual = metrics.ece(probs, labels, n_bins=n_bins, kind="probs")
        assert actual == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ece_on_bin_edges_and_at_one_against_torchmetrics(dtype):
    # Every edge b / 15, votes k / 10 and confidences of exactly one: the cases where the side of
    # the edge and the extra bin decide.
    oracle = pytest.importorskip("torchmetrics.functional.classification")
    top = torch.tensor(
        [b / 15 for b in range(8, 16)] + [k / 10 for k in range(5, 11)] * 3, dtype=dtype
    )
    probs = torch.stack([top, 1 - top], dim=1)
    labels = (torch.arange(len(top)) % 3 == 0).long()
    expected = oracle.multiclass_calibration_error(probs, labels, 2, 15, "l1")
    assert metrics.ece(probs, labels, kind="probs") == pytest.approx(float(expected), abs=1e-6)


def test_confidence_of_exactly_one_has_its_own_bin():
    # 0.95 right and 1.0 wrong: apart they err by 0.05 and 1.0; one shared bin would give 0.475.
    probs = [[0.95, 0.05], [1.0, 0.0]]
    assert metrics.ece(probs, [0, 1], kind="probs") == pytest.approx(0.525, abs=1e-12)
    bins = metrics.reliability_bins(probs, [0, 1], kind="probs")
    assert bins.count.tolist() == [0] * 14 + [1, 1]
    assert bins.confidence[-1] == 1.0 and bins.accuracy[-1] == 0.0
    assert metrics.ece([[1.0, 0.0], [0.0, 1.0]], [0, 1], kind="probs") == 0.0


def test_reliability_bins_by_hand():
    probs = [[0.8, 0.2], [0.7, 0.3], [0.4, 0.6], [0.5, 0.5]]
    bins = metrics.reliability_bins(probs, [0, 1, 1, 1], n_bins=4, kind="probs")
    assert bins.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert bins.count.tolist() == [0, 0, 3, 1, 0] and bins.n == 4
    assert bins.confidence[2:4].tolist() == pytest.approx([0.6, 0.8])
    assert bins.accuracy[2:4].tolist() == pytest.approx([1 / 3, 1.0])
    assert bins.confidence[[0, 1, 4]].isnan().all()
    assert bins.ece == pytest.approx((3 * abs(1 / 3 - 0.6) + 0.2) / 4)


def test_adaptive_ece_against_equal_splits():
    log_probs, labels = make_case(n=103)
    confidence, correct = (t.numpy() for t in metrics.confidence_and_correct(log_probs, labels))
    order = np.argsort(confidence)
    expected = sum(
        abs(correct[part].sum() - confidence[part].sum()) for part in np.array_split(order, 15)
    )
    assert metrics.adaptive_ece(log_probs, labels) == pytest.approx(expected / 103, rel=1e-12)
    few = metrics.adaptive_ece(log_probs[:4], labels[:4])  # fewer rows than bins: one row each
    assert few == pytest.approx(np.abs(correct[:4] - confidence[:4]).mean(), rel=1e-12)


# Selective prediction


@pytest.mark.parametrize("levels", [2, 3, 50])
def test_risk_coverage_against_all_orders_of_ties(levels):
    generator = np.random.default_rng(levels)
    for _ in range(8):
        confidence = generator.integers(0, levels, size=7) / levels
        correct = generator.integers(0, 2, size=7)
        expected = brute_force_risk(confidence, correct)
        curve = metrics.risk_coverage_curve(confidence, correct)
        np.testing.assert_allclose(curve.risk.numpy(), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(curve.coverage.numpy(), np.arange(1, 8) / 7, rtol=0, atol=1e-15)
        assert metrics.aurc(confidence, correct) == pytest.approx(expected.mean(), abs=1e-12)
        assert int(curve.attainable.sum()) == len(set(confidence))


def test_aurc_by_hand():
    assert metrics.aurc([0.9, 0.8, 0.7], [1, 0, 1]) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert metrics.aurc([0.3] * 4, [1, 0, 0, 1]) == pytest.approx(0.5)
    assert metrics.aurc([2.0, 1.0], [True, True]) == 0.0


def test_augrc_equals_its_closed_form():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    confidence = generator.integers(0, 20, size=300)  # many ties
    correct = generator.random(300) < confidence / 25
    auroc, error = sklearn_metrics.roc_auc_score(correct, confidence), 1 - correct.mean()
    expected = (1 - auroc) * error * (1 - error) + error**2 / 2
    assert metrics.augrc(confidence, correct) == pytest.approx(expected, rel=1e-12)


def test_coverage_at_risk():
    confidence, correct = [0.9, 0.8, 0.7, 0.6, 0.6], [1, 0, 1, 1, 0]
    # Risks: 0, 1/2, 1/3, (tied pair), 2/5.
    for risk, expected in ((0.0, 0.2), (0.3, 0.2), (0.34, 0.6), (0.39, 0.6), (0.4, 1.0), (1, 1.0)):
        assert metrics.coverage_at_risk(confidence, correct, risk) == pytest.approx(expected)
    assert metrics.coverage_at_risk([0.9, 0.8], [0, 1], 0.1) == 0.0
    curve = metrics.risk_coverage_curve(confidence, correct)
    kept = np.array(confidence) >= float(curve.threshold[2])
    assert 1 - np.array(correct)[kept].mean() == pytest.approx(float(curve.risk[2]))
    with pytest.raises(ValueError, match=r"risk must lie in \[0, 1\]"):
        metrics.coverage_at_risk(confidence, correct, 5)


# Out-of-distribution detection


def test_ood_auroc_against_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(3)
    for levels in (4, 10**6):
        inside = generator.integers(0, levels, 150) / levels
        outside = generator.integers(levels // 4, levels, 90) / levels
        truth = np.r_[np.zeros(150), np.ones(90)]
        expected = sklearn_metrics.roc_auc_score(truth, np.r_[inside, outside])
        assert metrics.ood_auroc(inside, outside) == pytest.approx(expected, abs=1e-14)
        assert metrics.ood_auroc(-outside, -inside) == pytest.approx(expected, abs=1e-14)
        fpr, tpr, _ = sklearn_metrics.roc_curve(
            truth, np.r_[inside, outside], drop_intermediate=False
        )
        expected = fpr[np.argmax(tpr >= 0.95)]
        assert metrics.fpr95(inside, outside) == pytest.approx(expected, abs=1e-15)


def test_ood_extremes():
    assert metrics.ood_auroc([0.1, 0.2], [0.3, math.inf]) == 1.0
    assert metrics.ood_auroc([0.3], [0.1]) == 0.0
    assert metrics.ood_auroc([1, 1], [1, 1, 1]) == 0.5
    assert metrics.fpr95([0.1, 0.2], [0.3, 0.4]) == 0.0
    assert metrics.fpr95([1.0, 1.0], [1.0]) == 1.0


def test_fpr95_finds_nineteen_of_twenty():
    outside = torch.arange(20.0)  # 19 of 20 are found from score 1 upwards
    assert metrics.fpr95([0.5, 0.9, 1.0, 7.0], outside) == 0.5
    assert metrics.fpr_at_tpr([0.5, 0.9, 1.0, 7.0], outside, tpr=1.0) == 1.0


# Uncertainty


def test_entropies_by_hand():
    probs = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])  # (S, n, C)
    log_two = math.log(2)
    mixture = metrics.mixture_log_probs(probs, kind="probs")
    assert metrics.predictive_entropy(mixture).tolist() == pytest.approx([log_two, log_two])
    assert metrics.expected_entropy(probs, kind="probs").tolist() == pytest.approx([0, log_two])
    assert metrics.mutual_information(probs, kind="probs").tolist() == pytest.approx([log_two, 0])
    assert metrics.predictive_entropy([[1.0, 0.0]], kind="probs").tolist() == [0.0]


def test_mixture_averages_probabilities_without_underflow():
    scipy_special = pytest.importorskip("scipy.special")
    samples = (40 * torch.randn(6, 30, 4, dtype=torch.float64)).log_softmax(-1)
    expected = scipy_special.logsumexp(samples.numpy(), axis=0, b=1 / 6)
    np.testing.assert_allclose(metrics.mixture_log_probs(samples), expected, rtol=1e-12, atol=1e-15)
    tiny = torch.tensor([[[0.0, -1000.0]], [[0.0, -1000.0]]])
    assert metrics.mixture_log_probs(tiny)[0, 1] == pytest.approx(-1000.0)


def test_mutual_information_is_the_difference_and_not_negative():
    samples = torch.randn(8, 50, 3, dtype=torch.float64).log_softmax(-1)
    information = metrics.mutual_information(samples)
    total = metrics.predictive_entropy(metrics.mixture_log_probs(samples))
    np.testing.assert_allclose(
        information, total - metrics.expected_entropy(samples), rtol=0, atol=1e-12
    )
    same = metrics.mutual_information(samples[:1].expand(7, -1, -1))
    assert same.min() >= 0 and same.max() < 1e-14


@pytest.mark.parametrize("count", [2, 5, 20])
def test_mutual_information_of_few_samples_is_low_by_one_part_in_their_number(count: int):
    generator = torch.Generator().manual_seed(count)
    logits = 0.3 * torch.randn(2000, 40, 3, generator=generator, dtype=torch.float64)
    samples = logits.log_softmax(-1)
    many = float(metrics.mutual_information(samples).mean()) * 2000 / 1999
    few = [float(metrics.mutual_information(part).mean()) for part in samples.split(count)]
    assert np.mean(few) * count / (count - 1) == pytest.approx(many, rel=0.02)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("count", [4, 10])
def test_corrected_mutual_information_is_right_on_average(group: int, count: int):
    """Of independent samples, and of antithetic pairs, whose mutual information is not as low."""
    generator = torch.Generator().manual_seed(count)
    half = 1.5 * torch.randn(2000, 40, 3, generator=generator, dtype=torch.float64)
    logits = half if group == 1 else torch.stack([half, -half], 1).flatten(0, 1)
    samples = (logits + torch.tensor([1.0, 0.0, 0.0])).log_softmax(-1)
    true = float(metrics.mutual_information(samples).mean())
    parts = samples.unflatten(0, (-1, count)).transpose(0, 1).flatten(1, 2)
    corrected = float(metrics.corrected_mutual_information(parts, group=group).mean())
    few = float(metrics.mutual_information(parts).mean())
    assert corrected == pytest.approx(true, rel=0.02 if group == 2 else 0.08)
    assert few < (0.98 if group == 2 else 0.92) * true


def test_corrected_mutual_information_is_the_leading_term_of_the_jackknife():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 8, 4, dtype=torch.float64) + 0.02 * torch.randn(
        6, 8, 4, generator=generator, dtype=torch.float64
    )
    samples = logits.log_softmax(-1)
    whole = metrics.predictive_entropy(metrics.mixture_log_probs(samples))
    without = [
        metrics.predictive_entropy(metrics.mixture_log_probs(samples[torch.arange(6) != i]))
        for i in range(6)
    ]
    jackknife = 6 * whole - 5 * torch.stack(without).mean(0) - metrics.expected_entropy(samples)
    found = metrics.corrected_mutual_information(samples)
    torch.testing.assert_close(found, jackknife, rtol=1e-2, atol=0)
    for bad in ({"group": 0}, {"group": 4}, {"group": 6}):
        with pytest.raises(ValueError, match="two groups or more"):
            metrics.corrected_mutual_information(samples, **bad)


# evaluate


def test_report_holds_the_single_metrics():
    log_probs, labels = make_case(n=120)
    ood, _ = make_case(n=60, seed=9, sharpness=0.5)
    report = metrics.evaluate(log_probs, labels, ood_log_probs=ood, n_bins=10)
    confidence, correct = metrics.confidence_and_correct(log_probs, labels)
    entropy, ood_entropy = (metrics.predictive_entropy(x) for x in (log_probs, ood))
    assert report.to_dict() == pytest.approx(
        {
            "n": 120,
            "n_classes": 5,
            "accuracy": metrics.accuracy(log_probs, labels),
            "nll": metrics.nll(log_probs, labels),
            "ece": metrics.ece(log_probs, labels, n_bins=10),
            "adaptive_ece": metrics.adaptive_ece(log_probs, labels, n_bins=10),
            "brier": metrics.brier(log_probs, labels),
            "aurc": metrics.aurc(confidence, correct),
            "augrc": metrics.augrc(confidence, correct),
            "entropy": float(entropy.mean()),
            "ood_auroc": metrics.ood_auroc(entropy, ood_entropy),
            "ood_fpr95": metrics.fpr95(entropy, ood_entropy),
            "ece_floor": metrics.ece_floor(log_probs, n_bins=10).mean,
            "ece_floor_q95": metrics.ece_floor(log_probs, n_bins=10).q95,
            "debiased_ece": metrics.debiased_ece(log_probs, labels, n_bins=10),
            "signed_calibration_error": metrics.signed_calibration_error(log_probs, labels),
        },
        rel=1e-14,
    )
    assert report.ood_auroc > 0.7
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_reports_without_the_newer_fields_are_read_as_they_were():
    old = {"n": 9, "n_classes": 2, "accuracy": 0.5, "nll": 0.7, "ece": 0.1, "adaptive_ece": 0.1}
    old |= {"brier": 0.5, "aurc": 0.4, "augrc": 0.2, "entropy": 0.6, "ood_auroc": 0.5}
    assert metrics.Report(**old).to_dict() == old


def test_report_of_posterior_samples():
    samples = torch.randn(5, 80, 4, dtype=torch.float64).log_softmax(-1)
    labels = torch.arange(80) % 4
    report = metrics.evaluate(samples, labels, ood_log_probs=samples[:, :9])
    mean = metrics.evaluate(metrics.mixture_log_probs(samples), labels)
    assert report.nll == pytest.approx(mean.nll, rel=1e-12)
    assert report.ece == pytest.approx(mean.ece, abs=1e-12)
    expected = float(metrics.mutual_information(samples).mean())
    assert report.mutual_information == pytest.approx(expected, rel=1e-12)
    assert mean.mutual_information is None and "mutual_information" not in mean.to_dict()


def test_order_of_rows_does_not_matter():
    log_probs, labels = make_case(n=150)
    log_probs = (log_probs.exp() * 8).round().clamp(min=1).double()  # coarse: many ties
    log_probs = (log_probs / log_probs.sum(-1, keepdim=True)).log()
    expected = metrics.evaluate(log_probs, labels, ood_log_probs=log_probs[:40]).to_dict()
    for seed in range(3):
        order = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
        actual = metrics.evaluate(log_probs[order], labels[order], ood_log_probs=log_probs[:40])
        assert actual.to_dict() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_order_of_classes_does_not_matter():
    log_probs, labels = make_case(n=150)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    relabelled = order.argsort()[labels]
    actual = metrics.evaluate(log_probs[:, order], relabelled).to_dict()
    assert actual == pytest.approx(metrics.evaluate(log_probs, labels).to_dict(), rel=1e-12)


# Errors

GOOD = [[math.log(0.5), math.log(0.5)]]


@pytest.mark.parametrize(
    ("log_probs", "labels", "message"),
    [
        (torch.empty(0, 3), torch.empty(0, dtype=torch.long), "at least one row"),
        (torch.empty(2, 0), [0, 0], "at least one row"),
        ([0.5, 0.5], [0, 1], r"shape \(n, C\), got \(2,\)"),
        ([[0.0], [0.0]], [0, 0], "at least two classes"),
        ([[1.0, 2.0]], [0], "log_softmax"),
        ([[0.5, 0.5]], [0], 'kind="probs"'),
        ([[math.inf, 0.0]], [0], "sum to one"),
        ([[-math.inf, -math.inf]], [0], "sum to one"),
        ([[math.nan, 0.0]], [0], "NaN in 1 rows"),
        ([["a", "b"]], [0], "numeric array"),
        ([[0.0], [0.0, 1.0]], [0], "numeric array"),
        (GOOD, [2], r"labels must lie in \[0, 2\), got values from 2 to 2"),
        (GOOD, [-100], "drop ignored rows"),
        (GOOD, [0, 1], r"labels must have shape \(1,\)"),
        (GOOD, [[0]], r"labels must have shape \(1,\)"),
        (GOOD, [0.0], "integer class indices"),
        (GOOD, [True], "integer class indices"),
    ],
)
@pytest.mark.parametrize("function", ["accuracy", "nll", "brier", "ece", "evaluate"])
def test_bad_input_is_one_clear_line(function, log_probs, labels, message):
    with pytest.raises(ValueError, match=message) as caught:
        getattr(metrics, function)(log_probs, labels)
    assert str(caught.value).startswith(f"{function}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.nll([[0.5, 0.4]], [0], kind="probs"), "sum to one .* got 0.9; divide"),
        (lambda: metrics.nll([[1.5, -0.5]], [0], kind="probs"), "must not be negative"),
        (lambda: metrics.nll(GOOD, [0], kind="logits"), 'kind must be "log_probs" or "probs"'),
        (lambda: metrics.nll([torch.zeros(2)], [0]), "torch.stack"),
        (lambda: metrics.ece(GOOD, [0], n_bins=0), "n_bins must be an integer >= 1, got 0"),
        (lambda: metrics.ece(GOOD, [0], n_bins=1.5), "n_bins must be an integer"),
        (lambda: metrics.aurc([], []), r"n >= 1, got \(0,\)"),
        (lambda: metrics.aurc([0.1, math.nan], [0, 1]), "confidence must be free of NaN, got 1"),
        (lambda: metrics.aurc([0.1, 0.2], [0, 1, 1]), r"shape of confidence, \(2,\), got \(3,\)"),
        (lambda: metrics.aurc([0, 1], [0.3, 0.7]), "only 0 and 1.*order is"),
        (lambda: metrics.ood_auroc([], [1.0]), "score_in must have shape"),
        (lambda: metrics.fpr95([1.0], [math.nan]), "score_out must be free of NaN"),
        (lambda: metrics.fpr_at_tpr([1.0], [1.0], tpr=0), "tpr must lie in"),
        (lambda: metrics.mutual_information(GOOD), r"shape \(S, n, C\), got \(1, 2\)"),
        (
            lambda: metrics.evaluate(GOOD, [0], ood_log_probs=[[1.0, 1.0]]),
            r"evaluate \(ood_log_probs\)",
        ),
    ],
)
def test_other_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_low_precision_rows_are_accepted_and_logits_are_not():
    log_probs, labels = make_case(n=100, n_classes=50, sharpness=1.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        low = log_probs.to(dtype)
        assert metrics.nll(low, labels) == pytest.approx(metrics.nll(log_probs, labels), rel=2e-2)
        with pytest.raises(ValueError, match="sum to one"):
            metrics.nll(low - 0.2, labels)


def test_functions_need_torch_alone():
    code = (
        "import sys; from bayes_kernels import metrics; metrics.nll([[0.0, -800.0]], [0]);"
        "sys.exit(any(name in sys.modules for name in ('torchmetrics', 'sklearn', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
