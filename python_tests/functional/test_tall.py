"""Tall matrices: Gram matrices, retractions, the landing field and the fused steps."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.linalg
import torch
from accuracy import assert_no_worse_than_torch
from hard_matrices import KINDS, RANK_DEFICIENT, hard_matrix
from torch import Tensor

from bayes_kernels import _library, reference
from bayes_kernels import functional as F

SHAPES = [(1, 1), (9, 1), (7, 3), (3, 3), (40, 8), (301, 16), (70, 33), (64, 64)]
RETRACT = {"polar": F.polar_retract_, "qr": F.qr_retract_}
DEFINITION = {"polar": reference.polar_retract, "qr": reference.qr_retract}


def with_condition(
    n: int, r: int, condition: float, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A tall matrix with singular values from 1 down to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))
    sigma = torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)
    return ((u * sigma) @ v.mT).to(dtype)


def talls(device, shapes=SHAPES, condition: float = 1.5, dtype=torch.float32) -> list[Tensor]:
    return [
        with_condition(n, r, condition, seed=i, dtype=dtype).to(device.torch)
        for i, (n, r) in enumerate(shapes)
    ]


def randoms(like: list[Tensor], scale: float = 1.0, seed: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(x.shape, generator=generator)).to(x) for x in like]


def defect(x: Tensor) -> float:
    x = x.double()
    return torch.linalg.matrix_norm(x.mT @ x - torch.eye(x.shape[1]).to(x)).item()


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


# --- Gram matrices -----------------------------------------------------------------------------


def test_gram(device):
    xs = randoms(talls(device))
    for i, (ours, x) in enumerate(zip(F.gram(xs), xs, strict=True)):
        assert ours.dtype == x.dtype and torch.equal(ours, ours.mT)
        assert_no_worse_than_torch(
            ours, reference.gram(x), reference.gram(x.double()), what=f"matrix {i}"
        )


@pytest.mark.parametrize("r", [1, 3, 8, 33, 64, 65, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrices_are_symmetric_to_the_bit(device, r: int, dtype):
    if device.name == "sim" and (r > 64 or dtype == torch.float64):
        pytest.skip("no kernel")
    if device.name == "cuda" and dtype == torch.float64:
        pytest.skip("not on a GPU")
    x = torch.randn(3 * r + 50, r, generator=torch.Generator().manual_seed(r), dtype=torch.float64)
    x = x.to(device.torch, dtype)
    grams = F.gram([x, x[: r + 1]])
    for g in grams:
        assert torch.equal(g, g.mT) and g.dtype == dtype
    # Above rank 64 it is torch's product, whose rounding errors may add up as a walk of its terms.
    units = 4 if r <= 64 else len(x) ** 0.5
    scale = units * torch.finfo(dtype).eps * float(grams[0].diagonal().max())
    torch.testing.assert_close(grams[0].double(), reference.gram(x.double()), rtol=0, atol=scale)


@pytest.mark.parametrize("r", [5, 16])
def test_partial_sums_of_long_matrices_are_all_added(r: int):
    """The CPU kernels add up 3,072 rows at a time; there are three sums here, and a bit of a fourth."""
    x = torch.randn(3 * 3072 + 5, r, generator=torch.Generator().manual_seed(r))
    assert_no_worse_than_torch(F.gram(x)[0], x.mT @ x, x.double().mT @ x.double(), what="gram")
    F.polar_retract_([x])
    assert defect(x) < 1e-6 * math.sqrt(r)


# --- retractions -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["polar", "qr"])
@pytest.mark.parametrize("with_steps", [False, True])
def test_retraction_agrees_with_its_definition(device, kind: str, with_steps: bool):
    xs = talls(device)
    steps = randoms(xs, 0.1) if with_steps else None
    given = [x.clone() for x in xs]
    info = RETRACT[kind](xs, steps)
    assert info.dtype == torch.int32 and info.tolist() == [F.RETRACTED] * len(xs)
    for i, (ours, x) in enumerate(zip(xs, given, strict=True)):
        s = None if steps is None else steps[i]
        truth = DEFINITION[kind](x.double(), None if s is None else s.double())
        assert_no_worse_than_torch(ours, DEFINITION[kind](x, s), truth, what=f"matrix {i}")
        assert defect(ours) <= 1e-6 * x.shape[1] ** 0.5


def test_scipy_and_torch_as_oracles(device):
    x = with_condition(50, 7, 4.0)
    polar, qr = x.to(device.torch, copy=True), x.to(device.torch, copy=True)
    F.polar_retract_(polar)
    F.qr_retract_(qr)
    u, _ = scipy.linalg.polar(x.double().numpy())
    torch.testing.assert_close(polar.double().cpu(), torch.from_numpy(u), rtol=0, atol=2e-7)
    q, r = torch.linalg.qr(x.double())
    torch.testing.assert_close(qr.double().cpu(), q * r.diagonal().sign(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", ["polar", "qr"])
@pytest.mark.parametrize("condition", [30.0, 1e3, 1e4, 1e6])
def test_ill_conditioned(device, kind: str, condition: float):
    shapes = [(40, 3), (90, 16), (70, 33)]
    xs = talls(device, shapes, condition)
    given = [x.clone() for x in xs]
    info = RETRACT[kind](xs).tolist()
    for i, (ours, x) in enumerate(zip(xs, given, strict=True)):
        assert defect(ours) <= 1e-7 * x.shape[1] ** 0.5
        assert_no_worse_than_torch(
            ours, DEFINITION[kind](x), DEFINITION[kind](x.double()), what=f"matrix {i}"
        )
    # The condition number decides: of the matrix for polar, with unit columns for QR.
    if condition >= (1e4 if kind == "polar" else 1e6):
        assert info == [F.REFINED] * len(xs)
    elif condition <= 30:
        assert info == [F.RETRACTED] * len(xs)


@pytest.mark.parametrize("kind", ["polar", "qr"])
def test_singular_gram_matrix_takes_the_shifted_factor(device, kind: str):
    # Columns that differ in one place by 2^-20: full rank, condition number about 1e8.
    x = torch.zeros(20, 3)
    x[:, 0] = torch.arange(1, 21)
    x[:, 1] = x[:, 0]
    x[:, 2] = x[:, 0]
    x[0, 1] += 2.0**-20
    x[1, 2] += 2.0**-20
    y = x.to(device.torch, copy=True)
    assert RETRACT[kind]([y]).item() == F.SHIFTED
    assert defect(y) <= 1e-6
    # The same column space, to the accuracy that fp64 leaves at this condition number.
    q, _ = torch.linalg.qr(x.double())
    y = y.double().cpu()
    assert (y - q @ (q.mT @ y)).norm() < 1e-4


@pytest.mark.parametrize("kind", ["polar", "qr"])
def test_failures_are_reported_and_stay_alone(device, kind: str):
    deficient = torch.randn(12, 3)
    deficient[:, 2] = deficient[:, 0]
    no_step = torch.full((6, 2), math.inf)
    xs = [
        with_condition(30, 3, 2.0),
        deficient,
        torch.full((9, 2), math.nan),
        torch.zeros(8, 2),
        with_condition(6, 2, 1.0),
        with_condition(30, 3, 2.0),
    ]
    steps = [torch.zeros_like(x) for x in xs]
    steps[4] = no_step
    xs, steps = ([t.to(device.torch) for t in ts] for ts in (xs, steps))
    given = [x.clone() for x in xs]
    info = RETRACT[kind](xs, steps).tolist()
    assert info == [
        F.RETRACTED, F.RANK_DEFICIENT, F.NOT_FINITE, F.RANK_DEFICIENT, F.NOT_FINITE, F.RETRACTED,
    ]  # fmt: skip
    for i in (1, 2, 3, 4):  # as they were, without the step
        torch.testing.assert_close(xs[i], given[i], rtol=0, atol=0, equal_nan=True)
    for i in (0, 5):
        assert defect(xs[i]) < 1e-6
    alone = given[0].clone()  # what else is in the list does not matter
    RETRACT[kind]([alone], [torch.zeros_like(alone)])
    assert torch.equal(xs[0], alone)


@pytest.mark.parametrize("kind", ["polar", "qr"])
@pytest.mark.parametrize("r", [2, 3, 5, 16])
def test_info_follows_the_condition_number_and_not_rounding_errors(kind: str, r: int):
    """Also behind columns that are nearly parallel, where a pivot is rounding errors times a thousand."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        exponent = 12 * float(torch.rand((), generator=generator, dtype=torch.float64))
        x = with_condition(r + 1 + seed % 5, r, 10**exponent, seed=seed, dtype=torch.float64)
        unit = x / (x.norm(dim=0) if kind == "qr" else 1)
        condition = float(torch.linalg.cond(unit))
        info = int(RETRACT[kind]([x])[0])
        assert defect(x) < 1e-14 * r, (seed, condition)
        if condition > 3e7:
            assert info == F.SHIFTED, (seed, condition)
        elif 20 < condition < 3e6:
            assert info == F.REFINED, (seed, condition)
        elif condition < 5:
            assert info == F.RETRACTED, (seed, condition)


@pytest.mark.parametrize("kind", ["polar", "qr"])
@pytest.mark.parametrize("matrix", KINDS)
def test_retraction_of_hard_matrices(device, kind: str, matrix: str):
    """An orthonormal result, the right one, or the matrix as it was and a code that says so."""
    dtypes = (torch.float32, torch.float64) if device.name == "cpu" else (torch.float32,)
    shapes = [(9, 2), (40, 5), (70, 33)] + ([(80, 70)] if device.name == "cpu" else [])
    for dtype, (n, r) in itertools.product(dtypes, shapes):
        x = hard_matrix(matrix, n, r).to(dtype)
        ours = x.to(device.torch, copy=True)
        info = int(RETRACT[kind]([ours])[0])
        what = f"{dtype} {n, r}: info {info}"
        if matrix in RANK_DEFICIENT and not (matrix == "rank two" and r == 2):
            assert info == F.RANK_DEFICIENT, what
        elif matrix not in ("graded", "mixed"):
            assert info in (F.RETRACTED, F.REFINED), what
        elif kind == "qr":  # columns of any length
            assert info in (F.RETRACTED, F.REFINED), what
        if info >= F.RANK_DEFICIENT:
            assert torch.equal(ours.cpu(), x), what
            continue
        eps = torch.finfo(dtype).eps
        by_torch = r > 64
        assert defect(ours) <= 50 * eps * (r if dtype == torch.float64 else r**0.5), what
        if matrix in ("graded", "mixed") and kind == "polar":
            continue
        # Of unit columns, which have the same Q; the polar factor is that of any multiple.
        unit = x.double() / (x.double().norm(dim=0) if kind == "qr" else x.double().abs().max())
        truth = DEFINITION[kind](unit)
        condition = float(torch.linalg.cond(unit))
        atol = 10 * eps * condition if by_torch else 2 * eps + 1e-13 * condition**2
        torch.testing.assert_close(ours.double().cpu(), truth, rtol=0, atol=atol, msg=what)


@pytest.mark.parametrize("kind", ["polar", "qr"])
@pytest.mark.parametrize("matrix", KINDS)
def test_steps_along_hard_directions(device, kind: str, matrix: str):
    for n, r in ((9, 2), (40, 5), (70, 33)):
        x = reference.qr_retract(hard_matrix("random", n, r, seed=1)).float()
        direction = hard_matrix(matrix, n, r).float()
        ours = x.to(device.torch, copy=True)
        info = int(F.stiefel_step_([ours], [direction.to(device.torch)], 0.1, retraction=kind)[0])
        if info >= F.RANK_DEFICIENT:
            assert matrix in (*RANK_DEFICIENT, "mixed", "huge"), (n, r, info)
            assert torch.equal(ours.cpu(), x)
        else:
            assert defect(ours) <= 1e-5 * r**0.5, (n, r, info)
            if matrix in ("zero", "tiny"):
                torch.testing.assert_close(ours.cpu(), x, rtol=0, atol=1e-6)


def test_polar_turns_with_a_rotation(device):
    x = with_condition(80, 8, 3.0).to(device.torch)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0].float().to(device.torch)
    turned = x @ rotation
    F.polar_retract_([x, turned])
    torch.testing.assert_close(turned, x @ rotation, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["polar", "qr"])
def test_retraction_agrees_with_the_step_to_first_order(device, kind: str):
    x = with_condition(60, 5, 1.0).to(device.torch)
    F.polar_retract_(x)
    xi = reference.tangent_projection(x, torch.randn(60, 5).to(x))
    errors = []
    for size in (4e-2, 2e-2, 1e-2):
        y = x.clone()
        RETRACT[kind]([y], [size * xi / xi.norm()])
        errors.append((y.double() - (x + size * xi / xi.norm()).double()).norm().item())
    assert errors[0] < 1e-3
    for larger, smaller in itertools.pairwise(errors):
        assert 3.5 < larger / smaller < 4.5  # second order is what is left


def test_scale_of_the_input_does_not_matter(device):
    x = with_condition(50, 6, 2.0).to(device.torch)
    scaled = [x * s for s in (1e-12, 1.0, 1e12)]
    for kind in RETRACT:
        ys = [s.clone() for s in scaled]
        assert RETRACT[kind](ys).tolist() == [F.RETRACTED] * 3
        torch.testing.assert_close(ys[0], ys[1], rtol=0, atol=2e-7)
        torch.testing.assert_close(ys[2], ys[1], rtol=0, atol=2e-7)


def test_columns_of_different_length_do_not_trouble_qr(device):
    x = with_condition(50, 6, 1.5)
    scaled = (x * torch.logspace(-6, 6, 6)).to(device.torch)
    info = F.qr_retract_(scaled)
    assert info.item() == F.RETRACTED and defect(scaled) < 1e-6


@pytest.mark.parametrize("condition", [1.5, 1e3, 1e6])
def test_double_precision_on_the_cpu(condition: float):
    for n, r in ((20, 3), (90, 17)):
        x = with_condition(n, r, condition, dtype=torch.float64)
        polar, qr = x.clone(), x.clone()
        info = [F.polar_retract_(polar).item(), F.qr_retract_(qr).item()]
        assert info == [F.RETRACTED if condition < 10 else F.REFINED] * 2
        assert defect(polar) < 1e-14 * r and defect(qr) < 1e-14 * r
        # Forward errors: condition number times unit roundoff for Q, its square for the polar factor.
        torch.testing.assert_close(qr, reference.qr_retract(x), rtol=0, atol=1e-14 * condition)
        torch.testing.assert_close(
            polar, reference.polar_retract(x), rtol=0, atol=1e-14 * condition**2
        )


# --- steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["polar", "qr"])
@pytest.mark.parametrize("off", [0.0, 0.05])
def test_stiefel_step(device, kind: str, off: float):
    """Also where x is off the manifold, and with directions that are mostly normal to it."""
    xs = talls(device, condition=1.0)
    F.polar_retract_(xs)
    xs = [x + off * e for x, e in zip(xs, randoms(xs), strict=True)]
    directions = randoms(xs, seed=4)
    directions[4] = xs[4] @ torch.randn(8, 8).to(xs[4])
    lr = torch.tensor(0.03, device=device.torch)
    given = [x.clone() for x in xs]
    info = F.stiefel_step_(xs, directions, lr, retraction=kind)
    assert info.tolist() == [F.RETRACTED] * len(xs)
    for i, (ours, x, d) in enumerate(zip(xs, given, directions, strict=True)):
        same = reference.stiefel_step(x, d, lr, retraction=kind)
        truth = reference.stiefel_step(x.double(), d.double(), lr.double(), retraction=kind)
        assert_no_worse_than_torch(ours, same, truth, what=f"matrix {i}")
        assert defect(ours) <= 1e-6 * x.shape[1] ** 0.5


def test_stiefel_step_equals_projection_and_retraction_for_large_steps(device):
    x = with_condition(60, 5, 1.0).to(device.torch)
    F.polar_retract_(x)
    d = randoms([x], 1e3)[0]
    ours = x.clone()
    assert F.stiefel_step_([ours], [d], 1.0).item() == F.RETRACTED
    truth = reference.stiefel_step(x.double(), d.double(), 1.0)
    assert_no_worse_than_torch(ours, reference.stiefel_step(x, d, 1.0), truth)
    assert defect(ours) < 1e-6


def test_stiefel_step_with_bad_gradients(device):
    xs = [x.to(device.torch) for x in (with_condition(9, 2, 1.0), with_condition(9, 2, 1.0))]
    given = [x.clone() for x in xs]
    directions = [torch.full_like(xs[0], math.nan), torch.ones_like(xs[1])]
    assert F.stiefel_step_(xs, directions, 0.1).tolist() == [F.NOT_FINITE, F.RETRACTED]
    assert torch.equal(xs[0], given[0]) and not torch.equal(xs[1], given[1])


def test_landing_field_and_step(device):
    xs = talls(device)
    grads = randoms(xs)
    lam, lr = torch.tensor(0.7, device=device.torch), 0.01
    fields = F.landing_field(xs, grads, lam)
    stepped = [x.clone() for x in xs]
    assert F.landing_step_(stepped, grads, lr, lam) is None
    for i, (field, after, x, g) in enumerate(zip(fields, stepped, xs, grads, strict=True)):
        truth = reference.landing_field(x.double(), g.double(), lam.double())
        assert_no_worse_than_torch(
            field, reference.landing_field(x, g, lam), truth, what=f"field {i}"
        )
        assert_no_worse_than_torch(
            after,
            reference.landing_step(x, g, lr, lam),
            x.double() - lr * truth,
            what=f"step {i}",
        )


def test_landing_field_equals_the_published_formula():
    x, g = with_condition(30, 4, 1.5, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    published = (g @ x.mT - x @ g.mT) @ x + 0.3 * x @ (x.mT @ x - eye)
    torch.testing.assert_close(reference.landing_field(x, g, 0.3), published)
    torch.testing.assert_close(F.landing_field([x], [g], 0.3)[0], published)
    pull = x @ (x.mT @ x - eye)
    turn = reference.landing_field(x, g, 0.0)
    assert abs((turn * pull).sum()) < 1e-12 * turn.norm() * pull.norm()


def test_landing_comes_back_to_the_manifold(device):
    x = 1.1 * with_condition(60, 4, 1.2).to(device.torch)
    target = with_condition(60, 4, 1.0, seed=5).to(device.torch)
    for _ in range(60):
        F.landing_step_([x], [x - target], 0.2, 1.0)
    assert defect(x) < 1e-2


# --- contract ----------------------------------------------------------------------------------


def test_many_matrices_in_one_call(device):
    shapes = [(3 + i % 7, 1 + i % 3) for i in range(130)]
    xs = talls(device, shapes)
    given = [x.clone() for x in xs]
    assert F.polar_retract_(xs).tolist() == [F.RETRACTED] * 130
    for ours, x in zip(xs, given, strict=True):
        torch.testing.assert_close(
            ours.double(), reference.polar_retract(x.double()), rtol=0, atol=1e-6
        )


def test_same_bits_for_any_number_of_threads():
    shapes = [(7000, 5), (300, 16)] + [(40, 3)] * 9
    device = type("Cpu", (), {"torch": torch.device("cpu")})
    before, results = torch.get_num_threads(), []
    try:
        for threads, count in ((1, 11), (2, 11), (2, 2)):
            torch.set_num_threads(threads)
            xs = talls(device, shapes)[:count]
            grads = randoms(xs)
            out = F.landing_field(xs, grads, 0.1) + F.gram(xs)
            F.stiefel_step_(xs, grads, 0.1, retraction="qr")
            results.append([*xs[:2], *out[:2]])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_other_strides_are_copied_and_copied_back(device):
    x, d = with_condition(31, 6, 1.3).to(device.torch), torch.randn(31, 6).to(device.torch)
    rows = x.clone()
    columns = x.mT.contiguous().mT  # as the transpose of a wide parameter
    wide = torch.zeros(31, 9).to(x)
    wide[:, :6] = x
    info = F.stiefel_step_([rows, columns, wide[:, :6]], [d, d.mT.contiguous().mT, d], 0.1)
    assert info.tolist() == [0, 0, 0] and columns.stride() == (1, 31)
    assert torch.equal(columns, rows) and torch.equal(wide[:, :6], rows)
    assert (wide[:, 6:] == 0).all()
    assert torch.equal(F.gram(columns)[0], F.gram(rows)[0])


def test_unaligned_matrices(device):
    """Storage offsets that rule out vector accesses."""
    flat = torch.zeros(1 + 40 * 8).to(device.torch)
    x = with_condition(40, 8, 1.3).to(device.torch)
    view = flat[1:].view(40, 8)
    view.copy_(x)
    F.polar_retract_([view])
    F.polar_retract_([x])
    assert torch.equal(view, x) and flat[0] == 0


def test_empty_list_and_single_tensor(device):
    assert F.gram([]) == [] and F.landing_field([], [], 0.1) == []
    assert F.polar_retract_([]).shape == (0,) and F.qr_retract_([], []).shape == (0,)
    assert F.stiefel_step_([], [], 0.1).shape == (0,) and F.landing_step_([], [], 1.0, 1.0) is None
    x = with_condition(5, 2, 2.0).to(device.torch)
    assert F.polar_retract_(x).tolist() == [0] and defect(x) < 1e-6


@pytest.mark.parametrize("kind", ["polar", "qr"])
def test_rank_above_64_takes_pytorch(kind: str):
    x = with_condition(150, 70, 2.0)
    bad = torch.full((80, 66), math.nan)
    deficient = with_condition(90, 65, 2.0)
    deficient[:, 3] = 0
    xs = [x.clone(), bad, deficient.clone(), with_condition(9, 2, 2.0)]
    info = RETRACT[kind](xs)
    assert info.tolist() == [F.RETRACTED, F.NOT_FINITE, F.RANK_DEFICIENT, F.RETRACTED]
    torch.testing.assert_close(xs[0], DEFINITION[kind](x), rtol=0, atol=1e-6)
    assert torch.equal(xs[2], deficient) and xs[1].isnan().all()
    # Those that the kernels can take go to the kernels, whatever else is in the list.
    mixed, alone = with_condition(9, 2, 2.0), with_condition(9, 2, 2.0)
    step, wide = torch.full((9, 2), 0.1), with_condition(80, 66, 2.0)
    RETRACT[kind]([wide, mixed], [torch.zeros(80, 66), step])
    RETRACT[kind]([alone], [step])
    assert torch.equal(mixed, alone) and torch.equal(F.gram([wide, mixed])[1], F.gram(mixed)[0])
    g = torch.randn_like(x)
    torch.testing.assert_close(F.gram(x)[0], x.mT @ x)
    torch.testing.assert_close(
        F.landing_field(x, g, 0.1)[0], reference.landing_field(x, g, 0.1), rtol=0, atol=1e-5
    )
    y, z = x.clone(), x.clone()
    F.stiefel_step_(y, g, 0.01, retraction=kind)
    F.landing_step_(z, g, 0.01, 0.1)
    torch.testing.assert_close(
        y, reference.stiefel_step(x, g, 0.01, retraction=kind), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(z, reference.landing_step(x, g, 0.01, 0.1), rtol=0, atol=1e-5)


def test_no_gradient_and_parameters_change_in_place():
    x = torch.nn.Parameter(with_condition(9, 3, 2.0))
    loss = (x**2).sum()
    F.polar_retract_([x])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert x.requires_grad and x.grad_fn is None and defect(x.detach()) < 1e-6
    assert not F.gram([x])[0].requires_grad
    assert not F.landing_field([x], [torch.ones(9, 3)], 0.1)[0].requires_grad


def test_memory_that_overlaps_is_refused(device):
    a, b = (with_condition(9, 3, 2.0).to(device.torch) for _ in range(2))
    with pytest.raises(ValueError, match="no input may overlap xs"):
        F.polar_retract_([a, b], [b, a])
    wide = with_condition(9, 3, 2.0).T.contiguous().to(device.torch)
    with pytest.raises(ValueError, match="pass each one once"):
        F.polar_retract_([wide.T, wide.T])
    F.polar_retract_([a], [a])  # the step may be the matrix itself
    assert defect(a) < 1e-6


def test_huge_steps_are_retracted_exactly_all_the_same(device):
    """The Gram matrix of x - lr d is then a small difference of large numbers."""
    x = with_condition(40, 4, 1.0)
    symmetric = torch.arange(16.0).reshape(4, 4)
    direction = 1e4 * x @ (symmetric + symmetric.T)  # normal to the manifold: the step is nothing
    x, direction = x.to(device.torch), direction.to(device.torch)
    info = F.stiefel_step_([x], [direction], 1.0)
    assert int(info[0]) == 1 and defect(x) < 1e-5


@pytest.mark.parametrize("scale", [1e-37, 1e37])
def test_matrices_far_from_unit_size(device, scale: float):
    x = (with_condition(40, 4, 1.5).double() * scale).float().to(device.torch)
    F.polar_retract_([x])
    assert defect(x) < 1e-5


def test_ranks_beyond_the_kernels_are_exact_under_autocast():
    x = with_condition(90, 70, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.gram([x])[0].dtype == torch.float32
        F.polar_retract_([x])
    assert defect(x) < 1e-4


def test_compile_in_one_graph():
    def step(x: Tensor, y: Tensor, d: Tensor, lr: Tensor) -> tuple[Tensor, ...]:
        info = F.stiefel_step_([x, y], [d, d[:9, :2]], lr)
        F.landing_step_([x], [d], lr, 0.5)
        again = F.qr_retract_([y], [0.1 * d[:9, :2]])
        return info + again, F.gram([x])[0], F.landing_field([x], [d], 0.1)[0]

    d, lr = torch.randn(30, 4), torch.tensor(0.1)
    inputs = [[with_condition(30, 4, 1.0), with_condition(9, 2, 1.0)] for _ in range(2)]
    expected = step(*inputs[0], d, lr)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs[1], d, lr)
    for a, b in zip([*expected, *inputs[0]], [*compiled, *inputs[1]], strict=True):
        assert torch.equal(a, b)


X = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: F.gram([torch.ones(2, 4)]), r"gram: xs\[0\] must be tall"),
        (lambda: F.gram([X, torch.ones(3)]), r"gram: xs\[1\] must be a matrix"),
        (lambda: F.polar_retract_([X.half()]), r"polar_retract_: xs\[0\] must be float32"),
        (lambda: F.polar_retract_([X, X.double()]), r"polar_retract_: xs\[1\] must be float32"),
        (lambda: F.qr_retract_([X.clone()], []), "qr_retract_: steps must hold one tensor"),
        (lambda: F.qr_retract_([X], [X[:3]]), r"qr_retract_: steps\[0\] must have the shape"),
        (lambda: F.landing_field([X], [X.double()], 1.0), r"landing_field: grads\[0\] must be"),
        (lambda: F.landing_step_([X], [X], torch.ones(2), 1.0), "landing_step_: lr must be a num"),
        (lambda: F.stiefel_step_([X], [X], 1.0, retraction="cayley"), "retraction must be one of"),
        (
            lambda: F.gram([torch.ones(4, 2, device="meta")]),
            "must hold data, got a tensor on the meta",
        ),
    ],
)
def test_errors(call, text: str):
    with pytest.raises((ValueError, TypeError), match=text):
        call()


def test_matrices_of_a_list_must_not_overlap(device):
    x = with_condition(8, 2, 2.0).to(device.torch)
    with pytest.raises(ValueError, match="must not overlap"):
        F.polar_retract_([x, x[2:]])


def test_ops_refuse_what_python_would_have_refused():
    with pytest.raises(RuntimeError, match="must be tall"):
        _library.ops.tall_gram([torch.ones(2, 3)])
    with pytest.raises(RuntimeError, match="at most 64 columns"):
        _library.ops.tall_gram([torch.ones(70, 65)])
    with pytest.raises(RuntimeError, match="retraction must be"):
        _library.ops.tall_retract_([X.clone()], [], "cayley")
