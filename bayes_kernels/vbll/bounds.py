"""Lower bounds of the expected log-likelihood of a class under independent Gaussian logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import random, reference
from ..functional.arguments import backward_of, transformed
from ..random import check_key

BOUNDS = ("jensen", "mc")


def jensen_bound(mean: Tensor, variance: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Jensen's lower bound of E log softmax(z)_y for logits z_c ~ N(mean_c, variance_c).

        mean_y - logsumexp_c(mean_c + variance_c / 2)

    Args:
        mean: (B, C).
        variance: (B, C).
        labels: int64 (B,) in [0, C), also where a row does not count.
        counted: bool (B,), which rows count.

    Returns:
        (B,), 0 where a row does not count. Differentiable, by PyTorch's own operations.

    Source: Harrison et al., "Variational Bayesian Last Layers", arXiv 2404.11599.
    """
    chosen = mean.gather(1, labels[:, None]).squeeze(1)
    return (chosen - (mean + variance / 2).logsumexp(1)).masked_fill(~counted, 0.0)


class _JensenBound(torch.autograd.Function):
    """`jensen_bound` with a gradient that keeps its arguments alone."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, mean: Tensor, variance: Tensor, labels: Tensor, counted: Tensor
    ) -> Tensor:
        ctx.save_for_backward(mean, variance, labels, counted)
        return jensen_bound(mean, variance, labels, counted)

    @staticmethod
    @backward_of(jensen_bound, 4)
    def backward(  # type: ignore[override]
        ctx: Any, dbound: Tensor
    ) -> tuple[Tensor | None, ...]:
        mean, variance, labels, counted = ctx.saved_tensors
        weight = dbound.masked_fill(~counted, 0.0)[:, None]
        dmean = (mean + variance / 2).softmax(1).mul_(-weight)
        dvariance = dmean / 2
        dmean.scatter_add_(1, labels[:, None], weight)
        return dmean, dvariance, None, None


def _define_monte_carlo(
    mean: Tensor,
    variance: Tensor,
    labels: Tensor,
    counted: Tensor,
    key: Tensor,
    n_samples: int,
    antithetic: bool,
) -> Tensor:
    """Definition of `_MonteCarloBound`, for torch.func: keeps every sample."""
    values = []
    for sample in range(n_samples // 2 if antithetic else n_samples):
        noise = reference.normal(reference.fold_in(key, sample), tuple(mean.shape)).to(mean.dtype)
        for eps in (noise, -noise) if antithetic else (noise,):
            logs = torch.addcmul(mean, variance.sqrt(), eps).log_softmax(1)
            values.append(logs.gather(1, labels[:, None]).squeeze(1))
    return torch.stack(values).mean(0).masked_fill(~counted, 0.0)


class _MonteCarloBound(torch.autograd.Function):
    """Mean over samples z = mean + sqrt(v) eps of log softmax(z)_y.

    The value of a row is a scalar, so the forward pass adds up its gradients too: the backward pass
    needs two (B, C) tensors for any number of samples.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        mean: Tensor,
        variance: Tensor,
        labels: Tensor,
        counted: Tensor,
        key: Tensor,
        n_samples: int,
        antithetic: bool,
    ) -> Tensor:
        std = variance.sqrt()
        value = mean.new_zeros((mean.shape[0],))
        dmean, dstd = torch.zeros_like(mean), torch.zeros_like(mean)
        one = F.one_hot(labels, mean.shape[1]).to(mean.dtype)
        for sample in range(n_samples // 2 if antithetic else n_samples):
            noise = random.normal(random.fold_in(key, sample), tuple(mean.shape)).to(mean.dtype)
            for eps in (noise, -noise) if antithetic else (noise,):
                logs = torch.addcmul(mean, std, eps).log_softmax(1)
                value += logs.gather(1, labels[:, None]).squeeze(1)
                slope = one - logs.exp()
                dmean += slope
                dstd += slope * eps
        ctx.save_for_backward(dmean / n_samples, dstd / (2 * n_samples * std), counted)
        return (value / n_samples).masked_fill(~counted, 0.0)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dbound: Tensor
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what is kept has no derivatives
            raise RuntimeError(
                "VBLL: second derivatives need bound='jensen', got bound='mc'; use 'jensen', or "
                "torch.func, which keeps every sample"
            )
        dmean, dvariance, counted = ctx.saved_tensors
        weight = dbound.masked_fill(~counted, 0.0)[:, None]
        return dmean * weight, dvariance * weight, None, None, None, None, None


def bound_of(
    bound: str,
    mean: Tensor,
    variance: Tensor,
    labels: Tensor,
    counted: Tensor,
    n_samples: int,
    antithetic: bool,
    key: Tensor | None,
) -> Tensor:
    """The bound named `bound` for each row (B,), 0 where it does not count."""
    if bound == "jensen":
        jensen = jensen_bound if transformed() else _JensenBound.apply
        return jensen(mean, variance, labels, counted)
    assert key is not None  # check_bound
    sampled = _define_monte_carlo if transformed() else _MonteCarloBound.apply
    return sampled(mean, variance, labels, counted, key, n_samples, antithetic)


def check_bound(op: str, bound: str, n_samples: int, antithetic: bool, key: Tensor | None) -> None:
    """Raise unless the options of a bound fit together."""
    if bound not in BOUNDS:
        raise ValueError(f"{op}: bound must be one of {BOUNDS}, got {bound!r}; choose one")
    if bound == "mc":
        if key is None:
            raise ValueError(f"{op}: key is needed with bound='mc'; make it with random.key")
        check_key(op, key)
        if n_samples < 1 or (antithetic and n_samples % 2):
            raise ValueError(
                f"{op}: n_samples must be at least 1, and even with antithetic=True, got "
                f"{n_samples}"
            )


def counted_labels(
    op: str, labels: Tensor, classes: int, ignore_index: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Labels with 0 in place of those that do not count, and which rows count.

    Args:
        op: name for errors.
        labels: int64 (B,).
        classes: C.
        ignore_index: label of rows that do not count.
        mask: bool (B,), False where a row does not count either.

    Raises:
        ValueError: a label that counts is not in [0, C).
    """
    counted = labels != ignore_index
    if mask is not None:
        counted = counted & mask
    found = labels.masked_fill(~counted, 0)
    # On a GPU this would synchronise; there the gather itself refuses a label out of range.
    if found.device.type == "cpu" and not torch.compiler.is_compiling() and found.numel():
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"{op}: labels must be in [0, {classes}) or {ignore_index}, got "
                f"{low if low < 0 else high}"
            )
    return found, counted
