"""Registers, local memory and occupancy of every CUDA kernel, from a built library: no GPU is needed.

    python cuda_benchmarks/registers.py [--library PATH] [--family NAMES] [--check | --save | --page]

Without an option it prints a table; `--check` also compares with the rows in results/registers, `--save`
writes those rows and docs/registers.md, and `--page` writes the page from the rows again. cuobjdump, which
comes with the CUDA toolkit and with triton, lists the resources; threads per block are those of
`__launch_bounds__`, which ptxas writes into the machine code's file; names of template parameters, and
which kernels are launched with dynamic shared memory, are read from the sources.

Occupancy is the share of a multiprocessor's threads that can be resident at once. Dynamic shared memory is
a launch's argument and not in the library, so it is not counted: for kernels that take it (marked +) the
figure is an upper bound.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

# Beside this file; they import torch, which costs a second.
from harness import ROOT, print_table
from report import table

ROWS = Path(__file__).resolve().parent / "results" / "registers"
PAGE = ROOT / "docs" / "registers.md"
LIBRARY = "libbayes_kernels.so"
FAMILIES = ("noise", "adapter", "divergence", "tall", "predict", "curvature")


# --- occupancy -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has: resident threads and blocks, bytes of shared memory."""

    threads: int
    blocks: int
    shared: int


# By compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
LIMITS = {
    80: Limits(2048, 32, 164 << 10),
    86: Limits(1536, 16, 100 << 10),
    89: Limits(1536, 24, 100 << 10),
    90: Limits(2048, 32, 228 << 10),
    100: Limits(2048, 32, 228 << 10),
    103: Limits(2048, 32, 228 << 10),
    120: Limits(1536, 24, 100 << 10),
}
# The same on all of these.
WARP = 32
PARTITIONS = 4  # a warp's registers are all in one of them
REGISTERS = 65536 // PARTITIONS
REGISTER_UNIT = 256  # registers are given to a warp in such units,
SHARED_UNIT = 128  # shared memory to a block in such bytes
RESERVED_SHARED = 1024  # of each block, for the system


@dataclass(frozen=True)
class Occupancy:
    """Resident blocks, their share of the threads, and the resource that allows no more."""

    blocks: int
    share: float
    limit: str


def occupancy(limits: Limits, threads: int, registers: int, shared: int) -> Occupancy:
    """Blocks that fit a multiprocessor at once, as NVIDIA's occupancy calculator finds them.

    Args:
        limits: of the multiprocessor.
        threads: in a block.
        registers: of a thread.
        shared: bytes of a block, without those that the system reserves.
    """
    warps = -(-threads // WARP)
    for_warp = -(-max(registers, 1) * WARP // REGISTER_UNIT) * REGISTER_UNIT
    for_block = -(-(shared + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
    by_registers = REGISTERS // for_warp * PARTITIONS // warps
    # The launch is refused where a block's warps, spread over all partitions, would not fit.
    if for_warp * -(-warps // PARTITIONS) > REGISTERS:
        by_registers = 0
    found = {
        "threads": limits.threads // WARP // warps,
        "registers": by_registers,
        "shared memory": limits.shared // for_block,
        "blocks": limits.blocks,
    }
    limit = min(found, key=lambda name: found[name])
    return Occupancy(found[limit], found[limit] * warps * WARP / limits.threads, limit)


# --- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One instantiation of one kernel, for one architecture.

    Attributes:
        arch: of the machine code, as `sm_90`.
        family: that of its file, as `adapter` for adapter_cuda.cu.
        name, arguments: of the function, and its template arguments by parameter.
        threads: most in a block (launch bounds), None where the kernel names none.
        registers: of a thread.
        stack: bytes of local memory of a thread: spilled registers, and arrays that are not in registers.
        loads, stores: instructions that read and write local memory, None where there is no disassembler.
        indexed, in_loops: how many of them compute their address, as accesses to arrays do and spills
            do not; and how many are inside a loop.
        shared: static bytes of a block, without those that the system reserves.
        constant: bytes of constant memory, the kernel's arguments included.
        dynamic: whether it is launched with dynamic shared memory.
        environment: version of nvcc; digest of the sources, empty where they are gone or newer.
    """

    arch: str
    family: str
    name: str
    arguments: dict[str, str]
    threads: int | None
    registers: int
    stack: int
    shared: int
    constant: int
    dynamic: bool = False
    loads: int | None = None
    stores: int | None = None
    indexed: int | None = None
    in_loops: int | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[str, ...]:
        """What the same kernel has in another build."""
        return (self.arch, self.family, self.name, *(f"{k}={v}" for k, v in self.arguments.items()))

    @property
    def label(self) -> str:
        """Name and arguments in one line."""
        return " ".join((self.name, *(f"{k}={v}" for k, v in self.arguments.items())))

    @property
    def occupancy(self) -> Occupancy | None:
        """None for unknown architectures, and without launch bounds."""
        limits = LIMITS.get(capability(self.arch))
        if limits is None or self.threads is None:
            return None
        return occupancy(limits, self.threads, self.registers, self.shared)


def capability(arch: str) -> int:
    """90 for sm_90 and sm_90a."""
    found = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    if found is None:
        raise ValueError(f"registers: arch must be like sm_90, got {arch}")
    return int(found[1])


def read_rows(folder: Path = ROWS) -> list[Kernel]:
    """The saved rows of all architectures, oldest first."""
    paths = sorted(folder.glob("sm_*.jsonl"), key=lambda path: (capability(path.stem), path.stem))
    return [Kernel(**json.loads(line)) for path in paths for line in path.read_text().splitlines()]


def save_rows(rows: Sequence[Kernel], folder: Path = ROWS) -> list[Path]:
    """Write a file for each architecture, in place of an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for arch in dict.fromkeys(row.arch for row in rows):
        lines = [json.dumps(asdict(row)) + "\n" for row in rows if row.arch == arch]
        paths.append(folder / f"{arch}.jsonl")
        _write(paths[-1], "".join(lines))
    return paths


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- reading a library ---------------------------------------------------------------------------


class NotRead(Exception):
    """Why there is nothing to read, in one line."""


def find_cuobjdump() -> Path | None:
    """On PATH, in CUDA_HOME or CUDA_PATH, beside nvcc, in /usr/local/cuda, or triton's copy."""
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [Path(folder) / "bin" for folder in folders]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        places.append(Path(nvcc).resolve().parent)
    places.append(Path("/usr/local/cuda/bin"))
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or ()) if triton is not None else ():
        places.append(Path(folder) / "backends" / "nvidia" / "bin")
    for found in (shutil.which("cuobjdump"), *(shutil.which("cuobjdump", path=p) for p in places)):
        if found is not None:
            return Path(found)
    return None


_NO_CODE = "does not contain device code"


def _run(
    command: Sequence[str | Path], text: str = "", folder: str | None = None, allow: str = "\0"
) -> str:
    """What a tool prints; a failure that says `allow` is none."""
    found = subprocess.run(
        [str(part) for part in command],
        input=text, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode != 0 and allow not in found.stderr:
        said = (found.stderr or found.stdout).strip().splitlines() or ["it said nothing"]
        raise NotRead(f"{Path(command[0]).name} failed: {said[-1]}")
    return found.stdout


@dataclass(frozen=True)
class Usage:
    """What cuobjdump says of one function; `source` is the file it was compiled from, "" if unknown."""

    arch: str
    source: str
    symbol: str
    figures: dict[str, int]


def parse_usage(text: str) -> list[Usage]:
    """The functions in the output of `cuobjdump --dump-resource-usage`."""
    found = []
    arch = source = symbol = ""
    for line in text.splitlines():
        if line.startswith("Fatbin "):
            arch = source = ""
        elif line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif line.startswith("identifier = "):
            source = line.removeprefix("identifier = ").strip()
        elif line.startswith(" Function "):
            symbol = line.removeprefix(" Function ").rstrip().removesuffix(":")
        elif line.startswith("  REG:"):
            figures = {name: int(value) for name, value in re.findall(r"([\w\[\]]+):(\d+)", line)}
            found.append(Usage(arch, source, symbol, figures))
    return found


def launch_bounds(cubin: bytes) -> dict[str, int]:
    """Most threads in a block of each function that has launch bounds, by symbol.

    A section .nv.info.<symbol> is a list of attributes: format, kind, and 16 bits that are the value
    or, in format 4, the length of what follows. Kind 5 holds the three sizes of the largest block.
    """
    (table_at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)

    def section(i: int) -> tuple[int, int, int]:
        name, _, _, _, at, length = struct.unpack_from("<2I4Q", cubin, table_at + i * size)
        return name, at, length

    _, names_at, _ = section(names)
    found = {}
    for i in range(count):
        name, at, length = section(i)
        end = cubin.index(b"\0", names_at + name)
        title = cubin[names_at + name : end].decode()
        if not title.startswith(".nv.info."):
            continue
        stop = at + length
        while at < stop:
            form, kind, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == 4:
                if kind == 5:
                    x, y, z = struct.unpack_from("<3I", cubin, at)
                    found[title.removeprefix(".nv.info.")] = x * y * z
                at += value
    return found


def parse_function(name: str) -> tuple[str, list[str]]:
    """Name and template arguments of a demangled function, without namespaces."""
    plain = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    plain = re.sub(r"\((?:int|bool)\)|\b\w+::", "", plain)
    found = re.match(r"(\w+)(?:<(.*?)>)?\(", plain)
    if found is None:
        raise ValueError(f"registers: a function must be like name<arguments>(...), got {name}")
    return found[1], [part.strip() for part in found[2].split(",")] if found[2] else []


@dataclass(frozen=True)
class Accesses:
    """Instructions of one function that use local memory; `indexed` and `in_loops` are among them."""

    loads: int = 0
    stores: int = 0
    indexed: int = 0
    in_loops: int = 0


def local_accesses(sass: str) -> dict[str, Accesses]:
    """Accesses to local memory by symbol, from the output of `cuobjdump --dump-sass`.

    A loop is what lies between a branch and an earlier address that it goes to.
    """
    found = {}
    for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        symbol, _, text = part.partition("\n")
        code = [
            (int(at, 16), instruction)
            for at, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)
        ]
        loops = []
        for at, instruction in code:
            target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction)
            if target is not None and int(target[1], 16) < at:
                loops.append((int(target[1], 16), at))
        counts = Accesses()
        for at, instruction in code:
            access = re.search(r"\b(LDL|STL)\b[^\[]*\[([^\]]*)\]", instruction)
            if access is None:
                continue
            # The stack pointer is R1; a spilled register has a fixed place.
            fixed = re.fullmatch(r"R1(\+-?0x[0-9a-f]+)?", access[2]) is not None
            counts = Accesses(
                counts.loads + (access[1] == "LDL"),
                counts.stores + (access[1] == "STL"),
                counts.indexed + (not fixed),
                counts.in_loops + any(start <= at <= end for start, end in loops),
            )
        found[symbol.strip()] = counts
    return found


def source_parameters(text: str) -> dict[str, list[str]]:
    """Names of the template parameters of the kernels in a source, by function."""
    pattern = (
        r"template <([^<>]+)>\s*__global__ void"
        r"(?:\s*__launch_bounds__\((?:[^()]|\([^()]*\))*\))?\s*(\w+)\("
    )
    return {
        name: [part.split("=")[0].split()[-1] for part in parameters.split(",")]
        for parameters, name in re.findall(pattern, text)
    }


def launched_with_dynamic(text: str) -> set[str]:
    """Kernels that a source launches with other than 0 bytes of dynamic shared memory."""
    found = set()
    text = re.sub(r"//.*", "", text)
    for launch in re.finditer(r"(?<!define )\bBK_LAUNCH\(", text):
        parts, depth = [""], 1
        for letter in text[launch.end() :]:
            depth += (letter in "([{") - (letter in ")]}")
            if depth == 0 or len(parts) > 4:
                break
            if letter == "," and depth == 1:
                parts.append("")
            else:
                parts[-1] += letter
        if len(parts) > 3 and parts[3].strip() != "0":
            found.update(re.findall(r"\w+(?=<|\)?$)", parts[0].strip())[:1])
    return found


def included(source: Path) -> list[Path]:
    """A source and all headers of this project that it includes, the emulator's aside."""
    waiting, found = [source], set()
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file() or path.parent.name == "simt":
            continue
        found.add(path)
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            # As the compiler looks for them; headers are named from csrc or from beside the file.
            near = (path.parent / name).resolve()
            waiting.append(near if near.is_file() else (source.parent / name).resolve())
    return sorted(found)


def digest(paths: Iterable[Path]) -> str:
    """What stands for the text of some files: 12 hexadecimal digits."""
    content = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:12]


def read_library(library: Path, cuobjdump: Path, *, disassemble: bool = True) -> list[Kernel]:
    """All kernels of a built library, by family and name.

    Args:
        library: the shared object.
        cuobjdump: the tool; c++filt of binutils has to be on PATH as well.
        disassemble: count accesses to local memory where there is any: 10 to 30 s an architecture.

    Raises:
        NotRead: there is no CUDA code in the library, or a tool is missing.
    """
    if not library.is_file():
        raise NotRead(f"{library} is not a file")
    usages = parse_usage(_run([cuobjdump, "--dump-resource-usage", library], allow=_NO_CODE))
    if not usages:
        raise NotRead(f"{library} has no CUDA code; build it with BAYES_KERNELS_CUDA=ON")
    if shutil.which("c++filt") is None:
        raise NotRead("c++filt was not found; install binutils")
    names = _run(["c++filt"], "\n".join(usage.symbol for usage in usages)).splitlines()
    bounds: dict[tuple[str, str], int] = {}
    accesses: dict[tuple[str, str], Accesses] = {}
    version = ""
    with tempfile.TemporaryDirectory() as folder:
        _run([cuobjdump, "--extract-elf", "all", library.resolve()], folder=folder)
        for path in sorted(Path(folder).iterdir()):
            arch = path.name.split(".")[-2]
            content = path.read_bytes()
            for symbol, threads in launch_bounds(content).items():
                bounds[arch, symbol] = threads
            made = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", content)
            version = made[1].decode() if made else version
            wanted = [
                usage.symbol
                for usage in usages
                if usage.arch == arch and _stack(usage)
                if f".text.{usage.symbol}\0".encode() in content
            ]
            if wanted and disassemble and (cuobjdump.parent / "nvdisasm").exists():
                sass = _run([cuobjdump, "--dump-sass", "--function", ",".join(wanted), path])
                for symbol, counts in local_accesses(sass).items():
                    accesses[arch, symbol] = counts
    sources = {usage.source: included(Path(usage.source)) for usage in usages if usage.source}
    files = {path for paths in sources.values() for path in paths}
    built = library.stat().st_mtime
    known = bool(files) and all(sources.values()) and all(p.stat().st_mtime <= built for p in files)
    environment = {"nvcc": version, "sources": digest(files) if known else ""}
    texts = {source: "\n".join(p.read_text() for p in paths) for source, paths in sources.items()}
    parameters = {source: source_parameters(text) for source, text in texts.items()}
    dynamic = {source: launched_with_dynamic(text) for source, text in texts.items()}
    rows = []
    for usage, full_name in zip(usages, names, strict=True):
        name, arguments = parse_function(full_name)
        named = parameters.get(usage.source, {}).get(name, [])
        if len(named) != len(arguments):
            named = [str(i) for i in range(len(arguments))]
        none = None if _stack(usage) else Accesses()
        local = accesses.get((usage.arch, usage.symbol), none)
        # From sm_90 on the count includes the system's part, where there is any of the kernel's own.
        shared = usage.figures["SHARED"]
        if capability(usage.arch) >= 90:
            shared = max(0, shared - RESERVED_SHARED)
        rows.append(
            Kernel(
                arch=usage.arch,
                family=Path(usage.source).stem.removesuffix("_cuda"),
                name=name,
                arguments=dict(zip(named, arguments, strict=True)),
                threads=bounds.get((usage.arch, usage.symbol)),
                registers=usage.figures["REG"],
                stack=_stack(usage),
                shared=shared,
                constant=usage.figures.get("CONSTANT[0]", 0),
                dynamic=name in dynamic.get(usage.source, ()),
                environment=environment,
                **({} if local is None else asdict(local)),
            )
        )
    return sorted(rows, key=_order)


def _stack(usage: Usage) -> int:
    return usage.figures["STACK"] + usage.figures["LOCAL"]


def _order(row: Kernel) -> tuple[object, ...]:
    """Family, name, arguments; numbers by size."""
    family = FAMILIES.index(row.family) if row.family in FAMILIES else len(FAMILIES)
    values = [(int(v), "") if v.isdecimal() else (0, v) for v in row.arguments.values()]
    return capability(row.arch), row.arch, family, row.family, row.name, values


# --- comparing with saved rows ---------------------------------------------------------------------

REGISTER_TOLERANCE = REGISTER_UNIT // WARP
STACK_TOLERANCE = 16


def comparable(rows: Sequence[Kernel], saved: Sequence[Kernel]) -> tuple[list[Kernel], list[str]]:
    """Rows for which there are saved ones by the same nvcc, and why others have none."""
    kept, reasons = [], []
    for arch in dict.fromkeys(row.arch for row in rows):
        ours = [row for row in rows if row.arch == arch]
        theirs = {row.environment["nvcc"] for row in saved if row.arch == arch}
        version = ours[0].environment["nvcc"]
        if version in theirs:
            kept += ours
        elif theirs:
            reasons.append(f"{arch}: not compared, nvcc {version} here, {', '.join(theirs)} saved")
        else:
            reasons.append(f"{arch}: not compared, no rows are saved")
    return kept, reasons


def grown(rows: Sequence[Kernel], saved: Sequence[Kernel]) -> list[str]:
    """What takes more than when it was saved, one line each.

    A registers' unit and 16 bytes of local memory more are let pass, fewer resident blocks never are.
    """
    before = {row.identity: row for row in saved}
    found = []
    for row in rows:
        old = before.get(row.identity)
        if old is None:
            found.append(f"{row.arch} {row.family} {row.label}: not among the saved rows")
            continue
        changes = []
        if row.registers > old.registers + REGISTER_TOLERANCE:
            changes.append(f"{row.registers} registers, {old.registers} saved")
        if row.stack > old.stack + STACK_TOLERANCE:
            changes.append(f"{row.stack} bytes of local memory, {old.stack} saved")
        now, then = row.occupancy, old.occupancy
        if now is not None and then is not None and now.blocks < then.blocks:
            changes.append(f"{now.blocks} resident blocks ({now.limit}), {then.blocks} saved")
        if changes:
            found.append(f"{row.arch} {row.family} {row.label}: {'; '.join(changes)}")
    return found


# --- the page ------------------------------------------------------------------------------------

# Kernels that may use local memory: most bytes of a thread, and what they are. Any other is a mistake.
LOCAL_MEMORY: dict[tuple[str, str], tuple[int, str]] = {
    ("adapter", "down_mma_kernel"): (
        40,
        "at rank 64, which has 128 sums for each lane: most are read once for every 128 columns.",
    ),
    ("adapter", "up_mma_kernel"): (24, "spilled before and read after the loop over tokens."),
    ("tall", "gram_kernel"): (8, "spilled before and read after the loop over rows."),
    ("tall", "solve_kernel"): (
        24,
        "mostly values that are stored once and read again in the r × r loops in fp64, on one block "
        "for each matrix; hits in the first-level cache.",
    ),
    ("tall", "refine_kernel"): (88, "as `solve_kernel`; most matrices need no refinement."),
}

INTRODUCTION = """\
# Registers and occupancy

<!-- Written by `python cuda_benchmarks/registers.py` from cuda_benchmarks/results/registers. -->

What the CUDA kernels take of a multiprocessor, read from the compiled library by cuobjdump; no GPU is
needed.

```bash
python cuda_benchmarks/registers.py           # a table of the library that bayes_kernels loads
python cuda_benchmarks/registers.py --check   # also what takes more than the rows of this page
python cuda_benchmarks/registers.py --save    # the rows, and this page
```

*Occupancy* is the share of a multiprocessor's threads that can be resident at once; *blocks* are the
resident blocks, and the last column names the resource that allows no more. Threads in a block are those
of the kernel's launch bounds. Dynamic shared memory is an argument of the launch and cannot be seen in a
library: for kernels that take it, marked +, blocks and occupancy are upper bounds. *Local memory* is of one
thread: registers that were spilled, and arrays that could not be kept in registers. Static shared memory is
of a block, without the 1,024 bytes that the system reserves, which occupancy counts.

Few resident warps are not slow by themselves: the kernels of the adapter family have many loads in flight
in each thread, and are meant to be at 12 to 25 %. `python_tests/test_registers.py` fails for a kernel with
local memory that is not named here, and, where there is a library by the same nvcc, for one that takes
more than it does here.
"""


def span(values: Iterable[int | float | None], form: str = "{}") -> str:
    """One figure, or the least and the largest."""
    known = sorted({value for value in values if value is not None})
    return " to ".join(form.format(value) for value in dict.fromkeys([*known[:1], *known[-1:]]))


def _is_type(argument: str) -> bool:
    return re.fullmatch(r"true|false|-?\d+\w*", argument) is None


def merged(rows: Iterable[Kernel]) -> dict[str, list[Kernel]]:
    """Instantiations that differ in types only, by label; `*` marks several types."""
    groups: dict[tuple[object, ...], list[Kernel]] = {}
    for row in rows:
        values = {k: v for k, v in row.arguments.items() if not _is_type(v)}
        groups.setdefault((row.family, row.name, tuple(values.items())), []).append(row)
    found = {}
    for group in groups.values():
        arguments = {
            k: v if len({row.arguments[k] for row in group}) == 1 else "*"
            for k, v in group[0].arguments.items()
        }
        found[replace(group[0], arguments=arguments).label] = group
    return found


def figures(group: Sequence[Kernel]) -> list[str]:
    """Cells of some kernels: threads, registers, local and shared memory, blocks, occupancy, limit."""
    found = [row.occupancy for row in group if row.occupancy is not None]
    return [
        span(row.threads for row in group),
        span(row.registers for row in group),
        span((row.stack for row in group), "{:,}"),
        span((row.shared for row in group), "{:,}"),
        span(o.blocks for o in found),
        span((round(100 * o.share, 1) for o in found), "{:g} %"),
        ", ".join(dict.fromkeys(o.limit for o in found)),
    ]


FIGURES = ("threads", "registers", "local memory, bytes", "static shared memory, bytes", "blocks",
           "occupancy", "limited by")  # fmt: skip


def by_name(rows: Iterable[Kernel]) -> dict[tuple[str, str], list[Kernel]]:
    """Kernels of one family and name."""
    found: dict[tuple[str, str], list[Kernel]] = {}
    for row in rows:
        found.setdefault((row.family, row.name), []).append(row)
    return found


def _name(row: Kernel) -> str:
    return f"`{row.name}`" + (" +" if row.dynamic else "")


def local_lines(rows: Sequence[Kernel]) -> list[str]:
    """Kernels with local memory, one by one, and why."""
    body, notes = [], []
    for label, group in merged(row for row in rows if row.stack).items():
        kinds = {row.indexed and "array" for row in group if row.indexed is not None}
        body.append((
            group[0].family, f"`{label}`", ", ".join(sorted(k or "spilled registers" for k in kinds)),
            span(row.stack for row in group), span(row.loads for row in group),
            span(row.stores for row in group), span(row.in_loops for row in group),
        ))  # fmt: skip
        note = LOCAL_MEMORY.get((group[0].family, group[0].name))
        if note is not None:
            notes.append(f"* `{group[0].name}` ({group[0].family}): {note[1]}")
    if not body:
        return ["No kernel uses local memory.", ""]
    header = (
        "family",
        "kernel",
        "what",
        "bytes of a thread",
        "loads",
        "stores",
        "of them in loops",
    )
    text = "Kernels that use local memory, with the instructions that read and write it:"
    return [text, "", *table(header, body, left=3), *dict.fromkeys(notes), ""]


def page(rows: Sequence[Kernel]) -> str:
    """The text of docs/registers.md."""
    lines = [INTRODUCTION]
    archs = list(dict.fromkeys(row.arch for row in rows))
    for arch in archs:
        ours = [row for row in rows if row.arch == arch]
        limits = LIMITS.get(capability(arch))
        environment = ours[0].environment
        lines += [
            f"## {arch}",
            "",
            f"By nvcc {environment['nvcc']}, sources {environment['sources']}.",
        ]
        if limits is not None:
            lines += [
                f"A multiprocessor has {limits.threads:,} threads, {limits.blocks} blocks, 65,536 registers "
                f"and {limits.shared >> 10} KB of shared memory."
            ]
        body = [
            (family, _name(group[0]), str(len(group)), *figures(group))
            for (family, _), group in by_name(ours).items()
        ]
        lines += ["", *table(("family", "kernel", "instances", *FIGURES), body, left=2)]
        lines += local_lines(ours)
    if archs:
        lines += [
            "## Every instance",
            "",
            "Registers and occupancy. `*` stands for all types.",
            "",
        ]
    for family in dict.fromkeys(row.family for row in rows):
        ours = [row for row in rows if row.family == family]
        body = []
        for label, group in merged(ours).items():
            cells = []
            for arch in archs:
                one = [row for row in group if row.arch == arch]
                found = [row.occupancy for row in one if row.occupancy is not None]
                share = span((round(100 * o.share, 1) for o in found), "{:g} %")
                cells.append(", ".join(filter(None, (span(row.registers for row in one), share))))
            body.append((f"`{label}`" + (" +" if group[0].dynamic else ""), *cells))
        lines += [f"### {family}", "", *table(("kernel", *archs), body)]
    return "\n".join(lines).rstrip() + "\n"


# --- command line ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, help=f"a built {LIBRARY}; default: the loaded one")
    parser.add_argument("--cuobjdump", type=Path, help="the tool; default: found on this machine")
    parser.add_argument(
        "--family", help=f"print some of {', '.join(FAMILIES)}, separated by commas"
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare with the saved rows")
    action.add_argument("--save", action="store_true", help="write the rows and the page")
    action.add_argument("--page", action="store_true", help="only write the page from the rows")
    options = parser.parse_args(arguments)
    if options.page:
        _write(PAGE, page(read_rows()))
        print(f"wrote {PAGE}")
        return 0
    families = () if options.family is None else tuple(options.family.split(","))
    if not set(families) <= set(FAMILIES):
        parser.error(f"--family must name some of {', '.join(FAMILIES)}, got {options.family}")
    library = options.library
    if library is None:
        from bayes_kernels import _library

        library = _library.find_library(LIBRARY)
        if library is None:
            parser.error(f"{LIBRARY} was not found; build it, or name it with --library")
    tool = options.cuobjdump or find_cuobjdump()
    if tool is None:
        parser.error("cuobjdump was not found; it comes with the CUDA toolkit and with triton")
    try:
        rows = read_library(library, tool, disassemble=not options.check)
    except NotRead as problem:
        parser.error(str(problem))
    body = [
        (row.arch, row.family, label + (" +" if row.dynamic else ""), *figures(group))
        for arch in dict.fromkeys(row.arch for row in rows)
        for label, group in merged(r for r in rows if r.arch == arch).items()
        for row in group[:1]
        if not families or row.family in families
    ]
    header = ("arch", "family", "kernel", "threads", "registers", "local", "shared", "blocks",
              "occupancy", "limited by")  # fmt: skip
    print_table(header, body, left=3)
    print("\n+ takes dynamic shared memory, which a library does not show: at most these blocks.")
    print("Local memory is bytes of a thread, static shared memory bytes of a block.")
    if options.check:
        saved = read_rows()
        kept, reasons = comparable(rows, saved)
        worse = grown(kept, saved)
        fine = ["no kernel takes more than the saved rows"] if kept and not worse else []
        print("", *reasons, *worse, *fine, sep="\n")
        return 1 if worse else 0
    if options.save:
        if not rows[0].environment["sources"]:
            parser.error(
                "--save needs the sources that the library was built from: they are gone, or newer "
                "than the library; build it again"
            )
        paths = save_rows(rows)
        _write(PAGE, page(read_rows()))
        print("wrote", *paths, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
