"""The command bench."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, number
from .output import fail

# Benchmarks of the source tree, and their copy in a wheel.
_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = (_PACKAGE.parent / "cuda_benchmarks", _PACKAGE / "cuda_benchmarks")


def bench(
    families: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FAMILY",
            help="adapter, activations, grouped, predict, tall, curvature, vbll, end_to_end, experts, peers; "
            "by default all.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Few cases, less time for each.")] = False,
    vs: Annotated[
        str | None,
        typer.Option(help="Providers to compare with, divided by commas; 'none' for ours alone."),
    ] = None,
    case: Annotated[str | None, typer.Option(help="Only cases with this text in the name.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="One case of these sizes: T=2048,n=4096,m=4096,r=16 (adapter), S=100,B=16,C=32000 "
            "(predict), count=16,n=4096,r=16 (tall)."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16, with --shape of the adapter.")
    ] = None,
    seconds: Annotated[float | None, number("Time for each case.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file, JSON lines.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="BEFORE AFTER", help="Compare two files that --json wrote; no run."),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Add the rows to the results of this machine.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write docs/benchmarks.md from all results; no run.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Speed and memory of kernels and methods against PyTorch and published code.

    One thread on a CPU. Every provider has to agree with an fp64 reference before it is timed.
    """
    folder = next((one for one in _FOLDERS if (one / "__main__.py").is_file()), None)
    if folder is None:
        fail(
            f"bench: expected the benchmarks in {' or '.join(map(str, _FOLDERS))}, found none; install "
            "the package again"
        )
    options = {
        "--vs": vs,
        "--case": case,
        "--shape": shape,
        "--dtype": dtype,
        "--seconds": seconds,
        "--json": json_file,
    }
    if report:
        others = {"FAMILY": families, "--quick": quick, "--compare": compare, "--save": save}
        given = {name: value or None for name, value in others.items()} | options
        if got := [name for name, value in given.items() if value is not None]:
            fail(
                "--report: expected it alone, since it runs nothing and takes all saved rows, got "
                f"{', '.join(got)} too; leave one of them out"
            )
    installed = folder != _FOLDERS[0]
    if installed and (save or report):
        fail(
            "bench: --save and --report write to the source tree; use --json, or clone the repository"
        )
    command = [sys.executable, str(folder)]
    if report:
        command = [sys.executable, str(folder / "report.py")]
    else:
        command += [*(families or []), "--device", device]
        command += ["--quick"] if quick else []
        for option, value in options.items():
            command += [] if value is None else [option, str(value)]
        command += [] if compare is None else ["--compare", *map(str, compare)]
        command += ["--save"] if save else []
    # Set before torch starts its threads, hence a process of its own.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if installed:  # no commit: a repository around the environment is another one
        from .. import __version__

        environment.setdefault("BAYES_KERNELS_COMMIT", f"wheel {__version__}")
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)
