"""Activations in 8 bits: what backward needs of a layer's input, in about half of the memory of bf16.

A block of 32 columns has one scale, a power of two (MXINT8 of the OCP Microscaling Formats specification
1.0). Rounding is stochastic, from the noise stream, so that means and therefore gradients are unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library, reference
from .._library import fake
from ..random import check_key
from .arguments import (
    ACTIVATIONS,
    autocast_input,
    check_integer,
    check_same_device,
    check_tensor,
    transformed,
)

# Columns that share a scale.
SCALE_BLOCK = 32


class QuantizedActivations(NamedTuple):
    """Activations (..., n) in 8 bits: code * 2^(scale - 133), NaN where the scale is 255.

    Attributes:
        codes: int8 (..., n), from -127 to 127.
        scales: uint8 (tokens, ceil(n / 32)): one for each 32 columns.
    """

    codes: Tensor
    scales: Tensor

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The values (..., n), exact in every dtype of activations that held them before."""
        if not _library.has_kernels(self.codes):
            return reference.dequantize_activations(self.codes, self.scales, dtype)
        return _library.ops.dequantize_activations(self.codes, self.scales, dtype)

    def by_row(self) -> QuantizedActivations:
        """The same memory, with codes (tokens, n)."""
        n = self.codes.shape[-1]
        return self._replace(codes=self.codes.reshape(self.scales.shape[0], n))


def quantize_activations(
    x: Tensor, *, key: Tensor, stream: int = 0, row0: int = 0
) -> QuantizedActivations:
    """x in 8 bits, for the argument `kept` of the adapters: then backward reads these in place of x.

    With step_b = 2^ceil(log2(max |x_b| / 127)) the step of block b (32 columns of a token), x / step is
    rounded up with the probability of its remainder. So the mean over keys is x, up to 2^-17 step, and
    the variance of an element step^2 f (1 - f) <= step^2 / 4, f the remainder; step < max |x_b| / 63.
    In fp16 numbers beyond 64512 are an exception, as 65536 has 65504 in its place.
    Numbers that are not finite make their block NaN, and so do those beyond 127 2^121 = 3.376e38, whose
    codes could stand for 2^128 (the largest of bf16 and of fp32 are 3.390e38 and 3.403e38); the smallest
    step is 2^-126 (fp16: 2^-24).

    Keeps n + n / 32 bytes for each token. Adapters that share x can share these: the gradients with
    respect to x and b do not use them, those of each first factor stay unbiased.

    Only the kernels take them. For ranks above 64, on devices without kernels and under torch.func adapters
    check `kept` and leave it alone: PyTorch's operations keep x, widened to fp32, gradients are the
    exact ones, and what was made here is memory and time without a use.

    Args:
        x: (..., n). Under autocast it is taken in the autocast dtype, as adapters take it. Not
            differentiated.
        key: int64 tensor of two elements (`random.key`), as that of the adapter's call.
        stream: the layer's noise stream; those of layers that share x may be one.
        row0: index of the first token of x, for batches that are split.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or the key is none.

    Cost: x is read once, codes and scales are written once; backward reads them once and writes x.
    Source: stochastic rounding of kept activations is that of Chen et al., "ActNN", arXiv 2104.14129.
    """
    op = "quantize_activations"
    check_tensor(op, "x", x)
    if x.dtype not in ACTIVATIONS:
        raise TypeError(
            f"{op}: x must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it"
        )
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have shape (..., n), got a tensor without dimensions")
    check_key(op, key)
    check_same_device(op, "key", key, x)
    check_integer(op, "stream", stream)
    check_integer(op, "row0", row0)
    x = autocast_input(x.detach())
    if not _library.has_kernels(x) or transformed():
        codes, scales = reference.quantize_activations(x, key, stream=stream, row0=row0)
    else:
        codes, scales = _library.ops.quantize_activations(x, key, stream, row0)
    return QuantizedActivations(codes, scales)


def check_kept(op: str, kept: QuantizedActivations | None, x: Tensor) -> None:
    """Raise unless `kept` is None or of the shape and device of x."""
    if kept is None:
        return
    if not isinstance(kept, QuantizedActivations):
        raise TypeError(
            f"{op}: kept must be made by quantize_activations(x, key=...), got {type(kept).__name__}"
        )
    if not fits(kept, x):
        raise ValueError(
            f"{op}: kept must be of x, {tuple(x.shape)} on {x.device}, got codes "
            f"{tuple(kept.codes.shape)} on {kept.codes.device}; pass "
            "quantize_activations of this x"
        )


def fits(kept: Any, x: Tensor) -> bool:
    """Whether `kept` can be what quantize_activations(x) has made."""
    return (
        isinstance(kept, QuantizedActivations)
        and kept.codes.shape == x.shape
        and kept.codes.device == x.device
    )


def saved_input(
    x: Tensor, kept: QuantizedActivations | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What an autograd function saves of x: (x, codes, scales), either the first or the others."""
    return (x, None, None) if kept is None else (None, kept.codes, kept.scales)


def loaded_input(
    op: str, saved: Sequence[Tensor | None], dtype: torch.dtype, again: bool
) -> Tensor:
    """x of what `saved_input` has saved, in backward.

    Raises:
        RuntimeError: `again`, the graph of derivatives is wanted, and there are codes only: derivatives
            by x would be left out.
    """
    x, codes, scales = saved
    if x is not None:
        return x
    if again:
        raise RuntimeError(
            f"{op}: second derivatives need x itself, got it in 8 bits; leave kept (activation_bits) out"
        )
    assert codes is not None
    return _library.ops.dequantize_activations(codes, scales, dtype)


# --- fake kernels: shapes and dtypes of the ops' results ---------------------------------------------


@fake("quantize_activations")
def _(x: Tensor, key: Tensor, stream: int, row0: int) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return (
        x.new_empty(tuple(x.shape), dtype=torch.int8),
        x.new_empty((rows, (n + SCALE_BLOCK - 1) // SCALE_BLOCK), dtype=torch.uint8),
    )


@fake("dequantize_activations")
def _(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(tuple(codes.shape), dtype=dtype)
