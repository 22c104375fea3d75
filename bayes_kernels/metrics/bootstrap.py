"""Whether one predictor scores better than another on the same rows, or chance explains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .calibration import bin_index
from .detection import score_pair
from .inputs import ArrayLike, Kind, Rows, as_rows, check_int
from .scores import log_loss, squared_error, top_label

SCORES = ("accuracy", "nll", "brier", "ece", "signed_calibration_error")


class Difference(NamedTuple):
    """A score of the first predictor less that of the second, on the same rows.

    Attributes:
        value: on the rows as they are.
        low, high: interval of the difference over other test sets of this size.
    """

    value: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return not self.low <= 0.0 <= self.high


def paired_bootstrap(
    log_probs: ArrayLike,
    other_log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    scores: Sequence[str] = ("accuracy", "nll", "brier", "ece"),
    n_bins: int = 15,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    kind: Kind = "log_probs",
) -> dict[str, Difference]:
    """Differences of two predictors' scores on the same rows, each with a bootstrap interval.

    Rows are drawn n times with replacement, the same ones for both predictors, so that what makes a
    row hard for both cancels. The interval goes from the (1 - level) / 2 to the (1 + level) / 2 quantile
    of the differences (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993), moved so that
    their mean is the value: ECEs of resamples lie above those of the rows by .4 of what chance adds
    (`ece_floor`), more for the better calibrated of two. It is about test rows only: that another
    seed would train another model is not in it.

    Args:
        log_probs, labels, kind: as in `accuracy`; or (R, n, C), predictions of R trainings for the same
            rows: a score is then the mean over them, and rows are drawn once for all.
        other_log_probs: of the second predictor, of the same shape, in the same order of rows.
        scores: any of "accuracy", "nll", "brier", "ece", "signed_calibration_error".
        n_bins: as in `ece`.
        level: share of the interval, in (0, 1).
        n_resamples: draws of n rows.
        seed: of the draws.

    Returns:
        For each score the first predictor's less the second's. Cost: O(n n_resamples B), in at most
        128 MiB on the device of the input.

    Raises:
        ValueError: as elsewhere; also where "nll" is infinite in a row.

    Example:
        found = metrics.paired_bootstrap(blob.log_probs, plain.log_probs, labels)["nll"]
        print(f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
    """
    where = "paired_bootstrap"
    if not scores or (unknown := [s for s in scores if s not in SCORES]):
        raise ValueError(
            f"{where}: scores must be some of {SCORES}, got {unknown[0] if scores else scores!r}"
        )
    check_int(where, "n_bins", n_bins)
    check_int(where, "n_resamples", n_resamples)
    check_int(where, "seed", seed, 0)
    if not 0.0 < level < 1.0:
        raise ValueError(f"{where}: level must lie in (0, 1), got {level!r}")
    first = [as_rows(where, one, labels, kind) for one in _trainings(log_probs)]
    name = f"{where} (other_log_probs)"
    second = [as_rows(name, one, labels, kind) for one in _trainings(other_log_probs)]
    shapes = [(len(rows), *rows[0].probs.shape) for rows in (first, second)]
    if shapes[0] != shapes[1]:
        shown = [shape if shape[0] > 1 else shape[1:] for shape in shapes]
        raise ValueError(
            f"{where}: other_log_probs must have the shape of log_probs, {shown[0]}, got {shown[1]}"
        )
    runs = len(first)
    parts = [
        torch.cat([_addends(one, score, n_bins) for one in rows], dim=1)
        for rows in (first, second)
        for score in scores
    ]
    device, n = first[0].probs.device, len(first[0].labels)
    wide = torch.cat([part.to(device) for part in parts], dim=1)
    if not bool(wide.isfinite().all()):
        raise ValueError(
            f"{where}: losses must be finite, got a label of probability zero; leave 'nll' out"
        )
    means = torch.cat([wide.mean(0, keepdim=True), _resampled(wide, n, n_resamples, seed)])
    widths = [part.shape[1] for part in parts]
    values = [_score(part, runs) for part in means.split(widths, dim=1)]
    tails = means.new_tensor([(1 - level) / 2, (1 + level) / 2])
    found = {}
    for score, a, b in zip(scores, values[: len(scores)], values[len(scores) :], strict=True):
        apart = a - b
        # Rounding of equal scores, such as those of equal answers, is no difference.
        apart = torch.where(apart.abs() < 1e-12, 0.0, apart)
        value, drawn = apart[0], apart[1:]
        low, high = (value + drawn.quantile(tails) - drawn.mean()).tolist()
        found[score] = Difference(float(value), low, high)
    return found


class Interval(NamedTuple):
    """A number with its interval over other samples of this size; as text ``0.712 [0.640, 0.781]``.

    Attributes:
        value: on the rows as they are.
        low, high: ends of the interval.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def auroc_interval(
    score_in: ArrayLike,
    score_out: ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """`ood_auroc` with a bootstrap interval: both groups are drawn with replacement, each by itself.

    For wrong against right answers as for inputs outside the training area: `score_out` are the scores of
    those that should be the more uncertain ones. The interval goes from the (1 - level) / 2 to the
    (1 + level) / 2 quantile (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993). It is about
    other inputs only: that another seed would train another model is not in it.

    Args:
        score_in: (n,) scores of the group that should be certain, higher is more uncertain.
        score_out: (m,) scores of the other group.
        level: share of the interval, in (0, 1).
        n_resamples: draws of both groups.
        seed: of the draws.

    Returns:
        The AUROC and its interval. Cost: O(n m n_resamples).

    Raises:
        ValueError: a group is empty, a score is NaN, or an option is out of range.
    """
    where = "auroc_interval"
    check_int(where, "n_resamples", n_resamples)
    check_int(where, "seed", seed, 0)
    if not 0.0 < level < 1.0:
        raise ValueError(f"{where}: level must lie in (0, 1), got {level!r}")
    inside, outside = score_pair(where, score_in, score_out)
    apart = outside[None, :] - inside[:, None]
    # inf - inf is NaN where equal infinities are a tie.
    tied = outside[None, :] == inside[:, None]
    ahead = torch.where(tied, 0.5, (apart > 0).double())
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for rows in (len(inside), len(outside)):
        picks = torch.randint(rows, (n_resamples, rows), generator=generator).to(ahead.device)
        counts = ahead.new_zeros(n_resamples, rows)
        drawn.append(counts.scatter_add_(1, picks, torch.ones_like(picks, dtype=counts.dtype)))
    values = ((drawn[0] @ ahead) * drawn[1]).sum(1) / ahead.numel()
    tails = values.new_tensor([(1 - level) / 2, (1 + level) / 2])
    low, high = values.quantile(tails).tolist()
    return Interval(float(ahead.mean()), low, high)


def _addends(rows: Rows, score: str, n_bins: int) -> Tensor:
    """(n, k) float64: the score is the sum of sizes of their k means, or the mean where k is one."""
    if score == "nll":
        return log_loss(rows)[:, None]
    if score == "brier":
        return squared_error(rows)[:, None]
    confidence, correct = top_label(rows)
    if score == "accuracy":
        return correct.double()[:, None]
    gap = (confidence - correct.double())[:, None]
    if score == "signed_calibration_error":
        return gap
    index = bin_index(confidence, n_bins)[:, None]
    return gap.new_zeros(len(gap), n_bins + 1).scatter_(1, index, gap)


def _trainings(log_probs: ArrayLike) -> list[ArrayLike]:
    """Predictions of each training."""
    several = torch.as_tensor(log_probs)
    return list(several) if several.dim() == 3 and len(several) else [log_probs]


def _score(means: Tensor, runs: int) -> Tensor:
    """Scores (R,) from the means (R, runs k) of `_addends`, as means over the runs."""
    own = means.unflatten(1, (runs, -1))
    return (own[..., 0] if own.shape[2] == 1 else own.abs().sum(2)).mean(1)


def _resampled(values: Tensor, n: int, n_resamples: int, seed: int) -> Tensor:
    """Means (n_resamples, k) of n rows of values (n, k), drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, 2**22 // n)
    found = []
    for begin in range(0, n_resamples, chunk):
        drawn = torch.randint(n, (min(chunk, n_resamples - begin), n), generator=generator)
        counts = values.new_zeros(drawn.shape)
        counts.scatter_add_(1, drawn.to(counts.device), counts.new_ones(()).expand(drawn.shape))
        found.append(counts @ values / n)
    return torch.cat(found)
