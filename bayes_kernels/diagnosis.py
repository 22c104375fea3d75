"""What is installed: versions, what was compiled, and which path each device takes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path

from . import __version__, library_file

OLDEST_TORCH = "2.11"  # as in pyproject.toml

PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "peft",
    "accelerate",
    "matplotlib",
    "bitsandbytes",
)


def _gpu_name(index: int) -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"


def device_paths() -> list[tuple[str, str]]:
    """Each device that torch sees, and which path its ops take: fused kernels, or plain PyTorch and why."""
    import torch

    from . import _library

    cpu = ""
    if _library.problem is None:
        path = _library.build_info()["cpu_path"]
        cpu = f"fused {path} kernels, {torch.get_num_threads()} threads"
    devices: list[tuple[str, str, int | None, str]] = [("cpu", "cpu", None, "")]
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        devices += [(f"cuda:{i}", "cuda", i, f" on {_gpu_name(i)}") for i in range(count)]
    for kind in ("mps", "xpu"):
        if (torch.backends.mps if kind == "mps" else torch.xpu).is_available():
            devices.append((kind, kind, None, ""))
    found = []
    for name, kind, index, what in devices:
        lack = _library.lack_of_kernels(kind, index)
        path = f"plain PyTorch{what}, slower: {lack[1]}" if lack else f"fused kernels{what}"
        found.append((name, cpu if kind == "cpu" and lack is None else path))
    if len(found) == 1:
        found.append(("cuda", "no GPU that torch can use"))
    return found


def packages() -> str:
    """Versions of this package, of Python and of other packages, as text; imports none of them."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} missing")
    return (
        f"bayes_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        "packages: " + ", ".join(versions)
    )


def compiled() -> str:
    """What was compiled, as text: from the file of the library, which is not loaded. Imports no torch."""
    path = library_file.find_library(library_file.LIBRARY)
    target, problem = OLDEST_TORCH, ""
    if path is None:
        problem = f"NOT FOUND: {library_file.not_found(library_file.LIBRARY)}"
    else:
        try:
            info = library_file.read_build_info(path)
        except (ValueError, OSError) as error:
            problem = f"NOT RECOGNISED: {error}"
    if problem:
        lines = [f"compiled ops: {problem}", f"  what to do: {library_file.CURE}"]
    else:
        lines, target = _compiled(path, info), info["torch_target"]
    return "\n".join(lines + _lack_of_torch(target))


def _compiled(path: Path | None, info: dict[str, str]) -> list[str]:
    lines = [f"compiled ops: {path} ({info['compiler']}, for torch >= {info['torch_target']})"]
    if info["cuda"]:
        lines.append(f"  CUDA {info['cuda']} kernels for {info['cuda_architectures']}")
    else:
        lines.append(
            "  no CUDA kernels (no nvcc at build time, or BAYES_KERNELS_CUDA=OFF); build with "
            "BAYES_KERNELS_CUDA=ON for a GPU"
        )
    if library_file.find_library(library_file.EMULATOR) is not None:
        lines.append("  CUDA kernels on the host emulator (tests)")
    return lines


def _lack_of_torch(target: str) -> list[str]:
    """One line where there is no torch, or one older than the library was compiled for."""
    found = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.version("torch")
    if found is None and importlib.util.find_spec("torch") is not None:
        return []  # without metadata only importing it says which release it is
    if found is not None and _release(found) >= _release(target):
        return []
    return [
        f"torch: expected {target} or later, got {found or 'none'}; run: pip install 'torch>={target}'"
    ]


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def paths() -> str:
    """What was compiled, and which path runs on which device, as text. Imports torch: seconds.

    Raises:
        ImportError: torch is missing, or cannot be loaded.
    """
    import torch

    from . import _library

    lines = [
        f"torch {torch.__version__}"
        + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", without CUDA"),
    ]
    if _library.problem is not None:
        lines.append(f"compiled ops: NOT LOADED: {_library.problem}")
        lines.append(f"  what to do: {_library.ADVICE}")
    else:
        library = library_file.find_library(library_file.LIBRARY)
        lines += _compiled(library, _library.build_info())
    lines += [f"  {name}: {path}" for name, path in device_paths()]
    return "\n".join(lines)


def print_summary() -> None:
    """Print versions and what was compiled, at once: neither torch nor the library is loaded."""
    print(packages())
    print(compiled())
    print(
        "`bayes-kernels info --devices` loads torch and the ops, and says which path each device takes"
    )


def print_diagnosis() -> None:
    """Print versions at once, then what needs torch: what was loaded, and which path each device takes.

    Raises:
        ImportError: torch is missing, or cannot be loaded: what was printed says which packages there are.
    """
    print(packages(), flush=True)
    try:
        found = paths()
    except ImportError as error:
        raise ImportError(
            f"torch: expected a release that can be imported, got: {error}; "
            f"run: pip install 'torch>={OLDEST_TORCH}'"
        ) from error
    print(found)
