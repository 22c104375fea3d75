"""Low-rank adapter with flipped-sign noise (BLoB): forward and backward, without the base layer.

    python cuda_benchmarks/bench_adapter.py --device cpu [--quick] [--json PATH] [--save]

Providers
    published      bayesian-peft's formula: two paths through b, dense sign tensors, fp32 adapters
    peft_lora      plain LoRA as PEFT computes it, fp32 adapters: no noise, the price to match
    peft_lora_low  the same with adapters in the activations' dtype (bf16 cases only)
    eager          the best plain PyTorch for the noisy adapter
    compiled       torch.compile of `eager`
    lora           bayes_kernels.functional.lora: no noise
    bayes_kernels  bayes_kernels.functional.flipout_lora

`base` is an input of every provider: the output of the frozen layer, which all add to. Output
tensors are allocated within the measured time, as in training.
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
import torch.nn.functional as F
from harness import (
    Row,
    assert_agrees,
    copy_bandwidth,
    make_row,
    peak_bytes,
    print_table,
    results_folder,
    save_rows,
    saved_bytes,
    time_interleaved,
)
from torch import Tensor

import bayes_kernels
from bayes_kernels import reference

SCALING = 2.0
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# Time of `bayes_kernels` (in decoding: of `lora`) over that of a peer, at most.
BARS = {
    "cpu": [("published", 1 / 4), ("peft_lora", 1.0), ("compiled", 1 / 1.5)],
    "cuda": [("published", 1 / 8), ("peft_lora", 1.0), ("compiled", 1 / 2)],
}
SAVED_BAR = 1 / 4
ROOFLINE_BAR = 0.6


@dataclass(frozen=True)
class Case:
    tokens: int
    n: int
    m: int
    r: int
    dtype: torch.dtype
    compiled: bool = False

    @property
    def name(self) -> str:
        return (
            f"T{self.tokens} n{self.n} m{self.m} r{self.r} {str(self.dtype).removeprefix('torch.')}"
        )


def cases(device: str, quick: bool) -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    if device == "cuda":
        shapes = [
            (1200, 768, 768, 8),
            (1200, 4096, 4096, 8),
            (1200, 4096, 1024, 8),
            (1200, 4096, 14336, 16),
            (8192, 4096, 4096, 16),
        ]
        return [Case(*s, bf16, compiled=True) for s in (shapes[1:2] if quick else shapes)]
    if quick:
        return [
            Case(1200, 768, 768, 8, f32),
            Case(1200, 4096, 4096, 8, f32),
            Case(1200, 768, 768, 8, bf16),
        ]
    return [
        Case(1024, 384, 384, 8, f32),
        Case(1200, 768, 768, 8, f32, compiled=True),
        Case(1200, 4096, 4096, 8, f32, compiled=True),
        Case(1200, 4096, 1024, 8, f32),
        Case(1200, 4096, 4096, 16, f32),
        Case(64, 4096, 4096, 8, f32),
        Case(1200, 384, 384, 8, bf16),
        Case(1200, 768, 768, 8, bf16, compiled=True),
        Case(1200, 4096, 4096, 8, bf16),
        Case(1200, 4096, 1024, 8, bf16),
        Case(1200, 4096, 4096, 16, bf16),
    ]


@dataclass
class Noise:
    eps: Tensor
    r_in: Tensor
    r_out: Tensor


@dataclass
class Inputs:
    x: Tensor
    mean: Tensor
    rho: Tensor
    b: Tensor
    base: Tensor
    dy: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x, self.mean, self.rho, self.b)


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    x = normal(case.tokens, case.n).to(case.dtype).requires_grad_()
    base, dy = (normal(case.tokens, case.m).to(case.dtype) for _ in range(2))
    mean = (normal(case.r, case.n) / case.n**0.5).requires_grad_()
    rho = (0.1 + 0.02 * normal(case.r, case.n)).requires_grad_()
    b = normal(case.m, case.r).requires_grad_()
    return Inputs(x, mean, rho, b, base, dy)


# --- providers: f(inputs, noise) -> y; noise None means drawn inside, as in training -------------


def published(i: Inputs, noise: Noise | None) -> Tensor:
    x = i.x.to(i.mean.dtype)
    result = i.base + F.linear(F.linear(x, i.mean), i.b) * SCALING
    eps = torch.randn_like(i.rho) if noise is None else noise.eps
    e = i.rho**2 * eps
    if noise is None:
        r_in = torch.empty_like(x).uniform_(-1, 1).sign()
        r_out = torch.empty(x.shape[0], e.shape[0], device=x.device).uniform_(-1, 1).sign()
    else:
        r_in, r_out = noise.r_in, noise.r_out
    result += F.linear(F.linear(x * r_in, e) * r_out, i.b) * SCALING
    return result.to(i.base.dtype)


def peft_lora(i: Inputs, noise: Noise | None) -> Tensor:
    result = i.base
    x = i.x.to(i.mean.dtype)
    result = result + F.linear(F.linear(x, i.mean), i.b) * SCALING
    return result.to(i.base.dtype)


def peft_lora_low(i: Inputs, noise: Noise | None) -> Tensor:
    mean, b = i.mean.to(i.x.dtype), i.b.to(i.x.dtype)
    return i.base + F.linear(F.linear(i.x, mean), b) * SCALING


def _random_signs(rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.randint(0, 2, (rows, columns), dtype=torch.int8, device=like.device) * 2 - 1


def eager(i: Inputs, noise: Noise | None) -> Tensor:
    dtype = i.x.dtype
    eps = torch.randn_like(i.rho) if noise is None else noise.eps
    e = i.rho * i.rho * eps
    if noise is None:
        r_in = _random_signs(i.x.shape[0], i.x.shape[1], i.x)
        r_out = _random_signs(i.x.shape[0], i.rho.shape[0], i.x)
    else:
        r_in, r_out = noise.r_in.to(torch.int8), noise.r_out.to(torch.int8)
    h = F.linear(i.x, i.mean.to(dtype)) + F.linear(i.x * r_in, e.to(dtype)) * r_out
    return torch.addmm(i.base, h, i.b.to(dtype).t(), alpha=SCALING)


def flipout_lora(i: Inputs, key: Tensor) -> Tensor:
    return bayes_kernels.functional.flipout_lora(
        i.x, i.mean, i.rho, i.b, i.base, scaling=SCALING, key=key
    )


def plain_lora(i: Inputs) -> Tensor:
    return bayes_kernels.functional.lora(i.x, i.mean, i.b, i.base, scaling=SCALING)


# --- checks ------------------------------------------------------------------------------------


def gradients(forward: Callable[[], Tensor], i: Inputs) -> list[Tensor]:
    """y and the gradients of x, mean, rho, b (zeros where there is none)."""
    y = forward()
    grads = torch.autograd.grad(y, i.leaves, i.dy, allow_unused=True)
    return [
        y.detach(),
        *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, i.leaves, strict=True)),
    ]


def truth(i: Inputs, noise: Noise | None) -> list[Tensor]:
    """The definition in fp64; without noise plain LoRA."""
    d = Inputs(*(t.detach().double() for t in (i.x, i.mean, i.rho, i.b, i.base, i.dy)))
    for leaf in d.leaves:
        leaf.requires_grad_()
    if noise is None:
        return gradients(lambda: reference.lora(d.x, d.mean, d.b, d.base, scaling=SCALING), d)
    dense = reference.DenseNoise(noise.eps.double(), noise.r_in.double(), noise.r_out.double())
    return gradients(
        lambda: reference.flipout_lora(
            d.x, d.mean, d.rho, d.b, d.base, scaling=SCALING, noise=dense
        ),
        d,
    )


def check(case: Case, i: Inputs, key: Tensor, compiled: Callable | None) -> None:
    tolerance = TOLERANCE[case.dtype]
    dense = reference.dense_noise(key, case.tokens, case.n, case.r)
    noise = Noise(dense.eps, dense.r_in, dense.r_out)
    noisy, plain = truth(i, noise), truth(i, None)
    for f in (published, eager):
        assert_agrees(f.__name__, gradients(lambda f=f: f(i, noise), i), noisy, tolerance)
    assert_agrees("bayes_kernels", gradients(lambda: flipout_lora(i, key), i), noisy, tolerance)
    for name, f in {"peft_lora": lambda: peft_lora(i, None), "lora": lambda: plain_lora(i)}.items():
        assert_agrees(name, gradients(f, i), plain, tolerance)
    if compiled is not None:
        # Its noise is drawn inside the graph; without noise it has to be plain LoRA.
        silent = Inputs(i.x, i.mean, torch.zeros_like(i.rho).requires_grad_(), i.b, i.base, i.dy)
        assert_agrees(
            "compiled", gradients(lambda: compiled(silent, None), silent), plain, tolerance
        )


# --- runs --------------------------------------------------------------------------------------


def run_training(case: Case, device: str, seconds: float, with_compiled: bool) -> list[Row]:
    i = make_inputs(case, device)
    key = bayes_kernels.random.key(1, device)
    compiled = (
        torch.compile(eager, fullgraph=True, dynamic=False)
        if with_compiled and case.compiled
        else None
    )
    check(case, i, key, compiled)
    forwards: dict[str, Callable[[], Tensor]] = {
        "published": lambda: published(i, None),
        "peft_lora": lambda: peft_lora(i, None),
        "eager": lambda: eager(i, None),
        "lora": lambda: plain_lora(i),
        "bayes_kernels": lambda: flipout_lora(i, key),
    }
    if case.dtype != torch.float32:
        forwards["peft_lora_low"] = lambda: peft_lora_low(i, None)
    if compiled is not None:
        forwards["compiled"] = lambda: compiled(i, None)

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), i.leaves, i.dy, allow_unused=True)

    steps = {name: step(f) for name, f in forwards.items()}
    times = time_interleaved(steps, device, seconds=seconds)
    # Forward reads x and base and writes y; backward reads dy and x and writes dx.
    moved = (3 * case.tokens * case.n + 3 * case.tokens * case.m) * i.x.element_size()
    rows = []
    for name, forward in forwards.items():
        row = make_row("adapter", case.name, name, "forward+backward", times[name], device)
        row.saved_bytes = saved_bytes(forward, (i.mean, i.rho, i.b))
        row.peak_bytes = peak_bytes(steps[name], device)
        row.roofline = round(moved / copy_bandwidth(device) / (row.p50_us * 1e-6), 3)
        rows.append(row)
    return rows


def run_decode(device: str, seconds: float) -> list[Row]:
    """One token, forward only: what generation pays for an adapted layer."""
    case = Case(1, 4096, 4096, 8, torch.float32)
    i = make_inputs(case, device)
    key = bayes_kernels.random.key(1, device)

    def no_grad(f: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(f)

    steps = {
        "peft_lora": no_grad(lambda: peft_lora(i, None)),
        "eager": no_grad(lambda: eager(i, None)),
        "lora": no_grad(lambda: plain_lora(i)),
        "bayes_kernels": no_grad(lambda: flipout_lora(i, key)),
    }
    times = time_interleaved(steps, device, seconds=seconds)
    return [make_row("adapter", case.name, name, "forward", times[name], device) for name in steps]


def report(rows: list[Row], device: str) -> None:
    table, verdicts = [], []
    for case, mode in dict.fromkeys((r.case, r.mode) for r in rows):
        group = {r.provider: r for r in rows if r.case == case and r.mode == mode}
        ours = group["bayes_kernels"]
        for name, row in group.items():
            table.append((
                case if mode == "forward+backward" else f"{case} {mode}", name,
                f"{row.p20_us:.0f}", f"{row.p50_us:.0f}", f"{row.p80_us:.0f}",
                f"{row.p50_us / ours.p50_us:.2f}",
                "" if row.saved_bytes is None else f"{row.saved_bytes / 1e6:.2f}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
                "" if row.roofline is None else f"{row.roofline:.0%}",
            ))  # fmt: skip
        for peer, bar in BARS[device]:
            subject = group["lora"] if mode == "forward" else ours
            if peer in group and (mode == "forward+backward" or peer == "peft_lora"):
                verdicts.append(
                    _verdict(
                        case,
                        f"{subject.provider} / {peer} time",
                        subject.p50_us / group[peer].p50_us,
                        bar,
                    )
                )
        if ours.saved_bytes is not None:
            ratio = ours.saved_bytes / (group["published"].saved_bytes or 1)
            verdicts.append(
                _verdict(case, "bayes_kernels / published bytes kept", ratio, SAVED_BAR)
            )
        if device == "cuda" and ours.roofline is not None:
            verdicts.append(
                _verdict(case, "roofline share, inverse", 1 / ours.roofline, 1 / ROOFLINE_BAR)
            )
    header = (
        "case",
        "provider",
        "p20 us",
        "p50 us",
        "p80 us",
        "x ours",
        "kept MB",
        "peak MB",
        "roofline",
    )
    print_table(header, table)
    print()
    print_table(("case", "bar", "ratio", "at most", "verdict"), verdicts)


def _verdict(case: str, what: str, ratio: float, bar: float) -> tuple[str, ...]:
    return case, what, f"{ratio:.3f}", f"{bar:.3f}", "met" if ratio <= bar else "missed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="three shapes, no torch.compile")
    parser.add_argument("--seconds", type=float, help="time for the repetitions of one case")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--save", action="store_true", help="add the rows to results/<machine>/adapter.jsonl"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device cpu")
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    seconds = arguments.seconds or (2.0 if arguments.quick else 3.0)
    rows: list[Row] = []
    for case in cases(arguments.device, arguments.quick):
        rows += run_training(case, arguments.device, seconds, with_compiled=not arguments.quick)
        print(f"measured {case.name}", file=sys.stderr)
    rows += run_decode(arguments.device, seconds / 2)
    report(rows, arguments.device)
    if arguments.json is not None:
        save_rows(arguments.json, rows)
    if arguments.save:
        save_rows(results_folder(arguments.device) / "adapter.jsonl", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
