"""Input of the metrics: what is taken, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

_Rectangle = Sequence[float] | Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]
ArrayLike = Tensor | np.ndarray | _Rectangle
Kind = Literal["log_probs", "probs"]

# How far a row may sum from one. A log-probability of size 10 carries an error of 10 * eps / 2,
# which is a relative error of the probability: 4 % in bfloat16, 0.5 % in float16.
_SUM_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Rows(NamedTuple):
    """Checked input: probs and log_probs (n, C) float64, labels (n,) int64, on one device."""

    probs: Tensor
    log_probs: Tensor
    labels: Tensor


def as_tensor(where: str, name: str, value: ArrayLike) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value.detach()
        # float64 does not exist on Apple's GPUs.
        return tensor.cpu() if tensor.device.type == "mps" else tensor
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        raise ValueError(
            f"{where}: {name} must be one array, got a list of tensors; torch.stack it"
        )
    try:
        # The copy also serves read-only arrays and negative strides, which torch cannot share.
        return torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: {name} must be a numeric array, got {type(value).__name__} ({error}); "
            "pass a torch tensor, a numpy array or a nested sequence of equal lengths"
        ) from None


def as_distribution(where: str, value: ArrayLike, kind: Kind, shape: str) -> tuple[Tensor, Tensor]:
    """Checked (probs, log_probs) in float64; `shape` is "(n, C)" or "(S, n, C)"."""
    if kind not in ("log_probs", "probs"):
        raise ValueError(f'{where}: kind must be "log_probs" or "probs", got {kind!r}')
    given = as_tensor(where, kind, value)
    if given.ndim != shape.count(",") + 1:
        raise ValueError(f"{where}: {kind} must have shape {shape}, got {tuple(given.shape)}")
    if given.numel() == 0:
        raise ValueError(
            f"{where}: {kind} must have at least one row, got shape {tuple(given.shape)}"
        )
    if given.shape[-1] < 2:
        raise ValueError(
            f"{where}: {kind} must have at least two classes, got shape {tuple(given.shape)}; "
            "give a binary problem as two columns"
        )
    if given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"{where}: {kind} must be real numbers, got {given.dtype}")
    tolerance = _SUM_TOLERANCE.get(given.dtype, 1e-3)
    given = given.double()
    if given.isnan().any():
        bad = int(given.isnan().any(dim=-1).sum())
        raise ValueError(f"{where}: {kind} must be free of NaN, got NaN in {bad} rows; drop them")
    if kind == "probs":
        if (given < 0).any():
            raise ValueError(
                f"{where}: probs must not be negative, got {float(given.min()):.4g}; "
                'log-probabilities go with kind="log_probs", logits through log_softmax first'
            )
        probs = given
    else:
        probs = given.exp()
    sums = probs.sum(dim=-1)
    # Written so that an infinite sum fails too.
    if not ((sums - 1).abs() <= tolerance).all():
        worst = float(sums.flatten()[(sums - 1).abs().argmax()])
        advice = (
            'logits go through log_softmax first, probabilities go with kind="probs"'
            if kind == "log_probs"
            else "divide each row by its sum"
        )
        raise ValueError(
            f"{where}: each row of {kind} must sum to one as probabilities "
            f"(within {tolerance:g}), got {worst:.6g}; {advice}"
        )
    # Rounding may leave a certain class a hair above one, which would make its loss negative.
    probs = probs.clamp(max=1.0)
    return probs, (probs.log() if kind == "probs" else given.clamp(max=0.0))


def as_labels(where: str, value: ArrayLike, n: int, n_classes: int) -> Tensor:
    labels = as_tensor(where, "labels", value)
    if tuple(labels.shape) != (n,):
        raise ValueError(
            f"{where}: labels must have shape ({n},), one class index per row, "
            f"got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{where}: labels must be integer class indices, got {labels.dtype}")
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"{where}: labels must lie in [0, {n_classes}), got values from {low} to {high}; "
            "drop ignored rows first"
        )
    return labels


def as_rows(where: str, log_probs: ArrayLike, labels: ArrayLike, kind: Kind) -> Rows:
    probs, logs = as_distribution(where, log_probs, kind, "(n, C)")
    n, n_classes = logs.shape
    return Rows(probs, logs, as_labels(where, labels, n, n_classes).to(logs.device))


def as_scores(where: str, name: str, value: ArrayLike) -> Tensor:
    scores = as_tensor(where, name, value)
    if scores.ndim != 1 or scores.numel() == 0:
        raise ValueError(
            f"{where}: {name} must have shape (n,) with n >= 1, got {tuple(scores.shape)}"
        )
    if scores.is_complex():
        raise ValueError(f"{where}: {name} must be real numbers, got {scores.dtype}")
    scores = scores.double()
    if scores.isnan().any():
        raise ValueError(
            f"{where}: {name} must be free of NaN, got {int(scores.isnan().sum())}; drop them"
        )
    return scores


def check_int(where: str, name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where}: {name} must be an integer >= {least}, got {value!r}")
