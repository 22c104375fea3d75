"""Divergence of diagonal Gaussians from a Gaussian prior, for lists of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from .._library import fake
from .arguments import (
    as_list,
    check_choice,
    check_number,
    check_tensors,
    second_order,
    transformed,
)
from .noise import STDS


def gaussian_kl(
    means: Tensor | Sequence[Tensor],
    rhos: Tensor | Sequence[Tensor],
    prior_std: float | Sequence[float],
    *,
    std: str = "square",
    direction: str = "elbo",
) -> Tensor:
    """Closed-form divergence of diagonal Gaussians from N(0, prior_std^2), summed over a list.

        elbo: sum log(p / s) + (s^2 + mean^2) / (2 p^2) - 1/2   = KL(q || prior)
        code: sum log(s / p) + (p^2 + mean^2) / (2 s^2) - 1/2   = KL(prior || q)

    with s = std(rho) and p the prior's standard deviation. One launch for the whole list, partial sums
    in fp64 in a fixed order, gradients in closed form.

    Args:
        means: tensors of any shape, fp32 (or all fp64).
        rhos: tensors of the same shapes, or (r, 1) beside means (r, n).
        prior_std: one positive number, or one for each tensor.
        std: "square" (rho^2), "softplus" or "direct".
        direction: "elbo", or "code" for the reverse divergence of ScalaBL's published code.

    Returns:
        0-dim tensor in the dtype of the means.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes or options do not fit.

    Sources: Wang et al., "BLoB", arXiv 2406.11675, section 3; "ScalaBL", arXiv 2506.21408.
    """
    op = "gaussian_kl"
    mean_list, rho_list, priors = check_divergence(op, means, rhos, prior_std, std, direction)
    tensors = [t.contiguous() for t in (*mean_list, *rho_list)]
    if transformed() or not _library.has_kernels(tensors[0]):
        return _definition(priors, std, direction, tensors)
    return _GaussianKL.apply(priors, std, direction, *tensors)


def _definition(priors: list[float], std: str, direction: str, tensors: Sequence[Tensor]) -> Tensor:
    """The divergence of means, then rhos, in PyTorch's own operations, summed in fp64."""
    prior_std = priors[0] if len(priors) == 1 else priors
    means, rhos = _halves([reference.wide(t) for t in tensors])
    found = reference.gaussian_kl(means, rhos, prior_std, std=std, direction=direction)
    return found.to(tensors[0])


def check_divergence(
    op: str,
    means: Tensor | Sequence[Tensor],
    rhos: Tensor | Sequence[Tensor],
    prior_std: float | Sequence[float],
    std: str,
    direction: str,
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Argument checks shared by the divergence ops; returns lists."""
    mean_list: list[Tensor] = as_list(op, "means", means)
    rho_list: list[Tensor] = as_list(op, "rhos", rhos)
    if not mean_list or len(mean_list) != len(rho_list):
        raise ValueError(
            f"{op}: means and rhos must be lists of the same length, at least 1, got "
            f"{len(mean_list)} and {len(rho_list)}"
        )
    priors = prior_stds(op, prior_std)
    if len(priors) not in (1, len(mean_list)):
        raise ValueError(
            f"{op}: prior_std must be one number or one for each of the {len(mean_list)} tensors, got "
            f"{len(priors)}"
        )
    check_choice(op, "std", std, STDS)
    if direction not in ("elbo", "code"):
        raise ValueError(f"{op}: direction must be 'elbo' or 'code', got {direction!r}; choose one")
    first = mean_list[0]
    check_tensors(op, "means", mean_list)
    check_tensors(op, "rhos", rho_list)
    for i, (mean, rho) in enumerate(zip(mean_list, rho_list, strict=True)):
        if mean.dtype not in (torch.float32, torch.float64) or mean.dtype != first.dtype:
            raise TypeError(
                f"{op}: means must be float32 or all float64, got {mean.dtype} for tensor {i}; convert it"
            )
        if rho.dtype != mean.dtype or rho.device != mean.device or mean.device != first.device:
            raise TypeError(
                f"{op}: tensor {i}: rho must have the dtype and device of the means "
                f"({first.dtype}, {first.device}), got {rho.dtype}, {rho.device}"
            )
        shared = mean.dim() == 2 and tuple(rho.shape) == (mean.shape[0], 1)
        if shared and mean.shape[1] == 0:
            raise ValueError(
                f"{op}: tensor {i}: means must have columns beside a rho of shape (r, 1), got "
                f"{tuple(mean.shape)}; leave the tensor out"
            )
        if rho.shape != mean.shape and not shared:
            raise ValueError(
                f"{op}: tensor {i}: rho must have shape {tuple(mean.shape)}"
                + (f" or ({mean.shape[0]}, 1)" if mean.dim() == 2 else "")
                + f", got {tuple(rho.shape)}"
            )
    return mean_list, rho_list, priors


def prior_stds(op: str, prior_std: float | Sequence[float]) -> list[float]:
    """prior_std as a list of one or more positive numbers.

    Raises:
        TypeError, ValueError: not numbers, or not positive.
    """
    priors: list[Any]
    if isinstance(prior_std, (int, float)) or (
        isinstance(prior_std, Tensor) and prior_std.dim() == 0
    ):
        priors = [prior_std]
    else:
        priors = as_list(op, "prior_std", prior_std)
    for p in priors:
        if not isinstance(p, Tensor):
            check_number(op, "prior_std", p)
        if not 0 < p < math.inf:
            raise ValueError(f"{op}: prior_std must be positive and finite, got {float(p)}")
    return [float(p) for p in priors]


class _GaussianKL(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, priors: list[float], std: str, direction: str, *tensors: Tensor
    ) -> Tensor:
        means, rhos = _halves(tensors)
        ctx.save_for_backward(*tensors)
        ctx.options = (priors, std, direction)
        return _library.ops.gaussian_kl(means, rhos, priors, std, direction).to(means[0].dtype)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed():
            priors, std, direction = ctx.options
            found = second_order(lambda *t: _definition(priors, std, direction, t), tensors, weight)
            return (None, None, None, *found)
        means, rhos = _halves(tensors)
        dmeans, drhos = _library.ops.gaussian_kl_backward(weight, means, rhos, *ctx.options)
        return (None, None, None, *dmeans, *drhos)


def _halves(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    count = len(tensors) // 2
    return list(tensors[:count]), list(tensors[count:])


# --- fake kernels: shapes and dtypes of the ops' results ---------------------------------------------


@fake("gaussian_kl")
def _(
    means: Sequence[Tensor],
    rhos: Sequence[Tensor],
    prior_std: Sequence[float],
    std: str,
    direction: str,
) -> Tensor:
    return means[0].new_empty((), dtype=torch.float64)


@fake("gaussian_kl_backward")
def _(
    weight: Tensor,
    means: Sequence[Tensor],
    rhos: Sequence[Tensor],
    prior_std: Sequence[float],
    std: str,
    direction: str,
) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(m) for m in means], [torch.empty_like(r) for r in rhos]


@fake("gaussian_kl_step_")
def _(
    means: Sequence[Tensor],
    rhos: Sequence[Tensor],
    weight: Tensor,
    prior_std: Sequence[float],
    std: str,
    direction: str,
) -> None:
    return None
