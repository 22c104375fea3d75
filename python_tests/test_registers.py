"""Registers and occupancy of the CUDA kernels: what is read, what is computed from it, what is saved."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bayes_kernels import _library

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "cuda_benchmarks"
SOURCES = ROOT / "csrc"
REFRESH = "run python cuda_benchmarks/registers.py --save with a library by nvcc"


@pytest.fixture(scope="module")
def registers() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("registers")
    sys.path.remove(str(FOLDER))


# --- what tools print ------------------------------------------------------------------------------

# cuobjdump of CUDA 12.8, of a library by nvcc 13.0; symbols shortened.
USAGE = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]
host = linux
compile_size = 64bit
compressed
identifier = /src/csrc/tall_cuda.cu

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN2bk11gram_kernelILi2ELi1EEEvNS_4ListE:
  REG:80 STACK:8 SHARED:3072 LOCAL:0 CONSTANT[0]:4384 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN2bk15normaliser_kernelENS_9ArgumentsE:
  REG:48 STACK:0 SHARED:0 LOCAL:16 CONSTANT[2]:48 CONSTANT[0]:760 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_120
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z8a_kernelPf:
  REG:10 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:904 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_120
code version = [9,0]
ptxasOptions =
"""

SASS = """
		Function : _Z5firstPf
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
        /*00a0*/                   LDG.E.EF.128 R28, desc[UR12][R16.64] ;   /* 0x0000000c101c7981 */
                                                                            /* 0x000fe2000c1e1d00 */
        /*00b0*/                   STL.128 [R1], R28 ;                      /* 0x0000001c01007387 */
        /*00c0*/              @!P0 STL [R1+0x10], R12 ;                     /* 0x0000100c01007387 */
        /*00d0*/                   LDL.128 R16, [R31+0x20] ;                /* 0x000000001f107983 */
        /*00e0*/               @P0 BRA P1, 0xc0 ;                           /* 0xffffffc000000947 */
        /*00f0*/                   LDL.LU R4, [R1+0x10] ;                   /* 0x0000100001047983 */
        /*0100*/                   BRA 0x120 ;                              /* 0x0000001000007947 */
        /*0110*/                   STL [R1+0x4], R2 ;                       /* 0x0000040201007387 */
        /*0120*/                   EXIT ;                                   /* 0x000000000000794d */
		Function : _Z6secondPf
        /*0040*/                   LDL.LU R4, [R1+0x4] ;                    /* 0x0000000001047983 */
"""


def test_resource_usage_is_parsed(registers: Any) -> None:
    gram, normaliser, other = registers.parse_usage(USAGE)
    assert (gram.arch, gram.source) == ("sm_90", "/src/csrc/tall_cuda.cu")
    assert gram.symbol == "_ZN2bk11gram_kernelILi2ELi1EEEvNS_4ListE"
    assert {"REG": 80, "STACK": 8, "SHARED": 3072, "CONSTANT[0]": 4384}.items() <= (
        gram.figures.items()
    )
    assert normaliser.figures["LOCAL"] == 16
    assert normaliser.figures["CONSTANT[0]"] == 760
    assert (other.arch, other.source) == ("sm_120", "")
    assert registers.parse_usage("") == []


@pytest.mark.parametrize(
    ("full", "name", "arguments"),
    [
        ("void bk::(anonymous namespace)::up_kernel<c10::Half, 4, true>(bk::UpArgs)", "up_kernel",
         ["Half", "4", "true"]),
        ("bk::(anonymous namespace)::total_kernel(double const*, long, double*)", "total_kernel", []),
        ("void bk::value_kernel<float>(bk::List<float, 3>)", "value_kernel", ["float"]),
        ("void k<(int)16, (bool)1>(float*)", "k", ["16", "1"]),
    ],
)  # fmt: skip
def test_functions_without_namespaces(
    registers: Any, full: str, name: str, arguments: list[str]
) -> None:
    assert registers.parse_function(full) == (name, arguments)


def test_accesses_to_local_memory(registers: Any) -> None:
    """Loads, stores, those without a fixed place on the stack, those before a branch back to them."""
    assert registers.local_accesses(SASS) == {
        "_Z5firstPf": registers.Accesses(loads=2, stores=3, indexed=1, in_loops=2),
        "_Z6secondPf": registers.Accesses(loads=1, stores=0, indexed=0, in_loops=0),
    }


def made_cubin(attributes: dict[str, bytes]) -> bytes:
    """An ELF file of 64 bits with nothing but the sections of these names."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in [*attributes, ".shstrtab"])
    data, sections = b"", [(0, 0, 0)]
    for name, content in {**attributes, ".shstrtab": names}.items():
        sections.append((names.index(name.encode() + b"\0"), 64 + len(data), len(content)))
        data += content
    head = bytearray(64)
    struct.pack_into("<Q", head, 0x28, 64 + len(data))
    struct.pack_into("<3H", head, 0x3A, 64, len(sections), len(sections) - 1)
    table = b"".join(struct.pack("<2I4Q2I2Q", n, 0, 0, 0, at, size, 0, 0, 0, 0)
                     for n, at, size in sections)  # fmt: skip
    return bytes(head) + data + table


def test_launch_bounds_of_machine_code(registers: Any) -> None:
    """The product of the block's sizes; other attributes, of all formats, are passed over."""
    other = struct.pack("<BBH", 3, 0x1B, 255) + struct.pack("<BBHI", 4, 0x0A, 4, 5)
    bound = struct.pack("<BBH3I", 4, 5, 12, 32, 4, 2)
    other += struct.pack("<BBH", 4, 0x0B, 16) + struct.pack("<BBH3I", 4, 5, 12, 7, 1, 1)
    cubin = made_cubin({
        ".nv.info": bound, ".nv.info._Zk": other + bound + other, ".text._Zk": bound,
        ".nv.info._Zfree": other,
    })  # fmt: skip
    assert registers.launch_bounds(cubin) == {"_Zk": 256}


# --- what sources say ------------------------------------------------------------------------------


def texts(registers: Any) -> dict[str, str]:
    """The text of each family's CUDA file and its headers."""
    return {
        path.stem.removesuffix("_cuda"): "\n".join(
            part.read_text() for part in registers.included(path)
        )
        for path in SOURCES.glob("*_cuda.cu")
    }


def test_template_parameters_and_dynamic_shared_memory(registers: Any) -> None:
    found = texts(registers)
    assert set(found) == set(registers.FAMILIES)
    parameters = registers.source_parameters(found["adapter"])
    assert parameters["down_mma_kernel"] == ["T", "R", "kFlip"]
    assert len(registers.source_parameters(found["tall"])["gram_kernel"]) == 2
    assert "gram_kernel" not in registers.source_parameters(found["curvature"])
    assert registers.launched_with_dynamic(found["adapter"]) == set()
    assert registers.launched_with_dynamic(found["tall"]) == {
        "combine_kernel", "solve_kernel", "refine_kernel",
    }  # fmt: skip


def test_sources_are_all_that_is_included(registers: Any, tmp_path: Path) -> None:
    """Headers of headers count, the emulator does not, and neither does the place."""
    names = {path.name for path in registers.included(SOURCES / "adapter_cuda.cu")}
    assert {"adapter_cuda.cu", "adapter_mma.cuh", "cuda_portable.h", "philox.h"} <= names
    assert "simt.h" not in names
    assert "adapter_cpu.cpp" not in names
    shutil.copytree(SOURCES, tmp_path / "csrc")
    copy = tmp_path / "csrc" / "adapter_cuda.cu"
    before = registers.digest(registers.included(SOURCES / "adapter_cuda.cu"))
    assert registers.digest(registers.included(copy)) == before
    with (copy.parent / "core" / "philox.h").open("a") as file:
        file.write("\n")
    assert registers.digest(registers.included(copy)) != before


# --- occupancy -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "threads", "used", "shared", "blocks", "limit"),
    [  # by cuda_occupancy.h of CUDA 13.0
        (80, 256, 32, 0, 8, "threads"),
        (90, 128, 161, 0, 3, "registers"),
        (90, 128, 168, 0, 3, "registers"),
        (90, 128, 169, 0, 2, "registers"),
        (90, 32, 216, 0, 8, "registers"),
        (90, 64, 32, 0, 32, "threads"),
        (90, 32, 64, 0, 32, "registers"),
        (90, 32, 16, 0, 32, "blocks"),
        (80, 128, 40, 8608, 12, "registers"),
        (80, 256, 64, 33808, 4, "registers"),
        (80, 128, 32, 33808, 4, "shared memory"),
        (90, 128, 32, 33808, 6, "shared memory"),
        (120, 128, 32, 33808, 2, "shared memory"),
        (120, 256, 40, 0, 6, "threads"),
        (100, 1024, 64, 0, 1, "registers"),
        (100, 1024, 65, 0, 0, "registers"),
        (90, 288, 168, 0, 1, "registers"),
        (90, 288, 200, 0, 0, "registers"),
    ],
)
def test_occupancy(
    registers: Any, arch: int, threads: int, used: int, shared: int, blocks: int, limit: str
) -> None:
    limits = registers.LIMITS[arch]
    found = registers.occupancy(limits, threads, used, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == blocks * threads / limits.threads


# --- the saved rows --------------------------------------------------------------------------------


def test_rows_are_of_the_kernels_in_the_sources(registers: Any) -> None:
    """Each once, all kernels of all families, and every one can be launched."""
    rows = registers.read_rows()
    assert "sm_90" in {row.arch for row in rows}
    assert len({row.identity for row in rows}) == len(rows)
    pattern = r"__global__ void(?:\s*__launch_bounds__\((?:[^()]|\([^()]*\))*\))?\s*(\w+)\("
    kernels = {
        (family, name)
        for family, text in texts(registers).items()
        for name in re.findall(pattern, text)
    }
    for arch in {row.arch for row in rows}:
        assert {(row.family, row.name) for row in rows if row.arch == arch} == kernels, REFRESH
    for row in rows:
        assert row.environment["nvcc"]
        assert re.fullmatch(r"[0-9a-f]{12}", row.environment["sources"])
        assert row.occupancy is None or row.occupancy.blocks > 0, row.label
    assert {row.name for row in rows if row.occupancy is None} == {"fold_in_kernel"}


def test_local_memory_is_used_where_it_is_known_only(registers: Any) -> None:
    rows = registers.read_rows()
    known = registers.LOCAL_MEMORY
    for row in rows:
        most, _ = known.get((row.family, row.name), (0, ""))
        assert row.stack <= most, (
            f"{row.arch} {row.family} {row.label} uses {row.stack} bytes of local memory, allowed {most}: "
            "keep it in registers, or say in registers.LOCAL_MEMORY why not"
        )
        assert row.stack or not (row.loads or row.stores)
    for family, name in known:
        used = max(row.stack for row in rows if (row.family, row.name) == (family, name))
        assert used == known[family, name][0], f"{family} {name}: at most {used} bytes now"


def test_the_page_is_what_the_rows_give(registers: Any) -> None:
    assert registers.page(registers.read_rows()) == registers.PAGE.read_text(), (
        "docs/registers.md is not what the rows give; run python cuda_benchmarks/registers.py --page"
    )


def made(module: Any, /, **changes: Any) -> Any:
    values = {"arch": "sm_90", "family": "adapter", "name": "k", "arguments": {"T": "Half", "R": "8"},
              "threads": 128, "registers": 120, "stack": 0, "shared": 0, "constant": 600,
              "loads": 0, "stores": 0, "indexed": 0, "in_loops": 0,
              "environment": {"nvcc": "13.0.88", "sources": "0" * 12}}  # fmt: skip
    return module.Kernel(**{**values, **changes})


def test_the_page_of_made_rows(registers: Any) -> None:
    """Types are merged, ranges shown, local memory listed one by one; + marks an upper bound."""
    rows = [
        made(registers),
        made(registers, arguments={"T": "BFloat16", "R": "8"}, registers=121, dynamic=True),
        made(registers, arguments={"T": "Half", "R": "16"}, registers=255, stack=24, loads=6,
             stores=5, indexed=0, in_loops=4),
        made(registers, arch="sm_120", registers=136),
    ]  # fmt: skip
    lines = registers.page(rows).splitlines()
    assert (
        "| adapter | `k` | 3 | 128 | 120 to 255 | 0 to 24 | 0 | 2 to 4 | 12.5 % to 25 % | registers |"
        in lines
    )
    assert "| adapter | `k T=Half R=16` | spilled registers | 24 | 6 | 5 | 4 |" in lines
    (merged,) = (line for line in lines if line.startswith("| `k T=* R=8`"))
    assert merged == "| `k T=* R=8` | 120 to 121, 25 % | 136, 25 % |"
    assert lines.index("## sm_90") < lines.index("## sm_120")
    dynamic = registers.page([made(registers, dynamic=True)])
    assert "`k` +" in dynamic
    array = registers.page([made(registers, stack=256, loads=16, stores=16, indexed=4, in_loops=8)])
    assert "| array | 256 | 16 | 16 | 8 |" in array


def test_rows_are_written_whole(
    registers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [made(registers), made(registers, arch="sm_120")]
    paths = registers.save_rows(rows, tmp_path / "registers")
    assert [path.name for path in paths] == ["sm_90.jsonl", "sm_120.jsonl"]
    registers.save_rows([made(registers, registers=7)], tmp_path / "registers")
    assert registers.read_rows(tmp_path / "registers") == [made(registers, registers=7), rows[1]]

    def full(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(registers.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        registers.save_rows([made(registers, registers=9)], tmp_path / "registers")
    assert registers.read_rows(tmp_path / "registers")[0].registers == 7
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(p.name for p in paths)


# --- regressions -----------------------------------------------------------------------------------


def test_what_counts_as_more(registers: Any) -> None:
    saved = [made(registers)]

    def grown(**changes: Any) -> list[str]:
        return registers.grown([made(registers, **changes)], saved)

    assert grown() == []
    assert grown(registers=100) == []
    assert grown(registers=128, stack=16) == []  # a unit more, the same four blocks
    (found,) = grown(registers=129)
    assert "129 registers, 120 saved; 3 resident blocks (registers), 4 saved" in found
    (found,) = grown(stack=17)
    assert "17 bytes of local memory, 0 saved" in found
    (found,) = grown(shared=60 << 10)
    assert "3 resident blocks (shared memory), 4 saved" in found
    (found,) = grown(arguments={"T": "Half", "R": "9"})
    assert "not among the saved rows" in found


def test_only_the_same_compiler_is_compared(registers: Any) -> None:
    ours, newer = made(registers), {"nvcc": "14.0.1", "sources": ""}
    assert registers.comparable([ours], [ours]) == ([ours], [])
    kept, reasons = registers.comparable([replace(ours, environment=newer)], [ours])
    assert (kept, reasons) == ([], ["sm_90: not compared, nvcc 14.0.1 here, 13.0.88 saved"])
    kept, reasons = registers.comparable([replace(ours, arch="sm_80")], [ours])
    assert (kept, reasons) == ([], ["sm_80: not compared, no rows are saved"])


@pytest.fixture
def cuobjdump(registers: Any) -> Path:
    tool = registers.find_cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    return tool


def test_the_built_kernels_take_no_more_than_the_saved_ones(
    registers: Any, cuobjdump: Path
) -> None:
    library = _library.find_library(registers.LIBRARY)
    if library is None:
        pytest.skip(f"{registers.LIBRARY} is not built")
    try:
        rows = registers.read_library(library, cuobjdump, disassemble=False)
    except registers.NotRead as problem:
        pytest.skip(str(problem))
    saved = registers.read_rows()
    kept, reasons = registers.comparable(rows, saved)
    if not kept:
        pytest.skip("; ".join(reasons))
    worse = registers.grown(kept, saved)
    assert not worse, "\n".join([*worse, f"if that is meant, {REFRESH}"])


SOURCE = """
#include "near.h"
namespace n {
template <class T, int kCount>
__global__ void __launch_bounds__(96, 2) first_kernel(T* x, int i) {
  __shared__ T tile[100];
  T kept[16];
#pragma unroll 1
  for (int j = 0; j < 16; ++j) kept[(i * j) & 15] = x[j];
  tile[threadIdx.x] = kept[i & 15] + kCount;
  __syncthreads();
  x[threadIdx.x] = tile[95 - threadIdx.x];
}
__global__ void free_kernel(float* x) { x[threadIdx.x] = 1; }
}
void launch(float* x) {
  BK_LAUNCH((n::first_kernel<float, 3>), 1, 96, 0, 0, x, 1);
  BK_LAUNCH(n::free_kernel, 1, 32, sizes(1, 2), 0, x);
}
"""


def test_a_library_from_its_source_to_its_rows(
    registers: Any, cuobjdump: Path, tmp_path: Path
) -> None:
    """What nvcc compiles comes back as it was written."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    source, library = tmp_path / "made_cuda.cu", tmp_path / "made.so"
    source.write_text(SOURCE)
    launch = "#define BK_LAUNCH(k, g, b, d, s, ...) k<<<g, b, d>>>(__VA_ARGS__)\n"
    (tmp_path / "near.h").write_text(
        f"{launch}inline int sizes(int a, int b) {{ return a + b; }}\n"
    )
    command = ["nvcc", "-shared", "-lineinfo", "-arch=sm_90", "-cudart=none", "-Xcompiler=-fPIC"]
    built = subprocess.run(
        [*command, str(source), "-o", str(library)], capture_output=True, text=True
    )
    if built.returncode != 0:
        pytest.skip(f"nvcc does not compile for sm_90: {built.stderr[-200:]}")
    first, free = registers.read_library(library, cuobjdump)
    assert first.identity == ("sm_90", "made", "first_kernel", "T=float", "kCount=3")
    assert (first.threads, first.shared, first.stack, first.dynamic) == (96, 400, 64, False)
    assert (free.name, free.threads, free.stack, free.dynamic) == ("free_kernel", None, 0, True)
    assert free.occupancy is None
    assert first.occupancy.blocks == 21
    assert first.environment["sources"] == registers.digest([source, tmp_path / "near.h"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", first.environment["nvcc"])
    if first.loads is not None:
        assert first.loads >= 1
        assert first.indexed >= 1
        assert 1 <= first.in_loops <= first.loads + first.stores
    later = library.stat().st_mtime + 1
    os.utime(tmp_path / "near.h", (later, later))  # changed since
    assert registers.read_library(library, cuobjdump)[0].environment["sources"] == ""
    source.unlink()
    unnamed = registers.read_library(library, cuobjdump)[0]
    assert (unnamed.environment["sources"], unnamed.label) == ("", "first_kernel 0=float 1=3")


# --- command line ----------------------------------------------------------------------------------


def test_mistakes_are_one_line(
    registers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    def says(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            registers.main(arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    tool = tmp_path / "cuobjdump"
    tool.write_text("#!/bin/sh\necho \"File '$2' does not contain device code\" >&2\nexit 255\n")
    tool.chmod(0o755)
    library = tmp_path / registers.LIBRARY
    library.write_bytes(b"")
    named = ("--library", str(library), "--cuobjdump", str(tool))
    assert "--family must name some of noise, adapter" in says("--family", "adopter")
    assert "has no CUDA code; build it with BAYES_KERNELS_CUDA=ON" in says(*named)
    assert "gone.so is not a file" in says("--library", "gone.so", "--cuobjdump", str(tool))
    tool.write_text("#!/bin/sh\necho a >&2\necho 'unknown option' >&2\nexit 1\n")
    assert "cuobjdump failed: unknown option" in says(*named)
    monkeypatch.setattr(registers, "find_cuobjdump", lambda: None)
    assert "cuobjdump was not found" in says("--library", str(library))
    unknown = made(registers, environment={"nvcc": "13.0.88", "sources": ""})
    monkeypatch.setattr(registers, "read_library", lambda *_, **__: [unknown])
    monkeypatch.setattr(registers, "save_rows", lambda *_: pytest.fail("rows were saved"))
    assert "--save needs the sources" in says(*named, "--save")


def test_check_says_what_grew(
    registers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    now = [made(registers)]
    monkeypatch.setattr(registers, "read_library", lambda *_, **__: now)
    monkeypatch.setattr(registers, "read_rows", lambda: [made(registers)])
    arguments = ["--library", str(tmp_path), "--cuobjdump", str(tmp_path), "--check"]
    assert registers.main(arguments) == 0
    assert "no kernel takes more than the saved rows" in capsys.readouterr().out
    now[:] = [made(registers, registers=160)]
    assert registers.main(arguments) == 1
    assert "160 registers, 120 saved" in capsys.readouterr().out


def test_where_cuobjdump_is_looked_for(
    registers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PATH before CUDA_HOME."""
    for name in ("path", "home"):
        tool = tmp_path / name / "bin" / "cuobjdump"
        tool.parent.mkdir(parents=True)
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert registers.find_cuobjdump() == tmp_path / "home" / "bin" / "cuobjdump"
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    assert registers.find_cuobjdump() == tmp_path / "path" / "bin" / "cuobjdump"
