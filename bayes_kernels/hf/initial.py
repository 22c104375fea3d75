"""First values of a method's tensors, by generators of their own: the global one is left as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform_like(
    reference_tensor: Tensor, shape: Sequence[int], low: float, high: float, stream: int
) -> Tensor:
    """fp32 uniform numbers on a tensor's device, from a private generator.

    The global generator is not used, so that plain LoRA draws the same means from the same seed.
    """
    if reference_tensor.is_meta:
        return torch.empty(tuple(shape), dtype=torch.float32, device="meta")
    value = torch.empty(tuple(shape), dtype=torch.float32)
    value.uniform_(low, high, generator=private_generator(stream))
    return value.to(reference_tensor.device)


def normal_like(reference_tensor: Tensor, shape: Sequence[int], stream: int) -> Tensor:
    """fp32 standard normal numbers on a tensor's device, as `uniform_like`."""
    if reference_tensor.is_meta:
        return torch.empty(tuple(shape), dtype=torch.float32, device="meta")
    value = torch.randn(tuple(shape), generator=private_generator(stream))
    return value.to(reference_tensor.device)


def inverse_softplus(value: Tensor) -> Tensor:
    """x with log(1 + e^x) = value, for small values too."""
    return value + torch.log(-torch.expm1(-value))


def private_generator(stream: int) -> torch.Generator:
    """A generator of the global seed and a layer's noise stream; the global one is not used."""
    seed = (torch.initial_seed() * 0x9E3779B97F4A7C15 + stream) & (2**63 - 1)
    return torch.Generator().manual_seed(seed)
