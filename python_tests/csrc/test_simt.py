"""The host emulator of the CUDA block model (csrc/simt): right kernels run right, planted faults
are caught.

The same kernels (csrc/testing/simt_kernels.cu) are built four ways: plainly; with every access to
shared memory checked (-fsanitize=thread instrumentation, csrc/simt/access_check.cpp); under the
address and undefined-behaviour sanitizers; and with the ucontext fallback of the fiber switch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from programs import run_command

CSRC = Path(__file__).resolve().parents[2] / "csrc"

_run = partial(run_command, timeout=300)

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def torch_include() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        pytest.skip("torch's headers are not installed")
    return Path(spec.origin).parent / "include"


def compile_all(commands: list[list[str]]) -> None:
    """Run independent compiler commands two at a time; the first failure is shown in full."""
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(_run, commands):
            assert result.returncode == 0, " ".join(result.args) + "\n" + result.stderr


@pytest.fixture(scope="session")
def compiler() -> list[str]:
    cxx = os.environ.get("CXX") or shutil.which("g++")
    if cxx is None:
        pytest.skip("no g++ and no CXX: the emulator's test program cannot be compiled")
    warnings = ["-Wall", "-Wextra", "-Wshadow", "-Werror"]
    include = ["-isystem", str(torch_include())]
    return [cxx, "-std=c++17", "-fPIC", "-DBAYES_KERNELS_SIM", *warnings, *include]


@pytest.fixture(scope="session")
def builds(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("simt")

    def compile_to(name: str, source: str, *flags: str) -> list[str]:
        language = ["-x", "c++"] if source.endswith(".cu") else []
        target = ["-c", str(CSRC / source), "-o", str(out / name)]
        return [*compiler, *flags, *language, *target]

    # No debug information and little optimisation: the programs run for milliseconds.
    compile_all(
        [
            compile_to("main.o", "testing/simt_main.cpp", "-O0"),
            compile_to("simt_asan.o", "simt/simt.cpp", "-O0", "-fsanitize=address"),
            compile_to("simt.o", "simt/simt.cpp", "-O0"),
            compile_to("simt_ucontext.o", "simt/simt.cpp", "-O0", "-DBAYES_KERNELS_SIM_UCONTEXT"),
            compile_to("kernels_asan.o", "testing/simt_kernels.cu", "-O0", "-g1", *SANITIZERS),
            compile_to("kernels.o", "testing/simt_kernels.cu", "-O1"),
            compile_to("kernels_checked.o", "testing/simt_kernels.cu", "-O0", "-fsanitize=thread"),
            compile_to("access_check.o", "simt/access_check.cpp", "-O0"),
        ]
    )
    objects = {
        "plain": ["main.o", "simt.o", "kernels.o"],
        "checked": ["main.o", "simt.o", "kernels_checked.o", "access_check.o"],
        "asan": ["main.o", "simt_asan.o", "kernels_asan.o"],
        "ucontext": ["main.o", "simt_ucontext.o", "kernels.o"],
    }
    compile_all(
        [
            [compiler[0], *(str(out / o) for o in names), "-pthread", "-o", str(out / build)]
            + (SANITIZERS if build == "asan" else [])
            for build, names in objects.items()
        ]
        + [[compiler[0], "-shared", str(out / "simt.o"), "-o", str(out / "libsimt.so")]]
    )
    return {build: out / build for build in objects} | {"library": out / "libsimt.so"}


def run_case(program: Path, case: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BAYES_KERNELS_SIM")}
    # Sanitizer run times must not inherit a preloaded library or someone else's options.
    for name in ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS"):
        clean.pop(name, None)
    return _run([str(program), case], env=clean | environment)


RIGHT = [
    "gram",
    "block_sum",
    "warp_operations",
    "matmul_bf16",
    "matmul_fp16",
    "fp16_conversion",
    "copy_async",
    "early_return",
    "warp_private_exchange",
    "block_counter",
    "last_block_sum",
    "transpose_registers",
    "grid_of_three_dimensions",
    "block_of_any_size",
    "intrinsics",
    "large_shared_memory",
    "recovery",
    "host_threads",
]


@pytest.mark.parametrize("build", ["plain", "checked", "asan", "ucontext"])
def test_right_kernels(builds: dict[str, Path], build: str) -> None:
    """Results against plain loops, the same bits in every order and with every poison byte."""
    for case in RIGHT:
        result = run_case(builds[build], case)
        assert result.returncode == 0, f"{case}: {result.stderr}"


# What the emulator finds in any build, and the words that must be in its one line.
CAUGHT = {
    "no_barrier_before_use": ["race", "forward order", "reverse order"],
    "no_barrier_after_use": ["race", "forward order", "reverse order"],
    "copy_no_barrier": ["race"],
    "short_fill": ["uninitialised read", "poison byte"],
    "uninitialised_shared_read": ["uninitialised read", "poison byte"],
    "copy_no_wait": ["uninitialised read", "poison byte"],
    "copy_wait_too_few": ["uninitialised read", "poison byte"],
    "copy_no_commit": ["copy_async_kernel", "thread (24,0,0)", "still in flight"],
    "ticket_one_too_early": ["race", "forward order", "reverse order"],
    "divergent_barrier": [
        "kernel divergent_barrier_kernel, block (0,0,0), thread (40,0,0)",
        "divergent barrier",
        "simt_kernels.cu:",
    ],
    "divergent_shuffle": [
        "kernel divergent_shuffle_kernel, block (0,0,0), thread (0,0,0)",
        "deadlock: __shfl_xor_sync",
        "waits for lane 16, which has returned",
    ],
    "shuffle_outside_mask": ["thread (16,0,0)", "not in its mask 0x0000ffff"],
    "shuffle_from_idle_lane": ["thread (15,0,0)", "reads from lane 16"],
    "mixed_warp_operations": ["different operations", "__ballot_sync", "__shfl_xor_sync"],
    "misaligned_ldmatrix": ["ldmatrix", "16-byte aligned"],
    "shared_store_above": ["store beyond the end of values (128 bytes"],
    "shared_store_below": ["store beyond the end of", "below the start of the array after it"],
    "dynamic_shared_store_above": ["store beyond the end of the dynamic shared memory (128 bytes"],
    "dynamic_shared_store_below": ["store below the start of the dynamic shared memory"],
    "global_store_guarded": ["out-of-bounds global store 4 bytes below the start"],
    "too_much_shared_memory": ["50176 bytes", "49152", "bk_set_max_dynamic_smem"],
    "empty_grid": ["block_sum_kernel", "a grid must have", "(0,1,1)"],
}


@pytest.mark.parametrize("case", CAUGHT)
def test_planted_fault_is_caught(builds: dict[str, Path], case: str) -> None:
    result = run_case(builds["plain"], case)
    assert result.returncode == 1
    assert result.stderr.startswith("simt: ") and result.stderr.count("\n") == 1
    for words in CAUGHT[case]:
        assert words in result.stderr


# What the access check says of the same kernels, from one forward run.
CAUGHT_AT_THE_ACCESS = {
    "no_barrier_before_use": ["gram_kernel", "thread (0,0,0)", "uninitialised read", "of tile"],
    "no_barrier_after_use": ["gram_kernel", "race: it stores to", "of tile", "no barrier between"],
    "short_fill": ["thread (15,15,0)", "uninitialised read"],
    "uninitialised_shared_read": ["thread (31,0,0)", "uninitialised read of byte 128 of values"],
    "copy_no_wait": ["uninitialised read", "of buffer"],
    "copy_no_barrier": ["uninitialised read", "of buffer"],
    "shared_store_above": ["thread (5,0,0)", "out-of-bounds store"],
    "shared_store_below": ["thread (5,0,0)", "out-of-bounds store"],
    "dynamic_shared_store_above": ["thread (5,0,0)", "out-of-bounds store"],
    "ticket_no_fence": ["last_block_sum_kernel", "no __threadfence before its atomic operation"],
    "ticket_fence_too_late": ["last_block_sum_kernel", "no __threadfence before its atomic"],
    "ticket_no_fence_of_the_last": ["no atomic operation and __threadfence of its own block"],
}


@pytest.mark.parametrize("case", CAUGHT_AT_THE_ACCESS)
def test_access_check_names_the_thread(builds: dict[str, Path], case: str) -> None:
    result = run_case(builds["checked"], case)
    assert result.returncode == 1
    for words in CAUGHT_AT_THE_ACCESS[case]:
        assert words in result.stderr


# What a sanitizer stops at the access, with the source line.
CAUGHT_BY_SANITIZERS = {
    "global_store": "AddressSanitizer: heap-buffer-overflow",
    "dynamic_shared_store_above": "AddressSanitizer: use-after-poison",
    "dynamic_shared_store_below": "AddressSanitizer: use-after-poison",
    "shared_store_above": "index 32 out of bounds",
    "shared_store_below": "index -1 out of bounds",
}


@pytest.mark.parametrize("case", CAUGHT_BY_SANITIZERS)
def test_sanitizers_stop_at_the_access(builds: dict[str, Path], case: str) -> None:
    result = run_case(builds["asan"], case)
    assert result.returncode != 0
    assert CAUGHT_BY_SANITIZERS[case] in result.stderr
    assert "simt_kernels.cu:" in result.stderr


@pytest.mark.parametrize("build", ["asan", "ucontext"])
@pytest.mark.parametrize("case", ["divergent_barrier", "divergent_shuffle", "no_barrier_after_use"])
def test_faults_in_the_other_builds(builds: dict[str, Path], build: str, case: str) -> None:
    result = run_case(builds[build], case)
    assert result.returncode == 1
    assert CAUGHT[case][0] in result.stderr


def test_environment_sets_order_seed_and_poison(builds: dict[str, Path]) -> None:
    assert run_case(builds["plain"], "print_settings").stdout == "0 1 255\n"
    chosen = {
        "BAYES_KERNELS_SIM_ORDER": "random",
        "BAYES_KERNELS_SIM_SEED": "42",
        "BAYES_KERNELS_SIM_POISON": "0x3c",
    }
    assert run_case(builds["plain"], "print_settings", **chosen).stdout == "2 42 60\n"
    result = run_case(builds["plain"], "intrinsics", BAYES_KERNELS_SIM_ORDER="sideways")
    assert result.returncode == 1
    assert "must be forward, reverse or random, got sideways" in result.stderr


def test_settings_through_the_library(builds: dict[str, Path]) -> None:
    library = ctypes.CDLL(str(builds["library"]))
    library.bayes_kernels_sim_set_seed.argtypes = [ctypes.c_uint64]
    library.bayes_kernels_sim_get_seed.restype = ctypes.c_uint64
    library.bayes_kernels_sim_set_poison.argtypes = [ctypes.c_uint8]
    library.bayes_kernels_sim_get_poison.restype = ctypes.c_uint8
    for order in (2, 1, 0):
        assert library.bayes_kernels_sim_set_order(order) == 0
        assert library.bayes_kernels_sim_get_order() == order
    for order in (-1, 3):
        assert library.bayes_kernels_sim_set_order(order) == -1
        assert library.bayes_kernels_sim_get_order() == 0
    library.bayes_kernels_sim_set_seed(2**63 + 5)
    assert library.bayes_kernels_sim_get_seed() == 2**63 + 5
    library.bayes_kernels_sim_set_poison(0x7F)
    assert library.bayes_kernels_sim_get_poison() == 0x7F
    assert library.bayes_kernels_sim_set_max_shared_bytes(101376) == 0
    assert library.bayes_kernels_sim_set_max_shared_bytes(232449) == -1


def test_nvcc_compiles_the_same_kernels(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    target = tmp_path / "kernels.o"
    architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    # -O0 concerns the host only; ptxas does without optimisation too.
    flags = ["-std=c++17", "-Xptxas=-O0", "-Werror=all-warnings", "-isystem", str(torch_include())]
    source = str(CSRC / "testing" / "simt_kernels.cu")
    command = [nvcc, *architectures, *flags, "-c", source, "-o", str(target)]
    result = _run(command)
    assert result.returncode == 0, result.stderr
    assert target.stat().st_size > 0
