"""Calibration, proper scores, selective prediction and out-of-distribution detection.

The functions need torch alone. They take torch tensors, numpy arrays or nested sequences, compute
in float64 and return Python floats (per-example quantities are float64 tensors). Rates and calibration
errors are fractions in [0, 1]. Distributions are log-probabilities unless `kind="probs"` says otherwise: a
probability that underflows to zero costs an infinite log loss, its logarithm does not.

| functions | what |
|---|---|
| `accuracy nll brier` | share of right answers, mean log loss, multi-class Brier score |
| `ece adaptive_ece` | top-label calibration error, equal-width and equal-mass bins |
| `aurc augrc` | area under the (generalised) risk-coverage curve |
| `coverage_at_risk` | largest coverage whose selective risk stays below a bound |
| `ood_auroc fpr95` | detection of out-of-distribution inputs from an uncertainty score |
| `predictive_entropy` | total uncertainty `H[mean_s p_s]` |
| `expected_entropy` | its aleatoric part, `mean_s H[p_s]` |
| `mutual_information` | its epistemic part, the difference of the two |
| `evaluate` | all of them in one `Report` |

Every function raises `ValueError` for input of the wrong shape, without rows, with NaN, with
labels outside `[0, C)` or with rows that do not sum to one. Values are scored as they are given:
never clamped away from zero, never renormalised. Cost is O(n C), plus O(n log n) where a sort is
needed, on the device of the input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "ReliabilityBins",
    "Report",
    "RiskCoverageCurve",
    "accuracy",
    "adaptive_ece",
    "augrc",
    "aurc",
    "brier",
    "confidence_and_correct",
    "coverage_at_risk",
    "ece",
    "evaluate",
    "expected_entropy",
    "fpr95",
    "fpr_at_tpr",
    "mixture_log_probs",
    "mutual_information",
    "nll",
    "ood_auroc",
    "predictive_entropy",
    "reliability_bins",
    "risk_coverage_curve",
]

_Rectangle = Sequence[float] | Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]
ArrayLike = Tensor | np.ndarray | _Rectangle
Kind = Literal["log_probs", "probs"]

# How far a row may sum from one. A log-probability of size 10 carries an error of 10 * eps / 2,
# which is a relative error of the probability: 4 % in bfloat16, 0.5 % in float16.
_SUM_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}


class _Rows(NamedTuple):
    """Checked input: probs and log_probs (n, C) float64, labels (n,) int64, on one device."""

    probs: Tensor
    log_probs: Tensor
    labels: Tensor


def _as_tensor(where: str, name: str, value: ArrayLike) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value.detach()
        # float64 does not exist on Apple's GPUs.
        return tensor.cpu() if tensor.device.type == "mps" else tensor
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        raise ValueError(
            f"{where}: {name} must be one array, got a list of tensors; torch.stack it"
        )
    try:
        # The copy also serves read-only arrays and negative strides, which torch cannot share.
        return torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: {name} must be a numeric array, got {type(value).__name__} ({error}); "
            "pass a torch tensor, a numpy array or a nested sequence of equal lengths"
        ) from None


def _as_distribution(where: str, value: ArrayLike, kind: Kind, shape: str) -> tuple[Tensor, Tensor]:
    """Checked (probs, log_probs) in float64; `shape` is "(n, C)" or "(S, n, C)"."""
    if kind not in ("log_probs", "probs"):
        raise ValueError(f'{where}: kind must be "log_probs" or "probs", got {kind!r}')
    given = _as_tensor(where, kind, value)
    if given.ndim != shape.count(",") + 1:
        raise ValueError(f"{where}: {kind} must have shape {shape}, got {tuple(given.shape)}")
    if given.numel() == 0:
        raise ValueError(
            f"{where}: {kind} must have at least one row, got shape {tuple(given.shape)}"
        )
    if given.shape[-1] < 2:
        raise ValueError(
            f"{where}: {kind} must have at least two classes, got shape {tuple(given.shape)}; "
            "give a binary problem as two columns"
        )
    if given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"{where}: {kind} must be real numbers, got {given.dtype}")
    tolerance = _SUM_TOLERANCE.get(given.dtype, 1e-3)
    given = given.double()
    if given.isnan().any():
        bad = int(given.isnan().any(dim=-1).sum())
        raise ValueError(f"{where}: {kind} must be free of NaN, got NaN in {bad} rows; drop them")
    if kind == "probs":
        if (given < 0).any():
            raise ValueError(
                f"{where}: probs must not be negative, got {float(given.min()):.4g}; "
                'log-probabilities go with kind="log_probs", logits through log_softmax first'
            )
        probs = given
    else:
        probs = given.exp()
    sums = probs.sum(dim=-1)
    # Written so that an infinite sum fails too.
    if not ((sums - 1).abs() <= tolerance).all():
        worst = float(sums.flatten()[(sums - 1).abs().argmax()])
        advice = (
            'logits go through log_softmax first, probabilities go with kind="probs"'
            if kind == "log_probs"
            else "divide each row by its sum"
        )
        raise ValueError(
            f"{where}: each row of {kind} must sum to one as probabilities "
            f"(within {tolerance:g}), got {worst:.6g}; {advice}"
        )
    # Rounding may leave a certain class a hair above one, which would make its loss negative.
    probs = probs.clamp(max=1.0)
    return probs, (probs.log() if kind == "probs" else given.clamp(max=0.0))


def _as_labels(where: str, value: ArrayLike, n: int, n_classes: int) -> Tensor:
    labels = _as_tensor(where, "labels", value)
    if tuple(labels.shape) != (n,):
        raise ValueError(
            f"{where}: labels must have shape ({n},), one class index per row, "
            f"got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{where}: labels must be integer class indices, got {labels.dtype}")
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"{where}: labels must lie in [0, {n_classes}), got values from {low} to {high}; "
            "drop ignored rows first"
        )
    return labels


def _as_rows(where: str, log_probs: ArrayLike, labels: ArrayLike, kind: Kind) -> _Rows:
    probs, logs = _as_distribution(where, log_probs, kind, "(n, C)")
    n, n_classes = logs.shape
    return _Rows(probs, logs, _as_labels(where, labels, n, n_classes).to(logs.device))


def _as_scores(where: str, name: str, value: ArrayLike) -> Tensor:
    scores = _as_tensor(where, name, value)
    if scores.ndim != 1 or scores.numel() == 0:
        raise ValueError(
            f"{where}: {name} must have shape (n,) with n >= 1, got {tuple(scores.shape)}"
        )
    if scores.is_complex():
        raise ValueError(f"{where}: {name} must be real numbers, got {scores.dtype}")
    scores = scores.double()
    if scores.isnan().any():
        raise ValueError(
            f"{where}: {name} must be free of NaN, got {int(scores.isnan().sum())}; drop them"
        )
    return scores


def _check_positive_int(where: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {name} must be an integer >= 1, got {value!r}")


# Proper scores ------------------------------------------------------------------------------------


def _log_loss(rows: _Rows) -> Tensor:
    return -rows.log_probs.gather(1, rows.labels[:, None]).squeeze(1)


def _squared_error(rows: _Rows) -> Tensor:
    error = rows.probs.clone()
    error[torch.arange(len(error), device=error.device), rows.labels] -= 1.0
    return error.square().sum(dim=1)


def _confidence_and_correct(rows: _Rows) -> tuple[Tensor, Tensor]:
    confidence, predicted = rows.probs.max(dim=1)  # the first class wins a tie
    return confidence, predicted == rows.labels


def accuracy(log_probs: ArrayLike, labels: ArrayLike, *, kind: Kind = "log_probs") -> float:
    """Share of rows whose most probable class is the label; the first class wins a tie.

    Args:
        log_probs: (n, C) log-probabilities, or probabilities with `kind="probs"`.
        labels: (n,) integer class indices.
        kind: what `log_probs` holds.
    """
    rows = _as_rows("accuracy", log_probs, labels, kind)
    return float(_confidence_and_correct(rows)[1].double().mean())


def nll(log_probs: ArrayLike, labels: ArrayLike, *, kind: Kind = "log_probs") -> float:
    """Negative log-likelihood `-(1/n) sum_i log p_i[y_i]` in nats, a mean over examples.

    The Bayesian predictive must be averaged as probabilities before it is scored
    (`mixture_log_probs`). A label of probability zero gives infinity, and probabilities below
    1e-45 are zero in float32: pass log-probabilities wherever they exist.

    Args:
        log_probs, labels, kind: as in `accuracy`.
    """
    return float(_log_loss(_as_rows("nll", log_probs, labels, kind)).mean())


def brier(log_probs: ArrayLike, labels: ArrayLike, *, kind: Kind = "log_probs") -> float:
    """Brier score `(1/n) sum_i sum_c (p_ic - 1[y_i = c])^2`, in [0, 2] (Brier, 1950).

    The sum runs over all classes, so for two classes it is twice the binary score of scikit-learn.

    Args:
        log_probs, labels, kind: as in `accuracy`.
    """
    return float(_squared_error(_as_rows("brier", log_probs, labels, kind)).mean())


# Calibration --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReliabilityBins:
    """Top-label confidence against accuracy in equal-width bins of [0, 1).

    Attributes:
        edges: (B + 1,) bin edges; bin b is `[edges[b], edges[b + 1])`.
        count: (B + 1,) int64, examples per bin. The last entry is the extra bin of the
            predictions whose confidence is exactly one.
        confidence: (B + 1,) mean confidence, NaN where a bin is empty.
        accuracy: (B + 1,) share of correct predictions, NaN where a bin is empty.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.count.sum())

    @property
    def ece(self) -> float:
        """Expected calibration error `sum_b (n_b / n) |acc_b - conf_b|`."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num(0.0)
        return float((gap * self.count).sum() / self.count.sum())


def _bin(confidence: Tensor, correct: Tensor, n_bins: int) -> ReliabilityBins:
    # The bin is chosen in float32, as torchmetrics does: a confidence of 0.6 then falls on the same
    # side of the edge 9/15 in both, and the figures agree with published tables. Sums are float64.
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float32, device=confidence.device)
    index = torch.bucketize(confidence.float(), edges, right=True) - 1
    count = torch.bincount(index, minlength=n_bins + 1)
    sums = torch.zeros(2, n_bins + 1, dtype=torch.float64, device=confidence.device)
    sums[0].index_add_(0, index, confidence)
    sums[1].index_add_(0, index, correct.double())
    means = sums / count  # 0 / 0 is the NaN of an empty bin
    return ReliabilityBins(edges.double().cpu(), count.cpu(), means[0].cpu(), means[1].cpu())


def reliability_bins(
    log_probs: ArrayLike, labels: ArrayLike, *, n_bins: int = 15, kind: Kind = "log_probs"
) -> ReliabilityBins:
    """The bins behind `ece` and `plots.reliability_diagram`.

    Args:
        log_probs, labels, kind: as in `accuracy`.
        n_bins: number of bins.
    """
    _check_positive_int("reliability_bins", "n_bins", n_bins)
    rows = _as_rows("reliability_bins", log_probs, labels, kind)
    return _bin(*_confidence_and_correct(rows), n_bins)


def ece(
    log_probs: ArrayLike, labels: ArrayLike, *, n_bins: int = 15, kind: Kind = "log_probs"
) -> float:
    """Expected calibration error of the top label, L1, equal-width bins (Guo et al., 2017).

    `sum_b (n_b / n) |acc_b - conf_b|` over bins `[b / B, (b + 1) / B)` and one extra bin for
    confidences of exactly one, which is the rule of torchmetrics' `MulticlassCalibrationError`.

    Args:
        log_probs, labels, n_bins, kind: as in `reliability_bins`.
    """
    _check_positive_int("ece", "n_bins", n_bins)
    rows = _as_rows("ece", log_probs, labels, kind)
    return _bin(*_confidence_and_correct(rows), n_bins).ece


def adaptive_ece(
    log_probs: ArrayLike, labels: ArrayLike, *, n_bins: int = 15, kind: Kind = "log_probs"
) -> float:
    """Calibration error of the top label over bins of equal mass (Nixon et al., 2019).

    The examples, sorted by confidence, are split into `min(n_bins, n)` parts whose sizes differ
    by at most one, larger parts first. Examples of equal confidence on both sides of a split share
    their accuracy, so the result does not depend on the order of the rows.

    Args:
        log_probs, labels, n_bins, kind: as in `reliability_bins`.
    """
    _check_positive_int("adaptive_ece", "n_bins", n_bins)
    rows = _as_rows("adaptive_ece", log_probs, labels, kind)
    return _adaptive_ece(*_confidence_and_correct(rows), n_bins)


def _adaptive_ece(confidence: Tensor, correct: Tensor, n_bins: int) -> float:
    confidence, order = confidence.sort()
    n = len(confidence)
    bins = torch.arange(min(n_bins, n), device=confidence.device)
    sizes = n // len(bins) + (bins < n % len(bins)).long()
    ends = sizes.cumsum(0) - 1
    n_correct = _expected_cumulative(confidence, correct[order].double())[0][ends]
    total = confidence.cumsum(0)[ends]
    gap = (n_correct - total).diff(prepend=n_correct.new_zeros(1))
    return float(gap.abs().sum() / n)


# Selective prediction -----------------------------------------------------------------------------


def _expected_cumulative(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative sum of values under sorted keys, averaged over all orders of equal keys.

    Inside a run of equal keys every value is as likely to come first, so the expected partial sum
    grows linearly along the run. Also returns the mask of the positions that end a run.
    """
    _, run, sizes = keys.unique_consecutive(return_inverse=True, return_counts=True)
    run_ends = sizes.cumsum(0)
    ends = values.cumsum(0)[run_ends - 1]
    before = torch.cat([ends.new_zeros(1), ends[:-1]])
    position = torch.arange(1, len(keys) + 1, device=keys.device)
    # Integers divided by integers would give float32.
    into_run = (position - (run_ends - sizes)[run]).double()
    expected = before[run] + (ends - before)[run] * (into_run / sizes[run])
    return expected, position == run_ends[run]


@dataclasses.dataclass(frozen=True)
class RiskCoverageCurve:
    """Error rate among the most confident predictions, for every number of them kept.

    Attributes:
        coverage: (n,) share of examples kept, `k / n` for k = 1 .. n.
        risk: (n,) error rate among the k most confident ones. Among equal confidences it is the
            expectation over their order.
        threshold: (n,) confidence of the k-th example; keeping `confidence >= threshold`
            gives this point where `attainable` is true.
        attainable: (n,) bool, false inside a run of equal confidences, which no threshold splits.
    """

    coverage: Tensor
    risk: Tensor
    threshold: Tensor
    attainable: Tensor

    @property
    def aurc(self) -> float:
        """`(1/n) sum_k risk_k` (Geifman, Uziel and El-Yaniv, 2019)."""
        return float(self.risk.mean())

    @property
    def augrc(self) -> float:
        """Area under `coverage * risk` from coverage zero, trapezoids (Traub et al., 2024)."""
        joint = self.coverage * self.risk
        return float((joint.sum() - 0.5 * joint[-1]) / len(joint))

    def coverage_at_risk(self, risk: float) -> float:
        """Largest attainable coverage whose risk is at most `risk`; 0.0 if there is none."""
        if not 0.0 <= risk <= 1.0:
            raise ValueError(f"coverage_at_risk: risk must lie in [0, 1], got {risk!r}")
        kept = self.coverage[self.attainable & (self.risk <= risk)]
        return float(kept[-1]) if len(kept) else 0.0


def confidence_and_correct(
    log_probs: ArrayLike, labels: ArrayLike, *, kind: Kind = "log_probs"
) -> tuple[Tensor, Tensor]:
    """Probability of the predicted class, (n,) float64, and whether it is the label, (n,) bool.

    The input of the selective-prediction functions for a classifier; they take any other
    confidence as well, for example minus the mutual information.

    Args:
        log_probs, labels, kind: as in `accuracy`.
    """
    return _confidence_and_correct(_as_rows("confidence_and_correct", log_probs, labels, kind))


def _risk_coverage(where: str, confidence: ArrayLike, correct: ArrayLike) -> RiskCoverageCurve:
    scores = _as_scores(where, "confidence", confidence)
    hits = _as_scores(where, "correct", correct)
    if hits.shape != scores.shape:
        raise ValueError(
            f"{where}: correct must have the shape of confidence, {tuple(scores.shape)}, "
            f"got {tuple(hits.shape)}"
        )
    if not ((hits == 0) | (hits == 1)).all():
        raise ValueError(
            f"{where}: correct must hold only 0 and 1, got {float(hits.min()):g} to "
            f"{float(hits.max()):g}; the order is (confidence, correct)"
        )
    scores, order = scores.sort(descending=True)
    errors, ends = _expected_cumulative(scores, 1.0 - hits.to(scores.device)[order])
    kept = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    curve = (kept / len(scores), errors / kept, scores, ends)
    return RiskCoverageCurve(*(column.cpu() for column in curve))


def risk_coverage_curve(confidence: ArrayLike, correct: ArrayLike) -> RiskCoverageCurve:
    """Risk-coverage curve of a selective predictor (El-Yaniv and Wiener, 2010).

    Args:
        confidence: (n,) any score that is higher for the surer prediction.
        correct: (n,) bool or 0/1, whether the prediction was right.
    """
    return _risk_coverage("risk_coverage_curve", confidence, correct)


def aurc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Area under the risk-coverage curve, `(1/n) sum_k risk_k`; lower is better.

    `risk_k` is the error rate among the k most confident predictions (Geifman, Uziel and
    El-Yaniv, 2019). Equal confidences contribute their expectation over all orders, so the value
    does not depend on the order of the rows; a constant confidence gives the error rate.

    Args:
        confidence, correct: as in `risk_coverage_curve`.
    """
    return _risk_coverage("aurc", confidence, correct).aurc


def augrc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Area under the generalised risk-coverage curve; lower is better.

    The curve is the probability of a prediction that is both kept and wrong; its area equals
    `(1 - AUROC) acc err + err^2 / 2` with the AUROC of correct against wrong (Traub et al.,
    2024). Unlike `aurc` it does not give the few most confident examples most of the weight.
    A constant confidence gives half the error rate.

    Args:
        confidence, correct: as in `risk_coverage_curve`.
    """
    return _risk_coverage("augrc", confidence, correct).augrc


def coverage_at_risk(confidence: ArrayLike, correct: ArrayLike, risk: float) -> float:
    """Largest share of examples that a confidence threshold keeps at an error rate <= `risk`.

    Equal confidences are kept or dropped together. 0.0 means that no threshold reaches the bound.

    Args:
        confidence, correct: as in `risk_coverage_curve`.
        risk: bound on the error rate among the kept examples, in [0, 1].
    """
    return _risk_coverage("coverage_at_risk", confidence, correct).coverage_at_risk(risk)


# Out-of-distribution detection --------------------------------------------------------------------


def ood_auroc(score_in: ArrayLike, score_out: ArrayLike) -> float:
    """Area under the ROC curve of telling inputs apart by an uncertainty score.

    Out-of-distribution is the positive class and scores are uncertainties (predictive entropy,
    mutual information): `P(out > in) + P(out = in) / 2` over all pairs, 1 for perfect
    separation, 0.5 for none. Exchanging the classes and the sign of the score changes nothing.

    Args:
        score_in: (n,) scores of in-distribution inputs, higher is more uncertain.
        score_out: (m,) scores of out-of-distribution inputs.
    """
    inside, outside = _score_pair("ood_auroc", score_in, score_out)
    inside = inside.sort().values
    below = torch.searchsorted(inside, outside, right=False)
    not_above = torch.searchsorted(inside, outside, right=True)
    # Ranks are summed as integers: exact whatever the number of pairs.
    return int((below + not_above).sum()) / (2 * len(inside) * len(outside))


def fpr_at_tpr(score_in: ArrayLike, score_out: ArrayLike, *, tpr: float = 0.95) -> float:
    """Share of in-distribution inputs flagged when at least `tpr` of the others are found.

    Out-of-distribution is the positive class, as in `ood_auroc`: an input is flagged when its
    score reaches the largest threshold that flags a share `>= tpr` of `score_out`. (ODIN
    calls in-distribution positive; for that convention pass
    `fpr_at_tpr(-score_out, -score_in)`.)

    Args:
        score_in, score_out: as in `ood_auroc`.
        tpr: true positive rate in (0, 1].
    """
    if not 0.0 < tpr <= 1.0:
        raise ValueError(f"fpr_at_tpr: tpr must lie in (0, 1], got {tpr!r}")
    inside, outside = _score_pair("fpr_at_tpr", score_in, score_out)
    # The margin keeps a product such as 0.95 * 20, should it round up, from asking for one more.
    needed = max(1, math.ceil(tpr * len(outside) - 1e-9))
    threshold = outside.sort(descending=True).values[needed - 1]
    return float((inside >= threshold).double().mean())


def fpr95(score_in: ArrayLike, score_out: ArrayLike) -> float:
    """`fpr_at_tpr` at a true positive rate of 95 %; out-of-distribution is positive.

    Args:
        score_in, score_out: as in `ood_auroc`.
    """
    return fpr_at_tpr(score_in, score_out, tpr=0.95)


def _score_pair(where: str, score_in: ArrayLike, score_out: ArrayLike) -> tuple[Tensor, Tensor]:
    inside = _as_scores(where, "score_in", score_in)
    return inside, _as_scores(where, "score_out", score_out).to(inside.device)


# Uncertainty --------------------------------------------------------------------------------------


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(dim=-1)


def predictive_entropy(log_probs: ArrayLike, *, kind: Kind = "log_probs") -> Tensor:
    """Entropy `-sum_c p_c log p_c` of each row in nats, (n,) float64; total uncertainty.

    Args:
        log_probs, kind: as in `accuracy`.
    """
    return _entropy(_as_distribution("predictive_entropy", log_probs, kind, "(n, C)")[0])


def expected_entropy(sample_log_probs: ArrayLike, *, kind: Kind = "log_probs") -> Tensor:
    """Mean entropy `(1/S) sum_s H[p_s]` in nats, (n,) float64; aleatoric uncertainty.

    Args:
        sample_log_probs: (S, n, C) predictions of S posterior samples.
        kind: what `sample_log_probs` holds.
    """
    probs, _ = _as_distribution("expected_entropy", sample_log_probs, kind, "(S, n, C)")
    return _entropy(probs).mean(dim=0)


def mutual_information(sample_log_probs: ArrayLike, *, kind: Kind = "log_probs") -> Tensor:
    """`H[mean_s p_s] - mean_s H[p_s]` in nats, (n,) float64; epistemic uncertainty.

    The information that the label carries about the parameters (Houlsby et al., 2011). It is
    never negative; rounding below zero is cut off.

    Args:
        sample_log_probs, kind: as in `expected_entropy`.
    """
    probs, _ = _as_distribution("mutual_information", sample_log_probs, kind, "(S, n, C)")
    return _mutual_information(probs)


def _mutual_information(probs: Tensor) -> Tensor:
    return (_entropy(probs.mean(dim=0)) - _entropy(probs).mean(dim=0)).clamp(min=0.0)


def mixture_log_probs(sample_log_probs: ArrayLike, *, kind: Kind = "log_probs") -> Tensor:
    """Posterior predictive `log (1/S) sum_s p_s` by log-sum-exp, (n, C) float64.

    Probabilities are averaged, not logits: the mean of the logits is the predictive of no
    posterior.

    Args:
        sample_log_probs, kind: as in `expected_entropy`.
    """
    _, logs = _as_distribution("mixture_log_probs", sample_log_probs, kind, "(S, n, C)")
    return _mixture_log_probs(logs)


def _mixture_log_probs(logs: Tensor) -> Tensor:
    return (logs.logsumexp(dim=0) - math.log(len(logs))).clamp(max=0.0)


# All at once --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of `evaluate`. Fractions are in [0, 1], entropies in nats, means over examples.

    Attributes:
        n: number of examples.
        n_classes: number of classes.
        accuracy, nll, ece, adaptive_ece, brier, aurc, augrc: the functions of these names.
        entropy: mean predictive entropy.
        mutual_information: its epistemic part; None without posterior samples.
        ood_auroc, ood_fpr95: detection by predictive entropy; None without `ood_log_probs`.
    """

    n: int
    n_classes: int
    accuracy: float
    nll: float
    ece: float
    adaptive_ece: float
    brier: float
    aurc: float
    augrc: float
    entropy: float
    mutual_information: float | None = None
    ood_auroc: float | None = None
    ood_fpr95: float | None = None

    def to_dict(self) -> dict[str, int | float]:
        """The fields that were computed, ready for JSON or a logger; None is left out."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def _predictive(
    where: str, log_probs: ArrayLike, kind: Kind
) -> tuple[Tensor, Tensor, float | None]:
    """(probs, log_probs, mean mutual information) of (n, C) rows or of (S, n, C) samples."""
    given = _as_tensor(where, kind, log_probs)
    sampled = given.ndim == 3
    probs, logs = _as_distribution(where, given, kind, "(S, n, C)" if sampled else "(n, C)")
    if not sampled:
        return probs, logs, None
    return probs.mean(dim=0), _mixture_log_probs(logs), float(_mutual_information(probs).mean())


def evaluate(
    log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    ood_log_probs: ArrayLike | None = None,
    n_bins: int = 15,
    kind: Kind = "log_probs",
) -> Report:
    """Every metric of one classifier on one data set.

    Args:
        log_probs: (n, C) predictive log-probabilities, or (S, n, C) of S posterior samples, which
            are averaged as probabilities and also give the mutual information.
        labels: (n,) integer class indices.
        ood_log_probs: (m, C) or (S, m, C) predictions on out-of-distribution inputs.
        n_bins: number of bins of both calibration errors.
        kind: what `log_probs` and `ood_log_probs` hold.
    """
    _check_positive_int("evaluate", "n_bins", n_bins)
    probs, logs, information = _predictive("evaluate", log_probs, kind)
    n, n_classes = logs.shape
    rows = _Rows(probs, logs, _as_labels("evaluate", labels, n, n_classes).to(logs.device))
    confidence, correct = _confidence_and_correct(rows)
    curve = _risk_coverage("evaluate", confidence, correct)
    entropy = _entropy(probs)
    ood: dict[str, float] = {}
    if ood_log_probs is not None:
        score = _entropy(_predictive("evaluate (ood_log_probs)", ood_log_probs, kind)[0])
        ood = {"ood_auroc": ood_auroc(entropy, score), "ood_fpr95": fpr95(entropy, score)}
    return Report(
        n=n,
        n_classes=n_classes,
        accuracy=float(correct.double().mean()),
        nll=float(_log_loss(rows).mean()),
        ece=_bin(confidence, correct, n_bins).ece,
        adaptive_ece=_adaptive_ece(confidence, correct, n_bins),
        brier=float(_squared_error(rows).mean()),
        aurc=curve.aurc,
        augrc=curve.augrc,
        entropy=float(entropy.mean()),
        mutual_information=information,
        **ood,
    )
