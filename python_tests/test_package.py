"""The installed package: what importing it costs and needs, what the binary depends on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from programs import python
from tools import check_wheel, cpu_paths

import bayes_kernels as bk
from bayes_kernels import _library


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def library() -> str:
    path = _library.find_library("libbayes_kernels.so")
    assert path is not None
    return str(path)


def test_importing_the_package_imports_nothing_else():
    code = (
        "import sys, bayes_kernels\n"
        "heavy = ['torch', 'numpy', 'transformers', 'peft', 'matplotlib', 'torchmetrics', 'typer']\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert python(code).stdout.strip() == "[]"


def test_modules_and_names_are_there_at_first_use():
    """As attributes of the package; the ops of torch are registered with the first of them."""
    code = (
        "import sys, torch, bayes_kernels as bk\n"
        "assert not hasattr(torch.ops.bayes_kernels, 'tall_gram')\n"
        "import bayes_kernels.functional\n"
        "assert torch.ops.bayes_kernels.tall_gram\n"
        "assert not {'transformers', 'peft', 'matplotlib', 'torchmetrics'} & {*sys.modules}\n"
        "assert {*bk.__all__} <= {*dir(bk)} and bk.functional.lora and bk.build_info()\n"
        "from bayes_kernels import *\n"
        "print([bk.optim, bk.random, optim, random][2:] == [bk.optim, bk.random], predict)"
    )
    ended = python(code)
    assert ended.stdout.startswith("True <function predict"), ended.stderr
    with pytest.raises(AttributeError, match="has no attribute 'functionals'"):
        _ = bk.functionals


def test_binary_uses_the_stable_abi_only():
    """Undefined symbols: C shims of libtorch and the C/C++ runtime; nothing unstable, no Python."""
    symbols = [
        line.split()[-1] for line in tool("nm", "-D", "--undefined-only", library()).splitlines()
    ]
    ours = {s.split("@")[0] for s in symbols}
    assert any(s.startswith("aoti_torch_") for s in ours)
    unstable = [s for s in ours if re.match(r"_Z\w*(2at|3c10|5torch|5caffe2)", s)]
    assert unstable == []
    assert [s for s in ours if s.startswith(("Py", "_Py"))] == []
    assert [s for s in ours if "cuda_stream" in s or s.startswith("torch_c10_cuda")] == []


def test_binary_needs_no_cuda_and_no_python_library():
    dynamic = tool("readelf", "-d", library())
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    forbidden = (
        "libtorch_cuda",
        "libcudart",
        "libpython",
        "libc10",
        "libtorch_python",
        "libtorch.so",
    )
    assert [n for n in needed if n.startswith(forbidden)] == []
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic


def test_binary_loads_where_torch_does():
    """Versions of C and C++ symbols: at most those of manylinux_2_28, and others are noticed."""
    tool("readelf", "--version")
    compiler = bk.build_info()["compiler"]
    if os.uname().machine != "x86_64" or int(re.findall(r"gcc (\d+)", compiler)[0]) > 12:
        pytest.skip("symbols of newer compilers and other machines are for `make wheel` to name")
    found = check_wheel.versions(Path(library()))
    assert any(v.startswith("GLIBC_2") for v in found) and any("GLIBCXX" in v for v in found)
    assert check_wheel.too_new(found) == []
    newer = {"GLIBC_2.29", "GLIBC_2.34", "GLIBCXX_3.4.29", "CXXABI_1.3.13", "OTHER_1.0"}
    assert check_wheel.too_new(found | newer) == sorted(newer)


def test_the_library_asks_no_newer_glibc_than_torch():
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if os.uname().machine != "x86_64" or not torch_library.is_file():
        pytest.skip("torch has no such library here")
    tool("readelf", "--version")

    def newest(path: Path) -> list[int]:
        found = check_wheel.versions(path)
        numbers = (v.removeprefix("GLIBC_").split(".") for v in found if v.startswith("GLIBC_2"))
        return max([int(part) for part in number] for number in numbers)

    if newest(torch_library) > [2, 28]:
        pytest.skip("a torch that was built here")
    assert newest(Path(library())) <= newest(torch_library)


@pytest.mark.parametrize("threads", [False, True])
def test_an_exception_of_the_library_is_an_error_in_python(threads: bool):
    """With its text, from whatever thread, and as often as it is thrown."""

    def provoke() -> None:
        for _ in range(50):
            with pytest.raises(RuntimeError, match=r"bayes_kernels::tall_gram: .*must be tall"):
                torch.ops.bayes_kernels.tall_gram([torch.zeros(2, 3)])

    assert library()
    bk.functional.gram(torch.zeros(3, 2))  # loads it
    if not threads:
        provoke()
        return
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(provoke) for _ in range(4)]:
            future.result()


def test_binary_exports_no_symbol_of_ours():
    exported = tool("nm", "-D", "--defined-only", "-C", library())
    assert "bayes_kernels::shrink" not in exported


def test_every_cpu_kernel_is_tested_on_every_path():
    sources = cpu_paths.TESTS.parent.glob("csrc/*_cpu.cpp")
    families = {path.name.removesuffix("_cpu.cpp").replace("noise", "random") for path in sources}
    assert families <= {path.stem.removeprefix("test_") for path in cpu_paths.FILES} and families
    assert all(path.is_file() for path in cpu_paths.FILES)


def test_unknown_names_raise_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bk.nothing  # noqa: B018


def test_portable_kernels_compile_for_arm():
    """What depends on the processor, with the portable path only; where the cross compiler is."""
    import torch

    sources = ["adapter_cpu", "predict_cpu", "cpu_dispatch", "library", "old_symbols"]
    folder = Path(__file__).resolve().parent.parent / "csrc"
    for name in sources:
        tool(
            *"aarch64-linux-gnu-g++ -std=c++17 -fvisibility=hidden -fsyntax-only".split(),
            *("-Wall", "-Wextra", "-Werror"),
            *("-isystem", str(Path(torch.__file__).parent / "include"), "-I", str(folder)),
            *("-DBK_ISA=baseline", '-DBK_VERSION="0"', "-DTORCH_TARGET_VERSION=0x020b000000000000"),
            str(folder / f"{name}.cpp"),
        )
