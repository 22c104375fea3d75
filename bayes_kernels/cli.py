"""The command `bayes-kernels`: info, demo, train, compare, bayesianize, evaluate, predict, bench.

Everything that trains or scores lives in `bayes_kernels.hf`, imported when first needed; here
options become an experiment, and results become tables and files. Mistakes of the caller end with
one line on standard error and exit code 2; ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as _error:
    print(
        f"error: the command line needs typer and rich ({_error}); "
        "run: pip install 'bayes-kernels[hf]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

if TYPE_CHECKING:
    from .hf.experiment import Run
    from .hf.output import Output
    from .hf.recipe import Experiment, Recipe, Source
    from .hf.results import Summary
    from .hf.tasks import Example, Task
    from .hf.training import Saved

USAGE_ERROR = 2
_BASELINE = "map"  # what `demo` compares with

# What goes wrong by the caller's doing, or by the machine's; anything else is a bug.
_EXPECTED = (ValueError, TypeError, ImportError, OSError)
# What typer raises for a command line that it cannot read.
_UsageError: Any = typer.BadParameter.__mro__[1]
# Where a file cannot grow: no room, a quota, a limit of the process.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Commands(typer.core.TyperGroup):
    """Turns expected exceptions into one line and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        asks_for_help = not args  # taken from the list as they are read
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            if asks_for_help:
                raise
            _fail(_usage(error))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.meta.get("debug") or isinstance(error, BrokenPipeError):
                raise
            if isinstance(error, _UsageError):
                _fail(_usage(error))
            if _is_out_of_memory(error):
                _fail(
                    f"memory: expected enough for this model and its batches, got: {error}; use "
                    "smaller batches, a smaller --max-length, or fewer things side by side"
                )
            if isinstance(error, OSError) and error.errno is not None:
                place = _shorten(str(error.filename or "file"))
                if error.errno in _FULL:
                    _fail(
                        f"{place}: expected room to write to, got: {error.strerror}; make room, or "
                        "choose another folder"
                    )
                _fail(f"{place}: expected a path that can be used, got: {error.strerror}")
            if isinstance(error, _EXPECTED):
                _fail(str(error) or type(error).__name__)
            raise


def _usage(error: Any) -> str:
    """What is wrong with a command line, in one line."""
    parameter = getattr(error, "param", None)
    if isinstance(error, typer.BadParameter) and parameter is not None and error.message:
        return f"{' / '.join(parameter.opts)}: {error.message}"
    command = ["bayes-kernels"]
    if error.ctx is not None and error.ctx.parent is not None:
        command.append(error.ctx.info_name)
    message = error.format_message().rstrip(".")
    return f"{message}; expected what {' '.join(command)} --help lists"


def _is_out_of_memory(error: Exception) -> bool:
    # torch has a type of its own for GPUs; for the CPU its RuntimeError has nothing but words.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Bayesian fine-tuning of language models at LoRA's price.",
    epilog="Docs: docs/cli.md. Every command has --help and --debug.",
)


def _fail(message: str) -> NoReturn:
    """`error: ...` on standard error, exit code 2. Lists of bad rows of data keep their lines."""
    lines = [line.strip() for line in message.strip().splitlines()]
    # Libraries wrap their messages, some over many lines.
    separator = "\n" if all(_BAD_ROW.search(line) for line in lines) else " "
    print(f"error: {separator.join(lines)}", file=sys.stderr)
    raise typer.Exit(USAGE_ERROR)


# `file:line: what`, or the end of such a list.
_BAD_ROW = re.compile(r"^[^ ].*?:\d+: |^\.\.\. and \d+ more$")


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


@app.command()
def info(debug: Debug = False) -> None:
    """Versions, what was compiled, and which path runs on which device."""
    from .__main__ import diagnosis

    print(diagnosis())


@app.command()
def demo(
    out: Results = Path("runs/demo"),
    seeds: Seeds = 1,
    steps: Annotated[int | None, _whole("Optimiser steps.", least=1)] = None,
    train_size: Annotated[int, _whole("Training examples.", least=1)] = 400,
    test_size: TestSize = 400,
    ood_size: OodSize = 200,
    n_samples: Samples = None,
    model: Base = "minilm",
    method: Annotated[
        str, typer.Option(help="Bayesian method to compare with plain LoRA, see train.")
    ] = "blob",
    data: Data = "stdlib-docs",
    threads: Annotated[
        int | None,
        _whole(
            "Cores to use, all by default: runs go side by side on them.",
            least=1,
            most=_MOST_THREADS,
        ),
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a real language model with plain LoRA and with BLoB, or another method, and compare.

    Task: which area of Python's standard library a docstring is from. Out of distribution:
    docstrings of numpy and torch. No download.
    """
    from .hf import experiment, output, results, training
    from .hf.config import METHODS
    from .hf.recipe import DEMO, Experiment, Source, write_json

    cores = threads or _all_cores()
    methods = (_BASELINE, method)
    if method not in METHODS or method == _BASELINE:
        allowed = ", ".join(name for name in METHODS if name != _BASELINE)
        raise ValueError(f"method: expected one of {allowed}, got {method!r}")
    _start(cores)
    recipe = DEMO if steps is None else dataclasses.replace(DEMO, steps=steps)
    recipes = {
        name: dataclasses.replace(recipe, n_samples=n_samples if name == method else None)
        for name in methods
    }
    source = Source(data=data or "", train_size=train_size, test_size=test_size, ood_size=ood_size)
    experiment.check_trainable(method)
    for name in methods:
        training.check_experiment(
            Experiment(source, model=model, method=name, recipe=recipes[name])
        )
    files = [*methods, *output.PICTURES, results.METRICS_FILE]
    inputs = {"data": data, "model": model}
    with _writing("demo", out, files, inputs, overwrite=overwrite) as place:
        jobs = []
        for seed in range(seeds):
            with _status(f"reading {source.data}, seed {seed}"):
                task = source.load(seed)
            for name in methods:
                one = Experiment(source, model=model, method=name, recipe=recipes[name], seed=seed)
                folder = out / name if seed == 0 else None
                jobs.append(experiment.Job(one, task, folder, temperature=name == _BASELINE))
        _note_task(task)
        for job in jobs[: len(methods)]:  # whether model, data and options fit
            training.build(job.experiment, job.task, device=device)
        place.begin()
        gpu = training.pick_device(device).type == "cuda"

        def done(run: Run) -> None:
            assert run.training is not None
            _note(
                f"{METHODS[run.experiment.method].title}, seed {run.experiment.seed}: "
                f"{run.training.steps} steps in {run.training.seconds:.0f} s"
            )

        # Longest first, so that all cores are busy to the end.
        jobs.sort(key=lambda job: job.experiment.method == _BASELINE)
        runs = experiment.run_many(jobs, processes=1 if gpu else cores, device=device, done=done)
        order = {name: place for place, name in enumerate(methods)}
        runs.sort(key=lambda run: (run.experiment.seed, order[run.experiment.method]))
        content = results.report(runs, task, command=_command())
        summaries = results.summarise(runs)
        rows = [row for one in runs if one.experiment.seed == 0 for row in one.rows]
        verdict = results.verdict(summaries, rows[0].name, rows[-1].name)
        content["verdict"] = verdict
        pictures = _plots(rows, out)
        write_json(out / results.METRICS_FILE, content)
    _print_table(summaries, f"{task.name}: {len(task.train)} training texts, {model}")
    console = _console()
    console.print(verdict, soft_wrap=True)
    names = ", ".join(path.name for path in pictures)
    console.print(
        f"Wrote {out}/: {results.METRICS_FILE}, {names + ' (seed 0), ' if names else ''}adapters "
        f"{_BASELINE}/ and {method}/ (seed 0).\n"
        f"Try: bayes-kernels predict {out / method} --text 'Return the sine of x.'",
        soft_wrap=True,
    )


@app.command()
def train(
    source_argument: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="The same as --data.")
    ] = None,
    data: Data = None,
    test: Test = None,
    ood: Ood = None,
    label_names: LabelNames = None,
    train_size: TrainSize = None,
    test_size: TestSize = None,
    ood_size: OodSize = None,
    model: Annotated[
        str, typer.Option(help="minilm, a folder of a transformers model, or a name on the hub.")
    ] = "minilm",
    kind: Kind = "auto",
    style: Style = "blob",
    dtype: Dtype = "float32",
    quantization: Quantization = None,
    method: Annotated[
        str,
        typer.Option(
            help="map (plain LoRA), blob, scalabl, polar or polar-vbll; tfb, laplace, laplace-last "
            "(plain LoRA, then convert)."
        ),
    ] = "blob",
    rank: Rank = None,
    alpha: Alpha = None,
    target_modules: TargetModules = None,
    dropout: Annotated[float | None, _number("Dropout before the adapter.")] = None,
    lr: Annotated[float | None, _number("Peak learning rate.")] = None,
    steps: Steps = None,
    batch_size: StepExamples = None,
    accumulation: Annotated[int | None, _whole("Micro-batches of a step.")] = None,
    warmup: Annotated[float | None, _number("Share of steps with rising rate.")] = None,
    weight_decay: Annotated[float | None, _number("Of AdamW.")] = None,
    max_length: MaxLength = None,
    n_samples: Samples = None,
    prior_std: Annotated[float | None, _number("Deviation of the prior.")] = None,
    init_rho: Annotated[
        float | None, _number("BLoB: rho, ScalaBL: deviation, at the start.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="Who shares noise: token (BLoB), example, none.")
    ] = None,
    kl_schedule: Annotated[str | None, typer.Option(help="auto, published or constant.")] = None,
    kl_lr: Annotated[float | None, _number("Rate of the KL step (published, constant).")] = None,
    kl_time: Annotated[float | None, _number("Total size of the KL steps (auto).")] = None,
    kl_gamma: Annotated[
        float | None, _number("Gamma of the KL cycle (published, constant).")
    ] = None,
    kl_direction: Annotated[
        str | None, typer.Option(help="ScalaBL: elbo, or code for the published code's reverse KL.")
    ] = None,
    covariance: Annotated[str | None, typer.Option(help="ScalaBL: diagonal or full.")] = None,
    stiefel: Annotated[
        str | None, typer.Option(help="PoLAR: constraint by landing, polar or qr.")
    ] = None,
    stiefel_penalty: Annotated[
        float | None, _number("PoLAR: weight of landing's pull to the manifold.")
    ] = None,
    head_covariance: Annotated[
        str | None, typer.Option(help="PoLAR-VBLL: diagonal, dense or low_rank.")
    ] = None,
    head_prior_scale: Annotated[
        float | None, _number("PoLAR-VBLL: prior variance of a weight times D / 2.")
    ] = None,
    head_lr: Annotated[float | None, _number("PoLAR-VBLL: rate of the head.")] = None,
    kl_weight: Annotated[float | None, _number("PoLAR-VBLL: factor of the divergence.")] = None,
    alternation: Annotated[
        str | None, typer.Option(help="PoLAR-VBLL: jacobi, gauss-seidel or periodic.")
    ] = None,
    laplace: Annotated[
        bool, typer.Option("--laplace", help="PoLAR-VBLL: refine covariances after training.")
    ] = False,
    convert: Annotated[
        list[str] | None,
        typer.Option(
            help="tfb, laplace, laplace-last: option of bayesianize, as name=value (anchors, metric, "
            "prior, ...); may be repeated."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="Another option of peft.LoraConfig, as name=value; may be repeated."),
    ] = None,
    seed: Annotated[int, _whole("Seed of everything.", least=0, most=_MOST_SEED)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results; runs/TASK-METHOD-seedN by default.")
    ] = None,
    save_every: Annotated[
        int | None, _whole("Steps between checkpoints; a fifth by default.", least=1)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")
    ] = False,
    overwrite: Overwrite = False,
    plots: Plots = False,
    threads: Threads = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Fine-tune an adapter on a task, score it, and write both.

    Ctrl-C finishes the running step and writes a checkpoint; the same command with --resume goes
    on from there.
    """
    if (source_argument is None) == (data is None):
        raise ValueError(
            "data: expected it once, as argument or as --data, got "
            + ("none" if data is None else "both")
        )
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one")
    from .hf import experiment, output, results, training
    from .hf.recipe import Experiment, Source, write_json

    _start(threads)
    recipe = _recipe(
        rank=rank,
        alpha=alpha,
        target_modules=_words(target_modules),
        dropout=dropout,
        lr=lr,
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        warmup=warmup,
        weight_decay=weight_decay,
        max_length=max_length,
        n_samples=n_samples,
        prior_std=prior_std,
        init_rho=init_rho,
        scope=scope,
        kl_schedule=kl_schedule,
        kl_lr=kl_lr,
        kl_time=kl_time,
        kl_gamma=kl_gamma,
        kl_direction=kl_direction,
        covariance=covariance,
        stiefel=stiefel,
        stiefel_penalty=stiefel_penalty,
        head_covariance=head_covariance,
        head_prior_scale=head_prior_scale,
        head_lr=head_lr,
        kl_weight=kl_weight,
        alternation=alternation,
        laplace=laplace,
        convert=_pairs(convert, "--convert"),
        lora=_pairs(lora, "--lora"),
    )
    source = Source(
        data=source_argument or data or "",
        test=test,
        ood=tuple(ood) if ood else None,
        train_size=train_size,
        test_size=test_size,
        ood_size=ood_size,
        label_names=_words(label_names),
    )
    one = Experiment(source, model, kind, style, dtype, quantization, method, recipe, seed)
    experiment.check_trainable(method)
    training.check_experiment(one)
    files = [*output.ADAPTER_FILES, f"{training.CHECKPOINTS}/checkpoint-*", results.METRICS_FILE]
    files += output.PICTURES if plots else ()
    inputs = {"data": source.data, "test": test, "ood": ood, "model": model}
    writing: dict[str, Any] = {"overwrite": overwrite, "resume": resume}
    if out is not None:
        _output("train", out, files, inputs, **writing).check()
    with _status(f"reading {source.data}"):
        task = source.load(seed)
    folder = out or Path("runs") / f"{task.name}-{method}-seed{seed}"
    with _writing("train", folder, files, inputs, **writing) as place:
        if resume:
            training.check_resumable(folder, one)
        _note_task(task)
        run = experiment.run(
            one,
            task,
            folder=folder,
            resume=resume,
            save_every=save_every,
            device=device,
            before_writing=place.begin,
        )
        if plots:
            _plots(run.rows, folder)
        write_json(folder / results.METRICS_FILE, results.report([run], task, command=_command()))
    _print_table(results.summarise([run]), f"{task.name}, {model}, seed {seed}")
    _console().print(f"Wrote {folder}/", soft_wrap=True)


@app.command()
def compare(
    data: Data = "stdlib-docs",
    methods: Annotated[
        str,
        typer.Option(
            help="all, or some of map, temperature, dropout, ensemble and the Bayesian methods, "
            "divided by commas."
        ),
    ] = "all",
    seeds: Seeds = 3,
    test: Test = None,
    ood: Ood = None,
    label_names: LabelNames = None,
    train_size: TrainSize = None,
    test_size: TestSize = None,
    ood_size: OodSize = None,
    model: Base = "minilm",
    kind: Kind = "auto",
    style: Style = "blob",
    dtype: Dtype = "float32",
    quantization: Quantization = None,
    members: Annotated[
        int | None, _whole("Members of an ensemble; 3 by default.", least=2, most=1000)
    ] = None,
    rank: Rank = None,
    alpha: Alpha = None,
    target_modules: TargetModules = None,
    lr: Annotated[float | None, _number("Peak learning rate of all methods.")] = None,
    steps: Steps = None,
    batch_size: StepExamples = None,
    max_length: MaxLength = None,
    n_samples: Samples = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Another setting, of all methods as NAME=VALUE or of one as METHOD.NAME=VALUE "
            "(blob.kl_time=0.01, dropout.dropout=0.2, tfb.convert.anchors=200); may be repeated.",
        ),
    ] = None,
    out: Results = Path("runs/compare"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the results in the folder, run what is missing.")
    ] = False,
    overwrite: Overwrite = False,
    threads: Annotated[
        int | None,
        _whole(
            "Cores to use, all by default: runs go side by side on them.",
            "--threads",
            "--processes",
            least=1,
            most=_MOST_THREADS,
        ),
    ] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Compare methods and baselines on one task, over seeds: one table, one picture of each kind.

    Plain LoRA is trained once for each seed; temperature scaling and methods that convert an adapter
    use it, and ensembles add members on the same examples. A method that fails is a line of the
    table that says why. Ctrl-C keeps what has ended; the same command with --resume goes on, also
    with more methods or seeds.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one")
    from .hf import compare as comparison
    from .hf import output, results, training
    from .hf.recipe import Source, write_json, write_text

    cores = threads or _all_cores()
    words = comparison.check_methods(_words(methods) or ())
    _start(cores)
    common = {
        "rank": rank,
        "alpha": alpha,
        "target_modules": _words(target_modules),
        "lr": lr,
        "steps": steps,
        "batch_size": batch_size,
        "max_length": max_length,
        "n_samples": n_samples,
    }
    source = Source(
        data=data or "",
        test=test,
        ood=tuple(ood) if ood else None,
        train_size=train_size,
        test_size=test_size,
        ood_size=ood_size,
        label_names=_words(label_names),
    )
    setting = {"kind": kind, "style": style, "dtype": dtype, "quantization": quantization}
    if members is not None and "ensemble" not in words:
        raise ValueError(f"members: expected ensemble among --methods, got {', '.join(words)}")
    used = comparison.used_methods(words)
    make = _experiments(source, model, setting, common, option, members, used)
    for name in used:
        training.check_experiment(make(name, 0))
    files = [comparison.TABLE_FILE, comparison.RESULTS_FILE, *output.PICTURES]
    inputs = {"data": source.data, "test": test, "ood": ood, "model": model}
    with _writing("compare", out, files, inputs, overwrite=overwrite, resume=resume) as place:
        tasks = {}
        for seed in range(seeds):
            with _status(f"reading {source.data}, seed {seed}"):
                tasks[seed] = source.load(seed)
        _note_task(tasks[0])
        pieces = comparison.plan(words, make, tasks, out, seeds=seeds)
        if resume:
            comparison.check_saved(pieces)
        first = pieces[0]  # whether model and data fit
        training.build(make("map", 0), first.task, device=device)
        place.add([str(piece.folder.relative_to(out)) for piece in pieces])
        place.begin()
        gpu = training.pick_device(device).type == "cuda"

        def done(piece: comparison.Piece, result: Run | comparison.Failure) -> None:
            one = piece.experiment
            what = f"failed: {result.error}" if isinstance(result, comparison.Failure) else "done"
            _note(f"{one.method}, seed {one.seed}: {what}")

        runs, failures = comparison.compare(
            pieces, processes=1 if gpu else cores, device=device, done=done
        )
        if not runs:
            raise ValueError(
                "compare: every run failed: " + "; ".join(sorted({one.error for one in failures}))
            )
        shown = comparison.chosen(results.summarise(runs), words)
        headings, lines = comparison.table(shown, failures, seeds)
        content = results.report(runs, tasks[0], command=_command())
        content["failures"] = [dataclasses.asdict(one) for one in failures]
        rows = [row for one in runs if one.experiment.seed == 0 for row in one.rows]
        drawn = comparison.main_rows(rows, words)
        pictures = _plots(drawn, out) if drawn else []
        text = comparison.markdown(headings, lines)
        shifted = comparison.shift_table(shown)
        if shifted is not None:
            text += "\n" + comparison.markdown(*shifted)
        write_text(out / comparison.TABLE_FILE, text)
        write_json(out / comparison.RESULTS_FILE, content)
    # Wide tables would be cut at the width of a terminal: Markdown is read as it is.
    print(text)
    names = ", ".join([comparison.RESULTS_FILE, comparison.TABLE_FILE])
    drawings = ", ".join(path.name for path in pictures)
    _note(f"Wrote {out}/: {names}{f', {drawings} (seed 0)' if drawings else ''}, adapters")
    if failures:
        raise typer.Exit(1)


def _experiments(
    source: Source,
    model: str,
    setting: dict[str, Any],
    common: dict[str, Any],
    options: Sequence[str] | None,
    members: int | None,
    used: Sequence[str],
) -> Callable[[str, int], Experiment]:
    """What `compare` runs for a method and a seed.

    What is set for all methods goes to those that have it, and to one at least.

    Raises:
        ValueError: An option names no method of this comparison or no field of the recipe, or nothing
            uses it.
    """
    from .hf.config import METHODS
    from .hf.recipe import Experiment, Recipe

    own: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    fields = {field.name for field in dataclasses.fields(Recipe)}
    every = {name for row in METHODS.values() for name in row.options}
    seen: set[str] = set()

    def uses(method: str, key: str, alone: bool) -> bool:
        row = METHODS[method]
        if key in every:
            return key in row.options
        if key == "laplace":
            return method == "polar-vbll"
        if key == "convert":
            return row.made == "convert"
        if key == "n_samples":  # those of an ensemble are its members
            return row.bayesian and method != "ensemble"
        # What converts or joins is made of plain LoRA, which is trained once with its own settings.
        return row.made == "train" or key == "eval_batch_size" or not alone

    def put(where: str, method: str | None, path: Sequence[str], value: Any) -> None:
        place = ".".join([method or "", *path])
        if place in seen:
            raise ValueError(f"{where}: expected a setting once, got it twice")
        seen.add(place)
        takers = [m for m in ([method] if method else used) if uses(m, path[0], method is not None)]
        if not takers:
            whom = method or f"some method of {', '.join(used)}"
            raise ValueError(
                f"{where}: expected a setting that {whom} uses, got one that it does not"
            )
        for taker in takers:
            found = own[taker]
            # Those of one method stand, whatever is said of all.
            if len(path) == 2:
                found[path[0]] = {**found.get(path[0], {}), path[1]: value}
            else:
                found[path[0]] = value

    for key, value in common.items():
        if value is not None:
            put(key.replace("_", "-"), None, [key], value)
    parsed = []
    for item in options or ():
        name, equals, _ = item.partition("=")
        first, *rest = name.strip().replace("-", "_").split(".")
        word = first.replace("_", "-")
        method = word if rest and word in METHODS else None
        path = rest if method else [first, *rest]
        nested = len(path) == 2 and path[0] in ("convert", "lora")
        if not equals or path[0] not in fields or not (len(path) == 1 or nested):
            raise ValueError(
                f"--set: expected NAME=VALUE or METHOD.NAME=VALUE with a field of the recipe "
                f"({', '.join(sorted(fields))}), got {item!r}"
            )
        if method is not None and method not in used:
            raise ValueError(
                f"--set: expected a method of this comparison ({', '.join(used)}), got {item!r}"
            )
        (value,) = (_pairs([item], "--set") or {}).values()
        parsed.append((f"--set {item}", method, path, value))
    for where, method, path, value in sorted(parsed, key=lambda one: one[1] is not None):
        put(where, method, path, value)

    def make(method: str, seed: int) -> Experiment:
        found = dict(own[method])
        if method == "ensemble":
            found["n_samples"] = members or METHODS[method].n_samples
        recipe = Recipe(**found)
        return Experiment(source, model, method=method, recipe=recipe, seed=seed, **setting)

    return make


@app.command()
def bayesianize(
    adapter: Annotated[
        str, typer.Argument(help="Folder of a trained adapter: plain LoRA, or BLoB.")
    ],
    method: Annotated[str, typer.Option(help="tfb, laplace or laplace-last.")] = "tfb",
    data: Data = None,
    test: Test = None,
    ood: Ood = None,
    label_names: LabelNames = None,
    train_size: Annotated[
        int | None, _whole("Training examples that anchors come from; 0 for all.", least=0)
    ] = None,
    test_size: TestSize = None,
    ood_size: OodSize = None,
    model: OtherBase = None,
    anchors: Annotated[
        int | None,
        _whole("Training examples to look at; tfb 500, laplace all by default.", least=1),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="tfb: flips (default), accuracy or nll.")
    ] = None,
    tolerance: Annotated[
        float | None, _number("tfb: largest change; 0.01, or 0.003 (nll), by default.")
    ] = None,
    convert: Annotated[
        list[str] | None,
        typer.Option(
            help="Another option of the method (laplace: prior, structure, prediction, fisher, tokens, "
            "rank, ...), as name=value; may be repeated."
        ),
    ] = None,
    n_samples: Samples = None,
    seed: DrawSeed = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the new adapter; ADAPTER-METHOD by default.")
    ] = None,
    overwrite: Overwrite = False,
    plots: Plots = False,
    threads: Threads = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Make a trained adapter Bayesian without training it, score it, and write both.

    TFB searches the largest noise that its anchors bear; Laplace-LoRA fits a posterior to all training
    examples. Both are those of the recorded task, or of --data.
    """
    from .hf import experiment, output, results, scoring, training
    from .hf.config import METHODS
    from .hf.recipe import write_json

    _start(threads)
    allowed = [name for name, row in METHODS.items() if row.made == "convert"]
    if method not in allowed:
        raise ValueError(f"method: expected one of {', '.join(allowed)}, got {method!r}")
    saved = training.read_record(adapter)
    one = _recorded(adapter, saved, model, data)
    changes: dict[str, Any] = {
        "train_size": train_size,
        "test": test,
        "ood": tuple(ood) if ood else None,
        "test_size": test_size,
        "ood_size": ood_size,
        "label_names": _words(label_names),
    }
    source = _source_of(one, saved, data)
    given = {key: value for key, value in changes.items() if value is not None}
    source = dataclasses.replace(source, **given)
    # Not the seed of the experiment: that chose the training examples and the parts that were new.
    options = {"anchors": anchors, "metric": metric, "tolerance": tolerance, "seed": seed}
    options = {key: value for key, value in options.items() if value is not None}
    recipe = dataclasses.replace(
        one.recipe,
        n_samples=one.recipe.n_samples if n_samples is None else n_samples,
        convert={**options, **(_pairs(convert, "--convert") or {})},
    )
    before = one.method
    one = dataclasses.replace(
        one,
        source=source,
        method=method,
        recipe=recipe,
    )
    training.conversion_options(one)
    folder = out or Path(f"{adapter.rstrip('/')}-{method}")
    files = [*output.ADAPTER_FILES, results.METRICS_FILE, *(output.PICTURES if plots else ())]
    inputs = {"adapter": adapter, "model": one.model, **_inputs(source)}
    with _writing("bayesianize", folder, files, inputs, overwrite=overwrite) as place:
        with _status(f"reading {source.data}"):
            task = source.load(one.seed)
        if saved is not None:
            _check_classes(saved.task, task)
        _note_task(task)
        length = None if saved is None else saved.max_length
        loaded, encoder = training.load_adapter(
            adapter, one, task, max_length=length, device=device
        )
        place.hold()
        scores: dict[str, Any] = {
            "seed": one.seed if seed is None else seed,
            "batch_size": recipe.eval_batch_size,
            "temperature": False,
        }
        rows = scoring.evaluate_model(
            loaded, encoder, task, method=before, n_samples=0, label="before", **scores
        )
        report = training.convert_model(one, loaded, encoder)
        draws = one.n_samples
        after = scoring.evaluate_model(
            loaded, encoder, task, method=method, n_samples=draws, label="after", **scores
        )[-1]
        # Rows of one name would be taken for seeds of one method.
        rows = [*(row for row in rows if row.name != after.name), after]
        place.begin()
        training.save_adapter(loaded, one, task, encoder, folder)
        if plots:
            _plots(rows, folder)
        run = experiment.Run(one, None, rows)
        content = results.report([run], task, command=_command())
        content["conversion"] = report.to_dict()
        write_json(folder / results.METRICS_FILE, content)
    title, headings, lines = report.table()
    table = _table(title, headings, left=0)
    for line in lines:
        table.add_row(*line)
    console = _console()
    console.print(table)
    _print_table(results.summarise([run]), f"{task.name}, {adapter}")
    console.print(str(report), soft_wrap=True)
    console.print(f"Wrote {folder}/", soft_wrap=True)


@app.command()
def evaluate(
    adapter: Annotated[str, typer.Argument(help="Folder that train, or PEFT, wrote.")],
    data: Data = None,
    test: Test = None,
    ood: Ood = None,
    label_names: LabelNames = None,
    test_size: TestSize = None,
    ood_size: OodSize = None,
    model: OtherBase = None,
    n_samples: Samples = None,
    batch_size: BatchExamples = None,
    seed: DrawSeed = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json; ADAPTER/evaluation by default.")
    ] = None,
    overwrite: Overwrite = False,
    plots: Plots = False,
    threads: Threads = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Score a saved adapter, on the task that it was trained for or on other data."""
    from .hf import experiment, output, results, scoring, training
    from .hf.recipe import write_json

    _start(threads)
    saved = training.read_record(adapter)
    one = _recorded(adapter, saved, model, data)
    source = _source_of(one, saved, data)
    changes: dict[str, Any] = {
        "test": test,
        "ood": tuple(ood) if ood else None,
        "test_size": test_size,
        "ood_size": ood_size,
        "label_names": _words(label_names),
    }
    given = {key: value for key, value in changes.items() if value is not None}
    source = dataclasses.replace(source, **given)
    folder = out or Path(adapter) / output.EVALUATION
    files = [results.METRICS_FILE, *(output.PICTURES if plots else ())]
    inputs = {"adapter": adapter, "model": one.model, **_inputs(source)}
    with _writing("evaluate", folder, files, inputs, overwrite=overwrite) as place:
        with _status(f"reading {source.data}"):
            task = source.load(one.seed)
        if saved is not None:
            _check_classes(saved.task, task)
        _note(task.summary())
        loaded, encoder = training.load_adapter(
            adapter,
            one,
            task,
            max_length=None if saved is None else saved.max_length,
            device=device,
        )
        place.hold()
        scoring.check_draws(loaded, n_samples or 0)
        recipe = one.recipe
        rows = scoring.evaluate_model(
            loaded,
            encoder,
            task,
            method=one.method,
            n_samples=one.n_samples if n_samples is None else n_samples,
            seed=one.seed if seed is None else seed,
            batch_size=batch_size or recipe.eval_batch_size,
        )
        run = experiment.Run(dataclasses.replace(one, source=source), None, rows)
        place.begin()
        if plots:
            _plots(rows, folder)
        write_json(folder / results.METRICS_FILE, results.report([run], task, command=_command()))
    _print_table(results.summarise([run]), f"{task.name}, {adapter}")
    _console().print(f"Wrote {folder}/", soft_wrap=True)


@app.command()
def predict(
    adapter: Annotated[str, typer.Argument(help="Folder that train wrote.")],
    text: Annotated[
        list[str] | None, typer.Option(help="Text to classify; may be repeated.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL file (id, question, context, choices) or text, one a line."),
    ] = None,
    model: OtherBase = None,
    n_samples: Samples = None,
    batch_size: BatchExamples = None,
    seed: DrawSeed = None,
    json_lines: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, with all probabilities.")
    ] = False,
    threads: Threads = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Class, probability, entropy and mutual information (nats) of texts.

    Entropy is all uncertainty; mutual information the part that stems from the adapter's posterior.
    """
    if not text and data is None:
        raise ValueError("predict: expected --text or --data, got neither")
    from .hf import scoring, training
    from .hf.config import METHODS

    _start(threads)
    saved = training.read_record(adapter)
    if saved is None:
        raise ValueError(
            f"adapter {adapter!r}: expected {training.EXPERIMENT_FILE}, which names the classes, "
            "found none; use `evaluate` with --data and --model"
        )
    examples = _examples(text or [], data, saved.task)
    one = _recorded(adapter, saved, model, None)
    task = dataclasses.replace(saved.task, test=examples)
    loaded, encoder = training.load_adapter(
        adapter, one, task, max_length=saved.max_length, device=device
    )
    count = one.n_samples if n_samples is None else n_samples
    if not METHODS[one.method].bayesian and n_samples is None:
        count = 0
    prediction, _ = scoring.predict_examples(
        loaded,
        encoder,
        examples,
        n_samples=count,
        seed=one.seed if seed is None else seed,
        batch_size=batch_size or one.recipe.eval_batch_size,
    )
    probs, classes = prediction.probs, prediction.classes
    table = Table("label", "prob", "entropy", "MI", "text", box=None, pad_edge=False)
    for i, example in enumerate(examples):
        name = _answer(task, example, int(classes[i]))
        found = {
            "id": example.id,
            "label": name,
            "class": int(classes[i]),
            "probability": float(probs[i].max()),
            "entropy": float(prediction.entropy[i]),
            "mutual_information": float(prediction.mutual_information[i]) if count else None,
            "probabilities": [float(p) for p in probs[i]],
        }
        if json_lines:
            print(json.dumps(found, ensure_ascii=not _writes_unicode(sys.stdout)))
            continue
        information = f"{found['mutual_information']:.3f}" if count else "–"
        table.add_row(
            name,
            f"{found['probability']:.3f}",
            f"{found['entropy']:.3f}",
            information,
            _shorten(example.question),
        )
    if not json_lines:
        _console().print(table)


# --- From options to experiments -----------------------------------------------------------------


@app.command()
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
    seconds: Annotated[float | None, _number("Time for each case.")] = None,
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
    folder = Path(__file__).resolve().parent.parent / "cuda_benchmarks"
    if not (folder / "__main__.py").is_file():
        _fail(
            "bench: benchmarks come with the source tree, which is not beside this installation "
            f"({folder.parent}); clone the repository and run pip install --no-build-isolation -e ."
        )
    command = [sys.executable, str(folder)]
    if report:
        command = [sys.executable, str(folder / "report.py")]
    else:
        _need_ops()
        command += [*(families or []), "--device", device]
        options = {"--vs": vs, "--case": case, "--seconds": seconds, "--json": json_file}
        command += ["--quick"] if quick else []
        for option, value in options.items():
            command += [] if value is None else [option, str(value)]
        command += ["--save"] if save else []
    # Set before torch starts its threads, hence a process of its own.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)


def _need_ops() -> None:
    from . import _library

    if _library.problem is not None:
        raise ImportError(f"compiled ops cannot be loaded: {_library.problem}; {_library._ADVICE}")


def _start(threads: int | None) -> None:
    """Threads, and silence from libraries whose messages mean nothing to users here."""
    import torch

    from . import _library
    from .hf.experiment import quiet_libraries

    _library.has_kernels(torch.empty(0))  # warns or raises where the library is missing
    if threads is not None:
        torch.set_num_threads(threads)
    quiet_libraries()


def _all_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _recipe(**options: Any) -> Recipe:
    """The default recipe with the options that were given."""
    from .hf.recipe import Recipe

    return Recipe(**{key: value for key, value in options.items() if value is not None})


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


def _recorded(adapter: str, saved: Saved | None, model: str | None, data: str | None) -> Experiment:
    """The experiment of an adapter folder, with another base model where one is named."""
    from .hf.checkpoints import stored_method
    from .hf.laplace_lora import laplace_method
    from .hf.recipe import Experiment
    from .hf.training import EXPERIMENT_FILE

    if saved is not None:
        one = saved.experiment
    else:
        if data is None:
            raise ValueError(
                f"adapter {adapter!r}: no {EXPERIMENT_FILE} in it says what it was trained on; "
                "name the data with --data"
            )
        config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
        method = laplace_method(adapter) or stored_method(adapter)
        base = model or config.get("base_model_name_or_path")
        if not base:
            raise ValueError(f"adapter {adapter!r}: it names no base model; use --model")
        one = Experiment(model=base, method=method)
    return one if model is None else dataclasses.replace(one, model=model)


def _source_of(one: Experiment, saved: Saved | None, data: str | None) -> Source:
    """The recorded data, or other data with the recorded classes."""
    from .hf.recipe import Source

    if data is None:
        return one.source
    source = Source(data=data, train_size=0)
    if saved is not None and saved.task.kind == "classification" and os.path.exists(data):
        source = dataclasses.replace(source, label_names=saved.task.label_names)
    return source


def _note_task(task: Task) -> None:
    """Sizes of its splits, and classes that it cannot teach."""
    _note("\n".join([task.summary(), *(f"warning: {line}" for line in task.warnings())]))


def _check_classes(expected: Task, got: Task) -> None:
    if expected.kind != got.kind or (
        expected.kind == "classification" and expected.n_classes != got.n_classes
    ):
        raise ValueError(
            f"data {got.name!r}: expected {expected.kind} with {expected.n_classes} classes as in "
            f"training, got {got.kind} with {got.n_classes}; choose data of the same task"
        )
    if expected.kind == "classification" and expected.label_names != got.label_names:
        raise ValueError(
            f"data {got.name!r}: expected the classes {', '.join(expected.label_names)}, got "
            f"{', '.join(got.label_names)}; name them in the order of training"
        )


def _examples(texts: Sequence[str], data: Path | None, task: Task) -> list[Example]:
    """What to predict, from the command line and a file."""
    from .hf.tasks import Example, is_unicode, read_examples

    found = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise ValueError("--text: expected text, got nothing")
        if not is_unicode(text):
            raise ValueError(f"--text: expected Unicode text, got {_shorten(repr(text))}")
        found.append(Example(f"text-{number}", text, None))
    if data is not None:
        if not data.is_file():
            raise ValueError(f"data {str(data)!r}: expected a file that exists, found none")
        if data.suffix in (".jsonl", ".json", ".gz"):
            found += read_examples(data)
        else:
            try:
                lines = data.read_bytes().decode("utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"data {str(data)!r}: expected UTF-8 text, got {error.reason} at byte "
                    f"{error.start}"
                ) from None
            found += [
                Example(f"{data.name}:{number}", line, None)
                for number, line in enumerate(lines, start=1)
                if line.strip()
            ]
    if task.kind == "multiple_choice":
        for example in found:
            if not 2 <= len(example.choices) <= task.n_classes:
                raise ValueError(
                    f"{example.id}: expected 2 to {task.n_classes} choices, got "
                    f"{len(example.choices)}; multiple choice needs --data with 'choices'"
                )
    else:
        found = [dataclasses.replace(example, choices=()) for example in found]
    if not found:
        raise ValueError(f"data {str(data)!r}: expected at least one text, got none")
    return found


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
    from .hf.output import Output

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
    from .hf.training import Interrupted

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
    from .hf.results import save_plots

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
    from .hf.machine import memory_measure

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


def main() -> None:
    """Entry point of `bayes-kernels` and of `python -m bayes_kernels COMMAND`."""
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding lacks, such as an arrow in a heading, must not end a command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"
    app(prog_name="bayes-kernels")


if __name__ == "__main__":
    main()
