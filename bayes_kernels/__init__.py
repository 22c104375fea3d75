"""Bayesian fine-tuning of language models at LoRA's price.

Fused C++/CUDA ops that are useful on their own (`bayes_kernels.functional`), noise as a pure function
of a small key (`bayes_kernels.random`), and, in `bayes_kernels.hf`, Bayesian adapters for stock
transformers and PEFT.

Importing this package imports nothing else: its modules, and names from them, are imported at first
use. `import bayes_kernels.functional` registers `torch.ops.bayes_kernels`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import functional, optim, random
    from ._library import build_info

__version__ = "0.1.0"

_MODULES = (
    "functional",
    "hf",
    "laplace",
    "metrics",
    "optim",
    "plots",
    "random",
    "reference",
    "serving",
    "stiefel",
    "vbll",
)
# Where names come from that the package offers itself; those of hf need transformers and PEFT.
_NAMES = {
    "build_info": "_library",
    "export_lora": "hf",
    "kl_divergence": "hf",
    "posterior": "hf",
    "predict": "hf",
}

__all__ = [
    "__version__",
    "build_info",
    "export_lora",
    "functional",
    "kl_divergence",
    "optim",
    "posterior",
    "predict",
    "random",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})
