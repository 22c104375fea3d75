"""Entropies of predictions and of posterior samples, and the mixture of samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .inputs import ArrayLike, Kind, as_distribution


def row_entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(dim=-1)


def predictive_entropy(log_probs: ArrayLike, *, kind: Kind = "log_probs") -> Tensor:
    """Entropy `-sum_c p_c log p_c` of each row in nats, (n,) float64; total uncertainty.

    Args:
        log_probs, kind: as in `accuracy`.
    """
    return row_entropy(as_distribution("predictive_entropy", log_probs, kind, "(n, C)")[0])


def expected_entropy(sample_log_probs: ArrayLike, *, kind: Kind = "log_probs") -> Tensor:
    """Mean entropy `(1/S) sum_s H[p_s]` in nats, (n,) float64; aleatoric uncertainty.

    Args:
        sample_log_probs: (S, n, C) predictions of S posterior samples.
        kind: what `sample_log_probs` holds.
    """
    probs, _ = as_distribution("expected_entropy", sample_log_probs, kind, "(S, n, C)")
    return row_entropy(probs).mean(dim=0)


def mutual_information(sample_log_probs: ArrayLike, *, kind: Kind = "log_probs") -> Tensor:
    """`H[mean_s p_s] - mean_s H[p_s]` in nats, (n,) float64; epistemic uncertainty.

    The information that the label carries about the parameters (Houlsby et al., 2011). It is
    never negative; rounding below zero is cut off. Of S independent samples it is low by about 1/S of
    itself, since its leading term is the variance of p over the samples, divided by S and not by S - 1:
    multiply by S / (S - 1) to compare different S. What it misses beyond that is of second order.

    Args:
        sample_log_probs, kind: as in `expected_entropy`.
    """
    probs, _ = as_distribution("mutual_information", sample_log_probs, kind, "(S, n, C)")
    return row_information(probs)


def row_information(probs: Tensor) -> Tensor:
    return (row_entropy(probs.mean(dim=0)) - row_entropy(probs).mean(dim=0)).clamp(min=0.0)


def mixture_log_probs(sample_log_probs: ArrayLike, *, kind: Kind = "log_probs") -> Tensor:
    """Posterior predictive `log (1/S) sum_s p_s` by log-sum-exp, (n, C) float64.

    Probabilities are averaged, not logits: the mean of the logits is the predictive of no
    posterior.

    Args:
        sample_log_probs, kind: as in `expected_entropy`.
    """
    _, logs = as_distribution("mixture_log_probs", sample_log_probs, kind, "(S, n, C)")
    return mixture(logs)


def mixture(logs: Tensor) -> Tensor:
    return (logs.logsumexp(dim=0) - math.log(len(logs))).clamp(max=0.0)
