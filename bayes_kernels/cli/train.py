"""Commands that train: demo, train, compare."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..launcher import launched
from .options import (
    Alpha,
    Base,
    Compat,
    Cores,
    Data,
    Debug,
    Device,
    Draws,
    DrawScope,
    Dtype,
    Kind,
    LabelNames,
    MaxLength,
    Ood,
    OodSize,
    Overwrite,
    Plots,
    Preset,
    Quantization,
    Rank,
    Results,
    Samples,
    Seed,
    Seeds,
    Settings,
    Split,
    StepExamples,
    Steps,
    Style,
    TargetModules,
    Test,
    TestSize,
    Threads,
    TrainSize,
    number,
    source_options,
    start,
    start_runs,
    whole,
    words,
)
from .output import (
    command_line,
    describe_task,
    draw_pictures,
    inputs_of,
    note,
    output_of,
    status,
    writing,
)
from .runs import RunOptions, with_run_options

if TYPE_CHECKING:
    from ..experiment.recipe import Experiment
    from ..experiment.run import Run
    from ..experiment.tables import Failure


def demo(
    out: Results = Path("runs/demo"),
    seeds: Seeds = 1,
    steps: Annotated[int | None, whole("Optimiser steps.", least=1)] = None,
    train_size: Annotated[
        int | None,
        whole("Training examples; 400 of stdlib-docs, all of other data.", least=1),
    ] = None,
    test_size: TestSize = 400,
    ood_size: OodSize = 200,
    n_samples: Samples = None,
    draws: Draws = None,
    draw_scope: DrawScope = None,
    model: Base = "minilm",
    style: Style = "blob",
    dtype: Dtype = "float32",
    max_length: MaxLength = 32,
    method: Annotated[
        str, typer.Option(help="Bayesian method to compare with plain LoRA, see train.")
    ] = "blob",
    data: Data = "stdlib-docs",
    settings: Settings = None,
    threads: Cores = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a real language model with plain LoRA and with BLoB, or another method, and compare.

    Task: which area of Python's standard library a docstring is from. Out of distribution:
    docstrings of numpy and torch. No download.
    """
    from ..experiment import build, output, page, results, room, scoring, tables
    from ..experiment import compare as comparison
    from ..experiment import run as experiments
    from ..experiment.recipe import Experiment, Source
    from ..experiment.settings import recipes_of
    from ..files import write_json
    from ..hf.method import METHODS, PLAIN

    methods = (PLAIN, method)
    if method not in METHODS or method == PLAIN:
        allowed = ", ".join(name for name in METHODS if name != PLAIN)
        raise ValueError(f"method: expected one of {allowed}, got {method!r}")
    processes = start_runs(threads, device)
    fields = {
        "steps": steps,
        "max_length": max_length,
        "n_samples": n_samples,
        "draws": draws,
        "draw_scope": draw_scope,
    }
    recipes = recipes_of(fields, settings or (), methods)
    if train_size is None:
        train_size = 0 if os.path.exists(data or "") else 400
    source = Source(data=data or "", train_size=train_size, test_size=test_size, ood_size=ood_size)
    experiments.check_trainable(method)

    def make(name: str, seed: int) -> Experiment:
        return Experiment(
            source,
            model,
            style=style,
            dtype=dtype,
            method=name,
            recipe=recipes[name],
            seed=seed,
        )

    for name in methods:
        build.check_experiment(make(name, 0))
    files = [*methods, *output.PICTURES, results.METRICS_FILE, page.REPORT_FILE]
    inputs = {"data": data, "model": model}
    with writing("demo", out, files, inputs, overwrite=overwrite) as place:
        jobs = []
        for seed in range(seeds):
            with status(f"reading {source.data}, seed {seed}"):
                task = source.load(seed)
            for name in methods:
                one = make(name, seed)
                folder = out / name if seed == 0 else None
                jobs.append(experiments.Job(one, task, folder, temperature=name == PLAIN))
        describe_task(task)
        for job in jobs:
            comparison.check_validation(job.experiment, job.task)
        if (reason := scoring.untempered(make(PLAIN, 0).seen(task))) is not None:
            note(reason)
        for job in jobs[: len(methods)]:  # whether model, data and options fit
            built = build.build(job.experiment, job.task, device=device)
        fit = room.check_room(processes, device, *built, [job.experiment for job in jobs])
        del built
        if fit is not None:
            note(fit)
        place.begin()

        def done(run: Run) -> None:
            assert run.training is not None
            note(
                f"{METHODS[run.experiment.method].title}, seed {run.experiment.seed}: "
                f"{run.training.steps} steps in {run.training.seconds:.0f} s"
            )

        # Longest first, so that all cores are busy to the end.
        jobs.sort(key=lambda job: job.experiment.method == PLAIN)
        runs = experiments.run_many(jobs, processes=processes, device=device, done=done)
        order = {name: place for place, name in enumerate(methods)}
        runs.sort(key=lambda run: (run.experiment.seed, order[run.experiment.method]))
        content = results.report(runs, task, command=command_line())
        summaries = results.summarise(runs)
        rows = [row for one in runs if one.experiment.seed == 0 for row in one.rows]
        verdict = results.verdict(summaries, rows[0].name, rows[-1].name)
        content["verdict"] = verdict
        title = f"{task.name}: {len(task.train)} training texts, {model}"
        page.write_page(
            out, summaries, rows, task, title=title, verdict=verdict, command=command_line()
        )
        write_json(out / results.METRICS_FILE, content)
        place.complete()
        print(tables.run_tables(summaries, title), verdict, sep="\n")
        pictures = draw_pictures(rows, out)
    names = ", ".join(path.name for path in pictures)
    print(
        f"Wrote {out}/: {results.METRICS_FILE}, {names + ' (seed 0), ' if names else ''}adapters "
        f"{PLAIN}/ and {method}/ (seed 0).\n"
        f"Look at {out / page.REPORT_FILE}\n"
        f"Try: bayes-kernels predict {out / method} --text 'Return the sine of x.'"
    )


def train(
    source_argument: Annotated[
        str | None, typer.Argument(metavar="DATA", help="The same as --data.")
    ] = None,
    data: Data = None,
    test: Test = None,
    ood: Ood = None,
    label_names: LabelNames = None,
    train_size: TrainSize = None,
    test_size: TestSize = None,
    ood_size: OodSize = None,
    split: Split = "test",
    model: Annotated[
        str,
        typer.Option(
            help="minilm, smollm2, a folder of a transformers model, or a name on the hub."
        ),
    ] = "minilm",
    kind: Kind = "auto",
    style: Style = "blob",
    compat: Compat = False,
    dtype: Dtype = "float32",
    quantization: Quantization = None,
    method: Annotated[
        str,
        typer.Option(help="One of `bayes-kernels methods`; ensembles are for compare."),
    ] = "blob",
    rank: Rank = None,
    alpha: Alpha = None,
    target_modules: TargetModules = None,
    dropout: Annotated[float | None, number("Dropout before the adapter.")] = None,
    lr: Annotated[float | None, number("Peak learning rate.")] = None,
    steps: Steps = None,
    batch_size: StepExamples = None,
    accumulation: Annotated[int | None, whole("Micro-batches of a step.")] = None,
    warmup: Annotated[float | None, number("Share of steps with rising rate.")] = None,
    weight_decay: Annotated[
        float | None, number("Of AdamW; 1e-5 for map, else 0 by default.")
    ] = None,
    max_length: MaxLength = None,
    n_samples: Samples = None,
    preset: Preset = "default",
    draws: Draws = None,
    draw_scope: DrawScope = None,
    settings: Settings = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results; runs/TASK-METHOD-seedN by default.")
    ] = None,
    save_every: Annotated[
        int | None, whole("Steps between checkpoints; a fifth by default.", least=1)
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
    on from there. Under torchrun or accelerate launch, processes share the examples of each step.
    """
    if (source_argument is None) == (data is None):
        raise ValueError(
            "data: expected it once, as argument or as --data, got "
            + ("none" if data is None else "both")
        )
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one")
    from ..experiment import build, folders, output, page, results, scoring, tables
    from ..experiment import compare as comparison
    from ..experiment import run as experiments
    from ..experiment.callbacks import Interrupted
    from ..experiment.recipe import Experiment, Source
    from ..experiment.settings import recipes_of
    from ..files import write_json

    start(threads, device)
    experiments.check_trainable(method)
    fields = {
        "rank": rank,
        "alpha": alpha,
        "target_modules": words(target_modules),
        "dropout": dropout,
        "lr": lr,
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "max_length": max_length,
        "n_samples": n_samples,
        "draws": draws,
        "draw_scope": draw_scope,
    }
    recipe = recipes_of(fields, settings or (), [method], preset)[method]
    source = Source(
        data=source_argument or data or "",
        **source_options(test, ood, label_names, test_size, ood_size, train_size, split),
    )
    one = Experiment(source, model, kind, style, dtype, quantization, method, recipe, seed, compat)
    build.check_experiment(one)
    files = [*output.adapter_files(), f"{folders.CHECKPOINTS}/checkpoint-*"]
    files += [results.METRICS_FILE, page.REPORT_FILE]
    files += output.PICTURES if plots else ()
    inputs = {**inputs_of(source), "model": model}
    options = {"overwrite": overwrite, "resume": resume}
    if out is not None and launched().first:
        output_of("train", out, files, inputs, **options).check()
    with status(f"reading {source.data}"):
        task = source.load(seed)
    comparison.check_validation(one, task)
    folder = out or Path("runs") / f"{task.name}-{method}-seed{seed}"
    call = functools.partial(
        experiments.run,
        one,
        task,
        folder=folder,
        resume=resume,
        save_every=save_every,
        device=device,
    )
    if not launched().first:
        with contextlib.suppress(Interrupted):  # the first process says it
            call(progress=False)
        return
    with writing("train", folder, files, inputs, **options) as place:
        if resume:
            folders.check_resumable(folder, one, task)
        describe_task(task)
        if (reason := scoring.untempered(one.seen(task))) is not None:
            note(reason)
        run = call(before_writing=place.begin)
        content = results.report([run], task, command=command_line())
        title = f"{task.name}, {model}, seed {seed}"
        summaries = results.summarise([run])
        page.write_page(
            folder,
            summaries,
            run.rows,
            task,
            title=title,
            note=" ".join(run.notes),
            command=command_line(),
        )
        write_json(folder / results.METRICS_FILE, content)
        place.complete()
        print(tables.run_tables(summaries, title), *run.notes, sep="\n")
        if plots:
            draw_pictures(run.rows, folder)
    print(f"Wrote {folder}/, look at {folder / page.REPORT_FILE}")


@with_run_options
def compare(
    *,
    methods: Annotated[
        str,
        typer.Option(
            help="all, or some of `bayes-kernels methods`, temperature (plain LoRA with a temperature "
            "that was fitted on validation rows), temperature-draws (the same for draws) and variants such "
            "as tfb-on-blob, divided by commas."
        ),
    ] = "all",
    seeds: Seeds = 3,
    members: Annotated[
        int | None, whole("Members of an ensemble; 3 by default.", least=2, most=1000)
    ] = None,
    out: Results = Path("runs/compare"),
    threads: Cores = None,
    given: RunOptions,
) -> None:
    """Compare methods and baselines on one task, over seeds: one table, one picture of each kind.

    Plain LoRA is trained once for each seed; temperature scaling and methods that convert an adapter
    use it, and ensembles add members on the same examples. A method that fails is a line of the
    table that says why. Ctrl-C keeps what has ended; the same command with --resume goes on, also
    with more methods or seeds.
    """
    given.check()
    from ..experiment import build, differences, output, page, results, room, tables
    from ..experiment import compare as comparison
    from ..experiment.recipe import Recipe
    from ..experiment.settings import recipes_of
    from ..files import write_json, write_text
    from ..hf.method import METHODS, PLAIN

    asked = words(methods) or ()
    names = comparison.check_methods(asked)
    processes = start_runs(threads, given.device)
    source = given.source()
    used = comparison.used_methods(names)
    joins = [name for name, row in METHODS.items() if row.made == "join"]
    if members is not None and not set(joins) & set(used):
        raise ValueError(
            f"members: expected {' or '.join(joins)} among --methods, got {', '.join(names)}"
        )
    # Plain LoRA is built even where it is not compared.
    recipes = {
        PLAIN: Recipe(),
        **recipes_of(given.fields(), given.settings or (), used, given.preset),
    }
    for name in set(joins) & set(used):
        count = members or METHODS[name].n_samples
        recipes[name] = dataclasses.replace(recipes[name], n_samples=count)

    def make(name: str, seed: int) -> Experiment:
        return given.experiment(source, name, recipes[name], seed)

    for name in used:
        build.check_experiment(make(name, 0))
    files = [comparison.TABLE_FILE, comparison.RESULTS_FILE, page.REPORT_FILE, *output.PICTURES]
    inputs = {**inputs_of(source), "model": given.model}
    with writing(
        "compare", out, files, inputs, overwrite=given.overwrite, resume=given.resume
    ) as place:
        tasks = {}
        for seed in range(seeds):
            with status(f"reading {source.data}, seed {seed}"):
                tasks[seed] = source.load(seed)
        describe_task(tasks[0])
        lacking = comparison.left_out(names, asked, make, tasks)
        for name in lacking:
            note(f"{name} is left out: it needs labelled validation rows, and its runs have none")
        names = tuple(name for name in names if name not in lacking)
        pieces = comparison.plan(names, make, tasks, out, seeds=seeds)
        if given.resume:
            comparison.check_saved(pieces)
        first = pieces[0]  # whether model and data fit
        built = build.build(make(PLAIN, 0), first.task, device=given.device)
        fit = room.check_room(processes, given.device, *built, [make(name, 0) for name in used])
        del built
        if fit is not None:
            note(fit)
        place.add([str(piece.folder.relative_to(out)) for piece in pieces])
        place.begin()

        def done(piece: comparison.Piece, result: Run | Failure) -> None:
            what = f"failed: {result.error}" if isinstance(result, tables.Failure) else "done"
            note(f"{piece.label}: {what}")
            for text in () if isinstance(result, tables.Failure) else result.notes:
                note(f"  {text}")

        runs, failures = comparison.compare(
            pieces, processes=processes, device=given.device, done=done
        )
        if not runs:
            raise ValueError(
                "compare: every run failed: " + "; ".join(sorted({one.error for one in failures}))
            )
        shown = comparison.chosen(results.summarise(runs), names)
        shifted = tables.shift_table(shown) if shown else None
        text = tables.comparison_table(shown, failures, seeds).markdown()
        text += "" if shifted is None else "\n" + shifted.markdown()
        apart = []
        if shown and len(shown) > 1 and PLAIN in names:
            apart = [differences.difference_table(runs, shown)]
            text += "\n" + apart[0].markdown()
        content = results.report(runs, tasks[0], command=command_line())
        content["failures"] = [dataclasses.asdict(one) for one in failures]
        rows = [row for one in runs if one.experiment.seed == 0 for row in one.rows]
        drawn = comparison.main_rows(rows, names)
        written = [comparison.RESULTS_FILE, comparison.TABLE_FILE]
        if drawn:
            written.insert(0, page.REPORT_FILE)
            page.write_page(
                out,
                shown,
                drawn,
                tasks[0],
                title=f"{tasks[0].name}, {given.model}: {len(names)} methods",
                note="Pictures and texts are those of seed 0.",
                more=apart,
                command=command_line(),
            )
        write_text(out / comparison.TABLE_FILE, text)
        write_json(out / comparison.RESULTS_FILE, content)
        place.complete()
        # Wide tables would be cut at the width of a terminal: Markdown is read as it is.
        print(text)
        for name in comparison.missing(names, shown, failures):
            note(f"no row for {name}: the runs that it looks at have failed, or have no draws")
        pictures = draw_pictures(drawn, out) if drawn else []
    drawings = ", ".join(path.name for path in pictures)
    note(
        f"Wrote {out}/: {', '.join(written)}{f', {drawings} (seed 0)' if drawings else ''}, adapters"
    )
    if failures:
        raise typer.Exit(1)
