"""Regression tests that do not depend on the machine's load: instructions, launches and bytes.

Instructions are those of one call of a CPU kernel on its AVX2 path, which valgrind can run, counted by
callgrind; bounds are 10 % above what g++ 12 gave (`counters.json`; `python -m csrc.test_counters` in
python_tests counts again and writes the file). Launches are those of the CUDA kernels, counted by the
emulator: they are exact, and most do not depend on how many layers there are. Bytes are those that the
CUDA kernels ask of global memory, counted by a second emulator (`traffic.py`) and compared with formulas.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_command

from bayes_kernels import _library, functional, random
from csrc import traffic

PROGRAM = "count_kernels"
BOUNDS = Path(__file__).with_name("counters.json")
HEADROOM = 1.10


def count(program: Path, case: str, out: Path) -> int:
    """Instructions of one case."""
    result = run_command(
        ["valgrind", "--tool=callgrind", "--toggle-collect=counted*",
         f"--callgrind-out-file={out}", str(program), case],
        env={**os.environ, "BAYES_KERNELS_CPU": "avx2"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "avx2", f"path {result.stdout.strip()}"
    found = re.search(r"^summary: (\d+)$", out.read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1))


def names(program: Path) -> list[str]:
    return subprocess.run([str(program)], capture_output=True, text=True).stdout.split()


@pytest.fixture(scope="module")
def program() -> Path:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    path = _library.find_library(PROGRAM)
    if path is None:
        pytest.skip(f"{PROGRAM} is not built; build with BAYES_KERNELS_TESTS=ON")
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or " avx2 " not in cpuinfo.read_text():
        pytest.skip("this processor has no AVX2")
    return path


def test_every_case_has_a_bound(program: Path) -> None:
    assert sorted(json.loads(BOUNDS.read_text())) == sorted(names(program))


@pytest.mark.parametrize("case", sorted(json.loads(BOUNDS.read_text())))
def test_instructions(case: str, program: Path, tmp_path: Path) -> None:
    """At most 10 % more than when the bound was written; far fewer, and the bound should be renewed."""
    bound = json.loads(BOUNDS.read_text())[case]
    got = count(program, case, tmp_path / "callgrind.out")
    assert got <= HEADROOM * bound, (
        f"{case}: {got} instructions, {got / bound - 1:+.1%} against {bound}; if that is meant, run "
        "python python_tests/csrc/test_counters.py"
    )
    assert got > bound / 20, f"{case}: {got} instructions of {bound}: is the kernel called at all?"


# --- launches --------------------------------------------------------------------------------------


@pytest.fixture
def launches() -> Iterator[Callable[[Callable[[], Any]], int]]:
    """Counts the kernels that a call launches on the emulator."""
    if _library.load_simulator() is None:
        pytest.skip("the emulator library is not built")
    path = _library.find_library("libbayes_kernels_sim.so")
    library = ctypes.CDLL(str(path))
    counter = library.bayes_kernels_sim_launches
    counter.restype = ctypes.c_uint64

    def of(step: Callable[[], Any]) -> int:
        before = counter()
        step()
        return counter() - before

    with _library.simulator():
        yield of


def adapter(dtype: torch.dtype, tokens: int, rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    return {
        "x": normal(tokens, 1100).to(dtype).requires_grad_(),
        "a": normal(rank, 1100).requires_grad_(),
        "rho": (0.1 * normal(rank, 1100)).requires_grad_(),
        "b": normal(600, rank).requires_grad_(),
        "base": normal(tokens, 600).to(dtype).requires_grad_(),
    }


@pytest.mark.parametrize("tokens", [3, 40, 200])
@pytest.mark.parametrize("rank", [1, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_launches_of_an_adapter(
    dtype: torch.dtype, rank: int, tokens: int, launches: Callable[[Callable[[], Any]], int]
) -> None:
    """Forward: one launch up to 16 tokens; else two products, with noise its matrix before. Backward: a
    kernel for both products of dy and one for both of x, before each of them at most one launch. fp16 has
    a launch more for each op that takes tensor cores, which finds the largest magnitudes."""
    i = adapter(dtype, tokens, rank)
    key = random.key(1)
    largest = 2 if dtype == torch.float16 and tokens >= 32 else 0
    plain = lambda: functional.lora(i["x"], i["a"], i["b"], i["base"])  # noqa: E731
    noisy = lambda: functional.flipout_lora(i["x"], i["a"], i["rho"], i["b"], i["base"], key=key)  # noqa: E731
    assert launches(plain) == (1 if tokens <= 16 else 2 + largest)
    assert launches(noisy) == (1 if tokens <= 16 else 3 + largest)
    y, z = plain(), noisy()
    assert launches(lambda: y.backward(torch.ones_like(y))) == 3 + largest
    assert launches(lambda: z.backward(torch.ones_like(z))) == 4 + largest


@pytest.mark.parametrize("grad", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_launches_of_adapters_that_share_x(
    tokens: int, grad: bool, launches: Callable[[Callable[[], Any]], int]
) -> None:
    """Up to 8 adapters of few tokens in one launch."""
    i = adapter(torch.bfloat16, tokens, 8)
    key = random.key(1)

    def step(count: int) -> Callable[[], object]:
        lists = ([i[name]] * count for name in ("a", "rho", "b", "base"))
        call = functional.flipout_lora_group
        streams = list(range(count))
        return lambda lists=list(lists): call(i["x"], *lists, key=key, streams=streams)

    with torch.set_grad_enabled(grad):
        assert [launches(step(count)) for count in (1, 3, 8, 9)] == [1, 1, 1, 2]


@pytest.mark.parametrize("tokens", [6, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_of_grouped_adapters(
    dtype: torch.dtype, tokens: int, launches: Callable[[Callable[[], Any]], int]
) -> None:
    """Two products forward and two backward, whatever the number of groups. Before them the sort of rows
    that are not counted, draws or noise, and, with one b for all groups, the tickets of its gradient."""
    i, key = adapter(dtype, tokens, 8), random.key(1)
    x, base, shared = i["x"], i["base"], i["b"]
    a, rho = (i[k].detach().repeat(3, 1, 1).requires_grad_() for k in ("a", "rho"))
    b = shared.detach().repeat(3, 1, 1).requires_grad_()
    counted: dict[str, Any] = {"rows_per_group": tokens // 3}
    given: dict[str, Any] = {"groups": torch.arange(tokens) % 3}
    draws = torch.tensor([0, 1, 5])
    F = functional
    for run, forward, backward in (
        (lambda: F.grouped_lora(x, a, b, base, **counted), 2, 2),
        (lambda: F.grouped_lora(x, a, shared, base, **counted), 2, 3),
        (lambda: F.grouped_lora(x, a, b, base, **given), 3, 2),
        (lambda: F.grouped_flipout_lora(x, a, rho, b, base, key=key, **given), 4, 4),
        (
            lambda: F.sampled_lora(
                x, i["a"], i["rho"], shared, base, key=key, draws=draws, **counted
            ),
            3,
            5,
        ),
    ):
        assert launches(run) == forward
        y = run()
        assert launches(lambda y=y: y.backward(torch.ones_like(y))) == backward


def test_launches_do_not_grow_with_the_list(
    launches: Callable[[Callable[[], Any]], int],
) -> None:
    """Lists of up to 500 matrices (KL: 580) take as many launches as one; those beyond, a round more."""

    def talls(number: int) -> list[torch.Tensor]:
        return [torch.linalg.qr(torch.randn(20, 3))[0].contiguous() for _ in range(number)]

    def kl(number: int) -> int:
        means = [torch.randn(2, 5) for _ in range(number)]
        rhos = [torch.rand(2, 5) + 0.1 for _ in range(number)]
        return launches(lambda: functional.gaussian_kl(means, rhos, 0.2))

    def low_rank(number: int) -> int:
        factors = [torch.rand(12, 2) for _ in range(number)]
        rows = [torch.rand(1, 12) for _ in range(number)]
        return launches(lambda: functional.low_rank_update_(factors, rows))

    def dense(number: int) -> int:
        factors = [torch.zeros(3 + i % 4, 3 + i % 4) for i in range(number)]
        rows = [torch.rand(2, len(f)) for f in factors]
        one = torch.ones((), dtype=torch.float64)
        return launches(lambda: _library.ops.kron_accumulate_(factors, rows, [], one, one))

    def polar(number: int) -> int:
        xs = talls(number)
        return launches(lambda: functional.polar_retract_(xs))

    def landing(number: int) -> int:
        xs = talls(number)
        return launches(lambda: functional.landing_field(xs, [x.clone() for x in xs], 0.5))

    for counted, most in ((kl, 1), (low_rank, 3), (dense, 2), (polar, 3), (landing, 3)):
        few, some, many = counted(2), counted(61), counted(448)
        assert few == some == many, counted.__name__
        assert 0 < few <= most, counted.__name__
    assert kl(580) == 1 and kl(581) == 2  # the sum goes on in the second
    assert dense(501) == 2 * dense(2)
    assert polar(501) == polar(2) + 1  # only the Gram pass takes the list


def test_launches_of_a_prediction(launches: Callable[[Callable[[], Any]], int]) -> None:
    """A constant number, whatever the number of samples."""
    key = random.key(1)
    for classes, most in ((5, 1), (32, 1), (70, 1), (2048, 1), (2049, 4)):
        mean, variance = torch.randn(1, classes), torch.rand(1, classes)

        def step(
            samples: int, mean: torch.Tensor = mean, variance: torch.Tensor = variance
        ) -> object:
            return functional.mc_predict(mean, variance, n_samples=samples, key=key)

        few, many = launches(lambda step=step: step(8)), launches(lambda step=step: step(64))
        assert few == many == most, classes
    # Rows in chunks of a bounded workspace, of 16 KiB on the emulator: 12 bytes and more a class.
    mean, variance = torch.randn(60, 70), torch.rand(60, 70)
    many = launches(lambda: functional.mc_predict(mean, variance, n_samples=8, key=key))
    assert 3 <= many <= 12


# --- bytes -----------------------------------------------------------------------------------------


# Ops, and the sectors of 32 bytes that their requests touch, times 32, over the bytes asked for; one is
# a perfectly coalesced kernel. Factors are read a column at a time, and small.
COALESCED = {
    "normal": 1.10,
    "scaled_normal": 1.10,
    "scaled_normal_backward": 1.10,
    # In fp32 the 8 columns of a thread are two accesses of 16 bytes, 32 apart; the cache joins the halves.
    "quantize_activations": 1.85,
    "dequantize_activations": 1.85,
    "adapter_shrink": 2.6,
    "adapter_shrink_backward": 3.1,
    "adapter_expand": 3.4,
    "adapter_expand_backward": 2.6,
    "adapter_forward": 1.8,
    "adapter_group": 1.8,
    "adapter_backward": 1.8,
    "gaussian_kl": 1.01,
    "gaussian_kl_backward": 1.01,
    "gaussian_kl_step_": 1.01,
    "tall_gram": 1.15,
    "tall_retract_": 1.10,
    "tall_stiefel_step_": 1.15,
    "tall_landing_field": 1.10,
    "mc_predict": 3.0,
    "low_rank_update_": 1.05,
}


@pytest.fixture(scope="module")
def moved() -> dict[str, dict[str, Any]]:
    """All cases of traffic.py, counted in a process of its own."""
    if _library.find_library(traffic.LIBRARY) is None:
        pytest.skip(f"{traffic.LIBRARY} is not built; build with BAYES_KERNELS_TESTS=ON")
    result = run_command([sys.executable, traffic.__file__, "--json"], timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("op", COALESCED)
def test_bytes(op: str, moved: dict[str, dict[str, Any]]) -> None:
    """As many as the design says, within 5 %: an input that is read once more is seen.

    Fewer are as wrong: the formula no longer says what the kernel does.
    """
    cases = {name: row for name, row in moved.items() if name.split()[0] == op}
    assert cases
    for name, row in cases.items():
        design = sum(row["expected"].values())
        terms = ", ".join(f"{reason}: {number:,}" for reason, number in row["expected"].items())
        assert 0.95 * design <= row["bytes"] <= 1.05 * design, (
            f"{name}: {row['bytes']:,} bytes, {row['bytes'] / design:.3f} of {design:,} ({terms}); "
            f"loads and stores of each kernel: {row['kernels']}"
        )
        assert row["bytes"] >= row["least"], name
        assert 32 * row["sectors"] <= COALESCED[op] * row["bytes"], name


def test_bytes_of_caches_and_memory(moved: dict[str, dict[str, Any]]) -> None:
    """What the second-level cache is asked for is what the design says, but for sectors that are not used
    whole (ragged ranks, and stores of two ranks). Memory moves what must move, and fragments that one
    launch writes for the next; partial sums never get there, as they are discarded."""
    cases = {name: row for name, row in moved.items() if row["expected_l2"] is not None}
    assert len(cases) >= 20
    for name, row in cases.items():
        design = sum(row["expected_l2"].values())
        ragged = 0.65 if "r20 float32" in name else 0.15
        assert 0.95 * design <= row["l2"] <= (1 + ragged) * design, name
        assert row["least"] <= row["memory"] <= 1.02 * row["expected_memory"], name


@pytest.mark.parametrize("rank", [8, 16, 32])
def test_bytes_at_the_size_of_a_model(rank: int) -> None:
    """4,096 tokens of 4,096 features: memory moves at most 1.15 of what must move in each op. What the
    second-level cache is asked for is bounded from below by the blocks that fill a GPU (docs/kernels.md);
    it stays within 1.4 of that bound."""
    edge = 4096 / 128**0.5  # tokens, and columns, of a block, of 128 that share the work
    least = {
        "adapter_shrink": 2 * 8**0.5 * rank / edge,
        "adapter_expand": 2 * rank / edge,
        "adapter_expand_backward": 12 * rank / edge,
        "adapter_shrink_backward": 2 * 5.5**0.5 * rank / edge,
    }
    for op, (_, l2, memory) in traffic.over_least(4096, 4096, rank).items():
        assert memory <= 1.15, op
        assert l2 <= 1.4 * (1 + least[op]), op


def test_every_case_of_bytes_is_tested(moved: dict[str, dict[str, Any]]) -> None:
    assert {name.split()[0] for name in moved} == set(COALESCED)


def main() -> None:
    """Count all cases and write the bounds."""
    path = _library.find_library(PROGRAM)
    if path is None:
        sys.exit(f"{PROGRAM} is not built; build with BAYES_KERNELS_TESTS=ON")
    import tempfile

    old = json.loads(BOUNDS.read_text()) if BOUNDS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        found = {case: count(path, case, Path(folder) / "out") for case in names(path)}
    for case, number in found.items():
        change = f"{number / old[case] - 1:+.1%}" if case in old else "new"
        print(f"{case:24} {number:>10,} {change}")
    temporary = BOUNDS.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(temporary, BOUNDS)


if __name__ == "__main__":
    main()
