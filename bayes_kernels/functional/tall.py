"""Tall matrices: Gram matrices, retractions to the Stiefel manifold, landing field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .. import _library, reference
from .._library import MAX_FUSED_RANK, fake
from .arguments import (
    as_list,
    check_choice,
    check_tensors,
    check_writable,
    no_autocast,
    no_transform,
    scalar,
)

# Entries of `info`, one for each matrix.
RETRACTED, REFINED, SHIFTED, RANK_DEFICIENT, NOT_FINITE = range(5)
RETRACTIONS = ("polar", "qr")

T = TypeVar("T")


@torch.no_grad()
def gram(xs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Gram matrices of a list of tall matrices: x^T x for each, in launches for lists.

    Args:
        xs: matrices (n_i, r_i), fp32 (fp64 on the CPU); n_i >= r_i >= 1; shapes may differ. A matrix
            that is not row-major contiguous is copied first.

    Returns:
        One (r_i, r_i) for each, exactly symmetric, in the dtype of the matrices; sums are fp64. Not
        differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Cost: each matrix is read once. On a GPU a launch takes up to 500 matrices (60 with drivers older than
    CUDA 12.1) of one class of widths. Ranks above 64 take PyTorch's product, one by one.
    """
    matrices = _tall_list("gram", "xs", xs)
    if not matrices:
        return []
    if _beyond_fused(matrices):
        with no_autocast(matrices[0]):
            return _by_rank(matrices, lambda xs: gram(xs), _gram_one)
    return _library.ops.tall_gram(_row_major(matrices))


@torch.no_grad()
def polar_retract_(
    xs: Tensor | Sequence[Tensor], steps: Tensor | Sequence[Tensor] | None = None
) -> Tensor:
    """Polar retraction of a list of tall matrices, in place: x <- polar factor of x + step.

        uf(w) = w (w^T w)^(-1/2), w = x + step: the orthonormal matrix nearest to w

    Args:
        xs: matrices (n_i, r_i), fp32 (fp64 on the CPU), n_i >= r_i >= 1, overwritten. They must not
            overlap in memory. A matrix that is not row-major contiguous is copied for the call and
            copied back: one more read and write of it.
        steps: added first, within the same passes; None, or a list of the shapes of xs.

    Returns:
        info, int32 (len(xs),), on the device of the matrices and not waited for. 0: one Gram matrix
        sufficed. 1 (`REFINED`): the condition number asked for a second one (from 3e3 in fp32; in fp64,
        from 10). 2 (`SHIFTED`): the Gram matrix was singular to working precision (condition number
        about 1e7 and more), and a shifted factor came first. 3 (`RANK_DEFICIENT`): no full rank to
        working precision. 4 (`NOT_FINITE`): an infinity or NaN in x or step, or squares that overflow.
        With 3 and 4 that matrix keeps its value, without the step; others are not affected.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Not differentiable. Cost: two passes, whatever the condition number up to 3e3: x and step are read
    twice and x is written once. The r x r function is computed in fp64. Ranks above 64 take an SVD for
    each matrix, with the same meaning of info (0, 3 and 4).

    Sources: Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, section
    4.1.1; Higham, "Functions of Matrices", 2008, chapter 8.
    """
    return _retract("polar_retract_", xs, steps, "polar")


@torch.no_grad()
def qr_retract_(
    xs: Tensor | Sequence[Tensor], steps: Tensor | Sequence[Tensor] | None = None
) -> Tensor:
    """QR retraction of a list of tall matrices, in place: x <- Q of x + step, R with positive diagonal.

    By Cholesky of the Gram matrix in fp64, w^T w = R^T R, and Q = w R^(-1), repeated where the condition
    number asks for it, and shifted where the Gram matrix is singular to working precision.

    Arguments, `info`, errors and cost as in `polar_retract_`; condition numbers are those of the matrix
    with columns scaled to unit length, which does not change Q. Ranks above 64 take
    `torch.linalg.qr`.

    Sources: Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", 2015; Fukaya et al.,
    "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices", 2020.
    """
    return _retract("qr_retract_", xs, steps, "qr")


@torch.no_grad()
def stiefel_step_(
    xs: Tensor | Sequence[Tensor],
    directions: Tensor | Sequence[Tensor],
    lr: float | Tensor,
    *,
    retraction: str = "polar",
) -> Tensor:
    """One descent step on the Stiefel manifold for a list of matrices, in place, in two passes.

        xi = d - x sym(x^T d)          tangent projection (embedded metric), sym(m) = (m + m^T) / 2
        x <- retraction of x - lr xi

    Both the step and its Gram matrix follow from x^T x, x^T d and d^T d: x - lr xi = x a - lr d with
    a = I + lr sym(x^T d). x^T x is taken as it is, not as I, so that the result is right for x that is
    slightly off the manifold, too.

    Args:
        xs: matrices (n_i, r_i) as in `polar_retract_`, overwritten.
        directions: gradients, or preconditioned gradients, of the same shapes and dtype.
        lr: number or 0-dim tensor (pass a tensor where it changes from step to step).
        retraction: "polar" or "qr".

    Returns:
        info as in `polar_retract_`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or retraction do not fit.

    Not differentiable. Cost: x and d are read twice, x is written once.

    Source: Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, sections 3.6.1
    and 4.1.1.
    """
    op = "stiefel_step_"
    check_choice(op, "retraction", retraction, RETRACTIONS)
    matrices = _tall_list(op, "xs", xs)
    others = _tall_partners(op, "directions", directions, matrices)
    if not matrices:
        return torch.empty(0, dtype=torch.int32)
    rate = scalar(op, "lr", lr, matrices[0])
    _check_written(op, matrices, others)
    if _beyond_fused(matrices):
        with no_autocast(matrices[0]):
            infos = _by_rank(
                matrices,
                lambda xs, ds: stiefel_step_(xs, ds, rate, retraction=retraction).unbind(),
                lambda x, d: _retract_one(
                    x, x - rate.to(x.dtype) * reference.tangent_projection(x, d), retraction
                ),
                others,
            )
            return torch.stack(infos)
    rows = _row_major(matrices)
    info = _written(
        op,
        matrices,
        others,
        lambda: _library.ops.tall_stiefel_step_(rows, _row_major(others), rate, retraction),
    )
    _copy_back(matrices, rows)
    return info


@torch.no_grad()
def landing_field(
    xs: Tensor | Sequence[Tensor], grads: Tensor | Sequence[Tensor], lam: float | Tensor
) -> list[Tensor]:
    """Landing field of a list of tall matrices with Euclidean gradients g.

        (g x^T - x g^T) x + lam x (x^T x - I)  =  g (x^T x) - x (g^T x) + lam x (x^T x - I)

    The first part turns x along the manifold, the second pulls it back; they are orthogonal. There is no
    factor 1/2 on the first. A step along the field needs no retraction.

    Args:
        xs: matrices (n_i, r_i), fp32 (fp64 on the CPU), n_i >= r_i >= 1; shapes may differ.
        grads: of the same shapes and dtype.
        lam: number or 0-dim tensor, the weight of the pull.

    Returns:
        One (n_i, r_i) for each.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Not differentiable. Cost: x and g are read twice, the field is written once; O(n r^2) arithmetic,
    where the formula with the (n, n) product needs O(n^2 r) and n^2 numbers of memory.

    Source: Lion et al., "PoLAR: Polar-Decomposed Low-Rank Adapter Representation", arXiv 2506.03133.
    """
    op = "landing_field"
    matrices = _tall_list(op, "xs", xs)
    others = _tall_partners(op, "grads", grads, matrices)
    if not matrices:
        return []
    weight = scalar(op, "lam", lam, matrices[0])
    if _beyond_fused(matrices):
        with no_autocast(matrices[0]):
            return _by_rank(
                matrices,
                lambda xs, gs: landing_field(xs, gs, weight),
                lambda x, g: reference.landing_field(x, g, weight.to(x.dtype)),
                others,
            )
    return _library.ops.tall_landing_field(_row_major(matrices), _row_major(others), weight)


@torch.no_grad()
def landing_step_(
    xs: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    lr: float | Tensor,
    lam: float | Tensor,
) -> None:
    """x <- x - lr * landing_field(x, g, lam) for a list of tall matrices, in place, in two passes.

    Args:
        xs: matrices (n_i, r_i) as in `polar_retract_`, overwritten.
        grads: of the same shapes and dtype.
        lr, lam: numbers or 0-dim tensors.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Not differentiable. Cost: x and g are read twice, x is written once; the field is never stored.

    Source: Lion et al., "PoLAR: Polar-Decomposed Low-Rank Adapter Representation", arXiv 2506.03133.
    """
    op = "landing_step_"
    matrices = _tall_list(op, "xs", xs)
    others = _tall_partners(op, "grads", grads, matrices)
    if not matrices:
        return
    rate, weight = (scalar(op, k, v, matrices[0]) for k, v in (("lr", lr), ("lam", lam)))
    _check_written(op, matrices, others)
    if _beyond_fused(matrices):
        with no_autocast(matrices[0]):
            _by_rank(
                matrices,
                lambda xs, gs: landing_step_(xs, gs, rate, weight) or xs,
                lambda x, g: x.copy_(
                    reference.landing_step(x, g, rate.to(x.dtype), weight.to(x.dtype))
                ),
                others,
            )
        return
    rows = _row_major(matrices)
    _written(
        op,
        matrices,
        others,
        lambda: _library.ops.tall_landing_step_(rows, _row_major(others), rate, weight),
    )
    _copy_back(matrices, rows)


def _retract(
    op: str,
    xs: Tensor | Sequence[Tensor],
    steps: Tensor | Sequence[Tensor] | None,
    retraction: str,
) -> Tensor:
    matrices = _tall_list(op, "xs", xs)
    added = [] if steps is None else _tall_partners(op, "steps", steps, matrices)
    if not matrices:
        return torch.empty(0, dtype=torch.int32)
    _check_written(op, matrices, added)
    if _beyond_fused(matrices):
        with no_autocast(matrices[0]):
            infos = _by_rank(
                matrices,
                lambda xs, *ss: _retract(op, xs, ss[0] if ss else None, retraction).unbind(),
                lambda x, *s: _retract_one(x, x + s[0] if s else x, retraction),
                *([added] if added else []),
            )
            return torch.stack(infos)
    rows = _row_major(matrices)
    info = _written(
        op,
        matrices,
        added,
        lambda: _library.ops.tall_retract_(rows, _row_major(added), retraction),
    )
    _copy_back(matrices, rows)
    return info


def _gram_one(x: Tensor) -> Tensor:
    """Ranks above 64: PyTorch's product, of which one half is taken: its halves differ in bits."""
    product = reference.gram(x)
    return product.triu() + product.triu(1).mT


def _retract_one(x: Tensor, w: Tensor, retraction: str) -> Tensor:
    """Ranks above 64: x <- retraction of w by PyTorch's SVD or QR, no host synchronisation."""
    finite = torch.isfinite(w).all()
    safe = torch.where(finite, w, torch.eye(*w.shape, dtype=w.dtype, device=w.device))
    if retraction == "polar":
        u, sigma, vh = torch.linalg.svd(safe, full_matrices=False)
        result, small, large = u @ vh, sigma[-1], sigma[0]
    else:
        q, r = torch.linalg.qr(safe)
        result = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
        r = r / r.abs().amax(0).clamp_min(torch.finfo(r.dtype).tiny)  # squares stay in range
        scaled = r.diagonal().abs() / torch.linalg.vector_norm(r, dim=0)  # of unit columns
        small, large = torch.nan_to_num(scaled, nan=0.0).min(), scaled.new_ones(())
    full = small > w.shape[1] * torch.finfo(w.dtype).eps * large
    x.copy_(torch.where(finite & full, result, x))
    code = torch.where(full, RETRACTED, RANK_DEFICIENT)
    return torch.where(finite, code, NOT_FINITE).to(torch.int32)


def _by_rank(
    matrices: list[Tensor],
    fused: Callable[..., Sequence[T]],
    one: Callable[..., T],
    *partners: list[Tensor],
) -> list[T]:
    """A result for each matrix: of `fused` for those that the kernels take, else of `one`."""
    narrow = [
        i
        for i, x in enumerate(matrices)
        if x.shape[1] <= MAX_FUSED_RANK and _library.has_kernels(x)
    ]
    lists = (matrices, *partners)
    found = dict(zip(narrow, fused(*([t[i] for i in narrow] for t in lists)), strict=True))
    return [found[i] if i in found else one(*(t[i] for t in lists)) for i in range(len(matrices))]


def _tall_list(op: str, name: str, xs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    matrices: list[Tensor] = as_list(op, name, xs)
    no_transform(op)
    check_tensors(op, name, matrices)
    for i, x in enumerate(matrices):
        if x.dim() != 2:
            raise ValueError(f"{op}: {name}[{i}] must be a matrix (n, r), got {tuple(x.shape)}")
        if x.shape[0] < x.shape[1] or x.shape[1] < 1:
            raise ValueError(
                f"{op}: {name}[{i}] must be tall, n >= r >= 1, got {tuple(x.shape)}; "
                "pass the transpose of a wide matrix"
            )
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != matrices[0].dtype:
            raise TypeError(
                f"{op}: {name}[{i}] must be float32, or all float64, got {x.dtype}; convert it"
            )
        if x.device != matrices[0].device:
            raise ValueError(
                f"{op}: {name}[{i}] must be on the device of the first, {matrices[0].device}, got "
                f"{x.device}; move it"
            )
    return matrices


def _tall_partners(
    op: str, name: str, others: Tensor | Sequence[Tensor], matrices: list[Tensor]
) -> list[Tensor]:
    partners: list[Tensor] = as_list(op, name, others)
    if len(partners) != len(matrices):
        raise ValueError(
            f"{op}: {name} must hold one tensor for each of the {len(matrices)} matrices, got "
            f"{len(partners)}"
        )
    check_tensors(op, name, partners)
    for i, (t, x) in enumerate(zip(partners, matrices, strict=True)):
        if t.shape != x.shape:
            raise ValueError(
                f"{op}: {name}[{i}] must have the shape of its matrix, {tuple(x.shape)}, got "
                f"{tuple(t.shape)}"
            )
        if t.dtype != x.dtype or t.device != x.device:
            raise TypeError(
                f"{op}: {name}[{i}] must be {x.dtype} on {x.device} like its matrix, got {t.dtype} on "
                f"{t.device}; convert it"
            )
    return partners


def _beyond_fused(matrices: list[Tensor]) -> bool:
    """Whether some matrix is not for the kernels: by its rank, or all of them by their device."""
    return any(x.shape[1] > MAX_FUSED_RANK for x in matrices) or not _library.has_kernels(
        matrices[0]
    )


def _row_major(matrices: list[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in matrices]


def _copy_back(matrices: list[Tensor], rows: list[Tensor]) -> None:
    """Finish an in-place op on row-major copies: autograd learns of those that were no copies."""
    pairs = list(zip(matrices, rows, strict=True))
    torch.autograd.graph.increment_version([x for x, row_major in pairs if x is row_major])
    for x, row_major in pairs:
        if x is not row_major:
            x.copy_(row_major)


def _check_written(op: str, matrices: list[Tensor], read: list[Tensor]) -> None:
    """Of contiguous matrices the op itself looks for overlaps, in less time; see `_written`."""
    contiguous = all(x.is_contiguous() for tensors in (matrices, read) for x in tensors)
    if not contiguous or _beyond_fused(matrices):
        check_writable(op, "xs", matrices, read, same_ok=True)


def _written(op: str, matrices: list[Tensor], read: list[Tensor], run: Callable[[], T]) -> T:
    """run(), an op that writes `matrices`; an overlap that it refuses is said as other errors are."""
    try:
        return run()
    except RuntimeError:
        check_writable(op, "xs", matrices, read, same_ok=True)
        raise


# --- fake kernels: shapes and dtypes of the ops' results ---------------------------------------------


@fake("tall_gram")
def _(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty((x.shape[1], x.shape[1])) for x in xs]


@fake("tall_retract_")
def _(xs: Sequence[Tensor], steps: Sequence[Tensor], retraction: str) -> Tensor:
    return xs[0].new_empty((len(xs),), dtype=torch.int32)


@fake("tall_stiefel_step_")
def _(xs: Sequence[Tensor], directions: Sequence[Tensor], lr: Tensor, retraction: str) -> Tensor:
    return xs[0].new_empty((len(xs),), dtype=torch.int32)


@fake("tall_landing_field")
def _(xs: Sequence[Tensor], grads: Sequence[Tensor], lam: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in xs]


@fake("tall_landing_step_")
def _(xs: Sequence[Tensor], grads: Sequence[Tensor], lr: Tensor, lam: Tensor) -> None:
    return None
