"""Variational Bayesian last layers: closed forms, hand-written gradients, refinement, the vbll package."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from accuracy import assert_no_worse_than_torch, assert_same_but_rounding
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from bayes_kernels import functional, random, vbll
from bayes_kernels.vbll import VBLLClassification, VBLLRegression, pack_tril, unpack_tril

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


# --- packed triangles ---------------------------------------------------------------------------


def test_packed_layout_is_rows_of_the_lower_triangle():
    square = torch.arange(25.0).reshape(5, 5)
    packed = pack_tril(square)
    for i in range(5):
        for j in range(i + 1):
            assert packed[i * (i + 1) // 2 + j] == square[i, j]
    torch.testing.assert_close(unpack_tril(packed), square.tril())
    many = torch.randn(3, 2, 7, 7)
    torch.testing.assert_close(unpack_tril(pack_tril(many)), many.tril())
    for bad in (torch.ones(3, 4), torch.ones(4)):
        with pytest.raises(ValueError, match="pack_tril: square must have shape"):
            pack_tril(bad)
    with pytest.raises(ValueError, match="unpack_tril: packed must have shape"):
        unpack_tril(torch.ones(2, 5))


def test_no_full_square_is_stored():
    layer = VBLLClassification(40, 3)
    assert layer.scale_tril.shape == (3, 40 * 41 // 2)
    assert max(p.numel() for p in layer.parameters()) == 3 * 40 * 41 // 2


# --- divergences --------------------------------------------------------------------------------


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


# --- the logits and the bound -------------------------------------------------------------------


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


@pytest.mark.parametrize("d", [1, 2, 127, 128, 129, 300])
def test_dense_blocks_of_columns(d):
    layer = head("dense", d=d, classes=2)
    features, labels = batch(3, d, 2)
    features.requires_grad_()
    parameters = [features, *layer.parameters()]
    mean, variance = plain_moments(layer, features)
    truth = torch.autograd.grad(jensen(mean, variance, labels).sum() * 1.7, parameters)
    ours = torch.autograd.grad(layer.bound(features, labels).sum() * 1.7, parameters)
    for a, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, t)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gradients_are_no_worse_than_torch_in_fp32(covariance):
    layer = head(covariance, d=64)
    features, labels = batch(12, 64)

    def gradients(ours: bool, dtype):
        one = copy.deepcopy(layer).to(dtype)
        x = features.to(dtype).requires_grad_()
        value = one.bound(x, labels) if ours else jensen(*plain_moments(one, x), labels)
        return torch.autograd.grad(value.mean(), [x, *one.parameters()])

    names = ["features", *dict(layer.named_parameters())]
    for name, ours, same, truth in zip(
        names,
        gradients(True, torch.float32),
        gradients(False, torch.float32),
        gradients(False, torch.float64),
        strict=True,
    ):
        assert_no_worse_than_torch(ours, same, truth, what=name)


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
            return torch.func.functional_call(_Call(layer, op), _prefixed(state), args, kwargs)

        if what == "kl":
            return call("kl")
        if what == "loss":
            return call("loss", x, labels, 7, 0.5)
        options = {"bound": "mc", "n_samples": 4, "key": random.key(1)} if what == "mc" else {}
        return call("bound", x, labels, **options)

    # The noise of the Monte-Carlo bound has fp32 values, which are constants here.
    assert torch.autograd.gradcheck(run, (features, *parameters))


class _Call(nn.Module):
    def __init__(self, layer, op):
        super().__init__()
        self.layer, self.op = layer, op

    def forward(self, *args, **kwargs):
        return getattr(self.layer, self.op)(*args, **kwargs)


def _prefixed(state):
    return {f"layer.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_regression_gradcheck(covariance):
    layer = regression(covariance)
    features, _ = batch(4)
    features.requires_grad_()
    targets = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        state = _prefixed(dict(zip(names, values, strict=True)))
        return torch.func.functional_call(_Call(layer, "loss"), state, (x, targets, 11))

    assert torch.autograd.gradcheck(run, (features, *parameters))


def test_the_covariances_agree_when_they_are_the_same_matrix():
    diagonal, features = head("diagonal"), batch()[0]
    labels = batch()[1]
    dense, low_rank = head("dense"), head("low_rank")
    values = []
    with torch.no_grad():
        for other in (dense, low_rank):
            other.weight_mean.copy_(diagonal.weight_mean)
            other.noise_log_scale.copy_(diagonal.noise_log_scale)
        dense.scale_tril.copy_(pack_tril(torch.diag_embed(diagonal.log_scale)))
        low_rank.log_scale.copy_(diagonal.log_scale)
        low_rank.factor.zero_()
    for layer in (diagonal, dense, low_rank):
        values.append((layer.bound(features, labels), layer.kl(), layer.loss(features, labels, 30)))
    # And a low-rank matrix as a dense one.
    low_rank, dense = head("low_rank"), head("dense")
    with torch.no_grad():
        dense.weight_mean.copy_(low_rank.weight_mean)
        dense.noise_log_scale.copy_(low_rank.noise_log_scale)
        root = torch.linalg.cholesky(low_rank.covariance_matrix())
        root.diagonal(dim1=1, dim2=2).log_()
        dense.scale_tril.copy_(pack_tril(root))
    pair = [
        (layer.bound(features, labels), layer.kl(), layer.loss(features, labels, 30))
        for layer in (low_rank, dense)
    ]
    for first, second in ((values[0], values[1]), (values[0], values[2]), pair):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b)


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


# --- precision, memory, compile, state ----------------------------------------------------------


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


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest result of any operation."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_no_tensor_of_rows_by_classes_by_features(covariance):
    rows, classes, d = 400, 5, 48
    layer = head(covariance, d=d, classes=classes, dtype=torch.float32)
    features, labels = batch(rows, d, classes, torch.float32)
    features.requires_grad_()
    own = {p.untyped_storage().data_ptr() for p in (features, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), LargestTensor() as seen:
        layer.loss(features, labels, 1000).backward()
    assert seen.largest < rows * classes * d / 2
    # Labels, two flags and a few fp32 numbers for each logit; projections where of low rank.
    per_logit = 4 * 4 + (4 * layer.rank)
    assert sum(kept.values()) <= rows * (classes * per_logit + 32) + 4096


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


def test_same_bits_for_any_number_of_threads():
    layer = head("dense", d=200, dtype=torch.float32)
    features, labels = batch(16, 200, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loss = layer.loss(features, labels, 10)
            results.append([loss.detach(), *torch.autograd.grad(loss, list(layer.parameters()))])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# --- initialisation -----------------------------------------------------------------------------


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


# --- prediction ---------------------------------------------------------------------------------


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


# --- Laplace refinement -------------------------------------------------------------------------


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


# --- errors -------------------------------------------------------------------------------------


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


# --- the public package -------------------------------------------------------------------------

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


# --- training -----------------------------------------------------------------------------------


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


def test_module_says_what_it_exports():
    assert vbll.COVARIANCES == COVARIANCES
