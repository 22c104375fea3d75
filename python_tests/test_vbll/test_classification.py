"""Classification heads: gradients, predictions, Laplace refinement, training."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from accuracy import assert_same_but_rounding
from torch import Tensor, nn

from bayes_kernels import functional, random
from bayes_kernels.vbll import VBLLClassification
from test_vbll.heads import COVARIANCES, B, C, Call, D, batch, head, jensen, prefixed


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("what", ["jensen", "mc", "kl", "loss"])
def test_gradcheck(covariance, what):
    layer = head(covariance, d=3, classes=3, rank=2, bias=True)
    features, labels = batch(4, 3, 3)
    labels[1] = -100
    features.requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        def call(op, *args, **kwargs):
            state = dict(zip(names, values, strict=True))
            return torch.func.functional_call(Call(layer, op), prefixed(state), args, kwargs)

        if what == "kl":
            return call("kl")
        if what == "loss":
            return call("loss", x, labels, 7, 0.5)
        options = {"bound": "mc", "n_samples": 4, "key": random.key(1)} if what == "mc" else {}
        return call("bound", x, labels, **options)

    # The noise of the Monte-Carlo bound has fp32 values, which are constants here.
    assert torch.autograd.gradcheck(run, (features, *parameters))


def test_prediction_is_that_of_the_logits(monkeypatch):
    layer, key = head(dtype=torch.float32), random.key(3)
    features = batch(dtype=torch.float32)[0]
    calls = []

    def record(mean, cov, **options):
        calls.append((mean, cov, options))
        return "prediction"

    monkeypatch.setattr(functional, "mc_predict", record, raising=False)
    assert layer.predict(features.reshape(3, 3, D), n_samples=50, key=key) == "prediction"
    (mean, variance, options), expected = calls[0], layer.logit_distribution(features)
    torch.testing.assert_close(mean, expected[0])
    torch.testing.assert_close(variance, expected[1])
    assert options["n_samples"] == 50 and options["key"] is key and not mean.requires_grad


def test_predictive_probabilities():
    layer = head()
    features = batch()[0]
    mean, variance = (t.detach() for t in layer.logit_distribution(features))
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(200_000, B, C, generator=generator).double()
    expected = (mean + variance.sqrt() * eps).softmax(2).mean(0)
    ours = layer.float().predict(features.float(), n_samples=20_000, key=random.key(0))
    torch.testing.assert_close(ours.log_probs.double().exp(), expected, atol=0.012, rtol=0)
    torch.testing.assert_close(ours.log_probs.exp().sum(1), torch.ones(B))


def laplace_variance(layer, features: Tensor, probs: Tensor, at: Tensor, q: float) -> Tensor:
    """phi' H_c^-1 phi by a direct inverse."""
    weights = probs * (1 - probs)
    hessian = torch.einsum("nc,ni,nj->cij", weights, features, features)
    hessian = hessian + torch.eye(features.shape[1]).to(features) / q
    return torch.einsum("bi,cij,bj->bc", at, torch.linalg.inv(hessian), at)


def woodbury_variance(features: Tensor, probs: Tensor, at: Tensor, q: float) -> Tensor:
    """The same by the N x N Gram, q |phi|^2 - q^2 |L^-1 W^1/2 k|^2, L L' = I + q W^1/2 K W^1/2."""
    roots = (probs * (1 - probs)).sqrt().T[:, :, None]  # (C, N, 1)
    gram = roots * (features @ features.T) * roots.transpose(1, 2)
    lower = torch.linalg.cholesky(torch.eye(len(features)).to(features) + q * gram)
    k = roots * (features @ at.T)  # (C, N, B)
    solved = torch.linalg.solve_triangular(lower, k, upper=False)
    return q * at.square().sum(1, keepdim=True) - q * q * solved.square().sum(1).T


@pytest.mark.parametrize(("rows", "method"), [(4, "subspace"), (40, "cholesky"), (20, "cholesky")])
@pytest.mark.parametrize("covariance", ["dense", "diagonal"])
def test_refinement_is_the_inverse_hessian(rows, method, covariance):
    d = 20
    layer = head(covariance, d=d, noise=False, bias=True)
    features, _ = batch(rows, d)
    at = torch.randn(7, d, generator=torch.Generator().manual_seed(9)).double()
    before = layer.logit_distribution(at)
    report = layer.laplace_refine(features)
    assert (report.method, report.n_examples) == (method, rows)
    assert report.elbo_applies is False and layer.refined
    mean, variance = layer.logit_distribution(at)
    assert torch.equal(mean, before[0])
    probs = layer(features).softmax(1).detach()
    q = layer.prior_variance
    expected = laplace_variance(layer, features, probs, at, q)
    torch.testing.assert_close(variance, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        variance, woodbury_variance(features, probs, at, q), rtol=1e-9, atol=0
    )
    layer.discard_refinement()
    torch.testing.assert_close(layer.logit_distribution(at)[1], before[1])


def test_both_refinements_agree_and_take_any_batches():
    d, rows = 12, 30
    features, _ = batch(rows, d)
    at = torch.randn(5, d, generator=torch.Generator().manual_seed(9)).double()
    layer = head("diagonal", d=d)
    probs = torch.rand(rows, C, generator=torch.Generator().manual_seed(1)).double()
    probs[0], probs[1] = 1.0, 0.0  # saturated: no curvature
    expected = laplace_variance(layer, features, probs, at, 0.3)
    expected = expected + (2 * layer.noise_log_scale).exp().detach()
    cuts = (0, 3, 3, 17, 30)
    pieces = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    for method in ("auto", "cholesky", "subspace"):
        for given in (
            (features, probs),
            (((features[p], probs[p]) for p in pieces), None),
        ):
            report = layer.laplace_refine(*given, prior_variance=0.3, method=method)
            assert report.n_examples == rows
            assert report.method == ("subspace" if method == "subspace" else "cholesky")
            variance = layer.logit_distribution(at)[1].detach()
            torch.testing.assert_close(variance, expected, rtol=1e-10, atol=0)
    few = layer.laplace_refine([features[:4], features[4:7]])
    assert (few.method, few.rank) == ("subspace", 7)


def test_refinement_with_repeated_features_is_sound():
    layer = head("diagonal", d=30, noise=False, dtype=torch.float32)
    one = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    features = one.repeat(8, 1)
    layer.laplace_refine(features * 1e3)
    at = torch.cat([features[:1], torch.randn(3, 30)])
    variance = layer.logit_distribution(at)[1]
    assert torch.isfinite(variance).all() and (variance > 0).all()
    q = layer.prior_variance
    assert (variance <= q * at.square().sum(1, keepdim=True) * (1 + 1e-5)).all()


@pytest.mark.parametrize("rows", [4, 30])
def test_refined_state_makes_the_round_trip(rows):
    layer = head("diagonal", d=10, dtype=torch.float32)
    features = batch(rows, 10, dtype=torch.float32)[0]
    layer.laplace_refine(features)
    fresh = VBLLClassification(10, C, covariance="diagonal")
    fresh.load_state_dict(layer.state_dict())
    assert fresh.refined
    for other in (fresh, copy.deepcopy(layer)):
        for a, b in zip(
            other.logit_distribution(features), layer.logit_distribution(features), strict=True
        ):
            assert_same_but_rounding(a, b)
    nn.Sequential(fresh, nn.Linear(2, 2)).load_state_dict({"1.bias": torch.ones(2)}, strict=False)
    assert fresh.refined  # a state without the head's parameters says nothing of it
    plain = head("diagonal", d=10, dtype=torch.float32)
    fresh.load_state_dict(plain.state_dict())
    assert not fresh.refined and "laplace_tril" not in fresh.state_dict()


def test_a_refined_head_has_no_elbo():
    layer = head("dense")
    features, labels = batch()
    layer.laplace_refine(features)
    for call in (lambda: layer.loss(features, labels, 5), layer.kl):
        with pytest.raises(RuntimeError, match="no evidence lower bound"):
            call()
    mean, variance = layer.logit_distribution(features)
    torch.testing.assert_close(layer.bound(features, labels), jensen(mean, variance, labels))
    layer.discard_refinement()
    layer.loss(features, labels, 5)


def moons(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two interleaved half circles with noise, one label in ten flipped."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 2
    angle = math.pi * torch.rand(rows, generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    points = torch.where(labels[:, None] == 0, upper, lower)
    points = points + 0.15 * torch.randn(rows, 2, generator=generator)
    flipped = torch.rand(rows, generator=generator) < 0.1
    return points, torch.where(flipped, 1 - labels, labels)


def test_training_is_better_calibrated_than_softmax():
    generator = torch.Generator().manual_seed(0)
    frequencies = 2 * torch.randn(2, 100, generator=generator)
    phase = 2 * math.pi * torch.rand(100, generator=generator)

    def features(points: Tensor) -> Tensor:
        return (points @ frequencies + phase).cos()

    (train, train_labels), (test, test_labels) = moons(60, 1), moons(1000, 2)
    phi, phi_test = features(train), features(test)

    def fit(parameters, loss, steps=250):
        optimiser = torch.optim.Adam(parameters, lr=0.03)
        for _ in range(steps):
            optimiser.zero_grad()
            loss().backward()
            optimiser.step()

    linear = nn.Linear(100, 2)
    fit(linear.parameters(), lambda: nn.functional.cross_entropy(linear(phi), train_labels))
    plain = nn.functional.cross_entropy(linear(phi_test), test_labels).item()
    for covariance in COVARIANCES:
        layer = VBLLClassification(
            100, 2, covariance=covariance, prior_variance=1.0, noise=False, init="prior"
        )
        layer.init_from(torch.zeros(2, 100), variance=0.01)
        fit(layer.parameters(), lambda layer=layer: layer.loss(phi, train_labels, len(train)))
        mean, variance = layer.logit_distribution(phi_test)
        eps = torch.randn(500, *mean.shape, generator=generator)
        probs = (mean + variance.sqrt() * eps).softmax(2).mean(0)
        bayes = nn.functional.nll_loss(probs.log(), test_labels).item()
        assert bayes < 0.75 * plain, (covariance, bayes, plain)
