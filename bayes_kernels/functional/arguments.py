"""Dtype and autocast rules, and the argument checks that the op families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

T = TypeVar("T")


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 beside fp64 activations."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_input(x: Tensor) -> Tensor:
    """x in the autocast dtype, where autocast is on."""
    device = x.device.type
    if device not in ("cpu", "cuda"):
        return x  # refused by the checks, with a clear line
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def no_autocast(t: Tensor) -> torch.autocast:
    """Products of fp32 operands stay fp32 products."""
    return torch.autocast(t.device.type, enabled=False)


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Products of a backward pass that is run within autocast stay in the dtype of their operands."""

    @wraps(backward)
    def run(ctx: Any, first: Tensor, *rest: Tensor) -> Any:
        with no_autocast(first):
            return backward(ctx, first, *rest)

    return run


def as_list(items: Tensor | Sequence[T]) -> list[Any]:
    """A list of the items; of one tensor, the list that holds it."""
    return [items] if isinstance(items, Tensor) else list(items)


def scalar(op: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-dim fp64 tensor on the device of `like`; a number needs no copy from host memory."""
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=torch.float64, device=like.device)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be a number or a floating-point tensor of one element, got "
            f"{value.dtype} {tuple(value.shape)}"
        )
    return value.detach().reshape(()).to(like.device, torch.float64)


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {choices}, got {value!r}; choose one")


def check_same_device(op: str, name: str, t: Tensor, like: Tensor) -> None:
    """Raise unless `t` is on the device of `like`."""
    if t.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {t.device}; move it")


def check_double_on_cpu(op: str, x: Tensor) -> None:
    """Raise for fp64 activations on a GPU."""
    if x.dtype == torch.float64 and x.device.type != "cpu":
        raise TypeError(f"{op}: float64 is supported on the CPU only, got {x.device}; use float32")


def check_factor(op: str, name: str, factor: Tensor, x: Tensor) -> None:
    """Raise unless `factor` is a floating-point tensor on the device of x."""
    if not factor.is_floating_point():
        raise TypeError(
            f"{op}: {name} must be a real floating-point tensor, got {factor.dtype}; convert it"
        )
    check_same_device(op, name, factor, x)
