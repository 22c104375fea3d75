"""KL schedules and the decoupled KL step against published figures, autograd and closed forms."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
import torch

from bayes_kernels import functional, random, reference
from bayes_kernels.optim import (
    DecoupledKL,
    KLSchedule,
    auto_target_std,
    flow_time,
    kl_cycle_length,
    kl_flow_,
    kl_step_,
    linear_lr_factor,
    published_kl_weights,
)

# Data set: (N, M_kl at batch 4 on one process, on two, Omega after cycles 1-4 of the divergence
# alone, Omega and M / M(0) at step 5000), with kllr 0.01, sigma_p 0.2, eps 0.05 and 6 % warm-up.
PUBLISHED = {
    "WG-S": (640, 316, 158, (0.0482, 0.0835, 0.1112, 0.1321), 0.1867, 0.131),
    "ARC-C": (1119, 393, 196, (0.0475, 0.0816, 0.1080, 0.1279), 0.1743, 0.200),
    "ARC-E": (2251, 518, 259, (0.0462, 0.0785, 0.1028, 0.1206), 0.1521, 0.305),
    "WG-M": (2558, 544, 272, (0.0460, 0.0779, 0.1017, 0.1190), 0.1475, 0.325),
    "OBQA": (4957, 706, 353, (0.0443, 0.0738, 0.0947, 0.1088), 0.1221, 0.434),
    "BoolQ": (9427, 909, 454, (0.0423, 0.0686, 0.0856, 0.0950), 0.0980, 0.537),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_trajectory(name: str) -> None:
    n_train, one, two, cycles, last, shrink = PUBLISHED[name]
    cycle = kl_cycle_length(n_train, 4)
    assert cycle == one
    assert kl_cycle_length(n_train, 4, processes=2) == two
    mean, rho = torch.full((1, 1), 0.01), torch.full((1, 1), 0.75 * 0.05)
    kl = DecoupledKL([mean], [rho], 0.2, KLSchedule("published", cycle=cycle, lr=0.01))
    omegas = []
    for step in range(5000):
        kl.step(linear_lr_factor(step, 5000, 0.06))
        if (step + 1) % cycle == 0:
            omegas.append(float(rho.double() ** 2))
    # The published formula adds 1e-6 to deviations in the divergence; the last digit may differ.
    assert omegas[:4] == pytest.approx(cycles, abs=1.2e-4)
    assert float(rho**2) == pytest.approx(last, abs=1.2e-4)
    assert float(mean / 0.01) == pytest.approx(shrink, abs=6e-4)
    assert kl.skipped > 0.9 * 5000


def test_published_weights() -> None:
    for cycle in (1, 5, 30):
        published = [Fraction(2**i, 2 ** (cycle + 1) - 1) for i in range(1, cycle + 1)]
        ours = published_kl_weights(cycle)
        ratio = float(1 - Fraction(1, 2 ** (cycle + 1)))
        assert ours.tolist() == pytest.approx([float(w) * ratio for w in published], rel=1e-15)
        assert float(ours.sum()) == 1 - 2.0**-cycle
    long = published_kl_weights(3000)
    assert torch.isfinite(long).all() and float(long.sum()) == 1.0 and float(long[0]) == 0.0
    schedule = KLSchedule("published", cycle=5, lr=0.5)
    assert [schedule.weight(t) for t in range(10)] == published_kl_weights(5).tolist() * 2
    assert schedule.step_size(4, 0.25) == 0.5 * 0.25 * 0.5


def test_lr_factor() -> None:
    values = [linear_lr_factor(t, 100, 0.06) for t in range(101)]
    assert values[0] == 0.0 and values[6] == 1.0 and values[100] == 0.0
    assert values[3] == 0.5 and max(values) == 1.0
    assert values[53] == pytest.approx(0.5)


@pytest.mark.parametrize("direction", ["elbo", "code"])
@pytest.mark.parametrize("std", ["square", "softplus", "direct"])
def test_step_is_gradient_descent(std: str, direction: str) -> None:
    torch.manual_seed(0)
    shapes = [((3, 7), (3, 7)), ((2, 5), (2, 1)), ((1, 1), (1, 1))]
    means = [torch.randn(m) * 0.1 for m, _ in shapes]
    rhos = [torch.rand(r) * 0.3 + 0.2 for _, r in shapes]
    priors = [0.2, 0.5, 1.0]
    m64 = [m.double().requires_grad_() for m in means]
    r64 = [r.double().requires_grad_() for r in rhos]
    reference.gaussian_kl(m64, r64, priors, std=std, direction=direction).backward()
    kl_step_(means, rhos, 1e-3, priors, std=std, direction=direction)
    size = float(torch.tensor(1e-3))  # the op takes its step size in fp32
    for new, old in zip([*means, *rhos], [*m64, *r64], strict=True):
        expected = (old.detach() - size * old.grad).float()
        torch.testing.assert_close(new, expected, rtol=2e-7, atol=1e-9)


def test_step_is_seen_by_autograd() -> None:
    mean = torch.full((2, 3), 0.1, requires_grad=True)
    rho = torch.full((2, 3), 0.3, requires_grad=True)
    loss = functional.gaussian_kl(mean, rho, 0.2)
    kl_step_(mean, rho, 1e-3, 0.2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert mean.is_leaf and mean.grad is None


def _noisy_run(skip: bool) -> tuple[list[torch.Tensor], int]:
    """A published schedule with an optimiser's changes in between, and awkward values."""
    key = random.key(3)
    means = [random.normal(key, (4, 9), stream=i) * 0.1 for i in range(2)]
    rhos = [
        0.035 + 0.015 * torch.rand(4, 9, generator=torch.Generator().manual_seed(1)),
        torch.tensor([[0.04], [-0.05], [0.3], [0.05]]),
    ]
    means[0][0, :3] = torch.tensor([0.0, 1e-40, -2.0])
    kl = DecoupledKL(
        means, rhos, [0.2, 0.05], KLSchedule("published", cycle=97, lr=0.01), skip=skip
    )
    for step in range(400):
        kl.step(linear_lr_factor(step, 400))
        for i in range(2):
            means[i] += 1e-4 * random.normal(random.fold_in(key, step), (4, 9), stream=i)
            rhos[i] += 1e-4 * random.normal(random.fold_in(key, step), rhos[i].shape, stream=9 + i)
    return [*means, *rhos], kl.skipped


def test_skipped_steps_change_no_bit() -> None:
    skipping, skipped = _noisy_run(True)
    taking, none = _noisy_run(False)
    assert none == 0 and 200 < skipped < 400
    for a, b in zip(skipping, taking, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("rho", [0.035, 0.2, -0.9])
def test_skip_rule_is_tight(rho: float) -> None:
    """The largest skipped weight changes nothing; a few times more changes a bit."""
    size, mean0, rho0 = 1e-3, torch.full((1, 8), 0.01), torch.full((1, 8), rho)
    for _ in range(60):
        mean, value = mean0.clone(), rho0.clone()
        kl = DecoupledKL([mean], [value], 0.2, KLSchedule("constant", lr=size))
        kl.step()
        if kl.skipped:
            break
        size /= 2
    assert kl.skipped
    kl_step_(mean, value, size, 0.2)
    assert torch.equal(mean, mean0) and torch.equal(value, rho0)
    kl_step_(mean, value, 8 * size, 0.2)
    assert not (torch.equal(mean, mean0) and torch.equal(value, rho0))


def test_no_skip_without_a_bound() -> None:
    cases = ((1e-6, "square"), (-3.0, "softplus"), (0.0, "square"), (-0.1, "direct"))
    for rho, std in cases:
        kl = DecoupledKL(
            [torch.full((1, 2), 0.1)],
            [torch.full((1, 2), rho)],
            0.2,
            KLSchedule("constant", lr=1e-30),
            std=std,
        )
        kl.step()
        assert kl.skipped == 0
    kl = DecoupledKL([torch.ones(1, 2)], [torch.zeros(1, 2)], 0.2, KLSchedule("constant", lr=1e-60))
    kl.step()  # 0 in fp32
    assert kl.skipped == 1


@pytest.mark.parametrize("steps", [40, 400])
def test_auto_follows_the_flow(steps: int) -> None:
    """Total time decides, not the number of steps: Omega = p tanh(artanh(Omega0 / p) + 4 t / p)."""
    mean, rho = torch.full((1, 3), 0.01), torch.full((1, 3), 0.04)
    factors = [linear_lr_factor(t, steps) for t in range(steps)]
    schedule = KLSchedule("auto", time=0.04, factor_sum=sum(factors))
    still_mean, still_rho = mean.clone(), rho.clone()
    kl = DecoupledKL(
        [mean, still_mean],
        [rho, still_rho],
        0.2,
        schedule,
        scales=[0.5, 0.0],
    )
    taken = sum(kl.step(f) for f in factors)
    assert taken == pytest.approx(0.04, rel=1e-12)
    assert still_mean[0, 0] == 0.01 and still_rho[0, 0] == torch.tensor(0.04)
    omega = 0.2 * math.tanh(math.atanh(0.04**2 / 0.2) + 4 * 0.02 / 0.2)
    assert float(rho[0, 0] ** 2) == pytest.approx(omega, rel=1e-4)
    assert float(mean[0, 0]) == pytest.approx(0.01 * math.exp(-0.02 / 0.04), rel=1e-4)


def test_flow_is_exact_and_stable() -> None:
    starts = torch.tensor([[0.0, 1e-4, -0.003, 0.2, 0.2**0.5, 0.9]])
    mean, rho, row = torch.full((1, 6), 0.1), starts.clone(), torch.tensor([[0.04]])
    wide = torch.full((1, 2), 0.1)
    kl_flow_([mean, wide], [rho, row], 0.03, 0.2)
    for start, end in zip(starts[0, :4].tolist(), rho[0, :4].tolist(), strict=True):
        omega = 0.2 * math.tanh(math.atanh(start**2 / 0.2) + 4 * 0.03 / 0.2)
        assert end == pytest.approx(math.copysign(omega**0.5, start), rel=1e-6)
    # Above the prior, artanh becomes arcoth.
    above = 0.2 / math.tanh(math.atanh(0.2 / 0.81) + 4 * 0.03 / 0.2)
    assert rho[0, 4] == starts[0, 4]
    assert float(rho[0, 5]) == pytest.approx(above**0.5, rel=1e-6)
    twice = 0.2 * math.tanh(math.atanh(0.04**2 / 0.2) + 8 * 0.03 / 0.2)
    assert float(row**2) == pytest.approx(twice, rel=1e-6)
    assert float(mean[0, 0]) == pytest.approx(0.1 * math.exp(-0.03 / 0.04), rel=1e-6)
    # Its rate is the gradient step's.
    slow, step = torch.full((1, 4), 0.1), torch.full((1, 4), 0.3)
    means = [slow, slow.clone()]
    rhos = [step, step.clone()]
    kl_flow_(means[0], rhos[0], 1e-6, 0.2)
    kl_step_(means[1], rhos[1], 1e-6, 0.2)
    torch.testing.assert_close(rhos[0], rhos[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(means[0], means[1], rtol=1e-6, atol=0)
    # However long and however small the start: one call, and the prior's deviation.
    kl_flow_(mean, rho, 1e6, 0.2)
    assert rho.square()[0, [0, 1, 3, 4, 5]].tolist() == pytest.approx([0.2] * 5, rel=1e-6)
    assert torch.equal(mean, torch.zeros(1, 6))
    with pytest.raises(ValueError, match="time must not be negative"):
        kl_flow_(mean, rho, -1.0, 0.2)


def test_flow_time_and_target() -> None:
    time = flow_time(0.15, 0.2, 0.002)
    reached = 0.2 * math.tanh(math.atanh(0.01) + 4 * time / 0.2)
    assert reached == pytest.approx(0.15, rel=1e-12)
    assert flow_time(0.1, 0.2, 0.15) == 0.0
    # The published setting: n = 4096, 5000 steps at peak rate 1e-4 with 6 % warm-up, N = 640.
    lr_sum = 1e-4 * sum(linear_lr_factor(t, 5000) for t in range(5000))
    assert auto_target_std(4096, lr_sum, 640) == pytest.approx(0.160, abs=0.002)
    assert auto_target_std(4096, 10.0, 640, 0.3) == pytest.approx(0.95 * 0.3)
    assert auto_target_std(1024, 0.1, 640) == pytest.approx(2 * auto_target_std(1024, 0.1, 10240))
    with pytest.raises(ValueError, match="deviations must be in"):
        flow_time(0.2, 0.2)
    with pytest.raises(ValueError, match="must be positive"):
        auto_target_std(0, 1.0, 10)


def test_state_is_json_and_continues() -> None:
    def fresh(schedule: KLSchedule) -> DecoupledKL:
        return DecoupledKL([torch.full((2, 2), 0.1)], [torch.full((2, 2), 0.05)], 0.2, schedule)

    whole = fresh(KLSchedule("published", cycle=7))
    for _ in range(20):
        whole.step()
    first = fresh(KLSchedule("published", cycle=7))
    for _ in range(10):
        first.step()
    second = fresh(KLSchedule("constant"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.means[0].copy_(first.means[0])
    second.rhos[0].copy_(first.rhos[0])
    for _ in range(10):
        second.step()
    assert torch.equal(whole.means[0], second.means[0])
    assert torch.equal(whole.rhos[0], second.rhos[0])
    with pytest.raises(ValueError, match="step and schedule"):
        second.load_state_dict({"step": 1})


def test_errors() -> None:
    mean, rho = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="kl_step_: tensors must be contiguous"):
        kl_step_(torch.zeros(3, 2).T, rho, 0.1, 0.2)
    with pytest.raises(TypeError, match="float32"):
        kl_step_(mean.half(), rho.half(), 0.1, 0.2)
    with pytest.raises(ValueError, match="same length"):
        kl_step_([mean], [rho, rho], 0.1, 0.2)
    with pytest.raises(ValueError, match="prior_std must be positive"):
        kl_step_(mean, rho, 0.1, 0.0)
    with pytest.raises(ValueError, match="kind must be one of"):
        KLSchedule("cyclic")
    with pytest.raises(ValueError, match="cycle must be at least 1"):
        published_kl_weights(0)
    with pytest.raises(ValueError, match="must be positive"):
        kl_cycle_length(0, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["weight", "tensor", "lr_factor", "prior", "flow prior", "time"])
def test_a_kl_step_that_is_not_finite_changes_nothing(what: str, bad: float) -> None:
    means, rhos = [torch.ones(2, 3)], [torch.full((2, 3), 0.1)]
    step = DecoupledKL(means, rhos, 0.2, KLSchedule("constant", 1))
    calls = {
        "weight": lambda: kl_step_(means, rhos, bad, 0.2),
        "tensor": lambda: kl_step_(means, rhos, torch.tensor(bad), 0.2),
        "lr_factor": lambda: step.step(bad),
        "prior": lambda: kl_step_(means, rhos, 0.1, [bad]),
        "flow prior": lambda: kl_flow_(means, rhos, bad, 0.1),
        "time": lambda: kl_flow_(means, rhos, 0.2, bad),
    }
    with pytest.raises(ValueError, match=r"must be (positive and )?finite|must not be negative"):
        calls[what]()
    assert step.step_count == 0
    assert torch.equal(means[0], torch.ones(2, 3)) and torch.equal(rhos[0], torch.full((2, 3), 0.1))
    before = float(rhos[0][0, 0])
    step.step(1.0)
    assert float(rhos[0][0, 0]) != before
