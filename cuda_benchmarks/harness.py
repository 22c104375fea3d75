"""One harness for all benchmarks: interleaved timing, memory, rows of results.

A case has several providers of the same work. Before anything is timed, each provider has to agree
with an fp64 reference. Timing goes round the providers in turn, so that a change of the machine's
clock or load meets all of them; what counts is the ratio of medians within one run.

On the CPU the clock is the CPU time of this process on one thread: other processes on a shared
machine disturb it little. On a GPU the clock is a pair of CUDA events around each repetition, with
the L2 cache flushed before it.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], object]


@dataclass
class Row:
    """One provider of one case. Times in microseconds, memory in bytes."""

    op: str
    case: str
    provider: str
    mode: str
    p20_us: float
    p50_us: float
    p80_us: float
    repeats: int
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    roofline: float | None = None  # share of the time that the bytes need at copy bandwidth
    environment: dict[str, str | int] = field(default_factory=dict)


@lru_cache(maxsize=2)
def environment(device: str) -> dict[str, str | int]:
    """What a row needs to be compared later: machine, versions, commit, date."""
    import bayes_kernels

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "machine": machine_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "bayes_kernels": bayes_kernels.__version__,
        "cpu_path": bayes_kernels.build_info()["cpu_path"],
        "commit": commit or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }


def machine_name(device: str) -> str:
    """Name of the GPU or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def assert_agrees(
    what: str, got: Iterable[Tensor], truth: Iterable[Tensor], tolerance: float
) -> None:
    """Largest error over the largest magnitude of the fp64 truth, for each tensor."""
    for i, (g, t) in enumerate(zip(got, truth, strict=True)):
        error = ((g.double() - t).abs().max() / t.abs().max().clamp_min(1e-30)).item()
        if not error <= tolerance:
            raise AssertionError(
                f"{what}: result {i} differs from the fp64 reference by {error:.2e} "
                f"of its magnitude, allowed {tolerance:.0e}; timing would be meaningless"
            )


def time_interleaved(
    steps: dict[str, Step],
    device: str,
    *,
    seconds: float,
    min_repeats: int = 3,
    max_repeats: int = 200,
) -> dict[str, list[float]]:
    """Microseconds of each step, in rounds over all steps, until `seconds` have gone by."""
    timer = _cuda_time if device == "cuda" else _cpu_time
    loops = {}
    for name, step in steps.items():
        step()
        once = timer(step, 1)
        # Short steps are repeated within one measurement, against the resolution of the clock.
        loops[name] = 1 if device == "cuda" else max(1, min(200, int(1000 / max(once, 1.0))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for repeat in range(max_repeats):
            if repeat >= min_repeats and time.perf_counter() - start > seconds:
                break
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                times[name].append(timer(steps[name], loops[name]))
    finally:
        gc.enable()
    return times


def _cpu_time(step: Step, loops: int) -> float:
    start = time.process_time_ns()
    for _ in range(loops):
        step()
    return (time.process_time_ns() - start) / 1e3 / loops


@lru_cache(maxsize=1)
def _flush_buffer() -> Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def _cuda_time(step: Step, loops: int) -> float:
    _flush_buffer().zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(200_000)  # the host gets ahead: launch latency stays out of the figure
    begin.record()
    for _ in range(loops):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / loops


@lru_cache(maxsize=2)
def copy_bandwidth(device: str) -> float:
    """Bytes read plus written per second by a large copy."""
    source = torch.empty((1 << 30 if device == "cuda" else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    times = time_interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.5)["copy"]
    return 2 * source.numel() * 4 / (statistics.median(times) * 1e-6)


def saved_bytes(forward: Callable[[], Tensor], parameters: Sequence[Tensor]) -> int:
    """Bytes that a forward pass keeps for backward: unique storages but those of parameters."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return sum(kept.values())


def peak_bytes(step: Step, device: str) -> int | None:
    """Largest memory above what is allocated before the step; None where it cannot be measured."""
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profile:
        step()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    if results is None:
        return None
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def make_row(
    op: str, case: str, provider: str, mode: str, times: Sequence[float], device: str
) -> Row:
    """Percentiles of the measured times, with the environment."""
    ordered = sorted(times)

    def percentile(q: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 2)

    return Row(
        op,
        case,
        provider,
        mode,
        percentile(0.2),
        percentile(0.5),
        percentile(0.8),
        len(ordered),
        environment=environment(device),
    )


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, in place of rows of the same op, case, mode and versions."""

    def identity(row: dict) -> tuple:
        e = row["environment"]
        names = ("op", "case", "provider", "mode")
        return *(row[n] for n in names), e["torch"], e["bayes_kernels"], e["commit"], e["threads"]

    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = {identity(row): row for row in [*old, *(asdict(r) for r in rows)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept.values()))
    os.replace(temporary, path)


def results_folder(device: str) -> Path:
    """results/<machine>, with a name that is safe in paths."""
    name = "".join(c if c.isalnum() else "-" for c in machine_name(device)).strip("-")
    while "--" in name:
        name = name.replace("--", "-")
    return Path(__file__).parent / "results" / name


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table: first two columns to the left, figures to the right."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    for r in [header, *rows]:
        print(
            "  ".join(
                c.ljust(w) if i < 2 else c.rjust(w)
                for i, (c, w) in enumerate(zip(r, widths, strict=True))
            )
        )
