"""Predictive distributions of Gaussian logits, and the logits of a last layer with Gaussian weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numpy.polynomial import hermite
from torch import Tensor

from .. import _library, reference
from .._library import MAX_FUSED_CLASSES, fake
from ..random import check_key
from .arguments import (
    ACTIVATIONS,
    accumulate_dtype,
    backward_of,
    check_choice,
    check_factor,
    check_integer,
    check_number,
    check_same_device,
    check_tensor,
    no_autocast,
    no_transform,
    transformed,
)

PREDICT_METHODS = ("mc", "quadrature", "probit", "bridge")
COVARIANCES = ("diagonal", "low_rank", "dense")


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
        return entropy_apart(self.entropy, self.expected_entropy)


def entropy_apart(entropy: Tensor, expected_entropy: Tensor | None) -> Tensor:
    """Mutual information of class and weights: entropy - expected_entropy.

    Raises:
        ValueError: there is no expected entropy.
    """
    if expected_entropy is None:
        raise ValueError(
            "mutual_information: method 'probit' gives no expected entropy; use 'mc' or 'bridge'"
        )
    return entropy - expected_entropy


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
        quadrature: C = 2 only, no sampling. Only d = z_1 - z_0 matters: the trapezoidal rule around
            the integrand's largest value up to a standard deviation of 8, above that an alternating
            series of scaled error functions. Probabilities have 12 right digits, however small, and
            entropies err by less than 1e-8, before rounding.
        probit: softmax(mean / sqrt(1 + pi/8 var)); cheap, keeps the ranking of classes only for equal
            variances; no expected entropy.
        bridge: Laplace bridge to a Dirichlet distribution, after the zero-sum correction.

    Args:
        mean: (B, C) mean logits, fp32 (bf16 and fp16 are converted; fp64 on the CPU). -inf removes a
            class.
        cov: (B, C) variances of independent logits, or (B, C, C) covariances, of which the lower
            triangle is read. Converted to the dtype of the computation. A covariance is factorised in
            fp64 inside the kernel; above C = 32 that kernel is a slower one, and on a GPU the
            definition in `bayes_kernels.reference` runs one example at a time with O(n_samples C)
            memory: same numbers.
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
    normals), and C^2 / 2 products per sample with a covariance; memory O(B C), with covariances C^2
    numbers for each thread, on a GPU with C > 32 also O(B n_samples). Same inputs, same bits for any
    number of threads and any split of the batch.

    Sources: Daxberger et al., "Laplace Redux", arXiv 2106.14806 (probit, bridge); Harrison et al.,
    "Variational Bayesian Last Layers", arXiv 2404.11599 (sampling of the last layer).
    """
    op = "mc_predict"
    no_transform(op)
    _check_predict(op, mean, cov)
    check_choice(op, "method", method, PREDICT_METHODS)
    if return_standard_error and method != "mc":
        raise ValueError(f"{op}: method must be 'mc' for a standard error, got {method!r}")
    with torch.no_grad(), no_autocast(mean):
        acc = accumulate_dtype(mean)
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
        check_same_device(op, "key", key, mean)
        for name, value in (("n_samples", n_samples), ("stream", stream), ("row0", row0)):
            check_integer(op, name, value)
        if n_samples < 1 or (antithetic and n_samples % 2):
            what = "even with antithetic" if antithetic else "at least 1"
            raise ValueError(f"{op}: n_samples must be {what}, got {n_samples}")
        if ids is not None:
            check_tensor(op, "ids", ids)
            if ids.shape != mean.shape[:1] or ids.dtype not in (torch.int64, torch.int32):
                raise ValueError(
                    f"{op}: ids must be int64 of shape ({mean.shape[0]},), got {ids.dtype} of shape "
                    f"{tuple(ids.shape)}"
                )
            check_same_device(op, "ids", ids, mean)
            ids = ids.to(torch.int64).contiguous()
        kernels = _library.has_kernels(mean)
        on_gpu = mean.device.type != "cpu"
        if not kernels or (cov.dim() == 3 and mean.shape[1] > MAX_FUSED_CLASSES and on_gpu):
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
    acc = accumulate_dtype(features)
    with no_autocast(features):
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
            form = _triangular_form if transformed() else _TriangularForm.apply
            var = form(phi, weight_scale.to(acc))  # type: ignore[union-attr]
        if noise_var is not None:
            var = var + (noise_var.to(acc) if isinstance(noise_var, Tensor) else noise_var)
    return mean, var


def _check_predict(op: str, mean: Tensor, cov: Tensor) -> None:
    check_tensor(op, "mean", mean)
    check_tensor(op, "cov", cov)
    if mean.dtype not in ACTIVATIONS or not cov.is_floating_point():
        raise TypeError(
            f"{op}: mean and cov must be float32, bfloat16, float16 or float64, got {mean.dtype} and "
            f"{cov.dtype}; convert them"
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
    check_same_device(op, "cov", cov, mean)


def _check_linear(
    op: str,
    features: Tensor,
    weight_mean: Tensor,
    weight_scale: Tensor | tuple[Tensor, Tensor],
    noise_var: Tensor | float | None,
    covariance: str,
) -> None:
    check_choice(op, "covariance", covariance, COVARIANCES)
    check_tensor(op, "features", features)
    check_tensor(op, "weight_mean", weight_mean)
    if features.dtype not in ACTIVATIONS:
        raise TypeError(
            f"{op}: features must be float32, bfloat16, float16 or float64, got {features.dtype}; "
            "convert them"
        )
    if features.dim() != 2 or weight_mean.dim() != 2 or weight_mean.shape[1] != features.shape[1]:
        raise ValueError(
            f"{op}: features and weight_mean must have shapes (B, D) and (C, D), got "
            f"{tuple(features.shape)} and {tuple(weight_mean.shape)}"
        )
    c, d = weight_mean.shape
    check_factor(op, "weight_mean", weight_mean, features)
    if noise_var is not None and not isinstance(noise_var, Tensor):
        check_number(op, "noise_var", noise_var)
    if isinstance(noise_var, Tensor):
        check_factor(op, "noise_var", noise_var, features)
        if tuple(noise_var.shape) not in ((c,), (1,), ()):
            raise ValueError(
                f"{op}: noise_var must be a number or of shape ({c},), got {tuple(noise_var.shape)}"
            )
    is_pair = isinstance(weight_scale, (tuple, list))
    if not is_pair:
        check_tensor(op, "weight_scale", weight_scale)
    if is_pair != (covariance == "low_rank") or (is_pair and len(weight_scale) != 2):
        raise ValueError(
            f"{op}: weight_scale must be a pair (V, variances) exactly with covariance='low_rank', got "
            f"{'a pair' if is_pair else 'a tensor'} with {covariance!r}"
        )
    if isinstance(weight_scale, Tensor):
        check_factor(op, "weight_scale", weight_scale, features)
        allowed = [(c, d)] if covariance == "diagonal" else [(c, d, d), (c, d * (d + 1) // 2)]
        if tuple(weight_scale.shape) not in allowed:
            raise ValueError(
                f"{op}: weight_scale must have shape {' or '.join(map(str, allowed))} with "
                f"covariance={covariance!r}, got {tuple(weight_scale.shape)}"
            )
        return
    factor, variances = weight_scale
    check_factor(op, "V", factor, features)
    check_factor(op, "the variances", variances, features)
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
    m, v = reference.wide(mean), reference.wide(cov)
    difference = m[:, 1] - m[:, 0]
    if cov.dim() == 2:
        variance = v.sum(1)
    else:
        variance = v[:, 0, 0] + v[:, 1, 1] - 2 * v[:, 1, 0]
    eps = torch.finfo(cov.dtype).eps
    # Rounding of a singular covariance may leave a difference just below zero.
    rounding = 8 * eps * _variances(v).abs().sum(1)
    variance = torch.where(variance.abs() <= rounding, variance.clamp_min(0.0), variance)
    # Of the less probable class, whose logarithm gives the other's.
    log_small = _log_mean_sigmoid(-difference.abs(), variance)
    log_large = (-log_small.exp()).log1p()
    first = torch.where(difference < 0, log_large, log_small)  # class 0: of the negated logit
    second = torch.where(difference < 0, log_small, log_large)
    log_probs = torch.stack([first, second], 1).to(mean)
    expected = _mean_coin_entropy(difference, variance).to(mean)
    return McPrediction(log_probs, _entropy(log_probs), expected)


# Standard deviation up to which a grid over the logits follows both the Gaussian and the sigmoid.
_GRID_STD = 8.0


def _log_mean_sigmoid(d: Tensor, variance: Tensor) -> Tensor:
    """log E sigmoid(z), z ~ N(d, variance), for d <= 0 (B,) fp64: to 1e-13 beside d's own rounding."""
    std = variance.sqrt()
    # The integrand's largest value is at z = d + variance sigmoid(-z): bisected to 0.06 deviations.
    low, high = torch.zeros_like(d), torch.ones_like(d)
    for _ in range(8):
        middle = (low + high) / 2
        below = torch.sigmoid(-(d + variance * middle)) > middle
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    # It falls at least as fast as the Gaussian on both sides, and has no pole within pi of the real
    # line: the trapezoidal rule with steps of a sixteenth of a deviation, out to nine deviations.
    step = 1 / 16
    t = (std * (low + high) / 2)[:, None] + step * torch.arange(-144, 145, device=d.device)
    grid = torch.logsumexp(F.logsigmoid(d[:, None] + std[:, None] * t) - t.square() / 2, 1)
    grid = grid + math.log(step / math.sqrt(2 * math.pi))
    # Beyond: sigmoid as a series of exponentials on each side of zero. With x = -d / std and
    # c(u) = erfcx(u / sqrt 2), E sigmoid = exp(-x^2 / 2) / 2 times
    #     c(x) + sum over k >= 1 of (-1)^(k + 1) (c(k std - x) - c(k std + x)),
    # whose first term c(std - x) leads where -d > variance: it is kept apart, as a logarithm.
    wide = std.clamp_min(_GRID_STD)
    x = -d / wide
    signs = torch.tensor(_ALTERNATING, dtype=d.dtype).to(d.device, non_blocking=d.is_cuda)
    k = torch.arange(1, len(_ALTERNATING) + 1, device=d.device)
    # Where k std < x for a k > 1 all of it is below exp(-std^2 / 2) of the first term.
    above = _erfcx(((k + 1) * wide[:, None] - x[:, None]).clamp_min(0.0))
    rest = _erfcx(x) - (signs * (above + _erfcx(k * wide[:, None] + x[:, None]))).sum(1)
    lead = x - wide
    near = (0.5 * (_erfcx((-lead).clamp_min(0.0)) + rest)).log() - x.square() / 2
    far = d + variance / 2 + torch.special.log_ndtr(lead)
    far = far + (rest * (-lead.square() / 2 - torch.special.log_ndtr(lead)).exp() / 2).log1p()
    return torch.where(std <= _GRID_STD, grid, torch.where(lead > 0, far, near))


def _erfcx(u: Tensor) -> Tensor:
    return torch.special.erfcx(u / math.sqrt(2))


def _alternating_weights(n: int) -> list[float]:
    """Weights of the first terms for the sum of (-1)^k a_k over k >= 0, a_k totally monotone, to 5.8^-n.

    Cohen, Rodriguez Villegas, Zagier, "Convergence acceleration of alternating series", 2000.
    """
    d = ((3 + math.sqrt(8)) ** n + (3 - math.sqrt(8)) ** n) / 2
    b, c, weights = -1.0, -d, []
    for k in range(n):
        c = b - c
        weights.append(c / d)
        b *= (k + n) * (k - n) / ((k + 0.5) * (k + 1))
    return weights


_ALTERNATING = _alternating_weights(22)  # with their signs


def _mean_coin_entropy(d: Tensor, variance: Tensor) -> Tensor:
    """E of the entropy of a coin with logit z ~ N(d, variance), to 1e-8."""
    std = variance.sqrt()
    points, shares = (torch.from_numpy(values) for values in hermite.hermgauss(20))
    # CUDA need not have finished its work for small copies.
    points, shares = (t.to(d.device, non_blocking=d.is_cuda) for t in (points, shares))

    def entropy(z: Tensor) -> Tensor:
        magnitude = z.abs()
        e = (-magnitude).exp()
        return e.log1p() + torch.where(e > 0, magnitude * e / (1 + e), 0.0)

    z = d[:, None] + math.sqrt(2) * std[:, None] * points
    narrow = (shares / math.sqrt(math.pi) * entropy(z)).sum(1)
    # For wide distributions the Gaussian is the smooth factor.
    step = 0.5
    u = torch.arange(-80, 81, device=d.device).double() * step
    wide_std = std.clamp_min(1.0)[:, None]
    gaussian = (-0.5 * ((u - d[:, None]) / wide_std).square()).exp()
    wide = (entropy(u) * gaussian / wide_std).sum(1) * step / math.sqrt(2 * math.pi)
    return torch.where(variance > 1.0, wide, narrow)


def _probit(mean: Tensor, cov: Tensor) -> McPrediction:
    log_probs = torch.log_softmax(mean * (1 + math.pi / 8 * _variances(cov)).rsqrt(), dim=-1)
    return McPrediction(log_probs, _entropy(log_probs), None)


def _bridge(op: str, mean: Tensor, cov: Tensor) -> McPrediction:
    c = mean.shape[1]
    if c < 2:
        raise ValueError(f"{op}: method 'bridge' needs at least 2 classes, got C = {c}; use 'mc'")
    m, variance = reference.wide(mean), reference.wide(_variances(cov))
    rows = variance if cov.dim() == 2 else reference.wide(cov).sum(-1)  # cov 1
    total = rows.sum(-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    share = rows / total.clamp_min(tiny)
    m = m - share * m.sum(-1, keepdim=True)
    variance = (variance - share * rows).clamp_min(tiny)
    growth = torch.logaddexp(
        m.new_full((), 1 - 2 / c).log(),
        m + torch.logsumexp(-m, dim=-1, keepdim=True) - 2 * math.log(c),
    )
    log_alpha = growth - variance.log()
    log_sum = torch.logsumexp(log_alpha, dim=-1, keepdim=True)
    log_probs = (log_alpha - log_sum).to(mean)
    # Mean entropy of the Dirichlet distribution; beyond 1e12 its samples are their mean.
    alpha, alpha_sum = log_alpha.exp().clamp_max(1e12), log_sum.exp().clamp_max(1e12)
    p = (log_alpha - log_sum).exp()
    spread = torch.digamma(alpha_sum + 1) - torch.digamma(alpha + 1)
    expected = (p * spread).sum(-1).to(mean)
    return McPrediction(log_probs, _entropy(log_probs), expected)


def _triangular_form(phi: Tensor, lower: Tensor) -> Tensor:
    forms = [(phi @ _triangle(t, phi)).square().sum(1) for t in lower.unbind(0)]
    return torch.stack(forms, 1) if forms else phi.new_empty(phi.shape[0], 0)


class _TriangularForm(torch.autograd.Function):
    """|L_c^T phi_b|^2 for every example and class, one class at a time in both directions."""

    @staticmethod
    def forward(ctx: Any, phi: Tensor, lower: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(phi, lower)
        return _triangular_form(phi, lower)

    @staticmethod
    @backward_of(_triangular_form, 2)
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


# --- fake kernels: shapes and dtypes of the ops' results ---------------------------------------------


@fake("mc_predict")
def _(
    mean: Tensor,
    cov: Tensor,
    key: Tensor,
    stream: int,
    row0: int,
    ids: Tensor | None,
    n_samples: int,
    antithetic: bool,
    standard_error: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = mean.shape[0]
    return (
        mean.new_empty(mean.shape),
        mean.new_empty((rows,)),
        mean.new_empty((rows,)),
        mean.new_empty(mean.shape if standard_error else (0, 0)),
    )
