"""Where a run takes place: versions, machine, peak memory, progress bars.

Peak memory is ``torch.cuda.max_memory_allocated`` on a GPU; on Linux it is the high-water mark of
the resident memory of the whole process (libraries and model included), reset before each
measurement through ``/proc/self/clear_refs``; elsewhere the high-water mark since the process
began, which only rises.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..hf.tasks.adapters import pick_device


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    from bayes_kernels import __version__

    found["bayes_kernels"] = __version__
    for name in ("torch", "transformers", "peft", "accelerate", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """Platform, cores, threads and GPU, and how peak memory is measured."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "peak_memory": memory_measure(),
    }


# --- GPUs ----------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """A GPU that runs may use.

    Attributes:
        name: As CUDA_VISIBLE_DEVICES has it.
        free, total: Bytes of its memory.
    """

    name: str
    free: int
    total: int


def gpus(device: str | None) -> list[Gpu]:
    """The GPUs of a device's name; none for the CPU.

    Raises:
        ValueError: There is no such device.
    """
    if pick_device(device).type != "cuda":
        return []
    gc.collect()
    torch.cuda.empty_cache()  # of this process, which only looks on
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",") if name.strip()]
    names = names[:count] if len(names) >= count else [str(i) for i in range(count)]
    return [Gpu(name, *torch.cuda.mem_get_info(i)) for i, name in enumerate(names)]


# --- Peak memory ---------------------------------------------------------------------------------


@functools.cache
def memory_measure() -> str:
    """How peak memory is measured here, see the module's docstring."""
    if torch.cuda.is_available():
        return "cuda allocated"
    return "resident, reset" if _reset_high_water() else "resident, since start"


class _PeakMemory:
    """Peak memory since the object was made, in MiB, after `stop`."""

    mib = math.nan

    def __init__(self, collect: bool) -> None:
        if collect:
            gc.collect()
        if memory_measure() == "cuda allocated":
            torch.cuda.reset_peak_memory_stats()
        elif memory_measure() == "resident, reset":
            # Freed memory that the allocator still holds would count as used.
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            _reset_high_water()

    def stop(self) -> None:
        if memory_measure() == "cuda allocated":
            self.mib = torch.cuda.max_memory_allocated() / 2**20
        elif memory_measure() == "resident, reset":
            self.mib = _status_kib("VmHWM") / 2**10
        else:
            with contextlib.suppress(ImportError):
                import resource

                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                self.mib = peak / (2**20 if sys.platform == "darwin" else 2**10)


@contextlib.contextmanager
def peak_memory(collect: bool = True) -> Iterator[_PeakMemory]:
    """Measures what is done inside; `mib` of what it gives has the result afterwards.

    Args:
        collect: Whether to collect garbage before, which takes a tenth of a second and more.
    """
    peak = _PeakMemory(collect)
    try:
        yield peak
    finally:
        peak.stop()


def _reset_high_water() -> bool:
    """Reset VmHWM of this process to its present size (Linux only)."""
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
        return _status_kib("VmHWM") > 0
    except OSError:
        return False


def _status_kib(name: str) -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as stream:
        for line in stream:
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0
