"""Rank-k factors of a growing sum of outer products: one update of a list of layers.

    python cuda_benchmarks/bench_curvature.py --device cpu [--quick] [--json PATH] [--save]

Providers
    svd_fp64       bayesian_lora's update: for each layer an fp64 singular value decomposition of
                   (d, k + b)
    gram_torch     the best plain PyTorch: batched Gram matrices, fp64 eigendecompositions, products
    bayes_kernels  bayes_kernels.functional.low_rank_update_

Every provider updates factors of its own again and again with the same rows.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from harness import (
    Row,
    assert_agrees,
    make_row,
    print_table,
    results_folder,
    save_rows,
    time_interleaved,
)
from torch import Tensor

from bayes_kernels import functional

# Time of `bayes_kernels` over that of `svd_fp64`, at most, for d = 4096, k = 10, b = 4.
BARS = {
    "cpu": [("1 x (4096, 10), 4 rows", 1 / 8), ("128 x (4096, 10), 4 rows", 1 / 8)],
    "cuda": [("128 x (4096, 10), 4 rows", 1 / 50)],
}


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


def run(case: Case, device: str, seconds: float) -> list[Row]:
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

    factors = {name: [s.clone() for s in start] for name in PROVIDERS}
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
    times = time_interleaved(steps, device, seconds=seconds)
    return [make_row("low_rank", case.name, name, "update", times[name], device) for name in times]


def report(rows: list[Row], device: str) -> None:
    table = []
    for case in dict.fromkeys(r.case for r in rows):
        group = {r.provider: r for r in rows if r.case == case}
        ours = group["bayes_kernels"].p50_us
        for name, row in group.items():
            table.append(
                (
                    case,
                    name,
                    f"{row.p20_us:.0f}",
                    f"{row.p50_us:.0f}",
                    f"{row.p80_us:.0f}",
                    f"{row.p50_us / ours:.2f}",
                )
            )
    print_table(("case", "provider", "p20 us", "p50 us", "p80 us", "x ours"), table)
    print()
    for case, bar in BARS[device]:
        group = {r.provider: r.p50_us for r in rows if r.case == case}
        ratio = group["bayes_kernels"] / group["svd_fp64"]
        print(
            f"{case}: bayes_kernels / svd_fp64 {ratio:.3f}, at most {bar:.3f}: "
            f"{'met' if ratio <= bar else 'missed'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the first two cases")
    parser.add_argument("--seconds", type=float, default=2.0, help="for the repetitions of a case")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--save", action="store_true", help="add the rows to results/<machine>/curvature.jsonl"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device cpu")
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    rows: list[Row] = []
    for case in CASES[: 2 if arguments.quick else None]:
        rows += run(case, arguments.device, arguments.seconds)
        print(f"measured {case.name}", file=sys.stderr)
    report(rows, arguments.device)
    if arguments.json is not None:
        save_rows(arguments.json, rows)
    if arguments.save:
        save_rows(results_folder(arguments.device) / "curvature.jsonl", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
