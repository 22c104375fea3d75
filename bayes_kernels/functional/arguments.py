"""Dtype and autocast rules, and the argument checks that the op families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _library

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

T = TypeVar("T")


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 beside fp64 activations."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def has_autocast(device: str) -> bool:
    """Whether a type of device has autocast; a constant where torch.compile traces, as it cannot look."""
    return torch.amp.is_autocast_available(device)


_library.constant_when_traced(has_autocast)


def autocast_input(x: Tensor) -> Tensor:
    """x in the autocast dtype, where autocast is on."""
    device = x.device.type
    if (
        torch._C._is_any_autocast_enabled()
        and x.dtype in ACTIVATIONS[:3]
        and has_autocast(device)
        and torch.is_autocast_enabled(device)
    ):
        return x.to(torch.get_autocast_dtype(device))
    return x


def no_autocast(t: Tensor) -> torch.autocast:
    """Products of fp32 operands stay fp32 products."""
    device = t.device.type
    return torch.autocast(device if has_autocast(device) else "cpu", enabled=False)


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    The kernels have no rules for those: raw ops would drop tangents in silence.
    """
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


_library.constant_when_traced(transformed)


def no_transform(op: str) -> None:
    """Raise within torch.func transforms: for ops without derivatives.

    Raises:
        RuntimeError: gradients and tangents would be zeros.
    """
    if torch._C._functorch.maybe_current_level() is not None and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: must be called outside torch.func transforms, as it has no derivatives; the "
            "functions of bayes_kernels.reference take them"
        )


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


def as_list(op: str, name: str, items: Tensor | Sequence[T]) -> list[Any]:
    """A list of the items; of one tensor, the list that holds it.

    Raises:
        TypeError: neither a tensor nor a list.
    """
    if isinstance(items, Tensor):
        return [items]
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes, dict)):
        raise TypeError(
            f"{op}: {name} must be a tensor or a list of tensors, got {type(items).__name__}"
        )
    return list(items)


def scalar(op: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-dim fp64 tensor on the device of `like`; a number needs no copy from host memory."""
    dtype = torch.float64 if _library.has_double(like.device) else torch.float32
    if not isinstance(value, Tensor):
        check_number(op, name, value)
        return torch.full((), float(value), dtype=dtype, device=like.device)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be a number or a floating-point tensor of one element, got "
            f"{value.dtype} {tuple(value.shape)}"
        )
    return value.detach().reshape(()).to(like.device, dtype)


def check_number(op: str, name: str, value: Any) -> None:
    """Raise unless `value` is a real number."""
    if not isinstance(value, (float, int, Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}; convert it")


def check_integer(op: str, name: str, value: Any) -> None:
    """Raise unless `value` is an integer."""
    if not isinstance(value, (int, Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}; convert it")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {choices}, got {value!r}; choose one")


_STRIDED = torch.strided


def _is_dense(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout is _STRIDED and not t.is_nested and not t.is_meta


def check_tensors(op: str, name: str, tensors: Sequence[Any]) -> None:
    """Raise unless all of a list are dense tensors with data."""
    for i, t in enumerate(tensors):
        if not _is_dense(t):
            check_tensor(op, f"{name}[{i}]", t)


def check_tensor(op: str, name: str, t: Any) -> None:
    """Raise unless `t` is a dense tensor with data."""
    if _is_dense(t):
        return
    if not isinstance(t, Tensor):
        raise TypeError(
            f"{op}: {name} must be a tensor, got {type(t).__name__}; pass a torch.Tensor"
        )
    if t.layout is not _STRIDED or t.is_nested:
        kind = "a nested one" if t.is_nested else f"layout {t.layout}"
        cure = "call .to_padded_tensor(0.0)" if t.is_nested else "call .to_dense()"
        raise TypeError(f"{op}: {name} must be a dense tensor, got {kind}; {cure}")
    raise ValueError(
        f"{op}: {name} must hold data, got a tensor on the meta device; load its values first"
    )


def check_same_device(op: str, name: str, t: Tensor, like: Tensor) -> None:
    """Raise unless `t` is on the device of `like`."""
    if t.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {t.device}; move it")


def check_factor(op: str, name: str, factor: Tensor, x: Tensor) -> None:
    """Raise unless `factor` is a dense floating-point tensor on the device of x."""
    check_tensor(op, name, factor)
    if not factor.is_floating_point():
        raise TypeError(
            f"{op}: {name} must be a real floating-point tensor, got {factor.dtype}; convert it"
        )
    check_same_device(op, name, factor, x)


def check_writable(
    op: str,
    name: str,
    written: Sequence[Tensor],
    read: Sequence[Tensor] = (),
    *,
    same_ok: bool = False,
) -> None:
    """Raise where tensors that are changed share memory with each other, themselves or what is read.

    Blocks of a GPU write them at the same time, and copies of those that are not contiguous would hide
    it from the op.

    Args:
        same_ok: read[i] may be written[i].
    """
    if torch.compiler.is_compiling():
        return
    for i, t in enumerate(written):
        if t.is_contiguous():
            continue
        if any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(
                f"{op}: {name}[{i}] must not overlap itself in memory, got strides {t.stride()} for shape "
                f"{tuple(t.shape)}; call .contiguous()"
            )
    groups = (written, read)
    spans = [(*_span(t), kind, i) for kind, group in enumerate(groups) for i, t in enumerate(group)]
    near: tuple[list[Any], list[Any]] = ([], [])  # of each kind, those that reach the current one
    for span in sorted(spans):
        start, _, kind, i = span
        for other_kind in (0,) if kind else (0, 1):
            near[other_kind][:] = [other for other in near[other_kind] if other[1] > start]
            for other in near[other_kind]:
                j = other[3]
                same = same_ok and kind != other_kind and i == j and span[:2] == other[:2]
                if same or not _share_memory(groups[kind][i], groups[other_kind][j]):
                    continue
                if kind == other_kind:
                    raise ValueError(
                        f"{op}: {name} must not overlap in memory, got [{min(i, j)}] and [{max(i, j)}] "
                        "in one place; pass each one once"
                    )
                raise ValueError(
                    f"{op}: no input may overlap {name}[{j if kind else i}], which is changed, got one that "
                    "does; pass a clone"
                )
        near[kind].append(span)


def _span(t: Tensor) -> tuple[int, int]:
    """First byte and the one behind the last."""
    start = t.data_ptr()
    if t.is_contiguous():
        return start, start + t.nbytes
    if t.numel() == 0:
        return start, start
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.element_size()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Of tensors whose spans overlap: columns of one matrix have no element in common."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True

    def elements(t: Tensor) -> Tensor:
        found = torch.full((), t.data_ptr())
        for n, s in zip(t.shape, t.stride(), strict=True):
            found = found[..., None] + torch.arange(n) * s * t.element_size()
        return found.reshape(-1)

    return bool(torch.isin(elements(a), elements(b)).any())
