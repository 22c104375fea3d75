"""What heads share: divergences, moments, precision, compiling, state, first values, errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from bayes_kernels import random, vbll
from bayes_kernels.vbll import VBLLClassification, VBLLRegression, pack_tril, unpack_tril
from test_vbll.heads import (
    COVARIANCES,
    B,
    C,
    D,
    batch,
    head,
    jensen,
    plain_kl,
    plain_moments,
    regression,
)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_kl_is_that_of_torch_distributions(covariance):
    for layer in (head(covariance, prior_variance=0.3), regression(covariance)):
        torch.testing.assert_close(layer.kl().detach(), plain_kl(layer))


@pytest.mark.parametrize("covariance", ["dense", "diagonal"])
def test_kl_vanishes_at_the_prior(covariance):
    layer = VBLLClassification(D, C, covariance=covariance, init="prior", prior_variance=0.5)
    with torch.no_grad():
        layer.weight_mean.zero_()
        if layer.scale_tril is not None:
            off = layer.scale_tril.clone()
            layer.scale_tril.copy_(pack_tril(torch.diag_embed(unpack_tril(off).diagonal(0, 1, 2))))
    assert abs(layer.kl().item()) < 1e-5


def test_wishart_is_the_log_density_up_to_a_constant():
    scale, dof = 0.7, 2.0
    layer = head(wishart_scale=scale, wishart_dof=dof)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.noise_log_scale.add_(0.3)

    # Density of precision P with (df - C - 1) / 2 = dof' and scale matrix (1 / scale) I.
    density = torch.distributions.Wishart(
        df=torch.tensor(2 * (dof + C + 1) / 2 + C + 1.0).double(),
        covariance_matrix=torch.eye(C).double() / scale,
    )

    def log_density(one):
        return density.log_prob(torch.diag_embed((-2 * one.noise_log_scale).exp()))

    expected = log_density(other) - log_density(layer)
    torch.testing.assert_close(other.wishart() - layer.wishart(), expected)
    assert head(noise=False).wishart() == 0


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_logit_distribution_and_bound(covariance, noise, bias):
    layer = head(covariance, noise=noise, bias=bias)
    features, labels = batch()
    mean, variance = plain_moments(layer, features)
    ours = layer.logit_distribution(features)
    torch.testing.assert_close(ours[0], mean)
    torch.testing.assert_close(ours[1], variance)
    torch.testing.assert_close(layer(features), mean)
    torch.testing.assert_close(layer.bound(features, labels), jensen(mean, variance, labels))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_variance_is_clipped(covariance):
    layer = head(covariance, noise=False, dtype=torch.float32)
    mean, variance = layer.logit_distribution(torch.zeros(2, D))
    assert (mean == 0).all() and (variance == torch.tensor(1e-12)).all()
    grad = torch.autograd.grad(variance.sum(), list(layer.parameters()), allow_unused=True)
    assert all(g is None or (g == 0).all() for g in grad)


def test_extreme_logits_stay_finite():
    layer = head("diagonal", dtype=torch.float32)
    features, labels = batch(dtype=torch.float32)
    features = (features * 1e5).requires_grad_()
    loss = layer.loss(features, labels, 10)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(features.grad).all()


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(covariance, dtype):
    layer = head(covariance, dtype=torch.float32)
    features, labels = batch(dtype=dtype)
    wide = features.float().requires_grad_()
    features.requires_grad_()
    expected = layer.loss(wide, labels, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = layer.loss(features, labels, 10)
        assert layer(features).dtype == torch.float32
    ours.backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    expected.backward()
    assert ours.dtype == torch.float32 and torch.equal(ours, expected)
    assert features.grad.dtype == dtype
    torch.testing.assert_close(features.grad, wide.grad.to(dtype))
    for a, p in zip(grads, layer.parameters(), strict=True):
        assert torch.equal(a, p.grad)
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # backward within it is no mistake to fail on
        layer.loss(features, labels, 10).backward()
    for a, p in zip(grads, layer.parameters(), strict=True):
        torch.testing.assert_close(p.grad, a, rtol=0.05, atol=0.02)


def test_parameters_stay_in_fp32():
    layer = head("low_rank", dtype=torch.float32)
    layer.laplace_refine(batch(3, dtype=torch.float32)[0])
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for change in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)):
        change(nn.Sequential(layer))
        for name, value in layer.state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, before[name])
    assert layer.double().weight_mean.dtype == torch.float64
    assert layer.float().weight_mean.dtype == torch.float32
    assert layer.to("meta").weight_mean.device.type == "meta"


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_compiles_without_a_graph_break(covariance):
    layer = head(covariance, dtype=torch.float32, bias=True)
    features, labels = batch(dtype=torch.float32)
    inputs = [features.requires_grad_(), *layer.parameters()]

    def run(x, y):
        return layer.loss(x, y, 100)

    expected = run(features, labels)
    grads = torch.autograd.grad(expected, inputs)
    ours = torch.compile(run, fullgraph=True, backend="aot_eager")(features, labels)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(torch.autograd.grad(ours, inputs), grads, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_the_monte_carlo_bound_and_regression():
    layer, other = (
        head("diagonal", dtype=torch.float32),
        regression("diagonal", dtype=torch.float32),
    )
    features, labels = batch(dtype=torch.float32)
    targets = torch.randn(B, 2)

    def run(x, y, t, key):
        first = layer.loss(x, y, 100, bound="mc", n_samples=2, key=key)
        return first + other.loss(x, t, 100)

    key = random.key(2)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(features, labels, targets, key), run(features, labels, targets, key)
    )


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_state_and_copies(covariance, tmp_path):
    features, labels = batch()
    for layer, fresh in (
        (head(covariance, bias=True), VBLLClassification(D, C, covariance=covariance, bias=True)),
        (regression(covariance), VBLLRegression(D, 2, covariance=covariance)),
    ):
        torch.save(layer.state_dict(), tmp_path / "state.pt")
        fresh = fresh.double()
        fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for other in (fresh, copy.deepcopy(layer)):
            target = labels if isinstance(layer, VBLLClassification) else torch.ones(B, 2)
            assert torch.equal(other.loss(features, target, 9), layer.loss(features, target, 9))
        assert "covariance" in repr(layer) and covariance in repr(layer)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_published_initialisation(covariance):
    d = 512
    layer = VBLLClassification(d, 3, covariance=covariance, rank=5)
    assert layer.prior_variance == 2 / d
    assert layer.weight_mean.std().item() == pytest.approx(math.sqrt(2 / d), rel=0.1)
    diagonal = layer.covariance_matrix().diagonal(dim1=1, dim2=2)
    # Deviations of 1 / D, but a variance of 1 / D in the low-rank case.
    expected = 1 / d if covariance == "low_rank" else 1 / d**2
    torch.testing.assert_close(diagonal, torch.full_like(diagonal, expected), rtol=0.02, atol=0)
    assert VBLLClassification(d, 3, prior_scale=3.0).prior_variance == 6 / d
    one, two = (
        VBLLClassification(8, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    fixed = VBLLClassification(8, 3, noise_std=0.1)
    torch.testing.assert_close(fixed.noise_log_scale.exp(), torch.full((3,), 0.1))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_starts_at_given_rows(covariance):
    linear = nn.Linear(D, 30)
    rows = torch.tensor([4, 17, 2, 29])
    layer = VBLLClassification(D, C, covariance=covariance, noise=False, bias=True)
    layer.init_from(linear.weight[rows], linear.bias[rows], variance=1e-4)
    features = torch.randn(5, D)
    mean, variance = layer.logit_distribution(features)
    torch.testing.assert_close(mean, linear(features)[:, rows])
    expected = 1e-4 * features.square().sum(1, keepdim=True).expand(5, C)
    rtol = 0.15 if covariance == "low_rank" else 1e-5
    torch.testing.assert_close(variance, expected, rtol=rtol, atol=0)
    layer.loss(features, torch.zeros(5, dtype=torch.int64), 10).backward()
    assert all((p.grad != 0).any() for p in layer.parameters())  # nothing starts stuck


def test_errors():
    features, labels = batch()
    layer = head()
    bad = [
        (ValueError, "covariance must be one of", lambda: VBLLClassification(3, 2, covariance="x")),
        (ValueError, "init must be one of", lambda: VBLLClassification(3, 2, init="x")),
        (ValueError, "at least 1", lambda: VBLLClassification(0, 2)),
        (ValueError, "prior_variance must be", lambda: VBLLClassification(3, 2, prior_variance=0)),
        (ValueError, "rank must be", lambda: head("low_rank", rank=0)),
        (ValueError, "noise_std must be", lambda: head(noise_std=0.0)),
        (TypeError, "dtype must be", lambda: VBLLClassification(3, 2, dtype=torch.float16)),
        (ValueError, "features must have shape", lambda: layer(features[:, :3])),
        (TypeError, "features must be a floating", lambda: layer(labels)),
        (TypeError, "labels must be int64", lambda: layer.bound(features, labels.float())),
        (ValueError, "labels must have shape", lambda: layer.bound(features, labels[:2])),
        (ValueError, "labels must be in", lambda: layer.bound(features, labels + 2)),
        (ValueError, "labels must be in", lambda: layer.bound(features, labels - 5)),
        (ValueError, "bound must be one of", lambda: layer.bound(features, labels, bound="x")),
        (ValueError, "key is needed", lambda: layer.bound(features, labels, bound="mc")),
        (
            ValueError,
            "n_samples must be",
            lambda: layer.bound(features, labels, bound="mc", n_samples=3, key=random.key(0)),
        ),
        (ValueError, "mask must be bool", lambda: layer.bound(features, labels, mask=labels)),
        (ValueError, "n_train must be", lambda: layer.loss(features, labels, 0)),
        (ValueError, "weight must have shape", lambda: layer.init_from(features, variance=1.0)),
        (
            ValueError,
            "bias must have shape",
            lambda: layer.init_from(torch.ones(C, D), torch.ones(C), variance=1.0),
        ),
        (
            ValueError,
            "variance must be",
            lambda: layer.init_from(torch.ones(C, D), variance=-1.0),
        ),
        (ValueError, "W_logdiag must have", lambda: layer.load_vbll({"W_mean": torch.ones(C, D)})),
        (ValueError, "at least one row", lambda: layer.laplace_refine(features[:0])),
        (ValueError, "method must be", lambda: layer.laplace_refine(features, method="x")),
        (ValueError, "probs must have", lambda: layer.laplace_refine(features, features)),
        (ValueError, "must be finite", lambda: layer.laplace_refine(features * math.inf)),
        (ValueError, "in pairs", lambda: layer.laplace_refine([features], features)),
        (
            ValueError,
            "targets must be",
            lambda: regression().loss(features, torch.ones(B, 3), 5),
        ),
    ]
    for kind, text, call in bad:
        with pytest.raises(kind, match=text):
            call()


def test_module_says_what_it_exports():
    assert vbll.COVARIANCES == COVARIANCES
