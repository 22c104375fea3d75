"""Gaussians of logits, and their predictions by the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kernels import reference


def problem(
    rows: int, classes: int, *, scale: float = 1.0, full: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """fp64 means and covariances; scale is a typical variance."""
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    if not full:
        var = torch.rand(rows, classes, generator=generator, dtype=torch.float64)
        return mean, scale * var
    a = torch.randn(rows, classes, classes, generator=generator, dtype=torch.float64)
    return mean, scale * (a @ a.mT) / classes


def definition(mean: Tensor, cov: Tensor, key: Tensor, samples: int, **where) -> tuple[Tensor, ...]:
    """reference.mc_predict in fp64, on the noise of the key; cov is used as the op sees it."""
    eps = reference.logit_noise(key.cpu(), *mean.shape[:1], samples, mean.shape[1], **where)
    antithetic = where.get("antithetic", False)
    return reference.mc_predict(
        mean.cpu().double(), cov.cpu().double(), eps.double(), antithetic=antithetic
    )
