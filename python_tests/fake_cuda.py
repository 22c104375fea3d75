"""Fake CUDA tensors, and what the host would wait for: device mistakes are found without a GPU.

Inside `fake_cuda()` tensors have shapes, types and a device, "cuda" included, and no contents; torch
raises where an operation gets tensors of two devices, as it does on a GPU. Reading a number of a tensor,
and copying between host and GPU, makes the host wait; both are noted, with the line of this package that
asked for it, and the number read is made up.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bayes_kernels
from bayes_kernels import _library

CUDA = torch.device("cuda", 0)  # with its number, which nobody can ask a device for here
_MODE = FakeTensorMode()  # one for all: what has been made in one cannot enter another
_PACKAGE = Path(bayes_kernels.__file__).parent
_TORCH = Path(torch.__file__).parent
_CUDA_TYPE, _META_TYPE, _TYPES = 1, 14, 20  # of c10::DeviceType


class Wait(NamedTuple):
    """Something that the host waits for: what, and the line of the package that asked for it."""

    what: str
    where: str


def _caller() -> str:
    """file:line in the package that called torch or a test's replacement of it; "" of others."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if _TORCH not in path.parents and path != Path(__file__):
            own = _PACKAGE in path.parents
            return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno}" if own else ""
        frame = frame.f_back
    return ""


class _Copies(TorchDispatchMode):
    """Notes the copies between host and GPU that are not asked to go on in the background."""

    def __init__(self, waits: list[Wait]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            late = (kwargs or {}).get("non_blocking", False) or (name == "copy_" and any(args[2:3]))
            if source.device.type != result.device.type and not late:
                what = f"{source.device.type} to {result.device.type}"
                self.waits.append(Wait(what, _caller()))
        return result


@contextlib.contextmanager
def _guard() -> Iterator[None]:
    """Let autograd record CUDA tensors where torch is built without CUDA.

    FakeTensorMode does that where CUDA is built in and no GPU is there. Without CUDA there is no
    device guard for it to replace, so its place gets the one of meta tensors, which does nothing.
    """
    if torch.version.cuda is not None:
        yield
        return
    name = "_ZN3c104impl26device_guard_impl_registryE"
    folder = Path(torch.__file__).parent / "lib"
    try:
        library = ctypes.CDLL(str(folder / "libc10.so"))
        registry = (ctypes.c_void_p * _TYPES).in_dll(library, name)
    except (OSError, ValueError):
        pytest.skip("this build of torch does not show its device guards")
    if not registry[_META_TYPE]:
        pytest.skip("this build of torch has no device guard for meta tensors")
    before = registry[_CUDA_TYPE]
    registry[_CUDA_TYPE] = registry[_META_TYPE]
    try:
        yield
    finally:
        registry[_CUDA_TYPE] = before


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """What `Module.to` does, with new parameters: torch's own way refuses fake ones."""
    for child in module.children() if recurse else ():
        child._apply(function)
    with torch.no_grad():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = nn.Parameter(function(old), old.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else function(buffer)
    return module


def _address(tensor: Tensor) -> int:
    """Of tensors that start at the same place the same number: what asks looks for overlaps."""
    offset = tensor.storage_offset() * tensor.element_size()
    return (tensor.untyped_storage()._cdata << 32) + offset


def _deepcopy(tensor: Any, memo: dict[int, Any]) -> Any:
    """A copy in the same mode; torch's own way copies the mode as well, and breaks."""
    if id(tensor) not in memo:
        made = tensor.detach().clone()
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if parameter else made
    return memo[id(tensor)]


@contextlib.contextmanager
def fake_cuda() -> Iterator[list[Wait]]:
    """Fake tensors inside; yields the list of waits, which grows."""
    waits: list[Wait] = []

    def made_up(kind: str, value: Any) -> Any:
        def read(self: Tensor) -> Any:
            if self.device.type == "cuda":
                waits.append(Wait(kind, _caller()))
            return value

        return read

    def listed(self: Tensor) -> Any:
        if self.device.type == "cuda":
            waits.append(Wait("tolist", _caller()))
        found: Any = 1 if not self.dtype.is_floating_point else 1.0
        for size in reversed(self.shape):
            found = [found] * size
        return found

    with pytest.MonkeyPatch.context() as patch, _guard():
        patch.setattr(_library, "_has_cuda", lambda: True)
        patch.setattr(FakeTensor, "__bool__", made_up("bool", True), raising=False)
        patch.setattr(FakeTensor, "__int__", made_up("int", 1), raising=False)
        patch.setattr(FakeTensor, "__float__", made_up("float", 1.0), raising=False)
        patch.setattr(FakeTensor, "item", made_up("item", 1.0), raising=False)
        patch.setattr(FakeTensor, "tolist", listed)
        patch.setattr(FakeTensor, "__deepcopy__", _deepcopy)
        patch.setattr(nn.Module, "_apply", _apply)
        patch.setattr(FakeTensor, "data_ptr", _address, raising=False)
        patch.setattr(torch.autograd, "backward", _backward)
        patch.setattr(torch.autograd, "grad", _grad)
        with _MODE, _Copies(waits):
            yield waits


def _backward(outputs: Tensor, grad_tensors: Tensor | None = None, *_: Any, **__: Any) -> None:
    """`outputs.backward()`, node by node: torch's engine needs the streams of a real device.

    Every gradient must have the device and the shape that its node expects.
    """
    root: Any = outputs.grad_fn
    first = torch.ones_like(outputs) if grad_tensors is None else grad_tensors
    waiting: dict[Any, list[Tensor | None]] = {root: [None] * len(root._input_metadata)}
    waiting[root][outputs.output_nr] = first
    with torch.no_grad():
        for node in _order(root):
            grads = waiting.pop(node, None)
            if grads is None:
                continue
            for place, (grad, expected) in enumerate(zip(grads, node._input_metadata, strict=True)):
                shape = tuple(expected.shape)
                if grad is None:  # as the engine does it for functions written in Python
                    if hasattr(node, "saved_tensors"):
                        grads[place] = torch.zeros(
                            shape, dtype=expected.dtype, device=expected.device
                        )
                    continue
                assert grad.device == expected.device, (node, grad.device, expected.device)
                grads[place] = grad.sum_to_size(shape)  # as the engine does it after broadcasting
            if hasattr(node, "variable"):
                variable, grad = node.variable, grads[0]
                assert grad is not None
                variable.grad = grad if variable.grad is None else variable.grad + grad
                continue
            targets = list(node.next_functions)
            if hasattr(node, "saved_tensors"):  # one gradient for each argument, tensors or not
                needed = zip(_tuple(node.apply(*grads)), node.needs_input_grad, strict=True)
                found = [grad for grad, wanted in needed if wanted]
                targets = [target for target in targets if target[0] is not None]
            else:
                found = list(_tuple(node(*grads)))
            for (target, place), grad in zip(targets, found, strict=True):
                if target is not None and grad is not None:
                    places = waiting.setdefault(target, [None] * len(target._input_metadata))
                    before = places[place]
                    places[place] = grad if before is None else before + grad


def _grad(outputs: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` for leaves that are all the graph has."""
    before = [t.grad for t in inputs]
    for t in inputs:
        t.grad = None
    _backward(outputs)
    found = tuple(t.grad for t in inputs)
    for t, grad in zip(inputs, before, strict=True):
        t.grad = grad
    return found


def _tuple(found: Any) -> Sequence[Tensor | None]:
    return found if isinstance(found, tuple) else (found,)


def _order(root: Any) -> list[Any]:
    """Nodes of a graph, each after all that hand it a gradient."""
    found: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            found.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((n, False) for n, _ in node.next_functions if n is not None)
    return found[::-1]
