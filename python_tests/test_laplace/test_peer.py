"""Equality with laplace-torch, where it is installed."""

from __future__ import annotations

import pytest
import torch

from bayes_kernels.laplace import Laplace
from test_laplace.networks import D, kronecker, mlp


def test_equals_laplace_torch():
    """Kron Laplace of laplace-torch with curvlinops' exact type-2 Fisher, in fp64.

    Both sum the same rows in fp64 and differ in the order only: 1e-9 leaves room for the condition
    of the eigendecompositions. Several batches: its factors are summed over them as ours are.
    """
    peer = pytest.importorskip("laplace")
    curvature = pytest.importorskip("laplace.curvature.curvlinops")
    model, x, y = mlp()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    theirs = peer.KronLaplace(
        model, "classification", prior_precision=0.7, backend=curvature.CurvlinopsGGN
    )
    theirs.fit(loader)
    ours = Laplace(model, rank=None, prior_precision=0.7).fit(loader)
    expected = theirs.posterior_precision.to_matrix()
    start = 0
    for block in kronecker(ours):
        stop = start + len(block)
        precision = block + 0.7 * torch.eye(len(block), dtype=D)
        peers = expected[start:stop, start:stop]
        torch.testing.assert_close(precision, peers, rtol=1e-9, atol=1e-9)
        start = stop
    assert start == len(expected)
    torch.testing.assert_close(
        ours.log_marginal_likelihood(),
        theirs.log_marginal_likelihood().detach().squeeze(),
        rtol=1e-9,
        atol=0,
    )
    mean, cov = theirs._glm_predictive_distribution(x)
    our_mean, our_cov = ours.logits((x,))
    torch.testing.assert_close(our_mean, mean.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(our_cov, cov.detach(), rtol=1e-8, atol=1e-10)
