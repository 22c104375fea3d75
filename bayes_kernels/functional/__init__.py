"""Drop-in ops: adapters with flipped-sign noise, divergence, tall matrices, prediction.

Shapes: x (..., n) activations; a, mean (r, n) and b (m, r) low-rank factors; base (..., m) the output
of the frozen layer. Dtypes: activations fp32, bf16, fp16 (fp64 on the CPU); factors and variances are
fp32 (fp64 beside fp64 activations) and are converted to that where they are not. The result has the
dtype of `base`, or of x without one. Under autocast x is taken in the autocast dtype, factors stay
fp32. Derivatives are fused in reverse mode; second derivatives, forward mode and torch.func take the
definitions of `bayes_kernels.reference`, slower.
Tall matrices (Stiefel parameters) are fp32 in lists, changed in place and without derivatives.

Cost of a call with T tokens: x is read once, base read once and y written once; forward keeps x, h
(T, r) in fp32 and the key for the backward pass, and never a sign, a mask or a noise tensor. With
`kept=quantize_activations(x, key=...)` it keeps those in place of x: 8.25 bits for each number. Ranks
above 64 run the formulas of `bayes_kernels.reference` on materialised noise: slower and with memory
for x and the signs, with the same numbers.

Errors are ValueError or TypeError in one line, raised before any kernel runs.
"""

from __future__ import annotations

from .activations import QuantizedActivations, quantize_activations
from .adapter import core_lora, flipout_lora, lora, scaled_lora
from .adapter_group import flipout_lora_group, lora_group
from .curvature import kron_accumulate_, low_rank_update_
from .divergence import gaussian_kl
from .grouped import gaussian_draws, grouped_flipout_lora, grouped_lora, sampled_lora
from .noise import SCOPES, STDS
from .predict import (
    COVARIANCES,
    PREDICT_METHODS,
    McPrediction,
    linear_logits,
    mc_predict,
    mc_predict_linear,
)
from .tall import (
    NOT_FINITE,
    RANK_DEFICIENT,
    REFINED,
    RETRACTED,
    RETRACTIONS,
    SHIFTED,
    gram,
    landing_field,
    landing_step_,
    polar_retract_,
    qr_retract_,
    stiefel_step_,
)

__all__ = [
    "COVARIANCES",
    "NOT_FINITE",
    "PREDICT_METHODS",
    "RANK_DEFICIENT",
    "REFINED",
    "RETRACTED",
    "RETRACTIONS",
    "SCOPES",
    "SHIFTED",
    "STDS",
    "McPrediction",
    "QuantizedActivations",
    "core_lora",
    "flipout_lora",
    "flipout_lora_group",
    "gaussian_draws",
    "gaussian_kl",
    "gram",
    "grouped_flipout_lora",
    "grouped_lora",
    "kron_accumulate_",
    "landing_field",
    "landing_step_",
    "linear_logits",
    "lora",
    "lora_group",
    "low_rank_update_",
    "mc_predict",
    "mc_predict_linear",
    "polar_retract_",
    "qr_retract_",
    "quantize_activations",
    "sampled_lora",
    "scaled_lora",
    "stiefel_step_",
]
