"""Mean softmax of Gaussian logits: Monte Carlo in registers against a materialised tensor of samples.

    python cuda_benchmarks predict --device cpu [--quick] [--vs PROVIDERS] [--save]

Providers
    materialised   softmax over a (samples, B, C) tensor, means of p and of -p log p, entropy of the mean
    looped         the same, 10 samples at a time: less memory, more calls
    peer           (B, C, C) covariances only: covariance expanded to (samples, B, C, C) and factorised
                   for every sample, as published Laplace-LoRA code does
    antithetic     bayes_kernels.functional.mc_predict with mirrored pairs of samples
    bayes_kernels  bayes_kernels.functional.mc_predict

All give log-probabilities, entropy and expected entropy. Noise is drawn within the measured time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from harness import (
    Agreement,
    Family,
    Options,
    Row,
    count_launches,
    make_row,
    peak_bytes,
    time_interleaved,
    tolerance,
)
from torch import Tensor

import bayes_kernels
from bayes_kernels import reference

Result = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    samples: int
    rows: int
    classes: int
    full: bool = False
    variance: float = 1.0

    @property
    def name(self) -> str:
        kind = "full" if self.full else "diagonal"
        wide = "" if self.variance == 1 else f" variance {self.variance:g}"
        return f"S{self.samples} B{self.rows} C{self.classes} {kind}{wide}"


def cases(quick: bool) -> list[Case]:
    barred = [Case(1000, 64, 5), Case(100, 16, 32000)]
    if quick:
        return barred
    return [
        *barred,
        Case(1000, 64, 32),
        Case(20, 4096, 5),
        Case(1000, 64, 5, variance=100.0),
        Case(100, 16, 32000, variance=100.0),
        Case(10000, 4, 5, full=True),
    ]


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mean = 2 * torch.randn(case.rows, case.classes, generator=generator)
    if case.full:
        a = torch.randn(case.rows, case.classes, case.classes, generator=generator)
        cov = a @ a.mT * (case.variance / case.classes)
    else:
        cov = case.variance * torch.rand(case.rows, case.classes, generator=generator)
    return mean.to(device), cov.to(device)


# --- providers ---------------------------------------------------------------------------------


def logits(mean: Tensor, cov: Tensor, samples: int) -> Tensor:
    eps = torch.randn(samples, *mean.shape, device=mean.device)
    if cov.dim() == 2:
        return mean + cov.sqrt() * eps
    return mean + (torch.linalg.cholesky(cov) @ eps[..., None]).squeeze(-1)


def entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def summary(z: Tensor) -> Result:
    p = torch.softmax(z, -1)
    mean = p.mean(0)
    return mean.log(), entropy(mean), entropy(p).mean(0)


def materialised(mean: Tensor, cov: Tensor, samples: int) -> Result:
    return summary(logits(mean, cov, samples))


def looped(mean: Tensor, cov: Tensor, samples: int) -> Result:
    total, expected = torch.zeros_like(mean), mean.new_zeros(mean.shape[0])
    for _ in range(0, samples, 10):
        p = torch.softmax(logits(mean, cov, 10), -1)
        total += p.sum(0)
        expected += entropy(p).sum(0)
    total /= samples
    return total.log(), entropy(total), expected / samples


def peer(mean: Tensor, cov: Tensor, samples: int) -> Result:
    factor = torch.linalg.cholesky(cov.expand(samples, *cov.shape))
    eps = torch.randn(samples, *mean.shape, 1, device=mean.device)
    return summary(mean + (factor @ eps).squeeze(-1))


def ours(mean: Tensor, cov: Tensor, samples: int, key: Tensor, antithetic: bool = False) -> Result:
    return bayes_kernels.functional.mc_predict(
        mean, cov, n_samples=samples, key=key, antithetic=antithetic
    )[:3]  # type: ignore[return-value]


def check(case: Case, mean: Tensor, cov: Tensor, key: Tensor) -> Agreement:
    """On few rows: ours at the same noise, PyTorch's formula on it, against the fp64 definition."""
    few, samples = min(case.rows, 2), min(case.samples, 100)
    m, c = mean[:few], cov[:few]
    eps = reference.logit_noise(key, few, samples, case.classes)
    truth = reference.mc_predict(m.double(), c.double(), eps.double())[:3]
    allowed = tolerance(torch.float32, case.classes + samples)
    agreement = Agreement(case.name, OURS)
    agreement.check("bayes_kernels", ours(m, c, samples, key), truth, allowed)
    z = reference.sampled_logits(m, c, eps).transpose(0, 1)
    got, want = summary(z), truth
    got, want = ((r[0].exp(), *r[1:]) for r in (got, want))
    agreement.check("materialised", got, want, allowed)
    return agreement


# --- runs --------------------------------------------------------------------------------------

OURS = ("bayes_kernels", "antithetic")
PEERS = ("materialised", "looped", "peer")


@torch.no_grad()
def run_case(case: Case, options: Options) -> list[Row]:
    """One prediction of all providers."""
    device = options.device
    mean, cov = inputs(case, device)
    key = bayes_kernels.random.key(1, device)
    agreement = check(case, mean, cov, key)
    steps: dict[str, Callable[[], object]] = {
        "materialised": lambda: materialised(mean, cov, case.samples),
        "looped": lambda: looped(mean, cov, case.samples),
        "antithetic": lambda: ours(mean, cov, case.samples, key, True),
        "bayes_kernels": lambda: ours(mean, cov, case.samples, key),
    }
    if case.full:
        steps["peer"] = lambda: peer(mean, cov, case.samples)
    steps = options.pick(steps, OURS)
    times = time_interleaved(steps, device, seconds=options.time_for(3.0))
    rows = []
    for name, step in steps.items():
        row = make_row("predict", case.name, name, "forward", times, device, agreement)
        row.peak_bytes = peak_bytes(step, device)
        row.launches = count_launches(step, device)
        rows.append(row)
    return rows


def run(options: Options) -> Iterator[Row]:
    """All cases."""
    if options.shape is not None:
        s = options.shape
        yield from run_case(Case(s["S"], s["B"], s["C"]), options)
        return
    for case in cases(options.quick):
        if options.wants(case.name):
            yield from run_case(case, options)


LETTERS = ("S", "B", "C")
FAMILY = Family("predict", "mean softmax of Gaussian logits", OURS, PEERS, run, letters=LETTERS)
