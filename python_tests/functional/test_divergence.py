"""gaussian_kl: values, gradients and the in-place step against PyTorch and torch.distributions."""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import assert_no_worse_than_torch
from torch.distributions import Normal, kl_divergence

from bayes_kernels import _library, reference
from bayes_kernels.functional import gaussian_kl

SHAPES = [(1, 1), (3, 7), (8, 384), (5, 1025), (0, 4), (17,)]


def lists(device, dtype=torch.float32, *, rows_share: bool = False, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    means, rhos = [], []
    for shape in SHAPES:
        rho_shape = (shape[0], 1) if rows_share and len(shape) == 2 else shape
        mean = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
        rho = torch.rand(rho_shape, generator=generator, dtype=torch.float64) * 0.4 + 0.05
        means.append(mean.to(device.torch, dtype).requires_grad_())
        rhos.append(rho.to(device.torch, dtype).requires_grad_())
    return means, rhos


def as_dtype(tensors, dtype):
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


OPTIONS = list(itertools.product(("square", "softplus", "direct"), ("elbo", "code"), (False, True)))


@pytest.mark.parametrize(("std", "direction", "rows_share"), OPTIONS)
def test_value_and_gradients(device, std: str, direction: str, rows_share: bool):
    means, rhos = lists(device, rows_share=rows_share)
    priors = [0.2, 0.1, 0.3, 0.2, 1.0, 0.5]
    truth_in = as_dtype(means, torch.float64), as_dtype(rhos, torch.float64)
    torch_in = as_dtype(means, torch.float32), as_dtype(rhos, torch.float32)
    ours = gaussian_kl(means, rhos, priors, std=std, direction=direction)
    truth = reference.gaussian_kl(*truth_in, priors, std=std, direction=direction)
    same = reference.gaussian_kl(*torch_in, priors, std=std, direction=direction)
    assert ours.dtype == torch.float32 and ours.shape == ()
    assert_no_worse_than_torch(ours, same, truth, what="value")
    grads = [
        torch.autograd.grad(3 * value, [*m, *r])
        for value, (m, r) in ((ours, (means, rhos)), (same, torch_in), (truth, truth_in))
    ]
    for i, (a, b, t) in enumerate(zip(*grads, strict=True)):
        assert_no_worse_than_torch(a, b, t, what=f"gradient {i}")


def test_matches_torch_distributions():
    mean, rho = torch.randn(4, 9, dtype=torch.float64), torch.rand(4, 9, dtype=torch.float64) + 0.1
    expected = kl_divergence(Normal(mean, rho**2), Normal(0.0, torch.tensor(0.7))).sum()
    torch.testing.assert_close(gaussian_kl(mean, rho, 0.7), expected)
    reverse = kl_divergence(Normal(torch.zeros(4, 9).double(), 0.7), Normal(mean, rho**2)).sum()
    torch.testing.assert_close(gaussian_kl(mean, rho, 0.7, direction="code"), reverse)


def test_zero_at_the_prior(device):
    mean = torch.zeros(3, 5, device=device.torch)
    rho = torch.full((3, 5), 0.5, device=device.torch)
    assert abs(gaussian_kl(mean, rho, 0.25).item()) < 1e-6


@pytest.mark.parametrize("std", ["square", "softplus", "direct"])
@pytest.mark.parametrize("direction", ["elbo", "code"])
def test_gradcheck(std: str, direction: str):
    torch.manual_seed(0)
    mean = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rho = (torch.rand(3, 4, dtype=torch.float64) + 0.3).requires_grad_()
    row = (torch.rand(3, 1, dtype=torch.float64) + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, r, s: gaussian_kl([m, m], [r, s], [0.5, 0.8], std=std, direction=direction),
        (mean, rho, row),
    )


@pytest.mark.parametrize("rows_share", [False, True])
def test_step_is_the_gradient_applied(device, rows_share: bool):
    means, rhos = lists(device, rows_share=rows_share)
    weight = 1e-3
    grads = torch.autograd.grad(gaussian_kl(means, rhos, 0.2), [*means, *rhos])
    expected = [
        (t.detach().double() - weight * g.double()).float()
        for t, g in zip([*means, *rhos], grads, strict=True)
    ]
    with torch.no_grad():
        _library.ops.gaussian_kl_step_(
            means, rhos, torch.tensor(weight, device=device.torch), [0.2], "square", "elbo"
        )
    for i, (ours, e) in enumerate(zip([*means, *rhos], expected, strict=True)):
        torch.testing.assert_close(ours.detach(), e, rtol=1e-6, atol=1e-9, msg=f"tensor {i}")


def test_vanishing_deviation_gives_finite_gradients(device):
    mean = torch.zeros(2, 3, device=device.torch, requires_grad=True)
    rho = torch.zeros(2, 3, device=device.torch, requires_grad=True)
    value = gaussian_kl(mean, rho, 0.2)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(rho.grad).all()


def test_same_bits_for_any_number_of_threads():
    mean, rho = torch.randn(64, 4096), torch.rand(64, 4096) + 0.1
    before = torch.get_num_threads()
    try:
        values = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            values.append(_library.ops.gaussian_kl([mean], [rho], [0.2], "square", "elbo").item())
    finally:
        torch.set_num_threads(before)
    assert len(set(values)) == 1


def test_many_tensors_in_one_call(device):
    means = [torch.full((2, 3 + i % 5), 0.01 * i, device=device.torch) for i in range(300)]
    rhos = [torch.full((2, 3 + i % 5), 0.3, device=device.torch) for i in range(300)]
    expected = reference.gaussian_kl([m.double() for m in means], [r.double() for r in rhos], 0.2)
    torch.testing.assert_close(gaussian_kl(means, rhos, 0.2).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("number", [71, 581])
def test_lists_beyond_one_launch(device, number: int):
    """Around what the arguments of a kernel hold: the sum goes on from launch to launch."""
    means = [torch.full((1 + i % 3,), 0.01 * i, device=device.torch) for i in range(number)]
    rhos = [torch.full((1 + i % 3,), 0.2 + 1e-3 * i, device=device.torch) for i in range(number)]
    wide = [m.double() for m in means], [r.double().requires_grad_() for r in rhos]
    expected = reference.gaussian_kl(*wide, 0.2)
    slopes = torch.autograd.grad(expected, wide[1])
    rhos = [r.requires_grad_() for r in rhos]
    value = gaussian_kl(means, rhos, 0.2)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    for ours, slope in zip(torch.autograd.grad(value, rhos), slopes, strict=True):
        torch.testing.assert_close(ours.double(), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows_share", [False, True])
@pytest.mark.parametrize("direction", ["elbo", "code"])
def test_same_bits_wherever_the_tensors_lie(device, dtype, rows_share: bool, direction: str):
    """At every offset from a 16-byte boundary, with sums over several blocks and odd ends."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 4 * 700), (1, 4096 + 4 * 256 + 3), (2, 4 * 1024 + 2)]
    values = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    deviations = [
        torch.rand((s[0], 1) if rows_share else s, generator=generator, dtype=dtype) + 0.1
        for s in shapes
    ]

    def placed(t: torch.Tensor, offset: int) -> torch.Tensor:
        room = torch.empty(t.numel() + 8, dtype=dtype, device=device.torch)
        start = -room.data_ptr() % 16 // room.element_size() + offset
        return room[start : start + t.numel()].view(t.shape).copy_(t)

    found = []
    for offsets in ((0, 0), (1, 1), (0, 1), (3, 2)):
        means, rhos = ([placed(t, o) for t in ts] for ts, o in zip((values, deviations), offsets))  # noqa: B905
        weight = torch.full((), 0.3, dtype=dtype, device=device.torch)
        ops, options = _library.ops, ([0.2], "square", direction)
        value = ops.gaussian_kl(means, rhos, *options)
        gradients = ops.gaussian_kl_backward(weight, means, rhos, *options)
        ops.gaussian_kl_step_(means, rhos, weight, *options)
        found.append([value, *gradients[0], *gradients[1], *means, *rhos])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_list_of_empty_tensors_is_zero(device):
    empty = torch.empty(0, 4, device=device.torch)
    assert gaussian_kl([empty, empty], [empty, empty], 0.2).item() == 0.0


@pytest.mark.parametrize(
    ("means", "rhos", "options", "text"),
    [
        ([], [], {}, "lists of the same length"),
        ([torch.ones(2)], [torch.ones(3)], {}, "rho must have shape"),
        ([torch.ones(2)], [torch.ones(2)], {"prior_std": -1.0}, "prior_std must be positive"),
        ([torch.ones(2)], [torch.ones(2)], {"std": "cube"}, "std must be one of"),
        ([torch.ones(2)], [torch.ones(2)], {"direction": "up"}, "direction must be"),
        ([torch.ones(2).half()], [torch.ones(2).half()], {}, "must be float32"),
        ([torch.ones(2, 0)], [torch.ones(2, 1)], {}, "means must have columns beside a rho"),
    ],
)
def test_errors(means, rhos, options, text):
    options = dict(options)
    with pytest.raises((ValueError, TypeError), match=f"gaussian_kl: .*{text}"):
        gaussian_kl(means, rhos, options.pop("prior_std", 0.2), **options)
