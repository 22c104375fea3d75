"""The command line of the benchmarks: families, one after the other, with their rows and bars.

python cuda_benchmarks [FAMILY ...] [--device cuda] [--quick] [--vs PROVIDERS] [--case TEXT]
                       [--shape T=2048,n=4096,m=4096,r=16 [--dtype bf16]] [--json PATH] [--save]
python cuda_benchmarks --compare BEFORE AFTER
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import bars
import torch
from harness import (
    FAMILIES,
    Disagreement,
    Family,
    Options,
    Row,
    load_family,
    print_rows,
    print_table,
    read_rows,
    results_folder,
    save_rows,
)

from bayes_kernels import _library


class _Parser(argparse.ArgumentParser):
    """Ends with the mistake in one line, as every command does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if not number.isdecimal() or int(number) < 1 or not name or name in sizes:
            raise argparse.ArgumentTypeError(f"must be sizes such as T=2048,n=4096, got {text!r}")
        sizes[name] = int(number)
    return sizes


def _with_shape(
    parser: _Parser,
    families: Sequence[Family],
    shape: dict[str, int],
    dtype: str | None,
    named: bool,
) -> list[Family]:
    """The families that take a shape of these sizes, all of them where they were named."""
    fitting = [one for one in families if set(one.letters) == set(shape)]
    if not fitting or (named and len(fitting) < len(families)):
        known = "; ".join(f"{one.name}: {','.join(one.letters)}" for one in families if one.letters)
        parser.error(
            f"--shape must have the sizes of {known or 'another family'}, got {','.join(shape)}"
        )
    for one in fitting:
        if dtype is not None and dtype not in one.dtypes:
            parser.error(
                f"--dtype must be one of {', '.join(one.dtypes)} for {one.name}, got {dtype!r}"
            )
    return fitting


def _compare(parser: _Parser, before: Path, after: Path) -> int:
    """Rows of two files side by side: medians, and what the second needs of the first's time."""
    rows = []
    for path in (before, after):
        try:
            rows.append({(r.op, r.case, r.mode, r.provider): r for r in read_rows(path)})
        except (OSError, ValueError, TypeError) as error:
            got = getattr(error, "strerror", None) or error
            parser.error(f"--compare {path}: expected rows that --json wrote, got: {got}")
    shared = [key for key in rows[0] if key in rows[1]]
    if not shared:
        parser.error(f"--compare: {before} and {after} have no case in common")
    table = []
    for op, case, mode, provider in shared:
        a, b = (found[op, case, mode, provider] for found in rows)
        memory = ""
        if a.peak_bytes and b.peak_bytes:
            memory = f"{b.peak_bytes / a.peak_bytes:.2f}"
        name = case if case.startswith(op) else f"{op} {case}"
        times = (f"{a.p50_us:.0f}", f"{b.p50_us:.0f}", f"{b.p50_us / a.p50_us:.2f}")
        table.append((name, provider, mode, *times, memory))
    header = ("case", "provider", "mode", "before us", "after us", "time", "peak memory")
    print_table(header, table, left=3)
    for name, found in (("before", rows[0]), ("after", rows[1])):
        e = next(iter(found.values())).environment
        parts = (e.get(key) for key in ("machine", "torch", "bayes_kernels", "commit", "date"))
        print(f"{name}: {', '.join(str(part) for part in parts if part)}")
    alone = len(rows[0]) + len(rows[1]) - 2 * len(shared)
    if alone:
        print(f"{alone} rows are in one file only")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 where every family of ours agrees with its reference."""
    parser = _Parser(
        prog="bayes-kernels bench",
        description="Measure kernels and methods against PyTorch and published code.",
        epilog="Families: " + ", ".join(FAMILIES) + ". Results: docs/benchmarks.md.",
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="by default all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few cases, less time for each")
    parser.add_argument("--seconds", type=float, help="time for the repetitions of one case")
    parser.add_argument(
        "--vs", help="providers to compare with, divided by commas; 'none' for our own alone"
    )
    parser.add_argument("--case", help="only cases whose name has this text in it")
    parser.add_argument("--json", type=Path, help="write the rows to this file, JSON lines")
    parser.add_argument(
        "--save", action="store_true", help="add the rows to results/<machine>/<family>.jsonl"
    )
    parser.add_argument(
        "--shape", type=_sizes, help="one case of these sizes: T=2048,n=4096,m=4096,r=16"
    )
    parser.add_argument("--dtype", help="fp32, bf16 or fp16, with --shape")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE", "AFTER"),
        help="two files of rows; no run",
    )
    given = parser.parse_args(arguments)
    if given.compare is not None:
        others = [
            name
            for name, value in vars(given).items()
            if value != parser.get_default(name) and value
        ]
        if got := [name for name in others if name != "compare"]:
            named = ", ".join("FAMILY" if name == "families" else f"--{name}" for name in got)
            parser.error(
                f"--compare runs nothing: expected it alone, got {named} too; leave it out"
            )
        return _compare(parser, *given.compare)
    chosen = tuple(given.families) or FAMILIES
    for name in chosen:
        if name not in FAMILIES:
            parser.error(f"FAMILY must be one of {', '.join(FAMILIES)}, got {name!r}")
    if _library.problem is not None:
        parser.error(f"compiled ops cannot be loaded: {_library.problem}; {_library.ADVICE}")
    if given.seconds is not None and not given.seconds > 0:
        parser.error(f"--seconds must be positive, got {given.seconds}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device cpu")
    if given.vs is not None and given.save:
        # The page shows the newest run of a case: one of few providers would hide the others' bars.
        parser.error("--save needs all providers; leave --vs out, or use --json")
    if given.shape is not None and given.save:
        parser.error("--save takes the cases of the page; with --shape use --json")
    vs = None
    if given.vs is not None:
        vs = frozenset(word.strip() for word in given.vs.split(",") if word.strip()) - {"none"}
    if given.device == "cpu":
        torch.set_num_threads(1)
    families = [load_family(name) for name in chosen]
    if given.shape is not None:
        families = _with_shape(parser, families, given.shape, given.dtype, bool(given.families))
    elif given.dtype is not None:
        parser.error("--dtype goes with --shape; cases have a dtype of their own")
    options = Options(
        given.device, given.quick, given.seconds, vs, given.case, given.shape, given.dtype
    )
    known = {p for family in families for p in (*family.providers, *family.ours)}
    if vs is not None and not vs <= known:
        unknown = ", ".join(sorted(vs - known))
        parser.error(f"--vs must name providers of {', '.join(sorted(known))}, got {unknown}")
    if given.json is not None and given.json.exists():
        given.json.unlink()

    def save(family: Family, rows: Sequence[Row]) -> None:
        if given.json is not None:
            save_rows(given.json, rows)
        if given.save:
            save_rows(results_folder(given.device) / f"{family.name}.jsonl", rows)

    measured = 0
    stopped = []
    for family in families:
        print(f"== {family.name}: {family.title}", flush=True)
        reason = family.missing(options)
        if reason is not None:
            print(f"skipped: {reason}\n")
            continue
        rows = []
        try:
            for row in family.run(options):
                new = not rows or (rows[-1].op, rows[-1].case) != (row.op, row.case)
                if new:
                    save(family, rows)  # case by case: a run that is killed keeps what it measured
                rows.append(row)
                if new:
                    print(f"measured {row.op} {row.case}", file=sys.stderr, flush=True)
        except Disagreement as error:
            stopped.append(f"{family.name}: {error}")
        except Exception as error:  # whatever it is, the other families are measured
            traceback.print_exc()
            stopped.append(f"{family.name}: {type(error).__name__}, see above")
        measured += len(rows)
        if not rows:
            if not stopped or not stopped[-1].startswith(f"{family.name}:"):
                print("no case has this name\n" if given.case else "no case\n")
            continue
        print_rows(family, rows)
        verdicts = bars.verdicts(family.name, rows, given.device)
        if verdicts:
            print()
            bars.print_verdicts(verdicts)
        print(flush=True)
        save(family, rows)
    for line in stopped:
        print(f"stopped: {line}", file=sys.stderr)
    if measured == 0 and given.case is not None and not stopped:
        parser.error(f"--case {given.case!r}: no case of {', '.join(chosen)} has this in its name")
    return 1 if stopped else 0
