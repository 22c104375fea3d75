"""Dtype and autocast rules, and the argument checks that the op families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _library

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

T = TypeVar("T")


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 beside fp64 activations."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_input(x: Tensor) -> Tensor:
    """x in the autocast dtype, where autocast is on."""
    device = x.device.type
    if (
        x.dtype in ACTIVATIONS[:3]
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        return x.to(torch.get_autocast_dtype(device))
    return x


def no_autocast(t: Tensor) -> torch.autocast:
    """Products of fp32 operands stay fp32 products."""
    return torch.autocast(t.device.type, enabled=False)


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    The kernels have no rules for those: raw ops would drop tangents in silence.
    """
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


_library.constant_when_traced(transformed)


def second_order(
    definition: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    gradients: Tensor | Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of definition(*inputs) that can be differentiated again; None where none is needed.

    For backward passes of a graph that is itself differentiated (`create_graph=True`).
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: each derivative is a partial one, also where an input was made from another.
        own = [t if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t in own if t is not None and t.requires_grad]
        outputs = definition(*own)
        found = torch.autograd.grad(
            outputs, wanted, gradients, create_graph=again, allow_unused=True
        )
    left = iter(found)
    return tuple(next(left) if t is not None and t.requires_grad else None for t in own)


def backward_of(
    definition: Callable[..., Any], inputs: int
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of `backward`: outside autocast, and with derivatives of its own.

    Args:
        definition: what `forward` computes, in PyTorch's own operations, of its first arguments. It
            gives the gradients of a graph that is itself differentiated (`create_graph=True`).
        inputs: how many arguments that are; `forward` saves them first.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def run(ctx: Any, *gradients: Tensor) -> Any:
            with no_autocast(gradients[0]):
                if torch.is_grad_enabled() or transformed():
                    found = second_order(definition, ctx.saved_tensors[:inputs], gradients)
                    return (*found, *(None for _ in ctx.needs_input_grad[inputs:]))
                return backward(ctx, *gradients)

        return run

    return decorate


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
