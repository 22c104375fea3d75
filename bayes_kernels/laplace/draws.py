"""Held-out likelihoods for several priors, and predictions from draws of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..batches import eval_mode, is_empty
from .passes import Reader
from .prediction import Prediction, from_logits
from .tokens import LabelledTokens

# (seed, index) -> the context in which the model has that draw of the weights.
Sampled = Callable[[int, int], AbstractContextManager[None]]


def linearised_scores(
    reader: Reader,
    linearised: Callable[[Any, Sequence[Tensor]], tuple[Tensor, list[Tensor]]],
    classes: int,
    loader: Iterable[Any],
    grid: Tensor,
    prediction: str,
    n_samples: int,
) -> tuple[Tensor, int]:
    """Log-likelihood of held-out examples for each delta of a grid, and their number: one pass.

    Args:
        reader: reads batches.
        linearised: (batch, deltas) -> logits and their covariance for each.
        classes: as far as they are known, the parts that a batch is split into.
        loader: labelled batches.
        grid: (G,) values of delta.
        prediction, n_samples: as for `Laplace.predict`.

    Raises:
        ValueError: there are no labels.
    """
    scores = torch.zeros(len(grid), dtype=torch.float64)
    seen = 0
    for raw in loader:
        if is_empty(raw):
            continue
        found = []
        for part, _ in reader.parts(raw, classes):
            mean, covs = linearised(part, list(grid))
            found.append((_need_labels(reader, part, mean), mean, *covs))
        labels, mean, *covs = map(torch.cat, zip(*found, strict=True))
        classes = mean.shape[1]  # a loaded posterior has not seen them
        seen += len(labels)
        for i, cov in enumerate(covs):
            log_probs = from_logits(mean, cov, prediction, n_samples, 0).log_probs
            scores[i] += float(log_probs.gather(1, labels[:, None]).double().sum())
    return scores, seen


def drawn_scores(
    reader: Reader, sampled: Sampled, batches: Sequence[Any], n_samples: int
) -> tuple[float, int]:
    """log 1/S sum_s p_s(y) of held-out labels, summed, and their number: a pass for each draw.

    Args:
        reader: reads batches.
        sampled: draws of the weights.
        batches: labelled batches.
        n_samples: S.

    Raises:
        ValueError: there are no labels.
    """
    drawn = []
    for s in range(n_samples):
        with sampled(0, s):
            parts = [_label_log_probs(reader, raw) for raw in batches]
        drawn.append(torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64))
    found = torch.stack(drawn).logsumexp(0) - math.log(n_samples)
    return float(found.sum()), len(found)


def _need_labels(reader: Reader, batch: Any, logits: Tensor) -> Tensor:
    """The labels of a held-out batch.

    Raises:
        ValueError: there are none.
    """
    labels = reader.labels(batch, logits)
    if labels is None:
        raise ValueError(
            "Laplace.optimize_prior_precision: batches of the loader must have labels, got none; pass "
            "labels=lambda batch: ..."
        )
    return labels


@torch.no_grad()
def _label_log_probs(reader: Reader, raw: Any) -> Tensor:
    """(N,) log-probabilities of a batch's labels under the present weights, fp64 on the CPU."""
    batch = reader.prepare(raw)
    with eval_mode(reader.model):
        logits = reader.logits(batch)
    labels = _need_labels(reader, batch, logits)
    if logits.dim() == 2:
        logits, labels = logits[:, None], labels[:, None]
    return LabelledTokens(logits, labels).log_probs()


def drawn_prediction(
    reader: Reader, sampled: Sampled, batch: Any, n_samples: int, seed: int
) -> Prediction:
    """The mean distribution of draws of the weights; arguments as above, of a prepared batch."""
    mean_p: Tensor | float = 0.0
    entropy: Tensor | float = 0.0
    with eval_mode(reader.model), torch.no_grad():
        for s in range(n_samples):
            with sampled(seed, s):
                log_p = reader.logits(batch).double().log_softmax(-1)
            mean_p = mean_p + log_p.exp() / n_samples
            entropy = entropy + torch.special.entr(log_p.exp()).sum(-1) / n_samples
    assert isinstance(mean_p, Tensor) and isinstance(entropy, Tensor)
    total = torch.special.entr(mean_p).sum(-1)
    return Prediction(mean_p.log().float(), total.float(), entropy.float())
