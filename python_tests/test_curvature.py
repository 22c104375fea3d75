"""kron_accumulate_ and low_rank_update_ against their definitions: sums, and singular values in fp64."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_no_worse_than_torch

from bayes_kernels import reference
from bayes_kernels.functional import kron_accumulate_, low_rank_update_


def decaying(rows: int, d: int, seed: int = 0) -> torch.Tensor:
    """Rows whose second moment has a falling spectrum, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    return x / torch.arange(1, d + 1) ** 0.5


def product(factor: torch.Tensor) -> torch.Tensor:
    return factor.double() @ factor.double().T


# (d, k, rows): odd sizes, k above d's vector width, rows in several blocks, one column, the limit.
SHAPES = [(1, 1, 1), (5, 2, 3), (70, 10, 4), (33, 17, 34), (130, 3, 32), (40, 1, 5), (100, 96, 40)]


@pytest.mark.parametrize(("d", "k", "rows"), SHAPES)
def test_low_rank_update_is_the_truncated_svd(device, d: int, k: int, rows: int):
    """fp32 against the SVD route in fp64: 1e-6 of the sum, beside the same blocks of 32 rows."""
    if device.name == "sim" and k == 96:
        pytest.skip("an eigenproblem of 128 columns takes the emulator too long")
    factor = torch.zeros(d, k, device=device.torch)
    truth = torch.zeros(d, k, dtype=torch.float64)
    for seed in range(2):
        x = decaying(rows, d, seed)
        low_rank_update_([factor], [x.to(device.torch, torch.float32)])
        for part in x.float().double().split(32):
            truth = reference.low_rank_update(truth, part)
    error = (product(factor.cpu()) - product(truth)).norm() / product(truth).norm()
    assert float(error) < 2e-6
    # Singular vectors times singular values: orthogonal columns in falling order.
    gram = factor.double().T @ factor.double()
    scale = float(gram.diagonal().max())
    assert float((gram - gram.diag().diag()).abs().max()) < 2e-6 * scale
    assert bool((gram.diagonal().diff() <= 1e-6 * scale).all())


def test_memory_that_overlaps_is_refused(device):
    factor = torch.zeros(8, 2, device=device.torch)
    x = torch.ones(3, 8, device=device.torch)
    with pytest.raises(RuntimeError, match="must not overlap in memory"):
        low_rank_update_([factor, factor], [x, x])


def test_accumulation_is_exact_under_autocast():
    factor, x = torch.zeros(6, 6), decaying(20, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        kron_accumulate_(factor, x, alpha=torch.tensor(0.5), beta=torch.tensor(1.0))
    torch.testing.assert_close(factor, 0.5 * x.T @ x)


def test_fp64_agrees_to_rounding():
    factor = torch.zeros(50, 7, dtype=torch.float64)
    truth = factor.clone()
    for seed in range(20):
        x = decaying(5, 50, seed)
        low_rank_update_(factor, x)
        truth = reference.low_rank_update(truth, x)
    assert float((product(factor) - product(truth)).norm() / product(truth).norm()) < 1e-12


def test_exact_while_rows_are_few(device):
    """No more rows than columns: L L^T is the sum itself, in any batches."""
    x = decaying(12, 40).float().to(device.torch)
    expected = product(x.T)
    for sizes in ([12], [1] * 12, [5, 7]):
        factor = torch.zeros(40, 12, device=device.torch)
        for part in x.split(sizes):
            low_rank_update_([factor], [part])
        assert float((product(factor) - expected).norm() / expected.norm()) < 2e-6


def test_two_hundred_updates_keep_the_leading_part():
    """Close to the best rank-10 factor of the full sum, and a trace that never falls."""
    factor = torch.zeros(256, 10)
    total = torch.zeros(256, 256, dtype=torch.float64)
    trace = 0.0
    for seed in range(200):
        x = decaying(4, 256, seed) / torch.arange(1, 257) ** 0.5
        low_rank_update_([factor], [x.float()])
        total += x.T @ x
        now = float(factor.double().square().sum())
        assert now > trace * (1 - 1e-6)
        trace = now
    values, vectors = torch.linalg.eigh(total)
    best = (vectors[:, -10:] * values[-10:]) @ vectors[:, -10:].T
    bound = float((best - total).norm() / total.norm())
    assert float((product(factor) - total).norm() / total.norm()) < 1.1 * bound


def test_lists_of_other_shapes(device):
    """65 factors of several shapes in one call, as many as two lists of kernel arguments."""
    shapes = [(4 + i % 7, 1 + i % 3, i % 5) for i in range(65)]
    factors = [torch.zeros(d, k, device=device.torch) for d, k, _ in shapes]
    rows = [decaying(n, d, i).float().to(device.torch) for i, (d, _, n) in enumerate(shapes)]
    low_rank_update_(factors, rows)
    for (d, k, _), factor, x in zip(shapes, factors, rows, strict=True):
        one = torch.zeros(d, k, device=device.torch)
        low_rank_update_([one], [x])
        assert torch.equal(one, factor)
        truth = reference.low_rank_update(torch.zeros(d, k, dtype=torch.float64), x.cpu().double())
        torch.testing.assert_close(product(factor.cpu()), product(truth), rtol=1e-5, atol=1e-6)


def test_split_over_several_partial_sums(device):
    """More rows of H than one partial Gram matrix takes."""
    d = 2100 if device.name == "sim" else 5000
    x = decaying(3, d).float().to(device.torch)
    factor = torch.zeros(d, 2, device=device.torch)
    low_rank_update_([factor], [x])
    truth = reference.low_rank_update(torch.zeros(d, 2, dtype=torch.float64), x.cpu().double())
    assert float((product(factor.cpu()) - product(truth)).norm() / product(truth).norm()) < 2e-6


def test_masks_and_weights(device):
    x = decaying(9, 20).float().to(device.torch)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.bool, device=device.torch)
    weights = torch.rand(9, device=device.torch) * mask
    x[~mask] = torch.nan
    kept = x[mask].double().cpu()
    w = weights[mask].double().cpu()
    for given, expected in ((mask, kept.T @ kept), (weights, kept.T @ (w[:, None] * kept))):
        dense = torch.zeros(20, 20, device=device.torch)
        low = torch.zeros(20, 9, device=device.torch)
        kron_accumulate_([dense], [x], masks=[given])
        low_rank_update_([low], [x], masks=[given])
        torch.testing.assert_close(dense.double().cpu(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(product(low.cpu()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scalars", ["numbers", "tensors"])
def test_kron_accumulate(dtype: torch.dtype, scalars: str):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, 50, d, generator=generator).to(dtype) for d in (8, 33)]
    mask = torch.rand(3, 50, generator=generator) < 0.7
    alpha, beta = 0.3, 0.9
    starts = [torch.randn(d, d, generator=generator) for d in (8, 33)]
    factors = [s.clone() for s in starts]
    given = (alpha, beta) if scalars == "numbers" else map(torch.tensor, (alpha, beta))
    kron_accumulate_(
        factors, rows, **dict(zip(("alpha", "beta"), given, strict=True)), masks=[mask, None]
    )
    for factor, start, x, m in zip(factors, starts, rows, (mask, None), strict=True):
        options = {"alpha": alpha, "beta": beta, "mask": m}
        truth = reference.kron_accumulate(start.double(), x.double(), **options)
        same = reference.kron_accumulate(start, x.float(), **options)
        assert_no_worse_than_torch(factor, same, truth)
    kron_accumulate_(factors[0].fill_(torch.nan), rows[0], beta=0.0)  # old values are not read
    assert bool(torch.isfinite(factors[0]).all())


def test_strides_rows_and_halves(device):
    """Factors that are views, rows with leading dimensions, half-precision rows."""
    x = decaying(6, 15).reshape(2, 3, 15)
    whole = torch.zeros(4, 15, device=device.torch)
    low_rank_update_([whole.T], [x.to(device.torch, torch.bfloat16)])
    expected = torch.zeros(15, 4, device=device.torch)
    low_rank_update_([expected], [x.to(device.torch, torch.bfloat16).float().reshape(6, 15)])
    assert torch.equal(whole.T, expected)


def test_ranks_above_the_fused_ones():
    x = decaying(45, 130).float()
    factor = torch.zeros(130, 100)
    low_rank_update_(factor, x)
    torch.testing.assert_close(product(factor), product(x.T), rtol=1e-5, atol=1e-6)


def test_nothing_to_do(device):
    factor = torch.ones(4, 2, device=device.torch)
    low_rank_update_([factor], [torch.zeros(0, 4, device=device.torch)])
    assert bool((factor == 1).all())
    low_rank_update_([], [])
    low_rank_update_([factor.zero_()], [torch.zeros(3, 4, device=device.torch)])
    assert bool((factor == 0).all())


def test_nan_rows_show(device):
    factor = torch.zeros(6, 3, device=device.torch)
    low_rank_update_([factor], [torch.full((2, 6), torch.nan, device=device.torch)])
    assert bool(factor.isnan().any())


def test_same_bits_for_any_number_of_threads():
    shapes = [(64, 5), (300, 10), (2000, 3)]
    rows = [decaying(40, d).float() for d, _ in shapes]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            factors = [torch.zeros(s) for s in shapes]
            low_rank_update_(factors, rows)
            results.append(factors)
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )


@pytest.mark.parametrize("op", [kron_accumulate_, low_rank_update_])
def test_errors(op):
    good = torch.zeros(4, 4)
    for arguments, options, text in (
        (([good], []), {}, "lists of the same length"),
        ((good.half(), torch.ones(2, 4)), {}, "factor 0 must be float32 or float64"),
        ((torch.zeros(4), torch.ones(2, 4)), {}, r"factor 0 must have shape \(d, "),
        ((good, torch.ones(2, 3)), {}, r"rows 0 must have shape \(\.\.\., 4\), got \(2, 3\)"),
        ((good, torch.ones(2, 4, dtype=torch.int64)), {}, "rows 0 must be floating-point"),
        ((good, torch.ones(2, 4)), {"masks": torch.ones(3)}, r"mask 0 must have shape \(2,\)"),
        ((good, torch.ones(2, 4)), {"masks": torch.ones(2).long()}, "mask 0 must be bool"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"{op.__name__}: .*{text}"):
            op(*arguments, **options)
