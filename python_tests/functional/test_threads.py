"""Same inputs, same bits for any number of threads: every op that promises it, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bayes_kernels import functional as F
from bayes_kernels import random

# Tokens, n, m, rank: one task and several; columns and tokens cut; no multiple of a vector. PyTorch's
# products of rank 33 differ between thread counts.
ADAPTERS = [
    (1, 4096, 4100, 16),
    (3, 70, 33, 7),
    (300, 1030, 515, 8),
    (130, 2050, 2050, 64),
    (40, 130, 65, 33),
]
TALLS = [(5, 3), (700, 17), (7000, 5), (3200, 64)]


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flatten(found: object) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [t for part in found or () for t in flatten(part)]  # type: ignore[union-attr]


def with_gradients(op: Callable[..., Tensor], *tensors: Tensor, **options: object) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = op(*leaves, **options)
    return [y, *torch.autograd.grad((y.float() * normal(*y.shape, seed=7)).sum(), leaves)]


def adapters(tokens: int, n: int, m: int, r: int, dtype: torch.dtype) -> list[Tensor]:
    x, base = normal(tokens, n, dtype=dtype), normal(tokens, m, seed=1, dtype=dtype)
    a, b = normal(r, n, seed=2), normal(m, r, seed=3)
    rho, core, d = 0.1 * normal(r, n, seed=4), normal(r, r, seed=5), normal(r, seed=6)
    groups, key = torch.arange(tokens) % 3, random.key(5)
    found = [with_gradients(F.lora, x, a, b, base, key=key, dropout=0.1)]
    for scope in ("token", "none"):
        found.append(with_gradients(F.flipout_lora, x, a, rho, b, base, key=key, scope=scope))
    found.append(with_gradients(F.core_lora, x, a, core, b, base))
    found.append(with_gradients(F.scaled_lora, x, a, d, b, base))
    found.append(with_gradients(F.scaled_lora, x, a, normal(3, r), b, base, groups=groups))
    with torch.no_grad():
        found.append([F.flipout_lora(x, a, rho, b, base, key=key) for _ in range(3)])
    return flatten(found)


def grouped(tokens: int, n: int, m: int, r: int, dtype: torch.dtype) -> list[Tensor]:
    x, base = normal(tokens, n, dtype=dtype), normal(tokens, m, seed=1, dtype=dtype)
    a, b, key = normal(5, r, n, seed=2), normal(5, m, r, seed=3), random.key(5)
    rho, found = 0.1 * normal(5, r, n, seed=4), []
    for groups in (torch.arange(tokens) * 5 // tokens, torch.arange(tokens) % 5):
        found.append(with_gradients(F.grouped_lora, x, a, b, base, groups=groups))
        options = {"groups": groups, "key": key}
        found.append(with_gradients(F.grouped_flipout_lora, x, a, rho, b, base, **options))
        options["draws"] = torch.tensor([3, 2, 8, 1, 0])
        found.append(with_gradients(F.sampled_lora, x, a[0], rho[0], b[0], base, **options))
    return flatten(found)


def talls(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    xs, ds = ([normal(*s, seed=i, dtype=dtype) for s in shapes] for i in (0, 1))
    found = [F.gram(xs), F.landing_field(xs, ds, 0.3)]
    for kind in ("polar", "qr"):
        stepped, retracted = [x.clone() for x in xs], [x.clone() for x in xs]
        found += [stepped, F.stiefel_step_(stepped, ds, 0.01, retraction=kind)]
        retract = F.polar_retract_ if kind == "polar" else F.qr_retract_
        found += [retracted, retract(retracted, ds)]
    landed = [x.clone() for x in xs]
    F.landing_step_(landed, ds, 0.01, 0.5)
    return flatten([*found, landed])


def curvature(d: int, k: int, rows: int, dtype: torch.dtype) -> list[Tensor]:
    x, dense, low = normal(rows, d, dtype=dtype), [], []
    for weights in (None, normal(rows, seed=1).square()):
        dense.append(torch.ones(d, d, dtype=dtype))
        F.kron_accumulate_(dense[-1], x, masks=weights, beta=0.5)
        low += [torch.zeros(d, k, dtype=dtype) for _ in range(3)]
        F.low_rank_update_(low[-3:], [x[:100]] * 3)
    return dense + low


def divergences(n: int, dtype: torch.dtype) -> list[Tensor]:
    means, rhos = ([normal(16, n, seed=i, dtype=dtype) for i in ids] for ids in ((1, 2), (3, 4)))

    def op(*tensors: Tensor) -> Tensor:
        return F.gaussian_kl(tensors[:2], tensors[2:], 0.2)

    return with_gradients(op, *means, *rhos)


def predictions(b: int, c: int, samples: int, full: bool, dtype: torch.dtype) -> list[Tensor]:
    mean, key = normal(b, c, dtype=dtype), random.key(2)
    spread = normal(b, c, c, seed=1, dtype=dtype)
    cov = spread @ spread.mT / c if full else spread[:, 0].square()
    found = []
    for antithetic in (False, True):
        for scale in (0.3, 90.0):
            options = {"antithetic": antithetic, "return_standard_error": True}
            found.append(F.mc_predict(mean, scale * cov, n_samples=samples, key=key, **options))
    return flatten(found)


def dumps(rows: int, columns: int, _: torch.dtype) -> list[Tensor]:
    key = random.key(3)
    return [
        random.normal(key, (rows, columns)),
        random.sign_bits(key, rows, columns),
        random.dropout_mask(key, rows, columns, 0.2),
    ]


CASES = {
    **{f"adapters {s}": (adapters, *s) for s in ADAPTERS},
    "grouped, many rows": (grouped, 400, 1030, 300, 16),
    "grouped, few rows": (grouped, 17, 70, 515, 8),
    "talls": (talls, TALLS),
    "a long tall": (talls, [(10_000, 16)]),
    **{f"curvature {s}": (curvature, *s) for s in [(5, 3, 9000), (128, 17, 300), (60, 60, 5000)]},
    **{f"divergences {n}": (divergences, n) for n in (1, 70, 9000)},
    **{
        f"predictions {s}": (predictions, *s)
        for s in [(3, 5, 3000, False), (40, 2, 60, True), (2, 300, 500, False), (5, 40, 70, True)]
    },
    "dumps": (dumps, 130, 2050),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_the_number_of_threads(case: str, dtype: torch.dtype):
    compute, *arguments = CASES[case]
    if dtype == torch.bfloat16 and compute not in (adapters, grouped):
        pytest.skip("takes fp32 and fp64")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(compute(*arguments, dtype))
    finally:
        torch.set_num_threads(before)
    for threads, other in zip((2, 3), results[1:], strict=True):
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"result {i}, {threads} threads"
