"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..launcher import launched
from ..quantization import QUANTIZATIONS
from ..table import shorten

if TYPE_CHECKING:
    import torch


def _set_debug(context: typer.Context, value: bool) -> bool:
    context.find_root().meta["debug"] = value
    return value


def whole(help: str, *names: str, least: int | None = None, most: int | None = None) -> Any:
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
            raise typer.BadParameter(f"expected {words}, got {shorten(str(value))!r}")
        return number

    return typer.Option(*names, help=help, parser=parse, metavar="INTEGER")


def number(help: str, *names: str) -> Any:
    """An option that is a number, also nan and inf, whose range others check."""

    def parse(value: str | float) -> float:
        try:
            return float(value)
        except ValueError:
            raise typer.BadParameter(f"expected a number, got {shorten(str(value))!r}") from None

    return typer.Option(*names, help=help, parser=parse, metavar="NUMBER")


# torch takes any number, and the system ends the process where it has no room for their stacks.
MOST_THREADS = 4 * (os.cpu_count() or 1)
# transformers gives the seed to numpy, whose generator takes 32 bits.
MOST_SEED = 2**32 - 1
_MOST_DRAWS = 1_000_000
_DEBUG = typer.Option(
    "--debug", help="Show the traceback of an error.", callback=_set_debug, is_eager=True
)
Debug = Annotated[bool, _DEBUG]
Threads = Annotated[
    int | None, whole("CPU threads; by default what torch chooses.", least=1, most=MOST_THREADS)
]
Cores = Annotated[
    int | None,
    whole(
        "Runs side by side, on the cores: all by default. On GPUs one on each by default; more share it.",
        "--threads",
        "--processes",
        least=1,
        most=MOST_THREADS,
    ),
]
ResumeRuns = Annotated[
    bool, typer.Option("--resume", help="Keep the results in the folder, run what is missing.")
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
        help="stdlib-docs, a data set of the hub (wg_s, wg_m, arc_c, arc_e, obqa, boolq, mmlu_chem, "
        "mmlu_phys), or a file (JSONL, CSV, TSV) or folder with text and label.",
    ),
]
Test = Annotated[str | None, typer.Option(help="File of test examples.")]
Ood = Annotated[
    list[str] | None,
    typer.Option(help="Out-of-distribution set: a file or hub name; may be repeated."),
]
LabelNames = Annotated[str | None, typer.Option(help="Names of the classes, divided by commas.")]
Split = Annotated[
    str,
    typer.Option(
        help="Test examples of data of the hub: test, or published for those that the papers score."
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="What the other options change: default, or published for the setting of each method's paper, "
        "for causal language models.",
    ),
]
Compat = Annotated[
    bool,
    typer.Option("--compat", help="Prompts of the published code to the letter, slips included."),
]
TestSize = Annotated[int | None, whole("Largest number of test examples.", least=1)]
OodSize = Annotated[int | None, whole("Largest number of examples of each OOD set.", least=1)]
Samples = Annotated[
    int | None, whole("Posterior draws; 0 is the mean.", "--n-samples", least=0, most=_MOST_DRAWS)
]
Draws = Annotated[
    str | None,
    typer.Option(
        help="How draws of weights hang together: antithetic (pairs, the default), independent or shared."
    ),
]
DrawScope = Annotated[
    str | None,
    typer.Option(
        help="example: a draw is one set of weights (the default); token: the noise of training, new for "
        "each token."
    ),
]
Stop = Annotated[
    float | None,
    number(
        "No more draws for a text whose class is settled, with this rate of errors: from 0 (no errors) to "
        "below 0.5. --n-samples is then the most."
    ),
]
StopRule = Annotated[
    str | None,
    typer.Option(
        help="With --stop: normal (leads of a class are about normal, the default) or betting."
    ),
]
MinSamples = Annotated[
    int | None,
    whole("With --stop: the fewest draws of a text, 4 by default.", least=1, most=_MOST_DRAWS),
]
TrainSize = Annotated[
    int | None, whole("Training examples, chosen by the seed; 0 for all.", least=0)
]
Base = Annotated[str, typer.Option(help="Base model, see train.")]
Kind = Annotated[str, typer.Option(help="auto, causal, classifier or multiple_choice.")]
Style = Annotated[str, typer.Option(help="Prompt: blob, laplace or plain.")]
Dtype = Annotated[str, typer.Option(help="Base: float32, bfloat16, float16.")]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="Quantised base: "
        + ", ".join(f"{word} ({one.package})" for word, one in QUANTIZATIONS.items())
        + "."
    ),
]
Rank = Annotated[int | None, whole("r of LoRA.")]
Alpha = Annotated[float | None, number("alpha of LoRA.")]
TargetModules = Annotated[str | None, typer.Option(help="Layers to adapt, divided by commas.")]
Steps = Annotated[int | None, whole("Optimiser steps.")]
StepExamples = Annotated[int | None, whole("Examples of a step.")]
MaxLength = Annotated[int | None, whole("Largest number of tokens.")]
ColorBy = Annotated[
    str | None, typer.Option(help="mutual_information (default with draws) or entropy.")
]
TokenLines = Annotated[
    bool, typer.Option("--json", help="One JSON object a line, with all numbers of all tokens.")
]
TokenPage = Annotated[
    Path | None, typer.Option(help="Also write a page to look at, with coloured tokens.")
]
Plots = Annotated[bool, typer.Option("--plots", help="Also write the pictures.")]
OtherBase = Annotated[str | None, typer.Option(help="Another base model than recorded.")]
WrittenAdapter = Annotated[
    str, typer.Argument(help="Folder that train, or PEFT, wrote, or a folder with one in it.")
]
Seed = Annotated[int, whole("Seed of everything.", least=0, most=MOST_SEED)]
DrawSeed = Annotated[int | None, whole("Seed of the draws.", least=0, most=MOST_SEED)]
BatchExamples = Annotated[int | None, whole("Examples of a batch.", least=1)]
Seeds = Annotated[int, whole("Number of seeds: 0, 1, ...", least=1, most=1000)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="An option of the method (see `bayes-kernels methods METHOD`) or another field of the "
        "recipe. METHOD.NAME=VALUE is for one method, lora.NAME=VALUE an option of peft.LoraConfig. "
        "Values are JSON where they can be, else text. May be repeated.",
    ),
]
Results = Annotated[Path, typer.Option(help="Folder for results.")]


def words(text: str | None) -> tuple[str, ...] | None:
    """Words divided by commas."""
    if text is None:
        return None
    return tuple(word.strip() for word in text.split(",") if word.strip())


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def source_options(
    test: str | None,
    ood: list[str] | None,
    label_names: str | None,
    test_size: int | None,
    ood_size: int | None,
    train_size: int | None = None,
    split: str | None = None,
) -> dict[str, Any]:
    """Fields of a `Source` that a command was given."""
    return given(
        test=test,
        ood=tuple(ood) if ood else None,
        label_names=words(label_names),
        test_size=test_size,
        ood_size=ood_size,
        train_size=train_size,
        split=split,
    )


def start(threads: int | None, device: str) -> torch.device:
    """Set the number of threads, and silence messages of libraries that do not concern users.

    Returns:
        The device of that name.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    from .. import _library
    from ..experiment.processes import quiet_libraries
    from ..hf.tasks.adapters import pick_device

    found = pick_device(device)
    if found.type == "cuda" and launched().count > 1:
        torch.cuda.set_device(launched().local_rank)

    _library.has_kernels(torch.empty(0))  # warns or raises where the library is missing
    if threads is not None:
        torch.set_num_threads(threads)
    quiet_libraries()
    return found


def start_runs(threads: int | None, device: str) -> int:
    """`start` for commands with several runs.

    Args:
        threads: Runs side by side, where that was given.
        device: Name of the device.

    Returns:
        How many runs go side by side: on the CPU by default one on each core, on GPUs one on each.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    if start(None, device).type == "cuda":
        return threads or torch.cuda.device_count()
    torch.set_num_threads(threads or all_cores())
    return threads or all_cores()


def all_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
