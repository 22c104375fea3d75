"""Commands that train: demo, train, compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..experiment.recipe import Experiment, Recipe, Source
    from ..experiment.run import Run
from .options import (
    _MOST_SEED,
    _MOST_THREADS,
    Alpha,
    Base,
    Data,
    Debug,
    Device,
    Dtype,
    Kind,
    LabelNames,
    MaxLength,
    Ood,
    OodSize,
    Overwrite,
    Plots,
    Quantization,
    Rank,
    Results,
    Samples,
    Seeds,
    StepExamples,
    Steps,
    Style,
    TargetModules,
    Test,
    TestSize,
    Threads,
    TrainSize,
    _all_cores,
    _number,
    _pairs,
    _start,
    _whole,
    _words,
)
from .output import (
    _command,
    _console,
    _note,
    _note_task,
    _output,
    _plots,
    _print_table,
    _status,
    _writing,
)

_BASELINE = "map"  # what `demo` compares with


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
    from ..experiment import build, output, results
    from ..experiment import run as experiments
    from ..experiment.recipe import DEMO, Experiment, Source
    from ..files import write_json
    from ..hf.method import METHODS

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
    experiments.check_trainable(method)
    for name in methods:
        build.check_experiment(Experiment(source, model=model, method=name, recipe=recipes[name]))
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
                jobs.append(experiments.Job(one, task, folder, temperature=name == _BASELINE))
        _note_task(task)
        for job in jobs[: len(methods)]:  # whether model, data and options fit
            build.build(job.experiment, job.task, device=device)
        place.begin()
        gpu = build.pick_device(device).type == "cuda"

        def done(run: Run) -> None:
            assert run.training is not None
            _note(
                f"{METHODS[run.experiment.method].title}, seed {run.experiment.seed}: "
                f"{run.training.steps} steps in {run.training.seconds:.0f} s"
            )

        # Longest first, so that all cores are busy to the end.
        jobs.sort(key=lambda job: job.experiment.method == _BASELINE)
        runs = experiments.run_many(jobs, processes=1 if gpu else cores, device=device, done=done)
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
    from ..experiment import build, folders, output, results
    from ..experiment import run as experiments
    from ..experiment.recipe import Experiment, Source
    from ..files import write_json

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
    experiments.check_trainable(method)
    build.check_experiment(one)
    files = [*output.ADAPTER_FILES, f"{folders.CHECKPOINTS}/checkpoint-*", results.METRICS_FILE]
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
            folders.check_resumable(folder, one)
        _note_task(task)
        run = experiments.run(
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
    from ..experiment import build, output, results, tables
    from ..experiment import compare as comparison
    from ..experiment.recipe import Source
    from ..files import write_json, write_text

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
        build.check_experiment(make(name, 0))
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
        build.build(make("map", 0), first.task, device=device)
        place.add([str(piece.folder.relative_to(out)) for piece in pieces])
        place.begin()
        gpu = build.pick_device(device).type == "cuda"

        def done(piece: comparison.Piece, result: Run | tables.Failure) -> None:
            one = piece.experiment
            what = f"failed: {result.error}" if isinstance(result, tables.Failure) else "done"
            _note(f"{one.method}, seed {one.seed}: {what}")

        runs, failures = comparison.compare(
            pieces, processes=1 if gpu else cores, device=device, done=done
        )
        if not runs:
            raise ValueError(
                "compare: every run failed: " + "; ".join(sorted({one.error for one in failures}))
            )
        shown = comparison.chosen(results.summarise(runs), words)
        headings, lines = tables.table(shown, failures, seeds)
        content = results.report(runs, tasks[0], command=_command())
        content["failures"] = [dataclasses.asdict(one) for one in failures]
        rows = [row for one in runs if one.experiment.seed == 0 for row in one.rows]
        drawn = comparison.main_rows(rows, words)
        pictures = _plots(drawn, out) if drawn else []
        text = tables.markdown(headings, lines)
        shifted = tables.shift_table(shown)
        if shifted is not None:
            text += "\n" + tables.markdown(*shifted)
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
    from ..experiment.recipe import Experiment, Recipe
    from ..hf.method import METHODS

    own: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    fields = {field.name for field in dataclasses.fields(Recipe)}
    trained = [row for row in METHODS.values() if row.made == "train"]
    every = {name for row in trained for name in row.options} & fields
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


def _recipe(**options: Any) -> Recipe:
    """The default recipe with the options that were given."""
    from ..experiment.recipe import Recipe

    return Recipe(**{key: value for key, value in options.items() if value is not None})
