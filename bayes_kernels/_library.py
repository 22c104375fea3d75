"""Loads the compiled ops, registers their fake kernels, and holds the shared argument checks.

The library is looked for in the package's folders or, where the environment variable
BAYES_KERNELS_LIBRARY names a folder, only there. Importing the package never fails because of it: without
the library, and on devices that have no kernels, ops run as their definitions, with one warning.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_FUSED_RANK = 64
MAX_FUSED_CLASSES = 32  # with a full covariance; variances alone have no limit

# The emulator that tests load; python_tests/csrc/traffic.py takes the one that counts bytes.
simulator_library = "libbayes_kernels_sim.so"

_ADVICE = (
    "reinstall with `pip install --no-build-isolation .` in the source tree, or set "
    "BAYES_KERNELS_LIBRARY to the folder that holds libbayes_kernels.so; "
    "`python -m bayes_kernels` prints a diagnosis"
)


def _folders() -> list[Path]:
    """Where libraries are looked for: a named folder, else every folder of this package.

    In editable installs the Python files and the built library lie in different folders, both of
    which are in the package's `__path__`.
    """
    named = os.environ.get("BAYES_KERNELS_LIBRARY")
    if named:
        return [Path(named)]
    import bayes_kernels

    return [Path(p) for p in bayes_kernels.__path__]


def find_library(name: str) -> Path | None:
    """The path of `name` (a file name) in the searched folders, or None."""
    for folder in _folders():
        if (folder / name).is_file():
            return folder / name
    return None


def _load(name: str) -> str | None:
    """Load one library; the text of the problem, or None when it is loaded."""
    path = find_library(name)
    if path is None:
        return f"{name} was not found in {', '.join(str(f) for f in _folders())}"
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
            f"bayes_kernels: the compiled ops are not available: {self._problem}; {_ADVICE}"
        )


problem: str | None = None
ops: Any = None


def _register_fakes(namespace: str) -> None:
    """Shape logic of every op; the counterpart of the schemas in csrc/ops.cpp."""

    def fake(name: str) -> Callable[[Callable[..., Any]], object]:
        """Register a fake kernel; a library that was built from older sources may lack the op."""
        known = hasattr(getattr(torch.ops, namespace), name.removeprefix(f"{namespace}::"))
        return torch.library.register_fake(name) if known else lambda kernel: kernel

    def acc(t: Tensor) -> torch.dtype:
        return torch.float64 if t.dtype == torch.float64 else torch.float32

    @fake(f"{namespace}::fold_in")
    def _(key: Tensor, data: int) -> Tensor:
        return key.new_empty((2,))

    @fake(f"{namespace}::normal")
    def _(key: Tensor, stream: int, size: Sequence[int]) -> Tensor:
        return key.new_empty(size, dtype=torch.float32)

    @fake(f"{namespace}::sign_bits")
    def _(
        key: Tensor,
        stream: int,
        output: bool,
        rows: int,
        columns: int,
        row0: int,
        rows_per_id: int,
        ids: Tensor | None,
    ) -> Tensor:
        return key.new_empty((rows, columns), dtype=torch.int8)

    @fake(f"{namespace}::dropout_mask")
    def _(key: Tensor, stream: int, rows: int, columns: int, row0: int, p: float) -> Tensor:
        return key.new_empty((rows, columns), dtype=torch.bool)

    @fake(f"{namespace}::scaled_normal")
    def _(rho: Tensor, n: int, key: Tensor, stream: int, std: str) -> Tensor:
        return rho.new_empty((rho.shape[0], n))

    @fake(f"{namespace}::scaled_normal_backward")
    def _(de: Tensor, rho: Tensor, key: Tensor, stream: int, std: str) -> Tensor:
        return rho.new_empty(rho.shape)

    @fake(f"{namespace}::adapter_shrink")
    def _(
        x: Tensor,
        a: Tensor,
        e: Tensor | None,
        key: Tensor | None,
        stream: int,
        row0: int,
        rows_per_id: int,
        ids: Tensor | None,
        dropout: float,
    ) -> Tensor:
        torch._check(x.dim() == 2 and a.dim() == 2, lambda: "adapter_shrink: x and a must be 2-D")
        return x.new_empty((x.shape[0], a.shape[0]), dtype=acc(x))

    @fake(f"{namespace}::adapter_shrink_backward")
    def _(
        dh: Tensor,
        x: Tensor,
        a: Tensor,
        e: Tensor | None,
        key: Tensor | None,
        stream: int,
        row0: int,
        rows_per_id: int,
        ids: Tensor | None,
        dropout: float,
        need_dx: bool,
        need_da: bool,
        need_de: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_de = need_de and e is not None
        return (
            x.new_empty(tuple(x.shape) if need_dx else (0, 0)),
            x.new_empty(tuple(a.shape) if need_da else (0, 0), dtype=acc(x)),
            x.new_empty(tuple(a.shape) if need_de else (0, 0), dtype=acc(x)),
        )

    @fake(f"{namespace}::adapter_expand")
    def _(h: Tensor, b: Tensor, base: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
        return h.new_empty((h.shape[0], b.shape[0]), dtype=dtype)

    @fake(f"{namespace}::adapter_forward")
    def _(
        x: Tensor,
        a: Tensor,
        rho: Tensor | None,
        b: Tensor,
        base: Tensor | None,
        key: Tensor | None,
        stream: int,
        row0: int,
        rows_per_id: int,
        ids: Tensor | None,
        dropout: float,
        std: str,
        scaling: float,
        keep_draw: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = x.dtype if base is None else base.dtype
        tokens = math.prod(x.shape[:-1])
        return (
            x.new_empty((*x.shape[:-1], b.shape[0]), dtype=dtype),
            x.new_empty((tokens, a.shape[0]), dtype=acc(x)),
        )

    @fake(f"{namespace}::adapter_backward")
    def _(
        dy: Tensor,
        x: Tensor,
        a: Tensor,
        rho: Tensor | None,
        b: Tensor,
        h: Tensor,
        key: Tensor | None,
        stream: int,
        row0: int,
        rows_per_id: int,
        ids: Tensor | None,
        dropout: float,
        std: str,
        scaling: float,
        need_dx: bool,
        need_da: bool,
        need_drho: bool,
        need_db: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        nothing = (0, 0)
        drho = nothing if rho is None or not need_drho else tuple(rho.shape)
        return (
            x.new_empty(tuple(x.shape) if need_dx else nothing),
            x.new_empty(tuple(a.shape) if need_da else nothing, dtype=acc(x)),
            x.new_empty(drho, dtype=acc(x)),
            x.new_empty(tuple(b.shape) if need_db else nothing, dtype=acc(x)),
        )

    @fake(f"{namespace}::adapter_expand_backward")
    def _(
        dy: Tensor, h: Tensor, b: Tensor, scaling: float, need_dh: bool, need_db: bool
    ) -> tuple[Tensor, Tensor]:
        return (
            h.new_empty(tuple(h.shape) if need_dh else (0, 0)),
            h.new_empty(tuple(b.shape) if need_db else (0, 0)),
        )

    @fake(f"{namespace}::gaussian_kl")
    def _(
        means: Sequence[Tensor],
        rhos: Sequence[Tensor],
        prior_std: Sequence[float],
        std: str,
        direction: str,
    ) -> Tensor:
        return means[0].new_empty((), dtype=torch.float64)

    @fake(f"{namespace}::gaussian_kl_backward")
    def _(
        weight: Tensor,
        means: Sequence[Tensor],
        rhos: Sequence[Tensor],
        prior_std: Sequence[float],
        std: str,
        direction: str,
    ) -> tuple[list[Tensor], list[Tensor]]:
        return [torch.empty_like(m) for m in means], [torch.empty_like(r) for r in rhos]

    @fake(f"{namespace}::gaussian_kl_step_")
    def _(
        means: Sequence[Tensor],
        rhos: Sequence[Tensor],
        weight: Tensor,
        prior_std: Sequence[float],
        std: str,
        direction: str,
    ) -> None:
        return None

    @fake(f"{namespace}::mc_predict")
    def _(
        mean: Tensor,
        cov: Tensor,
        key: Tensor,
        stream: int,
        row0: int,
        ids: Tensor | None,
        n_samples: int,
        antithetic: bool,
        standard_error: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = mean.shape[0]
        return (
            mean.new_empty(mean.shape),
            mean.new_empty((rows,)),
            mean.new_empty((rows,)),
            mean.new_empty(mean.shape if standard_error else (0, 0)),
        )

    @fake(f"{namespace}::low_rank_update_")
    def _(factors: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        return None

    @fake(f"{namespace}::kron_accumulate_")
    def _(
        factors: Sequence[Tensor],
        rows: Sequence[Tensor],
        masks: Sequence[Tensor],
        beta: Tensor,
        alpha: Tensor,
    ) -> None:
        return None

    @fake(f"{namespace}::tall_gram")
    def _(xs: Sequence[Tensor]) -> list[Tensor]:
        return [x.new_empty((x.shape[1], x.shape[1])) for x in xs]

    @fake(f"{namespace}::tall_pair_gram")
    def _(xs: Sequence[Tensor], gs: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        def grams() -> list[Tensor]:
            return [x.new_empty((x.shape[1], x.shape[1])) for x in xs]

        return grams(), grams(), grams()

    @fake(f"{namespace}::tall_retract_")
    def _(xs: Sequence[Tensor], steps: Sequence[Tensor], retraction: str) -> Tensor:
        return xs[0].new_empty((len(xs),), dtype=torch.int32)

    @fake(f"{namespace}::tall_stiefel_step_")
    def _(
        xs: Sequence[Tensor], directions: Sequence[Tensor], lr: Tensor, retraction: str
    ) -> Tensor:
        return xs[0].new_empty((len(xs),), dtype=torch.int32)

    @fake(f"{namespace}::tall_landing_field")
    def _(xs: Sequence[Tensor], grads: Sequence[Tensor], lam: Tensor) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in xs]

    @fake(f"{namespace}::tall_landing_step_")
    def _(xs: Sequence[Tensor], grads: Sequence[Tensor], lr: Tensor, lam: Tensor) -> None:
        return None


def _initialise() -> None:
    global ops, problem
    problem = _load("libbayes_kernels.so")
    if problem is None:
        _register_fakes("bayes_kernels")
        ops = torch.ops.bayes_kernels
    else:
        ops = _Missing(problem)


@lru_cache(maxsize=1)
def load_simulator() -> Any:
    """The ops compiled against the host emulator of CUDA, or None where that was not built."""
    if _load(simulator_library) is not None:
        return None
    _register_fakes("bayes_kernels_sim")
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
    device = t.device
    if device.type == "cpu" and problem is None:
        return True
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
        return ImportError, f"the compiled ops are not available: {problem}; {_ADVICE}"
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


_initialise()
