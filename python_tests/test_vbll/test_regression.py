"""Regression heads: gradients, marginals and likelihoods in closed form."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from test_vbll.heads import COVARIANCES, B, Call, batch, plain_moments, prefixed, regression


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_regression_gradcheck(covariance):
    layer = regression(covariance)
    features, _ = batch(4)
    features.requires_grad_()
    targets = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        state = prefixed(dict(zip(names, values, strict=True)))
        return torch.func.functional_call(Call(layer, "loss"), state, (x, targets, 11))

    assert torch.autograd.gradcheck(run, (features, *parameters))


def test_regression_predicts_the_marginal():
    layer = regression("low_rank")
    features = batch()[0]
    mean, variance = plain_moments(layer, features)
    predictive = layer.predict(features)
    torch.testing.assert_close(predictive.mean, mean.detach())
    torch.testing.assert_close(predictive.variance, variance.detach())


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_regression_expected_log_likelihood(covariance):
    layer = regression(covariance)
    features = batch()[0]
    generator = torch.Generator().manual_seed(2)
    targets = torch.randn(B, 2, generator=generator).double()
    mean, variance = (t.detach() for t in plain_moments(layer, features))
    noise = (2 * layer.noise_log_scale.detach()).exp()
    # The integrand is quadratic in the output: five Hermite nodes are exact.
    import numpy as np

    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(5))
    z = mean + (variance - noise).sqrt() * nodes[:, None, None]
    logs = Normal(z, noise.sqrt()).log_prob(targets).sum(2)
    expected = (logs * (weights / weights.sum())[:, None]).sum(0)
    ours = layer.expected_log_likelihood(features, targets)
    torch.testing.assert_close(ours.detach(), expected)
    total = layer.loss(features, targets, 30, 0.5)
    parts = -ours.mean() + 0.5 / 30 * (layer.kl() - layer.wishart())
    torch.testing.assert_close(total, parts)
    mask = torch.arange(B) != 3
    torch.testing.assert_close(
        layer.loss(features, targets, 30, mask=mask), layer.loss(features[mask], targets[mask], 30)
    )
