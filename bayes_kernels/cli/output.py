"""What commands print, and the folders that they write."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..experiment.data.tasks import Example, Task
    from ..experiment.output import Output
    from ..experiment.recipe import Source
    from ..experiment.results import Summary
import re
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from ..experiment.data.tasks import Example, Task
    from ..experiment.recipe import Source


def _note_task(task: Task) -> None:
    """Sizes of its splits, and classes that it cannot teach."""
    _note("\n".join([task.summary(), *(f"warning: {line}" for line in task.warnings())]))


def _answer(task: Task, example: Example, index: int) -> str:
    name = task.label_names[index]
    if task.kind == "multiple_choice" and index < len(example.choices):
        return f"{name}) {example.choices[index]}"
    return name


# --- Folders -------------------------------------------------------------------------------------


def _output(
    kind: str,
    folder: Path,
    files: Sequence[str],
    inputs: Mapping[str, Any],
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> Output:
    from ..experiment.output import Output

    return Output(
        folder,
        files,
        kind=kind,
        command=_command(),
        inputs=inputs,
        overwrite=overwrite,
        resume=resume,
    )


@contextlib.contextmanager
def _writing(
    kind: str, folder: Path, files: Sequence[str], inputs: Mapping[str, Any], **options: bool
) -> Iterator[Output]:
    """The folder of a command; Ctrl-C and SIGTERM end it with a line that says how to go on."""
    from ..experiment.callbacks import Interrupted

    output = _output(kind, folder, files, inputs, **options)
    try:
        with output:
            yield output
    except Interrupted as stop:
        what = f"interrupted after step {stop.step}; checkpoint: {stop.checkpoint}"
        number = stop.signal
    except KeyboardInterrupt as stop:
        kept = "what has ended is kept" if output.kept() else f"{folder} is as it was"
        what, number = f"interrupted; {kept}", getattr(stop, "signal", signal.SIGINT)
    else:
        return
    _note(f"{what}\ngo on with: {output.way_on()}")
    raise typer.Exit(128 + number)


def _inputs(source: Source) -> dict[str, Any]:
    return {"data": source.data, "test": source.test, "ood": source.ood}


# --- Output --------------------------------------------------------------------------------------


def _console() -> Console:
    # Brackets and colons in texts, classes and paths are what they are, not markup.
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(**plain)
    # Without a terminal to measure, tables would be cut at 80 columns.
    return console if console.is_terminal else Console(width=120, **plain)


def _note(text: str) -> None:
    """Progress for people: standard error, so that standard output can be used by programs."""
    print(text, file=sys.stderr, flush=True)


def _status(text: str) -> Any:
    return Console(stderr=True).status(Text(f"{text} ..."))


def _writes_unicode(stream: Any) -> bool:
    return (stream.encoding or "").lower().replace("-", "") == "utf8"


def _shorten(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _command() -> list[str]:
    return ["bayes-kernels", *sys.argv[1:]]


def _plots(rows: Sequence[Any], folder: Path) -> list[Path]:
    if importlib.util.find_spec("matplotlib") is None:
        _note("no pictures: matplotlib is missing; run: pip install 'bayes-kernels[plots]'")
        return []
    from ..experiment.results import save_plots

    return save_plots(rows, folder)


_SCORES = {
    "accuracy": "ACC ↑",
    "nll": "NLL ↓",
    "ece": "ECE ↓",
    "brier": "Brier ↓",
    "ood_auroc": "OOD AUROC ↑",
}
_COSTS = {
    "train_seconds": ("train s", 0),
    "train_memory_mib": ("train MiB", 0),
    "ms_per_example": ("ms/text", 1),
    "predict_memory_mib": ("predict MiB", 0),
}


def _table(title: str, headings: Sequence[str], left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < left else "right", no_wrap=True)
    return table


def _print_table(summaries: Sequence[Summary], title: str) -> None:
    """Scores as mean and standard deviation over seeds; costs as means."""
    from ..experiment.machine import memory_measure

    console = _console()
    shown = [key for key in _SCORES if key in summaries[0].mean]
    table = _table(title, ["", *(_SCORES[key] for key in shown)])
    for summary in summaries:
        cells = []
        for key in shown:
            spread = f"±{summary.std[key]:.3f}" if key in summary.std else ""
            cells.append(f"{summary.mean[key]:.3f}{spread.replace('0.', '.', 1)}")
        table.add_row(summary.name, *cells)
    console.print(table)
    shifted = [(s, key) for s in summaries for key, scores in s.ood.items() if "nll" in scores]
    if shifted:
        headings = ("", "set", "ACC ↑", "NLL ↓", "ECE ↓", "Brier ↓", "AUROC ↑")
        below = _table("under shift", headings, left=2)
        for summary, key in shifted:
            scores = summary.ood[key]
            names = ("accuracy", "nll", "ece", "brier", "auroc")
            below.add_row(summary.name, key, *(f"{scores[name]:.3f}" for name in names))
        console.print(below)
    spent = [key for key in _COSTS if key in summaries[0].mean]
    costs = _table("cost", ["", *(_COSTS[key][0] for key in spent)])
    for summary in summaries:
        costs.add_row(summary.name, *(f"{summary.mean[k]:.{_COSTS[k][1]}f}" for k in spent))
    console.print(costs)
    seeds = summaries[0].seeds
    measure = {
        "cuda allocated": "peak memory that torch allocated on the GPU",
        "resident, reset": "peak resident memory of the whole process, reset before each phase",
    }.get(memory_measure(), "highest resident memory of the process since it began")
    spread = (
        f"mean ± standard deviation over {len(seeds)} seeds"
        if len(seeds) > 1
        else f"a single seed ({seeds[0]}): no spread"
    )
    console.print(f"{spread}; MiB: {measure}", style="dim", soft_wrap=True)


USAGE_ERROR = 2


def _fail(message: str) -> NoReturn:
    """`error: ...` on standard error, exit code 2. Lists of bad rows of data keep their lines."""
    lines = [line.strip() for line in message.strip().splitlines()]
    # Libraries wrap their messages, some over many lines.
    separator = "\n" if all(_BAD_ROW.search(line) for line in lines) else " "
    print(f"error: {separator.join(lines)}", file=sys.stderr)
    raise typer.Exit(USAGE_ERROR)


# `file:line: what`, or the end of such a list.
_BAD_ROW = re.compile(r"^[^ ].*?:\d+: |^\.\.\. and \d+ more$")
