"""`python -m bayes_kernels` prints a diagnosis; with arguments it is the command line."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

OPTIONAL = (
    "numpy",
    "transformers",
    "peft",
    "accelerate",
    "torchmetrics",
    "matplotlib",
    "bitsandbytes",
)


def _gpu_name(index: int) -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"


def diagnosis() -> str:
    """Versions, what was compiled, and which path runs on which device, as text."""
    import torch

    from . import __version__, _library

    lines = [
        f"bayes_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__}"
        + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", without CUDA"),
    ]
    if _library.problem is not None:
        lines.append(f"compiled ops: NOT LOADED: {_library.problem}")
        lines.append(f"  what to do: {_library._ADVICE}")
    else:
        info = _library.build_info()
        lines.append(
            f"compiled ops: {_library.find_library('libbayes_kernels.so')} "
            f"({info['compiler']}, for torch >= {info['torch_target']})"
        )
        lines.append(f"  cpu : {info['cpu_path']} kernels, {torch.get_num_threads()} threads")
        if not info["cuda"]:
            lines.append("  cuda: not compiled (no nvcc at build time, or BAYES_KERNELS_CUDA=OFF)")
        else:
            compiled = f"compiled with CUDA {info['cuda']} for {info['cuda_architectures']}"
            if torch.cuda.is_available():
                names = ", ".join(_gpu_name(i) for i in range(torch.cuda.device_count()))
                lines.append(f"  cuda: fused kernels on {names}; {compiled}")
            else:
                lines.append(f"  cuda: {compiled}; no GPU that torch can use")
        if _library.find_library("libbayes_kernels_sim.so") is not None:
            lines.append("  sim : CUDA kernels on the host emulator (tests)")
    versions = []
    for name in OPTIONAL:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} missing")
    lines.append("packages: " + ", ".join(versions))
    return "\n".join(lines)


def main() -> None:
    """Diagnosis without arguments, the command line with some."""
    if len(sys.argv) == 1:
        print(diagnosis())
        return
    from .cli import main as cli

    cli()


if __name__ == "__main__":
    main()
