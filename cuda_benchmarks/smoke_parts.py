"""What cases of the smoke program are made of: seeded inputs, calls and their truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_kernels import random

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call: `run` gives results, `truth` the same in fp64; `allowed`: largest relative error.

    `seen`: what of the results is compared, where the definition leaves something open. Apart from `run`,
    so that sanitizers meet no products of cuBLAS.
    """

    family: str
    name: str
    run: Callable[[], Tensors]
    truth: Callable[[], Tensors]
    allowed: float
    seen: Callable[[Tensors], Tensors] = lambda found: found


class Inputs:
    """Seeded numbers on a device: the same on every device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device("cuda" if device == "cuda" else "cpu")
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype = FP32) -> Tensor:
        return (scale * torch.randn(size, generator=self.generator)).to(self.device, dtype)

    def uniform(self, *size: int, low: float = 0.05, high: float = 0.35) -> Tensor:
        return (low + (high - low) * torch.rand(size, generator=self.generator)).to(self.device)

    def orthonormal(self, n: int, r: int) -> Tensor:
        full = torch.randn(n, r, generator=self.generator, dtype=torch.float64)
        return torch.linalg.qr(full)[0].float().to(self.device).contiguous()

    def key(self, seed: int) -> Tensor:
        return random.key(seed, self.device)


def odd(t: Tensor) -> Tensor:
    """The same numbers one element after an aligned address, as leaf."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return room[1:].view(t.shape).copy_(t)


def double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def with_gradients(y: Tensor, dy: Tensor, inputs: Tensors) -> Tensors:
    gradients = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype))
    return {
        "value": y.detach(),
        **dict(zip((f"d{n}" for n in inputs), gradients, strict=True)),
    }
