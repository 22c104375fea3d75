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
    `corrected_mutual_information` is not.

    Args:
        sample_log_probs, kind: as in `expected_entropy`.
    """
    probs, _ = as_distribution("mutual_information", sample_log_probs, kind, "(S, n, C)")
    return row_information(probs)


def corrected_mutual_information(
    sample_log_probs: ArrayLike, *, group: int = 1, kind: Kind = "log_probs"
) -> Tensor:
    """`mutual_information` without the bias of few samples, in nats, (n,) float64, at least 0.

    The entropy of the mean of P independent groups of samples is low, on average, by about

        sum_c var_c / (2 P p_c)

    with var_c the sample variance of the groups' mean probabilities of class c and p_c their mean: the
    second-order term of its expansion, and of the jackknife over groups. It is added.

    Args:
        sample_log_probs, kind: as in `expected_entropy`. At least two groups.
        group: successive samples that depend on each other: 2 for antithetic pairs, as
            `bayes_kernels.hf.predict` draws them, 1 for independent samples.

    Raises:
        ValueError: group is not at least 1, or the samples are no multiple of it, or one group.
    """
    op = "corrected_mutual_information"
    probs, _ = as_distribution(op, sample_log_probs, kind, "(S, n, C)")
    if group < 1 or len(probs) % group or len(probs) < 2 * group:
        raise ValueError(
            f"{op}: samples must be two groups or more of {group}, got {len(probs)}; set group=2 for "
            "antithetic pairs, else 1"
        )
    means = probs.unflatten(0, (-1, group)).mean(dim=1)
    mean = means.mean(dim=0).clamp(min=torch.finfo(probs.dtype).tiny)
    bias = (means.var(dim=0) / (2 * len(means) * mean)).sum(dim=-1)
    difference = row_entropy(probs.mean(dim=0)) - row_entropy(probs).mean(dim=0)
    return (difference + bias).clamp(min=0.0)


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
