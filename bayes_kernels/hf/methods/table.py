"""The table of methods: a row for each, in the order of listings."""

from __future__ import annotations

from peft import LoraConfig

from ..method import Method, register
from .blob import BlobConfig
from .polar import PolarConfig
from .polar_vbll import PolarVbllConfig
from .scalabl import ScalablConfig
from .tfb import TfbConfig

_NOISE = ("prior_std", "init_rho", "scope", "kl_schedule", "kl_lr", "kl_time", "kl_gamma")
_STIEFEL = ("stiefel", "stiefel_penalty")
_HEAD = ("head_covariance", "head_prior_scale", "head_lr", "kl_weight", "alternation")

for _row in (
    Method("map", "LoRA (MAP)", LoraConfig, bayesian=False),
    # Dropout in training and in prediction, at the rate of BLoB's published baseline.
    Method("dropout", "MC dropout", LoraConfig, dropout=0.1),
    Method("ensemble", "Ensemble", LoraConfig, made="join", n_samples=3),
    Method("blob", "BLoB", BlobConfig, options=_NOISE),
    Method("tfb", "TFB", TfbConfig, made="convert"),
    Method("laplace", "Laplace-LoRA", LoraConfig, made="convert", n_samples=1000),
    Method("laplace-last", "Laplace-LoRA, last layer", LoraConfig, made="convert", n_samples=1000),
    Method("scalabl", "ScalaBL", ScalablConfig, options=(*_NOISE, "kl_direction", "covariance")),
    Method("polar", "PoLAR (MAP)", PolarConfig, bayesian=False, lr=2e-3, options=_STIEFEL),
    Method(
        "polar-vbll",
        "PoLAR-VBLL",
        PolarVbllConfig,
        n_samples=1000,
        lr=2e-3,
        options=(*_STIEFEL, *_HEAD),
    ),
):
    register(_row)
