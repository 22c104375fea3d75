"""The command bench."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, need_ops, number
from .output import fail


def bench(
    families: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FAMILY",
            help="adapter, predict, tall, curvature, vbll, end_to_end; by default all.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Few cases, less time for each.")] = False,
    vs: Annotated[
        str | None,
        typer.Option(help="Providers to compare with, divided by commas; 'none' for ours alone."),
    ] = None,
    case: Annotated[str | None, typer.Option(help="Only cases with this text in the name.")] = None,
    seconds: Annotated[float | None, number("Time for each case.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file, JSON lines.")
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

    Runs `cuda_benchmarks` of the source tree, one thread on a CPU. Every provider has to agree with an
    fp64 reference before it is timed.
    """
    folder = Path(__file__).resolve().parents[2] / "cuda_benchmarks"
    if not (folder / "__main__.py").is_file():
        fail(
            "bench: benchmarks come with the source tree, which is not beside this installation "
            f"({folder.parent}); clone the repository and run pip install --no-build-isolation -e ."
        )
    command = [sys.executable, str(folder)]
    if report:
        command = [sys.executable, str(folder / "report.py")]
    else:
        need_ops()
        command += [*(families or []), "--device", device]
        options = {"--vs": vs, "--case": case, "--seconds": seconds, "--json": json_file}
        command += ["--quick"] if quick else []
        for option, value in options.items():
            command += [] if value is None else [option, str(value)]
        command += ["--save"] if save else []
    # Set before torch starts its threads, hence a process of its own.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)
