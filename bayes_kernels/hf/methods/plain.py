"""Plain LoRA: one set of weights, the maximum a posteriori (MAP) estimate, and no posterior."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ..draws import WeightDraws
from ..method import PLAIN, Method


def plain_predictor(model: nn.Module) -> WeightDraws | None:
    """The predictor of a model with an adapter of stock PEFT; None where it has none."""
    adapted = any(isinstance(module, (PeftModel, LoraLayer)) for module in model.modules())
    return WeightDraws(model) if adapted else None


METHOD = Method(PLAIN, "LoRA (MAP)", bayesian=False, predictor=plain_predictor)

__all__ = ["METHOD"]
