"""Registers, local memory and loads in flight of every CUDA kernel, from a built library: no GPU is needed.

    python cuda_benchmarks/registers.py [--library PATH] [--check | --save]

Without an option it prints a table; `--check` also compares with the rows in results/registers, and
`--save` writes those rows and docs/registers.md. cuobjdump lists the resources and the machine code; it
comes with the CUDA toolkit and with the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.

Loads in flight are counted in the machine code: global loads that a thread issues before an instruction
reads one of them. Memory answers late, so that a multiprocessor of an H100 needs some 20 KB in flight to
reach its share of 3 TB/s.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Beside this file; they import torch, which costs a second.
from harness import ROOT, print_table
from report import table

ROWS = Path(__file__).resolve().parent / "results" / "registers"
PAGE = ROOT / "docs" / "registers.md"
LIBRARY = "libbayes_kernels.so"

# Local memory that is known, in bytes of a thread, and why it stays. A kernel beyond it fails the tests.
LOCAL_MEMORY = {
    ("adapter", "down_mma_kernel"): (8, "fp16, whose operands have a scale each, at rank 8 (the bound keeps "
     "two blocks) and at rank 64 with noise."),
    ("adapter", "tile_mma_kernel"): (152, "ranks 32 (16 bytes) and 64 with noise: sums of both gradients "
     "take 128 registers, rows of x 32, those of dh 16 or 32."),
    ("adapter", "down_fma_kernel"): (64, "with noise, or 16 ranks at once: factors of 64 registers, "
     "under the 128 of 16 warps, which are what keeps 32 KB of a multiprocessor in flight."),
    ("grouped", "down_fma_kernel"): (80, "the same with noise, and the rows of a group."),
    ("tall", "solve_kernel"): (136, "four blocks on a multiprocessor, so 64 registers; addresses of six "
     "matrices, and what a refinement takes, which few matrices need; hits in the first-level cache."),
}  # fmt: skip

# Kernels that stream activations or tall matrices, by what a thread must have in flight, in bytes: four
# loads of 16 bytes; half of it where rows are so short that a lane owns two neighbours.
STREAMING = {
    ("adapter", "decode_kernel"): 64,
    ("adapter", "down_fma_kernel"): 64,
    ("adapter", "down_mma_kernel"): 64,
    ("adapter", "tile_fma_kernel"): 64,
    ("adapter", "tile_mma_kernel"): 64,
    ("tall", "gram_kernel"): 64,
    ("tall", "combine_kernel"): 32,
    ("curvature", "gram_kernel"): 64,
    ("curvature", "apply_kernel"): 64,
    ("curvature", "dense_sum_kernel"): 64,
    ("divergence", "value_kernel"): 64,
    ("divergence", "gradient_kernel"): 64,
}

# Straight-line kernels that latency bounds: most instructions. `prepare` draws a Philox block for each
# four elements, not for each one.
SHORT = {("adapter", "prepare_kernel"): 1900, ("adapter", "amax_kernel"): 250}


@dataclass(frozen=True)
class Kernel:
    """One compiled instance: what a thread takes, and bytes of global loads that it has in flight."""

    arch: str
    family: str
    name: str
    arguments: str
    registers: int
    local: int
    shared: int
    instructions: int
    in_flight: int
    nvcc: str


def find_cuobjdump() -> Path | None:
    """On PATH, beside nvcc, in /usr/local/cuda, or in NVIDIA's package or triton's."""
    places = [Path("/usr/local/cuda/bin")]
    if (nvcc := shutil.which("nvcc")) is not None:
        places.append(Path(nvcc).resolve().parent)
    for package, pattern in (("nvidia", "cu*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            places += sorted(Path(folder).glob(pattern))
    paths = (None, *map(str, places))
    return next((Path(f) for p in paths if (f := shutil.which("cuobjdump", path=p))), None)


_WIDTH = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}


def in_flight(code: Sequence[str]) -> int:
    """The most bytes of global loads that are issued before one of their registers is read or written.

    `code` is a kernel's instructions in order; a branch, a barrier or its target changes nothing, as the
    scoreboard waits for registers only.
    """
    most, pending, waiting = 0, 0, set()
    for line in code:
        operation, _, operands = re.sub(r"^@!?U?P\w+\s+", "", line).partition(" ")
        named = {int(r) for r in re.findall(r"\bR(\d+)\b", operands)}
        loads = operation.startswith("LDG.") or operation == "LDG"
        width = next((w for mark, w in _WIDTH.items() if mark in operation), 4) if loads else 0
        target = re.match(r"\s*R(\d+)", operands) if loads else None
        sources = {int(r) for r in re.findall(r"\bR(\d+)\b", operands.partition(",")[2])}
        if (sources if loads else named) & waiting:
            pending, waiting = 0, set()
        if target is not None:
            first = int(target[1])
            waiting |= set(range(first, first + max(1, width // 4)))
            pending += width
            most = max(most, pending)
    return most


def parse(usage: str, sass: str, nvcc: str) -> list[Kernel]:
    """The kernels in what `cuobjdump -res-usage` and `cuobjdump -sass` print of one library."""
    code: dict[tuple[str, str], list[str]] = {}
    arch, body = "", []
    for line in sass.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\w+)", line):
            body = code.setdefault((arch, found[1]), [])
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            body.append(found[1])
    figures: dict[tuple[str, str], dict[str, int]] = {}
    arch, symbol = "", ""
    for line in usage.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            symbol = found[1]
        elif symbol and "REG:" in line:
            figures[arch, symbol] = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", line)}
            symbol = ""
    names = subprocess.run(["c++filt"], input="\n".join(s for _, s in figures), text=True,
                           capture_output=True, check=True).stdout.splitlines()  # fmt: skip
    rows = []
    for ((arch, symbol), use), text in zip(figures.items(), names, strict=True):
        family = re.search(r"_(\w+?)_cuda_cu_", re.sub(r"_\d+_(?=\w+_cuda_cu)", "_", symbol))
        found = re.search(r"(\w+)(?:<(.*?)>)?\((?!anonymous)", text.replace("c10::", ""))
        if family is None or found is None:
            continue
        instructions = code.get((arch, symbol), [])
        rows.append(Kernel(arch, family[1].rpartition("_")[2], found[1],
                           re.sub(r"\(\w+\)", "", found[2] or ""), use["REG"],
                           use["STACK"] + use["LOCAL"], use["SHARED"], len(instructions),
                           in_flight(instructions), nvcc))  # fmt: skip
    return sorted(rows, key=lambda r: (r.arch, r.family, r.name, r.arguments))


def read_library(
    library: Path, cuobjdump: Path, nvcc: str, arch: str | None = None
) -> list[Kernel]:
    """The kernels of a built library, of one architecture or of all.

    Raises:
        RuntimeError: with what cuobjdump says, where it reads none.
    """
    said, chosen = [], [] if arch is None else ["-arch", arch]
    for option in ("-res-usage", "-sass"):
        command = [cuobjdump, *chosen, option, library]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0 or "Function" not in run.stdout:
            reason = (run.stderr or run.stdout).strip().splitlines() or ["no device code"]
            raise RuntimeError(f"cuobjdump {option} {library}: {reason[-1]}")
        said.append(run.stdout)
    return parse(*said, nvcc)


def read_rows(folder: Path = ROWS) -> list[Kernel]:
    paths = sorted(folder.glob("sm_*.jsonl"))
    return [Kernel(**json.loads(line)) for path in paths for line in path.read_text().splitlines()]


def worse(rows: Sequence[Kernel], saved: Sequence[Kernel]) -> list[str]:
    """What takes more registers or local memory, or has less in flight, than a row by the same nvcc."""
    before = {(r.arch, r.family, r.name, r.arguments, r.nvcc): r for r in saved}
    found = []
    for row in rows:
        old = before.get((row.arch, row.family, row.name, row.arguments, row.nvcc))
        if old is None:
            continue
        for what, more in (("registers", row.registers > old.registers), ("local", row.local > old.local),
                           ("in_flight", row.in_flight < old.in_flight)):  # fmt: skip
            if more:
                found.append(f"{row.arch} {row.family} {row.name}<{row.arguments}>: {what} "
                             f"{getattr(row, what)}, was {getattr(old, what)}")  # fmt: skip
    return found


def span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


HEADER = ("family", "kernel", "instances", "registers", "local memory", "static shared memory",
          "instructions", "bytes in flight")  # fmt: skip


def lines_of(rows: Sequence[Kernel]) -> list[tuple[str, ...]]:
    """A line for each kernel: all its instances."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for row in rows:
        groups.setdefault((row.family, row.name), []).append(row)
    columns = ("registers", "local", "shared", "instructions", "in_flight")
    return [(family, name, str(len(group)), *(span([getattr(r, c) for r in group]) for c in columns))
            for (family, name), group in groups.items()]  # fmt: skip


def page(rows: Sequence[Kernel]) -> str:
    """The text of docs/registers.md."""
    lines = [
        "# Registers and loads in flight", "",
        "<!-- Written by `python cuda_benchmarks/registers.py --save`. -->", "",
        "The resources of the CUDA kernels, which cuobjdump reads from the compiled library. No GPU is",
        "needed. Registers, local memory (spilled registers) and bytes in flight are for one thread, static",
        "shared memory for one block, in bytes. *Bytes in flight* are the most global loads, anywhere in the",
        "kernel, that a thread issues before an instruction reads one of them. A multiprocessor of an H100",
        "needs some 20 KB in flight: 256 resident threads with 80 bytes each.", "",
        "```bash", "python cuda_benchmarks/registers.py --check   # lists what is worse than on this page",
        "python cuda_benchmarks/registers.py --save    # write this page", "```", "",
    ]  # fmt: skip
    for arch in dict.fromkeys(row.arch for row in rows):
        ours = [row for row in rows if row.arch == arch]
        body = [(family, f"`{name}`", *rest) for family, name, *rest in lines_of(ours)]
        lines += [f"## {arch}", "", f"By nvcc {ours[0].nvcc}.", "", *table(HEADER, body, left=2)]
    lines += ["## Local memory", ""]
    for (family, name), (most, why) in LOCAL_MEMORY.items():
        lines.append(f"* `{name}` ({family}), at most {most} bytes: {why}")
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, help=f"a built {LIBRARY}; default: the loaded one")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare with the saved rows")
    action.add_argument("--save", action="store_true", help="write the rows and docs/registers.md")
    options = parser.parse_args(arguments)
    from bayes_kernels import _library

    library = options.library or _library.find_library(LIBRARY)
    tool = find_cuobjdump()
    if library is None:
        parser.error(f"{LIBRARY} was not found; build it, or name it with --library")
    if tool is None:
        parser.error(
            "cuobjdump was not found; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    try:
        rows = read_library(library, tool, compiler())
    except RuntimeError as problem:
        parser.error(str(problem))
    print_table(HEADER, lines_of(rows), left=2)
    if options.check:
        found = worse(rows, read_rows())
        print("", *(found or ["nothing is worse than the saved rows"]), sep="\n")
        return 1 if found else 0
    if options.save:
        ROWS.mkdir(parents=True, exist_ok=True)
        for arch in {row.arch for row in rows}:
            text = "".join(json.dumps(asdict(r)) + "\n" for r in rows if r.arch == arch)
            (ROWS / f"{arch}.jsonl").write_text(text)
        PAGE.write_text(page(read_rows()))
        print(f"wrote {ROWS} and {PAGE}")
    return 0


def compiler() -> str:
    """The nvcc of the loaded library, as it says itself."""
    from bayes_kernels import _library

    return str(_library.build_info().get("cuda", ""))


if __name__ == "__main__":
    sys.exit(main())
