"""The covariance of the logits against explicit Jacobians, and its memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bayes_kernels.laplace import Laplace, contraction, factors
from test_laplace.networks import D, adapters, jacobians, kronecker, low_rank_posterior, sequences


def test_evidence_and_covariance_against_dense_matrices():
    """Low-rank sides: log-determinant and covariance of the dense precision, to 1e-10."""
    model, x, y, la = low_rank_posterior()
    la.prior_precision = torch.tensor([0.3, 1.7, 40.0, 0.02])
    evidence = torch.tensor(la.log_likelihood, dtype=D)
    cov = torch.zeros(len(x), 4, 4, dtype=D)
    model.eval()
    for h, delta, layer, j in zip(
        kronecker(la), la.prior_precision, la.layers, jacobians(model, la.layers, x), strict=True
    ):
        precision = h + delta * torch.eye(len(h), dtype=D)
        evidence = evidence - 0.5 * (
            torch.logdet(precision) - len(h) * delta.log() + delta * layer.weight.square().sum()
        )
        cov = cov + j @ torch.linalg.inv(precision) @ j.mT
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence.detach(), rtol=1e-10, atol=0)
    ours = la.logits((x,))
    torch.testing.assert_close(ours[0], model(x).detach())
    torch.testing.assert_close(ours[1], cov.detach(), rtol=1e-10, atol=1e-10 * float(cov.max()))
    expected = nn.functional.cross_entropy(model(x), y, reduction="sum")
    assert la.log_likelihood == pytest.approx(-float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_covariance_for_few_and_many_tokens(tokens: int):
    """Both ways to contract: with and without forming the layer's gradient."""
    model, x, y = sequences(n=16, examples=4, tokens=tokens)
    la = Laplace(model, adapters(model), rank=3, dense_below=8, prior_precision=0.5).fit([(x, y)])
    model.eval()
    expected = sum(
        j @ torch.linalg.inv(h + 0.5 * torch.eye(len(h), dtype=D)) @ j.mT
        for h, j in zip(kronecker(la), jacobians(model, la.layers, x), strict=True)
    )
    for jacobian in ("vmap", "repeat"):
        la.jacobian = jacobian
        torch.testing.assert_close(la.logits((x,))[1], expected, rtol=1e-9, atol=1e-12)


def test_repeated_batches_leave_what_examples_share():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x, cache_position):
            return self.head((x * cache_position.to(x)[:, None]).sum(1))

    torch.manual_seed(0)
    model = Positions().to(D)
    # As many positions as examples.
    batch = {"x": torch.randn(4, 4, 6, dtype=D), "cache_position": torch.arange(4)}
    loader = [{**batch, "labels": torch.tensor([0, 1, 2, 0])}]
    one, other = (
        Laplace(model, jacobian=jacobian).fit(loader, verbose=False).logits(batch)
        for jacobian in ("vmap", "repeat")
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("tokens", [1, 12])
def test_large_curvature_does_not_cancel(tokens: int, whole: bool):
    """mu nu / delta of 1e12 and a gradient inside the eigenvectors' span, in fp32.

    sigma^2 (<G, G> - sum w P P), the same in exact arithmetic, leaves nothing but noise.
    """
    torch.manual_seed(0)
    u, q = (torch.linalg.qr(torch.randn(8, 8, dtype=D))[0][:, : 8 if whole else 4] for _ in "uq")
    values = torch.linspace(1e3, 3e3, u.shape[1], dtype=D)
    a = torch.randn(2, tokens, u.shape[1], dtype=D) @ u.T
    g = torch.randn(2, 3, tokens, u.shape[1], dtype=D) @ q.T
    delta = 1e-6

    def cov(dtype):
        block = factors.Block(u.to(dtype), values, q.to(dtype), values)
        inner, rest = contraction.project(a.to(dtype), g.to(dtype), block)
        scaled = inner * (block.products + delta).rsqrt().flatten().to(dtype)
        total = scaled @ scaled.mT
        return total if rest is None else total + rest / delta

    gradient = (g.mT @ a[:, None]).flatten(2)
    p = (q.T @ (g.mT @ a[:, None]) @ u).flatten(2)
    w = (values[:, None] * values / (values[:, None] * values + delta)).flatten()
    truth = (p / (values[:, None] * values + delta).flatten()) @ p.mT
    naive = (gradient.float() @ gradient.float().mT - (p * w).float() @ p.float().mT) / delta
    assert float((naive.double() - truth).norm() / truth.norm()) > 1e3
    torch.testing.assert_close(cov(D), truth, rtol=1e-6, atol=1e-9 * float(truth.max()))
    error = (cov(torch.float32).double() - truth).norm() / truth.norm()
    assert float(error) < (1e-5 if whole else 0.1)
