"""The command line of the benchmarks: families, one after the other, with their rows and bars.

python cuda_benchmarks [FAMILY ...] [--device cuda] [--quick] [--vs PROVIDERS] [--case TEXT]
                       [--json PATH] [--save]
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
    results_folder,
    save_rows,
)


class _Parser(argparse.ArgumentParser):
    """Ends with the mistake in one line, as every command does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


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
    given = parser.parse_args(arguments)
    chosen = tuple(given.families) or FAMILIES
    for name in chosen:
        if name not in FAMILIES:
            parser.error(f"FAMILY must be one of {', '.join(FAMILIES)}, got {name!r}")
    if given.seconds is not None and not given.seconds > 0:
        parser.error(f"--seconds must be positive, got {given.seconds}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device cpu")
    if given.vs is not None and given.save:
        # The page shows the newest run of a case: one of few providers would hide the others' bars.
        parser.error("--save needs all providers; leave --vs out, or use --json")
    vs = None
    if given.vs is not None:
        vs = frozenset(word.strip() for word in given.vs.split(",") if word.strip()) - {"none"}
    if given.device == "cpu":
        torch.set_num_threads(1)
    options = Options(given.device, given.quick, given.seconds, vs, given.case)
    families = [load_family(name) for name in chosen]
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
