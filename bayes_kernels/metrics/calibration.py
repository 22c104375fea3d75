"""Calibration errors of the top label, and what chance alone makes of them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .inputs import ArrayLike, Kind, as_rows, check_positive_int
from .scores import top_label
from .selective import expected_cumulative


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


def bin_rows(confidence: Tensor, correct: Tensor, n_bins: int) -> ReliabilityBins:
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
    check_positive_int("reliability_bins", "n_bins", n_bins)
    rows = as_rows("reliability_bins", log_probs, labels, kind)
    return bin_rows(*top_label(rows), n_bins)


def ece(
    log_probs: ArrayLike, labels: ArrayLike, *, n_bins: int = 15, kind: Kind = "log_probs"
) -> float:
    """Expected calibration error of the top label, L1, equal-width bins (Guo et al., 2017).

    `sum_b (n_b / n) |acc_b - conf_b|` over bins `[b / B, (b + 1) / B)` and one extra bin for
    confidences of exactly one, which is the rule of torchmetrics' `MulticlassCalibrationError`.

    Args:
        log_probs, labels, n_bins, kind: as in `reliability_bins`.
    """
    check_positive_int("ece", "n_bins", n_bins)
    rows = as_rows("ece", log_probs, labels, kind)
    return bin_rows(*top_label(rows), n_bins).ece


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
    check_positive_int("adaptive_ece", "n_bins", n_bins)
    rows = as_rows("adaptive_ece", log_probs, labels, kind)
    return equal_mass_error(*top_label(rows), n_bins)


def equal_mass_error(confidence: Tensor, correct: Tensor, n_bins: int) -> float:
    confidence, order = confidence.sort()
    n = len(confidence)
    bins = torch.arange(min(n_bins, n), device=confidence.device)
    sizes = n // len(bins) + (bins < n % len(bins)).long()
    ends = sizes.cumsum(0) - 1
    n_correct = expected_cumulative(confidence, correct[order].double())[0][ends]
    total = confidence.cumsum(0)[ends]
    gap = (n_correct - total).diff(prepend=n_correct.new_zeros(1))
    return float(gap.abs().sum() / n)
