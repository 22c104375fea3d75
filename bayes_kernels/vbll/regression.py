"""Regression with a variational Bayesian last layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..functional.arguments import no_autocast
from .last_layer import MIN_VARIANCE, LastLayer, check_mask, mean_over, weight_of_divergence


class VBLLRegression(LastLayer):
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
        weight = weight_of_divergence(op, n_train, regularization_weight)
        phi = self._check_targets("loss", features, targets, mask)
        counted = None if mask is None else mask.reshape(-1)
        with no_autocast(phi):
            variance, trace, logdet = self._weight_variance(phi)
            value = self._log_likelihood(phi, variance, targets, mask)
            return self._regulariser(trace, logdet) * weight - mean_over(value, counted)

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
        check_mask(name, mask, features)
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
