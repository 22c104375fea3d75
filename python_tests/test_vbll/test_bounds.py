"""Bounds of the expected log-likelihood: their gap, their noise, rows that do not count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayes_kernels import random
from bayes_kernels.vbll import VBLLClassification, jensen_bound
from bayes_kernels.vbll.bounds import counted_labels
from test_vbll.heads import COVARIANCES, B, C, D, batch, head, plain_moments


def expected_log_likelihood(mean: Tensor, variance: Tensor, label: int) -> Tensor:
    """By a product of Gauss-Hermite rules over all classes."""
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    classes = len(mean)
    grid = torch.cartesian_prod(*[torch.from_numpy(nodes)] * classes)
    mass = torch.cartesian_prod(*[torch.from_numpy(weights / weights.sum())] * classes).prod(1)
    z = mean + grid * variance.sqrt()
    return (mass * z.log_softmax(1)[:, label]).sum()


GAPS = [(0.01, 0.0036), (0.1, 0.0348), (1.0, 0.3388), (4.0, 1.3650)]


@pytest.mark.parametrize(("variance", "gap"), GAPS)
def test_gap_of_the_bound(variance, gap):
    """Golden values: 400,000 samples of a program that shares nothing with this one."""
    mean = torch.tensor([2.20042937, 0.40623864, -0.83005811, -4.32319741], dtype=torch.float64)
    layer = VBLLClassification(1, 4, covariance="diagonal", noise=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_mean.copy_(mean[:, None])
        layer.log_scale.fill_(math.log(variance) / 2)
    bound = layer.bound(torch.ones(1, 1).double(), torch.tensor([0]))
    exact = expected_log_likelihood(mean, torch.full((4,), variance).double(), 0)
    assert (exact - bound).item() == pytest.approx(gap, abs=0.001 + 0.0015 * variance)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_bound_is_below_the_expectation(covariance):
    layer = head(covariance, d=3, classes=3)
    features, labels = batch(6, 3, 3)
    mean, variance = layer.logit_distribution(features)
    exact = torch.stack(
        [
            expected_log_likelihood(m, v, int(y))
            for m, v, y in zip(mean, variance, labels, strict=True)
        ]
    )
    bound = layer.bound(features, labels)
    assert (bound < exact).all()
    for antithetic in (False, True):
        options = {"bound": "mc", "n_samples": 4000, "key": random.key(0), "antithetic": antithetic}
        estimate = layer.bound(features, labels, **options)
        torch.testing.assert_close(estimate, exact, atol=0.1, rtol=0)
        assert (estimate > bound).all()


def test_bound_is_exact_for_vanishing_variance():
    layer = head("diagonal", noise=False)
    features, labels = batch()
    exact = layer(features).log_softmax(1)[torch.arange(B), labels]
    gaps = []
    for log_std in (-3.0, -5.0, -7.0):
        with torch.no_grad():
            layer.log_scale.fill_(log_std)
        gaps.append((exact - layer.bound(features, labels)).abs().max().item())
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2]  # proportional to the variance
    assert gaps[2] < 1e-4


def test_monte_carlo_bound_is_the_mean_over_the_dumped_noise():
    layer, key = head(), random.key(11)
    features, labels = batch()
    mean, variance = plain_moments(layer, features)
    rows = torch.arange(B)

    def estimate(count: int, antithetic: bool):
        values = []
        for s in range(count):
            eps = random.normal(random.fold_in(key, s), (B, C)).double()
            for sign in (1, -1) if antithetic else (1,):
                z = mean + variance.sqrt() * eps * sign
                values.append(z.log_softmax(1)[rows, labels])
        return torch.stack(values).mean(0)

    ours = layer.bound(features, labels, bound="mc", n_samples=6, antithetic=False, key=key)
    torch.testing.assert_close(ours, estimate(6, False))
    ours = layer.bound(features, labels, bound="mc", n_samples=6, key=key)
    expected = estimate(3, True)
    torch.testing.assert_close(ours, expected)
    parameters = list(layer.parameters())
    for a, b in zip(
        torch.autograd.grad(ours.sum(), parameters),
        torch.autograd.grad(expected.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    # A row's noise does not depend on how many rows follow.
    part = layer.bound(features[:4], labels[:4], bound="mc", n_samples=6, key=key)
    torch.testing.assert_close(part, ours[:4])


def test_rows_that_do_not_count():
    layer = head(bias=True)
    features, labels = batch()
    ignored = labels.clone()
    ignored[[0, 5]] = -100
    mask = torch.ones(B, dtype=torch.bool)
    mask[[0, 5]] = False
    kept = mask.nonzero().squeeze(1)
    expected = layer.loss(features[kept], labels[kept], 50)
    parameters = list(layer.parameters())
    reference = torch.autograd.grad(expected, parameters)
    for options in ({"labels": ignored}, {"labels": labels, "mask": mask}):
        value = layer.loss(features, options.pop("labels"), 50, **options)
        torch.testing.assert_close(value, expected)
        for a, b in zip(torch.autograd.grad(value, parameters), reference, strict=True):
            torch.testing.assert_close(a, b)
    assert (layer.bound(features, ignored)[[0, 5]] == 0).all()
    nothing = layer.loss(features, torch.full((B,), -100), 50)
    torch.testing.assert_close(nothing, (layer.kl() - layer.wishart()) / 50)
    empty = layer.loss(features[:0], labels[:0], 50)
    torch.testing.assert_close(empty, nothing)
    shaped = layer.bound(features.reshape(3, 3, D), labels.reshape(3, 3))
    torch.testing.assert_close(shaped, layer.bound(features, labels).reshape(3, 3))
    assert layer(features.reshape(3, 3, D)).shape == (3, 3, C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jensen_bound_is_that_of_a_head(dtype):
    """The same numbers, whose gradients are PyTorch's own."""
    layer = head(dtype=dtype)
    features, labels = batch(dtype=dtype)
    labels[2] = -100
    moments = layer.logit_distribution(features)
    counted = labels != -100
    plain = jensen_bound(*moments, labels.clamp_min(0), counted)
    ours = layer.bound(features, labels)
    assert torch.equal(plain, ours)
    parameters = list(layer.parameters())
    for a, b in zip(
        torch.autograd.grad(plain.sum(), parameters),
        torch.autograd.grad(ours.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("label", [-1, C, C + 1])
def test_labels_out_of_range_are_named_where_they_count(label):
    labels, mask = torch.tensor([0, label, C - 1, -100]), torch.tensor([True, False, True, True])
    with pytest.raises(
        ValueError, match=rf"^op: labels must be in \[0, {C}\) or -100, got {label}$"
    ):
        counted_labels("op", labels, C, -100)
    found, counted = counted_labels("op", labels, C, -100, mask)
    assert found.tolist() == [0, 0, C - 1, 0] and counted.tolist() == [True, False, True, False]
