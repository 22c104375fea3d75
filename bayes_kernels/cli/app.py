"""The command `bayes-kernels`, with all its commands.

Mistakes of the caller end with one line on standard error and exit code 2; ``--debug`` shows the
traceback instead.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer

from ..launcher import launched
from ..memory import out_of_memory
from ..table import shorten
from .answers import answers
from .bench import bench
from .data import data
from .export import export
from .generate import generate
from .methods import methods, print_options
from .options import Debug
from .output import fail, status
from .score import score
from .sweep import sweep
from .train import compare, demo, train
from .use import bayesianize, evaluate, predict

# What goes wrong by the caller's doing, or by the machine's; anything else is a bug.
_EXPECTED = (ValueError, TypeError, ImportError, OSError)
# What typer raises for a command line that it cannot read.
_UsageError: Any = typer.BadParameter.__mro__[1]
# Where a file cannot grow: no room, a quota, a limit of the process.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# Options by the panels of help, in the order of listing; others stay in the panel that typer has.
_GROUPS = {
    "Data": "data test ood label_names train_size test_size ood_size split",
    "Model": "model kind style compat dtype quantization max_length",
    "Method": "method methods vary preset rank alpha target_modules dropout settings options members",
    "Training": "lr steps batch_size accumulation warmup weight_decay seed seeds save_every",
    "Prediction": "n_samples draws draw_scope stop stop_rule min_samples",
    "Results": "out resume overwrite plots",
    "Machine": "threads device",
}
# Commands that a launcher may start several times.
_SHARED = ("train", "info", "methods")
# Commands that begin without transformers; before others a terminal shows what it waits for: 5 s of one core.
_LIGHT = ("info", "methods", "bench")
# Commands that take options of methods: how these come about, and how an option is written.
_METHODS = {
    "train": (("train", "convert"), "--method {method}: --set NAME=VALUE"),
    "sweep": (("train", "convert"), "--method {method}: --set NAME=VALUE"),
    "compare": (("train", "convert", "join"), "--set {method}.NAME=VALUE"),
    "demo": (("train", "convert", "join"), "--set {method}.NAME=VALUE"),
    "answers": (("train", "convert", "join"), "--set {method}.NAME=VALUE"),
    "bayesianize": (("convert",), "--method {method}: --set NAME=VALUE"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}


class _Command(typer.core.TyperCommand):
    """Lists its options in panels."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for parameter in self.params:
            group = _GROUP_OF.get(parameter.name or "")
            if group is not None and isinstance(parameter, typer.core.TyperOption):
                parameter.rich_help_panel = group

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        if self.name in _METHODS:
            print_options(*_METHODS[self.name])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            error.ctx = error.ctx or ctx  # the parser of options does not say whose they are
            raise

    def invoke(self, ctx: Any) -> Any:
        process = launched()
        if process.count > 1 and self.name not in _SHARED:
            fail(
                f"{self.name}: expected one process, got {process.count} of a launcher; only train "
                "shares its work among processes, start this command without torchrun or accelerate"
            )
        if self.name not in _LIGHT and sys.stderr.isatty():
            with status("loading torch, transformers and PEFT"):
                import_module("bayes_kernels.hf")
        return super().invoke(ctx)


class _Commands(typer.core.TyperGroup):
    """Turns expected exceptions into one line and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            if _is_help(error):
                raise
            fail(_usage(error))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.meta.get("debug") or isinstance(error, BrokenPipeError):
                raise
            if isinstance(error, _UsageError):
                if _is_help(error):
                    raise
                fail(_usage(error))
            if out_of_memory(error):
                fail(
                    f"memory: expected enough for this model and its batches, got: {error}; use "
                    "smaller batches, a smaller --max-length, or fewer things side by side"
                )
            if isinstance(error, OSError) and error.errno is not None:
                place = shorten(str(error.filename or "file"))
                if error.errno in _FULL:
                    fail(
                        f"{place}: expected room to write to, got: {error.strerror}; make room, or "
                        "choose another folder"
                    )
                fail(f"{place}: expected a path that can be used, got: {error.strerror}")
            if isinstance(error, _EXPECTED):
                fail(str(error) or type(error).__name__)
            raise


def _is_help(error: Exception) -> bool:
    """Whether a group was named without a command: then its help is printed already, and nothing else to say.

    Told by its name, as typer does: no public module has the class.
    """
    return type(error).__name__ == "NoArgsIsHelpError"


def _usage(error: Any) -> str:
    """What is wrong with a command line, in one line."""
    parameter = getattr(error, "param", None)
    if isinstance(error, typer.BadParameter) and parameter is not None and error.message:
        return f"{' / '.join(parameter.opts)}: {error.message}"
    command, context = ["bayes-kernels"], error.ctx
    while context is not None and context.parent is not None:
        command.insert(1, context.info_name)
        context = context.parent
    message = error.format_message().rstrip(".")
    return f"{message}; expected what {' '.join(command)} --help lists"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Bayesian fine-tuning of language models at LoRA's price.",
    epilog="Which method: docs/choosing.md. Commands: docs/cli.md. Every command has --help and --debug.",
)


def info(
    devices: Annotated[
        bool,
        typer.Option(
            "--devices", help="Load torch and the ops, and say which path each device takes."
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Versions and what was compiled, at once; with --devices which path runs on which device."""
    from ..diagnosis import print_diagnosis, print_summary

    if devices:
        print_diagnosis()
    else:
        print_summary()


# By the panels of help.
_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Begin": (info, methods, demo),
    "Train": (train, compare, sweep, bayesianize),
    "Use": (evaluate, predict, generate, score, export),
    "Measure": (answers, bench),
}
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        # Lines of a paragraph are joined, so that help is wrapped at the width of the terminal only.
        _paragraphs = (_command.__doc__ or "").split("\n\n")
        _help = "\n\n".join(" ".join(part.split()) for part in _paragraphs)
        app.command(cls=_Command, help=_help, rich_help_panel=_panel)(_command)
app.add_typer(data, name="data", rich_help_panel="Begin")


def _share_cores() -> None:
    """Let threads that wait for others of a parallel loop sleep soon; before libgomp is loaded with torch.

    By its default they turn for some milliseconds, on cores that other processes want. Two threads beside
    two other processes on two cores of an AMD EPYC (BLoB on all-MiniLM-L6-v2): .24 s a step instead of .65 s.
    With 10,000 turns they still wait awake between two ops: on quiet cores 300 steps took 13.6 s, by default
    13.1 s (12.6 and 14.5, 12.8 and 13.4). 1,000 turns: .10 s a step, and 14.1 s.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def main() -> None:
    """Entry point of `bayes-kernels` and of `python -m bayes_kernels COMMAND`."""
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding lacks, such as an arrow in a heading, must not end a command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"
    _share_cores()
    app(prog_name="bayes-kernels")


if __name__ == "__main__":
    main()
