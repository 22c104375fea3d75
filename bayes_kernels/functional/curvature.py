"""Curvature factors that grow in place: Kronecker factors and factors of rank k."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _library, reference
from .._library import fake
from .arguments import (
    as_list,
    check_tensors,
    check_writable,
    no_autocast,
    no_transform,
    scalar,
)

# low_rank_update_: rows that it takes at once, and the largest fused rank.
_FACTOR_ROWS, _MAX_FACTOR_RANK = 32, 96
# kron_accumulate_: the largest fused side. Beyond it, rows of the factor in one product (from twice
# that on, since a GPU is busy with large products only), and in one copy to the other triangle.
_MAX_DENSE = 128
_PRODUCT_ROWS = {"cpu": 256, "cuda": 2048}
_MIRROR_ROWS = {"cpu": 128, "cuda": 2048}


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
        factors: symmetric (d, d), fp32 or fp64, one or a list; changed in place. The upper triangle is
            read, and the result is symmetric to the bit. They must not overlap in memory.
        rows: (..., d) in any floating dtype, one for each factor; leading dimensions are flattened.
            Half-precision rows are summed in the factor's dtype.
        alpha, beta: numbers or 0-dim floating tensors, which are not waited for. With beta = 0 the old
            values are not read.
        masks: None, or one for each factor of the leading shape of its rows (or None): bool, where
            False leaves a row out, or floating weights w_i >= 0. Rows left out may hold anything.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes or devices do not fit.

    Cost: N d^2 / 2 multiply-adds for N rows. Up to d = 128 the rows are read once, as they are, by a
    kernel: partial sums over at most 256 rows are fp32 (fp64 for fp64 factors), sums of those fp64; on
    a GPU two launches for every 500 factors (60 with drivers older than CUDA 12.1). Same inputs, same
    bits for any number of threads. Larger factors, fp64 factors on a GPU, and devices without kernels
    take PyTorch's products, of a copy of the rows in the factor's dtype: one below d = 512 (4096 on a
    GPU), else one for every 256 (2048) rows of the factor, from their diagonal on.

    Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", arXiv 1503.05671.
    """
    op = "kron_accumulate_"
    triples = _check_curvature(op, factors, rows, masks, square=True)
    fused: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor, Tensor | None]]] = {}
    with torch.no_grad():
        for factor, x, mask in triples:
            if factor.shape[0] <= _MAX_DENSE and _library.has_kernels(factor):
                fused.setdefault((factor.device, factor.dtype), []).append((factor, x, mask))
            else:
                _kron_accumulate(op, factor, x, mask, alpha, beta)
        for members in fused.values():
            _kron_accumulate_list(op, members, alpha, beta)


def _kron_accumulate_list(
    op: str,
    members: list[tuple[Tensor, Tensor, Tensor | None]],
    alpha: float | Tensor,
    beta: float | Tensor,
) -> None:
    """The kernel: factors of one dtype on one device."""
    first = members[0][0]
    narrow = (torch.float32, torch.bfloat16, torch.float16) if first.dtype == torch.float32 else ()
    rows = []
    for _, x, _ in members:
        x = x if x.dtype in narrow else x.to(first.dtype)
        rows.append((x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous())
    weights: list[Tensor] = []
    if any(mask is not None for _, _, mask in members):
        weights = [
            first.new_empty(0) if mask is None else mask.reshape(-1).to(first.dtype).contiguous()
            for _, _, mask in members
        ]
    factors = [factor.contiguous() for factor, _, _ in members]
    scale = scalar(op, "alpha", alpha, first)
    same = not isinstance(alpha, Tensor) and not isinstance(beta, Tensor) and alpha == beta
    keep = scale if same else scalar(op, "beta", beta, first)
    _library.ops.kron_accumulate_(factors, rows, weights, keep, scale)
    torch.autograd.graph.increment_version(factors)
    for (factor, _, _), new in zip(members, factors, strict=True):
        if new is not factor:
            factor.copy_(new)


def _kron_accumulate(
    op: str,
    factor: Tensor,
    x: Tensor,
    mask: Tensor | None,
    alpha: float | Tensor,
    beta: float | Tensor,
) -> None:
    """Large factors, and those without a kernel: PyTorch's products of one side of the diagonal."""
    with no_autocast(factor):
        x = reference.valid_rows(x.to(factor.dtype), mask)
        d, device = factor.shape[0], factor.device.type
        blocks = max(1, d // _PRODUCT_ROWS.get(device, 256))
        size = max(1, -(-d // blocks))
        scale, keep = (scalar(op, k, v, factor) for k, v in (("alpha", alpha), ("beta", beta)))
        for start in range(0, d, size):
            right = factor[start : start + size, start:]
            left = x[:, start : start + size].T
            if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
                kept = torch.where(keep == 0, 0, right * keep)
                right.copy_(kept.add_((left @ x[:, start:]).mul_(scale)))
            else:
                right.addmm_(left, x[:, start:], beta=beta, alpha=alpha)
        size = _MIRROR_ROWS.get(device, 128)
        for start in range(0, d, size):
            stop = start + size
            diagonal = factor[start:stop, start:stop]
            diagonal.triu_().add_(diagonal.triu(1).T)
            factor[stop:, start:stop] = factor[start:stop, stop:].T


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
    fp64. On a GPU three launches for every 500 factors (60 with drivers older than CUDA 12.1) and 32
    rows; on the CPU a factor is one thread's work. Same inputs, same bits for any number of threads.

    Source: Yang et al., "Bayesian Low-rank Adaptation for Large Language Models", arXiv 2308.13111,
    Algorithm 1, which takes singular value decompositions.
    """
    op = "low_rank_update_"
    triples = _check_curvature(op, factors, rows, masks, square=False)
    fused: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    # torch.no_grad() is 5 % of one update of a factor (4096, 10).
    tracked = any(t is not None and t.requires_grad for triple in triples for t in triple)
    with torch.no_grad() if tracked else contextlib.nullcontext():
        for factor, x, mask in triples:
            if mask is not None or x.dim() != 2 or x.dtype != factor.dtype:
                x = reference.valid_rows(x.to(factor.dtype), mask)
            x = x.contiguous()
            if x.shape[0] == 0 or factor.numel() == 0:
                continue
            if factor.shape[1] > _MAX_FACTOR_RANK or not _library.has_kernels(factor):
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
    """The path of ranks above 96, and without kernels: PyTorch's products and eigensolver."""
    k = factor.shape[1]
    with no_autocast(factor):
        for x in rows.split(_FACTOR_ROWS):
            h = torch.cat([factor.T, x])  # transposed, so that both products read rows of length d
            # Over a power of two of its size, that squares stay in range. What is not finite the
            # eigensolver would refuse; it is in the product all the same.
            most = int(math.log2(torch.finfo(h.dtype).max)) - 1
            exponent = torch.linalg.vector_norm(h, torch.inf).frexp().exponent.clamp(-most, most)
            h.ldexp_(-exponent)
            gram = reference.wide(h @ h.T).nan_to_num_(0.0, 0.0, 0.0)
            vectors = torch.linalg.eigh(gram).eigenvectors
            factor.copy_((vectors[:, -k:].flip(1).to(h).T @ h).ldexp_(exponent).T)


def _check_curvature(
    op: str,
    factors: Tensor | Sequence[Tensor],
    rows: Tensor | Sequence[Tensor],
    masks: Tensor | Sequence[Tensor | None] | None,
    *,
    square: bool,
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Argument checks shared by the curvature ops; returns (factor, rows, mask) triples."""
    no_transform(op)
    factor_list: list[Tensor] = as_list(op, "factors", factors)
    row_list: list[Tensor] = as_list(op, "rows", rows)
    mask_list: list[Tensor | None]
    mask_list = [None] * len(factor_list) if masks is None else as_list(op, "masks", masks)
    if not len(factor_list) == len(row_list) == len(mask_list):
        raise ValueError(
            f"{op}: factors, rows and masks must be lists of the same length, got "
            f"{len(factor_list)}, {len(row_list)} and {len(mask_list)}"
        )
    triples = list(zip(factor_list, row_list, mask_list, strict=True))
    weights = [mask for mask in mask_list if mask is not None]
    for name, tensors in (("factors", factor_list), ("rows", row_list), ("masks", weights)):
        check_tensors(op, name, tensors)
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
    check_writable(op, "factors", factor_list, [*row_list, *weights])
    return triples


# --- fake kernels: shapes and dtypes of the ops' results ---------------------------------------------


@fake("low_rank_update_")
def _(factors: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    return None


@fake("kron_accumulate_")
def _(
    factors: Sequence[Tensor],
    rows: Sequence[Tensor],
    masks: Sequence[Tensor],
    beta: Tensor,
    alpha: Tensor,
) -> None:
    return None
