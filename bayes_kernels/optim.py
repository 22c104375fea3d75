"""Optimiser pieces: the KL step in closed form, decoupled from the loss, and its schedules.

BLoB trains with two optimisers: Adam on the likelihood, and plain gradient descent on the
divergence of the posterior from the prior. The second needs no graph, no gradient buffers and no
accumulation: one launch changes all means and deviations in place, as decoupled weight decay does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import _library, reference
from .functional.arguments import as_list, check_number, check_tensors, check_writable
from .functional.divergence import check_divergence, prior_stds

KINDS = ("auto", "published", "constant")
_MIN_RHO = 1e-4  # BK_MIN_RHO of csrc/core/posterior.h: derivatives below it are taken at it


def kl_cycle_length(
    n_train: int, batch_size: int, *, processes: int = 1, gamma: float = 8.0
) -> int:
    """Steps of one cycle of KL weights: M_kl = int(100 N^(pi / gamma) / processes / batch).

    At least 1.

    Args:
        n_train: number of training examples N.
        batch_size: examples of one process in one optimiser step.
        processes: number of processes.
        gamma: 8 in the published runs.

    Raises:
        ValueError: a number is not positive.

    Source: published code of Wang et al., "BLoB", arXiv 2406.11675.
    """
    if min(n_train, batch_size, processes) < 1 or gamma <= 0:
        raise ValueError(
            f"kl_cycle_length: n_train, batch_size, processes and gamma must be positive, got "
            f"{n_train}, {batch_size}, {processes}, {gamma}"
        )
    return max(1, int(100 * n_train ** (math.pi / gamma) / processes / batch_size))


def published_kl_weights(cycle: int) -> Tensor:
    """Weights of the divergence in the steps of one cycle: pi_i = 2^(i - M - 1), i = 1 ... M.

    The published 2^i / (2^(M+1) - 1) differs by the factor 1 - 2^-(M+1), which is 1 in fp64 for M >
    52; the power is exact for every M, where 2^i overflows beyond 1023. The weights increase, and
    their sum is 1 - 2^-M. Weights below 2^-1074 are 0.

    Args:
        cycle: M.

    Returns:
        fp64 tensor (M,).

    Raises:
        ValueError: cycle is less than 1.
    """
    if cycle < 1:
        raise ValueError(f"published_kl_weights: cycle must be at least 1, got {cycle}")
    return torch.tensor([math.ldexp(1.0, i - cycle - 1) for i in range(1, cycle + 1)]).double()


def linear_lr_factor(step: int, steps: int, warmup: float = 0.06) -> float:
    """Learning rate over its peak: linear warm-up over int(warmup * steps), linear decay to 0."""
    rising = int(steps * warmup)
    if step < rising:
        return step / max(1, rising)
    return max(0.0, (steps - step) / max(1, steps - rising))


@dataclass(frozen=True)
class KLSchedule:
    """Step size of the divergence at each optimiser step t, for a rate factor f(t) in [0, 1].

    * "published": lr * f(t) * pi_i, i = t mod cycle + 1, with `published_kl_weights`.
    * "constant": lr * f(t) / cycle, the published code without reweighting.
    * "auto": time * f(t) / factor_sum: the gradient flow of the divergence for a total `time`,
      however many steps there are; see `flow_time` and `auto_target_std`.

    Args:
        kind: one of these.
        cycle: M_kl, see `kl_cycle_length` ("published", "constant").
        lr: learning rate of the KL step; 0.01 in the published runs.
        time: total step size ("auto").
        factor_sum: sum of f(t) over the run ("auto").

    Raises:
        ValueError: an option is out of range.

    Source: Wang et al., "BLoB", arXiv 2406.11675, and its code, for "published".
    """

    kind: str = "auto"
    cycle: int = 1
    lr: float = 0.01
    time: float = 1.0
    factor_sum: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"KLSchedule: kind must be one of {KINDS}, got {self.kind!r}; choose one"
            )
        if self.cycle < 1 or self.lr < 0 or self.time < 0 or self.factor_sum <= 0:
            raise ValueError(
                "KLSchedule: cycle must be at least 1, lr and time not negative, factor_sum "
                f"positive, got {self.cycle}, {self.lr}, {self.time}, {self.factor_sum}"
            )

    def weight(self, step: int) -> float:
        """Weight of the divergence beside the likelihood's at a step, without lr and f."""
        if self.kind == "published":
            return math.ldexp(1.0, step % self.cycle - self.cycle)
        if self.kind == "constant":
            return 1.0 / self.cycle
        return self.time / self.factor_sum

    def step_size(self, step: int, lr_factor: float = 1.0) -> float:
        """Factor of the divergence's gradient at a step."""
        rate = 1.0 if self.kind == "auto" else self.lr
        return rate * lr_factor * self.weight(step)


# Deviation that "auto" aims at, over sqrt(in_features) * (sum of rates) * (640 / N)^(1/4). Chosen
# on validation rows; docs/blob.md has the figures.
AUTO_KAPPA = 0.01
# Largest share of the prior's deviation that it aims at.
AUTO_CEILING = 0.95


def auto_target_std(in_features: int, lr_sum: float, n_train: int, prior_std: float = 0.2) -> float:
    """Deviation Omega* that the "auto" schedule gives weights about which the data says nothing.

        Omega* = min(0.01 sqrt(n) (sum_t lr_t) (640 / N)^(1/4), 0.95 sigma_p)

    Adam moves each mean by up to sum_t lr_t, so that the learned part of a layer's rank-space
    signal grows like |x| sqrt(n) sum_t lr_t, while its noise has the deviation |x| Omega: the rule
    fixes their ratio, and lets it fall slowly with the number of examples. It is a scaling
    argument, not a derivation. At the size of the published runs (n = 4096, 5000 steps at peak rate
    1e-4, N = 640) it gives 0.160, where the published schedule ends at 0.187. More noise lowers ECE
    further and costs accuracy on hard tasks; choose `kl_time` on validation data where it matters.

    Args:
        in_features: n, columns of A.
        lr_sum: sum of the main optimiser's learning rates over the run.
        n_train: N.
        prior_std: sigma_p.

    Raises:
        ValueError: a number is not positive.
    """
    if min(in_features, n_train) < 1 or lr_sum < 0 or prior_std <= 0:
        raise ValueError(
            "auto_target_std: in_features, n_train and prior_std must be positive, lr_sum not "
            f"negative, got {in_features}, {n_train}, {prior_std}, {lr_sum}"
        )
    target = AUTO_KAPPA * math.sqrt(in_features) * lr_sum * (640 / n_train) ** 0.25
    return min(target, AUTO_CEILING * prior_std)


def flow_time(target_std: float, prior_std: float, start_std: float = 0.0) -> float:
    """Time in which the gradient flow of the divergence takes Omega = rho^2 from start to target.

        dOmega/dt = 4 (1 - Omega^2 / sigma_p^2):  Omega(t) = sigma_p tanh(artanh(Omega(0) / sigma_p)
        + 4 t / sigma_p);  in the same time means shrink by exp(-t / sigma_p^2)

    Raises:
        ValueError: a deviation is not in [0, prior_std).
    """
    if not (0 <= start_std < prior_std and 0 <= target_std < prior_std):
        raise ValueError(
            f"flow_time: deviations must be in [0, prior_std = {prior_std}), got {start_std} and "
            f"{target_std}"
        )
    rise = math.atanh(target_std / prior_std) - math.atanh(start_std / prior_std)
    return max(0.0, prior_std / 4 * rise)


def kl_flow_(
    means: Tensor | Sequence[Tensor],
    rhos: Tensor | Sequence[Tensor],
    time: float,
    prior_std: float | Sequence[float],
) -> None:
    """Gradient flow of the divergence for a time, in place, exactly; for Omega = rho^2.

        M <- M exp(-t / p^2);  Omega <- p (Omega + p k) / (p + Omega k), k = tanh(4 t / p)

    The second is p tanh(artanh(Omega / p) + 4 t / p), and holds above p too. Unlike a gradient step
    it is stable for every time and every deviation, 0 included. Evaluated in fp64 and rounded once;
    rho keeps its sign. Cost: about a dozen launches for each device and prior, and temporary fp64
    copies of means and deviations.

    Args:
        means, rhos, prior_std: as in `functional.gaussian_kl`. Shards of FSDP2 (DTensor) are
            changed where they lie. Where one rho serves several means, its time counts that often.
        time: t.

    Raises:
        ValueError, TypeError: lists, shapes or dtypes do not fit, or the time is negative.
    """
    mean_list: list[Tensor] = as_list("kl_flow_", "means", means)
    rho_list: list[Tensor] = as_list("kl_flow_", "rhos", rhos)
    priors = _priors("kl_flow_", mean_list, rho_list, prior_std)
    if not 0 <= time < math.inf:
        raise ValueError(f"kl_flow_: time must not be negative, got {time}")
    groups: dict[tuple[torch.device, float, float], list[int]] = {}
    for i, (mean, rho) in enumerate(zip(mean_list, rho_list, strict=True)):
        shared = mean.numel() / max(1, rho.numel())
        groups.setdefault((mean.device, priors[i], shared), []).append(i)
    with torch.no_grad():
        for (_, prior, shared), indices in groups.items():
            local_means = [_local(mean_list[i]) for i in indices]
            local_rhos = [_local(rho_list[i]) for i in indices]
            check_divergence("kl_flow_", local_means, local_rhos, prior, "square", "elbo")
            check_writable("kl_flow_", "means and rhos", [*local_means, *local_rhos])
            flat = _flat64(local_means)
            _copy_back(local_means, flat.mul_(math.exp(-time / prior**2)))
            flat = _flat64(local_rhos)
            rise = math.tanh(4 * time * shared / prior)
            omega = flat.square()
            root = omega.add(prior * rise).div_(omega.mul_(rise / prior).add_(1)).sqrt_()
            _copy_back(local_rhos, root.copysign_(flat))
    sharded = [t for t in (*mean_list, *rho_list) if hasattr(t, "to_local")]
    if sharded:
        torch.autograd.graph.increment_version(sharded)


def _flat64(tensors: list[Tensor]) -> Tensor:
    return reference.wide(torch.cat([t.reshape(-1) for t in tensors]))  # without gradients


def _copy_back(tensors: list[Tensor], flat: Tensor) -> None:
    parts = flat.to(tensors[0].dtype).split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])


def kl_step_(
    means: Tensor | Sequence[Tensor],
    rhos: Tensor | Sequence[Tensor],
    weight: float | Tensor,
    prior_std: float | Sequence[float],
    *,
    std: str = "square",
    direction: str = "elbo",
) -> None:
    """One gradient step on the divergence, in place: M -= weight dKL/dM, rho -= weight dKL/drho.

    With "square" and "elbo": dKL/dM = M / p^2 and dKL/drho = -2 / rho + 2 rho^3 / p^2. Evaluated in
    fp64 for each element and rounded once. One launch for each device; nothing is kept.

    Args:
        means, rhos, prior_std, std, direction: as in `functional.gaussian_kl`. Shards of FSDP2
            (DTensor) are changed where they lie.
        weight: step size; a 0-dim tensor in the dtype of the means avoids a copy to the device.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes or options do not fit, or a weight that the host
            knows is not finite.

    Source: Wang et al., "BLoB", arXiv 2406.11675; its second optimiser.
    """
    mean_list: list[Tensor] = as_list("kl_step_", "means", means)
    rho_list: list[Tensor] = as_list("kl_step_", "rhos", rhos)
    if not isinstance(weight, Tensor):
        check_number("kl_step_", "weight", weight)
    priors = _priors("kl_step_", mean_list, rho_list, prior_std)
    known = not isinstance(weight, Tensor) or weight.device.type == "cpu"
    if known and not math.isfinite(float(weight)):
        raise ValueError(
            f"kl_step_: weight must be finite, got {float(weight)}, which no mean or rho would survive"
        )
    by_device: dict[torch.device, list[int]] = {}
    for i, mean in enumerate(mean_list):
        by_device.setdefault(mean.device, []).append(i)
    with torch.no_grad():
        for device, indices in by_device.items():
            local_means = [_local(mean_list[i]) for i in indices]
            local_rhos = [_local(rho_list[i]) for i in indices]
            local_priors = [priors[i] for i in indices]
            dtype = local_means[0].dtype
            if isinstance(weight, Tensor):
                size = weight.to(device=device, dtype=dtype)
            else:
                size = torch.full((), weight, dtype=dtype, device=device)
            both = [*local_means, *local_rhos]
            if not _library.has_kernels(local_means[0]):
                _check_step(local_means, local_rhos, local_priors, std, direction)
                _kl_step(both, size, local_priors, std, direction)
                continue
            try:
                _library.ops.gaussian_kl_step_(
                    local_means, local_rhos, size, local_priors, std, direction
                )
            except RuntimeError:  # of an argument: the op finds that in less time
                _check_step(local_means, local_rhos, local_priors, std, direction)
                raise
            torch.autograd.graph.increment_version(both)
    sharded = [t for t in (*mean_list, *rho_list) if hasattr(t, "to_local")]
    if sharded:
        torch.autograd.graph.increment_version(sharded)


def _check_step(
    means: list[Tensor], rhos: list[Tensor], priors: list[float], std: str, direction: str
) -> None:
    """Raise unless `kl_step_` takes the tensors of one device."""
    check_divergence("kl_step_", means, rhos, priors, std, direction)
    for tensor in (*means, *rhos):
        if not tensor.is_contiguous():
            raise ValueError(
                f"kl_step_: tensors must be contiguous, got strides {tensor.stride()} for shape "
                f"{tuple(tensor.shape)}; call .contiguous() when they are made"
            )
    check_writable("kl_step_", "means and rhos", [*means, *rhos])


def _kl_step(
    tensors: list[Tensor], weight: Tensor, priors: list[float], std: str, direction: str
) -> None:
    """The step of means, then rhos, by PyTorch's own operations: for devices without kernels."""
    count = len(tensors) // 2
    with torch.enable_grad():
        leaves = [reference.wide(t.detach()).clone().requires_grad_() for t in tensors]
        divergence = reference.gaussian_kl(
            leaves[:count], leaves[count:], priors, std=std, direction=direction
        )
    for t, leaf, slope in zip(
        tensors, leaves, torch.autograd.grad(divergence, leaves), strict=True
    ):
        t.copy_(leaf.detach() - weight.to(slope) * slope)


def _priors(
    op: str, means: list[Tensor], rhos: list[Tensor], prior_std: float | Sequence[float]
) -> list[float]:
    """One prior for each tensor; checks that the lists hold tensors and have one length."""
    if not means or len(means) != len(rhos):
        raise ValueError(
            f"{op}: means and rhos must be lists of the same length, at least 1, got {len(means)} "
            f"and {len(rhos)}"
        )
    check_tensors(op, "means", means)
    check_tensors(op, "rhos", rhos)
    priors = prior_stds(op, prior_std)
    if len(priors) == 1:
        return priors * len(means)
    if len(priors) != len(means):
        raise ValueError(
            f"{op}: prior_std must be one number or one for each of the {len(means)} tensors, got "
            f"{len(priors)}"
        )
    return priors


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


class DecoupledKL:
    """The KL step of a set of posteriors, with its schedule: call `step` after each optimiser step.

    Steps that cannot change a bit are skipped. In the published schedule nearly all weights are
    that small, and a step changes nothing where |weight dKL/dp| < |p| 2^-25 for every fp32
    parameter p (half of the smaller spacing of numbers beside p). For means dKL/dM / M = 1 /
    sigma_p^2. For deviations |dKL/drho / rho| <= 2 max(1 / min Omega, max Omega / sigma_p^2) with
    "square". The extremes of Omega are measured only where the weight is so small that a skip is
    likely, which costs one read of rho and one synchronisation; a weight that is 0 in fp32 needs
    neither. "softplus" and "code" have no such bound and skip zero weights only.

    With the schedule "auto", "square" and "elbo" a step follows the gradient flow exactly
    (`kl_flow_`); all others are gradient steps (`kl_step_`).

    Args:
        means, rhos, prior_std, std, direction: as in `functional.gaussian_kl`.
        schedule: step sizes.
        scales: factor of the step size for each tensor; None for 1.
        skip: False takes every step.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes or options do not fit.
    """

    def __init__(
        self,
        means: Sequence[Tensor],
        rhos: Sequence[Tensor],
        prior_std: float | Sequence[float],
        schedule: KLSchedule,
        *,
        std: str = "square",
        direction: str = "elbo",
        scales: Sequence[float] | None = None,
        skip: bool = True,
    ) -> None:
        self.means, self.rhos = list(means), list(rhos)
        self.prior_std = _priors("DecoupledKL", self.means, self.rhos, prior_std)
        self.schedule, self.std, self.direction, self.skip = schedule, std, direction, skip
        self.scales = [1.0] * len(self.means) if scales is None else [float(c) for c in scales]
        if len(self.scales) != len(self.means) or min(self.scales) < 0:
            raise ValueError(
                f"DecoupledKL: scales must be one number, not negative, for each of the "
                f"{len(self.means)} tensors, got {self.scales}"
            )
        # One launch for each distinct scale.
        self._groups = {
            scale: [i for i, other in enumerate(self.scales) if other == scale]
            for scale in dict.fromkeys(self.scales)
        }
        self.step_count = 0
        self.skipped = 0
        self._likely_bound: float | None = None

    def step(self, lr_factor: float = 1.0, step: int | None = None) -> float:
        """Take the step of the schedule.

        Args:
            lr_factor: learning rate of the main optimiser over its peak.
            step: number of the step, from 0; None for the next one.

        Returns:
            The step size, before the tensors' scales.

        Raises:
            ValueError: the step size is not finite; nothing has changed then.
        """
        number = self.step_count if step is None else step
        size = self.schedule.step_size(number, lr_factor)
        if not math.isfinite(size):
            raise ValueError(
                f"DecoupledKL.step: the step size must be finite, got {size} at step {number} for "
                f"lr_factor {lr_factor}; look at the learning rate's schedule"
            )
        self.step_count = number + 1
        if self.skip and self._changes_nothing(size):
            self.skipped += 1
            return size
        for scale, indices in self._groups.items():
            if scale == 0.0:
                continue
            means, rhos = [self.means[i] for i in indices], [self.rhos[i] for i in indices]
            priors = [self.prior_std[i] for i in indices]
            if (self.schedule.kind, self.std, self.direction) == ("auto", "square", "elbo"):
                kl_flow_(means, rhos, size * scale, priors)
            else:
                kl_step_(means, rhos, size * scale, priors, std=self.std, direction=self.direction)
        return size

    def _changes_nothing(self, size: float) -> bool:
        dtype = self.means[0].dtype
        size *= max(self.scales)
        if float(torch.tensor(size, dtype=dtype)) == 0.0:
            return True
        if self.direction != "elbo" or self.std == "softplus":
            return False
        # A millionth of slack covers the rounding of the bound itself.
        half_ulp = (2.0**-54 if dtype == torch.float64 else 2.0**-25) * (1 - 1e-6)
        if size / min(self.prior_std) ** 2 >= half_ulp:
            return False
        if self._likely_bound is not None and size * self._likely_bound >= half_ulp * 8:
            return False
        self._likely_bound = self._rho_bound()
        return size * self._likely_bound < half_ulp

    def _rho_bound(self) -> float:
        """Largest |dKL/drho / rho| over all elements, or more."""
        items = [i for i, rho in enumerate(self.rhos) if _local(rho).numel()]
        if not items:
            return 0.0
        with torch.no_grad():
            rhos = [_local(self.rhos[i]) for i in items]
            if self.std == "square":  # only |rho| matters; "direct" has no bound below 0
                rhos = [rho.abs() for rho in rhos]
            extremes = [torch.stack(torch.aminmax(rho)) for rho in rhos]
            table = torch.stack([pair.double().to(extremes[0].device) for pair in extremes])
        worst = 0.0
        for i, (low, high) in zip(items, table.tolist(), strict=True):
            if not low >= _MIN_RHO:
                return math.inf
            prior = self.prior_std[i]
            if self.std == "square":
                ratio = 2 * max(1 / low**2, high**2 / prior**2)
            else:
                ratio = max(1 / low**2, 1 / prior**2)
            # One rho may serve a whole row of means.
            worst = max(worst, ratio * (self.means[i].numel() / self.rhos[i].numel()))
        return worst

    def state_dict(self) -> dict[str, Any]:
        """Step and schedule as plain numbers and words, ready for JSON: what a resumed run needs."""
        return {"step": self.step_count, "schedule": asdict(self.schedule)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: the state has other keys.
        """
        try:
            self.step_count = int(state["step"])
            self.schedule = KLSchedule(**state["schedule"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"DecoupledKL: state must have step and schedule, got {sorted(state)}: {error}"
            ) from None
