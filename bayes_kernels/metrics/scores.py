"""Accuracy, proper scores, and the confidence in the predicted class."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import ArrayLike, Kind, Rows, as_rows


def log_loss(rows: Rows) -> Tensor:
    return -rows.log_probs.gather(1, rows.labels[:, None]).squeeze(1)


def squared_error(rows: Rows) -> Tensor:
    error = rows.probs.clone()
    error[torch.arange(len(error), device=error.device), rows.labels] -= 1.0
    return error.square().sum(dim=1)


def top_label(rows: Rows) -> tuple[Tensor, Tensor]:
    confidence, predicted = rows.probs.max(dim=1)  # the first class wins a tie
    return confidence, predicted == rows.labels


def accuracy(log_probs: ArrayLike, labels: ArrayLike, *, kind: Kind = "log_probs") -> float:
    """Share of rows whose most probable class is the label; the first class wins a tie.

    Args:
        log_probs: (n, C) log-probabilities, or probabilities with `kind="probs"`.
        labels: (n,) integer class indices.
        kind: what `log_probs` holds.
    """
    rows = as_rows("accuracy", log_probs, labels, kind)
    return float(top_label(rows)[1].double().mean())


def nll(log_probs: ArrayLike, labels: ArrayLike, *, kind: Kind = "log_probs") -> float:
    """Negative log-likelihood `-(1/n) sum_i log p_i[y_i]` in nats, a mean over examples.

    The Bayesian predictive must be averaged as probabilities before it is scored
    (`mixture_log_probs`). A label of probability zero gives infinity, and probabilities below
    1e-45 are zero in float32: pass log-probabilities wherever they exist.

    Args:
        log_probs, labels, kind: as in `accuracy`.
    """
    return float(log_loss(as_rows("nll", log_probs, labels, kind)).mean())


def brier(log_probs: ArrayLike, labels: ArrayLike, *, kind: Kind = "log_probs") -> float:
    """Brier score `(1/n) sum_i sum_c (p_ic - 1[y_i = c])^2`, in [0, 2] (Brier, 1950).

    The sum runs over all classes, so for two classes it is twice the binary score of scikit-learn.

    Args:
        log_probs, labels, kind: as in `accuracy`.
    """
    return float(squared_error(as_rows("brier", log_probs, labels, kind)).mean())


def confidence_and_correct(
    log_probs: ArrayLike, labels: ArrayLike, *, kind: Kind = "log_probs"
) -> tuple[Tensor, Tensor]:
    """Probability of the predicted class, (n,) float64, and whether it is the label, (n,) bool.

    The input of the selective-prediction functions for a classifier; they take any other
    confidence as well, for example minus the mutual information.

    Args:
        log_probs, labels, kind: as in `accuracy`.
    """
    return top_label(as_rows("confidence_and_correct", log_probs, labels, kind))
