"""Loads the compiled ops, registers their fake kernels, and says which devices have kernels.

The library is looked for in the package's folders or, where the environment variable
BAYES_KERNELS_LIBRARY names a folder, only there. Importing the package never fails because of it: without
the library, and on devices that have no kernels, ops run as their definitions, with one warning.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from .library_file import CURE, EMULATOR, LIBRARY, find_library, not_found

F = TypeVar("F", bound=Callable[..., Any])

MAX_FUSED_RANK = 64
MAX_FUSED_CLASSES = 32  # with a full covariance; variances alone have no limit

# The emulator that tests load; python_tests/csrc/traffic.py takes the one that counts bytes.
simulator_library = EMULATOR

ADVICE = f"{CURE}; `python -m bayes_kernels` prints a diagnosis"


def _load(name: str) -> str | None:
    """Load one library; the text of the problem, or None when it is loaded."""
    path = find_library(name)
    if path is None:
        return not_found(name)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} could not be loaded: {error}"
    return None


class _Missing:
    """Stands for the op namespace when the library is not loaded: raises at first use."""

    def __init__(self, problem: str) -> None:
        self._problem = problem

    def __getattr__(self, name: str) -> Any:
        raise ImportError(
            f"bayes_kernels: the compiled ops are not available: {self._problem}; {ADVICE}"
        )


problem = _load(LIBRARY)
ops: Any = torch.ops.bayes_kernels if problem is None else _Missing(problem)

_fakes: dict[str, Callable[..., Any]] = {}
# Of the libraries that are loaded; each op has its fake kernel in all of them, whichever came first.
_namespaces = ["bayes_kernels"] if problem is None else []


def fake(op: str) -> Callable[[F], F]:
    """Decorator: the fake kernel of an op, which gives the shapes and dtypes of its results.

    It stands beside the op's functions and takes the arguments of the schema in csrc/ops.cpp.
    """

    def register(kernel: F) -> F:
        _fakes[op] = kernel
        for namespace in _namespaces:
            _register_fake(namespace, op)
        return kernel

    return register


def _register_fake(namespace: str, op: str) -> None:
    # A library that was built from older sources may lack the op.
    if hasattr(getattr(torch.ops, namespace), op):
        torch.library.register_fake(f"{namespace}::{op}", _fakes[op])


@lru_cache(maxsize=1)
def load_simulator() -> Any:
    """The ops compiled against the host emulator of CUDA, or None where that was not built."""
    if _load(simulator_library) is not None:
        return None
    _namespaces.append("bayes_kernels_sim")
    for op in _fakes:
        _register_fake("bayes_kernels_sim", op)
    return torch.ops.bayes_kernels_sim


@contextlib.contextmanager
def simulator() -> Iterator[None]:
    """Route `bayes_kernels.functional` through the emulated CUDA kernels (tests only)."""
    global ops
    simulated = load_simulator()
    if simulated is None:
        raise ImportError("the emulator library is not built; build with BAYES_KERNELS_TESTS=ON")
    previous, ops = ops, simulated
    try:
        yield
    finally:
        ops = previous


def build_info() -> dict[str, str]:
    """What was compiled into the library: version, CUDA version and architectures, CPU path.

    Raises:
        ImportError: the library is not loaded; the text says why and what to do.
    """
    return json.loads(ops.build_info())


def constant_when_traced(function: Callable[..., Any]) -> None:
    """Let torch.compile call `function` while it traces, and take the result as a constant.

    What torch.compiler.assume_constant_result does, without importing torch._dynamo for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_kernels(t: Tensor) -> bool:
    """Whether a kernel takes tensors of the device and dtype of `t`; else its caller runs the definition.

    One warning for each reason why none does names the cure; with BAYES_KERNELS_STRICT=1 in the
    environment that is an error.

    Raises:
        ImportError, ValueError, TypeError: there is no kernel, and BAYES_KERNELS_STRICT=1.
    """
    if t.is_cpu and problem is None:
        return True
    device = t.device
    return _served(device.type, device.index, t.dtype == torch.float64)


_told: set[str] = set()
_with_kernels: set[tuple[str, int]] = set()  # GPUs: asked for at every call of an op


def _served(device: str, index: int | None, double: bool) -> bool:
    if not double and (device, index) in _with_kernels:
        return True
    lack = lack_of_kernels(device, index, double)
    if lack is None:
        if index is not None and _capability(index) is not None:  # not for code that is only traced
            _with_kernels.add((device, index))
        return True
    error, reason = lack
    if os.environ.get("BAYES_KERNELS_STRICT") == "1":
        raise error(f"bayes_kernels: {reason}")
    if reason not in _told:
        _told.add(reason)
        warnings.warn(
            f"bayes_kernels: {reason}; until then ops run as plain PyTorch, slower and with the same "
            "numbers (BAYES_KERNELS_STRICT=1 makes this an error)",
            stacklevel=3,
        )
    return False


constant_when_traced(_served)


def lack_of_kernels(
    device: str, index: int | None = None, double: bool = False
) -> tuple[type[Exception], str] | None:
    """Why no kernel takes fp32 (with `double`, fp64) tensors there, with the cure; None where one does.

    Args:
        device: "cpu", "cuda", "mps", ...
        index: which device of that type; None for the current one.

    Returns:
        The error that BAYES_KERNELS_STRICT=1 raises, and its text.
    """
    if problem is not None:
        return ImportError, f"the compiled ops are not available: {problem}; {ADVICE}"
    if device == "cpu":
        return None
    if device != "cuda":
        return ValueError, (
            f"there are no kernels for {device} devices; move model and data to the CPU or to an NVIDIA "
            "GPU, which have them"
        )
    if torch.version.hip is not None:
        return ValueError, "there are no kernels for AMD GPUs; move model and data to the CPU"
    if not _has_cuda():
        return ValueError, (
            "this build has no CUDA kernels; reinstall with BAYES_KERNELS_CUDA=ON and nvcc on the PATH"
        )
    capability = _capability(index)
    if capability is not None and not _has_image(capability):
        major, minor = capability
        cure = f"reinstall with BAYES_KERNELS_CUDA_ARCHITECTURES={major}{minor}-real"
        if major < 8:
            cure = "kernels need sm_80 or later; move model and data to the CPU or a newer GPU"
        compiled = build_info()["cuda_architectures"]
        return ValueError, (
            f"the GPU is sm_{major}{minor}, and CUDA kernels were compiled for {compiled}; {cure}"
        )
    if double:
        return TypeError, "float64 has kernels on the CPU only; convert to float32, or use the CPU"
    return None


def has_double(device: torch.device) -> bool:
    """Whether fp64 tensors can be on the device: MPS has none, and some XPUs have none."""
    return device.type not in _WITHOUT_DOUBLE


_WITHOUT_DOUBLE = {"mps", "xpu"}


@lru_cache(maxsize=1)
def _has_cuda() -> bool:
    return bool(build_info()["cuda"])


def _capability(index: int | None) -> tuple[int, int] | None:
    """Of a GPU; None where there is none, as when code is traced for another machine."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


def _has_image(capability: tuple[int, int]) -> bool:
    """Whether one of the compiled architectures runs there, as code of the GPU's or as PTX.

    Code for x.y runs on x.z with z >= y, PTX on every later GPU; with the letter "a" on x.y only.
    """
    major, minor = capability
    compiled = build_info()["cuda_architectures"]
    for number, letter, kind in re.findall(r"(\d+)([af]?)(?:-(real|virtual))?", compiled):
        own = divmod(int(number), 10)
        if own == capability or (letter != "a" and own[0] == major and own[1] <= minor):
            return True
        if not letter and kind != "real" and own <= capability:
            return True
    return False
