"""Mean softmax of Gaussian logits: Monte Carlo in registers against a materialised tensor of samples.

    python cuda_benchmarks/bench_predict.py --device cpu [--quick] [--json PATH] [--save]

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

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from harness import (
    Row,
    assert_agrees,
    make_row,
    peak_bytes,
    print_table,
    results_folder,
    save_rows,
    time_interleaved,
)
from torch import Tensor

import bayes_kernels
from bayes_kernels import reference

# `bayes_kernels` over `materialised`, at most.
TIME_BARS = {"cpu": 1 / 4, "cuda": 1 / 5}
MEMORY_BAR = 1 / 20
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


def check(case: Case, mean: Tensor, cov: Tensor, key: Tensor) -> None:
    """On few rows: ours at the same noise, PyTorch's formula on it, against the fp64 definition."""
    few, samples = min(case.rows, 2), min(case.samples, 100)
    m, c = mean[:few], cov[:few]
    eps = reference.logit_noise(key, few, samples, case.classes)
    truth = reference.mc_predict(m.double(), c.double(), eps.double())[:3]
    assert_agrees("bayes_kernels", ours(m, c, samples, key), truth, 1e-4)
    z = reference.sampled_logits(m, c, eps).transpose(0, 1)
    got, want = summary(z), truth
    assert_agrees("materialised", (got[0].exp(), *got[1:]), (want[0].exp(), *want[1:]), 1e-4)


# --- runs --------------------------------------------------------------------------------------


def run(case: Case, device: str, seconds: float) -> list[Row]:
    mean, cov = inputs(case, device)
    key = bayes_kernels.random.key(1, device)
    check(case, mean, cov, key)
    steps: dict[str, Callable[[], object]] = {
        "materialised": lambda: materialised(mean, cov, case.samples),
        "looped": lambda: looped(mean, cov, case.samples),
        "antithetic": lambda: ours(mean, cov, case.samples, key, True),
        "bayes_kernels": lambda: ours(mean, cov, case.samples, key),
    }
    if case.full:
        steps["peer"] = lambda: peer(mean, cov, case.samples)
    with torch.no_grad():
        times = time_interleaved(steps, device, seconds=seconds)
        rows = []
        for name, step in steps.items():
            row = make_row("predict", case.name, name, "forward", times[name], device)
            row.peak_bytes = peak_bytes(step, device)
            rows.append(row)
    return rows


def report(rows: list[Row], device: str) -> None:
    table, verdicts = [], []
    barred = {c.name for c in cases(True)}
    for case in dict.fromkeys(r.case for r in rows):
        group = {r.provider: r for r in rows if r.case == case}
        mine, theirs = group["bayes_kernels"], group["materialised"]
        for name, row in group.items():
            table.append((
                case, name, f"{row.p20_us:.0f}", f"{row.p50_us:.0f}", f"{row.p80_us:.0f}",
                f"{row.p50_us / mine.p50_us:.2f}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.2f}",
            ))  # fmt: skip
        if case in barred:
            verdicts.append(_verdict(case, "time", mine.p50_us / theirs.p50_us, TIME_BARS[device]))
            if mine.peak_bytes is not None and theirs.peak_bytes:
                share = mine.peak_bytes / theirs.peak_bytes
                verdicts.append(_verdict(case, "memory", share, MEMORY_BAR))
    print_table(("case", "provider", "p20 us", "p50 us", "p80 us", "x ours", "peak MB"), table)
    print()
    print_table(("case", "of materialised", "ratio", "at most", "verdict"), verdicts)


def _verdict(case: str, what: str, ratio: float, bar: float) -> tuple[str, ...]:
    return case, what, f"{ratio:.4f}", f"{bar:.3f}", "met" if ratio <= bar else "missed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="only the two cases with a bar")
    parser.add_argument("--seconds", type=float, help="time for the repetitions of one case")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--save", action="store_true", help="add the rows to results/<machine>/predict.jsonl"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device cpu")
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    rows: list[Row] = []
    for case in cases(arguments.quick):
        rows += run(case, arguments.device, arguments.seconds or 3.0)
        print(f"measured {case.name}", file=sys.stderr)
    report(rows, arguments.device)
    if arguments.json is not None:
        save_rows(arguments.json, rows)
    if arguments.save:
        save_rows(results_folder(arguments.device) / "predict.jsonl", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
