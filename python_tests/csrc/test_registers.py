"""What the CUDA kernels take, by the compiler: the saved rows, their page, and a library built here."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bayes_kernels import _library

ROOT = Path(__file__).resolve().parents[2]
REFRESH = "build with nvcc, then python cuda_benchmarks/registers.py --save"

USAGE = """
Fatbin elf code:
================
arch = sm_90
identifier = csrc/tall_cuda.cu

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN13bayes_kernels38_GLOBAL__N__5_12_tall_cuda_cu_9c90966d11gram_kernelILi4ELb1EEEvPKf:
  REG:10 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:904 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
arch = sm_90
	Function : _ZN13bayes_kernels38_GLOBAL__N__5_12_tall_cuda_cu_9c90966d11gram_kernelILi4ELb1EEEvPKf
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDG.E.128.STRONG.GPU R8, desc[UR4][R2.64] ;  /* 0x00 */
                                                                                /* 0x00 */
        /*0010*/              @!P0 LDG.E.64 R12, desc[UR4][R2.64+0x10] ;        /* 0x00 */
        /*0020*/                   FADD R8, R11, R12 ;                          /* 0x00 */
        /*0030*/                   LDG.E R20, desc[UR4][R8.64] ;                /* 0x00 */
        /*0040*/                   EXIT ;                                       /* 0x00 */
"""


@pytest.fixture(scope="module")
def registers() -> ModuleType:
    sys.path.insert(0, str(ROOT / "cuda_benchmarks"))
    try:
        import registers as module
    finally:
        sys.path.pop(0)
    return module


def test_what_cuobjdump_prints_is_parsed(registers: ModuleType) -> None:
    (row,) = registers.parse(USAGE, SASS, "13.0")
    assert dataclasses.asdict(row) == {
        "arch": "sm_90", "family": "tall", "name": "gram_kernel", "arguments": "4, true",
        "registers": 10, "local": 8, "shared": 16, "instructions": 5, "in_flight": 24, "nvcc": "13.0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "most"),
    [
        (["LDG.E.128 R4, [R2]", "LDG.E.128 R8, [R2+0x10]", "FADD R1, R4, R8"], 32),
        (["LDG.E.128 R4, [R2]", "FADD R1, R4, R5", "LDG.E.128 R8, [R2]", "FADD R1, R8, R9"], 16),
        (["LDG.E R4, [R2]", "LDG.E R6, [R4]"], 4),  # the second waits for the first
        (["LDG.E R4, [R2]", "MOV R4, RZ", "LDG.E R6, [R2]"], 4),  # as does a write
        (["@P0 LDG.E.U16 R4, [R2]", "BAR.SYNC 0x0", "LDG.E.U16 R5, [R2]"], 4),
        (["LDS.128 R4, [R2]", "STG.E [R2], R4"], 0),
    ],
)
def test_loads_in_flight(registers: ModuleType, code: list[str], most: int) -> None:
    assert registers.in_flight(code) == most


def test_rows_are_of_the_kernels_in_the_sources(registers: ModuleType) -> None:
    rows = registers.read_rows()
    sources = [p for p in (ROOT / "csrc").iterdir() if p.suffix in (".cu", ".cuh")]
    pattern = r"__global__ void(?:\s*__launch_bounds__\((?:[^()]|\([^()]*\))*\))?\s*(\w+)\("
    family = {p: p.stem.split("_")[0] for p in sources}
    kernels = {(family[p], name) for p in sources for name in re.findall(pattern, p.read_text())}
    for arch in {row.arch for row in rows}:
        found = {(r.family, r.name) for r in rows if r.arch == arch}
        # The products of grouped adapters are instances of kernels of the family adapter.
        shared = {(f, name) for f, name in found if f == "grouped" and ("adapter", name) in kernels}
        assert found - shared == kernels, REFRESH


def test_local_memory_is_used_where_it_is_known_only(registers: ModuleType) -> None:
    used: dict[tuple[str, str], int] = {}
    for row in registers.read_rows():
        used[row.family, row.name] = max(used.get((row.family, row.name), 0), row.local)
    assert {kernel: most for kernel, most in used.items() if most} == {
        kernel: most for kernel, (most, _) in registers.LOCAL_MEMORY.items()
    }, "keep it in registers, or say in registers.LOCAL_MEMORY why not"


def test_kernels_that_stream_have_loads_in_flight(registers: ModuleType) -> None:
    rows = registers.read_rows()
    assert registers.STREAMING.keys() <= {(r.family, r.name) for r in rows}
    for row in rows:
        least = registers.STREAMING.get((row.family, row.name), 0)
        assert row.in_flight >= least, f"{row.name}<{row.arguments}>: {row.in_flight} bytes"
        most = registers.SHORT.get((row.family, row.name), row.instructions)
        assert row.instructions <= most, f"{row.name}: {row.instructions} instructions"


def test_the_page_is_what_the_rows_give(registers: ModuleType) -> None:
    assert registers.page(registers.read_rows()) == registers.PAGE.read_text(), REFRESH


def test_what_counts_as_worse(registers: ModuleType) -> None:
    (row,) = registers.parse(USAGE, SASS, "13.0")
    change = dataclasses.replace
    assert registers.worse([row], [row]) == []
    assert registers.worse([change(row, nvcc="13.1", registers=99)], [row]) == []
    for field, value in (("registers", 11), ("local", 9), ("in_flight", 23)):
        (said,) = registers.worse([change(row, **{field: value})], [row])
        assert f"{field} {value}" in said


def test_the_built_kernels_are_no_worse_than_the_saved_ones(registers: ModuleType) -> None:
    library, tool = _library.find_library(registers.LIBRARY), registers.find_cuobjdump()
    if library is None or not _library.build_info()["cuda"]:
        pytest.skip("no CUDA kernels in this build")
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    nvcc, saved, rows = registers.compiler(), registers.read_rows(), []
    built = _library.build_info()["cuda_architectures"]
    for arch in sorted({r.arch for r in saved if r.nvcc == nvcc}):
        if arch.removeprefix("sm_") in re.findall(r"\d+", built):
            rows += registers.read_library(library, tool, nvcc, arch)
    if not rows:
        pytest.skip(f"no rows by nvcc {nvcc} for {built}")
    assert {r.arch for r in rows} <= {r.arch for r in saved}
    worse = registers.worse(rows, saved)
    assert not worse, "\n".join([*worse, f"if that is meant, {REFRESH}"])
