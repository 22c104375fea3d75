"""What commands print, and the folders that they write."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import typer

from ..launcher import launched

if TYPE_CHECKING:
    from ..experiment.output import Output
    from ..experiment.recipe import Source
    from ..experiment.scoring import Row
    from ..task import Task

USAGE_ERROR = 2
FIRST_SPEAKS = 60.0  # seconds, for the end of a process on a busy machine
# `file:line: what`, or the end of such a list.
_BAD_ROW = re.compile(r"^[^ ].*?:\d+: |^\.\.\. and \d+ more$")


def fail(message: str) -> NoReturn:
    """`error: ...` on standard error, exit code 2. Lists of bad rows of data keep their lines.

    Under a launcher what is wrong for all processes is said once: the others wait while the first says it,
    upon which the launcher ends them. What only they have found they say after that.
    """
    lines = [line.strip() for line in message.strip().splitlines()]
    # Libraries wrap their messages, some over many lines.
    separator = "\n" if all(_BAD_ROW.search(line) for line in lines) else " "
    process, who = launched(), ""
    if not process.first:
        time.sleep(FIRST_SPEAKS)
        who = f"process {process.rank} of {process.count}: "
    print(f"error: {who}{separator.join(lines)}", file=sys.stderr)
    raise typer.Exit(USAGE_ERROR)


def note(text: str) -> None:
    """Progress for people: standard error, so that standard output can be used by programs."""
    print(text, file=sys.stderr, flush=True)


def status(text: str) -> AbstractContextManager[object]:
    """A moving sign on the terminal while something takes its time."""
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(f"{text} ..."))


def writes_unicode(stream: TextIO) -> bool:
    """Whether a stream can show every character."""
    return (stream.encoding or "").lower().replace("-", "") == "utf8"


def print_json(content: Mapping[str, object]) -> None:
    """One line of JSON on standard output; numbers that are not finite, which JSON lacks, as null."""
    from ..files import finite

    shown = json.dumps(
        finite(content), ensure_ascii=not writes_unicode(sys.stdout), allow_nan=False
    )
    print(shown)


def command_line() -> list[str]:
    """The words of the command that runs."""
    return ["bayes-kernels", *sys.argv[1:]]


def describe_task(task: Task) -> None:
    """Note the sizes of its splits, where they come from, and classes that it cannot teach."""
    lines = [f"note: {line}" for line in task.notes]
    lines += [f"warning: {line}" for line in task.warnings()]
    note("\n".join([task.summary(), *lines]))


def can_draw() -> bool:
    """Whether matplotlib is installed; where it is not, a note says so."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        note("no pictures: matplotlib is missing; run: pip install 'bayes-kernels[plots]'")
    return found


def draw_pictures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The pictures of `save_plots`, in place of earlier ones; none, and a note, without matplotlib."""
    from ..experiment.output import PICTURES

    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
    if not can_draw():
        return []
    from ..experiment.results import save_plots

    return save_plots(rows, folder)


def inputs_of(source: Source) -> dict[str, Any]:
    """What a source reads, by the option that names it."""
    return {"data": source.data, "test": source.test, "ood": source.ood}


def output_of(
    kind: str, folder: Path, files: Sequence[str], inputs: Mapping[str, Any], **options: bool
) -> Output:
    """The folder that a command writes; options are overwrite and resume."""
    from ..experiment.output import Output

    return Output(folder, files, kind=kind, command=command_line(), inputs=inputs, **options)


@contextlib.contextmanager
def writing(
    kind: str, folder: Path, files: Sequence[str], inputs: Mapping[str, Any], **options: bool
) -> Iterator[Output]:
    """The folder of a command; Ctrl-C and SIGTERM end it with a line that says how to go on.

    After `Output.complete` they, and errors, leave what there is.
    """
    from ..experiment.callbacks import Interrupted

    output = output_of(kind, folder, files, inputs, **options)
    try:
        with output:
            if output.starts_anew():
                note(f"nothing to go on from in {folder}: starting from the beginning")
            try:
                yield output
            except BaseException:
                if output.completed:
                    note(f"the results in {folder} are kept; what failed comes after them")
                raise
    except Interrupted as stop:
        what = f"interrupted after step {stop.step}; checkpoint: {stop.checkpoint}"
        number = stop.signal
    except KeyboardInterrupt as stop:
        number = getattr(stop, "signal", signal.SIGINT)
        if output.completed:
            raise typer.Exit(128 + number) from None
        kept = "what has ended is kept" if output.kept() else f"{folder} is as it was"
        what = f"interrupted; {kept}"
    else:
        return
    note(f"{what}\ngo on with: {output.way_on()}")
    raise typer.Exit(128 + number)
