"""kron_accumulate_ and low_rank_update_ against their definitions: sums, and singular values in fp64."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_no_worse_than_torch
from hard_matrices import KINDS, hard_matrix

from bayes_kernels import _library, reference
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [5, 64, 300])
def test_low_rank_update_of_hard_rows(device, kind: str, d: int):
    """Finite rows give a finite factor, the best of its rank, however equal, small or large they are."""
    k = min(d, 10)
    dtypes = (torch.float32, torch.float64) if device.name == "cpu" else (torch.float32,)
    for dtype in dtypes:
        factor = torch.zeros(d, k, dtype=dtype, device=device.torch)
        truth = torch.zeros(d, k, dtype=torch.float64)
        for seed in range(3):
            x = hard_matrix(kind, d, 32, seed).mT.to(dtype)
            low_rank_update_(factor, x.to(device.torch))
            truth = reference.low_rank_update(truth, x.double())
        assert bool(factor.isfinite().all())
        scale = float(truth.abs().max()) or 1.0
        ours, best = product(factor.cpu().double() / scale), product(truth / scale)
        eps = torch.finfo(dtype).eps
        assert float((ours - best).norm()) <= 200 * eps * float(best.norm()), dtype


@pytest.mark.parametrize(
    ("k", "dtype"), [(6, torch.float32), (6, torch.float64), (100, torch.float32)]
)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-25, 1e18, 1e37, 1e-300, 1e200])
def test_low_rank_update_does_not_depend_on_the_size_of_the_rows(
    device, k: int, dtype, size: float
):
    if device.name == "sim" and (dtype == torch.float64 or k > 6):
        pytest.skip("no kernel")
    if dtype == torch.float32 and not 1e-45 < size < 1e38:
        pytest.skip("not a number of fp32")
    x = (decaying(40, 120) * size).to(dtype)
    factor = torch.zeros(120, k, dtype=dtype, device=device.torch)
    low_rank_update_(factor, x.to(device.torch))
    truth = torch.zeros(120, k, dtype=torch.float64)
    for part in (x.double() / size).split(32):
        truth = reference.low_rank_update(truth, part)
    error = product(factor.double().cpu() / size) - product(truth)
    # Of 1e-44 one bit is left.
    tolerance = 0.5 if size < 1e-40 else 3e-6 if dtype == torch.float32 else 1e-13
    assert float(error.norm()) < tolerance * float(product(truth).norm())


def test_memory_that_overlaps_is_refused(device):
    factor = torch.zeros(8, 2, device=device.torch)
    x = torch.ones(3, 8, device=device.torch)
    with pytest.raises(ValueError, match="must not overlap in memory"):
        low_rank_update_([factor, factor], [x, x])
    with pytest.raises(ValueError, match="must not overlap in memory"):
        low_rank_update_([factor[:6], factor[2:]], [x[:, :6].contiguous(), x[:, 2:].contiguous()])
    strided = torch.zeros(8, 4, device=device.torch)[::2]  # the op sees a copy of each
    with pytest.raises(ValueError, match="must not overlap in memory"):
        kron_accumulate_([strided, strided], [x[:, :4], x[:, :4]])


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


def symmetric(d: int, seed: int = 0) -> torch.Tensor:
    start = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return start + start.T


def gaussian(rows: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed))


# Sides up to 128 have a kernel, of which 96 takes two blocks of threads for each split of the rows;
# 600 takes two products.
@pytest.mark.parametrize("d", [1, 3, 8, 17, 64, 96, 128, 129, 600])
def test_kron_accumulate(device, d: int):
    """Accuracy rule with weights, masks and none, for row counts on both sides of every split."""
    if device.name == "sim" and d > 128:
        pytest.skip("no kernel")
    counts = (0, 1, 5, 300) if device.name == "sim" else (0, 1, 5, 300, 1000, 5000)
    for dtype in device.dtypes:
        for n in counts if d < 96 else (5, 1000 if device.name == "cpu" else 140):
            x = gaussian(n, d, seed=n).to(dtype)
            acc = torch.float64 if dtype == torch.float64 else torch.float32
            weights = torch.rand(n, generator=torch.Generator().manual_seed(1)).to(acc)
            kept = weights < 0.7
            for mask in (None, kept, weights * kept):
                start = symmetric(d).to(acc)
                options = {"alpha": 0.3, "beta": 0.9, "mask": mask}
                truth = reference.kron_accumulate(start.double(), x.double(), **options)
                same = reference.kron_accumulate(start, x.to(acc), **options)
                given = x.clone()
                if mask is not None:
                    given[mask == 0] = torch.nan
                factor = start.to(device.torch)
                kron_accumulate_(
                    factor,
                    given.to(device.torch),
                    alpha=0.3,
                    beta=torch.tensor(0.9, dtype=torch.float64, device=device.torch),
                    masks=None if mask is None else mask.to(device.torch),
                )
                assert torch.equal(factor, factor.T)
                what = f"{dtype} {n} rows"
                if acc == torch.float64:
                    torch.testing.assert_close(factor, truth, rtol=1e-13, atol=1e-13 * (1 + n))
                else:
                    assert_no_worse_than_torch(factor, same, truth, what=what)


@pytest.mark.parametrize("d", [5, 64, 130, 600])
@pytest.mark.parametrize("scalars", ["numbers", "tensors"])
def test_beta_zero_reads_nothing(device, d: int, scalars: str):
    x = gaussian(20, d).to(device.torch)
    factor = torch.full((d, d), torch.nan, device=device.torch)
    options = {"alpha": 0.5, "beta": 0.0}
    if scalars == "tensors":
        options = {k: torch.tensor(v, device=device.torch) for k, v in options.items()}
    kron_accumulate_(factor, x, **options)
    torch.testing.assert_close(factor, 0.5 * x.T @ x)
    kron_accumulate_(factor.fill_(torch.nan), x[:0], **options)
    assert bool((factor == 0).all())


def test_lists_of_kronecker_factors(device):
    """65 factors of several sides and dtypes in one call, with and without weights."""
    sides = [(1, 4, 7, 16, 40)[i % 5] for i in range(64)] + [100]
    dtypes = [(torch.float32, torch.bfloat16, torch.float16)[i % 3] for i in range(65)]
    starts = [symmetric(d, i).float().to(device.torch) for i, d in enumerate(sides)]
    rows = [
        gaussian((i * 7) % 11, d, i).to(device.torch, dtype)
        for i, (d, dtype) in enumerate(zip(sides, dtypes, strict=True))
    ]
    masks = [
        None if i % 2 else (torch.arange(len(x), device=device.torch) % 3 > 0).to(torch.float64)
        for i, x in enumerate(rows)
    ]
    factors = [s.clone() for s in starts]
    kron_accumulate_(factors, rows, masks=masks, beta=0.5)
    for factor, start, x, mask in zip(factors, starts, rows, masks, strict=True):
        one = start.clone()
        kron_accumulate_(one, x, masks=mask, beta=0.5)
        assert torch.equal(one, factor)
        truth = reference.kron_accumulate(start.double(), x.double(), beta=0.5, mask=mask)
        torch.testing.assert_close(factor.double(), truth, rtol=1e-5, atol=1e-5)


def test_kronecker_sums_do_not_depend_on_rows_left_out(device):
    """Weights of one and no weights give the same bits; so do rows beside which others are left out."""
    x = gaussian(150, 24).to(device.torch)
    keep = torch.arange(150, device=device.torch) < 64
    results = []
    for rows, masks in ((x[:64], None), (x[:64], torch.ones_like(x[:64, 0])), (x, keep)):
        factor = torch.zeros(24, 24, device=device.torch)
        kron_accumulate_(factor, rows, masks=masks)
        results.append(factor)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_kronecker_views_leading_dimensions_and_versions(device):
    """A strided factor, rows (2, 3, d) that are not contiguous and not aligned, and autograd's count."""
    x = gaussian(6, 33).reshape(2, 3, 33).to(device.torch)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.bool, device=device.torch)
    whole = torch.zeros(64, 64, device=device.torch)
    view = whole[::2, ::2]
    version = whole._version
    kron_accumulate_(view, x[..., 1:].to(torch.bfloat16), masks=mask)
    kept = x[mask][:, 1:].to(torch.bfloat16).float()
    torch.testing.assert_close(view, kept.T @ kept, rtol=1e-5, atol=1e-5)
    assert int((whole != 0).sum()) == int((view != 0).sum())
    assert whole._version > version
    shifted = torch.zeros(1 + 6 * 32, dtype=torch.bfloat16, device=device.torch)[1:].view(6, 32)
    shifted.copy_(x.reshape(6, 33)[:, 1:])
    dense = torch.zeros(32, 32, device=device.torch)
    version = dense._version
    kron_accumulate_(dense, shifted, masks=mask.flatten().float())
    assert torch.equal(dense, view)
    assert dense._version > version


def test_kronecker_factors_larger_than_a_product(monkeypatch):
    """More than two blocks, none of which ends where another does; the lower triangle is not read."""
    from bayes_kernels.functional import curvature

    monkeypatch.setitem(curvature._PRODUCT_ROWS, "cpu", 40)
    monkeypatch.setitem(curvature._MIRROR_ROWS, "cpu", 50)
    x, start = gaussian(50, 131), symmetric(131).float()
    for beta in (0.9, torch.tensor(0.9)):
        factor = start.clone()
        factor.masked_fill_(torch.ones(131, 131).tril(-1) > 0, torch.nan)
        kron_accumulate_(factor, x, beta=beta)
        assert torch.equal(factor, factor.T)
        torch.testing.assert_close(factor, 0.9 * start + x.T @ x, rtol=1e-5, atol=1e-4)
    small = start[:50, :50].contiguous()
    kron_accumulate_(small.masked_fill_(torch.ones(50, 50).tril(-1) > 0, torch.nan), x[:, :50])
    torch.testing.assert_close(small, start[:50, :50] + x[:, :50].T @ x[:, :50])


def test_kronecker_op_refuses_what_it_cannot_take(device):
    """Direct calls of the op, which Python's checks do not protect."""
    factor, x = torch.zeros(4, 4, device=device.torch), torch.ones(3, 4, device=device.torch)
    one = torch.ones((), dtype=torch.float64, device=device.torch)
    wide = torch.zeros(129, 129, device=device.torch)
    for arguments, text in (
        (([], [], [], one, one), "lists of the same length"),
        (([factor], [x], [x[:, 0], x[:, 0]], one, one), "lists of the same length"),
        (([wide], [wide], [], one, one), "d at most 128"),
        (([factor], [x[:, :3]], [], one, one), "rows 0 must have shape"),
        (([factor], [x.double()], [], one, one), "float64 beside float64 factors only"),
        (([factor], [x], [x[:2, 0].contiguous()], one, one), "mask 0 must be empty or have shape"),
        (([factor], [x], [x[:, 0] > 0], one, one), "in the dtype of the factors"),
        (([factor], [x], [], one.float(), one), "beta must be a float64 tensor of one element"),
        (([factor, factor], [x, x], [], one, one), "must not overlap in memory"),
        (([factor], [factor], [], one, one), "an input must not overlap"),
    ):
        with pytest.raises(RuntimeError, match=f"kron_accumulate_: .*{text}"):
            _library.ops.kron_accumulate_(*arguments)


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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_show(device, bad: float):
    for d, k in ((6, 3), (110, 100)):
        factor = torch.zeros(d, k, device=device.torch)
        rows = torch.ones(2, d, device=device.torch)
        rows[1, 4] = bad
        low_rank_update_([factor], [rows])
        assert bool(factor.isnan().any())


def test_same_bits_for_any_number_of_threads():
    shapes = [(64, 5), (300, 10), (2000, 3)]
    rows = [decaying(40, d).float() for d, _ in shapes]
    many = [gaussian(9000, 60), gaussian(100, 60), gaussian(5000, 3)]
    weights = [torch.rand(9000, generator=torch.Generator().manual_seed(2)), None, None]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            factors = [torch.zeros(s) for s in shapes]
            low_rank_update_(factors, rows)
            dense = [torch.ones(x.shape[1], x.shape[1]) for x in many]
            kron_accumulate_(dense, many, masks=weights)
            results.append(factors + dense)
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
    if op is kron_accumulate_:
        with pytest.raises(
            ValueError, match="alpha must be a number or a floating-point tensor of one"
        ):
            op(good, torch.ones(2, 4), alpha=torch.ones(2))
