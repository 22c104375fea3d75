"""Searches for TFB's deviation sigma_q: which ones are tried, and how a trial is scored."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..logits import Prediction
from ..tokens import TokenPrediction
from .tfb_report import Trial


def bisect(
    trial: Callable[[float], Trial],
    low: float,
    high: float,
    max_trials: int,
    resolution: float,
    rule: str = "feasible",
) -> tuple[float, list[Trial]]:
    """Search for the largest feasible sigma by halving [low, high].

    Args:
        trial: evaluates a sigma.
        low, high, max_trials, resolution, rule: as in `tfb_`.

    Returns:
        The sigma of the rule, and all evaluations in their order.
    """
    trace: list[Trial] = []
    feasible: float | None = None
    while len(trace) < max_trials and high - low >= resolution:
        middle = (low + high) / 2
        found = trial(middle)
        trace.append(found)
        if found.feasible:
            low = feasible = middle
        else:
            high = middle
    if rule == "code":
        return high, trace
    if feasible is None:
        trace.append(trial(low))
        return (low if trace[-1].feasible else 0.0), trace
    return feasible, trace


def least_nll(
    trial: Callable[[float, float], Trial],
    low: float,
    high: float,
    max_trials: int,
    mean: float,
) -> tuple[float, list[Trial]]:
    """The sigma of least NLL of a geometric grid, refined once; the smaller one of equals.

    From the middle up, and then down. Going up all points are tried, since the NLL hardly depends on sigma
    far above the best one, and a descent would stop there. Without noise it is the mean's: going down ends
    at a point which has lost half of what the best sigma gains on the mean.

    Args:
        trial: evaluates a sigma; it may end where the NLL cannot become less than a limit.
        low, high: ends of the grid.
        max_trials: points of the grid, with two between the best and its neighbours.
        mean: NLL without noise.
    """
    points = max(max_trials - 2, 1)
    ratio = (low / high) ** (1 / max(points - 1, 1))
    sigmas = [high * ratio**i for i in range(points)]
    middle = (points - 1) // 2
    trace = [trial(sigmas[middle], math.inf)]

    def best() -> Trial:
        complete = [found for found in trace if found.complete]
        return min(complete, key=lambda found: (found.nll, found.sigma))

    for sigma in reversed(sigmas[:middle]):
        trace.append(trial(sigma, best().nll))
    for sigma in sigmas[middle + 1 :]:
        lowest = trace[-1] if sigma < sigmas[middle + 1] else trace[0]
        if lowest.sigma < best().sigma and lowest.nll - best().nll > (mean - best().nll) / 2 > 0:
            break
        trace.append(trial(sigma, math.inf))
    found = best().sigma
    for between in (found * ratio**0.5, found / ratio**0.5):
        if len(trace) < max_trials and low < between < high:
            trace.append(trial(between, best().nll))
    return best().sigma, trace


def count_bisections(low: float, high: float, max_trials: int, resolution: float) -> int:
    steps = 0
    while steps < max_trials and high - low >= resolution:
        high, steps = (low + high) / 2, steps + 1
    return steps


def grid(
    trial: Callable[[float], Trial], low: float, high: float, points: int, bound: float
) -> tuple[float, list[Trial]]:
    """First crossing of the bound along a grid, between the points by a straight line."""
    ratio = (high / low) ** (1 / max(points - 1, 1))
    trace = [trial(low * ratio**i if i < points - 1 else high) for i in range(points)]
    before, change = 0.0, 0.0
    for found in trace:
        if not found.feasible:
            rise = found.change - change
            share = (bound - change) / rise if math.isfinite(rise) else 0.0
            return before + share * (found.sigma - before), trace
        before, change = found.sigma, found.change
    return high, trace


def truth_of(mean: Prediction | TokenPrediction, labels: str, where: str) -> tuple[str, Tensor]:
    """Which labels the search has, "true" or "pseudo", and those of classes.

    Raises:
        ValueError: there are none, or they are no classes.
    """
    if isinstance(mean, TokenPrediction):
        if not len(mean):
            raise ValueError(f"tfb_: {where} must have labels of tokens that count, got none")
        return "true", mean.predicted
    if labels == "true" and mean.labels is None:
        raise ValueError(f"tfb_: {where} must have labels for labels='true', got none")
    kind = "pseudo" if labels == "pseudo" or mean.labels is None else "true"
    truth = mean.classes if kind == "pseudo" or mean.labels is None else mean.labels
    classes = mean.log_probs.shape[1]
    if bool(((truth < 0) | (truth >= classes)).any()):
        raise ValueError(
            f"tfb_: labels must be in [0, {classes}), got {int(truth.min())} to "
            f"{int(truth.max())}; pass labels='pseudo'"
        )
    return kind, truth


def classes_of(prediction: Prediction | TokenPrediction) -> Tensor:
    tokens = isinstance(prediction, TokenPrediction)
    return prediction.predicted if tokens else prediction.classes  # type: ignore[union-attr]


def loss_of(part: Prediction | TokenPrediction) -> float:
    """Sum of -log p of the labels of a batch."""
    if isinstance(part, TokenPrediction):
        return -float(part.log_probs.sum())
    assert part.labels is not None  # by `truth_of`
    return -float(part.log_probs.gather(1, part.labels[:, None]).sum())


class Score:
    """Turns predictions of the anchors into trials."""

    def __init__(
        self,
        metric: str,
        bound: float,
        labels: Tensor,
        mean: Prediction | TokenPrediction,
        per_anchor: bool,
    ) -> None:
        self.metric, self.bound, self.labels = metric, bound, labels
        self.classes = classes_of(mean)
        self.divisor = len(mean) if per_anchor else 1
        self.log_probs, self.right = self._scores(mean)

    def _scores(self, prediction: Prediction | TokenPrediction) -> tuple[Tensor, Tensor]:
        """Log-probability of each label, and whether it is the most probable one."""
        if isinstance(prediction, TokenPrediction):
            return prediction.log_probs, prediction.correct
        labels = self.labels[: len(prediction.log_probs)]
        chosen = prediction.log_probs.gather(1, labels[:, None])[:, 0]
        return chosen, prediction.classes == labels

    def trial(self, sigma: float, prediction: Prediction | TokenPrediction) -> Trial:
        """Of the first examples, where the evaluation ended early; changes are those on them."""
        log_probs, right = self._scores(prediction)
        seen = slice(len(log_probs))
        nll, before = -float(log_probs.mean()), -float(self.log_probs[seen].mean())
        accuracy = float(right.double().mean())
        flips = float((classes_of(prediction) != self.classes[seen]).double().mean())
        change = {
            # An NLL of 0 leaves no room for any change.
            "nll": abs(nll - before) / max(before, 1e-300),
            "accuracy": abs(accuracy - float(self.right[seen].double().mean())),
            "flips": flips,
            "held_out": nll - before,
        }[self.metric] / self.divisor
        complete = len(log_probs) == len(self.log_probs)
        return Trial(sigma, change, change <= self.bound, nll, accuracy, flips, complete)


__all__ = [
    "Score",
    "bisect",
    "classes_of",
    "count_bisections",
    "grid",
    "least_nll",
    "loss_of",
    "truth_of",
]
