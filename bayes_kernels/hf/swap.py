"""Replacing a model's adapter by one of another type, with other factors.

Conversions do this inside `undo.as_before_if_stopped`, which brings the old adapter back if they stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from .attaching import attach
from .config import BayesLoraConfig
from .experts import layer_name, unwrap
from .layers import cast_where_plain, find_peft_model, lora_layers
from .model import BayesLoraModel, remove_noise
from .targets import as_linear, factor_parameters
from .variants import VARIANTS, BayesLayer, BayesVariant


def the_adapter(op: str, model: nn.Module) -> tuple[PeftModel, str]:
    """The PEFT model in `model` and the name of its adapter, as what converts an adapter needs it.

    Raises:
        ValueError: there is none or more than one, it is no LoRA adapter, it is merged, or its last
            layer is variational; the message begins with `op`.
    """
    peft_model = find_peft_model(op, model)
    names = list(peft_model.peft_config)
    if len(names) != 1:
        raise ValueError(
            f"{op}: model must have one adapter, got {names}; delete the others, or load this one "
            "alone"
        )
    tuner: Any = peft_model.base_model
    config: Any = peft_model.peft_config[names[0]]
    if not isinstance(config, LoraConfig) or type(tuner) not in (LoraModel, BayesLoraModel):
        raise ValueError(
            f"{op}: the adapter must be a LoRA adapter, got {type(config).__name__} in "
            f"{type(tuner).__name__}"
        )
    if any(layer.merged_adapters for _, layer in lora_layers(tuner.model)):
        raise ValueError(
            f"{op}: the adapter must not be merged, got a merged one; unmerge_adapter()"
        )
    if isinstance(config, BayesLoraConfig) and VARIANTS[config.method].replaces:
        raise ValueError(
            f"{op}: the adapter must not have {VARIANTS[config.method].replaces}, got method "
            f"{config.method!r}"
        )
    return peft_model, names[0]


def adapted_layers(model: PeftModel, name: str) -> list[tuple[str, Any]]:
    """The layers that have an adapter, by name in the base model, parameters by theirs."""
    tuner: Any = model.base_model
    return [
        (layer_name(key, layer), layer)
        for key, layer in lora_layers(tuner.model)
        if name in layer.lora_A or name in layer.lora_embedding_A
    ]


def lora_options(config: PeftConfig) -> dict[str, Any]:
    """The options of `peft.LoraConfig` that a configuration has."""
    return {
        name: getattr(config, name)
        for name, one in LoraConfig.__dataclass_fields__.items()
        if one.init and name != "peft_type"
    }


def mean_factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """A and B of an adapter in one layer, as matrices; for a Bayesian adapter, of its mean."""
    variant = layer.lora_variant.get(name)
    with torch.no_grad():
        if isinstance(variant, BayesVariant):
            a, b = variant.mean_factors(as_linear(layer), name)
        else:
            a, b = (part[name].weight for part in _matrices(layer))
    return a.detach(), b.detach()


def _matrices(layer: Any) -> tuple[Any, Any]:
    view = as_linear(layer)
    return view.lora_A, view.lora_B


def make_plain(model: PeftModel, name: str) -> None:
    """Make a Bayesian adapter the plain one of its mean, and the model PEFT's again.

    Plain LoRA whose Bayesian neighbours were deleted keeps its tensors and its configuration.
    """
    tuner: Any = model.base_model
    if type(tuner) is not BayesLoraModel:
        return
    layers = [layer for _, layer in adapted_layers(model, name)]
    config: Any = tuner.peft_config[name]
    if isinstance(config, BayesLoraConfig):
        config = LoraConfig(**lora_options(config))
    _change_type(model, name, LoraModel, config)
    for layer in layers:
        if isinstance(layer.lora_variant.get(name), BayesVariant):
            a, b = mean_factors(layer, name)
            _set_factors(layer, name, a.clone(), b.clone())
            del layer.lora_variant[name]
        cast_where_plain(layer)
        unwrap(layer)
    remove_noise(tuner.model)


def make_bayesian(
    model: PeftModel,
    name: str,
    config: BayesLoraConfig,
    layers: Sequence[tuple[str, Any]],
    factors: Sequence[tuple[Tensor, Tensor]],
) -> list[BayesLayer]:
    """Make an adapter one of a method, with new factors.

    Args:
        model: a model whose only adapter it is.
        name: its name.
        config: of the method.
        layers: its `adapted_layers`.
        factors: A and B for each of them. They are kept in fp32, or fp64 where the old ones are.

    Returns:
        The new layers, in the same order.
    """
    tuner: Any = model.base_model
    made = []
    _change_type(model, name, BayesLoraModel, config)
    for (key, layer), (a, b) in zip(layers, factors, strict=True):
        for factor in factor_parameters(layer, name):
            if factor.dtype != torch.float64:
                factor.data = factor.data.float()
        _set_factors(layer, name, a, b)
        variant = attach(layer, name, config, key, tuner._noise(config))
        cast_where_plain(layer)
        made.append(BayesLayer(key, layer, name, variant))
    return made


def _change_type(model: PeftModel, name: str, kind: type[nn.Module], config: LoraConfig) -> None:
    tuner: Any = model.base_model
    tuner.__class__ = kind
    model.peft_config[name] = tuner.peft_config[name] = config
    model.peft_type = config.peft_type


def _set_factors(layer: Any, name: str, a: Tensor, b: Tensor) -> None:
    """New factors, in the types of the old ones, and nothing of the old method beside them."""
    variant = layer.lora_variant.get(name)
    if isinstance(variant, BayesVariant):
        for tensor in (*variant.parameters, *variant.constants):
            if name in getattr(layer, tensor, {}):
                del getattr(layer, tensor)[name]
    for factor, value in zip(factor_parameters(layer, name), (a, b), strict=True):
        factor.data = value.reshape(factor.shape).to(factor.dtype)
