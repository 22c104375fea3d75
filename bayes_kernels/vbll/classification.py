"""Classification with a variational Bayesian last layer, and its Laplace refinement."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..functional.arguments import no_autocast
from .bounds import bound_of, check_bound, counted_labels
from .covariances import pack_tril, triangular_variance
from .last_layer import LastLayer, check_mask, mean_over, weight_of_divergence

Batch = Tensor | tuple[Tensor, Tensor]  # features, or (features, probs)

_LAPLACE_BUFFERS = ("laplace_tril", "laplace_basis", "laplace_variance")


@dataclass(frozen=True)
class LaplaceReport:
    """Result of `VBLLClassification.laplace_refine`.

    Attributes:
        method: "cholesky" (D x D Hessians) or "subspace" (their N x N form).
        n_examples: training examples seen.
        rank: size of the factorised matrices: D, or min(N, D) for "subspace".
        prior_variance: q.
        elbo_applies: always False. The mean was trained with other covariances, so bound - KL is no
            evidence lower bound of this posterior: report scores before and after.
    """

    method: str
    n_examples: int
    rank: int
    prior_variance: float
    elbo_applies: bool = False


class VBLLClassification(LastLayer):
    """Discriminative classification with a variational Bayesian last layer.

    p(y | phi, w) = softmax(z)_y with the logits z of the package's docstring.

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
        generator: of the initial parameters, on any device; its numbers do not depend on `device`.
        device: of the parameters.
        dtype: float32 or float64.

    Attributes:
        weight_mean: (C, D).
        log_scale, factor, scale_tril: as in the package's docstring; None where not used.
        noise_log_scale: (C,) or None.
        bias: (C,) or None.

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
                variance, trace, logdet = triangular_variance(phi, packed)
            else:
                basis = self.laplace_basis.to(phi.dtype)
                inside = phi @ basis.T
                outside = (phi - inside @ basis).square().sum(1, keepdim=True)
                variance, trace, logdet = triangular_variance(inside, packed)
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
        op = f"{type(self).__name__}.bound"
        rows, targets, counted = self._targets("bound", features, labels, mask)
        check_bound(op, bound, n_samples, antithetic, key)
        with no_autocast(rows):
            mean, variance, _, _ = self._moments(rows)
            value = bound_of(bound, mean, variance, targets, counted, n_samples, antithetic, key)
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
        op = f"{type(self).__name__}.loss"
        self._require_variational("loss")
        weight = weight_of_divergence(op, n_train, regularization_weight)
        rows, targets, counted = self._targets("loss", features, labels, mask)
        check_bound(op, bound, n_samples, antithetic, key)
        with no_autocast(rows):
            mean, variance, trace, logdet = self._moments(rows)
            value = bound_of(bound, mean, variance, targets, counted, n_samples, antithetic, key)
            return self._regulariser(trace, logdet) * weight - mean_over(value, counted)

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
        method: str = "mc",
        antithetic: bool = False,
        return_standard_error: bool = False,
        stream: int = 0,
        row0: int = 0,
        ids: Tensor | None = None,
    ) -> functional.McPrediction:
        """Predictive distribution: the mean of softmax(z) over samples of the logits.

        Only logits are sampled, never weights: C normals a sample and example, so that a thousand
        samples cost little beside the features.

        Args:
            features: (..., D), any float dtype; leading dimensions are flattened to B.
            n_samples: samples of the logits.
            key: noise key (`random.key`); needed for method "mc", the default.
            method, antithetic, return_standard_error, stream, row0, ids: as in
                `functional.mc_predict`.

        Returns:
            The result of `functional.mc_predict`: log_probs (B, C), entropy (B,), expected_entropy
            (B,), mutual_information (B,).

        Raises:
            ValueError, TypeError: features, key or options do not fit.
        """
        mean, variance = self.logit_distribution(features)
        shape = (math.prod(features.shape[:-1]), self.outputs)
        return functional.mc_predict(
            mean.reshape(shape),
            variance.reshape(shape),
            n_samples=n_samples,
            key=key,
            method=method,
            antithetic=antithetic,
            return_standard_error=return_standard_error,
            stream=stream,
            row0=row0,
            ids=ids,
        )

    def _targets(
        self, op: str, features: Tensor, labels: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of features, and labels as `counted_labels` gives them."""
        name = f"{type(self).__name__}.{op}"
        rows = self._rows(op, features)
        if labels.dtype != torch.int64:
            raise TypeError(f"{name}: labels must be int64, got {labels.dtype}; convert them")
        if labels.shape != features.shape[:-1] or labels.device != features.device:
            raise ValueError(
                f"{name}: labels must have shape {tuple(features.shape[:-1])} on "
                f"{features.device}, got {tuple(labels.shape)} on {labels.device}"
            )
        check_mask(name, mask, features)
        flat = None if mask is None else mask.reshape(-1)
        targets = counted_labels(name, labels.reshape(-1), self.outputs, self.ignore_index, flat)
        return rows, *targets

    # --- Laplace refinement ---

    @property
    def refined(self) -> bool:
        """Whether `laplace_refine` has replaced the covariances."""
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
        features: Tensor | Iterable[Batch],
        probs: Tensor | None = None,
        *,
        prior_variance: float | None = None,
        method: str = "auto",
        dtype: torch.dtype = torch.float64,
    ) -> LaplaceReport:
        """Replace the covariances by the exact Laplace ones of the last layer, class by class.

            Sigma_c = H_c^-1,   H_c = sum_i p_ic (1 - p_ic) phi_i phi_i' + I / q

        Means, noise and the variational parameters stay (`discard_refinement` returns to them). No ELBO
        describes the new posterior: `loss` and `kl` raise.

        "cholesky", for N >= D: H_c is added up over the batches, and the packed triangle of its
        inverse is kept: O(N D^2 + D^3) time and 8 D^2 bytes for a class (a tensor of features), or
        all classes at once (batches).

        "subspace", for N < D: outside the span of the features Sigma_c is q I. With an orthonormal
        basis Q (N, D) of that span and coordinates M = Phi Q', Sigma_c = q (I - Q'Q) + Q' (I / q +
        M' W_c M)^-1 Q: O(N^2 D + C N^3) time, and Q with one packed N x N triangle a class is kept.
        It equals Woodbury's form q I - q^2 Phi' W^1/2 (I + q W^1/2 Phi Phi' W^1/2)^-1 W^1/2 Phi, but
        it adds squares instead of subtracting them, and stores half as much. Weights may be 0.

        Args:
            features: (N, D), or batches of it: (b, D) tensors or pairs (features, probs).
            probs: (N, C) class probabilities; None for softmax of the mean logits.
            prior_variance: q; None for the head's.
            method: "auto" ("subspace" for N < D), "cholesky" or "subspace".
            dtype: dtype of the factorisations.

        Returns:
            Method, number of examples, rank and q.

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
