"""Variational Bayesian last layers for any torch model: classification and regression heads."""

from .last_layer import (
    BOUNDS,
    COVARIANCES,
    INITS,
    LaplaceReport,
    VBLLClassification,
    VBLLRegression,
    pack_tril,
    unpack_tril,
)

__all__ = [
    "BOUNDS",
    "COVARIANCES",
    "INITS",
    "LaplaceReport",
    "VBLLClassification",
    "VBLLRegression",
    "pack_tril",
    "unpack_tril",
]
