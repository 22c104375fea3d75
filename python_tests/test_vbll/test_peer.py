"""Our heads against those of the `vbll` package, where it is installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from bayes_kernels.vbll import VBLLClassification, VBLLRegression, unpack_tril
from test_vbll.heads import COVARIANCES, B, C, D, batch

PACKAGE_NAMES = {"dense": "dense", "diagonal": "diagonal", "low_rank": "lowrank"}


def package_pair(covariance: str, regress: int = 0):
    """A layer of the vbll package and ours with its parameters."""
    package = pytest.importorskip("vbll")
    torch.manual_seed(0)
    options = {"parameterization": PACKAGE_NAMES[covariance], "cov_rank": 3}
    if regress:
        peer = package.Regression(D, regress, 0.02, **options)
    else:
        peer = package.DiscClassification(D, C, 0.02, **options)
    peer = peer.double()
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    kind = VBLLRegression if regress else VBLLClassification
    ours = kind(D, regress or C, covariance=covariance, rank=3, dtype=torch.float64)
    ours.load_vbll(peer.state_dict())
    assert ours.prior_variance == pytest.approx(peer.prior_scale)
    return peer, ours


def compare_gradients(peer, ours, theirs: Tensor, value: Tensor, features: Tensor) -> None:
    """Gradients of both losses, taken to the package's parameters."""
    names = [n for n, p in peer.named_parameters() if p.requires_grad]
    expected = dict(
        zip(
            ["features", *names],
            torch.autograd.grad(theirs, [features, *(peer.get_parameter(n) for n in names)]),
            strict=True,
        )
    )
    own_names, own = zip(*ours.named_parameters(), strict=True)
    got = dict(
        zip(
            ["features", *own_names],
            torch.autograd.grad(value, [features, *own]),
            strict=True,
        )
    )
    torch.testing.assert_close(got["features"], expected["features"])
    torch.testing.assert_close(got["weight_mean"], expected["W_mean"])
    torch.testing.assert_close(got["noise_log_scale"], expected["noise_logdiag"])
    if ours.covariance == "dense":
        square = unpack_tril(got["scale_tril"])
        torch.testing.assert_close(square.diagonal(0, 1, 2), expected["W_logdiag"])
        torch.testing.assert_close(square.tril(-1), expected["W_offdiag"])
    else:
        factor = 2 if ours.covariance == "low_rank" else 1
        torch.testing.assert_close(got["log_scale"], factor * expected["W_logdiag"])
    if ours.covariance == "low_rank":
        torch.testing.assert_close(got["factor"].transpose(1, 2), expected["W_offdiag"])


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_equals_the_package(covariance):
    peer, ours = package_pair(covariance)
    features, labels = batch()
    features.requires_grad_()
    predictive = peer.logit_predictive(features)
    mean, variance = ours.logit_distribution(features)
    torch.testing.assert_close(mean, predictive.mean)
    torch.testing.assert_close(variance, predictive.variance)
    torch.testing.assert_close(ours.bound(features, labels), peer.jensen_bound(features, labels))
    theirs = peer(features).train_loss_fn(labels)
    value = ours.loss(features, labels, 50)  # 1 / 50 = 0.02
    # The package leaves the KL's constant out.
    torch.testing.assert_close(value + 0.02 * C * D / 2, theirs)
    compare_gradients(peer, ours, theirs, value, features)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_regression_equals_the_package(covariance):
    peer, ours = package_pair(covariance, regress=1)
    features, _ = batch()
    features.requires_grad_()
    targets = torch.randn(B, 1, generator=torch.Generator().manual_seed(6)).double()
    theirs = peer(features).train_loss_fn(targets)
    value = ours.loss(features, targets, 50)
    torch.testing.assert_close(value + 0.02 * D / 2, theirs)
    compare_gradients(peer, ours, theirs, value, features)
    predictive, own = peer(features).predictive, ours.predict(features)
    torch.testing.assert_close(own.mean, predictive.mean.detach())
    torch.testing.assert_close(own.variance, predictive.variance.detach())


def test_regression_with_several_outputs_differs_from_the_package_as_documented():
    peer, ours = package_pair("diagonal", regress=3)
    features, _ = batch()
    targets = torch.randn(B, 3, generator=torch.Generator().manual_seed(6)).double()
    theirs = peer(features).train_loss_fn(targets)
    mean, variance = ours.output_distribution(features)
    noise = (2 * ours.noise_log_scale).exp()
    logs = Normal(mean, noise.sqrt()).log_prob(targets)
    quadratic = (variance - noise) / 2
    same = (ours.kl() + 3 * D / 2 - ours.wishart()) * 0.02
    torch.testing.assert_close(same - (logs - quadratic * (1 / noise).sum()).mean(), theirs)
    correct = same - 0.02 * 3 * D / 2 - (logs - quadratic / noise).sum(1).mean()
    torch.testing.assert_close(ours.loss(features, targets, 50), correct)
