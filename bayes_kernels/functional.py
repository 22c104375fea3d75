"""Drop-in ops: adapters with flipped-sign noise, divergence, tall matrices, prediction.

Shapes: x (..., n) activations; a, mean (r, n) and b (m, r) low-rank factors; base (..., m) the output
of the frozen layer. Dtypes: activations fp32, bf16, fp16 (fp64 on the CPU); factors and variances are
fp32 (fp64 beside fp64 activations) and are converted to that where they are not. The result has the
dtype of `base`, or of x without one. Under autocast x is taken in the autocast dtype, factors stay
fp32. First derivatives only.
Tall matrices (Stiefel parameters) are fp32 in lists, changed in place and without derivatives.

Cost of a call with T tokens: x is read once, base read once and y written once; forward keeps x, h
(T, r) in fp32 and the key for the backward pass, and never a sign, a mask or a noise tensor. Ranks
above 64 run the formulas of `bayes_kernels.reference` on materialised noise: slower and with memory
for the signs, with the same numbers.

Errors are ValueError or TypeError in one line, raised before any kernel runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numpy.polynomial import hermite
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library, reference
from ._library import MAX_FUSED_CLASSES, MAX_FUSED_RANK
from .random import check_key

SCOPES = ("token", "example", "none")
PREDICT_METHODS = ("mc", "quadrature", "probit", "bridge")
COVARIANCES = ("diagonal", "low_rank", "dense")
STDS = ("square", "softplus", "direct")
_ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    key: Tensor | None = None,
    stream: int = 0,
    row0: int = 0,
) -> Tensor:
    """Low-rank adapter: base + scaling * (dropout(x) a^T) b^T.

    Args:
        x: (..., n).
        a: (r, n).
        b: (m, r).
        base: (..., m) or None.
        scaling: lora_alpha / r in PEFT's terms; a constant.
        dropout: probability in [0, 1) of dropping an element of x, drawn from the key.
        key: noise key; needed with dropout.
        stream: the layer's noise stream.
        row0: index of the first token of x, for batches that are split.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    x = _autocast(x)
    _check(_OP_LORA, x, a, b, base, dropout, key)
    if a.shape[0] > MAX_FUSED_RANK:
        noise_free = _reference_dropout(x, dropout, key, stream, row0)
        return _cast_base(reference.lora(noise_free, *_factors(x, a, b), scaling=scaling), base, x)
    return _adapter(
        x, a, None, None, b, base, key, None, scaling, stream, row0, 1, dropout, "", "plain"
    )


def flipout_lora(
    x: Tensor,
    mean: Tensor,
    rho: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    scaling: float = 1.0,
    key: Tensor,
    stream: int = 0,
    scope: str = "token",
    groups: Tensor | None = None,
    std: str = "square",
    row0: int = 0,
    rows_per_group: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Low-rank adapter whose first factor is Gaussian, sampled with flipped signs.

    A ~ N(mean, Omega^2) elementwise, Omega = std(rho). With E = Omega . eps, eps ~ N(0, 1) of shape
    (r, n) drawn once per call, and signs R_in (tokens, n), R_out (tokens, r) in {-1, +1}:

        y = base + scaling * (x mean^T + ((x . R_in) E^T) . R_out) b^T

    Every group of rows that shares its signs sees one coherent draw of A with the right marginal law;
    draws of different groups are uncorrelated (they share |eps|).

    Args:
        x: (..., n).
        mean: (r, n).
        rho: (r, n), or (r, 1) for a deviation that is constant along each row.
        b: (m, r).
        base: (..., m) or None.
        scaling: multiplies mean path and noise.
        key: int64 tensor of two elements (`random.key`); refresh it before each micro-batch.
        stream: the layer's noise stream.
        scope: "token": signs of their own for every row (BLoB's published code); "example": one draw
            for each index of x's first dimension (the paper); "none": one draw for the whole call.
        groups: int64 (...,) or any shape that broadcasts to it: the sign row of each row, in place of
            counted ones.
        std: "square" (rho^2), "softplus" or "direct".
        row0: number of the first group, for batches that are split.
        rows_per_group: that many successive rows share a group; overrides the scope's count. S
            coherent posterior samples folded into the batch: rows of one sample.
        dropout: probability of dropping an element of x (one mask for both paths).

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, scope, std or key do not fit.

    Sources: Wang et al., "BLoB", arXiv 2406.11675; Wen et al., "Flipout", arXiv 1803.04386.
    """
    op = _OP_FLIPOUT
    x = _autocast(x)
    check_key(op, key)
    _check(op, x, mean, b, base, dropout, key)
    if scope not in SCOPES:
        raise ValueError(f"{op}: scope must be one of {SCOPES}, got {scope!r}; choose one")
    if std not in STDS:
        raise ValueError(f"{op}: std must be one of {STDS}, got {std!r}; choose one")
    r, n = mean.shape
    if rho.dim() != 2 or rho.shape[0] != r or rho.shape[1] not in (1, n):
        raise ValueError(
            f"{op}: rho must have shape (r, n) = ({r}, {n}) or ({r}, 1), got {tuple(rho.shape)}"
        )
    _check_factor(op, "rho", rho, x)
    ids = _group_ids(op, groups, x)
    if rows_per_group is None:
        leading = x.shape[0] if x.dim() > 1 else 1
        rows = math.prod(x.shape[:-1])
        rows_per_group = rows // leading if scope == "example" and leading > 0 and rows > 0 else 1
    elif rows_per_group < 1:
        raise ValueError(f"{op}: rows_per_group must be at least 1, got {rows_per_group}")
    if r > MAX_FUSED_RANK:
        return _reference_flipout(
            x,
            mean,
            rho,
            b,
            base,
            scaling,
            key,
            stream,
            scope,
            ids,
            std,
            row0,
            rows_per_group,
            dropout,
        )
    kind = "shared" if scope == "none" and ids is None else "flipped"
    return _adapter(
        x,
        mean,
        rho,
        None,
        b,
        base,
        key,
        ids,
        scaling,
        stream,
        row0,
        rows_per_group,
        dropout,
        std,
        kind,
    )


def scaled_lora(
    x: Tensor,
    a: Tensor,
    d: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    scaling: float = 1.0,
    groups: Tensor | None = None,
) -> Tensor:
    """Low-rank adapter with a diagonal in rank space: base + scaling * ((x a^T) . d) b^T.

    Args:
        x: (..., n).
        a: (r, n).
        d: (r,), or (G, r) with groups: a sampled diagonal for each group of rows.
        b: (m, r).
        base: (..., m) or None.
        scaling: constant factor.
        groups: int64 (...,) in [0, G), needed when d has two dimensions.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Source: "ScalaBL", arXiv 2506.21408.
    """
    op = _OP_SCALED
    x = _autocast(x)
    _check(op, x, a, b, base, 0.0, None)
    r = a.shape[0]
    if d.dim() not in (1, 2) or d.shape[-1] != r:
        raise ValueError(f"{op}: d must have shape ({r},) or (G, {r}), got {tuple(d.shape)}")
    if (d.dim() == 2) != (groups is not None):
        raise ValueError(
            f"{op}: groups must be given exactly when d is (G, r), got d of shape {tuple(d.shape)}"
        )
    _check_factor(op, "d", d, x)
    acc = _acc(x)
    middle = d.to(acc)
    if groups is not None:
        ids = _group_ids(op, groups, x)
        middle = middle.index_select(0, ids)  # type: ignore[arg-type]
    if r > MAX_FUSED_RANK:
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        a, b = _factors(x, a, b)
        y = (((rows.to(acc) @ a.T) * middle) @ b.T * scaling).reshape(*x.shape[:-1], b.shape[0])
        return _cast_base(y, base, x)
    return _adapter(x, a, None, middle, b, base, None, None, scaling, 0, 0, 1, 0.0, "", "scaled")


def core_lora(
    x: Tensor,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    *,
    scaling: float = 1.0,
) -> Tensor:
    """Low-rank adapter with a full matrix in rank space: base + scaling * ((x a^T) core^T) b^T.

    Args:
        x: (..., n).
        a: (r, n); Y^T in PoLAR's terms.
        core: (r, r); Theta.
        b: (m, r); X.
        base: (..., m) or None.
        scaling: constant factor.

    Returns:
        (..., m) in the dtype of base, or of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Source: "PoLAR: Polar-Decomposed Low-Rank Adapter Representation", arXiv 2506.03133.
    """
    op = _OP_CORE
    x = _autocast(x)
    _check(op, x, a, b, base, 0.0, None)
    r = a.shape[0]
    if tuple(core.shape) != (r, r):
        raise ValueError(f"{op}: core must have shape ({r}, {r}), got {tuple(core.shape)}")
    _check_factor(op, "core", core, x)
    core = core.to(_acc(x))
    if r > MAX_FUSED_RANK:
        a, b = _factors(x, a, b)
        return _cast_base(reference.core_lora(x.to(_acc(x)), a, core, b, scaling=scaling), base, x)
    return _adapter(x, a, None, core, b, base, None, None, scaling, 0, 0, 1, 0.0, "", "core")


def gaussian_kl(
    means: Tensor | Sequence[Tensor],
    rhos: Tensor | Sequence[Tensor],
    prior_std: float | Sequence[float],
    *,
    std: str = "square",
    direction: str = "elbo",
) -> Tensor:
    """Closed-form divergence of diagonal Gaussians from N(0, prior_std^2), summed over a list.

        elbo: sum log(p / s) + (s^2 + mean^2) / (2 p^2) - 1/2   = KL(q || prior)
        code: sum log(s / p) + (p^2 + mean^2) / (2 s^2) - 1/2   = KL(prior || q)

    with s = std(rho) and p the prior's standard deviation. One launch for the whole list, partial sums
    in fp64 in a fixed order, gradients in closed form.

    Args:
        means: tensors of any shape, fp32 (or all fp64).
        rhos: tensors of the same shapes, or (r, 1) beside means (r, n).
        prior_std: one positive number, or one for each tensor.
        std: "square" (rho^2), "softplus" or "direct".
        direction: "elbo", or "code" for the reverse divergence of ScalaBL's published code.

    Returns:
        0-dim tensor in the dtype of the means.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes or options do not fit.

    Sources: Wang et al., "BLoB", arXiv 2406.11675, section 3; "ScalaBL", arXiv 2506.21408.
    """
    op = "gaussian_kl"
    mean_list, rho_list, priors = check_divergence(op, means, rhos, prior_std, std, direction)
    return _GaussianKL.apply(priors, std, direction, len(mean_list), *mean_list, *rho_list)


def check_divergence(
    op: str,
    means: Tensor | Sequence[Tensor],
    rhos: Tensor | Sequence[Tensor],
    prior_std: float | Sequence[float],
    std: str,
    direction: str,
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Argument checks shared by the divergence ops; returns lists."""
    mean_list = [means] if isinstance(means, Tensor) else list(means)
    rho_list = [rhos] if isinstance(rhos, Tensor) else list(rhos)
    if not mean_list or len(mean_list) != len(rho_list):
        raise ValueError(
            f"{op}: means and rhos must be lists of the same length, at least 1, got "
            f"{len(mean_list)} and {len(rho_list)}"
        )
    priors = (
        [float(prior_std)] if isinstance(prior_std, (int, float)) else [float(p) for p in prior_std]
    )
    if len(priors) not in (1, len(mean_list)):
        raise ValueError(
            f"{op}: prior_std must be one number or one for each of the {len(mean_list)} tensors, got "
            f"{len(priors)}"
        )
    if min(priors) <= 0:
        raise ValueError(f"{op}: prior_std must be positive, got {min(priors)}")
    if std not in STDS:
        raise ValueError(f"{op}: std must be one of {STDS}, got {std!r}; choose one")
    if direction not in ("elbo", "code"):
        raise ValueError(f"{op}: direction must be 'elbo' or 'code', got {direction!r}; choose one")
    first = mean_list[0]
    _library.require_device(op, first)
    for i, (mean, rho) in enumerate(zip(mean_list, rho_list, strict=True)):
        if mean.dtype not in (torch.float32, torch.float64) or mean.dtype != first.dtype:
            raise TypeError(
                f"{op}: means must be float32 or all float64, got {mean.dtype} for tensor {i}; convert it"
            )
        if rho.dtype != mean.dtype or rho.device != mean.device or mean.device != first.device:
            raise TypeError(
                f"{op}: tensor {i}: rho must have the dtype and device of the means "
                f"({first.dtype}, {first.device}), got {rho.dtype}, {rho.device}"
            )
        shared = mean.dim() == 2 and tuple(rho.shape) == (mean.shape[0], 1)
        if rho.shape != mean.shape and not shared:
            raise ValueError(
                f"{op}: tensor {i}: rho must have shape {tuple(mean.shape)}"
                + (f" or ({mean.shape[0]}, 1)" if mean.dim() == 2 else "")
                + f", got {tuple(rho.shape)}"
            )
    return mean_list, rho_list, priors


# --- tall matrices -----------------------------------------------------------------------------

# Entries of `info`, one for each matrix.
RETRACTED, REFINED, SHIFTED, RANK_DEFICIENT, NOT_FINITE = range(5)
RETRACTIONS = ("polar", "qr")


@torch.no_grad()
def gram(xs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Gram matrices of a list of tall matrices: x^T x for each, in launches for 60 matrices each.

    Args:
        xs: matrices (n_i, r_i), fp32 (fp64 on the CPU); n_i >= r_i >= 1; shapes may differ. A matrix
            that is not row-major contiguous is copied first.

    Returns:
        One (r_i, r_i) for each, exactly symmetric, in the dtype of the matrices; sums are fp64. Not
        differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Cost: each matrix is read once. Ranks above 64 take PyTorch's product, one by one.
    """
    matrices = _tall_list("gram", "xs", xs)
    if not matrices:
        return []
    if _beyond_fused(matrices):
        with _no_autocast(matrices[0]):
            return [reference.gram(x) for x in matrices]
    return _library.ops.tall_gram([x.contiguous() for x in matrices])


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
    if retraction not in RETRACTIONS:
        raise ValueError(f"{op}: retraction must be one of {RETRACTIONS}, got {retraction!r}")
    matrices = _tall_list(op, "xs", xs)
    others = _tall_partners(op, "directions", directions, matrices)
    if not matrices:
        return torch.empty(0, dtype=torch.int32)
    rate = _scalar(op, "lr", lr, matrices[0])
    _check_once(op, matrices)
    if _beyond_fused(matrices):
        with _no_autocast(matrices[0]):
            stepped = [
                x - rate.to(x.dtype) * reference.tangent_projection(x, d)
                for x, d in zip(matrices, others, strict=True)
            ]
            return _retract_one_by_one(matrices, stepped, retraction)
    rows = [x.contiguous() for x in matrices]
    info = _library.ops.tall_stiefel_step_(rows, [d.contiguous() for d in others], rate, retraction)
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
    weight = _scalar(op, "lam", lam, matrices[0])
    if _beyond_fused(matrices):
        with _no_autocast(matrices[0]):
            return [
                reference.landing_field(x, g, weight.to(x.dtype))
                for x, g in zip(matrices, others, strict=True)
            ]
    return _library.ops.tall_landing_field(
        [x.contiguous() for x in matrices], [g.contiguous() for g in others], weight
    )


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
    rate, weight = (_scalar(op, k, v, matrices[0]) for k, v in (("lr", lr), ("lam", lam)))
    _check_once(op, matrices)
    if _beyond_fused(matrices):
        with _no_autocast(matrices[0]):
            for x, g in zip(matrices, others, strict=True):
                x.copy_(reference.landing_step(x, g, rate.to(x.dtype), weight.to(x.dtype)))
        return
    rows = [x.contiguous() for x in matrices]
    _library.ops.tall_landing_step_(rows, [g.contiguous() for g in others], rate, weight)
    _copy_back(matrices, rows)


def kron_accumulate_(
    factors: Tensor | Sequence[Tensor],
    rows: Tensor | Sequence[Tensor],
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    masks: Tensor | Sequence[Tensor | None] | None = None,
) -> None:
    """Kronecker factors, in place: factor <- beta factor + alpha sum_i w_i x_i x_i^T.

    Args:
        factors: symmetric (d, d), fp32 or fp64, one or a list; changed in place.
        rows: (..., d) in any floating dtype, one for each factor; leading dimensions are flattened.
            Half-precision rows are summed in the factor's dtype.
        alpha, beta: numbers or 0-dim tensors. With the number beta = 0 the old values are not read.
        masks: None, or one for each factor of the leading shape of its rows (or None): bool, where
            False leaves a row out, or floating weights w_i >= 0. Rows left out may hold anything.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes or devices do not fit.

    Cost: N d^2 multiply-adds for N rows, and a copy of the rows in the factor's dtype.

    Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", arXiv 1503.05671.
    """
    op = "kron_accumulate_"
    triples = _check_curvature(op, factors, rows, masks, square=True)
    with torch.no_grad():
        for factor, x, mask in triples:
            with _no_autocast(factor):
                x = reference.valid_rows(x.to(factor.dtype), mask)
                if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
                    factor.mul_(beta).add_((x.T @ x).mul_(alpha))
                else:
                    factor.addmm_(x.T, x, beta=beta, alpha=alpha)


def low_rank_update_(
    factors: Tensor | Sequence[Tensor],
    rows: Tensor | Sequence[Tensor],
    *,
    masks: Tensor | Sequence[Tensor | None] | None = None,
) -> None:
    """Rank-k factors L (d, k) of a growing sum, in place: L L^T <- best rank k of L L^T + sum x x^T.

    With H = [L, rows^T] (d, k + b) and the eigenvectors V_k of the k largest eigenvalues of its Gram
    matrix H^T H:

        L <- H V_k

    which are the k leading left singular vectors of H times their singular values (columns
    orthogonal, in falling order), without a singular value decomposition of d rows. Exact, up to
    rounding, while no more than k independent rows have been seen. Column signs are arbitrary.
    More than 32 rows are taken in blocks of 32, in order. Ranks above 96 take a slower path.

    Args:
        factors: (d, k), fp32 or fp64, one or a list; changed in place. Zeros to start with.
        rows: (..., d) in any floating dtype, one for each factor; leading dimensions are flattened.
        masks: as in `kron_accumulate_`.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes or devices do not fit.

    Cost: O(d (k + b)^2) for each block of b rows, and an eigendecomposition of a (k + b)-sided matrix in
    fp64. On a GPU three launches for every 60 factors and 32 rows; on the CPU a factor is one
    thread's work. Same inputs, same bits for any number of threads.

    Source: Yang et al., "Bayesian Low-rank Adaptation for Large Language Models", arXiv 2308.13111,
    Algorithm 1, which takes singular value decompositions.
    """
    op = "low_rank_update_"
    triples = _check_curvature(op, factors, rows, masks, square=False)
    for factor, _, _ in triples:
        _library.require_device(op, factor)
    fused: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    with torch.no_grad():
        for factor, x, mask in triples:
            if mask is not None or x.dim() != 2 or x.dtype != factor.dtype:
                x = reference.valid_rows(x.to(factor.dtype), mask)
            x = x.contiguous()
            if x.shape[0] == 0 or factor.numel() == 0:
                continue
            on_cpu = factor.device.type == "cpu"
            if factor.shape[1] > _MAX_FACTOR_RANK or (factor.dtype == torch.float64 and not on_cpu):
                _low_rank_update(factor, x)
            else:
                fused.setdefault((factor.device, factor.dtype), []).append((factor, x))
        for members in fused.values():
            matrices = [factor for factor, _ in members]
            contiguous = [factor.contiguous() for factor in matrices]
            _library.ops.low_rank_update_(contiguous, [x for _, x in members])
            torch.autograd.graph.increment_version(contiguous)
            for factor, new in zip(matrices, contiguous, strict=True):
                if new is not factor:
                    factor.copy_(new)


def _low_rank_update(factor: Tensor, rows: Tensor) -> None:
    """The path of ranks above 96, and of fp64 on a GPU: PyTorch's products and eigensolver."""
    k = factor.shape[1]
    with _no_autocast(factor):
        for x in rows.split(_FACTOR_ROWS):
            h = torch.cat([factor.T, x])  # transposed, so that both products read rows of length d
            vectors = torch.linalg.eigh((h @ h.T).double()).eigenvectors
            factor.copy_((vectors[:, -k:].flip(1).to(h.dtype).T @ h).T)


def _check_curvature(
    op: str,
    factors: Tensor | Sequence[Tensor],
    rows: Tensor | Sequence[Tensor],
    masks: Tensor | Sequence[Tensor | None] | None,
    *,
    square: bool,
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Argument checks shared by the curvature ops; returns (factor, rows, mask) triples."""
    factor_list = [factors] if isinstance(factors, Tensor) else list(factors)
    row_list = [rows] if isinstance(rows, Tensor) else list(rows)
    mask_list: list[Tensor | None]
    if masks is None:
        mask_list = [None] * len(factor_list)
    else:
        mask_list = [masks] if isinstance(masks, Tensor) else list(masks)
    if not len(factor_list) == len(row_list) == len(mask_list):
        raise ValueError(
            f"{op}: factors, rows and masks must be lists of the same length, got "
            f"{len(factor_list)}, {len(row_list)} and {len(mask_list)}"
        )
    triples = list(zip(factor_list, row_list, mask_list, strict=True))
    for i, (factor, x, mask) in enumerate(triples):
        if factor.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{op}: factor {i} must be float32 or float64, got {factor.dtype}; convert it"
            )
        if factor.dim() != 2 or (square and factor.shape[0] != factor.shape[1]):
            wanted = "(d, d)" if square else "(d, k)"
            raise ValueError(
                f"{op}: factor {i} must have shape {wanted}, got {tuple(factor.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{op}: rows {i} must be floating-point, got {x.dtype}; convert them")
        if x.dim() < 1 or x.shape[-1] != factor.shape[0]:
            raise ValueError(
                f"{op}: rows {i} must have shape (..., {factor.shape[0]}), got {tuple(x.shape)}"
            )
        if x.device != factor.device or (mask is not None and mask.device != factor.device):
            raise ValueError(f"{op}: rows and mask {i} must be on {factor.device}; move them")
        if mask is None:
            continue
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{op}: mask {i} must have shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}"
            )
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{op}: mask {i} must be bool or floating weights, got {mask.dtype}")
    return triples


# --- implementation ----------------------------------------------------------------------------

_OP_LORA, _OP_FLIPOUT, _OP_SCALED, _OP_CORE = "lora", "flipout_lora", "scaled_lora", "core_lora"
# low_rank_update_: rows that it takes at once, and the largest fused rank.
_FACTOR_ROWS, _MAX_FACTOR_RANK = 32, 96


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if device not in ("cpu", "cuda"):
        return x  # refused below, with a clear line
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _factors(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    acc = _acc(x)
    return tuple(f if f.dtype == acc else f.to(acc) for f in factors)


def _check(
    op: str,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    base: Tensor | None,
    dropout: float,
    key: Tensor | None,
) -> None:
    if x.dtype not in _ACTIVATIONS:
        raise TypeError(
            f"{op}: x must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it"
        )
    _library.require_device(op, x)
    if x.dtype == torch.float64 and x.device.type != "cpu":
        raise TypeError(f"{op}: float64 is supported on the CPU only, got {x.device}; use float32")
    if x.dim() < 1 or a.dim() != 2 or b.dim() != 2:
        raise ValueError(
            f"{op}: x must have shape (..., n), the factors (r, n) and (m, r), got {tuple(x.shape)}, "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    n, r = x.shape[-1], a.shape[0]
    if a.shape[1] != n:
        hint = "; pass the transposed tensor" if a.shape[0] == n else ""
        raise ValueError(
            f"{op}: the first factor must have shape (r, n = {n}), got {tuple(a.shape)}{hint}"
        )
    if b.shape[1] != r:
        hint = "; pass the transposed tensor" if b.shape[0] == r else ""
        raise ValueError(f"{op}: b must have shape (m, r = {r}), got {tuple(b.shape)}{hint}")
    if r < 1:
        raise ValueError(
            f"{op}: the rank must be at least 1, got factors of shape {tuple(a.shape)}"
        )
    _check_factor(op, "the first factor", a, x)
    _check_factor(op, "b", b, x)
    if base is not None:
        if base.shape[:-1] != x.shape[:-1] or base.shape[-1] != b.shape[0]:
            raise ValueError(
                f"{op}: base must have shape {(*x.shape[:-1], b.shape[0])}, got {tuple(base.shape)}"
            )
        if base.device != x.device:
            raise ValueError(f"{op}: base must be on {x.device}, got {base.device}; move it")
        if base.dtype not in _ACTIVATIONS or (base.dtype == torch.float64) != (
            x.dtype == torch.float64
        ):
            raise TypeError(
                f"{op}: base must have a dtype that fits x ({x.dtype}), got {base.dtype}"
            )
    if dropout != 0.0:
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{op}: dropout must be in [0, 1), got {dropout}; pass a probability")
        if key is None:
            raise ValueError(f"{op}: key is needed with dropout; make it with random.key(seed)")
        check_key(op, key)
    if key is not None and key.device != x.device:
        raise ValueError(f"{op}: key must be on {x.device}, got {key.device}; move it")


def _check_factor(op: str, name: str, factor: Tensor, x: Tensor) -> None:
    if not factor.is_floating_point():
        raise TypeError(
            f"{op}: {name} must be a real floating-point tensor, got {factor.dtype}; convert it"
        )
    if factor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, got {factor.device}; move it")


def _group_ids(op: str, groups: Tensor | None, x: Tensor) -> Tensor | None:
    if groups is None:
        return None
    if groups.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: groups must be int64, got {groups.dtype}; convert it")
    shape = tuple(x.shape[:-1])
    try:
        expanded = groups.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: groups must have shape {shape} or broadcast to it, got {tuple(groups.shape)}"
        ) from None
    return expanded.to(torch.int64).reshape(-1).contiguous()


def _adapter(
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    middle: Tensor | None,
    b: Tensor,
    base: Tensor | None,
    key: Tensor | None,
    ids: Tensor | None,
    scaling: float,
    stream: int,
    row0: int,
    rows_per_id: int,
    dropout: float,
    std: str,
    kind: str,
) -> Tensor:
    acc = _acc(x)
    if a.dtype != acc:
        a = a.to(acc)
    if b.dtype != acc:
        b = b.to(acc)
    if rho is not None and rho.dtype != acc:
        rho = rho.to(acc)
    m = b.shape[0]
    shape = x.shape
    tokens = math.prod(shape[:-1])
    rows = x if x.dim() == 2 else x.reshape(tokens, shape[-1])
    base_rows = base if base is None or base.dim() == 2 else base.reshape(tokens, m)
    run = _Adapter.apply if _needs_gradient(x, a, rho, middle, b, base) else _without_gradient
    y = run(
        rows,
        a,
        rho,
        middle,
        b,
        base_rows,
        key,
        ids,
        scaling,
        stream,
        row0,
        rows_per_id,
        dropout,
        std,
        kind,
    )
    return y if x.dim() == 2 else y.reshape(*shape[:-1], m)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd's function has to be called.

    Also under forward-mode differentiation and torch.func transforms, which it refuses with a clear
    error; the raw ops would silently drop the tangents.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return (
        torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
    )


def _shrink_expand(
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    middle: Tensor | None,
    b: Tensor,
    base: Tensor | None,
    key: Tensor | None,
    ids: Tensor | None,
    scaling: float,
    stream: int,
    row0: int,
    rows_per_id: int,
    dropout: float,
    std: str,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """The output and the rank-space activations before the middle."""
    ops = _library.ops
    factor, e = _noisy_factor(ops, a, rho, key, stream, std, kind)
    h = ops.adapter_shrink(x, factor, e, key, stream, row0, rows_per_id, ids, dropout)
    y = ops.adapter_expand(
        _apply_middle(h, middle, kind), b, base, scaling, x.dtype if base is None else base.dtype
    )
    return y, h


def _without_gradient(*args: Any) -> Tensor:
    """Inference: without autograd's function, which costs more than the kernels of a single token."""
    return _shrink_expand(*args)[0]


class _Adapter(torch.autograd.Function):
    """shrink -> middle -> expand, and the derivatives of all three.

    kind: "plain"; "flipped" (noise with signs); "shared" (one draw for all rows: a + E is an ordinary
    factor); "scaled" (middle (r,) or (tokens, r)); "core" (middle (r, r)).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        a: Tensor,
        rho: Tensor | None,
        middle: Tensor | None,
        b: Tensor,
        base: Tensor | None,
        key: Tensor | None,
        ids: Tensor | None,
        scaling: float,
        stream: int,
        row0: int,
        rows_per_id: int,
        dropout: float,
        std: str,
        kind: str,
    ) -> Tensor:
        y, h = _shrink_expand(
            x,
            a,
            rho,
            middle,
            b,
            base,
            key,
            ids,
            scaling,
            stream,
            row0,
            rows_per_id,
            dropout,
            std,
            kind,
        )
        ctx.save_for_backward(x, a, rho, middle, b, key, ids, h)
        ctx.options = (scaling, stream, row0, rows_per_id, dropout, std, kind)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ops = _library.ops
        x, a, rho, middle, b, key, ids, h = ctx.saved_tensors
        scaling, stream, row0, rows_per_id, dropout, std, kind = ctx.options
        need_x, need_a, need_rho, need_middle, need_b, need_base = ctx.needs_input_grad[:6]
        need_h = need_x or need_a or need_rho or need_middle
        dx = da = drho = dmiddle = db = None
        if need_h or need_b:
            dh, db = ops.adapter_expand_backward(
                dy, _apply_middle(h, middle, kind), b, scaling, need_h, need_b
            )
            if not need_b:
                db = None
        if need_middle:
            dmiddle = _middle_gradient(dh, h, middle, kind)
        if need_x or need_a or need_rho:
            if kind == "scaled":
                dh = dh * middle
            elif kind == "core":
                dh = dh @ middle
            factor, e = _noisy_factor(ops, a, rho, key, stream, std, kind)
            need_da = need_a or (need_rho and kind == "shared")
            dx, da, de = ops.adapter_shrink_backward(
                dh,
                x,
                factor,
                e,
                key,
                stream,
                row0,
                rows_per_id,
                ids,
                dropout,
                need_x,
                need_da,
                need_rho and kind == "flipped",
            )
            if need_rho:
                drho = ops.scaled_normal_backward(
                    da if kind == "shared" else de, rho, key, stream, std
                )
            dx = dx if need_x else None
            da = da if need_a else None
        dbase = dy if need_base else None
        return (dx, da, drho, dmiddle, db, dbase, *(None,) * 9)


def _noisy_factor(
    ops: Any, a: Tensor, rho: Tensor | None, key: Tensor | None, stream: int, std: str, kind: str
) -> tuple[Tensor, Tensor | None]:
    """The factor and noise matrix that shrink takes."""
    if kind not in ("flipped", "shared"):
        return a, None
    e = ops.scaled_normal(rho, a.shape[1], key, stream, std)
    return (a, e) if kind == "flipped" else (a + e, None)


def _apply_middle(h: Tensor, middle: Tensor | None, kind: str) -> Tensor:
    if kind == "scaled":
        return h * middle  # type: ignore[operator]
    if kind == "core":
        return h @ middle.T  # type: ignore[union-attr]
    return h


def _middle_gradient(dh: Tensor, h: Tensor, middle: Tensor, kind: str) -> Tensor:
    if kind == "core":
        return dh.T @ h
    product = dh * h
    return product.sum(0) if middle.dim() == 1 else product


class _GaussianKL(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, priors: list[float], std: str, direction: str, count: int, *tensors: Tensor
    ) -> Tensor:
        tensors = tuple(t.contiguous() for t in tensors)
        means, rhos = list(tensors[:count]), list(tensors[count:])
        ctx.save_for_backward(*tensors)
        ctx.options = (priors, std, direction, count)
        return _library.ops.gaussian_kl(means, rhos, priors, std, direction).to(means[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        priors, std, direction, count = ctx.options
        tensors = ctx.saved_tensors
        dmeans, drhos = _library.ops.gaussian_kl_backward(
            weight, list(tensors[:count]), list(tensors[count:]), priors, std, direction
        )
        return (None, None, None, None, *dmeans, *drhos)


def _cast_base(y: Tensor, base: Tensor | None, x: Tensor) -> Tensor:
    return y.to(x.dtype) if base is None else base + y.to(base.dtype)


def _reference_dropout(
    x: Tensor, dropout: float, key: Tensor | None, stream: int, row0: int
) -> Tensor:
    rows = x.to(_acc(x))
    if dropout == 0.0:
        return rows
    n = x.shape[-1]
    keep = _library.ops.dropout_mask(key, stream, math.prod(x.shape[:-1]), n, row0, dropout)
    return reference.dropped(rows, keep.reshape(x.shape), dropout)


def _reference_flipout(
    x: Tensor,
    mean: Tensor,
    rho: Tensor,
    b: Tensor,
    base: Tensor | None,
    scaling: float,
    key: Tensor,
    stream: int,
    scope: str,
    ids: Tensor | None,
    std: str,
    row0: int,
    rows_per_group: int,
    dropout: float,
) -> Tensor:
    """Ranks above the fused limit: the definition, on materialised noise from the dump ops."""
    ops, acc = _library.ops, _acc(x)
    n, r = x.shape[-1], mean.shape[0]
    rows = math.prod(x.shape[:-1])
    mean, rho, b = _factors(x, mean, rho, b)
    ones = scope == "none" and ids is None
    where = (row0, rows_per_group, ids)
    keep = None
    if dropout > 0.0:
        keep = ops.dropout_mask(key, stream, rows, n, row0 * rows_per_group, dropout)
    noise = reference.DenseNoise(
        eps=ops.normal(key, stream, [r, n]).to(acc),
        r_in=x.new_ones((), dtype=acc)
        if ones
        else ops.sign_bits(key, stream, False, rows, n, *where).to(acc),
        r_out=x.new_ones((), dtype=acc)
        if ones
        else ops.sign_bits(key, stream, True, rows, r, *where).to(acc),
        keep=keep,
    )
    y = reference.flipout_lora(
        x.to(acc), mean, rho, b, scaling=scaling, noise=noise, std=std, dropout=dropout
    )
    return _cast_base(y, base, x)


def _tall_list(op: str, name: str, xs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    matrices = [xs] if isinstance(xs, Tensor) else list(xs)
    for i, x in enumerate(matrices):
        if not isinstance(x, Tensor) or x.dim() != 2:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{op}: {name}[{i}] must be a matrix (n, r), got {got}")
        if x.shape[0] < x.shape[1] or x.shape[1] < 1:
            raise ValueError(
                f"{op}: {name}[{i}] must be tall, n >= r >= 1, got {tuple(x.shape)}; "
                "pass the transpose of a wide matrix"
            )
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != matrices[0].dtype:
            raise TypeError(
                f"{op}: {name}[{i}] must be float32 (all float64 on the CPU), got {x.dtype}; convert it"
            )
        if x.device != matrices[0].device:
            raise ValueError(
                f"{op}: {name}[{i}] must be on the device of the first, {matrices[0].device}, got "
                f"{x.device}; move it"
            )
    if matrices:
        first = matrices[0]
        _library.require_device(op, first)
        if first.dtype == torch.float64 and first.device.type == "cuda":
            raise TypeError(
                f"{op}: {name} must be float32 on a GPU, got torch.float64; convert, or use the CPU"
            )
    return matrices


def _tall_partners(
    op: str, name: str, others: Tensor | Sequence[Tensor], matrices: list[Tensor]
) -> list[Tensor]:
    partners = [others] if isinstance(others, Tensor) else list(others)
    if len(partners) != len(matrices):
        raise ValueError(
            f"{op}: {name} must hold one tensor for each of the {len(matrices)} matrices, got "
            f"{len(partners)}"
        )
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


def _scalar(op: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-dim fp64 tensor on the device of `like`; a number needs no copy from host memory."""
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=torch.float64, device=like.device)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be a number or a floating-point tensor of one element, got "
            f"{value.dtype} {tuple(value.shape)}"
        )
    return value.detach().reshape(()).to(like.device, torch.float64)


def _beyond_fused(matrices: list[Tensor]) -> bool:
    return any(x.shape[1] > MAX_FUSED_RANK for x in matrices)


def _copy_back(matrices: list[Tensor], rows: list[Tensor]) -> None:
    """Finish an in-place op on row-major copies: autograd learns of those that were no copies."""
    pairs = list(zip(matrices, rows, strict=True))
    torch.autograd.graph.increment_version([x for x, row_major in pairs if x is row_major])
    for x, row_major in pairs:
        if x is not row_major:
            x.copy_(row_major)


def _check_once(op: str, matrices: list[Tensor]) -> None:
    """Refuses a matrix that comes twice, also where copies would hide it from the op."""
    if torch.compiler.is_compiling():
        return
    if len({x.data_ptr() for x in matrices}) < len(matrices):
        raise ValueError(f"{op}: xs must not overlap in memory; pass each matrix once")


def _no_autocast(t: Tensor) -> torch.autocast:
    """Products of fp32 operands stay fp32 products."""
    return torch.autocast(t.device.type, enabled=False)


def _outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Products of a backward pass that is run within autocast stay in the dtype of their operands."""

    @wraps(backward)
    def run(ctx: Any, first: Tensor, *rest: Tensor) -> Any:
        with _no_autocast(first):
            return backward(ctx, first, *rest)

    return run


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
    _check_once(op, matrices)
    if _beyond_fused(matrices):
        with _no_autocast(matrices[0]):
            sums = [x + s for x, s in zip(matrices, added, strict=True)] if added else matrices
            return _retract_one_by_one(matrices, sums, retraction)
    rows = [x.contiguous() for x in matrices]
    info = _library.ops.tall_retract_(rows, [s.contiguous() for s in added], retraction)
    _copy_back(matrices, rows)
    return info


def _retract_one_by_one(matrices: list[Tensor], targets: list[Tensor], retraction: str) -> Tensor:
    """The path of ranks above 64: PyTorch's SVD or QR for each matrix, no host synchronisation."""
    infos = []
    for x, w in zip(matrices, targets, strict=True):
        finite = torch.isfinite(w).all()
        safe = torch.where(finite, w, torch.eye(*w.shape, dtype=w.dtype, device=w.device))
        if retraction == "polar":
            u, sigma, vh = torch.linalg.svd(safe, full_matrices=False)
            result, small, large = u @ vh, sigma[-1], sigma[0]
        else:
            q, r = torch.linalg.qr(safe)
            diagonal = r.diagonal()
            result = q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype)
            scaled = diagonal.abs() / torch.linalg.vector_norm(r, dim=0)  # of unit columns
            small, large = torch.nan_to_num(scaled, nan=0.0).min(), scaled.new_ones(())
        full = small > w.shape[1] * torch.finfo(w.dtype).eps * large
        x.copy_(torch.where(finite & full, result, x))
        code = torch.where(full, RETRACTED, RANK_DEFICIENT)
        infos.append(torch.where(finite, code, NOT_FINITE))
    return torch.stack(infos).to(torch.int32)


# --- prediction --------------------------------------------------------------------------------


class McPrediction(NamedTuple):
    """Predictive distribution of a Gaussian over logits.

    Attributes:
        log_probs: (B, C) logarithm of the mean softmax; exact far below the smallest float's
            logarithm, -inf for a class whose mean logit is -inf.
        entropy: (B,) entropy of the mean softmax in nats: total uncertainty.
        expected_entropy: (B,) mean entropy of the softmax in nats, the part that is not due to the
            weights; None for method="probit".
        standard_error: (B, C) Monte-Carlo standard error of the probabilities, where asked for.
    """

    log_probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor | None
    standard_error: Tensor | None = None

    @property
    def probs(self) -> Tensor:
        """(B, C) mean softmax."""
        return self.log_probs.exp()

    @property
    def mutual_information(self) -> Tensor:
        """(B,) entropy - expected_entropy in nats; rounding may put it slightly below zero."""
        if self.expected_entropy is None:
            raise ValueError(
                "mutual_information: method 'probit' gives no expected entropy; use 'mc' or 'bridge'"
            )
        return self.entropy - self.expected_entropy


def mc_predict(
    mean: Tensor,
    cov: Tensor,
    *,
    n_samples: int | None = None,
    key: Tensor | None = None,
    antithetic: bool = False,
    method: str = "mc",
    return_standard_error: bool = False,
    stream: int = 0,
    row0: int = 0,
    ids: Tensor | None = None,
) -> McPrediction:
    """Mean softmax of Gaussian logits and its uncertainty: z ~ N(mean, cov), p = E softmax(z).

    Samples are streamed: noise is made in registers and no (samples, B, C) tensor exists. Prediction
    only: results carry no gradient.

    Methods:
        mc: the average over n_samples samples. Standard error of a probability: at most
            0.5 / sqrt(n_samples).
        quadrature: C = 2 only, no sampling. Only d = z_1 - z_0 matters: 20-point Gauss-Hermite where
            its variance is at most 1, above that the trapezoidal rule on 161 points of the logistic
            density; probabilities and entropies err by less than 1e-8 before rounding.
        probit: softmax(mean / sqrt(1 + pi/8 var)); cheap, keeps the ranking of classes only for equal
            variances; no expected entropy.
        bridge: Laplace bridge to a Dirichlet distribution, after the zero-sum correction.

    Args:
        mean: (B, C) mean logits, fp32 (bf16 and fp16 are converted; fp64 on the CPU). -inf removes a
            class.
        cov: (B, C) variances of independent logits, or (B, C, C) covariances, of which the lower
            triangle is read. Converted to the dtype of the computation. Up to C = 32 a covariance is
            factorised in fp64 inside the kernel; above, the definition in `bayes_kernels.reference`
            runs one example at a time with O(n_samples C) memory: slower, same numbers.
        n_samples: samples, at least 1; needed for "mc".
        key: noise key (`random.key`); needed for "mc".
        antithetic: samples in pairs mean + e, mean - e; n_samples must be even.
        method: "mc", "quadrature", "probit" or "bridge".
        return_standard_error: also the Monte-Carlo standard error of every probability ("mc" only);
            NaN for a single sample or pair.
        stream: noise stream.
        row0: number of the first example, for batches that are split.
        ids: int64 (B,) number of each example, in place of counted ones.

    A singular covariance is used as it is, without jitter: directions whose variance is within
    rounding of zero get none, and cov = 0 gives log_softmax(mean). A negative variance, or a
    covariance with a clearly negative pivot, gives NaN in that example and only there (an exception
    would cost a synchronisation); see `reference.semidefinite_cholesky`.

    Returns:
        McPrediction, fp32 (fp64 beside fp64 logits).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, key, n_samples or options do not fit.

    Cost: n_samples C normals and exponentials per example (on a GPU with C > 32 twice as many
    normals); memory O(B C), on a GPU with C > 32 also O(B n_samples). Same inputs, same bits for any
    number of threads and any split of the batch.

    Sources: Daxberger et al., "Laplace Redux", arXiv 2106.14806 (probit, bridge); Harrison et al.,
    "Variational Bayesian Last Layers", arXiv 2404.11599 (sampling of the last layer).
    """
    op = "mc_predict"
    _check_predict(op, mean, cov)
    if method not in PREDICT_METHODS:
        raise ValueError(
            f"{op}: method must be one of {PREDICT_METHODS}, got {method!r}; choose one"
        )
    if return_standard_error and method != "mc":
        raise ValueError(f"{op}: method must be 'mc' for a standard error, got {method!r}")
    with torch.no_grad(), torch.autocast(mean.device.type, enabled=False):
        acc = _acc(mean)
        mean, cov = mean.detach().to(acc), cov.detach().to(acc)
        if method != "mc":
            variances = _variances(cov)
            proper = ((variances >= 0) & (variances < math.inf)).all(-1, keepdim=True)
            mean = torch.where(proper, mean, math.nan)
        if method == "quadrature":
            return _quadrature(op, mean, cov)
        if method == "probit":
            return _probit(mean, cov)
        if method == "bridge":
            return _bridge(op, mean, cov)
        if key is None or n_samples is None:
            raise ValueError(f"{op}: n_samples and key must be given with method 'mc'")
        check_key(op, key)
        if key.device != mean.device:
            raise ValueError(f"{op}: key must be on {mean.device}, got {key.device}; move it")
        if n_samples < 1 or (antithetic and n_samples % 2):
            what = "even with antithetic" if antithetic else "at least 1"
            raise ValueError(f"{op}: n_samples must be {what}, got {n_samples}")
        if ids is not None:
            if ids.shape != mean.shape[:1] or ids.dtype not in (torch.int64, torch.int32):
                raise ValueError(
                    f"{op}: ids must be int64 of shape ({mean.shape[0]},), got {ids.dtype} of shape "
                    f"{tuple(ids.shape)}"
                )
            if ids.device != mean.device:
                raise ValueError(f"{op}: ids must be on {mean.device}, got {ids.device}; move it")
            ids = ids.to(torch.int64).contiguous()
        if cov.dim() == 3 and mean.shape[1] > MAX_FUSED_CLASSES:
            results = _predict_by_example(mean, cov, n_samples, key, stream, row0, ids, antithetic)
        else:
            results = _library.ops.mc_predict(
                mean, cov, key, stream, row0, ids, n_samples, antithetic, return_standard_error
            )
    log_probs, entropy, expected, error = results
    return McPrediction(log_probs, entropy, expected, error if return_standard_error else None)


def mc_predict_linear(
    features: Tensor,
    weight_mean: Tensor,
    weight_scale: Tensor | tuple[Tensor, Tensor],
    *,
    noise_var: Tensor | float | None = None,
    covariance: str = "diagonal",
    n_samples: int | None = None,
    key: Tensor | None = None,
    antithetic: bool = False,
    method: str = "mc",
    return_standard_error: bool = False,
    stream: int = 0,
    row0: int = 0,
    ids: Tensor | None = None,
) -> McPrediction:
    """`mc_predict` of a last layer with Gaussian weights, independent over classes.

    Weights of class c: w_c ~ N(weight_mean_c, S_c); logits z_c = w_c^T phi + e_c, e_c ~ N(0,
    noise_var_c). Only the C logits are sampled, never the weights.

    Args:
        features: (B, D) phi; fp32, bf16, fp16 (fp64 on the CPU).
        weight_mean: (C, D).
        weight_scale, covariance: S_c, see `linear_logits`.
        noise_var: variance of e_c, a number or (C,); None for none.
        n_samples, key, antithetic, method, return_standard_error, stream, row0, ids: as in
            `mc_predict`.

    Returns:
        McPrediction, fp32 (fp64 beside fp64 features).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options do not fit.

    Source: Harrison et al., "Variational Bayesian Last Layers", arXiv 2404.11599.
    """
    with torch.no_grad():
        mean, var = linear_logits(
            features, weight_mean, weight_scale, noise_var, covariance=covariance
        )
    return mc_predict(
        mean,
        var,
        n_samples=n_samples,
        key=key,
        antithetic=antithetic,
        method=method,
        return_standard_error=return_standard_error,
        stream=stream,
        row0=row0,
        ids=ids,
    )


def linear_logits(
    features: Tensor,
    weight_mean: Tensor,
    weight_scale: Tensor | tuple[Tensor, Tensor],
    noise_var: Tensor | float | None = None,
    *,
    covariance: str = "diagonal",
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the logits of a last layer with Gaussian weights; differentiable.

    mean_c = phi^T weight_mean_c and var_c = phi^T S_c phi + noise_var_c, with

        diagonal   S_c = diag(s_c^2), s (C, D) standard deviations
        low_rank   S_c = V_c V_c^T + diag(d_c), weight_scale = (V (C, D, k), d (C, D) variances)
        dense      S_c = L_c L_c^T, L (C, D, D) lower triangular (the upper triangle is not read), or
                   its packed triangle (C, D (D + 1) / 2), element (i, j) at i (i + 1) / 2 + j

    Args:
        features: (B, D) phi; fp32, bf16 or fp16 (fp64 on the CPU); converted to fp32.
        weight_mean: (C, D).
        weight_scale: as above.
        noise_var: a number or (C,); None for none.
        covariance: "diagonal", "low_rank" or "dense".

    Returns:
        mean and var, (B, C) each, fp32 (fp64 beside fp64 features).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or covariance do not fit.

    Cost: one product of size (B, D, C) for the mean and one for the diagonal; (B, D, k C) for low
    rank, with a (B, C, k) intermediate; C triangles for dense, one class at a time, with (B, D)
    memory: no (B, C, D) tensor in either direction.

    Source: Harrison et al., "Variational Bayesian Last Layers", arXiv 2404.11599.
    """
    op = "linear_logits"
    _check_linear(op, features, weight_mean, weight_scale, noise_var, covariance)
    acc = _acc(features)
    with torch.autocast(features.device.type, enabled=False):
        phi, weight_mean = features.to(acc), weight_mean.to(acc)
        mean = phi @ weight_mean.T
        if covariance == "low_rank":
            factor, variances = weight_scale
            c, d, k = factor.shape
            columns = factor.to(acc).transpose(0, 1).reshape(d, c * k)
            var = (phi @ columns).reshape(-1, c, k).square().sum(-1)
            var = var + phi.square() @ variances.to(acc).T
        elif covariance == "diagonal":
            var = phi.square() @ weight_scale.to(acc).square().T  # type: ignore[union-attr]
        else:
            var = _TriangularForm.apply(phi, weight_scale.to(acc))  # type: ignore[union-attr]
        if noise_var is not None:
            var = var + (noise_var.to(acc) if isinstance(noise_var, Tensor) else noise_var)
    return mean, var


def _check_predict(op: str, mean: Tensor, cov: Tensor) -> None:
    if mean.dtype not in _ACTIVATIONS or not cov.is_floating_point():
        raise TypeError(
            f"{op}: mean and cov must be float32, bfloat16, float16 or float64, got {mean.dtype} and "
            f"{cov.dtype}; convert them"
        )
    _library.require_device(op, mean)
    if mean.dtype == torch.float64 and mean.device.type != "cpu":
        raise TypeError(
            f"{op}: float64 is supported on the CPU only, got {mean.device}; use float32"
        )
    if mean.dim() != 2 or mean.shape[1] < 1:
        raise ValueError(
            f"{op}: mean must have shape (B, C) with at least one class, got {tuple(mean.shape)}"
        )
    b, c = mean.shape
    if tuple(cov.shape) not in ((b, c), (b, c, c)):
        raise ValueError(
            f"{op}: cov must have shape ({b}, {c}) or ({b}, {c}, {c}), got {tuple(cov.shape)}"
        )
    if cov.device != mean.device:
        raise ValueError(f"{op}: cov must be on {mean.device}, got {cov.device}; move it")


def _check_linear(
    op: str,
    features: Tensor,
    weight_mean: Tensor,
    weight_scale: Tensor | tuple[Tensor, Tensor],
    noise_var: Tensor | float | None,
    covariance: str,
) -> None:
    if covariance not in COVARIANCES:
        raise ValueError(
            f"{op}: covariance must be one of {COVARIANCES}, got {covariance!r}; choose one"
        )
    if features.dtype not in _ACTIVATIONS:
        raise TypeError(
            f"{op}: features must be float32, bfloat16, float16 or float64, got {features.dtype}; "
            "convert them"
        )
    _library.require_device(op, features)
    if features.dim() != 2 or weight_mean.dim() != 2 or weight_mean.shape[1] != features.shape[1]:
        raise ValueError(
            f"{op}: features and weight_mean must have shapes (B, D) and (C, D), got "
            f"{tuple(features.shape)} and {tuple(weight_mean.shape)}"
        )
    c, d = weight_mean.shape
    _check_factor(op, "weight_mean", weight_mean, features)
    if isinstance(noise_var, Tensor):
        _check_factor(op, "noise_var", noise_var, features)
        if tuple(noise_var.shape) not in ((c,), (1,), ()):
            raise ValueError(
                f"{op}: noise_var must be a number or of shape ({c},), got {tuple(noise_var.shape)}"
            )
    is_pair = not isinstance(weight_scale, Tensor)
    if is_pair != (covariance == "low_rank") or (is_pair and len(weight_scale) != 2):
        raise ValueError(
            f"{op}: weight_scale must be a pair (V, variances) exactly with covariance='low_rank', got "
            f"{'a pair' if is_pair else 'a tensor'} with {covariance!r}"
        )
    if isinstance(weight_scale, Tensor):
        _check_factor(op, "weight_scale", weight_scale, features)
        allowed = [(c, d)] if covariance == "diagonal" else [(c, d, d), (c, d * (d + 1) // 2)]
        if tuple(weight_scale.shape) not in allowed:
            raise ValueError(
                f"{op}: weight_scale must have shape {' or '.join(map(str, allowed))} with "
                f"covariance={covariance!r}, got {tuple(weight_scale.shape)}"
            )
        return
    factor, variances = weight_scale
    _check_factor(op, "V", factor, features)
    _check_factor(op, "the variances", variances, features)
    if factor.dim() != 3 or tuple(factor.shape[:2]) != (c, d) or tuple(variances.shape) != (c, d):
        raise ValueError(
            f"{op}: weight_scale must have shapes ({c}, {d}, k) and ({c}, {d}), got "
            f"{tuple(factor.shape)} and {tuple(variances.shape)}"
        )


def _predict_by_example(
    mean: Tensor,
    cov: Tensor,
    n_samples: int,
    key: Tensor,
    stream: int,
    row0: int,
    ids: Tensor | None,
    antithetic: bool,
) -> tuple[Tensor, ...]:
    """Full covariances beyond the fused size: the definition, one example at a time."""
    parts = []
    for b in range(mean.shape[0]):
        one = None if ids is None else ids[b : b + 1]
        eps = reference.logit_noise(
            key,
            1,
            n_samples,
            mean.shape[1],
            stream=stream,
            row0=row0 + b,
            ids=one,
            antithetic=antithetic,
        ).to(mean.dtype)
        parts.append(
            reference.mc_predict(mean[b : b + 1], cov[b : b + 1], eps, antithetic=antithetic)
        )
    if not parts:
        return mean.new_empty(mean.shape), *(mean.new_empty(0) for _ in range(2)), mean.clone()
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


def _entropy(log_probs: Tensor) -> Tensor:
    p = log_probs.exp()
    return -torch.where(p == 0, 0.0, p * log_probs).sum(-1)  # NaN stays NaN


def _variances(cov: Tensor) -> Tensor:
    return cov if cov.dim() == 2 else cov.diagonal(dim1=-2, dim2=-1)


def _quadrature(op: str, mean: Tensor, cov: Tensor) -> McPrediction:
    if mean.shape[1] != 2:
        raise ValueError(
            f"{op}: method 'quadrature' is for C = 2 classes, got C = {mean.shape[1]}; use 'mc'"
        )
    m, v = mean.double(), cov.double()
    difference = m[:, 1] - m[:, 0]
    if cov.dim() == 2:
        variance = v.sum(1)
    else:
        variance = v[:, 0, 0] + v[:, 1, 1] - 2 * v[:, 1, 0]
    eps = torch.finfo(cov.dtype).eps
    # Rounding of a singular covariance may leave a difference just below zero.
    rounding = 8 * eps * _variances(v).abs().sum(1)
    variance = torch.where(variance.abs() <= rounding, variance.clamp_min(0.0), variance)
    std = variance.sqrt()
    nodes, weights = hermite.hermgauss(20)
    z = difference[:, None] + math.sqrt(2) * std[:, None] * torch.tensor(nodes, device=mean.device)
    log_weights = torch.tensor(weights / math.sqrt(math.pi), device=mean.device).log()

    def binary(z: Tensor) -> Tensor:  # entropy of a coin with logit z
        magnitude = z.abs()
        e = (-magnitude).exp()
        return e.log1p() + torch.where(e > 0, magnitude * e / (1 + e), 0.0)

    narrow = torch.stack(
        [torch.logsumexp(log_weights + F.logsigmoid(s * z), 1) for s in (-1, 1)], 1
    )
    narrow_expected = (log_weights.exp() * binary(z)).sum(1)
    # For wide distributions the Gaussian is the smooth factor: E sigmoid(d) is the mean of
    # Phi((difference + u) / std) over the logistic density of u.
    step = 0.5
    u = torch.arange(-80, 81, device=mean.device).double() * step
    log_density = F.logsigmoid(u) + F.logsigmoid(-u) + math.log(step)
    wide_std = std.clamp_min(1.0)[:, None]
    wide = torch.stack(
        [
            torch.logsumexp(
                log_density + torch.special.log_ndtr((s * difference[:, None] + u) / wide_std), 1
            )
            for s in (-1, 1)
        ],
        1,
    )
    gaussian = (-0.5 * ((u - difference[:, None]) / wide_std).square()).exp()
    wide_expected = (binary(u) * gaussian / wide_std).sum(1) * step / math.sqrt(2 * math.pi)
    is_narrow = ~(variance > 1.0)
    log_probs = torch.where(is_narrow[:, None], narrow, wide).to(mean.dtype)
    expected = torch.where(is_narrow, narrow_expected, wide_expected).to(mean.dtype)
    return McPrediction(log_probs, _entropy(log_probs), expected)


def _probit(mean: Tensor, cov: Tensor) -> McPrediction:
    log_probs = torch.log_softmax(mean * (1 + math.pi / 8 * _variances(cov)).rsqrt(), dim=-1)
    return McPrediction(log_probs, _entropy(log_probs), None)


def _bridge(op: str, mean: Tensor, cov: Tensor) -> McPrediction:
    c = mean.shape[1]
    if c < 2:
        raise ValueError(f"{op}: method 'bridge' needs at least 2 classes, got C = {c}; use 'mc'")
    m, variance = mean.double(), _variances(cov).double()
    rows = variance if cov.dim() == 2 else cov.double().sum(-1)  # cov 1
    total = rows.sum(-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    share = rows / total.clamp_min(tiny)
    m = m - share * m.sum(-1, keepdim=True)
    variance = (variance - share * rows).clamp_min(tiny)
    growth = torch.logaddexp(
        torch.tensor(1 - 2 / c, dtype=m.dtype, device=m.device).log(),
        m + torch.logsumexp(-m, dim=-1, keepdim=True) - 2 * math.log(c),
    )
    log_alpha = growth - variance.log()
    log_sum = torch.logsumexp(log_alpha, dim=-1, keepdim=True)
    log_probs = (log_alpha - log_sum).to(mean.dtype)
    # Mean entropy of the Dirichlet distribution; beyond 1e12 its samples are their mean.
    alpha, alpha_sum = log_alpha.exp().clamp_max(1e12), log_sum.exp().clamp_max(1e12)
    p = (log_alpha - log_sum).exp()
    spread = torch.digamma(alpha_sum + 1) - torch.digamma(alpha + 1)
    expected = (p * spread).sum(-1).to(mean.dtype)
    return McPrediction(log_probs, _entropy(log_probs), expected)


class _TriangularForm(torch.autograd.Function):
    """|L_c^T phi_b|^2 for every example and class, one class at a time in both directions."""

    @staticmethod
    def forward(ctx: Any, phi: Tensor, lower: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(phi, lower)
        forms = [(phi @ _triangle(t, phi)).square().sum(1) for t in lower.unbind(0)]
        return torch.stack(forms, 1) if forms else phi.new_empty(phi.shape[0], 0)

    @staticmethod
    @once_differentiable
    @_outside_autocast
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        phi, lower = ctx.saved_tensors
        dphi = torch.zeros_like(phi) if ctx.needs_input_grad[0] else None
        dlower = torch.empty_like(lower) if ctx.needs_input_grad[1] else None
        for c, t in enumerate(lower.unbind(0)):
            triangle = _triangle(t, phi)
            scaled = (phi @ triangle) * (2 * dv[:, c : c + 1])
            if dphi is not None:
                dphi.addmm_(scaled, triangle.T)
            if dlower is not None:
                full = phi.T @ scaled
                dlower[c] = full.tril_() if t.dim() == 2 else full.flatten()[_packed_index(phi)]
        return dphi, dlower


def _mask(phi: Tensor) -> Tensor:
    d = phi.shape[1]
    return torch.ones(d, d, dtype=torch.bool, device=phi.device).tril_()


def _packed_index(phi: Tensor) -> Tensor:
    i, j = torch.tril_indices(phi.shape[1], phi.shape[1], device=phi.device)
    return i * phi.shape[1] + j


def _triangle(lower: Tensor, phi: Tensor) -> Tensor:
    """(D, D) lower triangular matrix of one class, from the full or the packed form."""
    if lower.dim() == 2:
        return lower.tril()
    d = phi.shape[1]
    return phi.new_zeros(d, d).masked_scatter_(_mask(phi), lower)
