"""csrc/core/small_linalg.h on the host: fp64 algebra of small matrices against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hard_matrices import KINDS, RANK_DEFICIENT, hard_matrix

SIZES = (1, 2, 3, 5, 8, 13, 16, 33, 64, 128)


@pytest.fixture(scope="module")
def core():
    return pytest.importorskip("bayes_kernels._core_tests", reason="core test module is not built")


def spd(r: int, condition: float, seed: int = 0) -> np.ndarray:
    """A symmetric positive definite matrix with a given condition number."""
    generator = np.random.default_rng(seed)
    q, _ = np.linalg.qr(generator.standard_normal((r, r)))
    values = np.geomspace(1.0, 1.0 / condition, r)
    m = (q * values) @ q.T
    return (m + m.T) / 2


def matrix(flat: list[float], r: int) -> np.ndarray:
    return np.array(flat).reshape(r, r)


@pytest.mark.parametrize("r", SIZES)
def test_multiply(core, r: int):
    generator = np.random.default_rng(r)
    a, b = generator.standard_normal((2, r, r))
    ours = matrix(core.small_multiply(a.ravel().tolist(), b.ravel().tolist(), r), r)
    np.testing.assert_allclose(ours, a @ b, rtol=0, atol=1e-13 * r)


@pytest.mark.parametrize("r", SIZES)
@pytest.mark.parametrize("condition", [1.0, 1.2, 2.0])
def test_inverse_root_by_newton_schulz(core, r: int, condition: float):
    s = 3.7 * spd(r, condition)
    ok, flat, spread = core.inverse_root_near_identity(s.ravel().tolist(), r, 0.95)
    if not ok:  # the bound of the spread grows with the fourth root of r
        assert condition == 2.0 and r > 8
        return
    root = matrix(flat, r)
    truth = np.linalg.inv(scipy.linalg.sqrtm(s).real)
    np.testing.assert_allclose(root, truth, rtol=0, atol=1e-13 * np.abs(truth).max() * r**0.5)
    np.testing.assert_array_equal(root, root.T)
    assert spread >= np.linalg.cond(s) * (1 - 1e-12)


@pytest.mark.parametrize("s", [np.diag([1.0, 1e-4]), np.diag([1.0, np.nan]), np.zeros((2, 2))])
def test_inverse_root_refuses_what_is_far_from_the_identity(core, s: np.ndarray):
    ok, _, _ = core.inverse_root_near_identity(s.ravel().tolist(), 2, 0.9)
    assert not ok


@pytest.mark.parametrize("r", SIZES)
@pytest.mark.parametrize("condition", [1.5, 1e6])
def test_cholesky_and_inverse(core, r: int, condition: float):
    s = spd(r, condition)
    ok, flat = core.cholesky(s.ravel().tolist(), r, 1e-14)
    assert ok
    u = matrix(flat, r)
    np.testing.assert_array_equal(u, np.triu(u))
    assert (np.diag(u) > 0).all()
    np.testing.assert_allclose(u.T @ u, s, rtol=0, atol=1e-15 * r)
    inverse = matrix(core.invert_upper(flat, r), r)
    np.testing.assert_array_equal(inverse, np.triu(inverse))
    np.testing.assert_allclose(inverse @ u, np.eye(r), rtol=0, atol=1e-14 * r * condition**0.5)


def test_cholesky_finds_rank_deficiency(core):
    x = np.random.default_rng(0).standard_normal((20, 4))
    x[:, 3] = x[:, 0] + x[:, 1]
    ok, _ = core.cholesky((x.T @ x).ravel().tolist(), 4, 1e-13)
    assert not ok


@pytest.mark.parametrize("r", SIZES)
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e12])
def test_symmetric_eigen(core, r: int, condition: float):
    s = 5.0 * spd(r, condition, seed=r)
    values, flat, sweeps = core.symmetric_eigen(s.ravel().tolist(), r)
    v = matrix(flat, r)
    np.testing.assert_allclose(v @ v.T, np.eye(r), rtol=0, atol=1e-14 * r)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(s), rtol=0, atol=2e-14 * r**0.5)
    np.testing.assert_allclose(s @ v.T, v.T * np.array(values), rtol=0, atol=5e-14 * r**0.5)
    assert sweeps < 40  # converged, not stopped
    again = matrix(core.compose(flat, values, r), r)
    np.testing.assert_allclose(again, s, rtol=0, atol=5e-14 * r**0.5)


def test_symmetric_eigen_of_singular_and_repeated_eigenvalues(core):
    x = np.random.default_rng(0).standard_normal((30, 4))
    low_rank = x @ x.T  # rank 4 of 30
    values, flat, _ = core.symmetric_eigen(low_rank.ravel().tolist(), 30)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(low_rank), rtol=0, atol=1e-12)
    v = matrix(flat, 30)
    np.testing.assert_allclose(v @ v.T, np.eye(30), rtol=0, atol=1e-13)
    values, _, sweeps = core.symmetric_eigen(np.zeros(9).tolist(), 3)
    assert values == [0, 0, 0] and sweeps == 1


def hard_gram(kind: str, r: int) -> np.ndarray:
    """The Gram matrix of a hard matrix, over its trace; exactly symmetric."""
    x = hard_matrix(kind, r + 7, r, seed=r).numpy()
    g = x.T @ x
    return (g + g.T) / (2 * np.trace(g) if g.any() else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-280, 1e-60, 1.0, 1e60, 1e300])
def test_symmetric_eigen_of_hard_matrices(core, kind: str, size: float):
    for r in (1, 2, 5, 16, 33, 64):
        unit = hard_gram(kind, r)
        values, flat, sweeps = core.symmetric_eigen((size * unit).ravel().tolist(), r)
        v = matrix(flat, r)
        np.testing.assert_allclose(v @ v.T, np.eye(r), rtol=0, atol=1e-14 * r)
        truth = np.linalg.eigvalsh(unit)
        np.testing.assert_allclose(np.sort(values) / size, truth, rtol=0, atol=1e-15 * r)
        np.testing.assert_allclose((v.T * (np.array(values) / size)) @ v, unit, atol=2e-15 * r)
        assert sweeps < 40


@pytest.mark.parametrize("kind", KINDS)
def test_cholesky_and_roots_of_hard_matrices(core, kind: str):
    """Either they say that there is none, or they are right; a matrix without full rank has none."""
    for r in (2, 5, 16, 33):
        s = hard_gram(kind, r)
        ok, flat = core.cholesky(s.ravel().tolist(), r, 1e-14)
        if ok:
            u = matrix(flat, r)
            length = np.sqrt(np.diag(s))
            np.testing.assert_allclose(
                u.T @ u / length / length[:, None], s / length / length[:, None], atol=1e-14 * r
            )
        deficient = kind in RANK_DEFICIENT and not (kind == "rank two" and r == 2)
        assert ok != deficient
        ok, flat, _ = core.inverse_root_near_identity(s.ravel().tolist(), r, 0.9)
        assert not (ok and deficient)
        if ok:
            root = matrix(flat, r)
            np.testing.assert_allclose(root @ s @ root, np.eye(r), rtol=0, atol=1e-13 * r)
