"""Layers of PEFT for quantised bases whose forward pass hands over to no formula."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._compat import LAYERS_WITHOUT_HOOK


def give_hook(layer: Any) -> None:
    """Let a layer of AWQ, AQLM or EETQ use the formulas of its adapters, as PEFT's layer for GPTQ does.

    Nothing happens to other layers. The layer's forward becomes one of the instance, so that plain LoRA in
    other layers is PEFT's own.
    """
    if type(layer).__name__ in LAYERS_WITHOUT_HOOK:
        layer.forward = functools.partial(_forward, layer)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """Base layer and active adapters. Plain LoRA beside a Bayesian adapter is computed as in PEFT's layer."""
    result = layer.base_layer(x)
    if layer.disable_adapters:
        return result
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        dtype = result.dtype
        if name in layer.lora_variant:
            result = (
                layer.lora_variant[name]
                .forward(layer, active_adapter=name, x=x, result=result)
                .to(dtype)
            )
            continue
        a, b = layer.lora_A[name], layer.lora_B[name]
        rows = x if torch.is_autocast_enabled(x.device.type) else x.to(a.weight.dtype)
        rows = b(a(layer.lora_dropout[name](rows)))
        result = result + rows.to(dtype) * layer.scaling[name]
    return result
