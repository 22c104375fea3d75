"""The script for a GPU machine, its smoke program, and what becomes of its results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bayes_kernels import _library
from bayes_kernels import functional as F

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cuda_benchmarks" / "gpu.sh"
STEPS = ["load", "smoke", "graphs", "tests", "rows", "counters", "sanitize", "steps"]

# Stands in for python: notes what it is asked, and fails where its arguments have a word of FAIL in them.
STUB = """#!/usr/bin/env bash
case "$*" in
*util*|*platform*|*cuda.is_available*) exit 0 ;;
esac
echo "$*" >>"$NOTES"
for word in $FAIL; do [[ "$*" == *"$word"* ]] && exit 3; done
exit 0
"""
TOOL = """#!/usr/bin/env bash
echo "$0 $*" >>"$NOTES"
[[ "$*" != *"$FAIL_TOOL"* ]]
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., tuple[int, str, list[str]]]:
    """Runs gpu.sh with the stub; returns its exit code, summary and what python was asked since."""
    stub, notes = tmp_path / "python", tmp_path / "notes"
    stub.write_text(STUB)
    stub.chmod(0o755)
    for tool in ("ncu", "compute-sanitizer"):
        (tmp_path / tool).write_text(TOOL)
        (tmp_path / tool).chmod(0o755)

    def run(**given: str) -> tuple[int, str, list[str]]:
        notes.write_text("")
        environment = {**os.environ, "PYTHON": str(stub), "OUT": str(tmp_path / "out"),
                       "STATE": str(tmp_path / "state"), "NOTES": str(notes), "FAIL": "",
                       "FAIL_TOOL": "nothing", "LIBRARY": str(tmp_path / "library"),
                       "PATH": f"{tmp_path}:{os.environ['PATH']}",
                       "BAYES_KERNELS_COMMIT": "abc1234", **given}  # fmt: skip
        done = subprocess.run(
            ["bash", str(SCRIPT)], env=environment, capture_output=True, text=True
        )
        summary = tmp_path / "out" / "summary.txt"
        return (
            done.returncode,
            (summary.read_text() if summary.exists() else "") + done.stderr,
            notes.read_text().splitlines(),
        )

    return run


def test_the_plan_runs_in_its_order(script: Any, tmp_path: Path) -> None:
    code, summary, asked = script()
    assert code == 0, summary
    said = [line.split(":")[0] for line in summary.splitlines() if "passed in" in line]
    assert list(dict.fromkeys(said)) == STEPS
    assert [
        line
        for line in asked
        if "smoke.py" in line and "--watched" not in line and "--counters" not in line
    ]
    assert [c for c in ("memcheck", "racecheck", "initcheck", "synccheck") if f"  {c}: 0" in summary] == [
        "memcheck", "racecheck", "initcheck", "synccheck"]  # fmt: skip
    assert any("test_cuda_graphs.py" in line and "-n 8" in line for line in asked)
    watched = [line for line in asked if "compute-sanitizer" in line]
    assert len(watched) == 4 and all("--small --watched" in line for line in watched)
    assert [line for line in watched if "kns=bayes_kernels" not in line] == [
        line for line in watched if "initcheck" in line
    ]
    assert [line for line in watched if "--report-api-errors no" in line] == [
        line for line in watched if "memcheck" in line
    ]
    assert any("test_adapter.py" in line and "--device cuda" in line for line in asked)
    assert any("end_to_end" in line and "7B" in line for line in asked)
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files <= {"summary.txt", "smoke.jsonl", "counters.csv", "evidence.tar.gz"}
    with tarfile.open(tmp_path / "out" / "evidence.tar.gz") as archive:
        assert "logs/smoke.log" in archive.getnames()


def test_the_plan_fits_a_command() -> None:
    text = SCRIPT.read_text()
    budgets = text[text.index("BUDGET=(") :].split(")")[0]
    seconds = [int(word.split("=")[-1]) for word in budgets.split("[")[1:]]
    assert len(seconds) == len(STEPS) and sum(seconds) <= 600
    assert "LIMIT:-565" in text


def test_a_step_that_fails_does_not_stop_the_others_and_is_repeated(script: Any) -> None:
    code, summary, asked = script(FAIL="test_adapter", FAIL_TOOL="racecheck")
    assert code == 3
    assert "tests: FAILED with 3" in summary and "rows: passed" in summary
    assert "  racecheck: 1" in summary and "  synccheck: 0" in summary
    code, summary, asked = script(PART="again")
    assert code == 0
    assert any("test_adapter.py" in line for line in asked)
    assert any("memcheck" in line for line in asked)
    assert not any("test_cuda_graphs" in line or "end_to_end" in line for line in asked)
    code, _, asked = script(PART="rows")
    assert code == 0 and not any("pytest" in line for line in asked)


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"PART": "nonsense"}, 2, "PART must be all, again or some of load smoke"),
        ({"LIMIT": "3"}, 124, "no time was left"),
        ({"FAIL": "bayes_kernels"}, 1, "load: FAILED with 1"),
    ],
)
def test_what_goes_wrong_is_said(script: Any, given: dict[str, str], code: int, said: str) -> None:
    found, summary, _ = script(**given)
    assert found == code and said in summary


def test_a_library_that_does_not_load_is_compiled_for_this_gpu(script: Any, tmp_path: Path) -> None:
    (tmp_path / "cmake").write_text(
        '#!/usr/bin/env bash\necho "cmake for $BAYES_KERNELS_CUDA_ARCHITECTURES: $*" >>"$NOTES"\nexit 1\n'
    )
    (tmp_path / "cmake").chmod(0o755)
    code, summary, asked = script(FAIL="bayes_kernels", BAYES_KERNELS_CUDA_ARCHITECTURES="all")
    assert code == 1 and "has no library that loads; compiling" in summary
    compiled = [line for line in asked if line.startswith("cmake")]
    assert compiled[0].startswith("cmake for this: ") and "BAYES_KERNELS_CUDA=ON" in compiled[0]


def test_without_a_gpu_it_says_how_to_go_on(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OUT": str(tmp_path),
        "STATE": str(tmp_path),
    }
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "DRY=1" in done.stderr


def test_the_plan_without_a_gpu(tmp_path: Path) -> None:
    """DRY=1 with the steps that need no tool: the real programs, on the emulator and the CPU."""
    if _library.load_simulator() is None:
        pytest.skip("the emulator library is not built")
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"),
                   "STATE": str(tmp_path / "state"), "DRY": "1",
                   "PART": "smoke tests rows steps"}  # fmt: skip
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.returncode == 0, done.stdout[-2000:]
    assert all(f"{step}: passed" in summary for step in ("smoke", "tests", "rows", "steps"))
    rows = (tmp_path / "out" / "smoke.jsonl").read_text().splitlines()
    assert len(rows) > 20 and all(json.loads(row)["problem"] is None for row in rows)


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "cuda_benchmarks"))
    try:
        return __import__(name)
    finally:
        sys.path.pop(0)


# --- the smoke program -----------------------------------------------------------------------------


def test_smoke_runs_every_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cases are made; the quickest of each family run, on the emulator where it is built."""
    smoke = load("smoke")
    device = "sim" if _library.load_simulator() is not None else "cpu"
    seen: dict[str, list[str]] = {}
    for family in smoke.FAMILIES:
        made = getattr(smoke, family)

        def few(inputs: Any, small: bool, made: Any = made) -> Any:
            cases = list(made(inputs, small))
            seen[cases[0].family] = [c.name for c in cases]
            yield from cases[:3]

        monkeypatch.setattr(smoke, family, few)
    path = tmp_path / "rows.jsonl"
    assert smoke.main(["--device", device, "--small", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["family"] for row in rows} == set(smoke.FAMILIES)
    assert all(row["problem"] is None and row["error"] <= row["allowed"] for row in rows)
    assert all(len(names) == len(set(names)) for names in seen.values())
    text = " ".join(name for names in seen.values() for name in names)
    for part in ("T1 ", "T31 ", "T129 ", "n4097", "r64", "odd offset", "61 x", "C1000", "float16"):
        assert part in text, part


def test_smoke_reaches_every_width_of_the_kernels() -> None:
    """Kernels are instances by rank, and by the length of a list: some case needs each."""
    smoke = load("smoke")

    def widths(ranks: set[int]) -> set[int]:
        return {next(w for w in (8, 16, 32, 64) if r <= w) for r in ranks}

    assert widths({r for *_, r in smoke.ADAPTER_SHAPES}) == {8, 16, 32, 64}
    names = [case.name for case in smoke.tall(smoke.Inputs("cpu"), False)]
    for op in ("gram", "polar", "qr", "stiefel_step_ polar", "landing_field", "landing_step_"):
        for number in (1, 61):
            found = re.findall(rf"^{op} {number} x \(130, (\d+)\)$", "\n".join(names), re.MULTILINE)
            assert widths({int(r) for r in found}) == {8, 16, 32, 64}, (op, number)
    rows = [case.name for case in smoke.noise(smoke.Inputs("cpu"), True)]
    rows += [case.name for case in smoke.divergence(smoke.Inputs("cpu"), True)]
    for part in ("scaled_normal .*, a rho for each row", "scaled_normal", "kl 1 x", "kl 61 x"):
        assert any(re.search(rf"{part}.*float64$", name) for name in rows), part


def test_watched_cases_run_once_with_no_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sanitizer sees the case alone, and memory that is not initialised as such."""
    smoke, seen = load("smoke"), []

    def run() -> dict[str, torch.Tensor]:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return {}

    def truth() -> dict[str, torch.Tensor]:
        raise AssertionError("the definition ran")

    case = smoke.Case("noise", "one", run, truth, 0.0)
    assert smoke.run_case(case, watched=True).problem is None and seen == [False]
    assert "the definition ran" in smoke.run_case(case).problem and seen == [False, True, True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y + 1e-2 * y.abs().max(), "errs by"),
        (
            lambda y: y.masked_fill(torch.arange(y.numel()).view(y.shape) == 3, torch.nan),
            "errs by inf",
        ),
        (lambda y: y * (1 + 3e-6 * torch.rand_like(y)), "other bits"),
    ],
    ids=["wrong", "unwritten", "unsteady"],
)
def test_smoke_notices(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, change: Any, said: str
) -> None:
    smoke, op = load("smoke"), F.gaussian_kl
    case = next(iter(smoke.divergence(smoke.Inputs("cpu"), True)))
    assert smoke.run_case(case).problem is None

    def broken(*args: Any, **kwargs: Any) -> Any:
        return change(op(*args, **kwargs).reshape(1).expand(8)).sum() / 8

    monkeypatch.setattr(F, "gaussian_kl", broken)
    assert said in (smoke.run_case(case).problem or "")


def test_smoke_fills_outputs_and_workspaces_with_nan() -> None:
    """By torch's own switch, which the library's allocations obey too."""
    smoke = load("smoke")
    with smoke.poisoned():
        assert torch.empty(9).isnan().all()
        grown = _library.ops.normal(torch.tensor([1, 2]), 0, [9])
    assert grown.isfinite().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_quick_rows_on_a_gpu_have_the_sizes_of_training() -> None:
    """Few tokens and short lists tell of launches only."""
    adapter, tall = load("bench_adapter"), load("bench_tall")
    names = [case.name for case in adapter.cases("cuda", True)]
    assert {"T2048 n4096 m4096 r8 bfloat16", "T16384 n4096 m4096 r8 bfloat16",
            "T2048 n4096 m4096 r8 float32"} <= set(names)  # fmt: skip
    assert max(case.count for case in tall.cases("cuda", True)) == 448
    assert max(case.count for case in tall.cases("cpu", True)) == 16


# --- what becomes of the results -------------------------------------------------------------------


def test_results_reach_the_status_table(tmp_path: Path) -> None:
    report = load("report")
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    (out / "summary.txt").write_text(
        "== 2026-12-01T00:00:00Z abc1234\nNVIDIA H100, 590.1, 81559 MiB\nsmoke: passed\n"
        "  memcheck: 0\n  racecheck: 9\n"
    )
    cases = [{"family": "tall", "name": str(k), "error": 0.0, "allowed": 1.0, "seconds": 0.1,
              "problem": None if k else "other bits"} for k in range(4)]  # fmt: skip
    (out / "smoke.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cases))
    folder = report.take(out, results)
    assert folder.name == "NVIDIA-H100"
    said = report.status("tall", results)
    assert said == "NVIDIA H100 at abc1234: 3 of 4 cases; memcheck clean"
    # A second call that repeats two checks: racecheck is clean now, memcheck is not.
    (out / "smoke.jsonl").unlink()
    (out / "summary.txt").write_text(
        "== 2026-12-01T00:10:00Z def5678\nNVIDIA H100, 590.1, 81559 MiB\n  memcheck: 9\n  racecheck: 0\n"
    )
    report.take(out, results)
    report.take(out, results)
    said = report.status("tall", results)
    assert said == "NVIDIA H100 at abc1234 and def5678: 3 of 4 cases; racecheck clean"
    readme = (ROOT / "README.md").read_text()
    changed = report.with_status(readme, results)
    assert [
        a for a, b in zip(changed.splitlines(), readme.splitlines(), strict=True) if a != b
    ] == [line for line in changed.splitlines() if said in line]
    (folder / "smoke.jsonl").write_text(
        "".join(json.dumps({**c, "family": "grouped"}) + "\n" for c in cases)
    )
    assert "grouped adapter ops" in next(
        a for a in report.with_status(readme, results).splitlines() if "3 of 4 cases" in a
    )
    assert changed.count(said) == 1 and changed.count(report.NOT_RUN) == 7


def test_readme_says_what_a_gpu_has_run() -> None:
    readme, report = (ROOT / "README.md").read_text(), load("report")
    assert report.with_status(readme) == readme, "run python cuda_benchmarks/report.py"


def test_a_folder_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--gpu must be a folder"):
        load("report").take(tmp_path)
