"""Tall matrices: retractions to the Stiefel manifold and the landing field, for lists of matrices.

    python cuda_benchmarks tall --device cpu [--quick] [--vs PROVIDERS] [--save]

Providers of a retraction of `count` matrices (n, r) with condition number about 1.2
    svd            torch.linalg.svd of each matrix, U V^T
    qr             torch.linalg.qr of each matrix, signs fixed
    newton_schulz  batched Newton-Schulz on the stacked matrices, as many steps as fp32 needs
    polar          bayes_kernels.functional.polar_retract_
    qr_retract     bayes_kernels.functional.qr_retract_
Providers of the landing field of one matrix
    published      (G X^T - X G^T) X + lam X (X^T X - I) with the (n, n) product
    compiled       torch.compile of the same, as PoLAR's callback runs it
    eager          the same reordered, O(n r^2), in plain PyTorch
    bayes_kernels  bayes_kernels.functional.landing_field
and of a descent step with retraction
    eager          projection, step and torch.linalg.qr for each matrix
    bayes_kernels  bayes_kernels.functional.stiefel_step_

A retraction takes x + step, as in an optimiser. bayes_kernels works in place, on the result of the
repetition before with steps of alternating sign; the others make new matrices from the same inputs.
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
    bandwidth_share,
    count_launches,
    make_row,
    miss,
    peak_bytes,
    time_interleaved,
    tolerance,
)
from torch import Tensor

from bayes_kernels import functional, reference

LAMBDA = 0.5
RATE = 0.01


@dataclass(frozen=True)
class Case:
    count: int
    n: int
    r: int

    @property
    def name(self) -> str:
        return f"{self.count} x ({self.n}, {self.r})"


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [Case(16, 4096, 16), Case(448, 4096, 16)][: 2 if device == "cuda" else 1]
    return [Case(16, 4096, 16), Case(64, 4096, 16), Case(448, 4096, 16), Case(16, 4096, 64),
            Case(16, 768, 8)]  # fmt: skip


def make_matrices(case: Case, device: str) -> list[Tensor]:
    """Singular values from 1 / 1.1 to 1.1: what a large step leaves."""
    generator = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(case.n, case.r, generator=generator))
    matrices = []
    for _ in range(case.count):
        v, _ = torch.linalg.qr(torch.randn(case.r, case.r, generator=generator))
        sigma = torch.logspace(-0.0414, 0.0414, case.r)
        order = torch.randperm(case.n, generator=generator)
        matrices.append(((q[order] * sigma) @ v).to(device))
    return matrices


# --- providers: f(matrices) -> retracted matrices ----------------------------------------------


def svd(xs: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
    return [reference.polar_retract(x, s) for x, s in zip(xs, steps, strict=True)]


def qr(xs: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
    return [reference.qr_retract(x, s) for x, s in zip(xs, steps, strict=True)]


def newton_schulz(stacked: Tensor, steps: int) -> Tensor:
    """Z <- Z (1.5 I - 0.5 Z^T Z) for matrices with singular values below sqrt(3)."""
    eye = 1.5 * torch.eye(stacked.shape[2], device=stacked.device)
    for _ in range(steps):
        stacked = torch.bmm(stacked, torch.baddbmm(eye, stacked.mT, stacked, alpha=-0.5))
    return stacked


def steps_needed(stacked: Tensor, truth: Tensor) -> int:
    """Fewest steps that come as near as 2e-5, at most 11."""
    for steps in range(1, 12):
        if miss([newton_schulz(stacked, steps)], [truth], 2e-5) is None:
            break
    return steps


def published_field(x: Tensor, g: Tensor, lam: float) -> Tensor:
    product = g @ x.mT  # (n, n)
    eye = torch.eye(x.shape[1], device=x.device)
    return (product - product.mT) @ x + lam * x @ (x.mT @ x - eye)


def eager_step(xs: list[Tensor], ds: list[Tensor]) -> None:
    for x, d in zip(xs, ds, strict=True):
        x.copy_(reference.stiefel_step(x, d, RATE, retraction="qr"))


# --- runs --------------------------------------------------------------------------------------

OURS = ("polar", "qr_retract", "bayes_kernels")
PEERS = ("svd", "qr", "newton_schulz", "published", "compiled", "eager")


def run_retraction(case: Case, options: Options) -> list[Row]:
    """A retraction of every matrix of a list."""
    device = options.device
    xs = make_matrices(case, device)
    functional.polar_retract_(xs)
    generator = torch.Generator().manual_seed(2)
    plus = [(0.6 / case.n**0.5 * torch.randn(x.shape, generator=generator)).to(device) for x in xs]
    minus = [-s for s in plus]
    stacked, stacked_steps = torch.stack(xs), torch.stack(plus)
    polar_truth, qr_truth = (
        [f(x.double() + s.double()) for x, s in zip(xs[:4], plus[:4], strict=True)]
        for f in (reference.polar_retract, reference.qr_retract)
    )
    ns_steps = steps_needed((stacked + stacked_steps)[:4], torch.stack(polar_truth))

    def in_place(retract: Callable[..., object]) -> Callable[[], list[Tensor]]:
        work, turn = [x.clone() for x in xs], [plus, minus]

        def step() -> list[Tensor]:
            retract(work, turn[0])
            turn.reverse()
            return work

        return step

    steps: dict[str, Callable[[], list[Tensor]]] = {
        "svd": lambda: svd(xs, plus),
        "qr": lambda: qr(xs, plus),
        # Kept stacked from step to step: nothing is gathered or written back.
        "newton_schulz": lambda: list(newton_schulz(stacked + stacked_steps, ns_steps)),
        "polar": in_place(functional.polar_retract_),
        "qr_retract": in_place(functional.qr_retract_),
    }
    steps = options.pick(steps, OURS)
    agreement = Agreement(case.name, OURS)
    for name, step in steps.items():
        truth = qr_truth if name.startswith("qr") else polar_truth
        agreement.check(name, step()[:4], truth, tolerance(torch.float32, case.n))
    times = time_interleaved(steps, device, seconds=options.time_for(5.0, 2.0), max_repeats=60)
    # Matrix and step read twice, matrix written once.
    moved = 5 * case.count * case.n * case.r * 4
    rows = []
    for name, step in steps.items():
        row = make_row("retract", case.name, name, "step", times, device, agreement)
        row.roofline = bandwidth_share(moved, row, device)
        row.launches = count_launches(step, device)
        if name == "newton_schulz":
            row.figures["steps"] = ns_steps
        rows.append(row)
    return rows


def run_step(case: Case, options: Options) -> list[Row]:
    """A step of Riemannian gradient descent with QR retraction."""
    device = options.device
    given = make_matrices(case, device)
    functional.polar_retract_(given)
    generator = torch.Generator().manual_seed(2)
    ds = [torch.randn(x.shape, generator=generator).to(device) for x in given]
    work = [x.clone() for x in given]

    def ours() -> list[Tensor]:
        torch._foreach_copy_(work, given)
        functional.stiefel_step_(work, ds, RATE, retraction="qr")
        return work

    def eager() -> list[Tensor]:
        torch._foreach_copy_(work, given)
        eager_step(work, ds)
        return work

    truth = [
        reference.stiefel_step(x.double(), d.double(), RATE, retraction="qr")
        for x, d in zip(given[:2], ds[:2], strict=True)
    ]
    both: dict[str, Callable[[], list[Tensor]]] = {"eager": eager, "bayes_kernels": ours}
    steps = options.pick(both, OURS)
    agreement = Agreement(case.name, OURS)
    for name, step in steps.items():
        agreement.check(name, step()[:2], truth, tolerance(torch.float32, case.n))
    times = time_interleaved(steps, device, seconds=options.time_for(2.5, 1.0), max_repeats=60)
    rows = [
        make_row("stiefel_step", case.name, name, "qr", times, device, agreement) for name in steps
    ]
    for row in rows:
        row.launches = count_launches(steps[row.provider], device)
    return rows


def run_landing(n: int, r: int, options: Options) -> list[Row]:
    """One matrix; few repetitions, as the published formula makes n^2 numbers."""
    device = options.device
    x = make_matrices(Case(1, n, r), device)[0]
    g = torch.randn(n, r, generator=torch.Generator().manual_seed(3)).to(device)
    compiled = torch.compile(published_field, fullgraph=True, dynamic=False)
    steps: dict[str, Callable[[], Tensor]] = {
        "published": lambda: published_field(x, g, LAMBDA),
        "compiled": lambda: compiled(x, g, LAMBDA),
        "eager": lambda: reference.landing_field(x, g, LAMBDA),
        "bayes_kernels": lambda: functional.landing_field([x], [g], LAMBDA)[0],
    }
    if options.quick:  # a compiler takes longer than all other cases
        del steps["compiled"]
    steps = options.pick(steps, OURS)
    truth = reference.landing_field(x.double(), g.double(), LAMBDA)
    case = Case(1, n, r).name
    agreement = Agreement(case, OURS)
    for name, step in steps.items():
        agreement.check(name, [step()], [truth], tolerance(torch.float32, n))
    times = time_interleaved(steps, device, seconds=options.time_for(5.0, 2.0), max_repeats=15)
    rows = [
        make_row("landing_field", case, name, "field", times, device, agreement) for name in steps
    ]
    for row in rows:
        row.peak_bytes = peak_bytes(steps[row.provider], device)
        row.launches = count_launches(steps[row.provider], device)
    return rows


def run(options: Options) -> Iterator[Row]:
    """All cases."""
    if options.shape is not None:
        yield from run_retraction(Case(*(options.shape[name] for name in LETTERS)), options)
        return
    for case in cases(options.device, options.quick):
        if options.wants(case.name):
            yield from run_retraction(case, options)
    if options.wants(STEP.name):
        yield from run_step(STEP, options)
    for n, r in LANDING[: 1 if options.quick else None]:
        if options.wants(Case(1, n, r).name):
            yield from run_landing(n, r, options)


STEP = Case(16, 4096, 16)
LANDING = [(4096, 16), (4096, 64), (2048, 8)]
LETTERS = ("count", "n", "r")
FAMILY = Family(
    "tall", "retractions and landing field of tall matrices", OURS, PEERS, run, letters=LETTERS
)
