"""Growing sums of outer products: one update of a list of layers.

    python cuda_benchmarks curvature --device cpu [--quick] [--vs PROVIDERS] [--save]

Providers of `low_rank`, factors of rank k
    svd_fp64       bayesian_lora's update: for each layer an fp64 singular value decomposition of
                   (d, k + b), a product with a diagonal matrix, and a new factor in fp64
    gram_torch     the best plain PyTorch: batched Gram matrices, fp64 eigendecompositions, products
    bayes_kernels  bayes_kernels.functional.low_rank_update_

Providers of `kron`, dense factors (d, d) and N rows of each, with a bool mask or without
    addmm          `addmm_` in place, on a copy of the rows in fp32, masked rows filled with zeros
    bayes_kernels  bayes_kernels.functional.kron_accumulate_

Every provider updates factors of its own again and again with the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from harness import (
    Agreement,
    Family,
    Options,
    Row,
    count_launches,
    make_row,
    time_interleaved,
    tolerance,
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
    """One decomposition for each layer; the list gets new factors, in fp64."""
    for i, x in enumerate(rows):
        k = factors[i].shape[1]
        h = torch.hstack((factors[i], x.clone().to(torch.float64).T))
        u, s, _ = torch.linalg.svd(h, full_matrices=False)
        factors[i] = u[:, :k] @ torch.diag(s[:k])


def gram_torch(factors: list[Tensor], rows: list[Tensor]) -> None:
    """All layers, which have one shape, in batched calls."""
    k = factors[0].shape[1]
    h = torch.stack([torch.cat([f.T, x]) for f, x in zip(factors, rows, strict=True)])
    vectors = torch.linalg.eigh((h @ h.mT).double()).eigenvectors
    new = vectors[:, :, -k:].flip(-1).to(h.dtype).mT @ h
    torch._foreach_copy_(factors, [n.T for n in new.unbind()])


@dataclass(frozen=True)
class DenseCase:
    """`layers` factors, N rows of d numbers for each; with `masked`, a quarter of them is left out."""

    layers: int
    n: int
    d: int
    dtype: torch.dtype
    masked: bool

    @property
    def name(self) -> str:
        masked = ", mask" if self.masked else ""
        return f"{self.layers} x N={self.n} d={self.d} {str(self.dtype).removeprefix('torch.')}{masked}"


DENSE_CASES = [
    DenseCase(1, 2048, 8, torch.bfloat16, False),
    DenseCase(32, 2048, 8, torch.bfloat16, False),
    DenseCase(1, 2048, 64, torch.float32, False),
    DenseCase(1, 8192, 16, torch.bfloat16, True),
    DenseCase(1, 2048, 128, torch.bfloat16, False),
    DenseCase(1, 1024, 1024, torch.float32, False),
]


def addmm(factors: list[Tensor], rows: list[Tensor], masks: list[Tensor] | None) -> None:
    """Plain PyTorch, layer by layer: rows as fp32, what is left out as zeros, one product."""
    for i, (factor, x) in enumerate(zip(factors, rows, strict=True)):
        x = x.float()
        if masks is not None:
            x = x.masked_fill(~masks[i][:, None], 0)
        factor.addmm_(x.T, x)


def kron_accumulate(factors: list[Tensor], rows: list[Tensor], masks: list[Tensor] | None) -> None:
    """The op with the arguments of `addmm`."""
    functional.kron_accumulate_(factors, rows, masks=masks)


DENSE_PROVIDERS = {"addmm": addmm, "bayes_kernels": kron_accumulate}
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
    for parts in zip(*(x.split(32) for x in rows), strict=True):  # as many as the op takes at once
        svd_fp64(truth, list(parts))

    providers = options.pick(PROVIDERS, OURS)
    kept = {"svd_fp64": torch.float64}  # where a factor stays from update to update
    factors = {
        name: [s.to(kept.get(name, s.dtype), copy=True) for s in start] for name in providers
    }
    agreement = Agreement(case.name, OURS)
    for name, own in factors.items():
        PROVIDERS[name](own, rows)
        if name != "bayes_kernels" and case.b > 32:
            continue  # one large truncation: another, equally valid factor
        got = [f @ (f.T @ x.T.to(f.dtype)) for f, x in zip(own, rows, strict=True)]
        want = [t @ (t.T @ x.double().T) for t, x in zip(truth, rows, strict=True)]
        agreement.check(name, got, want, tolerance(torch.float32, case.d))
    steps = {
        name: lambda update=PROVIDERS[name], own=own: update(own, rows)
        for name, own in factors.items()
    }
    times = time_interleaved(steps, device, seconds=options.time_for(2.0))
    found = [
        make_row("low_rank", case.name, name, "update", times, device, agreement) for name in steps
    ]
    for row in found:
        row.launches = count_launches(steps[row.provider], device)
    return found


def run_dense_case(case: DenseCase, options: Options) -> list[Row]:
    """One update of all layers; the same rows are added again and again."""
    device = options.device
    generator = torch.Generator().manual_seed(0)
    shape = (case.layers, case.n, case.d)
    # Small, so that no number of updates takes the sums out of range.
    data = (1e-3 * torch.randn(shape, generator=generator)).to(device, case.dtype)
    rows = [x.contiguous() for x in data.unbind()]
    masks = None
    if case.masked:
        drawn = torch.rand(shape[:2], generator=generator) < 0.75
        masks = [mask.contiguous() for mask in drawn.to(device).unbind()]
    truth = []
    for i, x in enumerate(rows):
        kept = (x if masks is None else x[masks[i]]).double()
        truth.append(kept.T @ kept)

    providers = options.pick(DENSE_PROVIDERS, OURS)
    factors = {name: [torch.zeros_like(t).float() for t in truth] for name in providers}
    agreement = Agreement(case.name, OURS)
    for name, own in factors.items():
        providers[name](own, rows, masks)
        # In fp32 whatever the rows are: their products have no rounding that matters.
        agreement.check(name, own, truth, tolerance(torch.float32, case.n))
    steps = {
        name: lambda update=update, own=factors[name]: update(own, rows, masks)
        for name, update in providers.items()
    }
    times = time_interleaved(steps, device, seconds=options.time_for(1.0))
    found = [
        make_row("kron", case.name, name, "update", times, device, agreement) for name in steps
    ]
    for row in found:
        row.launches = count_launches(steps[row.provider], device)
    return found


def run(options: Options) -> Iterator[Row]:
    """All cases."""
    for case in CASES[: 2 if options.quick else None]:
        if options.wants(case.name):
            yield from run_case(case, options)
    for dense in DENSE_CASES[: 2 if options.quick else None]:
        if options.wants(dense.name):
            yield from run_dense_case(dense, options)


OURS = ("bayes_kernels",)
PEERS = ("svd_fp64", "gram_torch", "addmm")
FAMILY = Family("curvature", "growing sums of outer products", OURS, PEERS, run)
