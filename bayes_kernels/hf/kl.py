"""Divergence of the posterior from the prior, and the decoupled step on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, reference
from ..optim import KLSchedule, kl_cycle_length
from .config import VariationalConfig
from .layers import bayes_layers
from .variants import BayesLayer, Divergence, KLPlan, KLStep


def kl_divergence(model: nn.Module, adapter: str | None = None) -> Tensor:
    """Divergence of the posterior from the prior, summed over all adapted layers.

        KL = sum log(sigma_p / Omega) + (Omega^2 + M^2) / (2 sigma_p^2) - 1/2

    for BLoB; the page of each method has its own. 0 for adapters without a prior.

    Args:
        model: a model with Bayesian adapters.
        adapter: name of the adapter, or None for the active ones.

    Returns:
        0-dim fp32 tensor, differentiable in the parameters of the posterior. One launch for each
        device and parameterisation.

    Raises:
        ValueError: there is no such adapter.

    Source: Wang et al., "BLoB", arXiv 2406.11675, section 3.
    """
    layers = bayes_layers(model, adapter)
    groups: dict[tuple[torch.device, str, str, bool], list[Divergence]] = {}
    parts: list[Tensor] = []
    for item in layers:
        term = item.variant.divergence(item.view, item.adapter)
        if isinstance(term, Divergence):
            sharded = hasattr(term.mean, "full_tensor")
            kind = (term.mean.device, term.std, term.direction, sharded)
            groups.setdefault(kind, []).append(term)
        elif term is not None:
            parts.append(term)
    for (_, std, direction, sharded), terms in groups.items():
        means = [term.mean for term in terms]
        rhos = [term.rho for term in terms]
        priors = [term.prior_std for term in terms]
        if sharded:  # FSDP2: the definition, whose sums PyTorch reduces over the shards
            partial: Any = reference.gaussian_kl(means, rhos, priors, std=std, direction=direction)
            parts.append(partial.full_tensor())
        else:
            kl = functional.gaussian_kl(means, rhos, priors, std=std, direction=direction)
            parts.append(kl)
    for variant in dict.fromkeys(type(item.variant) for item in layers):
        parts += [module.kl() for module in variant.modules(model, adapter)]
    if not parts:
        # Not new_zeros, which of a shard of FSDP2 were a DTensor.
        return torch.zeros((), device=layers[0].mean.device)
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def decoupled_kl(
    model: nn.Module,
    *,
    n_train: int,
    batch_size: int,
    learning_rate: float,
    factor_sum: float,
    processes: int = 1,
    weight: float = 1.0,
    schedule: KLSchedule | None = None,
    starts: Sequence[float] | None = None,
) -> KLStep | None:
    """The KL step of the active adapter's configuration, for training loops without `BayesTrainer`.

    Call `step(lr_factor)` of the result after each optimiser step.

    Args:
        model: a model with Bayesian adapters.
        n_train: number of terms that the loss averages over the training data: examples, or target
            tokens for a per-token loss.
        batch_size: examples of one process in an optimiser step.
        learning_rate: peak rate of the main optimiser.
        factor_sum: sum over the run of its rate, over the peak.
        processes: number of data-parallel processes.
        weight: factor of the step sizes, of a given schedule too.
        schedule: used instead of the schedule of the configuration.
        starts: `kl_starts` of the model at the beginning of the run, for a run that is resumed;
            None measures them now. Used by "auto".

    Returns:
        The step; None for a method without one.

    Raises:
        ValueError: active adapters differ in method or in how the deviation is parameterised, there
            is none, or "auto" has no rule for their options.
    """
    layers = _layers_of_one_method(model)
    config = layers[0].variant.config
    if not isinstance(config, VariationalConfig):
        return None
    given = schedule is not None
    if schedule is None:
        schedule = KLSchedule(
            kind=config.kl_schedule,
            cycle=kl_cycle_length(n_train, batch_size, processes=processes, gamma=config.kl_gamma),
            lr=config.kl_lr * weight,  # shown in the logs
            factor_sum=factor_sum,
        )
        if schedule.kind != "auto":
            weight = 1.0
        elif starts is None:
            starts = kl_starts(model)
    plan = KLPlan(
        schedule=schedule,
        weight=weight,
        lr_sum=learning_rate * factor_sum,
        n_train=n_train,
        starts=[0.0] * len(layers) if starts is None else starts,
        given=given,
    )
    return layers[0].variant.kl_step(layers, plan)


def kl_starts(model: nn.Module) -> list[float]:
    """What the schedule "auto" has to know about each active layer at the beginning of a run.

    For BLoB its mean deviation Omega. In the order of `bayes_layers`.

    Raises:
        ValueError: there is no Bayesian layer, or active adapters differ in method.
    """
    layers = _layers_of_one_method(model)
    return layers[0].variant.kl_starts(layers)


def _layers_of_one_method(model: nn.Module) -> list[BayesLayer]:
    """The active Bayesian layers.

    Raises:
        ValueError: there is none, or active adapters differ in method.
    """
    layers = bayes_layers(model)
    methods = sorted({item.variant.config.method for item in layers})
    if len(methods) != 1:
        raise ValueError(
            f"decoupled_kl: active adapters must share one method, got {methods}; train one "
            "adapter at a time"
        )
    return layers
