"""Gaussian covariances of weight rows: phi' S phi, trace S and logdet S, with gradients by hand.

Each kind of covariance is a definition in PyTorch's own operations, an autograd function that needs
less memory, and a public function that takes the definition under torch.func.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..functional.arguments import backward_of, transformed

COVARIANCES = ("dense", "diagonal", "low_rank")

Moments = tuple[Tensor, Tensor, Tensor]  # phi' S_c phi (B, C), trace S_c (C,), logdet S_c (C,)


def pack_tril(square: Tensor) -> Tensor:
    """Lower triangle (..., D, D) packed by rows: (..., D(D+1)/2), (i, j <= i) at i(i+1)/2 + j.

    Args:
        square: (..., D, D); what lies above the diagonal is not read.

    Raises:
        ValueError: the last two dimensions differ.
    """
    if square.dim() < 2 or square.shape[-1] != square.shape[-2]:
        raise ValueError(
            f"pack_tril: square must have shape (..., D, D), got {tuple(square.shape)}"
        )
    d = square.shape[-1]
    rows, columns = torch.tril_indices(d, d, device=square.device)
    return square[..., rows, columns]


def unpack_tril(packed: Tensor) -> Tensor:
    """The lower triangle (..., D, D), zero above the diagonal, of `pack_tril`'s (..., D(D+1)/2).

    Args:
        packed: (..., D(D+1)/2).

    Raises:
        ValueError: the last dimension is no triangular number.
    """
    size = packed.shape[-1] if packed.dim() else 0
    d = (math.isqrt(8 * size + 1) - 1) // 2
    if packed.dim() < 1 or d * (d + 1) // 2 != size:
        raise ValueError(
            f"unpack_tril: packed must have shape (..., D(D+1)/2), got {tuple(packed.shape)}"
        )
    rows, columns = torch.tril_indices(d, d, device=packed.device)
    square = packed.new_zeros((*packed.shape[:-1], d, d))
    square[..., rows, columns] = packed
    return square


def diagonal_index(d: int, device: torch.device) -> Tensor:
    """Where the diagonal lies in a packed triangle."""
    i = torch.arange(d, device=device)
    return i * (i + 3) // 2


def _column_blocks(d: int) -> Iterator[tuple[int, int]]:
    """Blocks [j0, j1) of columns. One block of one class is what exists unpacked at a time.

    A block of columns holds whole entries of phi' T, so that one pass suffices, and starts at row
    j0, so that only the triangle is multiplied: 128 columns are at most 1 MB up to D = 2048.
    """
    width = 128 if d <= 2048 else 256
    for j0 in range(0, d, width):
        yield j0, min(j0 + width, d)


def _row_starts(d: int, j0: int, device: torch.device) -> Tensor:
    """Where column j0 of the rows j0, ..., d - 1 lies in a packed triangle."""
    rows = torch.arange(j0, d, device=device)
    return rows * (rows + 1) // 2 + j0


def _unpack_columns(packed: Tensor, starts: Tensor, width: int) -> Tensor:
    """`width` columns of T, from the diagonal down, out of one packed triangle: (rows, width).

    Every row is one contiguous window of the triangle: windows are copied whole, four times as fast as
    elements. Those of the first rows run into the next row, which `tril` removes; none runs over the
    end, since row j0 + width - 1 has exactly j0 + width elements.
    """
    block = packed.unfold(0, width, 1).index_select(0, starts)
    block[:width].tril_()
    block.diagonal().exp_()
    return block


def _define_triangular(phi: Tensor, packed: Tensor) -> Moments:
    """Definition of `_TriangularVariance`: unpacks all triangles at once."""
    square = unpack_tril(packed)
    logs = square.diagonal(dim1=-2, dim2=-1)
    square = square.tril(-1) + torch.diag_embed(logs.exp())
    variance = torch.einsum("bi,cij->bcj", phi, square).square().sum(-1)
    return variance, square.square().sum((-2, -1)), 2 * logs.sum(-1)


class _TriangularVariance(torch.autograd.Function):
    """v (B, C) = ||T_c' phi||^2, trace (C,) = ||T_c||_F^2, logdet (C,) = logdet T_c T_c'."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, phi: Tensor, packed: Tensor
    ) -> Moments:
        ctx.save_for_backward(phi, packed)
        d = phi.shape[1]
        variance = phi.new_zeros((phi.shape[0], packed.shape[0]))
        trace = phi.new_zeros((packed.shape[0],))
        for j0, j1 in _column_blocks(d):
            starts = _row_starts(d, j0, phi.device)
            for c in range(packed.shape[0]):
                block = _unpack_columns(packed[c], starts, j1 - j0)
                variance[:, c] += (phi[:, j0:] @ block).square().sum(1)
                trace[c] += torch.linalg.vector_norm(block).square()
        logs = packed.index_select(1, diagonal_index(d, packed.device))
        return variance, trace, 2 * logs.sum(1)

    @staticmethod
    @backward_of(_define_triangular, 2)
    def backward(  # type: ignore[override]
        ctx: Any, dvariance: Tensor, dtrace: Tensor, dlogdet: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        phi, packed = ctx.saved_tensors
        need_phi, need_packed = ctx.needs_input_grad
        d = phi.shape[1]
        dphi = torch.zeros_like(phi) if need_phi else None
        dpacked = torch.empty_like(packed) if need_packed else None
        for j0, j1 in _column_blocks(d):
            width = j1 - j0
            starts = _row_starts(d, j0, phi.device)
            columns = torch.arange(width, device=phi.device)
            below = (starts[width:, None] + columns).reshape(-1)
            i, j = torch.tril_indices(width, width, device=phi.device)
            corner, in_block = starts[i] + j, i * width + j
            for c in range(packed.shape[0]):
                block = _unpack_columns(packed[c], starts, width)
                dprojected = (phi[:, j0:] @ block) * (2 * dvariance[:, c, None])
                if dphi is not None:
                    dphi[:, j0:].addmm_(dprojected, block.T)
                if dpacked is not None:
                    diagonal = block.diagonal().clone()
                    block.mul_(2 * dtrace[c]).addmm_(phi[:, j0:].T, dprojected)
                    block.diagonal().mul_(diagonal).add_(2 * dlogdet[c])
                    flat = block.reshape(-1)
                    dpacked[c].index_copy_(0, below, flat[width * width :])
                    dpacked[c].index_copy_(0, corner, flat.index_select(0, in_block))
        return dphi, dpacked


def triangular_variance(phi: Tensor, packed: Tensor) -> Moments:
    """Moments of S_c = T_c T_c', `packed` (C, D(D+1)/2) with the diagonal of T_c as its logarithm."""
    return (_define_triangular if transformed() else _TriangularVariance.apply)(phi, packed)


def packed_product(packed: Tensor) -> Tensor:
    """T T' (..., D, D) of packed triangles with a logarithmic diagonal."""
    t = unpack_tril(packed)
    t.diagonal(dim1=-2, dim2=-1).exp_()
    return t @ t.transpose(-1, -2)


# --- diagonal ------------------------------------------------------------------------------------


def _define_diagonal(phi: Tensor, log_scale: Tensor) -> Moments:
    """Definition of `_DiagonalVariance`."""
    variances = (2 * log_scale).exp()
    return phi.square() @ variances.T, variances.sum(1), 2 * log_scale.sum(1)


class _DiagonalVariance(torch.autograd.Function):
    """v (B, C) = sum_j phi_j^2 exp(2 l_cj), trace (C,), logdet (C,)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, phi: Tensor, log_scale: Tensor
    ) -> Moments:
        ctx.save_for_backward(phi, log_scale)
        return _define_diagonal(phi, log_scale)

    @staticmethod
    @backward_of(_define_diagonal, 2)
    def backward(  # type: ignore[override]
        ctx: Any, dvariance: Tensor, dtrace: Tensor, dlogdet: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        phi, log_scale = ctx.saved_tensors
        need_phi, need_scale = ctx.needs_input_grad
        variances = (2 * log_scale).exp_()
        dphi = (dvariance @ variances).mul_(phi).mul_(2) if need_phi else None
        dscale = None
        if need_scale:
            dscale = torch.addmm(dtrace[:, None], dvariance.T, phi.square())
            dscale.mul_(variances).add_(dlogdet[:, None]).mul_(2)
        return dphi, dscale


def diagonal_variance(phi: Tensor, log_scale: Tensor) -> Moments:
    """Moments of S_c = diag(exp(2 log_scale_c)), log_scale (C, D)."""
    return (_define_diagonal if transformed() else _DiagonalVariance.apply)(phi, log_scale)


# --- low rank ------------------------------------------------------------------------------------


def _define_low_rank(phi: Tensor, factor: Tensor, log_scale: Tensor) -> Moments:
    """Definition of `_LowRankVariance`."""
    variances = (2 * log_scale).exp()
    projected = torch.einsum("bd,ckd->bck", phi, factor)
    variance = projected.square().sum(2) + phi.square() @ variances.T
    trace = variances.sum(1) + factor.square().sum((1, 2))
    scaled = (factor * torch.exp(-log_scale)[:, None]).double()
    identity = torch.eye(factor.shape[1], dtype=scaled.dtype, device=scaled.device)
    root = torch.linalg.cholesky_ex(identity + scaled @ scaled.mT).L
    logdet = root.diagonal(dim1=1, dim2=2).log().sum(1).to(phi.dtype)
    return variance, trace, 2 * (log_scale.sum(1) + logdet)


class _LowRankVariance(torch.autograd.Function):
    """v (B, C) = ||V_c phi||^2 + sum_j phi_j^2 exp(2 l_cj), trace (C,), logdet (C,).

    logdet S = sum_j 2 l_j + logdet M with M = I + U U', U = V exp(-l): a Cholesky of k x k.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, phi: Tensor, factor: Tensor, log_scale: Tensor
    ) -> Moments:
        classes, rank, d = factor.shape
        projected = phi @ factor.reshape(classes * rank, d).T
        variances = (2 * log_scale).exp_()
        # Not added in place: torch.compile of torch 2.11 loses the gradient of such an output.
        squares = projected.square().reshape(-1, classes, rank).sum(2)
        variance = torch.addmm(squares, phi.square(), variances.T)
        trace = variances.sum(1) + factor.square().sum((1, 2))
        scaled = factor * torch.exp(-log_scale)[:, None]
        middle = (scaled @ scaled.transpose(1, 2)).double()
        middle.diagonal(dim1=1, dim2=2).add_(1.0)
        # M >= I: it always has a Cholesky factor, and asking would synchronise.
        root = torch.linalg.cholesky_ex(middle).L
        logdet = 2 * (log_scale.sum(1) + root.diagonal(dim1=1, dim2=2).log().sum(1).to(phi.dtype))
        inverse = torch.cholesky_inverse(root).to(phi.dtype)
        ctx.save_for_backward(phi, factor, log_scale, projected, inverse)
        return variance, trace, logdet

    @staticmethod
    @backward_of(_define_low_rank, 3)
    def backward(  # type: ignore[override]
        ctx: Any, dvariance: Tensor, dtrace: Tensor, dlogdet: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        phi, factor, log_scale, projected, inverse = ctx.saved_tensors
        need_phi, need_factor, need_scale = ctx.needs_input_grad
        classes, rank, d = factor.shape
        variances = (2 * log_scale).exp_()
        dprojected = projected * dvariance.repeat_interleave(rank, dim=1)
        dphi = dfactor = dscale = None
        if need_phi:
            dphi = (dvariance @ variances).mul_(phi)
            dphi = dphi.addmm_(dprojected, factor.reshape(classes * rank, d)).mul_(2)
        # S^-1 V' = diag(exp(-2 l)) V' M^-1, and the diagonal of S^-1 is exp(-2 l) (1 - ...).
        scaled = factor * torch.exp(-log_scale)[:, None]
        solved = inverse @ scaled
        if need_factor:
            dfactor = (dprojected.T @ phi).reshape(classes, rank, d)
            dfactor.addcmul_(factor, dtrace[:, None, None])
            dfactor += solved * torch.exp(-log_scale)[:, None] * dlogdet[:, None, None]
            dfactor.mul_(2)
        if need_scale:
            dscale = torch.addmm(dtrace[:, None], dvariance.T, phi.square()).mul_(variances)
            dscale += dlogdet[:, None] * (1 - (scaled * solved).sum(1))
            dscale.mul_(2)
        return dphi, dfactor, dscale


def low_rank_variance(phi: Tensor, factor: Tensor, log_scale: Tensor) -> Moments:
    """Moments of S_c = V_c' V_c + diag(exp(2 log_scale_c)), V = `factor` (C, k, D)."""
    low_rank = _define_low_rank if transformed() else _LowRankVariance.apply
    return low_rank(phi, factor, log_scale)
