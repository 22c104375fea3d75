"""Options that several commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import _shorten


def _set_debug(context: typer.Context, value: bool) -> bool:
    context.find_root().meta["debug"] = value
    return value


# --- Options that several commands share ---------------------------------------------------------


def _whole(help: str, *names: str, least: int | None = None, most: int | None = None) -> Any:
    """An option that is an integer; the message about another value names it and the range."""
    words = "an integer"
    if least is not None:
        words += f" >= {least}" if most is None else f" from {least} to {most}"

    def parse(value: str | int) -> int:
        try:
            number = int(value)
        except ValueError:
            number = None
        if (
            number is None
            or (least is not None and number < least)
            or (most is not None and number > most)
        ):
            raise typer.BadParameter(f"expected {words}, got {_shorten(str(value))!r}")
        return number

    return typer.Option(*names, help=help, parser=parse, metavar="INTEGER")


def _number(help: str, *names: str) -> Any:
    """An option that is a number, also nan and inf, whose range others check."""

    def parse(value: str | float) -> float:
        try:
            return float(value)
        except ValueError:
            raise typer.BadParameter(f"expected a number, got {_shorten(str(value))!r}") from None

    return typer.Option(*names, help=help, parser=parse, metavar="NUMBER")


# torch takes any number, and the system ends the process where it has no room for their stacks.
_MOST_THREADS = 4 * (os.cpu_count() or 1)
# transformers gives the seed to numpy, whose generator takes 32 bits.
_MOST_SEED = 2**32 - 1
_MOST_DRAWS = 1_000_000
_DEBUG = typer.Option(
    "--debug", help="Show the traceback of an error.", callback=_set_debug, is_eager=True
)
Debug = Annotated[bool, _DEBUG]
Threads = Annotated[
    int | None, _whole("CPU threads; by default what torch chooses.", least=1, most=_MOST_THREADS)
]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the results of an earlier run in the folder.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "--task",
        help="stdlib-docs, a data set of the hub (wg_s, wg_m, arc_c, arc_e, obqa, boolq), or a "
        "JSONL file or folder.",
    ),
]
Test = Annotated[str | None, typer.Option(help="JSONL file of test examples.")]
Ood = Annotated[
    list[str] | None,
    typer.Option(help="Out-of-distribution set: JSONL file or hub name; may be repeated."),
]
LabelNames = Annotated[str | None, typer.Option(help="Names of the classes, divided by commas.")]
TestSize = Annotated[int | None, _whole("Largest number of test examples.", least=1)]
OodSize = Annotated[int | None, _whole("Largest number of examples of each OOD set.", least=1)]
Samples = Annotated[
    int | None, _whole("Posterior draws; 0 is the mean.", "--n-samples", least=0, most=_MOST_DRAWS)
]
TrainSize = Annotated[
    int | None, _whole("Training examples, chosen by the seed; 0 for all.", least=0)
]
Base = Annotated[str, typer.Option(help="Base model, see train.")]
Kind = Annotated[str, typer.Option(help="auto, causal, classifier or multiple_choice.")]
Style = Annotated[str, typer.Option(help="Prompt: blob, laplace or plain.")]
Dtype = Annotated[str, typer.Option(help="Base: float32, bfloat16, float16.")]
Quantization = Annotated[
    str | None, typer.Option(help="8bit or 4bit: base quantised by bitsandbytes.")
]
Rank = Annotated[int | None, _whole("r of LoRA.")]
Alpha = Annotated[float | None, _number("alpha of LoRA.")]
TargetModules = Annotated[str | None, typer.Option(help="Layers to adapt, divided by commas.")]
Steps = Annotated[int | None, _whole("Optimiser steps.")]
StepExamples = Annotated[int | None, _whole("Examples of a step.")]
MaxLength = Annotated[int | None, _whole("Largest number of tokens.")]
Plots = Annotated[bool, typer.Option("--plots", help="Also write the pictures.")]
OtherBase = Annotated[str | None, typer.Option(help="Another base model than recorded.")]
DrawSeed = Annotated[int | None, _whole("Seed of the draws.", least=0, most=_MOST_SEED)]
BatchExamples = Annotated[int | None, _whole("Examples of a batch.", least=1)]
Seeds = Annotated[int, _whole("Number of seeds: 0, 1, ...", least=1, most=1000)]
Results = Annotated[Path, typer.Option(help="Folder for results.")]


def _words(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _pairs(items: Sequence[str] | None, option: str) -> dict[str, Any] | None:
    """name=value as a dictionary; values are JSON where they can be, else text."""
    if not items:
        return None
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"{option}: expected name=value, got {item!r}")
        if name in found:
            raise ValueError(f"{option}: expected {name} once, got it twice, last as {item!r}")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def _need_ops() -> None:
    from .. import _library

    if _library.problem is not None:
        raise ImportError(f"compiled ops cannot be loaded: {_library.problem}; {_library._ADVICE}")


def _start(threads: int | None) -> None:
    """Threads, and silence from libraries whose messages mean nothing to users here."""
    import torch

    from .. import _library
    from ..experiment.processes import quiet_libraries

    _library.has_kernels(torch.empty(0))  # warns or raises where the library is missing
    if threads is not None:
        torch.set_num_threads(threads)
    quiet_libraries()


def _all_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
