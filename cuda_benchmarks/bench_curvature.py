"""Rank-k factors of a growing sum of outer products: one update of a list of layers.

    python cuda_benchmarks/bench_curvature.py --device cpu [--quick] [--vs PROVIDERS] [--save]

Providers
    svd_fp64       bayesian_lora's update: for each layer an fp64 singular value decomposition of
                   (d, k + b)
    gram_torch     the best plain PyTorch: batched Gram matrices, fp64 eigendecompositions, products
    bayes_kernels  bayes_kernels.functional.low_rank_update_

Every provider updates factors of its own again and again with the same rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import harness
import torch
from harness import (
    Family,
    Options,
    Row,
    assert_agrees,
    count_launches,
    make_row,
    time_interleaved,
)
from torch import Tensor

from bayes_kernels import functional


@dataclass(frozen=True)
class Case:
    """`layers` factors (d, k) and b new rows for each."""

    layers: int
    d: int
    k: int
    b: int

    @property
    def name(self) -> str:
        return f"{self.layers} x ({self.d}, {self.k}), {self.b} rows"


CASES = [
    Case(1, 4096, 10, 4),
    Case(128, 4096, 10, 4),
    Case(16, 4096, 10, 32),
    Case(1, 32000, 10, 4),
    Case(4, 4096, 16, 128),
]


def svd_fp64(factors: list[Tensor], rows: list[Tensor]) -> None:
    """One decomposition for each layer."""
    for factor, x in zip(factors, rows, strict=True):
        h = torch.cat([factor, x.T], dim=1).double()
        u, s, _ = torch.linalg.svd(h, full_matrices=False)
        k = factor.shape[1]
        factor.copy_(u[:, :k] * s[:k])


def gram_torch(factors: list[Tensor], rows: list[Tensor]) -> None:
    """All layers, which have one shape, in batched calls."""
    k = factors[0].shape[1]
    h = torch.stack([torch.cat([f.T, x]) for f, x in zip(factors, rows, strict=True)])
    vectors = torch.linalg.eigh((h @ h.mT).double()).eigenvectors
    new = vectors[:, :, -k:].flip(-1).to(h.dtype).mT @ h
    torch._foreach_copy_(factors, [n.T for n in new.unbind()])


PROVIDERS = {
    "svd_fp64": svd_fp64,
    "gram_torch": gram_torch,
    "bayes_kernels": functional.low_rank_update_,
}


def run_case(case: Case, options: Options) -> list[Row]:
    """One update of all layers."""
    device = options.device
    generator = torch.Generator().manual_seed(0)
    falling = 1 / torch.arange(1, case.d + 1) ** 0.5
    shape = (case.layers, case.k + case.b, case.d)
    data = (torch.randn(shape, generator=generator) * falling).to(device)
    start = [torch.zeros(case.d, case.k, device=device) for _ in range(case.layers)]
    functional.low_rank_update_(start, list(data[:, : case.k].unbind()))
    rows = [x.contiguous() for x in data[:, case.k :].unbind()]
    truth = [s.double() for s in start]
    for i, x in enumerate(rows):
        for part in x.split(32):  # as many as the op takes at once
            svd_fp64([truth[i]], [part.double()])

    providers = options.pick(PROVIDERS, OURS)
    factors = {name: [s.clone() for s in start] for name in providers}
    for name, own in factors.items():
        PROVIDERS[name](own, rows)
        if name != "bayes_kernels" and case.b > 32:
            continue  # one large truncation: another, equally valid factor
        got = [f @ (f.T @ x.T) for f, x in zip(own, rows, strict=True)]
        want = [t @ (t.T @ x.double().T) for t, x in zip(truth, rows, strict=True)]
        assert_agrees(f"{case.name} {name}", got, want, 2e-5)
    steps = {
        name: lambda update=PROVIDERS[name], own=own: update(own, rows)
        for name, own in factors.items()
    }
    times = time_interleaved(steps, device, seconds=options.time_for(2.0))
    found = [make_row("low_rank", case.name, name, "update", times, device) for name in steps]
    for row in found:
        row.launches = count_launches(steps[row.provider], device)
    return found


def run(options: Options) -> Iterator[Row]:
    """All cases."""
    for case in CASES[: 2 if options.quick else None]:
        if options.wants(case.name):
            yield from run_case(case, options)


OURS = ("bayes_kernels",)
PEERS = ("svd_fp64", "gram_torch")
FAMILY = Family("curvature", "rank-k factors of a growing Gram matrix", OURS, PEERS, run)

if __name__ == "__main__":
    sys.exit(harness.main("curvature"))
