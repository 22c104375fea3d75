"""Plain LoRA: one set of weights and no posterior.

Without weight decay it is the maximum-likelihood estimate (MLE), with weight decay the maximum a posteriori
estimate (MAP) under a Gaussian prior on the factors. The baselines of these names in the code of BLoB and
TFB differ in that alone: a decay of 0 and of 1e-5.
"""

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


METHOD = Method(PLAIN, "LoRA (MLE)", bayesian=False, predictor=plain_predictor)

MAP = Method("map", "LoRA (MAP)", bayesian=False, weight_decay=1e-5, predictor=plain_predictor)

__all__ = ["MAP", "METHOD"]
