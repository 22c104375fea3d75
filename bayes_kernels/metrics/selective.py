"""Selective prediction: risk against the share of predictions kept."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .inputs import ArrayLike, as_scores


def expected_cumulative(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
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


def curve_of(where: str, confidence: ArrayLike, correct: ArrayLike) -> RiskCoverageCurve:
    scores = as_scores(where, "confidence", confidence)
    hits = as_scores(where, "correct", correct)
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
    errors, ends = expected_cumulative(scores, 1.0 - hits.to(scores.device)[order])
    kept = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    curve = (kept / len(scores), errors / kept, scores, ends)
    return RiskCoverageCurve(*(column.cpu() for column in curve))


def risk_coverage_curve(confidence: ArrayLike, correct: ArrayLike) -> RiskCoverageCurve:
    """Risk-coverage curve of a selective predictor (El-Yaniv and Wiener, 2010).

    Args:
        confidence: (n,) any score that is higher for the surer prediction.
        correct: (n,) bool or 0/1, whether the prediction was right.
    """
    return curve_of("risk_coverage_curve", confidence, correct)


def aurc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Area under the risk-coverage curve, `(1/n) sum_k risk_k`; lower is better.

    `risk_k` is the error rate among the k most confident predictions (Geifman, Uziel and
    El-Yaniv, 2019). Equal confidences contribute their expectation over all orders, so the value
    does not depend on the order of the rows; a constant confidence gives the error rate.

    Args:
        confidence, correct: as in `risk_coverage_curve`.
    """
    return curve_of("aurc", confidence, correct).aurc


def augrc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Area under the generalised risk-coverage curve; lower is better.

    The curve is the probability of a prediction that is both kept and wrong; its area equals
    `(1 - AUROC) acc err + err^2 / 2` with the AUROC of correct against wrong (Traub et al.,
    2024). Unlike `aurc` it does not give the few most confident examples most of the weight.
    A constant confidence gives half the error rate.

    Args:
        confidence, correct: as in `risk_coverage_curve`.
    """
    return curve_of("augrc", confidence, correct).augrc


def coverage_at_risk(confidence: ArrayLike, correct: ArrayLike, risk: float) -> float:
    """Largest share of examples that a confidence threshold keeps at an error rate <= `risk`.

    Equal confidences are kept or dropped together. 0.0 means that no threshold reaches the bound.

    Args:
        confidence, correct: as in `risk_coverage_curve`.
        risk: bound on the error rate among the kept examples, in [0, 1].
    """
    return curve_of("coverage_at_risk", confidence, correct).coverage_at_risk(risk)
