"""Variational Bayesian last layers for any torch model: classification and regression heads.

A head on features phi (D,) has one Gaussian over the weights of each output, independent between
outputs c = 1..C, and Gaussian noise on the output:

    w_c ~ N(mu_c, S_c),  prior N(0, q I),  z_c = mu_c' phi [+ b_c] + N(0, v_c),
    v_c = phi' S_c phi [+ sigma_c^2]                              (at least 1e-12 before and after +)

Training needs no samples: the expected log-likelihood of regression has a closed form and that of
classification the lower bound of Jensen's inequality,

    E log softmax(z)_y >= mu_y' phi - logsumexp_c(mu_c' phi + v_c / 2).

Its gap grows with the variance (four classes: 0.004 at v = 0.01, 0.035 at 0.1, 0.34 at 1, 1.4 at 4),
so it punishes large variances too much: watch v (`logit_distribution`), or use `bound="mc"`.

Parameters, the same meaning for every covariance: **exp of a log scale is a standard deviation**.

| covariance | parameters | S_c |
|---|---|---|
| "diagonal" | log_scale (C, D) | diag(exp(log_scale_c)^2) |
| "low_rank" | log_scale (C, D), factor (C, k, D) | V_c' V_c + diag(exp(log_scale_c)^2), V = factor |
| "dense" | scale_tril (C, D(D+1)/2) | T_c T_c' |

T_c is lower triangular and stored packed by rows: element (i, j <= i) at i(i+1)/2 + j, the diagonal as
its logarithm. A full square is never stored, and at work a block of columns of one class is unpacked at
a time. (The `vbll` package means a variance by exp(W_logdiag) where the covariance is low rank and a
deviation elsewhere; `load_vbll` converts.)

Cost with B rows: one product (B, D) x (D, C) for the means; variances by one such product of squares
(diagonal), one of (B, D) x (D, C k) besides (low rank), or B C D^2 / 2 multiply-adds (dense). The
backward pass costs twice that, three times for dense, whose triangles are unpacked again. Gradients
are written by hand: kept for it are the features, (B, C) tensors and the (B, C, k) projections, and no
(B, C, D) tensor exists at any time.

Features of any float dtype are taken in fp32 (fp64 where they or the parameters are), autocast or not;
results have that dtype. Parameters and buffers stay fp32 under `.half()`, `.bfloat16()` and
`.to(dtype)`: a log scale needs its bits. Weight decay on a head is wrong beside its KL (it would pull
deviations to 1): give its parameters none. Second derivatives and torch.func take the same formulas in
PyTorch's own operations; the Monte-Carlo bound has no second derivatives under `create_graph=True`.

Sources: Harrison, Willes, Snoek, "Variational Bayesian Last Layers", arXiv 2404.11599; Xiang, Li, Lu,
"PoLAR-VBLL", arXiv 2604.03388, for heads of language models and the Laplace refinement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional, random, reference
from ..functional.arguments import backward_of, no_autocast, transformed
from ..random import check_key

COVARIANCES = ("dense", "diagonal", "low_rank")
INITS = ("vbll", "prior")
BOUNDS = ("jensen", "mc")
MIN_VARIANCE = 1e-12
_HALF = (torch.float16, torch.bfloat16)


# --- packed triangles --------------------------------------------------------------------------


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


def _diagonal_index(d: int, device: torch.device) -> Tensor:
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


def _triangular_variance(phi: Tensor, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `_TriangularVariance` computes, of all triangles at once."""
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
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        logs = packed.index_select(1, _diagonal_index(d, packed.device))
        return variance, trace, 2 * logs.sum(1)

    @staticmethod
    @backward_of(_triangular_variance, 2)
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


def _packed_variance(phi: Tensor, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (_triangular_variance if transformed() else _TriangularVariance.apply)(phi, packed)


# --- diagonal and low rank ---------------------------------------------------------------------


def _diagonal_variance(phi: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `_DiagonalVariance` computes."""
    variances = (2 * log_scale).exp()
    return phi.square() @ variances.T, variances.sum(1), 2 * log_scale.sum(1)


class _DiagonalVariance(torch.autograd.Function):
    """v (B, C) = sum_j phi_j^2 exp(2 l_cj), trace (C,), logdet (C,)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, phi: Tensor, log_scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(phi, log_scale)
        return _diagonal_variance(phi, log_scale)

    @staticmethod
    @backward_of(_diagonal_variance, 2)
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


def _low_rank_variance(
    phi: Tensor, factor: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_LowRankVariance` computes."""
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
    ) -> tuple[Tensor, Tensor, Tensor]:
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
    @backward_of(_low_rank_variance, 3)
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


# --- bounds ------------------------------------------------------------------------------------


def _jensen_bound(mean: Tensor, variance: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """What `_JensenBound` computes."""
    chosen = mean.gather(1, labels[:, None]).squeeze(1)
    return (chosen - (mean + variance / 2).logsumexp(1)).masked_fill(~counted, 0.0)


class _JensenBound(torch.autograd.Function):
    """mean_y - logsumexp(mean + v / 2) for each row; 0 where the label is not counted."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, mean: Tensor, variance: Tensor, labels: Tensor, counted: Tensor
    ) -> Tensor:
        ctx.save_for_backward(mean, variance, labels, counted)
        return _jensen_bound(mean, variance, labels, counted)

    @staticmethod
    @backward_of(_jensen_bound, 4)
    def backward(  # type: ignore[override]
        ctx: Any, dbound: Tensor
    ) -> tuple[Tensor | None, ...]:
        mean, variance, labels, counted = ctx.saved_tensors
        weight = dbound.masked_fill(~counted, 0.0)[:, None]
        dmean = (mean + variance / 2).softmax(1).mul_(-weight)
        dvariance = dmean / 2
        dmean.scatter_add_(1, labels[:, None], weight)
        return dmean, dvariance, None, None


def _monte_carlo_bound(
    mean: Tensor,
    variance: Tensor,
    labels: Tensor,
    counted: Tensor,
    key: Tensor,
    n_samples: int,
    antithetic: bool,
) -> Tensor:
    """What `_MonteCarloBound` computes, for torch.func."""
    values = []
    for sample in range(n_samples // 2 if antithetic else n_samples):
        noise = reference.normal(reference.fold_in(key, sample), tuple(mean.shape)).to(mean.dtype)
        for eps in (noise, -noise) if antithetic else (noise,):
            logs = torch.addcmul(mean, variance.sqrt(), eps).log_softmax(1)
            values.append(logs.gather(1, labels[:, None]).squeeze(1))
    return torch.stack(values).mean(0).masked_fill(~counted, 0.0)


class _MonteCarloBound(torch.autograd.Function):
    """Mean over samples z = mean + sqrt(v) eps of log softmax(z)_y.

    Every row has a scalar value, so its gradients are added up sample by sample beside it: what is
    kept is two (B, C) tensors for any number of samples.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        mean: Tensor,
        variance: Tensor,
        labels: Tensor,
        counted: Tensor,
        key: Tensor,
        n_samples: int,
        antithetic: bool,
    ) -> Tensor:
        std = variance.sqrt()
        value = mean.new_zeros((mean.shape[0],))
        dmean, dstd = torch.zeros_like(mean), torch.zeros_like(mean)
        one = F.one_hot(labels, mean.shape[1]).to(mean.dtype)
        for sample in range(n_samples // 2 if antithetic else n_samples):
            noise = random.normal(random.fold_in(key, sample), tuple(mean.shape)).to(mean.dtype)
            for eps in (noise, -noise) if antithetic else (noise,):
                logs = torch.addcmul(mean, std, eps).log_softmax(1)
                value += logs.gather(1, labels[:, None]).squeeze(1)
                slope = one - logs.exp()
                dmean += slope
                dstd += slope * eps
        ctx.save_for_backward(dmean / n_samples, dstd / (2 * n_samples * std), counted)
        return (value / n_samples).masked_fill(~counted, 0.0)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dbound: Tensor
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what is kept has no derivatives
            raise RuntimeError(
                "VBLL: second derivatives must be those of bound='jensen', got bound='mc'; use "
                "'jensen', or torch.func, which keeps every sample"
            )
        dmean, dvariance, counted = ctx.saved_tensors
        weight = dbound.masked_fill(~counted, 0.0)[:, None]
        return dmean * weight, dvariance * weight, None, None, None, None, None


# --- the heads ---------------------------------------------------------------------------------


class _LastLayer(nn.Module):
    """Gaussian rows, output noise, their divergences: what both heads share."""

    weight_mean: nn.Parameter
    log_scale: nn.Parameter | None
    factor: nn.Parameter | None
    scale_tril: nn.Parameter | None
    noise_log_scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        outputs: int,
        *,
        covariance: str,
        rank: int,
        noise: bool,
        bias: bool,
        prior_variance: float,
        wishart_scale: float,
        wishart_dof: float,
        init: str,
        noise_std: float | None,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if in_features < 1 or outputs < 1:
            raise ValueError(
                f"{op}: in_features and the number of outputs must be at least 1, got "
                f"{in_features} and {outputs}"
            )
        if covariance not in COVARIANCES:
            raise ValueError(
                f"{op}: covariance must be one of {COVARIANCES}, got {covariance!r}; choose one"
            )
        if covariance == "low_rank" and not 1 <= rank:
            raise ValueError(f"{op}: rank must be at least 1, got {rank}")
        if init not in INITS:
            raise ValueError(f"{op}: init must be one of {INITS}, got {init!r}; choose one")
        if not (prior_variance > 0 and math.isfinite(prior_variance)):
            raise ValueError(f"{op}: prior_variance must be positive, got {prior_variance}")
        if wishart_scale < 0 or wishart_dof < 0:
            raise ValueError(
                f"{op}: wishart_scale and wishart_dof must not be negative, got {wishart_scale} "
                f"and {wishart_dof}"
            )
        if noise_std is not None and not noise_std > 0:
            raise ValueError(f"{op}: noise_std must be positive, got {noise_std}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: dtype must be float32 or float64, got {dtype}")
        self.in_features, self.outputs = in_features, outputs
        self.covariance, self.rank = covariance, rank if covariance == "low_rank" else 0
        self.prior_variance = float(prior_variance)
        self.wishart_scale, self.wishart_dof = float(wishart_scale), float(wishart_dof)
        self.init, self.noise_std = init, noise_std

        def parameter(wanted: bool, *size: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if wanted else None

        d, dense = in_features, covariance == "dense"
        self.weight_mean = nn.Parameter(torch.empty((outputs, d), device=device, dtype=dtype))
        self.register_parameter("log_scale", parameter(not dense, outputs, d))
        self.register_parameter(
            "factor", parameter(covariance == "low_rank", outputs, self.rank, d)
        )
        self.register_parameter("scale_tril", parameter(dense, outputs, d * (d + 1) // 2))
        self.register_parameter("noise_log_scale", parameter(noise, outputs))
        self.register_parameter("bias", parameter(bias, outputs))
        self.reset_parameters(generator)

    # What the published initialisations differ in: standard deviation of the mean, spread and centre
    # of logdiag, standard deviation of off-diagonal entries, spread and centre of the log noise.
    def _published_init(self) -> tuple[float, float, float, float, float, float]:
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial parameters again, by the head's `init` and `noise_std`."""
        d = self.in_features
        if self.init == "vbll":
            mean_std, spread, centre, off, noise_spread, noise_centre = self._published_init()
            # There exp(logdiag) is a variance where the covariance is low rank.
            half = 0.5 if self.covariance == "low_rank" else 1.0
            spread, centre = half * spread, half * centre
        else:
            mean_std = math.sqrt(self.prior_variance)
            spread, centre, off = 0.0, math.log(mean_std), 1e-3 * mean_std / math.sqrt(d)
            noise_spread, noise_centre = 0.0, -1.0
        if self.noise_std is not None:
            noise_spread, noise_centre = 0.0, math.log(self.noise_std)
        _fill_normal(self.weight_mean, generator, mean_std)
        self._fill_covariance(spread, centre, off, generator)
        if self.noise_log_scale is not None:
            _fill_normal(self.noise_log_scale, generator).mul_(noise_spread).add_(noise_centre)
        if self.bias is not None:
            self.bias.zero_()

    def _fill_covariance(
        self, spread: float, centre: float, off: float, generator: torch.Generator | None
    ) -> None:
        if self.scale_tril is not None:
            logs = torch.empty_like(self.weight_mean)
            _fill_normal(logs, generator)
            _fill_normal(self.scale_tril, generator).mul_(off)
            where = _diagonal_index(self.in_features, self.scale_tril.device)
            self.scale_tril.index_copy_(1, where, logs.mul_(spread).add_(centre))
            return
        assert self.log_scale is not None
        _fill_normal(self.log_scale, generator).mul_(spread).add_(centre)
        if self.factor is not None:
            _fill_normal(self.factor, generator).mul_(off)

    @torch.no_grad()
    def init_from(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        variance: float,
        generator: torch.Generator | None = None,
    ) -> None:
        """Start at given rows: mu = weight, every S_c = variance I.

        With the answer tokens' rows of a language model's head the first predictions are those of the
        model. An element's variance s gives logits the variance s ||phi||^2, and ||phi||^2 is of the
        order of D after a final norm: variance = 0.01 / D is a start near the point estimate.

        Args:
            weight: (C, D).
            bias: (C,); needs a head with a bias.
            variance: initial variance of each weight. A low-rank factor, which cannot leave zero,
                gets a hundredth of it on average, drawn at random.
            generator: of that draw, on any device.

        Raises:
            ValueError: shapes do not fit, or variance is not positive.
        """
        op = f"{type(self).__name__}.init_from"
        if tuple(weight.shape) != tuple(self.weight_mean.shape):
            raise ValueError(
                f"{op}: weight must have shape {tuple(self.weight_mean.shape)}, got "
                f"{tuple(weight.shape)}; pass the rows of the classes"
            )
        if bias is not None and (self.bias is None or tuple(bias.shape) != (self.outputs,)):
            raise ValueError(
                f"{op}: bias must have shape ({self.outputs},) in a head with bias=True, got "
                f"{tuple(bias.shape)} and {'no ' if self.bias is None else 'a '}bias"
            )
        if not (variance > 0 and math.isfinite(variance)):
            raise ValueError(f"{op}: variance must be positive, got {variance}")
        self.weight_mean.copy_(weight)
        if self.bias is not None:
            self.bias.zero_() if bias is None else self.bias.copy_(bias)
        off = math.sqrt(0.01 * variance / self.rank) if self.rank else 0.0
        self._fill_covariance(0.0, 0.5 * math.log(variance), off, generator)

    @torch.no_grad()
    def load_vbll(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters of a layer of the public `vbll` package.

        Args:
            state: state_dict of its `DiscClassification` or `Regression` with the same covariance:
                W_mean (C, D), W_logdiag (C, D), W_offdiag (C, D, D) or (C, D, k), noise_logdiag (C,).
                exp(W_logdiag) is a standard deviation there, but a variance in "lowrank".

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        op = f"{type(self).__name__}.load_vbll"
        shape = (self.outputs, self.in_features)
        expected = {"W_mean": shape, "W_logdiag": shape}
        if self.covariance != "diagonal":
            expected["W_offdiag"] = (*shape, self.rank or self.in_features)  # type: ignore[assignment]
        if self.noise_log_scale is not None:
            expected["noise_logdiag"] = (self.outputs,)  # type: ignore[assignment]
        for name, size in expected.items():
            if name not in state or tuple(state[name].shape) != size:
                got = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"{op}: {name} must have shape {size}, got {got}")
        self.weight_mean.copy_(state["W_mean"])
        logs = state["W_logdiag"]
        if self.scale_tril is not None:
            for c in range(self.outputs):
                self.scale_tril[c].copy_(pack_tril(state["W_offdiag"][c]))
            where = _diagonal_index(self.in_features, self.scale_tril.device)
            self.scale_tril.index_copy_(1, where, logs.to(self.scale_tril))
        else:
            assert self.log_scale is not None
            self.log_scale.copy_(logs / 2 if self.factor is not None else logs)
        if self.factor is not None:
            self.factor.copy_(state["W_offdiag"].transpose(1, 2))
        if self.noise_log_scale is not None:
            self.noise_log_scale.copy_(state["noise_logdiag"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to`, `.half`, `.cuda` and the like: the device changes, half precision is refused."""

        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in _HALF else moved

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        rank = f", rank={self.rank}" if self.rank else ""
        return (
            f"in_features={self.in_features}, outputs={self.outputs}, "
            f"covariance={self.covariance!r}{rank}, noise={self.noise_log_scale is not None}, "
            f"bias={self.bias is not None}, prior_variance={self.prior_variance:.4g}"
        )

    # --- distribution of the outputs ---

    def _rows(self, op: str, features: Tensor) -> Tensor:
        """Features as (rows, D) in the dtype of the computation."""
        name = f"{type(self).__name__}.{op}"
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"{name}: features must be a floating-point tensor, got {got}")
        if features.dim() < 1 or features.shape[-1] != self.in_features:
            raise ValueError(
                f"{name}: features must have shape (..., {self.in_features}), got "
                f"{tuple(features.shape)}"
            )
        if features.device != self.weight_mean.device:
            raise ValueError(
                f"{name}: features must be on {self.weight_mean.device}, got {features.device}; "
                "move them or the head"
            )
        double = torch.float64 in (features.dtype, self.weight_mean.dtype)
        wide = features.to(torch.float64 if double else torch.float32)
        return wide.reshape(math.prod(features.shape[:-1]), self.in_features)

    def _mean(self, phi: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(phi.dtype)
        return F.linear(phi, self.weight_mean.to(phi.dtype), bias)

    def _weight_variance(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi' S_c phi (B, C), trace S_c (C,), logdet S_c (C,)."""
        if self.scale_tril is not None:
            return _packed_variance(phi, self.scale_tril.to(phi.dtype))
        assert self.log_scale is not None
        log_scale = self.log_scale.to(phi.dtype)
        if self.factor is not None:
            low_rank = _low_rank_variance if transformed() else _LowRankVariance.apply
            return low_rank(phi, self.factor.to(phi.dtype), log_scale)
        diagonal = _diagonal_variance if transformed() else _DiagonalVariance.apply
        return diagonal(phi, log_scale)

    def _add_noise(self, variance: Tensor) -> Tensor:
        variance = variance.clamp_min(MIN_VARIANCE)
        if self.noise_log_scale is not None:
            variance = variance + (2 * self.noise_log_scale.to(variance.dtype)).exp()
        return variance

    def _divergence(self, trace: Tensor, logdet: Tensor) -> Tensor:
        q, d = self.prior_variance, self.in_features
        squares = self.weight_mean.to(trace.dtype).square().sum()
        constant = self.outputs * d * (math.log(q) - 1)
        return 0.5 * ((squares + trace.sum()) / q - logdet.sum() + constant)

    def _regulariser(self, trace: Tensor, logdet: Tensor) -> Tensor:
        value = self._divergence(trace, logdet)
        return value if self.noise_log_scale is None else value - self.wishart()

    def forward(self, features: Tensor) -> Tensor:
        """Mean outputs mu_c' phi [+ b_c].

        Args:
            features: (..., D), any float dtype.

        Returns:
            (..., C), fp32 or fp64.
        """
        phi = self._rows("forward", features)
        with no_autocast(phi):
            return self._mean(phi).reshape(*features.shape[:-1], self.outputs)

    def kl(self) -> Tensor:
        """KL(q || prior) over all weights, with its constant: 0-dim tensor.

        1/2 sum_c [(||mu_c||^2 + tr S_c) / q + D log q - logdet S_c - D].
        """
        dtype = self.weight_mean.dtype if self.weight_mean.dtype not in _HALF else torch.float32
        with no_autocast(self.weight_mean):
            empty = torch.empty((0, self.in_features), dtype=dtype, device=self.weight_mean.device)
            _, trace, logdet = self._weight_variance(empty)
            return self._divergence(trace, logdet)

    def wishart(self) -> Tensor:
        """Log density, up to a constant, of the noise's precision under its Wishart hyperprior.

        dof' logdet(Sigma^-1) - scale / 2 tr(Sigma^-1), dof' = (dof + C + 1) / 2, Sigma =
        diag(sigma_c^2): 0-dim tensor; 0 without noise.
        """
        if self.noise_log_scale is None:
            return self.weight_mean.new_zeros(())
        logs = (
            self.noise_log_scale.float()
            if self.noise_log_scale.dtype in _HALF
            else (self.noise_log_scale)
        )
        dof = (self.wishart_dof + self.outputs + 1) / 2
        return -2 * dof * logs.sum() - 0.5 * self.wishart_scale * (-2 * logs).exp().sum()

    @torch.no_grad()
    def covariance_matrix(self) -> Tensor:
        """The variational S_c as (C, D, D), for small heads and tests: C D^2 numbers."""
        if self.scale_tril is not None:
            return _square(self.scale_tril)
        assert self.log_scale is not None
        dense = torch.diag_embed((2 * self.log_scale).exp())
        return dense if self.factor is None else dense + self.factor.transpose(1, 2) @ self.factor


def _fill_normal(t: Tensor, generator: torch.Generator | None, std: float = 1.0) -> Tensor:
    """`t.normal_(0, std)` with a generator of any device, whose numbers do not depend on t's."""
    if generator is None or generator.device == t.device or t.is_meta:
        return t.normal_(0.0, std, generator=None if t.is_meta else generator)
    drawn = torch.empty(t.shape, dtype=t.dtype, device=generator.device)
    return t.copy_(drawn.normal_(0.0, std, generator=generator))


def _square(packed: Tensor) -> Tensor:
    """T T' of packed triangles with a logarithmic diagonal."""
    t = unpack_tril(packed)
    t.diagonal(dim1=-2, dim2=-1).exp_()
    return t @ t.transpose(-1, -2)


def _mean_over(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean of what counts, 0 for none, without a synchronisation. Values are 0 where not counted."""
    if counted is None:
        return values.sum() / max(values.numel(), 1)
    return values.sum() / counted.sum().clamp_min(1)


def _check_mask(op: str, mask: Tensor | None, features: Tensor) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != features.shape[:-1]):
        raise ValueError(
            f"{op}: mask must be bool of shape {tuple(features.shape[:-1])}, got {mask.dtype} of "
            f"shape {tuple(mask.shape)}"
        )


def _weight_of_divergence(op: str, n_train: float | Tensor, weight: float) -> float | Tensor:
    if not isinstance(n_train, Tensor) and not n_train > 0:
        raise ValueError(
            f"{op}: n_train must be the number of training examples, at least 1, got {n_train}"
        )
    return weight / n_train


@dataclass(frozen=True)
class LaplaceReport:
    """What `VBLLClassification.laplace_refine` did.

    Attributes:
        method: "cholesky" (D x D Hessians) or "subspace" (their N x N form).
        n_examples: training examples seen.
        rank: dimension in which the data were treated: D, or N for "subspace".
        prior_variance: q.
        elbo_applies: False: the mean was found with other covariances, so that bound - KL is no
            evidence lower bound of this posterior. Report figures before and after.
    """

    method: str
    n_examples: int
    rank: int
    prior_variance: float
    elbo_applies: bool = False


class VBLLClassification(_LastLayer):
    """Discriminative classification with a variational Bayesian last layer.

    p(y | phi, w) = softmax(z)_y with the logits z of the module's docstring.

    Args:
        in_features: D.
        n_classes: C.
        covariance: "dense", "diagonal" or "low_rank".
        rank: k of "low_rank".
        noise: learn the deviations sigma_c of the logits, under a Wishart hyperprior.
        bias: a bias for each class: a point estimate without a prior.
        prior_scale: q = prior_scale * 2 / D.
        prior_variance: q itself, in place of prior_scale.
        wishart_scale, wishart_dof: of the noise's hyperprior.
        init: "vbll" as published (mu ~ N(0, 2/D), deviations near 1/D, low rank: variances near 1/D;
            log noise ~ N(-1, 1)); "prior": mu ~ N(0, q), S near q I, noise e^-1. `init_from` starts at
            given rows.
        noise_std: initial sigma_c in place of the init's.
        ignore_index: label of rows that do not count.
        generator, device: of the initial parameters; a generator of another device gives its own
            numbers, the same on every `device`.
        dtype: float32 or float64.

    Parameters: weight_mean (C, D); log_scale, factor or scale_tril as in the module's docstring;
    noise_log_scale (C,); bias (C,).

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    laplace_tril: Tensor | None
    laplace_basis: Tensor | None
    laplace_variance: Tensor | None

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        covariance: str = "dense",
        rank: int = 3,
        noise: bool = True,
        bias: bool = False,
        prior_scale: float = 1.0,
        prior_variance: float | None = None,
        wishart_scale: float = 1.0,
        wishart_dof: float = 1.0,
        init: str = "vbll",
        noise_std: float | None = None,
        ignore_index: int = -100,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        variance = 2.0 * prior_scale / max(in_features, 1)
        super().__init__(
            in_features,
            n_classes,
            covariance=covariance,
            rank=rank,
            noise=noise,
            bias=bias,
            prior_variance=variance if prior_variance is None else prior_variance,
            wishart_scale=wishart_scale,
            wishart_dof=wishart_dof,
            init=init,
            noise_std=noise_std,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.ignore_index = ignore_index
        for name in _LAPLACE_BUFFERS:
            self.register_buffer(name, None)

    @property
    def n_classes(self) -> int:
        """C."""
        return self.outputs

    def _published_init(self) -> tuple[float, float, float, float, float, float]:
        d = self.in_features
        return math.sqrt(2 / d), 1e-3, -math.log(d), 1e-3 / d, 1.0, -1.0

    # --- distribution of the logits ---

    def _moments(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and variance (B, C) of the logits, trace and logdet (C,) of the variational S_c."""
        if self.laplace_tril is None:
            variance, trace, logdet = self._weight_variance(phi)
        else:
            packed = self.laplace_tril.to(phi.dtype)
            if self.laplace_basis is None or self.laplace_variance is None:
                variance, trace, logdet = _packed_variance(phi, packed)
            else:
                basis = self.laplace_basis.to(phi.dtype)
                inside = phi @ basis.T
                outside = (phi - inside @ basis).square().sum(1, keepdim=True)
                variance, trace, logdet = _packed_variance(inside, packed)
                variance = variance + outside * self.laplace_variance.to(phi.dtype)
        return self._mean(phi), self._add_noise(variance), trace, logdet

    def logit_distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the logits, which are independent Gaussians.

        Args:
            features: (..., D), any float dtype.

        Returns:
            mean (..., C) and var (..., C), noise included, both fp32 or fp64. Differentiable.
        """
        phi = self._rows("logit_distribution", features)
        with no_autocast(phi):
            mean, variance, _, _ = self._moments(phi)
        shape = (*features.shape[:-1], self.outputs)
        return mean.reshape(shape), variance.reshape(shape)

    def bound(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        bound: str = "jensen",
        n_samples: int = 10,
        antithetic: bool = True,
        key: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Lower bound of E log softmax(z)_y for each example, or its Monte-Carlo estimate.

        Args:
            features: (..., D), any float dtype.
            labels: int64 (...,) in [0, C), or ignore_index.
            bound: "jensen", closed form; "mc", the mean over reparameterised samples of the logits,
                unbiased for the expectation itself and free of Jensen's gap.
            n_samples: samples of "mc".
            antithetic: draw them as pairs +eps, -eps (n_samples is even).
            key: noise key of "mc" (`random.key`): row i and sample s have the same noise for it
                whatever the number of rows.
            mask: bool (...,), True where a row counts.

        Returns:
            (...,), 0 where a row does not count.

        Raises:
            ValueError, TypeError: shapes, dtypes or options do not fit.
        """
        op = "bound"
        rows, targets, counted = self._targets(op, features, labels, mask)
        self._check_bound(op, bound, n_samples, antithetic, key)
        with no_autocast(rows):
            mean, variance, _, _ = self._moments(rows)
            value = self._bound(mean, variance, targets, counted, bound, n_samples, antithetic, key)
        return value.reshape(features.shape[:-1])

    def loss(
        self,
        features: Tensor,
        labels: Tensor,
        n_train: float | Tensor,
        regularization_weight: float = 1.0,
        *,
        bound: str = "jensen",
        n_samples: int = 10,
        antithetic: bool = True,
        key: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Negative evidence lower bound per training example.

            -(mean over rows that count of bound) + regularization_weight / n_train (KL - wishart)

        The mean is 0 where no row counts. One pass over the covariance gives the variances and the
        divergence.

        Args:
            features, labels, bound, n_samples, antithetic, key, mask: as in `bound`.
            n_train: examples in the training set.
            regularization_weight: factor of the divergence; below 1 for a tempered posterior.

        Returns:
            0-dim tensor.

        Raises:
            RuntimeError: the covariances are the Laplace ones.
            ValueError, TypeError: shapes, dtypes or options do not fit.
        """
        op = "loss"
        self._require_variational(op)
        weight = _weight_of_divergence(
            f"{type(self).__name__}.{op}", n_train, regularization_weight
        )
        rows, targets, counted = self._targets(op, features, labels, mask)
        self._check_bound(op, bound, n_samples, antithetic, key)
        with no_autocast(rows):
            mean, variance, trace, logdet = self._moments(rows)
            value = self._bound(mean, variance, targets, counted, bound, n_samples, antithetic, key)
            return self._regulariser(trace, logdet) * weight - _mean_over(value, counted)

    def kl(self) -> Tensor:
        """KL(q || prior), as in the base class.

        Raises:
            RuntimeError: the covariances are the Laplace ones.
        """
        self._require_variational("kl")
        return super().kl()

    @torch.no_grad()
    def predict(
        self,
        features: Tensor,
        *,
        n_samples: int | None = 1000,
        key: Tensor | None = None,
        **options: Any,
    ) -> functional.McPrediction:
        """Predictive distribution: the mean of softmax(z) over samples of the logits.

        Only logits are sampled, never weights: C normals a sample and example, so that a thousand
        samples cost little beside the features.

        Args:
            features: (..., D), any float dtype; leading dimensions are flattened to B.
            n_samples: samples of the logits.
            key: noise key (`random.key`); needed for method "mc", the default.
            options: of `functional.mc_predict`: method, antithetic, return_standard_error, stream,
                row0, ids.

        Returns:
            The result of `functional.mc_predict`: log_probs (B, C), entropy (B,), expected_entropy
            (B,), mutual_information (B,).

        Raises:
            ValueError, TypeError: features, key or options do not fit.
        """
        mean, variance = self.logit_distribution(features)
        shape = (math.prod(features.shape[:-1]), self.outputs)
        return functional.mc_predict(
            mean.reshape(shape), variance.reshape(shape), n_samples=n_samples, key=key, **options
        )

    def _bound(
        self,
        mean: Tensor,
        variance: Tensor,
        targets: Tensor,
        counted: Tensor,
        bound: str,
        n_samples: int,
        antithetic: bool,
        key: Tensor | None,
    ) -> Tensor:
        if bound == "jensen":
            jensen = _jensen_bound if transformed() else _JensenBound.apply
            return jensen(mean, variance, targets, counted)
        assert key is not None  # _check_bound
        sampled = _monte_carlo_bound if transformed() else _MonteCarloBound.apply
        return sampled(mean, variance, targets, counted, key, n_samples, antithetic)

    def _check_bound(
        self, op: str, bound: str, n_samples: int, antithetic: bool, key: Tensor | None
    ) -> None:
        name = f"{type(self).__name__}.{op}"
        if bound not in BOUNDS:
            raise ValueError(f"{name}: bound must be one of {BOUNDS}, got {bound!r}; choose one")
        if bound == "mc":
            if key is None:
                raise ValueError(f"{name}: key is needed with bound='mc'; make it with random.key")
            check_key(name, key)
            if n_samples < 1 or (antithetic and n_samples % 2):
                raise ValueError(
                    f"{name}: n_samples must be at least 1, and even with antithetic=True, got "
                    f"{n_samples}"
                )

    def _targets(
        self, op: str, features: Tensor, labels: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of features, labels that index, and which rows count."""
        name = f"{type(self).__name__}.{op}"
        rows = self._rows(op, features)
        if labels.dtype != torch.int64:
            raise TypeError(f"{name}: labels must be int64, got {labels.dtype}; convert them")
        if labels.shape != features.shape[:-1] or labels.device != features.device:
            raise ValueError(
                f"{name}: labels must have shape {tuple(features.shape[:-1])} on "
                f"{features.device}, got {tuple(labels.shape)} on {labels.device}"
            )
        _check_mask(name, mask, features)
        flat = labels.reshape(-1)
        counted = flat != self.ignore_index
        if mask is not None:
            counted = counted & mask.reshape(-1)
        targets = flat.masked_fill(~counted, 0)
        # On a GPU this would synchronise; there the gather itself refuses a label out of range.
        if targets.device.type == "cpu" and not torch.compiler.is_compiling() and targets.numel():
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= self.outputs:
                raise ValueError(
                    f"{name}: labels must be in [0, {self.outputs}) or {self.ignore_index}, got "
                    f"{low if low < 0 else high}"
                )
        return rows, targets, counted

    # --- Laplace refinement ---

    @property
    def refined(self) -> bool:
        """Whether the covariances are those of `laplace_refine`."""
        return self.laplace_tril is not None

    def _require_variational(self, op: str) -> None:
        if self.refined:
            raise RuntimeError(
                f"{type(self).__name__}.{op}: the covariances are the Laplace ones, for which bound "
                "- KL is no evidence lower bound; call discard_refinement() to go on with the "
                "variational ones"
            )

    @torch.no_grad()
    def laplace_refine(
        self,
        features: Tensor | Iterable[Any],
        probs: Tensor | None = None,
        *,
        prior_variance: float | None = None,
        method: str = "auto",
        dtype: torch.dtype = torch.float64,
    ) -> LaplaceReport:
        """Replace the covariances by the exact Laplace ones of the last layer, class by class.

            Sigma_c = H_c^-1,   H_c = sum_i p_ic (1 - p_ic) phi_i phi_i' + I / q

        The means stay, and so do the variational parameters (`discard_refinement` goes back to them).
        The head then has a posterior that no ELBO describes: `loss` and `kl` refuse; the noise is kept.

        "cholesky", for N >= D: H_c is added up over the batches, and the packed triangle of its
        inverse is kept: O(N D^2 + D^3) time and 8 D^2 bytes for a class (a tensor of features), or
        all classes at once (batches).

        "subspace", for N < D: outside the span of the features Sigma_c is q I. With an orthonormal
        basis Q (N, D) of that span and coordinates M = Phi Q', Sigma_c = q (I - Q'Q) + Q' (I / q +
        M' W_c M)^-1 Q: O(N^2 D + C N^3) time, and Q with one packed N x N triangle a class is kept.
        It equals Woodbury's form q I - q^2 Phi' W^1/2 (I + q W^1/2 Phi Phi' W^1/2)^-1 W^1/2 Phi, but
        adds squares where that subtracts, and stores half as much; weights of 0 are harmless.

        Args:
            features: (N, D), or batches of it: (b, D) tensors or pairs (features, probs).
            probs: (N, C) class probabilities; None for softmax of the mean logits.
            prior_variance: q, by default that of the head.
            method: "auto" (by N), "cholesky" or "subspace".
            dtype: of the factorisations.

        Returns:
            What was done.

        Raises:
            ValueError, TypeError: shapes or values do not fit, or there are no examples.
        """
        op = f"{type(self).__name__}.laplace_refine"
        if method not in ("auto", "cholesky", "subspace"):
            raise ValueError(
                f"{op}: method must be 'auto', 'cholesky' or 'subspace', got {method!r}"
            )
        q = self.prior_variance if prior_variance is None else float(prior_variance)
        if not (q > 0 and math.isfinite(q)):
            raise ValueError(f"{op}: prior_variance must be positive, got {q}")
        d, classes = self.in_features, self.outputs
        if not isinstance(features, Tensor) and probs is not None:
            raise ValueError(f"{op}: probs of batches must come in pairs (features, probs)")
        whole = isinstance(features, Tensor)
        batches = [(features, probs)] if whole else features
        kept: list[tuple[Tensor, Tensor]] = []
        hessians: list[Tensor] | None = None
        count = 0
        for batch in batches:
            phi, weights = self._curvature(op, batch, dtype)
            count += phi.shape[0]
            kept.append((phi, weights))
            if whole or method == "subspace" or (method == "auto" and count < d):
                continue
            # More rows than columns: from here on the sums are smaller than the rows.
            if hessians is None:
                hessians = [phi.new_zeros((d, d)) for _ in range(classes)]
            for c in range(classes):
                _add_curvature(hessians[c], kept, c)
            kept = []
        if count == 0:
            raise ValueError(f"{op}: features must have at least one row, got none")
        if hessians is None and (method == "subspace" or (method == "auto" and count < d)):
            phi = torch.cat([p for p, _ in kept])
            weights = torch.cat([w for _, w in kept])
            basis, upper = torch.linalg.qr(phi.T)  # (D, r), (r, N)
            rank = basis.shape[1]
            coordinates, kept = upper.T, []
            triangles = self._new_triangles(rank)
            for c in range(classes):
                hessian = (coordinates * weights[:, c, None]).T @ coordinates
                triangles[c] = _inverse_triangle(hessian, q)
            self.laplace_basis = basis.T.to(self.weight_mean.dtype).contiguous()
            self.laplace_variance = torch.tensor(q, dtype=triangles.dtype, device=triangles.device)
            used = "subspace"
        else:
            rank, triangles = d, self._new_triangles(d)
            for c in range(classes):
                if hessians is not None:
                    hessian = hessians[c]
                    hessians[c] = hessian.new_empty(0)
                else:
                    hessian = kept[0][0].new_zeros((d, d))
                    _add_curvature(hessian, kept, c)
                triangles[c] = _inverse_triangle(hessian, q)
            self.laplace_basis = self.laplace_variance = None
            used = "cholesky"
        self.laplace_tril = triangles
        return LaplaceReport(used, count, rank, q)

    def discard_refinement(self) -> None:
        """Go back to the variational covariances."""
        for name in _LAPLACE_BUFFERS:
            setattr(self, name, None)

    def _new_triangles(self, d: int) -> Tensor:
        return self.weight_mean.new_empty((self.outputs, d * (d + 1) // 2))

    def _curvature(self, op: str, batch: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Features (b, D) and weights p (1 - p) (b, C) of one batch."""
        pair = batch if isinstance(batch, (tuple, list)) else (batch, None)
        if len(pair) != 2 or not isinstance(pair[0], Tensor) or pair[0].dim() != 2:
            raise ValueError(
                f"{op}: a batch must be features (b, {self.in_features}) or (features, probs)"
            )
        phi = self._rows("laplace_refine", pair[0]).to(dtype)
        probs = pair[1]
        if probs is None:
            bias = 0.0 if self.bias is None else self.bias.to(dtype)
            probs = (phi @ self.weight_mean.to(dtype).T + bias).softmax(1)
        elif tuple(probs.shape) != (phi.shape[0], self.outputs):
            raise ValueError(
                f"{op}: probs must have shape ({phi.shape[0]}, {self.outputs}), got "
                f"{tuple(probs.shape)}"
            )
        probs = probs.to(dtype)
        if not bool(torch.isfinite(phi).all()) or not bool(((probs >= 0) & (probs <= 1)).all()):
            raise ValueError(f"{op}: features must be finite and probs in [0, 1]")
        return phi, probs * (1 - probs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A refined head is loaded as such, an unrefined one as such; other states leave it alone."""
        for name in _LAPLACE_BUFFERS if prefix + "weight_mean" in state_dict else ():
            saved = state_dict.get(prefix + name)
            present = getattr(self, name)
            if saved is None:
                setattr(self, name, None)
            elif present is None or present.shape != saved.shape:
                setattr(self, name, self.weight_mean.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


_LAPLACE_BUFFERS = ("laplace_tril", "laplace_basis", "laplace_variance")


def _add_curvature(hessian: Tensor, rows: list[tuple[Tensor, Tensor]], c: int) -> None:
    for phi, weights in rows:
        for part, weight in zip(
            phi.split(phi.shape[1]), weights[:, c, None].split(phi.shape[1]), strict=True
        ):
            hessian.addmm_((part * weight).T, part)


def _inverse_triangle(hessian: Tensor, q: float) -> Tensor:
    """Packed lower T, logarithmic diagonal, with T T' = (hessian + I / q)^-1; hessian is used up.

    H reversed in both dimensions is L L', so that H = U U' with the upper triangle U = L reversed,
    and T = U^-T is lower triangular.
    """
    hessian.diagonal().add_(1 / q)
    root = torch.linalg.cholesky(hessian.flip(0, 1))
    identity = torch.eye(root.shape[0], dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, identity, upper=False)
    triangle = inverse.T.flip(0, 1)
    triangle.diagonal().log_()
    return pack_tril(triangle)


class VBLLRegression(_LastLayer):
    """Gaussian regression with a variational Bayesian last layer and learned noise.

    y_k ~ N(z_k, sigma_k^2), z_k = w_k' phi [+ b_k]. The expected log-likelihood of an example is

        sum_k log N(y_k; mu_k' phi, sigma_k^2) - phi' S_k phi / (2 sigma_k^2).

    The public package's `Regression` equals this for one output. With K outputs it takes the mean over
    them in place of the sum, and multiplies each quadratic term by the sum of all precisions.

    Args:
        in_features: D.
        out_features: K.
        covariance, rank, bias, noise_std, generator, device, dtype: as in `VBLLClassification`.
        prior_scale: q = prior_scale / D.
        prior_variance: q itself, in place of prior_scale.
        wishart_scale, wishart_dof: of the noise's hyperprior.
        init: "prior" (mu ~ N(0, q), S near q I, noise e^-1), or "vbll" as published (mu ~ N(0, 1),
            log deviations ~ N(-log(D) / 2, 1), log noise ~ N(0, log(wishart_scale)^2)).

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        covariance: str = "dense",
        rank: int = 3,
        bias: bool = False,
        prior_scale: float = 1.0,
        prior_variance: float | None = None,
        wishart_scale: float = 1e-2,
        wishart_dof: float = 1.0,
        init: str = "prior",
        noise_std: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        variance = prior_scale / max(in_features, 1)
        super().__init__(
            in_features,
            out_features,
            covariance=covariance,
            rank=rank,
            noise=True,
            bias=bias,
            prior_variance=variance if prior_variance is None else prior_variance,
            wishart_scale=wishart_scale,
            wishart_dof=wishart_dof,
            init=init,
            noise_std=noise_std,
            generator=generator,
            device=device,
            dtype=dtype,
        )

    @property
    def out_features(self) -> int:
        """K."""
        return self.outputs

    def _published_init(self) -> tuple[float, float, float, float, float, float]:
        d = self.in_features
        spread = abs(math.log(self.wishart_scale)) if self.wishart_scale > 0 else 0.0
        return 1.0, 1.0, -0.5 * math.log(d), 1 / d, spread, 0.0

    def output_distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the targets, noise included: two (..., K). Differentiable."""
        phi = self._rows("output_distribution", features)
        with no_autocast(phi):
            mean, variance = self._mean(phi), self._add_noise(self._weight_variance(phi)[0])
        shape = (*features.shape[:-1], self.outputs)
        return mean.reshape(shape), variance.reshape(shape)

    def expected_log_likelihood(
        self, features: Tensor, targets: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """E log p(y | phi, w) for each example, in closed form: (...,), 0 where mask is False.

        Args:
            features: (..., D), any float dtype.
            targets: (..., K).
            mask: bool (...,), True where a row counts.

        Raises:
            ValueError, TypeError: shapes or dtypes do not fit.
        """
        phi = self._check_targets("expected_log_likelihood", features, targets, mask)
        with no_autocast(phi):
            variance = self._weight_variance(phi)[0]
            value = self._log_likelihood(phi, variance, targets, mask)
        return value.reshape(features.shape[:-1])

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        n_train: float | Tensor,
        regularization_weight: float = 1.0,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Negative evidence lower bound per training example.

            -(mean of expected_log_likelihood) + regularization_weight / n_train (KL - wishart)

        Args:
            features, targets, mask: as in `expected_log_likelihood`.
            n_train: examples in the training set.
            regularization_weight: factor of the divergence.

        Returns:
            0-dim tensor.

        Raises:
            ValueError, TypeError: shapes or dtypes do not fit.
        """
        op = f"{type(self).__name__}.loss"
        weight = _weight_of_divergence(op, n_train, regularization_weight)
        phi = self._check_targets("loss", features, targets, mask)
        counted = None if mask is None else mask.reshape(-1)
        with no_autocast(phi):
            variance, trace, logdet = self._weight_variance(phi)
            value = self._log_likelihood(phi, variance, targets, mask)
            return self._regulariser(trace, logdet) * weight - _mean_over(value, counted)

    @torch.no_grad()
    def predict(self, features: Tensor) -> torch.distributions.Normal:
        """Predictive distribution of the targets (..., K), exact: N(mu' phi, phi' S phi + sigma^2)."""
        mean, variance = self.output_distribution(features)
        return torch.distributions.Normal(mean, variance.sqrt())

    def _check_targets(
        self, op: str, features: Tensor, targets: Tensor, mask: Tensor | None
    ) -> Tensor:
        name = f"{type(self).__name__}.{op}"
        phi = self._rows(op, features)
        expected = (*features.shape[:-1], self.outputs)
        if not targets.is_floating_point() or tuple(targets.shape) != expected:
            raise ValueError(
                f"{name}: targets must be floating point of shape {expected}, got {targets.dtype} "
                f"of shape {tuple(targets.shape)}"
            )
        _check_mask(name, mask, features)
        return phi

    def _log_likelihood(
        self, phi: Tensor, variance: Tensor, targets: Tensor, mask: Tensor | None
    ) -> Tensor:
        assert self.noise_log_scale is not None
        logs = self.noise_log_scale.to(phi.dtype)
        error = targets.reshape(phi.shape[0], self.outputs).to(phi.dtype) - self._mean(phi)
        squares = error.square() + variance.clamp_min(MIN_VARIANCE)
        value = -0.5 * (squares * (-2 * logs).exp() + math.log(2 * math.pi)) - logs
        rows = value.sum(1)
        return rows if mask is None else rows.masked_fill(~mask.reshape(-1), 0.0)
