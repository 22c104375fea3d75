"""The scale of a posterior: whether its draws do harm, and a factor that held-out examples choose.

A posterior that is too wide makes predictions worse than those of its own mean, and nothing in its training
says so. Held-out examples do: `compare_draws` compares the mean with the draws on the same examples, and
`fit_scale_` multiplies all deviations by the factor of least NLL, as Laplace's prior precision is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import metrics
from ..batches import as_batches, is_empty, need_whole, split
from .draws import WeightDraws
from .layers import active_layers
from .logits import Prediction
from .predict import predict_dataset, predictor_of
from .variants import BayesLayer

_GRID = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
# Factors go on from the least of the grid down to this one, at which every posterior is its mean.
_LEAST = 1 / 1024
# Nats that draws may raise the NLL by: of posteriors that change nothing, any difference is beyond chance.
_NO_HARM = 1e-3


@dataclass(frozen=True)
class DrawsReport:
    """Mean and draws of a posterior on the same examples.

    Attributes:
        examples: number of examples.
        n_samples: draws of a prediction.
        mean_nll: NLL of the posterior mean, nats.
        nll: NLL of the mean prediction of the draws.
        low, high: 95 % interval of nll - mean_nll over other examples, by the paired bootstrap.
    """

    examples: int
    n_samples: int
    mean_nll: float
    nll: float
    low: float
    high: float

    @property
    def harmful(self) -> bool:
        """Whether the draws raise the NLL by more than chance, and by more than 0.001."""
        return self.low > 0 and self.nll - self.mean_nll > _NO_HARM

    def __str__(self) -> str:
        if max(abs(self.low), abs(self.high), abs(self.nll - self.mean_nll)) < _NO_HARM / 2:
            return (
                f"{self.n_samples} draws leave the NLL of {self.examples} examples at "
                f"{self.mean_nll:.3f}, that of the posterior mean"
            )
        change = "raise" if self.nll > self.mean_nll else "lower"
        return (
            f"{self.n_samples} draws {change} the NLL of {self.examples} examples from "
            f"{self.mean_nll:.3f} (posterior mean) to {self.nll:.3f}, difference "
            f"{self.nll - self.mean_nll:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        )


@dataclass(frozen=True)
class ScaleReport:
    """What `fit_scale_` found.

    Attributes:
        factor: what the deviations were multiplied by; 1 where they were left as they are.
        before: mean and draws before.
        nll: NLL of the draws afterwards.
        trials: factor and NLL of all evaluations, in their order.
    """

    factor: float
    before: DrawsReport
    nll: float
    trials: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        if self.factor == 1:
            return f"{self.before}; deviations left as they are"
        end = ", and draws all but the mean" if self.factor < _GRID[-1] / 4 else ""
        return f"{self.before}; deviations times {self.factor:.3g}: NLL {self.nll:.3f}{end}"


def compare_draws(
    model: nn.Module,
    data: Iterable[Any] | Dataset[Any],
    *,
    n_samples: int = 10,
    seed: int = 0,
    draws: str = "antithetic",
    scope: str = "example",
    choices: Sequence[int] | None = None,
    batch_size: int = 16,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    progress: bool = True,
) -> DrawsReport:
    """Compare the draws of a posterior with its mean on held-out examples.

    Args:
        model: a model whose adapter has draws.
        data: examples with class labels that were not trained on, as `predict_dataset` takes them.
        n_samples: draws of a prediction, at least 1.
        seed: seed of the draws.
        draws, scope: what a draw is, as in `predict`.
        choices: ids of the answer tokens, for causal language models; see `predict`.
        batch_size, collate_fn: for a data set.
        progress: show a bar where it takes longer than two seconds.

    Returns:
        `DrawsReport`. Cost: 1 + n_samples forward passes of the examples. Of a linearised Laplace
        posterior, C backward passes in one instead, on at most C parts of each batch.

    Raises:
        ValueError: n_samples is out of range, examples have no class labels, or as `predict`.
    """
    need_whole("compare_draws: n_samples", n_samples, 1)
    batches = _filled(data, batch_size, collate_fn)
    options: dict[str, Any] = {"choices": choices, "progress": progress}
    mean = _classes(predict_dataset(model, batches, n_samples=0, **options))
    if not isinstance(predictor_of(model), WeightDraws):
        # Draws of linearised logits: a pass carries the gradients of all classes at once.
        classes = mean.log_probs.shape[1]
        batches = [part for batch in batches for part in split(batch, classes)]
    options.update(n_samples=n_samples, seed=seed, draws=draws, scope=scope)
    drawn = _classes(predict_dataset(model, batches, **options))
    assert mean.labels is not None
    return report_draws(mean.log_probs, drawn.log_probs, mean.labels, n_samples)


def report_draws(
    mean_log_probs: Tensor, log_probs: Tensor, labels: Tensor, n_samples: int
) -> DrawsReport:
    """The report of predictions that are there: (n, C) of the mean and of the draws, (n,) labels.

    Raises:
        ValueError: as `metrics.paired_bootstrap`.
    """
    apart = metrics.paired_bootstrap(log_probs, mean_log_probs, labels, scores=("nll",))["nll"]
    mean_nll = -float(mean_log_probs.gather(1, labels[:, None]).mean())
    return DrawsReport(
        len(labels), n_samples, mean_nll, mean_nll + apart.value, apart.low, apart.high
    )


def can_rescale(model: nn.Module) -> bool:
    """Whether the active adapter has deviations that `rescale_` multiplies."""
    layers = active_layers(model)
    return any(item.variant.deviations(item.layer, item.adapter) for item in layers) or bool(
        _modules(model, layers)
    )


@torch.no_grad()
def rescale_(model: nn.Module, factor: float) -> None:
    """Multiply all deviations of the active adapter's posterior by a factor, in place.

    BLoB, TFB: Omega; ScalaBL: the deviations of the singular values; PoLAR-VBLL: those of the last
    layer's weights. The mean stays.

    Args:
        model: a model with such an adapter.
        factor: positive.

    Raises:
        ValueError: the factor is not positive, or the adapter has no deviations of its own (Laplace has
            a prior precision in place of them, MC dropout its rate).
    """
    if not 0 < factor < float("inf"):
        raise ValueError(f"rescale_: factor must be a positive number, got {factor!r}")
    if not can_rescale(model):
        raise ValueError(
            "rescale_: the adapter must have deviations (BLoB, TFB, ScalaBL, PoLAR-VBLL), got one "
            "without; choose the prior of a Laplace posterior with prior='validation'"
        )
    _multiply(model, factor)
    _tell(model, factor)


def fit_scale_(
    model: nn.Module,
    data: Iterable[Any] | Dataset[Any],
    *,
    only_if_harmful: bool = False,
    n_samples: int = 10,
    seed: int = 0,
    draws: str = "antithetic",
    scope: str = "example",
    choices: Sequence[int] | None = None,
    batch_size: int = 16,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    progress: bool = True,
) -> ScaleReport:
    """Multiply the deviations of a posterior by the factor with the least NLL on held-out examples, in place.

    Factors are 1, 1/2, ... 1/16, further halves as long as these lower the NLL, and 2 and 4 unless the draws
    do harm; then the two factors sqrt(2) beside the best. All evaluations use the same draws of eps.

    A factor that lowers the NLL of the examples that chose it may fit them alone. So each half of the
    examples (every second one) chooses among the factors and is checked on the other half: the best of all
    is taken where the NLL of both halves, each under the other's choice, is lower than before by more than
    chance (95 % interval of the paired bootstrap). No more passes are needed for that, and no example is
    left out.

    Args:
        model: a model with a posterior that `rescale_` takes.
        data: examples with class labels that were not trained on.
        only_if_harmful: leave a posterior alone whose draws are not `harmful`.
        n_samples, seed, draws, scope, choices, batch_size, collate_fn, progress: as in
            `compare_draws`.

    Returns:
        `ScaleReport`. Cost: 1 + n_samples forward passes of the examples, and about 7 n_samples more where
        a factor is looked for.

    Raises:
        ValueError: as `compare_draws` and `rescale_`. The posterior is then as it was.

    Example:
        print(fit_scale_(model, validation_loader))
        model.save_pretrained("blob-fitted")
    """
    rescale_(model, 1.0)  # whether it can be
    batches = _filled(data, batch_size, collate_fn)
    options: dict[str, Any] = {
        "n_samples": n_samples,
        "seed": seed,
        "draws": draws,
        "scope": scope,
        "choices": choices,
        "progress": progress,
    }
    before = compare_draws(model, batches, **options)
    if only_if_harmful and not before.harmful:
        return ScaleReport(1.0, before, before.nll, ((1.0, before.nll),))
    kept = [(p, p.detach().clone()) for p in _tensors(model)]
    found: dict[float, Prediction] = {}

    def set_to(factor: float) -> None:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
            if factor != 1:
                _multiply(model, factor)

    def nll(factor: float) -> float:
        if factor not in found:
            set_to(factor)
            found[factor] = _classes(predict_dataset(model, batches, **options))
        return _nll(found[factor])

    done = False
    try:
        # A posterior that is far too wide has about the same NLL at any scale: no descent from 1 there.
        best = min(_GRID if before.harmful else (*_GRID, 2.0, 4.0), key=nll)
        while best == min(found) and best > _LEAST:
            best = min((best / 2, best), key=nll)
        root = 2**0.5
        best = min((best, best / root, best * root), key=nll)
        if not _holds(found):
            best = 1.0
        set_to(best)
        done = True
    finally:
        if not done:
            set_to(1.0)
    _tell(model, best)
    return ScaleReport(best, before, nll(best), tuple((factor, nll(factor)) for factor in found))


def _filled(
    data: Iterable[Any] | Dataset[Any],
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> list[Any]:
    """The batches that have examples."""
    return [batch for batch in as_batches(data, batch_size, collate_fn) if not is_empty(batch)]


def _multiply(model: nn.Module, factor: float) -> None:
    layers = active_layers(model)
    for item in layers:
        item.variant.rescale_(item.layer, item.adapter, factor)
    for module in _modules(model, layers):
        module.rescale_(factor)


def _tell(model: nn.Module, factor: float) -> None:
    """Configurations of the adapters note the factor, each once."""
    configs = {id(item.variant.config): item.variant.config for item in active_layers(model)}
    for config in configs.values():
        config.rescaled(factor)


def _holds(found: Mapping[float, Prediction]) -> bool:
    """Whether what one half chooses lowers the NLL of the other, both ways, by more than chance."""
    before = found[1.0]
    assert before.labels is not None
    half = torch.arange(len(before)) % 2 == 0
    if not half.any() or half.all():
        return False
    chosen = before.log_probs.clone()
    for own, other in ((half, ~half), (~half, half)):
        best = min(found.values(), key=lambda one: _nll(one, own))
        chosen[other] = best.log_probs[other]
    pair = (chosen, before.log_probs, before.labels)
    return metrics.paired_bootstrap(*pair, scores=("nll",))["nll"].high < 0


def _nll(prediction: Prediction, rows: Tensor | slice = slice(None)) -> float:
    assert prediction.labels is not None
    return -float(prediction.log_probs.gather(1, prediction.labels[:, None])[rows].mean())


def _classes(prediction: Any) -> Prediction:
    if not isinstance(prediction, Prediction) or prediction.labels is None:
        raise ValueError("compare_draws: examples must have class labels, got none")
    return prediction


def _modules(model: nn.Module, layers: Sequence[BayesLayer]) -> list[Any]:
    """The adapter's modules in the base model: a variational last layer, unless Laplace refined it."""
    found = layers[0].variant.modules(model) if layers else []
    return [module for module in found if not module.refined]


def _tensors(model: nn.Module) -> list[Tensor]:
    """Everything that `rescale_` changes."""
    layers = active_layers(model)
    found = [t for item in layers for t in item.variant.deviations(item.layer, item.adapter)]
    return found + [p for module in _modules(model, layers) for p in module.parameters()]


__all__ = [
    "DrawsReport",
    "ScaleReport",
    "can_rescale",
    "compare_draws",
    "fit_scale_",
    "rescale_",
]
