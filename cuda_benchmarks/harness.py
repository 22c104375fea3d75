"""One harness for all benchmarks: interleaved timing, memory, rows of results, tables.

A case has several providers of the same work. Before anything is timed, each provider is compared
with an fp64 reference, within what its dtype and the length of its sums explain. One of ours that
misses ends its family, and the run goes on with the next and returns 1; another provider that misses
is measured all the same, and its rows are marked and left out of the bars. Timing goes round the
providers in turn, so that a change of the machine's clock or load meets all of them; what counts is
the ratio of medians within one run.

On the CPU the clock is the CPU time of this process on one thread: other processes on a shared
machine disturb it little, and each row says which share of the wall-clock time the process had a
core for. On a GPU the clock is a pair of CUDA events around each repetition, with the L2 cache
flushed before it and launched ahead, so that kernels wait for each other and not for the host;
cases of whole models, whose launches take more than 5 ms, are timed with what they wait.

A family is a module `bench_<name>.py` with a constant `FAMILY`. `command.py` runs families; what their
figures have to reach is in `bars.py`.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

# Before torch is imported: one thread, and no warnings of the profiler that counts memory.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = (
    "adapter",
    "activations",
    "grouped",
    "predict",
    "tall",
    "curvature",
    "vbll",
    "end_to_end",
    "experts",
    "peers",
)

Step = Callable[[], object]
T = TypeVar("T")


@dataclass
class Row:
    """One provider of one case. Times in microseconds, memory in bytes.

    Attributes:
        op, case, provider, mode: what was measured.
        p20_us, p50_us, p80_us, repeats: percentiles of the repetitions, and their number.
        saved_bytes: what a forward pass keeps for backward, without parameters.
        peak_bytes: largest memory above what is allocated before the step.
        roofline: share of the time that the bytes that must move need at copy bandwidth.
        launches: kernels that a step launches on a GPU.
        cpu_share: share of the wall-clock time for which the process had a core, CPU only.
        figures: further numbers of this family (tokens_per_second, bytes by category, ...).
        miss: how far the provider's results are from the reference, where that is too far.
        environment: machine, versions, commit, whether the tree was dirty, date.
    """

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
    roofline: float | None = None
    launches: int | None = None
    cpu_share: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    miss: str | None = None
    environment: dict[str, str | int | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What a run measures: the options that all families share."""

    device: str = "cpu"
    quick: bool = False
    seconds: float | None = None
    vs: frozenset[str] | None = None
    case: str | None = None
    shape: Mapping[str, int] | None = None  # sizes by the family's letters, in place of its cases
    dtype: str | None = None

    def wants(self, case: str) -> bool:
        """Whether a case passes the filter: part of its name, whatever the letters' case."""
        return self.case is None or self.case.lower() in case.lower()

    def pick(self, providers: Mapping[str, T], ours: Sequence[str]) -> dict[str, T]:
        """Our own providers and those that were asked for, by default all."""
        return {
            name: value
            for name, value in providers.items()
            if self.vs is None or name in self.vs or name in ours
        }

    def time_for(self, full: float, quick: float | None = None) -> float:
        """Seconds for the repetitions of a case."""
        if self.seconds is not None:
            return self.seconds
        return quick if self.quick and quick is not None else full


@dataclass(frozen=True)
class Family:
    """One family of benchmarks.

    Attributes:
        name: that of the module without `bench_`, and of the file of results.
        title: what it measures, in one line.
        ours: providers that are this package's; the first is what others are divided by.
        providers: the others.
        run: measures, and yields rows as they are ready.
        missing: why it cannot run here, or None where it can.
        letters: names of the sizes of a shape of the user's own; none where it takes none.
        dtypes: types that such a case may have, the first by default.
    """

    name: str
    title: str
    ours: tuple[str, ...]
    providers: tuple[str, ...]
    run: Callable[[Options], Iterator[Row]]
    missing: Callable[[Options], str | None] = lambda options: None
    letters: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("fp32",)


def load_family(name: str) -> Family:
    """The family of a name."""
    return importlib.import_module(f"bench_{name}").FAMILY


# --- environment ---------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def environment(device: str) -> dict[str, str | int | bool]:
    """What a row needs to be compared later: machine, versions, commit, date."""
    import bayes_kernels

    commit, dirty = _commit()
    found: dict[str, str | int | bool] = {
        "device": device,
        "machine": machine_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "bayes_kernels": bayes_kernels.__version__,
        "cpu_path": bayes_kernels.build_info()["cpu_path"],
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if device == "cuda":
        found["driver"] = _driver()
    return found


def _commit() -> tuple[str, bool]:
    """Commit of the tree, and whether what is measured differs from it.

    BAYES_KERNELS_COMMIT gives the commit of a copy without its history, "-dirty" included.
    """
    named = os.environ.get("BAYES_KERNELS_COMMIT")
    if named:
        return named, named.endswith("-dirty")

    def git(*arguments: str) -> str:
        try:
            found = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
            )
        except OSError:
            return ""
        return found.stdout.strip() if found.returncode == 0 else ""

    commit = git("describe", "--always", "--abbrev=7")
    measured = ("csrc", "bayes_kernels", "cuda_benchmarks/*.py", "CMakeLists.txt")
    dirty = bool(git("status", "--porcelain", "--", *measured))
    return f"{commit}-dirty" if commit and dirty else commit or "unknown", dirty


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip().splitlines()[0] if found.stdout.strip() else ""


def machine_name(device: str) -> str:
    """Name of the GPU or of the processor, with the path that BAYES_KERNELS_CPU chooses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    path = os.environ.get("BAYES_KERNELS_CPU", "")
    return f"{_processor()}, {path}" if path else _processor()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# --- agreement -----------------------------------------------------------------------------------


class Disagreement(AssertionError):
    """Results that are not those of the fp64 reference."""


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Largest error, over the largest magnitude, of results in `dtype` that are sums of `terms` products.

    8 eps32 sqrt(terms) for sums in fp32, whose roundings are as good as independent (one term after
    another is off by about eps32 sqrt(terms)), and 4 eps(dtype) for rounding inputs and results.
    """
    narrow = 4 * torch.finfo(dtype).eps
    return narrow + 8 * torch.finfo(torch.float32).eps * math.sqrt(max(terms, 1))


def miss(got: Iterable[Tensor], truth: Iterable[Tensor], allowed: float) -> str | None:
    """How the first tensor that is too far from the fp64 truth differs; None where none is.

    The error is the largest difference over the largest magnitude of the truth, for each tensor.
    """
    for i, (g, t) in enumerate(zip(got, truth, strict=True)):
        if not t.numel():
            continue
        error = ((g.double() - t).abs().max() / t.abs().max().clamp_min(1e-30)).item()
        if not error <= allowed:
            return (
                f"result {i} differs from the fp64 reference by {error:.2e} of its magnitude, "
                f"allowed {allowed:.0e}"
            )
    return None


def assert_agrees(
    what: str, got: Iterable[Tensor], truth: Iterable[Tensor], allowed: float
) -> None:
    """Raises where results of our own are not those of the reference.

    Raises:
        Disagreement: see `miss`.
    """
    found = miss(got, truth, allowed)
    if found is not None:
        raise Disagreement(f"{what}: {found}; timing would be meaningless")


class Agreement(dict[str, str]):
    """The providers of a case that miss the reference, and how; `ours` may not be among them."""

    def __init__(self, case: str, ours: Sequence[str]) -> None:
        super().__init__()
        self.case, self.ours = case, ours

    def check(
        self, provider: str, got: Iterable[Tensor], truth: Iterable[Tensor], allowed: float
    ) -> None:
        """Compare a provider's results with the truth.

        Raises:
            Disagreement: the provider is one of ours, and misses.
        """
        if provider in self.ours:
            assert_agrees(f"{self.case}, {provider}", got, truth, allowed)
        else:
            found = miss(got, truth, allowed)
            if found is not None:
                self.setdefault(provider, found)


# --- time ----------------------------------------------------------------------------------------


class Times(dict[str, list[float]]):
    """Microseconds of each provider's repetitions; `cpu_share` as in `Row`."""

    cpu_share: float | None = None


def time_interleaved(
    steps: Mapping[str, Step],
    device: str,
    *,
    seconds: float,
    min_repeats: int = 3,
    max_repeats: int = 200,
) -> Times:
    """Microseconds of each step, in rounds over all steps, until `seconds` have gone by."""
    timers: dict[str, Callable[[], float]] = {}
    ahead = _head_start(steps.values()) if device == "cuda" else 0
    for name, step in steps.items():
        step()
        if device == "cuda":
            timers[name] = partial(_cuda_time, step, ahead)
        else:
            # Short steps are repeated within one measurement, against the clock's resolution.
            loops = max(1, min(200, int(1000 / max(_cpu_time(step, 1), 1.0))))
            timers[name] = partial(_cpu_time, step, loops)
    times = Times({name: [] for name in steps})
    names = list(steps)
    start, cpu_start = time.perf_counter(), time.process_time()
    gc.collect()
    gc.disable()
    try:
        for repeat in range(max_repeats):
            if repeat >= min_repeats and time.perf_counter() - start > seconds:
                break
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                times[name].append(timers[name]())
    finally:
        gc.enable()
    if device == "cpu":
        passed = max(time.perf_counter() - start, 1e-9)
        times.cpu_share = round((time.process_time() - cpu_start) / passed, 2)
    return times


def _cpu_time(step: Step, loops: int) -> float:
    start = time.process_time_ns()
    for _ in range(loops):
        step()
    return (time.process_time_ns() - start) / 1e3 / loops


@lru_cache(maxsize=1)
def _flush_buffers() -> tuple[Tensor, Tensor]:
    written = torch.empty(64 << 20, device="cuda")
    return written, torch.zeros_like(written)


def flush_cache() -> None:
    """Fill the GPU's L2 with clean lines of 256 MB that are not used again.

    A buffer is written, then another one is read: written lines alone would be dirty, and up to 50 MB
    of them written back while the next kernel is timed.
    """
    written, read = _flush_buffers()
    written.zero_()
    read.sum()


def _head_start(steps: Iterable[Step]) -> int:
    """Clock cycles for which the GPU waits while the host launches the kernels of any step.

    Where the launches of a step take the host longer than 5 ms, at best of three, the steps are those
    of whole models: what the GPU waits for there is part of their time, for all of them.
    """
    longest = 0.0
    for step in steps:
        launches = []
        for _ in range(4):  # the first one also loads what it calls
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            launches.append(time.perf_counter() - start)
        longest = max(longest, min(launches[1:]))
    torch.cuda.synchronize()
    # Boost clocks are below 3 GHz.
    return int(3e9 * (1.5 * longest + 50e-6)) if longest < 5e-3 else 0


def _cuda_time(step: Step, head_start: int) -> float:
    flush_cache()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if head_start:
        torch.cuda._sleep(head_start)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


@lru_cache(maxsize=2)
def copy_bandwidth(device: str) -> float:
    """Bytes read plus written per second by a large copy."""
    source = torch.empty((1 << 30 if device == "cuda" else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    times = time_interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.5)["copy"]
    return 2 * source.numel() * 4 / (statistics.median(times) * 1e-6)


def bandwidth_share(moved: int, row: Row, device: str) -> float:
    """Share of a row's median time that `moved` bytes need at copy bandwidth."""
    return round(moved / copy_bandwidth(device) / (row.p50_us * 1e-6), 3)


# --- memory and launches -------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
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


def peak_bytes(step: Step, device: str, *, warm: bool = True) -> int | None:
    """Largest memory above what is allocated before the step; None where it cannot be measured.

    On the CPU every allocation of torch's allocator is counted, as its profiler reports them: those
    inside operators too. `warm` runs the step once before.
    """
    if warm:
        step()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()  # what dies of old age within the step would count as freed by it
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profile:
        step()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    if results is None:
        return None
    changes = sorted(
        ((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"),
        key=lambda change: change[0],
    )
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def count_launches(step: Step, device: str) -> int | None:
    """Kernels that a step launches on the GPU, copies and fills aside; None on the CPU."""
    if device != "cuda":
        return None
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        for event in profile.events()
    )


# --- rows ----------------------------------------------------------------------------------------


def make_row(
    op: str,
    case: str,
    provider: str,
    mode: str,
    times: Times,
    device: str,
    misses: Mapping[str, str] = MappingProxyType({}),
) -> Row:
    """Percentiles of a provider's times, with the environment; `misses`: an `Agreement`."""
    ordered = sorted(times[provider])

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
        cpu_share=times.cpu_share,
        miss=misses.get(provider),
        environment=environment(device),
    )


def read_rows(path: Path) -> list[Row]:
    """Rows of a file of results."""
    lines = path.read_text().splitlines()
    return [Row(**json.loads(line)) for line in lines if line.strip()]


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, in place of rows of the same op, case, mode, versions and commit."""
    if not rows:
        return

    def identity(row: Row) -> tuple[object, ...]:
        e = row.environment
        versions = (e[name] for name in ("machine", "torch", "bayes_kernels", "commit", "threads"))
        return row.op, row.case, row.provider, row.mode, *versions

    old = read_rows(path) if path.exists() else []
    kept = {identity(row): row for row in [*old, *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(asdict(row)) + "\n" for row in kept.values()))
    os.replace(temporary, path)


def results_folder(device: str) -> Path:
    """results/<machine>, with a name that is safe in paths."""
    name = "".join(c if c.isalnum() else "-" for c in machine_name(device)).strip("-")
    while "--" in name:
        name = name.replace("--", "-")
    return Path(__file__).parent / "results" / name


MARK = "(!)"  # beside a provider whose results miss the reference

# --- tables --------------------------------------------------------------------------------------


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> None:
    """A plain table: first columns to the left, figures to the right; empty columns left out."""
    used = [i for i in range(len(header)) if i < left or any(r[i] for r in rows)]
    widths = {i: max(len(r[i]) for r in [header, *rows]) for i in used}
    for r in [header, *rows]:
        cells = (r[i].ljust(widths[i]) if i < left else r[i].rjust(widths[i]) for i in used)
        print("  ".join(cells).rstrip())


def _megabytes(number: int | None, digits: int) -> str:
    return "" if number is None else f"{number / 1e6:.{digits}f}"


def print_rows(family: Family, rows: Sequence[Row]) -> None:
    """All figures of a family, and what each provider's time is of our own."""
    table = []
    for op, case, mode in dict.fromkeys((r.op, r.case, r.mode) for r in rows):
        group = [r for r in rows if (r.op, r.case, r.mode) == (op, case, mode)]
        own = next((r for name in family.ours for r in group if r.provider == name), None)
        for row in group:
            tokens = row.figures.get("tokens_per_second")
            table.append((
                f"{op} {case}" if op != family.name else case,
                row.provider if row.miss is None else f"{row.provider} {MARK}", mode,
                f"{row.p20_us:.0f}", f"{row.p50_us:.0f}", f"{row.p80_us:.0f}",
                "" if own is None else f"{row.p50_us / own.p50_us:.2f}",
                _megabytes(row.saved_bytes, 2), _megabytes(row.peak_bytes, 2),
                "" if row.roofline is None else f"{row.roofline:.0%}",
                "" if row.launches is None else str(row.launches),
                "" if tokens is None else f"{tokens:.0f}",
                "" if row.cpu_share is None else f"{row.cpu_share:.2f}",
            ))  # fmt: skip
    header = (
        "case", "provider", "mode", "p20 us", "p50 us", "p80 us", "x ours", "kept MB", "peak MB",
        "of copy", "launches", "tokens/s", "core",
    )  # fmt: skip
    print_table(header, table, left=3)
    for row in rows:
        if row.miss is not None:
            print(f"{MARK} {row.op} {row.case}, {row.provider}: {row.miss}")
