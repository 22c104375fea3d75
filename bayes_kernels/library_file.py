"""Where the compiled library is, and what was compiled, read out of its file without torch."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import sys
from pathlib import Path

LIBRARY = "libbayes_kernels.so"
EMULATOR = "libbayes_kernels_sim.so"

CURE = (
    "reinstall with `pip install --no-build-isolation .` in the source tree, or set "
    f"BAYES_KERNELS_LIBRARY to the folder that holds {LIBRARY}"
)

# As csrc/library.cpp writes it.
_COMPILED = re.compile(rb'\{"version": "[^{}\0]{1,1000}\}')
_FIELDS = {"version", "torch_target", "compiler", "cuda", "cuda_architectures"}


def _folders() -> list[Path]:
    """Where libraries are looked for: a named folder, else every folder of this package.

    In editable installs the Python files and the built library lie in different folders, both of
    which are in the package's `__path__`.
    """
    named = os.environ.get("BAYES_KERNELS_LIBRARY")
    if named:
        return [Path(named)]
    return [Path(p) for p in sys.modules[__name__.partition(".")[0]].__path__]


def find_library(name: str) -> Path | None:
    """The path of `name` (a file name) in the searched folders, or None."""
    for folder in _folders():
        if (folder / name).is_file():
            return folder / name
    return None


def not_found(name: str) -> str:
    """What to say where `find_library` finds nothing."""
    named = " (BAYES_KERNELS_LIBRARY)" if os.environ.get("BAYES_KERNELS_LIBRARY") else ""
    return f"{name} was not found in {', '.join(str(f) for f in _folders())}{named}"


def read_build_info(path: Path) -> dict[str, str]:
    """What was compiled into a library: `bayes_kernels.build_info()` without `cpu_path`.

    The library is not loaded, so whether it can be is not known.

    Raises:
        ValueError: the file is no library of this package, or is not whole.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        needed = _needed_bytes(file.read(64))
        if needed > size:
            raise ValueError(f"{path}: expected {needed:,} bytes by its own header, got {size:,}")
        if needed:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                # Compilers may put pieces of the text elsewhere, too.
                for match in _COMPILED.finditer(content):
                    with contextlib.suppress(ValueError):
                        info = json.loads(match.group())
                        if info.keys() >= _FIELDS:
                            return info
    raise ValueError(
        f"{path}: expected a library of this release of bayes_kernels, got a file that does not say "
        "what was compiled (another file, or an older or damaged library)"
    )


def _needed_bytes(header: bytes) -> int:
    """How long an ELF file of 64 bits must be, from its first 64 bytes; 0 for any other file.

    Its table of sections comes last: a copy that broke off lacks it.
    """
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return 0
    start, length, count = (
        int.from_bytes(header[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62))
    )
    return max(64, start + length * count)
