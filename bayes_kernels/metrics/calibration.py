"""Calibration errors of the top label, and what chance alone makes of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .inputs import ArrayLike, Kind, as_distribution, as_rows, check_int
from .scores import top_label
from .selective import expected_cumulative

Norm = Literal["l1", "l2"]


class EceFloor(NamedTuple):
    """ECE of a perfectly calibrated predictor, which chance keeps above zero.

    Attributes:
        mean: its expectation.
        q95: the value that it exceeds in one of twenty test sets.
    """

    mean: float
    q95: float


@dataclasses.dataclass(frozen=True)
class ReliabilityBins:
    """Top-label confidence against accuracy in equal-width bins of [0, 1).

    Attributes:
        edges: (B + 1,) bin edges; bin b is `[edges[b], edges[b + 1])`.
        count: (B + 1,) int64, examples per bin. The last entry is the extra bin of the
            predictions whose confidence is exactly one.
        confidence: (B + 1,) mean confidence, NaN where a bin is empty.
        accuracy: (B + 1,) share of correct predictions, NaN where a bin is empty.
        floor: what chance alone would make of `ece`, as `ece_floor` says; None where not computed.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor
    floor: EceFloor | None = None

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.count.sum())

    @property
    def ece(self) -> float:
        """Expected calibration error `sum_b (n_b / n) |acc_b - conf_b|`."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num(0.0)
        return float((gap * self.count).sum() / self.count.sum())

    @property
    def overconfidence(self) -> float:
        """Part of `ece` from bins where confidence exceeds accuracy."""
        return self._one_sided(self.confidence - self.accuracy)

    @property
    def underconfidence(self) -> float:
        """Part of `ece` from bins where accuracy exceeds confidence."""
        return self._one_sided(self.accuracy - self.confidence)

    def _one_sided(self, gap: Tensor) -> float:
        return float((gap.clamp(min=0).nan_to_num(0.0) * self.count).sum() / self.count.sum())

    def debiased_ece(self, norm: Norm = "l1") -> float:
        """What the function `debiased_ece` returns."""
        full = self.count > 0
        count, accuracy = self.count[full].double(), self.accuracy[full]
        gap, share = accuracy - self.confidence[full], count / count.sum()
        spread = accuracy * (1 - accuracy)
        if norm == "l2":
            # A bin of one example says nothing about its own variance.
            squares = torch.where(count > 1, gap.square() - spread / (count - 1).clamp(min=1), 0)
            return math.sqrt(max(0.0, float((share * squares).sum())))
        deviation = (spread / count).sqrt()
        z = gap / deviation.clamp(min=torch.finfo(torch.float64).tiny)
        # E|X| for X ~ N(gap, deviation^2): |gap| where the deviation is zero.
        density = (-z.square() / 2).exp() * math.sqrt(2 / math.pi)
        expected = deviation * density + gap * torch.special.erf(z / math.sqrt(2))
        return float((share * (2 * gap.abs() - expected)).sum())


def bin_edges(n_bins: int, device: torch.device | None = None) -> Tensor:
    """(B + 1,) edges in float32."""
    return torch.linspace(0, 1, n_bins + 1, dtype=torch.float32, device=device)


def bin_index(confidence: Tensor, n_bins: int) -> Tensor:
    """Number of each confidence's bin; B for a confidence of exactly one.

    The bin is chosen in float32, as torchmetrics does: a confidence of 0.6 then falls on the same
    side of the edge 9/15 in both, and the figures agree with published tables. Sums are float64.
    """
    edges = bin_edges(n_bins, confidence.device)
    return torch.bucketize(confidence.float(), edges, right=True) - 1


def bin_rows(confidence: Tensor, correct: Tensor, n_bins: int) -> ReliabilityBins:
    index = bin_index(confidence, n_bins)
    count = torch.bincount(index, minlength=n_bins + 1)
    sums = torch.zeros(2, n_bins + 1, dtype=torch.float64, device=confidence.device)
    sums[0].index_add_(0, index, confidence)
    sums[1].index_add_(0, index, correct.double())
    means = sums / count  # 0 / 0 is the NaN of an empty bin
    edges = bin_edges(n_bins, confidence.device).double().cpu()
    return ReliabilityBins(edges, count.cpu(), means[0].cpu(), means[1].cpu())


def reliability_bins(
    log_probs: ArrayLike, labels: ArrayLike, *, n_bins: int = 15, kind: Kind = "log_probs"
) -> ReliabilityBins:
    """The bins behind `ece` and `plots.reliability_diagram`.

    Args:
        log_probs, labels, kind: as in `accuracy`.
        n_bins: number of bins.
    """
    check_int("reliability_bins", "n_bins", n_bins)
    confidence, correct = top_label(as_rows("reliability_bins", log_probs, labels, kind))
    bins = bin_rows(confidence, correct, n_bins)
    return dataclasses.replace(bins, floor=floor_of(confidence, n_bins))


def ece(
    log_probs: ArrayLike, labels: ArrayLike, *, n_bins: int = 15, kind: Kind = "log_probs"
) -> float:
    """Expected calibration error of the top label, L1, equal-width bins (Guo et al., 2017).

    `sum_b (n_b / n) |acc_b - conf_b|` over bins `[b / B, (b + 1) / B)` and one extra bin for
    confidences of exactly one, which is the rule of torchmetrics' `MulticlassCalibrationError`.

    Args:
        log_probs, labels, n_bins, kind: as in `reliability_bins`.
    """
    check_int("ece", "n_bins", n_bins)
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
    check_int("adaptive_ece", "n_bins", n_bins)
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


def signed_calibration_error(
    log_probs: ArrayLike, labels: ArrayLike, *, kind: Kind = "log_probs"
) -> float:
    """Mean confidence less accuracy, in [-1, 1]: above zero overconfident, below underconfident.

    `(1/n) sum_i (max_c p_ic - 1[right_i])`, the same as `sum_b (n_b / n) (conf_b - acc_b)` over any
    bins, so that it needs none; the net calibration error of Groot and Valdenegro-Toro (2024), arXiv
    2405.02917, up to the sign. Its size is at most `ece`; where it is smaller, some bins are over- and
    others underconfident: `reliability_bins(...).overconfidence` and `.underconfidence` are the two
    parts, whose sum is `ece` and whose difference this is. It has no floor of chance: for a calibrated
    predictor its mean is zero, its deviation `sqrt(sum_i c_i (1 - c_i)) / n`.

    Args:
        log_probs, labels, kind: as in `accuracy`.
    """
    rows = as_rows("signed_calibration_error", log_probs, labels, kind)
    return signed_error(*top_label(rows))


def signed_error(confidence: Tensor, correct: Tensor) -> float:
    """`signed_calibration_error` of checked input."""
    return float((confidence - correct.double()).mean())


def debiased_ece(
    log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    n_bins: int = 15,
    norm: Norm = "l1",
    kind: Kind = "log_probs",
) -> float:
    """Calibration error of the top label less an estimate of what chance adds to it.

    The bins are those of `ece`. With gaps d_b = acc_b - conf_b and s_b^2 = acc_b (1 - acc_b) / n_b:

    * "l1": `ece - (E[sum_b (n_b / n) |N(d_b, s_b^2)|] - ece)`: what chance would add if the gaps
      seen were the true ones, taken off once. The expectation is the closed form of a folded normal,
      where the authors' code draws. It is below `ece` and may be negative; it is not cut off, so that a
      mean over runs stays one. At perfect calibration .59 of what chance adds remains.
    * "l2": the root mean square gap `sqrt(max(0, sum_b (n_b / n) (d_b^2 - n_b s_b^2 / (n_b - 1))))`.
      The sum is free of bias given the confidences, up to the spread of them within a bin; bins of
      one example count as zero.

    Args:
        log_probs, labels, n_bins, kind: as in `reliability_bins`.
        norm: "l1" for the ECE, "l2" for its quadratic form.

    Source: Kumar, Liang and Ma, "Verified Uncertainty Calibration", NeurIPS 2019, arXiv 1909.10155
    (Definition 5.2 for "l2", the authors' library for "l1").
    """
    check_int("debiased_ece", "n_bins", n_bins)
    if norm not in ("l1", "l2"):
        raise ValueError(f'debiased_ece: norm must be "l1" or "l2", got {norm!r}')
    rows = as_rows("debiased_ece", log_probs, labels, kind)
    return bin_rows(*top_label(rows), n_bins).debiased_ece(norm)


def ece_floor(
    log_probs: ArrayLike,
    *,
    n_bins: int = 15,
    n_draws: int = 1000,
    seed: int = 0,
    kind: Kind = "log_probs",
) -> EceFloor:
    """What `ece` would be if the predictor were perfectly calibrated.

    Each row is right with the probability that it claims, independently: r_i ~ Bernoulli(c_i) with
    c_i = max_c p_ic, and the ECE is `(1/n) sum_b |sum_{i in b} (r_i - c_i)|`. An ECE below `q95` is no
    evidence of miscalibration, and a smaller one than `mean` no merit. The mean is about
    `sqrt(2 B v / (pi n))` for B filled bins and v the mean of c (1 - c): it falls with the root of n.

    Monte Carlo with a fixed seed; the result depends on the confidences, not on the order of the
    rows. With 1,000 draws the mean is within 1 % and `q95` within 2 % (one deviation) of the exact
    values. Cost: O(n draws) on the CPU, in at most 48 MiB.

    Args:
        log_probs: as in `accuracy`; labels are not needed.
        n_bins, kind: as in `reliability_bins`.
        n_draws: test sets drawn.
        seed: of the draws.

    Source: consistency resampling, Bröcker and Smith, "Increasing the Reliability of Reliability
    Diagrams", Weather and Forecasting 22, 2007.
    """
    check_int("ece_floor", "n_bins", n_bins)
    check_int("ece_floor", "n_draws", n_draws)
    check_int("ece_floor", "seed", seed, 0)
    probs, _ = as_distribution("ece_floor", log_probs, kind, "(n, C)")
    return floor_of(probs.amax(dim=1), n_bins, n_draws, seed)


def floor_of(confidence: Tensor, n_bins: int, n_draws: int = 1000, seed: int = 0) -> EceFloor:
    """`ece_floor` of checked input."""
    generator = torch.Generator().manual_seed(seed)
    confidence = confidence.cpu().sort().values
    total = torch.zeros(n_draws, dtype=torch.float64)
    for rows in confidence.split(bin_index(confidence, n_bins).bincount().tolist()):
        right = torch.zeros(n_draws, dtype=torch.float64)
        for part in rows.split(max(1, 2**23 // n_draws)):
            draws = torch.rand(len(part), n_draws, generator=generator)
            right += (draws < part.float()[:, None]).sum(0)
        total += (right - rows.sum()).abs()
    total /= len(confidence)
    return EceFloor(float(total.mean()), float(total.quantile(0.95)))
