"""ScalaBL: a posterior over the r singular values of each adapter.

    W = W0 + scaling B diag(s) V^T,  s ~ N(exp(log_s), diag(exp(log_s_sigma))^2)

V^T = `lora_A.weight` has orthonormal rows at the start: it is the right factor of the thin SVD of
the A that plain LoRA would draw, whose singular values are where exp(log_s) starts; the left factor
goes into B. All of them are trained, V^T without a constraint. Source: "ScalaBL", arXiv 2506.21408.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import functional, random
from ...optim import KLSchedule
from ..config import VariationalConfig, option
from ..initial import inverse_softplus, normal_like, uniform_like
from ..method import PAPERS, Method
from ..variants import BayesVariant, Divergence, KLPlan, KLStep

if TYPE_CHECKING:
    from ..noise import NoiseState
    from ..variants import BayesLayer

LOG_S, LOG_SIGMA = "lora_log_s", "lora_log_s_sigma"
EIGENVALUES, EIGENVECTORS = "lora_s_eigenvalues", "lora_s_eigenvectors"

# Deviation over mean of the singular values that "auto" aims at; docs/scalabl.md has the figures.
AUTO_RATIO = 0.5
# Added to each variance of the full covariance, as in the published code.
_JITTER = 1e-8
# Below this step size nothing is computed: gradients are below 2^24 for deviations above 1e-4, so
# that no parameter would change by more than 2^-40.
_SMALLEST_STEP = 2.0**-64


@dataclass
class ScalablConfig(VariationalConfig, method="scalabl"):
    """Configuration of a ScalaBL adapter: a Gaussian over the r singular values of each layer.

    The published setting is r=8, lora_alpha=16, target_modules q_proj, v_proj and lm_head,
    kl_schedule="published", kl_direction="code" with the reverse divergence of the code.
    kl_schedule="auto" ("elbo" only) follows the gradient flow of the divergence until the deviation
    of the singular values is a fixed share of their mean: `AUTO_RATIO`.

    Source: "ScalaBL", arXiv 2506.21408.
    """

    prior_std: float = option(
        1.0, "Deviation sigma_p of the prior N(0, sigma_p^2) on each singular value.", above=0
    )
    scope: str = option(
        "none",
        "Rows that share a draw in training: 'none' (all of the batch, as published) or 'example'.",
        choices=("none", "example"),
    )
    kl_lr: float = option(
        0.2,
        "Learning rate of the KL step for 'published' and 'constant'.",
        least=0,
        needs={"kl_schedule": ("published", "constant")},
    )
    kl_direction: str = option(
        "elbo",
        "'elbo': divergence of the posterior from the prior; 'code': as the published code, which has "
        "the reverse with the diagonal covariance, and wide random starts with the full one.",
        choices=("elbo", "code"),
    )
    covariance: str = option(
        "diagonal",
        "'diagonal', or 'full' between the singular values of a layer.",
        choices=("diagonal", "full"),
    )

    @property
    def divergence_direction(self) -> str:
        """'code' where the divergence is the reverse one: of the published classes the diagonal one alone."""
        return self.kl_direction if self.covariance == "diagonal" else "elbo"


class ScalablVariant(BayesVariant, method="scalabl"):
    """ScalaBL in one LoRA layer: 2 r numbers beside the factors, r^2 more with covariance "full"."""

    parameters = (LOG_S, LOG_SIGMA, EIGENVALUES, EIGENVECTORS)
    fp32 = parameters

    def __init__(self, config: ScalablConfig, name: str, in_features: int, state: NoiseState):
        super().__init__(config, name, in_features, state)
        self.scope, self.prior_std = config.scope, config.prior_std

    @classmethod
    def tensors(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """With the diagonal or the full covariance."""
        if config.get("covariance") == "full":
            return LOG_S, EIGENVALUES, EIGENVECTORS
        return LOG_S, LOG_SIGMA

    def initial(self, module: Any, adapter: str) -> dict[str, Tensor]:
        """Singular values of A; A becomes V^T and B takes the left factor, so that B A stays."""
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        for factor in (a, b):
            # PEFT gives new factors the type of the base, whose rounding would undo V^T V = I.
            if factor.dtype in (torch.bfloat16, torch.float16):
                factor.data = factor.data.float()
        rank, columns = a.shape
        if rank > columns:
            raise ValueError(
                f"ScalablConfig: r must be at most the layer's input features, got {rank} and "
                f"{columns} in {self.name}; lower r or set rank_pattern"
            )
        s = torch.empty(rank, dtype=torch.float32, device=a.device)
        if not a.is_meta:
            with torch.no_grad():
                left, s, right = thin_svd(a)
                a.copy_(right)
                b.copy_(b.double() @ left)
                s = s.clamp(min=1e-6 * max(float(s.max()), 1e-30)).float()
                if self.config.init_lora_weights == "eva":
                    s.fill_(1.0)  # EVA puts directions of length 1 where A is
        eps = self.config.init_rho
        sigma = uniform_like(a, (rank,), eps / math.sqrt(2), eps, self.stream)
        if self.config.covariance == "diagonal":
            return {LOG_S: s.log(), LOG_SIGMA: sigma.log()}
        if self.config.kl_direction == "code":  # published: softplus(N(0, 1)) as variances, any Q
            return {
                LOG_S: s.log(),
                EIGENVALUES: normal_like(a, (rank,), self.stream),
                EIGENVECTORS: normal_like(a, (rank, rank), self.stream + 1),
            }
        variance = sigma.double().square()
        return {
            LOG_S: s.log(),
            EIGENVALUES: inverse_softplus(variance).float(),
            EIGENVECTORS: torch.eye(rank, dtype=torch.float32, device=a.device),
        }

    def adapted(
        self, module: Any, adapter: str, x: Tensor, result: Tensor, mode: str, dropout: float
    ) -> Tensor:
        """result + scaling * ((dropout(x) V) . s) B^T, with s its mean or drawn."""
        d, groups = self._mean(module, adapter), None
        if mode == "sample":
            chosen, key = self.state.current(), self.state.key_on(x.device)
            ids = chosen.draws_on(x.device).ids
            noise = self._draws(module, adapter, key, ids, chosen.kind == "antithetic")
            d = d + (noise[0] if len(ids) == 1 else self.by_row(noise, x))
        elif mode == "flipout":
            count = x.shape[0] if self.scope == "example" and x.dim() > 1 else 1
            noise = self._noise(module, adapter, self.state.key_on(x.device), count)
            d = d + (noise[0] if count == 1 else noise)
        if d.dim() == 2:
            # One row for each token, so that the backward pass is a sum in fixed order; gathering
            # shared rows would add with atomics on a GPU.
            rows = math.prod(x.shape[:-1])
            d = d[:, None].expand(-1, rows // max(len(d), 1), -1).flatten(0, 1)
            groups = torch.arange(rows, device=x.device).reshape(x.shape[:-1])
        x = self.dropped(x, dropout)
        return functional.scaled_lora(
            x,
            module.lora_A[adapter].weight,
            d,
            module.lora_B[adapter].weight,
            result,
            scaling=module.scaling[adapter],
            groups=groups,
            kept=self.kept(x),
        )

    def mean_factors(self, module: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """diag(exp(log_s)) V^T, and B."""
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        return self._mean(module, adapter)[:, None] * a, b

    def draw_factors(
        self, module: Any, adapter: str, key: Tensor, number: int
    ) -> tuple[Tensor, Tensor]:
        """diag(s) V^T with s of draw `number`, and B."""
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        ids = torch.tensor([number], device=key.device)
        s = self._mean(module, adapter) + self._draws(module, adapter, key, ids, True)[0]
        return s[:, None] * a, b

    def deviations(self, module: Any, adapter: str) -> list[Tensor]:
        """Logarithms of the deviations, or the eigenvalues of the covariance."""
        name = LOG_SIGMA if self.config.covariance == "diagonal" else EIGENVALUES
        return [getattr(module, name)[adapter]]

    def rescale_(self, module: Any, adapter: str, factor: float) -> None:
        """Deviations of the singular values times the factor."""
        (spread,) = self.deviations(module, adapter)
        if self.config.covariance == "diagonal":
            spread.add_(math.log(factor))
        else:
            variance = nn.functional.softplus(spread.double()) * factor**2
            spread.copy_(inverse_softplus(variance))

    def divergence(self, module: Any, adapter: str) -> Divergence | Tensor | None:
        """That of N(mean, covariance) from N(0, sigma_p^2 I), or its reverse ("code", diagonal)."""
        mean = self._mean(module, adapter)
        if self.config.covariance == "diagonal":
            sigma = module.lora_log_s_sigma[adapter].exp()
        else:  # it depends on the eigenvalues alone
            sigma = _deviations(module.lora_s_eigenvalues[adapter])
        direction = self.config.divergence_direction
        return Divergence(mean, sigma, self.prior_std, "direct", direction)

    @classmethod
    def kl_starts(cls, layers: Sequence[BayesLayer]) -> list[float]:
        """The flow time of each layer, or -1 where the configuration's `kl_time` is to be used."""
        if layers[0].variant.config.kl_time is not None:
            return [-1.0] * len(layers)

        def typical(parameter: Tensor) -> Tensor:
            value: Any = parameter.double().square().mean()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            return value.sqrt().cpu()

        with torch.no_grad():
            table = torch.stack([torch.stack([*map(typical, _moments(item))]) for item in layers])
        found = []
        for item, (mean, sigma) in zip(layers, table.tolist(), strict=True):
            found.append(ratio_time(AUTO_RATIO, mean, sigma, item.variant.prior_std))
        return found

    @classmethod
    def kl_step(cls, layers: Sequence[BayesLayer], plan: KLPlan) -> KLStep | None:
        """Gradient steps or exact gradient flow on log_s and log_s_sigma of all layers."""
        config = layers[0].variant.config
        scales = [plan.weight] * len(layers)
        if plan.schedule.kind == "auto":
            if config.kl_direction != "elbo":
                raise ValueError(
                    "decoupled_kl: kl_schedule='auto' is for kl_direction='elbo', got "
                    f"{config.kl_direction!r}; set kl_schedule='published'"
                )
            if not plan.given:
                times = [start if start >= 0 else config.kl_time for start in plan.starts]
                scales = [plan.weight * float(time or 0.0) for time in times]
        return ScaleKL(layers, plan.schedule, scales)

    def _mean(self, module: Any, adapter: str) -> Tensor:
        return module.lora_log_s[adapter].exp()

    def _noise(self, module: Any, adapter: str, key: Tensor, count: int) -> Tensor:
        """(count, r) deviations from the mean, for the rows of a training batch."""
        rank = module.lora_log_s[adapter].shape[0]
        return self._spread(module, adapter, random.normal(key, (count, rank), stream=self.stream))

    def _draws(
        self, module: Any, adapter: str, key: Tensor, numbers: Tensor, antithetic: bool
    ) -> Tensor:
        """(D, r) deviations from the mean of the draws of these numbers."""
        unit = torch.ones_like(module.lora_log_s[adapter].detach())[None]
        normal = functional.gaussian_draws(
            torch.zeros_like(unit),
            unit,
            numbers,
            key=key,
            stream=self.stream,
            std="direct",
            antithetic=antithetic,
        )
        return self._spread(module, adapter, normal[:, 0])

    def _spread(self, module: Any, adapter: str, normal: Tensor) -> Tensor:
        """Standard normals (..., r) with the posterior's covariance."""
        if self.config.covariance == "diagonal":
            return normal * module.lora_log_s_sigma[adapter].exp()
        sigma, vectors = self._spectrum(module, adapter)
        return (normal * sigma) @ vectors.T

    def _spectrum(self, module: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """Roots of the eigenvalues (r,) and eigenvectors (r, r) of the full covariance."""
        values = module.lora_s_eigenvalues[adapter]
        vectors, upper = torch.linalg.qr(module.lora_s_eigenvectors[adapter])
        # Which signs a factorisation gives differs between devices, and draws depend on them.
        vectors = vectors * torch.where(upper.diagonal() < 0, -1.0, 1.0)
        return _deviations(values), vectors


class ScaleKL:
    """The decoupled KL step on the singular values of a list of ScalaBL layers.

    "published" and "constant" take gradient steps on log_s and log_s_sigma (or on the eigenvalues),
    as the published code's second optimiser does; "auto" follows the gradient
    flow of the divergence exactly:

        sigma^2(t) = p^2 / (1 + (p^2 / sigma^2(0) - 1) e^(-2 t))
        s^2(t) = s^2(0) / (1 + 2 t s^2(0) / p^2)

    (for the full covariance, sigma are the square roots of its eigenvalues). All layers are one vector: about
    forty launches a step, in fp64, rounded once.

    Args:
        layers: of one configuration.
        schedule: step sizes.
        scales: factor of the step size for each layer.
    """

    def __init__(
        self, layers: Sequence[BayesLayer], schedule: KLSchedule, scales: Sequence[float]
    ) -> None:
        self.layers, self.schedule, self.scales = list(layers), schedule, list(scales)
        config = layers[0].variant.config
        self.full, self.direction = config.covariance == "full", config.divergence_direction
        self.step_count = self.skipped = 0
        second = EIGENVALUES if self.full else LOG_SIGMA
        self._log_s = [_here(item.tensor(LOG_S)) for item in layers]
        self._spread = [_here(item.tensor(second)) for item in layers]
        self._prior = self._by_element([item.variant.prior_std for item in layers])
        self._scale = self._by_element(self.scales)

    def _by_element(self, values: Sequence[float]) -> Tensor:
        """One number for each layer as one for each of its singular values, fp64."""
        sizes = [p.numel() for p in self._log_s]
        found = [value for value, n in zip(values, sizes, strict=True) for _ in range(n)]
        return torch.tensor(found, dtype=torch.float64, device=self._log_s[0].device)

    def step(self, lr_factor: float = 1.0, step: int | None = None) -> float:
        """Take the step of the schedule.

        Args:
            lr_factor: learning rate of the main optimiser over its peak.
            step: number of the step, from 0; None counts by itself.

        Returns:
            The step size, before the layers' scales.
        """
        number = self.step_count if step is None else step
        self.step_count = number + 1
        size = self.schedule.step_size(number, lr_factor)
        if size * max(self.scales) < _SMALLEST_STEP:
            self.skipped += 1
        elif self.schedule.kind == "auto":
            self._flow(size)
        else:
            self._gradient_step(size)
        return size

    @torch.no_grad()
    def _flow(self, time: float) -> None:
        t, p2 = time * self._scale, self._prior.square()
        log_s, spread = _flat(self._log_s), _flat(self._spread)
        u = nn.functional.softplus(spread) if self.full else (2 * spread).exp()
        u = p2 / (1 + (p2 / u - 1) * (-2 * t).exp())
        _write(self._spread, inverse_softplus(u) if self.full else u.log() / 2)
        _write(self._log_s, log_s - torch.log1p(2 * t * (2 * log_s).exp() / p2) / 2)

    def _gradient_step(self, size: float) -> None:
        groups = [self._log_s, self._spread]
        flat = [_flat(group).requires_grad_() for group in groups]
        with torch.enable_grad():
            mean = flat[0].exp()
            sigma = _deviations(flat[1]) if self.full else flat[1].exp()
            p = self._prior
            if self.direction == "elbo":
                terms = (p / sigma).log() + (sigma**2 + mean**2) / (2 * p**2)
            else:
                terms = (sigma / p).log() + (p**2 + mean**2) / (2 * sigma**2)
            gradients = torch.autograd.grad((terms * self._scale).sum(), flat)
        with torch.no_grad():
            for group, value, gradient in zip(groups, flat, gradients, strict=True):
                _write(group, value - size * gradient)


def _here(parameter: Any) -> Tensor:
    """What this process holds of a parameter: all, or its shard of FSDP2. The step is elementwise."""
    return parameter.to_local().detach() if hasattr(parameter, "to_local") else parameter


def ratio_time(ratio: float, mean: float, sigma: float, prior_std: float = 1.0) -> float:
    """Time in which the flow of `ScaleKL` brings sigma / s of a layer to a ratio; 0 if it is there.

    Args:
        ratio: sigma / s to reach.
        mean, sigma: s and sigma at the beginning, positive.
        prior_std: sigma_p.

    Raises:
        ValueError: a number is not positive.
    """
    if min(ratio, mean, sigma, prior_std) <= 0:
        raise ValueError(
            "ratio_time: ratio, mean, sigma and prior_std must be positive, got "
            f"{ratio}, {mean}, {sigma}, {prior_std}"
        )
    p2 = prior_std**2

    def log_ratio(t: float) -> float:
        u = p2 / (1 + (p2 / sigma**2 - 1) * math.exp(-2 * t))
        return 0.5 * math.log(u / mean**2 * (1 + 2 * t * mean**2 / p2)) - math.log(ratio)

    if log_ratio(0.0) >= 0:
        return 0.0
    high = 1.0
    while log_ratio(high) < 0:  # s falls like t^(-1/2) for ever: every ratio is reached
        high *= 2
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if log_ratio(middle) < 0 else (low, middle)
    return high


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (r, r), s (r,), V^T (r, n) of a wide matrix (r, n), in fp64.

    QR of the transpose, then the SVD of an r x r matrix: O(n r^2).
    """
    q, r = torch.linalg.qr(matrix.detach().double().T)
    left, s, right = torch.linalg.svd(r.T)
    return left, s, right @ q.T


def _moments(item: BayesLayer) -> tuple[Tensor, Tensor]:
    """Means and deviations of a layer's singular values, (r,) each."""
    mean = item.tensor(LOG_S).exp()
    if item.variant.config.covariance == "diagonal":
        return mean, item.tensor(LOG_SIGMA).exp()
    return mean, _deviations(item.tensor(EIGENVALUES))


def _deviations(eigenvalues: Tensor) -> Tensor:
    """Roots of the eigenvalues of the full covariance."""
    return (nn.functional.softplus(eigenvalues) + _JITTER).sqrt()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    device = tensors[0].device
    return torch.cat([t.detach().reshape(-1).double().to(device) for t in tensors])


def _write(tensors: Sequence[Tensor], flat: Tensor) -> None:
    parts = flat.split([t.numel() for t in tensors])
    with torch.no_grad():
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _prior(config: Mapping[str, Any]) -> str:
    """The prior in words."""
    return f"N(0, {config.get('prior_std')}^2) on each singular value"


# The code's setting in distribution; its runs out of distribution have kl_lr 0.1.
PUBLISHED = {
    **PAPERS,
    "options": {"kl_schedule": "published", "kl_lr": 0.2, "kl_direction": "code"},
}

METHOD = Method("scalabl", "ScalaBL", ScalablConfig, prior=_prior, published=PUBLISHED)
