"""Bayesian fine-tuning of language models at LoRA's price.

Fused C++/CUDA ops that are useful on their own (`bayes_kernels.functional`), noise as a pure function
of a small key (`bayes_kernels.random`), and, in `bayes_kernels.hf`, Bayesian adapters for stock
transformers and PEFT. Importing this package imports neither transformers nor PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import functional, optim, random
from ._library import build_info

__version__ = "0.1.0"

# Names that need transformers or PEFT, imported at first use.
_HF_NAMES = ("export_lora", "kl_divergence", "posterior", "predict")

__all__ = [
    "__version__",
    "build_info",
    "functional",
    "optim",
    "random",
    *_HF_NAMES,
]


def __getattr__(name: str) -> Any:
    if name in _HF_NAMES:
        return getattr(import_module("bayes_kernels.hf"), name)
    if name in ("hf", "laplace", "metrics", "plots", "reference", "vbll"):
        return import_module(f"bayes_kernels.{name}")
    raise AttributeError(f"module 'bayes_kernels' has no attribute {name!r}")
