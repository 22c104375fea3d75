"""What the heads share: Gaussian rows, output noise, their divergences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.arguments import no_autocast
from .covariances import (
    COVARIANCES,
    Moments,
    diagonal_index,
    diagonal_variance,
    low_rank_variance,
    pack_tril,
    packed_product,
    triangular_variance,
)

INITS = ("vbll", "prior")
MIN_VARIANCE = 1e-12
_HALF = (torch.float16, torch.bfloat16)


class LastLayer(nn.Module):
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

    # The published initialisations differ in: standard deviation of the mean, spread and centre of
    # logdiag, standard deviation of off-diagonal entries, spread and centre of the log noise.
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
            where = diagonal_index(self.in_features, self.scale_tril.device)
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

        With the answer tokens' rows of a language model's head, the head starts with the model's
        predictions. Weights of variance s give logits the variance s ||phi||^2, and ||phi||^2 is of the
        order of D after a final norm: variance = 0.01 / D is a start near the point estimate.

        Args:
            weight: (C, D).
            bias: (C,); needs a head with a bias.
            variance: initial variance of each weight. A low-rank factor, which cannot leave zero,
                gets a hundredth of it on average, drawn at random.
            generator: of the factor's draw, on any device.

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
            where = diagonal_index(self.in_features, self.scale_tril.device)
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

    def _weight_variance(self, phi: Tensor) -> Moments:
        if self.scale_tril is not None:
            return triangular_variance(phi, self.scale_tril.to(phi.dtype))
        assert self.log_scale is not None
        log_scale = self.log_scale.to(phi.dtype)
        if self.factor is not None:
            return low_rank_variance(phi, self.factor.to(phi.dtype), log_scale)
        return diagonal_variance(phi, log_scale)

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
        logs: Tensor = self.noise_log_scale
        logs = logs.float() if logs.dtype in _HALF else logs
        dof = (self.wishart_dof + self.outputs + 1) / 2
        return -2 * dof * logs.sum() - 0.5 * self.wishart_scale * (-2 * logs).exp().sum()

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Multiply the deviations of the weights by a factor, in place: S_c becomes factor^2 S_c."""
        if self.scale_tril is not None:
            where = diagonal_index(self.in_features, self.scale_tril.device)
            logs = self.scale_tril.index_select(1, where)
            self.scale_tril.mul_(factor).index_copy_(1, where, logs + math.log(factor))
            return
        assert self.log_scale is not None
        self.log_scale.add_(math.log(factor))
        if self.factor is not None:
            self.factor.mul_(factor)

    @torch.no_grad()
    def covariance_matrix(self) -> Tensor:
        """The variational S_c as (C, D, D), for small heads and tests: C D^2 numbers."""
        if self.scale_tril is not None:
            return packed_product(self.scale_tril)
        assert self.log_scale is not None
        dense = torch.diag_embed((2 * self.log_scale).exp())
        return dense if self.factor is None else dense + self.factor.transpose(1, 2) @ self.factor


def _fill_normal(t: Tensor, generator: torch.Generator | None, std: float = 1.0) -> Tensor:
    """`t.normal_(0, std)` with a generator of any device, whose numbers do not depend on t's."""
    if generator is None or generator.device == t.device or t.is_meta:
        return t.normal_(0.0, std, generator=None if t.is_meta else generator)
    drawn = torch.empty(t.shape, dtype=t.dtype, device=generator.device)
    return t.copy_(drawn.normal_(0.0, std, generator=generator))


def mean_over(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean of what counts, 0 for none, without a synchronisation. Values are 0 where not counted."""
    if counted is None:
        return values.sum() / max(values.numel(), 1)
    return values.sum() / counted.sum().clamp_min(1)


def check_mask(op: str, mask: Tensor | None, features: Tensor) -> None:
    """Raise unless `mask` is None or has a bool for each row of `features`."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != features.shape[:-1]):
        raise ValueError(
            f"{op}: mask must be bool of shape {tuple(features.shape[:-1])}, got {mask.dtype} of "
            f"shape {tuple(mask.shape)}"
        )


def weight_of_divergence(op: str, n_train: float | Tensor, weight: float) -> float | Tensor:
    """weight / n_train; raises unless n_train is positive."""
    if not isinstance(n_train, Tensor) and not n_train > 0:
        raise ValueError(
            f"{op}: n_train must be the number of training examples, at least 1, got {n_train}"
        )
    return weight / n_train
