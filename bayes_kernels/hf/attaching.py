"""Turning an adapter of a PEFT layer into a Bayesian one, in place."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._compat import unsupported_layer
from .experts import adapts_parameter, wrap
from .noise import using
from .quantised import give_hook
from .targets import as_linear, unsupported_target
from .variants import VARIANTS, BayesVariant

if TYPE_CHECKING:
    from .config import BayesLoraConfig
    from .noise import NoiseState


def attach(
    layer: Any, adapter: str, config: BayesLoraConfig, name: str, state: NoiseState
) -> BayesVariant:
    """Turn the adapter `adapter` of a PEFT LoRA layer into a Bayesian one, in place.

    Adds the method's tensors beside the factors, for BLoB the trainable `lora_A_rho` (r, in).

    Args:
        layer: a LoRA layer of PEFT that has the adapter.
        adapter: its name.
        config: method and options.
        name: the layer's module name in the base model, which fixes its noise stream.
        state: the model's noise state.

    Raises:
        ValueError: the layer's kind or quantisation cannot carry the adapter.
    """
    kind = VARIANTS[config.method]
    reason = unsupported_layer(layer) or unsupported_target(layer, kind.targets)
    if reason is not None:
        base = type(layer.get_base_layer()).__name__ if hasattr(layer, "get_base_layer") else "?"
        raise ValueError(
            f"{type(config).__name__}: target {name} ({base}) cannot carry a Bayesian adapter: {reason}; "
            "target linear layers that are unquantised or quantised by bitsandbytes, GPTQ, AWQ, AQLM, "
            "EETQ, HQQ or torchao"
        )
    variant = kind(config, name, as_linear(layer).in_features, state)
    variant.init(layer, adapter)
    layer.lora_variant[adapter] = variant
    if adapts_parameter(layer):
        wrap(layer)
        variant.routed = not layer.fused
        if not layer.fused:
            variant.draw_scopes = ("example",)
            _warn_slow(layer, variant.scope)
        return variant
    # PEFT's own multiplies lora_A and lora_B alone. What asks a layer for its update (convert_to_lora,
    # merging into a torchao base) must see what the method has between them.
    layer.get_delta_weight = functools.partial(_delta_weight, layer)
    layer._mixed_batch_forward = functools.partial(_mixed_batch, layer)
    give_hook(layer)
    return variant


def _mixed_batch(layer: Any, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Any:
    """`_mixed_batch_forward` of a layer that has had a Bayesian adapter: an adapter by name for each row.

    PEFT's own hands a variant its rows without their places, and embeddings have no variant there.
    """
    found = {name: layer.lora_variant.get(name) for name in dict.fromkeys(adapter_names)}
    ours = {name: v for name, v in found.items() if isinstance(v, BayesVariant)}
    others = ["__base__" if name in ours else name for name in adapter_names]
    y = type(layer)._mixed_batch_forward(layer, x, *args, adapter_names=others, **kwargs)
    for name, variant in ours.items():
        rows = [i for i, other in enumerate(adapter_names) if other == name]
        with using(variant.state, variant.state.current().of_rows(rows, len(adapter_names))):
            own = variant.forward(layer, name, x[rows], y[rows])
        y = y.index_copy(0, torch.tensor(rows, device=y.device), own.to(y.dtype))
    return y


def _delta_weight(layer: Any, adapter: str) -> Tensor:
    """`get_delta_weight` of a layer that has had a Bayesian adapter."""
    variant = layer.lora_variant.get(adapter)
    if isinstance(variant, BayesVariant):
        return variant.delta_weight(layer, adapter)
    return type(layer).get_delta_weight(layer, adapter)


def _warn_slow(layer: Any, scope: str) -> None:
    """One line for each kind of parameter that is adapted as PEFT does it."""
    kind = f"{type(layer.get_base_layer()).__name__}.{layer.parameter_name}"
    shared = "" if scope == "none" else f", and its training noise has scope 'none', not {scope!r}"
    warnings.warn(
        f"target_parameters: {kind} is no projection of experts behind transformers' experts interface, so "
        f"each pass makes its weights anew, predictions take a pass for each draw{shared}",
        stacklevel=6,
    )
