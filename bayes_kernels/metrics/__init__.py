"""Calibration, proper scores, selective prediction and out-of-distribution detection.

The functions need torch alone. They take torch tensors, numpy arrays or nested sequences, compute
in float64 and return Python floats (per-example quantities are float64 tensors). Rates and calibration
errors are fractions in [0, 1]. Distributions are log-probabilities unless `kind="probs"` says otherwise: a
probability that underflows to zero costs an infinite log loss, its logarithm does not.

| functions | what |
|---|---|
| `accuracy nll brier` | share of right answers, mean log loss, multi-class Brier score |
| `ece adaptive_ece` | top-label calibration error, equal-width and equal-mass bins |
| `ece_floor` | what `ece` would be by chance alone, were the predictor perfectly calibrated |
| `debiased_ece` | `ece` less an estimate of what chance adds |
| `signed_calibration_error` | above zero overconfident, below zero underconfident |
| `paired_bootstrap` | differences of two predictors' scores on the same rows, with intervals |
| `aurc augrc` | area under the (generalised) risk-coverage curve |
| `coverage_at_risk` | largest coverage whose selective risk stays below a bound |
| `ood_auroc fpr95` | detection of out-of-distribution inputs from an uncertainty score |
| `auroc_interval` | `ood_auroc` with a bootstrap interval, for wrong against right answers too |
| `predictive_entropy` | total uncertainty `H[mean_s p_s]` |
| `expected_entropy` | its aleatoric part, `mean_s H[p_s]` |
| `mutual_information` | its epistemic part, the difference of the two |
| `corrected_mutual_information` | the same without the bias of few samples |
| `evaluate` | all of them in one `Report` |

Every function raises `ValueError` for input of the wrong shape, without rows, with NaN, with
labels outside `[0, C)` or with rows that do not sum to one. Values are scored as they are given:
never clamped away from zero, never renormalised. Cost is O(n C), plus O(n log n) where a sort is
needed, on the device of the input, where nothing else is said.
"""

from .bootstrap import Difference, Interval, auroc_interval, paired_bootstrap
from .calibration import (
    EceFloor,
    ReliabilityBins,
    adaptive_ece,
    debiased_ece,
    ece,
    ece_floor,
    reliability_bins,
    signed_calibration_error,
)
from .detection import fpr95, fpr_at_tpr, ood_auroc
from .report import Report, evaluate
from .scores import accuracy, brier, confidence_and_correct, nll
from .selective import (
    RiskCoverageCurve,
    augrc,
    aurc,
    coverage_at_risk,
    risk_coverage_curve,
)
from .uncertainty import (
    corrected_mutual_information,
    expected_entropy,
    mixture_log_probs,
    mutual_information,
    predictive_entropy,
)

__all__ = [
    "Difference",
    "EceFloor",
    "Interval",
    "ReliabilityBins",
    "Report",
    "RiskCoverageCurve",
    "accuracy",
    "adaptive_ece",
    "augrc",
    "aurc",
    "auroc_interval",
    "brier",
    "confidence_and_correct",
    "corrected_mutual_information",
    "coverage_at_risk",
    "debiased_ece",
    "ece",
    "ece_floor",
    "evaluate",
    "expected_entropy",
    "fpr95",
    "fpr_at_tpr",
    "mixture_log_probs",
    "mutual_information",
    "nll",
    "ood_auroc",
    "paired_bootstrap",
    "predictive_entropy",
    "reliability_bins",
    "risk_coverage_curve",
    "signed_calibration_error",
]
