"""Quantised base models: what each word of ``--quantization`` asks of transformers.

A new backend is an entry here, and the class of PEFT's layers for it in `bayes_kernels.hf._compat`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers.utils.quantization_config import QuantizationConfigMixin


def _bitsandbytes(word: str, dtype: torch.dtype) -> QuantizationConfigMixin:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_8bit=word == "8bit",
        load_in_4bit=word == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )


class Backend(NamedTuple):
    """A package that quantises.

    Attributes:
        package: Name of its module.
        extra: Extra of bayes-kernels that installs it.
        config: (word, dtype of the arithmetic) -> what `from_pretrained` takes.
    """

    package: str
    extra: str
    config: Callable[[str, torch.dtype], QuantizationConfigMixin]


_BITSANDBYTES = Backend("bitsandbytes", "quant", _bitsandbytes)
# By the words of the command line.
QUANTIZATIONS = {"8bit": _BITSANDBYTES, "4bit": _BITSANDBYTES}


def quantization_config(word: str, dtype: torch.dtype) -> QuantizationConfigMixin:
    """The quantisation of a base model, as `from_pretrained` takes it.

    Args:
        word: A key of `QUANTIZATIONS`.
        dtype: Of the arithmetic.

    Raises:
        ImportError: The package of the backend is not installed.
    """
    backend = QUANTIZATIONS[word]
    if importlib.util.find_spec(backend.package) is None:
        raise ImportError(
            f"quantization {word!r} needs {backend.package}; "
            f"run: pip install 'bayes-kernels[{backend.extra}]'"
        )
    return backend.config(word, dtype)
