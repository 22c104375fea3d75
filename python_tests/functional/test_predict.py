"""mc_predict and mc_predict_linear: the definition at the same key, statistics, limits, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.integrate
import torch
import torch._dynamo.testing
from accuracy import assert_no_worse_than_torch
from hard_matrices import KINDS, SIZES, hard_matrix
from torch import Tensor
from torch.distributions import Categorical, MultivariateNormal

from bayes_kernels import random, reference
from bayes_kernels.functional import linear_logits, mc_predict, mc_predict_linear
from functional.predict_parts import definition, problem

# Rows, classes, samples: both layouts of the kernels and their edges.
SHAPES = [(3, 1, 5), (5, 2, 1), (4, 5, 7), (2, 5, 131), (1, 26, 33), (1, 32, 10), (2, 33, 9)]
SHAPES += [(1, 65, 70), (1, 1000, 5)]
BIG = [(3, 5, 5000), (1, 300, 700), (2, 64, 3000), (20, 7, 3)]


@pytest.mark.parametrize("scale", [0.5, 300.0], ids=["bounded", "free"])
@pytest.mark.parametrize("full", [False, True], ids=["variances", "full"])
@pytest.mark.parametrize("antithetic", [False, True], ids=["plain", "pairs"])
def test_matches_the_definition(device, scale: float, full: bool, antithetic: bool):
    key = random.key(5)
    shapes = SHAPES + (BIG if device.name == "cpu" else [])
    for rows, classes, samples in shapes:
        if full and classes > 32:
            continue
        if device.name == "sim" and classes > 100 and (antithetic or scale > 1):
            continue
        samples += samples % 2 if antithetic else 0
        mean, cov = (
            t.float().to(device.torch) for t in problem(rows, classes, scale=scale, full=full)
        )
        options = {"stream": 3, "row0": 11, "antithetic": antithetic}
        ours = mc_predict(
            mean,
            cov,
            n_samples=samples,
            key=key.to(device.torch),
            return_standard_error=True,
            **options,
        )
        truth = definition(mean, cov, key, samples, **options)
        # A normal is right to a few ulp, and a logit of size 50 to 4e-6.
        atol = 1e-5 if scale < 1 else 4e-4
        for name, a, b in zip(ours._fields, ours, truth, strict=True):
            b = b.float().to(device.torch)
            what = f"{name} of {rows, classes, samples}"
            if name == "standard_error" and samples == (2 if antithetic else 1):
                assert a.isnan().all(), what
                continue
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=atol, msg=lambda m, what=what: f"{what}: {m}"
            )


@pytest.mark.parametrize("full", [False, True])
def test_double_precision(full: bool):
    key = random.key(5)
    for scale in (0.1, 50.0):
        mean, cov = problem(3, 6, scale=scale, full=full)
        ours = mc_predict(mean, cov, n_samples=37, key=key, return_standard_error=True)
        truth = definition(mean, cov, key, 37)
        for a, b in zip(ours, truth, strict=True):
            assert a.dtype == torch.float64
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # fp32 normals


@pytest.mark.parametrize(("classes", "samples"), [(5, 400), (100, 40)])
def test_accuracy_rule(device, classes: int, samples: int):
    if device.name == "sim":
        samples //= 4
    mean, cov = (t.float() for t in problem(4, classes))
    key = random.key(2)
    ours = mc_predict(
        mean.to(device.torch), cov.to(device.torch), n_samples=samples, key=key.to(device.torch)
    )
    truth = definition(mean, cov, key, samples)
    eps = reference.logit_noise(key, 4, samples, classes)
    same = reference.mc_predict(mean, cov, eps)
    # Probabilities: the normals' own last bits weigh as much as the rounding of a softmax.
    for a, b, t in (
        (ours.log_probs.exp(), same[0].exp(), truth[0].exp()),
        (ours[2], same[2], truth[2]),
    ):
        assert_no_worse_than_torch(a, b, t, factor=3.0)


@pytest.mark.parametrize("full", [False, True])
def test_statistics(full: bool):
    mean, cov = problem(3, 5, scale=2.0, full=full)
    ours = mc_predict(
        mean.float(), cov.float(), n_samples=100_000, key=random.key(1), return_standard_error=True
    )
    torch.manual_seed(0)
    normal = MultivariateNormal(mean, cov if full else torch.diag_embed(cov))
    p = normal.sample((100_000,)).softmax(-1)
    error = ours.standard_error.double()
    assert ((ours.probs - p.mean(0)).abs() < 5 * math.sqrt(2) * error).all()
    torch.testing.assert_close(error, p.std(0) / math.sqrt(100_000), rtol=0.1, atol=0)
    entropy = Categorical(probs=p.mean(0)).entropy()
    expected = Categorical(probs=p).entropy().mean(0)
    torch.testing.assert_close(ours.entropy.double(), entropy, rtol=0, atol=0.01)
    torch.testing.assert_close(ours.expected_entropy.double(), expected, rtol=0, atol=0.01)
    torch.testing.assert_close(
        ours.mutual_information.double(), entropy - expected, rtol=0, atol=0.01
    )
    assert (ours.mutual_information > 0).all()


def test_standard_error_is_the_spread_over_keys():
    mean, cov = (t.float() for t in problem(1, 4, scale=3.0))
    for antithetic in (False, True):
        runs = [
            mc_predict(
                mean,
                cov,
                n_samples=200,
                key=random.key(s),
                antithetic=antithetic,
                return_standard_error=True,
            )
            for s in range(300)
        ]
        spread = torch.stack([r.probs for r in runs]).std(0)
        claimed = torch.stack([r.standard_error for r in runs]).mean(0)
        torch.testing.assert_close(claimed, spread, rtol=0.15, atol=0)


@pytest.mark.parametrize("std", [4.9, 30.0], ids=["bounded", "free"])
@pytest.mark.parametrize("antithetic", [False, True], ids=["plain", "pairs"])
def test_standard_error_where_no_draw_is_near_the_softmax_of_the_mean(
    device, std: float, antithetic: bool
):
    """A class that seems certain, beside many of which one is always larger: nothing may cancel."""
    shapes = [(26, 600), (65, 512), (300, 300)]  # several ranges of draws each
    shapes += [(26, 9000), (65, 3000)] if device.name == "cpu" else []
    for dtype, (classes, samples) in itertools.product(device.dtypes[::3], shapes):
        mean = torch.zeros(2, classes, dtype=dtype)
        var = torch.full_like(mean, std * std)
        mean[:, 0], var[:, 0] = 2 * std, 0.0
        key = random.key(3)
        ours = mc_predict(
            mean.to(device.torch),
            var.to(device.torch),
            n_samples=samples,
            key=key.to(device.torch),
            antithetic=antithetic,
            return_standard_error=True,
        )
        truth = definition(mean, var, key, samples, antithetic=antithetic)[3]
        torch.testing.assert_close(ours.standard_error.double().cpu(), truth, rtol=2e-3, atol=1e-18)


def test_pairs_lower_the_error():
    mean, cov = torch.zeros(1, 3), torch.full((1, 3), 0.25)
    truth = 1 / 3  # by symmetry
    errors = {}
    for antithetic in (False, True):
        p = [
            mc_predict(mean, cov, n_samples=64, key=random.key(s), antithetic=antithetic).probs
            for s in range(100)
        ]
        errors[antithetic] = (torch.stack(p) - truth).square().mean().sqrt().item()
    assert errors[True] < 0.4 * errors[False]


def test_no_noise_is_log_softmax(device):
    mean = torch.tensor([[1e4, -1e4, 0.0, 9990.0], [0.3, -0.2, 1.1, 0.0]], device=device.torch)
    for wide in (False, True):
        m = torch.cat([mean] * 20, 1) if wide else mean
        covs = [torch.zeros_like(m)] + ([] if wide else [m.new_zeros(2, 4, 4)])
        for cov in covs:
            ours = mc_predict(
                m, cov, n_samples=6, key=random.key(0, device.torch), return_standard_error=True
            )
            expected = torch.log_softmax(m.double(), -1)
            torch.testing.assert_close(ours.log_probs.double(), expected, rtol=1e-6, atol=2e-6)
            entropy = -(expected.exp() * expected).sum(-1)
            for h in (ours.entropy, ours.expected_entropy):
                torch.testing.assert_close(h.double(), entropy, rtol=1e-6, atol=2e-6)
            assert (ours.standard_error < 1e-6).all()


def test_extreme_logits_and_variances(device):
    key = random.key(0, device.torch)
    # Far below the smallest float: log E exp(z) = mean + var / 2 beside a certain class.
    mean = torch.tensor([[0.0, -1000.0]], device=device.torch)
    ours = mc_predict(
        mean, torch.tensor([[0.0, 1.0]], device=device.torch), n_samples=4000, key=key
    )
    assert abs(ours.log_probs[0, 1].item() + 999.5) < 0.1 and ours.log_probs[0, 0] == 0
    huge = mc_predict(mean, torch.full((1, 2), 1e30, device=device.torch), n_samples=400, key=key)
    torch.testing.assert_close(huge.probs.cpu(), torch.full((1, 2), 0.5), rtol=0, atol=0.1)
    assert huge.expected_entropy.item() < 1e-6
    # A removed class takes no part.
    absent = torch.tensor([[0.5, -math.inf, 1.0]], device=device.torch)
    for scale in (1.0, 100.0):
        var = torch.tensor([[1.0, 2.0, 3.0]], device=device.torch) * scale
        ours = mc_predict(absent, var, n_samples=50, key=key)
        assert ours.log_probs[0, 1] == -math.inf and torch.isfinite(ours.entropy).all()
        torch.testing.assert_close(ours.probs.sum(1).cpu(), torch.ones(1))


def test_improper_covariances_give_nan_in_their_row_only(device):
    key = random.key(0, device.torch)
    for classes in (3, 70):
        mean = torch.zeros(4, classes)
        var = torch.ones(4, classes)
        var[1, 2], var[2, 0] = -1.0, math.inf
        mean[3, 1] = math.nan
        ours = mc_predict(
            mean.to(device.torch),
            var.to(device.torch),
            n_samples=5,
            key=key,
            return_standard_error=True,
        )
        for t in ours:
            assert torch.isfinite(t[0]).all() and t[1:].isnan().all()
    cov = torch.eye(3).repeat(3, 1, 1)
    cov[1, 2, 0] = 2.0  # lower triangle: not positive semi-definite
    cov[2, 0, 2] = 2.0  # upper triangle: not read
    ours = mc_predict(
        torch.zeros(3, 3).to(device.torch), cov.to(device.torch), n_samples=5, key=key
    )
    assert ours.log_probs[1].isnan().all() and torch.isfinite(ours.log_probs[[0, 2]]).all()


def test_singular_covariance_needs_no_jitter(device):
    v = torch.tensor([1.0, -2.0, 0.5, 0.0])
    cov = torch.outer(v, v)[None]
    lower = reference.semidefinite_cholesky(cov)
    torch.testing.assert_close(lower @ lower.mT, cov)
    mean = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    key = random.key(9)
    ours = mc_predict(
        mean.to(device.torch), cov.to(device.torch), n_samples=40, key=key.to(device.torch)
    )
    eps = reference.logit_noise(key, 1, 40, 4)[0, :, :1]
    expected = torch.log_softmax(mean + eps * v, -1).logsumexp(0) - math.log(40)
    torch.testing.assert_close(ours.log_probs[0].cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (*SIZES, "mixed")])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e30])
def test_hard_covariances(device, kind: str, size: float):
    key = random.key(7)
    dtypes = device.dtypes[::3]
    for dtype, c in itertools.product(dtypes, (2, 5, 32) + ((40,) if device.name == "cpu" else ())):
        x = hard_matrix(kind, c, c) / c**0.5
        cov = (size * (x.mT @ x))[None].to(dtype)
        mean = torch.linspace(0, 2, c, dtype=dtype)[None]
        ours = mc_predict(
            mean.to(device.torch), cov.to(device.torch), n_samples=12, key=key.to(device.torch)
        )
        lower = reference.semidefinite_cholesky(cov).double()
        truth = definition(mean, lower @ lower.mT, key, 12)
        spread = 1 + size**0.5
        for a, b in zip(ours[:3], truth[:3], strict=True):
            torch.testing.assert_close(a.double().cpu(), b, rtol=1e-4, atol=3e-5 * spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.5, 300.0], ids=["bounded", "free"])
def test_large_full_covariances(dtype, scale: float):
    key = random.key(3)
    for rows, classes, samples in ((3, 33, 10), (1, 40, 70), (2, 130, 6)):
        mean, cov = (t.to(dtype) for t in problem(rows, classes, scale=scale, full=True))
        cov[0] = cov[0] + cov[0].triu(1)  # the upper triangle is not read
        for antithetic in (False, True):
            options = {"row0": 5, "antithetic": antithetic}
            ours = mc_predict(
                mean, cov, n_samples=samples, key=key, return_standard_error=True, **options
            )
            truth = definition(mean, cov, key, samples, **options)
            for name, a, b in zip(ours._fields, ours, truth, strict=True):
                torch.testing.assert_close(
                    a.double(), b, rtol=1e-4, atol=1e-4 * scale, msg=lambda m, name=name: name + m
                )
        bad = cov.clone()
        bad[0, 2, 1] = 1e6
        ours = mc_predict(mean, bad, n_samples=samples, key=key)
        assert ours.log_probs[0].isnan().all() and ours.log_probs[1:].isfinite().all()


def test_a_large_full_covariance_without_correlations_is_that_of_variances():
    mean, cov = (t.float() for t in problem(2, 40, full=True))
    key = random.key(3)
    diagonal = mc_predict(
        mean, torch.diag_embed(cov.diagonal(dim1=1, dim2=2)), n_samples=20, key=key
    )
    fused = mc_predict(mean, cov.diagonal(dim1=1, dim2=2), n_samples=20, key=key)
    torch.testing.assert_close(diagonal.log_probs, fused.log_probs, rtol=1e-5, atol=1e-5)
    empty = mc_predict(mean[:0], cov[:0], n_samples=20, key=key)
    assert empty.log_probs.shape == (0, 40) and empty.entropy.shape == (0,)


@pytest.mark.parametrize("classes", [5, 90])
def test_rows_do_not_depend_on_the_batch(device, classes: int):
    mean, cov = (t.float().to(device.torch) for t in problem(6, classes))
    key = random.key(4, device.torch)
    whole = mc_predict(mean, cov, n_samples=9, key=key, return_standard_error=True)
    tail = mc_predict(mean[4:], cov[4:], n_samples=9, key=key, row0=4, return_standard_error=True)
    order = torch.tensor([5, 0, 3], device=device.torch)
    picked = mc_predict(
        mean[order], cov[order], n_samples=9, key=key, ids=order, return_standard_error=True
    )
    for w, t, p in zip(whole, tail, picked, strict=True):
        assert torch.equal(w[4:], t) and torch.equal(w[order], p)
    other = mc_predict(mean, cov, n_samples=9, key=key, stream=1)
    assert (other.entropy != whole.entropy).all()


def test_more_samples_extend_fewer():
    short, long = (reference.logit_noise(random.key(1), 2, s, 5) for s in (6, 11))
    assert torch.equal(short, long[:, :6])
    row = random.fold_in(random.fold_in(random.key(1), 4), 1)
    dumped = random.normal(row, (3, 5, 4)).transpose(1, 2).reshape(12, 5)[:11]
    torch.testing.assert_close(dumped, long[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "classes", "samples"), [(3, 5, 5000), (40, 5, 100), (2, 300, 500)]
)
def test_same_bits_for_any_number_of_threads(rows: int, classes: int, samples: int):
    mean, cov = (t.float() for t in problem(rows, classes))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(mc_predict(mean, cov, n_samples=samples, key=random.key(0)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))


def test_empty_batch(device):
    ours = mc_predict(
        torch.zeros(0, 5, device=device.torch),
        torch.zeros(0, 5, device=device.torch),
        n_samples=3,
        key=random.key(0, device.torch),
        return_standard_error=True,
    )
    assert [tuple(t.shape) for t in ours] == [(0, 5), (0,), (0,), (0, 5)]


def test_half_precision_and_autocast_and_gradients():
    mean, cov = problem(2, 5)
    key = random.key(0)
    low = mc_predict(mean.bfloat16(), cov.float(), n_samples=10, key=key)
    same = mc_predict(mean.bfloat16().float(), cov.float(), n_samples=10, key=key)
    assert low.log_probs.dtype == torch.float32 and torch.equal(low.log_probs, same.log_probs)
    leaf = mean.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = mc_predict_linear(
            torch.randn(2, 3), torch.randn(5, 3), torch.rand(5, 3), n_samples=4, key=key
        )
        assert ours.log_probs.dtype == torch.float32
    assert not mc_predict(leaf, cov.float(), n_samples=4, key=key).log_probs.requires_grad


def test_compiles_once_for_all_keys():
    torch._dynamo.reset()
    mean, cov = (t.float() for t in problem(3, 5))

    def entropy(mean: Tensor, cov: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        result = mc_predict(mean, cov, n_samples=16, key=key)
        return result.log_probs, result.mutual_information

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(entropy, fullgraph=True, backend=counter)
    for seed in range(3):
        key = random.key(seed)
        for a, b in zip(compiled(mean, cov, key), entropy(mean, cov, key), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


# --- methods without sampling ------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.0, 1e-6, 0.3, 1.0, 1.1, 9.0, 400.0, 1e6])
def test_quadrature_against_dense_integration(variance: float):
    difference = torch.tensor([0.0, 0.4, 3.0, -25.0], dtype=torch.float64)
    mean = torch.stack([torch.ones(4).double(), difference + 1], 1)
    ours = mc_predict(mean, torch.full((4, 2), variance / 2).double(), method="quadrature")
    e = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-e.square() / 2)
    for i, d in enumerate(difference):
        z = d + math.sqrt(variance) * e
        p = (z.sigmoid() * density).sum() / density.sum()
        coin = -torch.special.xlogy(z.sigmoid(), z.sigmoid()) - torch.special.xlogy(
            (-z).sigmoid(), (-z).sigmoid()
        )
        torch.testing.assert_close(ours.probs[i, 1], p, rtol=0, atol=2e-8)
        expected = (coin * density).sum() / density.sum()
        torch.testing.assert_close(ours.expected_entropy[i], expected, rtol=0, atol=2e-8)


def log_mean_sigmoid(d: float, variance: float) -> float:
    """log E sigmoid(d + std t), t ~ N(0, 1), by adaptive integration around the integrand's peak."""
    std = math.sqrt(variance)

    def exponent(t: float) -> float:
        z = d + std * t
        return -t * t / 2 - math.log1p(math.exp(-abs(z))) - max(-z, 0.0)

    low, high = 0.0, std
    for _ in range(100):
        t = (low + high) / 2
        rises = t < std * float(torch.sigmoid(torch.tensor(-d - std * t, dtype=torch.float64)))
        low, high = (t, high) if rises else (low, t)
    top = exponent(low)
    edges = [low + k for k in (-10, -5, -2, 0, 2, 5, 10)]
    kinks = [(z - d) / std for z in range(-40, 41, 4)]
    edges = sorted(edges + [t for t in kinks if edges[0] < t < edges[-1]])
    total = 0.0
    for a, b in itertools.pairwise(edges):
        total += scipy.integrate.quad(lambda t: math.exp(exponent(t) - top), a, b, epsrel=1e-11)[0]
    return top + math.log(total / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("std", [1e-6, 1e-3, 0.5, 1.0, 3.3, 7.99, 8.01, 20.0, 400.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quadrature_is_exact_however_small_a_probability(std: float, dtype):
    """Where sigmoid's tail, its middle and the Gaussian lead, and where they change over."""
    variance = torch.tensor(std * std).to(dtype)
    given = [0.0, -1e-3, -1.0, -12.0, -93.0, -4e3]
    given += [-std * k for k in (0.5, 2.0, 6.0)]
    given += [-std * std * k for k in (0.5, 0.97, 1.03, 1.5, 2.1, 9.0)]
    difference = torch.tensor(given, dtype=dtype)
    mean = torch.stack([torch.zeros_like(difference), difference], 1)
    cov = torch.stack([torch.zeros_like(variance), variance]).expand(len(given), 2)
    for m, small in ((mean, 1), (mean.flip(1), 0)):
        ours = mc_predict(m, cov, method="quadrature").log_probs.double()
        for i, d in enumerate(difference.tolist()):
            truth = log_mean_sigmoid(d, float(variance))
            eps = max(1e-11, torch.finfo(dtype).eps)
            assert abs(float(ours[i, small]) - truth) <= eps * (1 + abs(truth)), (d, std)
            other = math.log1p(-math.exp(truth))
            least = torch.finfo(dtype).tiny
            error = abs(float(ours[i, 1 - small]) - other)
            assert error <= eps * max(abs(other), least), (d, std)


def test_quadrature_of_limits():
    for d, variance, truth in (
        (-1e30, 1e30, -5e29),
        (-1e15, 1e30, math.log(math.erfc(math.sqrt(0.5)) / 2)),
        (0.0, 1e38, math.log(0.5)),
        (-1e30, 0.0, -1e30),
        (-math.inf, 3.0, -math.inf),
        (-math.inf, 300.0, -math.inf),
        (-5.0, 1e-30, -math.log1p(math.exp(5.0))),
    ):
        mean, cov = torch.tensor([[0.0, d]]), torch.tensor([[variance, 0.0]])
        ours = mc_predict(mean, cov, method="quadrature")
        torch.testing.assert_close(ours.log_probs[0, 1], torch.tensor(truth))
        assert torch.isfinite(ours.entropy).all() and torch.isfinite(ours.expected_entropy).all()


def test_quadrature_against_sampling():
    mean, cov = (t.float() for t in problem(4, 2, scale=3.0, full=True))
    exact = mc_predict(mean, cov, method="quadrature")
    sampled = mc_predict(
        mean, cov, n_samples=1_000_000, key=random.key(0), return_standard_error=True
    )
    assert ((exact.probs - sampled.probs).abs() < 5 * sampled.standard_error).all()
    torch.testing.assert_close(exact.entropy, sampled.entropy, rtol=0, atol=3e-3)
    torch.testing.assert_close(exact.expected_entropy, sampled.expected_entropy, rtol=0, atol=3e-3)
    perfect = torch.full((1, 2, 2), 7.0)  # z_1 - z_0 is certain
    torch.testing.assert_close(
        mc_predict(mean[:1], perfect, method="quadrature").log_probs, mean[:1].log_softmax(-1)
    )


def test_probit_and_bridge():
    mean, cov = problem(3, 4, full=True)
    var = cov.diagonal(dim1=1, dim2=2)
    probit = mc_predict(mean, cov, method="probit")
    expected = (mean / (1 + math.pi / 8 * var).sqrt()).log_softmax(-1)
    torch.testing.assert_close(probit.log_probs, expected)
    with pytest.raises(ValueError, match="no expected entropy"):
        _ = probit.mutual_information
    bridge = mc_predict(mean, cov, method="bridge")
    ones = torch.ones(4, dtype=torch.float64)
    for b in range(3):
        s = cov[b] @ ones
        m = mean[b] - s * mean[b].sum() / s.sum()
        v = (cov[b] - torch.outer(s, s) / s.sum()).diagonal()
        alpha = (1 - 2 / 4 + m.exp() / 16 * (-m).exp().sum()) / v
        torch.testing.assert_close(bridge.probs[b], alpha / alpha.sum())
        draws = torch.distributions.Dirichlet(alpha).sample((20_000,))
        h = -torch.special.xlogy(draws, draws).sum(-1).mean()
        torch.testing.assert_close(bridge.expected_entropy[b], h, rtol=0, atol=0.02)
    diagonal = mc_predict(mean, torch.diag_embed(var), method="bridge")
    torch.testing.assert_close(diagonal.log_probs, mc_predict(mean, var, method="bridge").log_probs)
    extreme = mc_predict(torch.tensor([[1e4, 0.0, -1e4]]), torch.ones(1, 3), method="bridge")
    assert torch.isfinite(extreme.log_probs).all() and extreme.probs[0, 0] > 0.99


# --- a last layer with Gaussian weights --------------------------------------------------------


def layer(covariance: str, *, b: int = 3, c: int = 4, d: int = 7, packed: bool = False):
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    features, mean = normal(b, d), normal(c, d)
    if covariance == "diagonal":
        scale = normal(c, d).abs()
        dense = torch.diag_embed(scale.square())
    elif covariance == "low_rank":
        scale = (normal(c, d, 2), normal(c, d).square())
        dense = scale[0] @ scale[0].mT + torch.diag_embed(scale[1])
    else:
        lower = normal(c, d, d).tril()
        dense = lower @ lower.mT
        scale = lower + normal(c, d, d).triu(1)  # the upper triangle is not read
        if packed:
            i, j = torch.tril_indices(d, d)
            scale = lower[:, i, j]
            assert torch.equal(scale[:, 4 * 5 // 2 + 2], lower[:, 4, 2])
    return features, mean, scale, dense


LAYERS = [("diagonal", False), ("low_rank", False), ("dense", False), ("dense", True)]


@pytest.mark.parametrize(("covariance", "packed"), LAYERS)
def test_linear_logits(covariance: str, packed: bool):
    features, weight, scale, dense = layer(covariance, packed=packed)
    noise = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    mean, var = linear_logits(features, weight, scale, noise, covariance=covariance)
    expected = torch.einsum("bd,cde,be->bc", features, dense, features) + noise
    torch.testing.assert_close(mean, features @ weight.T)
    torch.testing.assert_close(var, expected)
    for a, b in zip(
        reference.linear_logits(features, weight, scale, noise, covariance=covariance),
        (mean, var),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    single = scale if isinstance(scale, Tensor) else scale[0]
    leaves = (features.requires_grad_(), single.requires_grad_())

    def variance(phi: Tensor, s: Tensor) -> Tensor:
        full = s if isinstance(scale, Tensor) else (s, scale[1])
        return linear_logits(phi, weight, full, covariance=covariance)[1]

    assert torch.autograd.gradcheck(variance, leaves)


@pytest.mark.parametrize(("covariance", "packed"), LAYERS)
def test_predict_linear_samples_the_weights(covariance: str, packed: bool):
    features, weight, scale, dense = layer(covariance, packed=packed)
    ours = mc_predict_linear(
        features,
        weight,
        scale,
        noise_var=0.5,
        covariance=covariance,
        n_samples=20_000,
        key=random.key(0),
        return_standard_error=True,
    )
    torch.manual_seed(0)
    jitter = 1e-9 * torch.eye(7, dtype=torch.float64)
    weights = MultivariateNormal(weight, dense + jitter).sample((20_000,))  # (S, C, D)
    z = torch.einsum("bd,scd->sbc", features, weights)
    p = (z + math.sqrt(0.5) * torch.randn_like(z)).softmax(-1).mean(0)
    assert ((ours.probs - p).abs() < 5 * math.sqrt(2) * ours.standard_error + 1e-4).all()


# --- errors ------------------------------------------------------------------------------------

KEY = random.key(0)
GOOD = {"n_samples": 4, "key": KEY}


@pytest.mark.parametrize(
    ("mean", "cov", "options", "text"),
    [
        (torch.zeros(3), torch.zeros(3), GOOD, "mean must have shape"),
        (torch.zeros(2, 0), torch.zeros(2, 0), GOOD, "at least one class"),
        (torch.zeros(2, 3), torch.zeros(3, 2), GOOD, "cov must have shape"),
        (torch.zeros(2, 3).int(), torch.zeros(2, 3), GOOD, "must be float32"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"key": KEY}, "n_samples and key must be given"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {**GOOD, "n_samples": 0}, "at least 1, got 0"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            {"n_samples": 3, "key": KEY, "antithetic": True},
            "must be even",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"method": "quadrature"}, "C = 2 classes"),
        (torch.zeros(2, 1), torch.zeros(2, 1), {"method": "bridge"}, "at least 2 classes"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"method": "exact"}, "method must be one of"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            {"method": "probit", "return_standard_error": True},
            "must be 'mc'",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3), {**GOOD, "key": torch.zeros(2)}, "key must be"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {**GOOD, "ids": torch.zeros(3)}, "ids must be"),
    ],
)
def test_errors(mean, cov, options, text):
    with pytest.raises((ValueError, TypeError), match=f"mc_predict: .*{text}"):
        mc_predict(mean, cov, **options)


@pytest.mark.parametrize(
    ("scale", "options", "text"),
    [
        (torch.zeros(4, 6), {}, "weight_scale must have shape"),
        (torch.zeros(4, 7), {"covariance": "kron"}, "covariance must be one of"),
        (torch.zeros(4, 7), {"covariance": "low_rank"}, "must be a pair"),
        ((torch.zeros(4, 7, 2), torch.zeros(4, 6)), {"covariance": "low_rank"}, "must have shapes"),
        (torch.zeros(4, 27), {"covariance": "dense"}, "weight_scale must have shape"),
        (torch.zeros(4, 7), {"noise_var": torch.zeros(3)}, "noise_var must be"),
        (torch.zeros(4, 7).int(), {}, "floating-point"),
    ],
)
def test_linear_errors(scale, options, text):
    with pytest.raises((ValueError, TypeError), match=f"linear_logits: .*{text}"):
        linear_logits(torch.zeros(3, 7), torch.zeros(4, 7), scale, **options)


@pytest.mark.parametrize("method", ["quadrature", "probit", "bridge"])
def test_improper_variances_are_nan_in_their_example_only(method: str):
    variances = torch.tensor([[-0.5, 1.0], [0.5, 1.0]])
    log_probs, entropy, _ = mc_predict(torch.zeros(2, 2), variances, method=method)[:3]
    assert log_probs[0].isnan().all() and entropy[0].isnan()
    assert log_probs[1].isfinite().all() and entropy[1].isfinite()


@pytest.mark.parametrize("classes", [5, 70])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
def test_many_rows_have_the_bits_of_few(device, classes, full, with_ids):
    """CUDA kernels take rows in chunks of bounded workspace: 16 KiB on the emulator."""
    if full and classes > 32:
        pytest.skip("full covariances of many classes are not the kernel's")
    rows, half = 90, 7
    g = torch.Generator().manual_seed(3)
    mean = torch.randn(rows, classes, generator=g)
    cov = torch.rand(rows, classes, generator=g) + 0.1
    if full:
        cov = torch.diag_embed(cov) + 0.05
    mean, cov = mean.to(device.torch), cov.to(device.torch)
    ids = torch.randperm(rows, generator=g).to(device.torch) if with_ids else None
    key = random.key(4, device.torch)

    def run(first, last):
        where = {"row0": first + 11} if ids is None else {"ids": ids[first:last].contiguous()}
        return mc_predict(mean[first:last], cov[first:last], n_samples=12, key=key,
                            return_standard_error=True, **where)  # fmt: skip

    whole, first, second = run(0, rows), run(0, half), run(half, rows)
    for name in ("log_probs", "entropy", "expected_entropy", "standard_error"):
        parts = torch.cat([getattr(first, name), getattr(second, name)])
        assert torch.equal(getattr(whole, name), parts), name
