"""Heads with random parameters, data for them, and their moments from whole covariance matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from bayes_kernels.vbll import VBLLClassification, VBLLRegression, unpack_tril

COVARIANCES = ("dense", "diagonal", "low_rank")
D, C, B = 6, 4, 9


def head(covariance: str = "dense", d: int = D, classes: int = C, **options) -> VBLLClassification:
    options = {"dtype": torch.float64, "init": "prior", **options}
    generator = torch.Generator().manual_seed(3)
    layer = VBLLClassification(d, classes, covariance=covariance, generator=generator, **options)
    with torch.no_grad():
        for parameter in layer.parameters():  # nothing special about any entry
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
    return layer


def regression(covariance: str = "dense", outputs: int = 2, **options) -> VBLLRegression:
    options = {"dtype": torch.float64, **options}
    generator = torch.Generator().manual_seed(4)
    layer = VBLLRegression(D, outputs, covariance=covariance, generator=generator, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
    return layer


def batch(rows: int = B, d: int = D, classes: int = C, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(rows, d, generator=generator, dtype=torch.float64).to(dtype)
    return features, torch.randint(0, classes, (rows,), generator=generator)


def jensen(mean: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
    return mean[torch.arange(len(labels)), labels] - (mean + variance / 2).logsumexp(1)


def plain_moments(layer, features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance by materialised covariances, differentiable in every parameter."""
    if layer.scale_tril is not None:
        t = unpack_tril(layer.scale_tril)
        eye = torch.eye(t.shape[-1], dtype=t.dtype)
        t = t * (1 - eye) + torch.diag_embed(t.diagonal(dim1=1, dim2=2).exp())
        covariance = t @ t.transpose(1, 2)
    else:
        covariance = torch.diag_embed((2 * layer.log_scale).exp())
        if layer.factor is not None:
            covariance = covariance + layer.factor.transpose(1, 2) @ layer.factor
    variance = torch.einsum("bi,cij,bj->bc", features, covariance, features)
    if layer.noise_log_scale is not None:
        variance = variance + (2 * layer.noise_log_scale).exp()
    mean = features @ layer.weight_mean.T
    return mean if layer.bias is None else mean + layer.bias, variance


def plain_kl(layer) -> Tensor:
    """By torch.distributions, class by class."""
    d = layer.in_features
    prior = MultivariateNormal(
        torch.zeros(d).double(), layer.prior_variance * torch.eye(d).double()
    )
    matrices = layer.covariance_matrix().double()
    return sum(
        kl_divergence(MultivariateNormal(m, s), prior)
        for m, s in zip(layer.weight_mean.detach().double(), matrices, strict=True)
    )


class Call(nn.Module):
    def __init__(self, layer, op):
        super().__init__()
        self.layer, self.op = layer, op

    def forward(self, *args, **kwargs):
        return getattr(self.layer, self.op)(*args, **kwargs)


def prefixed(state):
    return {f"layer.{name}": value for name, value in state.items()}
