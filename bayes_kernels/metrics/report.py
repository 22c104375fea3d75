"""Every metric of one classifier on one data set."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .calibration import bin_rows, equal_mass_error, floor_of, signed_error
from .detection import fpr95, ood_auroc
from .inputs import ArrayLike, Kind, Rows, as_distribution, as_labels, as_tensor, check_int
from .scores import log_loss, squared_error, top_label
from .selective import curve_of
from .uncertainty import mixture, row_entropy, row_information


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
        ece_floor, ece_floor_q95: mean and 95 % quantile of `ece` for a perfectly calibrated predictor
            with these confidences, see the function `ece_floor`.
        debiased_ece, signed_calibration_error: the functions of these names. These four are None
            in reports of versions that had none of them.
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
    ece_floor: float | None = None
    ece_floor_q95: float | None = None
    debiased_ece: float | None = None
    signed_calibration_error: float | None = None

    def to_dict(self) -> dict[str, int | float]:
        """The fields that were computed, ready for JSON or a logger; None is left out."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def _predictive(
    where: str, log_probs: ArrayLike, kind: Kind
) -> tuple[Tensor, Tensor, float | None]:
    """(probs, log_probs, mean mutual information) of (n, C) rows or of (S, n, C) samples."""
    given = as_tensor(where, kind, log_probs)
    sampled = given.ndim == 3
    probs, logs = as_distribution(where, given, kind, "(S, n, C)" if sampled else "(n, C)")
    if not sampled:
        return probs, logs, None
    return probs.mean(dim=0), mixture(logs), float(row_information(probs).mean())


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
        n_bins: number of bins of the calibration errors.
        kind: what `log_probs` and `ood_log_probs` hold.
    """
    check_int("evaluate", "n_bins", n_bins)
    probs, logs, information = _predictive("evaluate", log_probs, kind)
    n, n_classes = logs.shape
    rows = Rows(probs, logs, as_labels("evaluate", labels, n, n_classes).to(logs.device))
    confidence, correct = top_label(rows)
    curve = curve_of("evaluate", confidence, correct)
    entropy = row_entropy(probs)
    ood: dict[str, float] = {}
    if ood_log_probs is not None:
        score = row_entropy(_predictive("evaluate (ood_log_probs)", ood_log_probs, kind)[0])
        ood = {"ood_auroc": ood_auroc(entropy, score), "ood_fpr95": fpr95(entropy, score)}
    bins, floor = bin_rows(confidence, correct, n_bins), floor_of(confidence, n_bins)
    return Report(
        n=n,
        n_classes=n_classes,
        accuracy=float(correct.double().mean()),
        nll=float(log_loss(rows).mean()),
        ece=bins.ece,
        adaptive_ece=equal_mass_error(confidence, correct, n_bins),
        brier=float(squared_error(rows).mean()),
        aurc=curve.aurc,
        augrc=curve.augrc,
        entropy=float(entropy.mean()),
        mutual_information=information,
        ece_floor=floor.mean,
        ece_floor_q95=floor.q95,
        debiased_ece=bins.debiased_ece(),
        signed_calibration_error=signed_error(confidence, correct),
        **ood,
    )
