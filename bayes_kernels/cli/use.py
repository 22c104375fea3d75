"""Commands that use a trained adapter: bayesianize, evaluate, predict."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..table import Table, shorten
from .options import (
    BatchExamples,
    Data,
    Debug,
    Device,
    Draws,
    DrawScope,
    DrawSeed,
    LabelNames,
    MinSamples,
    Ood,
    OodSize,
    OtherBase,
    Overwrite,
    Plots,
    Samples,
    Stop,
    StopRule,
    Test,
    TestSize,
    Threads,
    given,
    source_options,
    start,
    whole,
)
from .output import (
    command_line,
    describe_task,
    draw_pictures,
    inputs_of,
    note,
    print_json,
    status,
    writing,
)

if TYPE_CHECKING:
    from ..experiment.folders import Saved
    from ..experiment.recipe import Experiment, Source
    from ..task import Example, Task


# Kinds of model by PEFT's word for them.
_KINDS = {"SEQ_CLS": "classifier", "CAUSAL_LM": "causal", "none": "auto"}


def bayesianize(
    adapter: Annotated[
        str, typer.Argument(help="Folder of a trained adapter: plain LoRA, or BLoB.")
    ],
    method: Annotated[
        str, typer.Option(help="One of `bayes-kernels methods` that converts.")
    ] = "tfb",
    data: Data = None,
    test: Test = None,
    ood: Ood = None,
    label_names: LabelNames = None,
    train_size: Annotated[
        int | None, whole("Training examples that anchors come from; 0 for all.", least=0)
    ] = None,
    test_size: TestSize = None,
    ood_size: OodSize = None,
    model: OtherBase = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="An option of the method, see `bayes-kernels methods METHOD`, or scale=keep or scale=fit. "
            "Values are JSON where they can be, else text. May be repeated.",
        ),
    ] = None,
    n_samples: Samples = None,
    draws: Draws = None,
    draw_scope: DrawScope = None,
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

    Methods look at training examples of the recorded task, or of --data.
    """
    from ..experiment import folders, output, page, results, scoring, tables
    from ..experiment.convert import conversion_options, convert_model
    from ..experiment.held_out import check_posterior
    from ..experiment.run import Run
    from ..experiment.settings import method_options
    from ..files import write_json
    from ..hf.method import METHODS

    start(threads, device)
    allowed = [name for name, row in METHODS.items() if row.made == "convert"]
    if method not in allowed:
        raise ValueError(f"method: expected one of {', '.join(allowed)}, got {method!r}")
    saved = folders.read_record(adapter)
    one = _recorded(adapter, saved, model, data)
    changes = source_options(test, ood, label_names, test_size, ood_size, train_size)
    source = dataclasses.replace(_source_of(one, saved, data), **changes)
    # Not the seed of the experiment: that chose the training examples and the parts that were new.
    chosen = {} if seed is None else {"seed": seed}
    own = method_options(options or (), method)
    scale = own.pop("scale", None)
    recipe = dataclasses.replace(
        one.recipe,
        options={**chosen, **own},
        **given(n_samples=n_samples, draws=draws, draw_scope=draw_scope, scale=scale),
    )
    METHODS[method].check_draws(recipe.draws, recipe.draw_scope)
    before = one.method
    one = dataclasses.replace(one, source=source, method=method, recipe=recipe)
    one.check_options()
    conversion_options(one)
    folder = out or Path(f"{adapter.rstrip('/')}-{method}")
    files = [*output.adapter_files(), results.METRICS_FILE, page.REPORT_FILE]
    files += output.PICTURES if plots else ()
    inputs = {"adapter": adapter, "model": one.model, **inputs_of(source)}
    with writing("bayesianize", folder, files, inputs, overwrite=overwrite) as place:
        one, task = _with_task(one, saved)
        describe_task(task)
        length = None if saved is None else saved.max_length
        loaded, encoder = folders.load_adapter(adapter, one, task, max_length=length, device=device)
        place.hold()
        scores: dict[str, Any] = {
            "seed": one.seed if seed is None else seed,
            "batch_size": recipe.eval_batch_size,
            "temperature": False,
        }
        rows = scoring.evaluate_model(
            loaded, encoder, task, method=before, n_samples=0, label="before", **scores
        )
        report = convert_model(one, loaded, encoder)
        verdict = check_posterior(one, loaded, encoder)
        if verdict is not None and (verdict.harmful or verdict.factor != 1):
            note(verdict.text)  # the report below has the deviations of before
        scores.update(n_samples=one.n_samples, draws=recipe.draws, scope=recipe.draw_scope)
        after = scoring.evaluate_model(
            loaded, encoder, task, method=method, label="after", **scores
        )[-1]
        # Rows of one name would be taken for seeds of one method.
        rows = [*(row for row in rows if row.name != after.name), after]
        place.begin()
        folders.save_adapter(loaded, one, task, encoder, folder)
        run = Run(one, None, rows)
        content = results.report([run], task, command=command_line())
        content["conversion"] = report.to_dict()
        content["scale"] = None if verdict is None else verdict.report
        title, summaries = f"{task.name}, {adapter}", results.summarise([run])
        page.write_page(
            folder,
            summaries,
            rows,
            task,
            title=title,
            note=str(report),
            command=command_line(),
        )
        write_json(folder / results.METRICS_FILE, content)
        place.complete()
        print(Table(*report.table(), left=0).text(), end="")
        print(tables.run_tables(summaries, title), report, sep="\n")
        if plots:
            draw_pictures(rows, folder)
    print(f"Wrote {folder}/, look at {folder / page.REPORT_FILE}")


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
    draws: Draws = None,
    draw_scope: DrawScope = None,
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
    """Score a saved adapter, on the task that it was trained for or on other data.

    Of a folder its test data are scored, or the rows that are split off where it has none; of the file that
    it was trained on, the rows that were kept for testing; of another file, all rows.
    """
    from ..experiment import folders, output, page, results, scoring, tables
    from ..experiment.held_out import harm_in
    from ..experiment.run import Run
    from ..files import write_json
    from ..hf.method import METHODS
    from ..hf.predict import predictor_of

    start(threads, device)
    saved = folders.read_record(adapter)
    one = _recorded(adapter, saved, model, data)
    recipe = dataclasses.replace(one.recipe, **given(draws=draws, draw_scope=draw_scope))
    METHODS[one.method].check_draws(recipe.draws, recipe.draw_scope)
    changes = source_options(test, ood, label_names, test_size, ood_size)
    source = dataclasses.replace(_source_of(one, saved, data), **changes)
    alone = data is not None and os.path.isfile(data) and source.test is None
    kept = one.source.test is None and _same_file(source.data, one.source.data)
    if alone and not kept:
        source = dataclasses.replace(source, test_fraction=1.0)
    folder = out or Path(adapter) / output.EVALUATION
    files = [results.METRICS_FILE, page.REPORT_FILE, *(output.PICTURES if plots else ())]
    inputs = {"adapter": adapter, "model": one.model, **inputs_of(source)}
    with writing("evaluate", folder, files, inputs, overwrite=overwrite) as place:
        trained = one
        one, task = _with_task(dataclasses.replace(one, source=source), saved)
        describe_task(task)
        if source.test_fraction is not None:
            note(_seen_in_training(task, trained))
        if (reason := scoring.untempered(task)) is not None:
            note(reason)
        loaded, encoder = folders.load_adapter(
            adapter,
            one,
            task,
            max_length=None if saved is None else saved.max_length,
            device=device,
        )
        place.hold()
        if n_samples and not predictor_of(loaded).draws:
            raise ValueError(
                f"n-samples: expected 0 for an adapter without a posterior, got {n_samples}"
            )
        rows = scoring.evaluate_model(
            loaded,
            encoder,
            task,
            method=one.method,
            n_samples=one.n_samples if n_samples is None else n_samples,
            seed=one.seed if seed is None else seed,
            draws=recipe.draws,
            scope=recipe.draw_scope,
            batch_size=batch_size or recipe.eval_batch_size,
        )
        run = Run(one, None, rows)
        harm = harm_in(rows)
        if harm is not None:
            note(harm)
        place.begin()
        content = results.report([run], task, command=command_line())
        title, summaries = f"{task.name}, {adapter}", results.summarise([run])
        page.write_page(folder, summaries, rows, task, title=title, command=command_line())
        write_json(folder / results.METRICS_FILE, content)
        place.complete()
        print(tables.run_tables(summaries, title))
        if plots:
            draw_pictures(rows, folder)
    print(f"Wrote {folder}/, look at {folder / page.REPORT_FILE}")


def predict(
    adapter: Annotated[str, typer.Argument(help="Folder that train wrote.")],
    text: Annotated[
        list[str] | None, typer.Option(help="Text to classify; may be repeated.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="File (JSONL, CSV, TSV) as train reads it, or text, one a line."),
    ] = None,
    model: OtherBase = None,
    n_samples: Samples = None,
    draws: Draws = None,
    draw_scope: DrawScope = None,
    batch_size: BatchExamples = None,
    seed: DrawSeed = None,
    stop: Stop = None,
    stop_rule: StopRule = None,
    min_samples: MinSamples = None,
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
    from ..experiment import folders
    from ..hf.stopping import stop_options
    from ..hf.tasks.load import load
    from ..hf.tasks.record import read_members
    from ..progress import progress_bar

    start(threads, device)
    rules = stop_options(stop, stop_rule, min_samples, n_samples)
    for folder in read_members(adapter) or [Path(adapter)]:
        folders.read_record(folder)  # which also says where a stopped run goes on
    examples = _examples(text or [], data)
    asked = load(adapter, model=model, device=device)
    if asked.task.kind != "multiple_choice":
        examples = [dataclasses.replace(example, choices=()) for example in examples]
    options: dict[str, Any] = {
        "n_samples": n_samples,
        "seed": seed,
        "draws": draws,
        "scope": draw_scope,
        "batch_size": batch_size,
        **rules,
    }
    if not json_lines:
        print(asked.predict_examples(examples, **options))
        return
    # A bar would tear lines that come on the same terminal.
    apart = not (sys.stdout.isatty() and sys.stderr is not None and sys.stderr.isatty())
    left = iter(examples)
    with progress_bar(apart, total=len(examples), desc="predict", unit="text") as bar:
        for found in asked.stream_examples(examples, progress=False, **options):
            for one, index in zip(found, found.probs.argmax(-1).tolist(), strict=True):
                line = {
                    "id": next(left).id,
                    "label": one.label,
                    "class": index,
                    "probability": one.probability,
                    "entropy": one.entropy,
                    "mutual_information": one.mutual_information,
                    "probabilities": list(one.probs.values()),
                }
                if one.draws_used is not None:
                    line["draws"] = one.draws_used
                print_json(line)
            sys.stdout.flush()
            bar.update(len(found))


def _recorded(adapter: str, saved: Saved | None, model: str | None, data: str | None) -> Experiment:
    """The experiment of an adapter folder, with another base model where one is named."""
    from ..experiment.folders import EXPERIMENT_FILE
    from ..experiment.recipe import Experiment
    from ..hf.checkpoints import stored_method
    from ..hf.method import METHODS

    if saved is not None:
        one = saved.experiment
    else:
        if data is None:
            raise ValueError(
                f"adapter {adapter!r}: no {EXPERIMENT_FILE} in it says what it was trained on; "
                "name the data with --data"
            )
        config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
        found = (name for name, row in METHODS.items() if row.stored(Path(adapter)))
        method = next(found, None) or stored_method(adapter)
        base = model or config.get("base_model_name_or_path")
        if not base:
            raise ValueError(f"adapter {adapter!r}: it names no base model; use --model")
        kind = config.get("task_type") or "none"
        if kind not in _KINDS:
            raise ValueError(
                f"adapter {adapter!r}: expected the task type SEQ_CLS, CAUSAL_LM or none, got {kind}; use "
                "PeftModel.from_pretrained and bayes_kernels.hf.predict"
            )
        one = Experiment(model=base, method=method, kind=_KINDS[kind])
    return one if model is None else dataclasses.replace(one, model=model)


def _source_of(one: Experiment, saved: Saved | None, data: str | None) -> Source:
    """The recorded data, or other data with the recorded classes."""
    from ..experiment.recipe import Source

    if data is None:
        return one.source
    source = Source(data=data, train_size=0)
    if saved is not None and saved.task.kind == "classification" and os.path.exists(data):
        source = dataclasses.replace(source, label_names=saved.task.label_names)
    return source


def _with_task(one: Experiment, saved: Saved | None) -> tuple[Experiment, Task]:
    """The task that an adapter is scored on; and its experiment, with the order of the classes.

    An adapter of others says neither: where the base model names its outputs as the data name the classes,
    its order is taken.
    """
    from ..hf.tasks.models import class_names

    source = one.source
    with status(f"reading {source.data}"):
        task = source.load(one.seed)
    if saved is not None:
        _check_classes(saved.task, task)
        return one, task
    if task.kind == "multiple_choice" and one.kind == "classifier":
        one = dataclasses.replace(one, kind="multiple_choice")
    if source.label_names is None and one.kind != "causal" and os.path.exists(source.data):
        names = class_names(one.model)
        if names is not None and sorted(names) == sorted(task.label_names):
            one = dataclasses.replace(one, source=dataclasses.replace(source, label_names=names))
            task = one.source.load(one.seed)
        if not all(name.isdigit() for name in task.label_names):
            order = shorten(", ".join(task.label_names))
            note(f"outputs are taken as {order}; --label-names gives another order")
    return one, task


def _same_file(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _seen_in_training(task: Task, trained: Experiment) -> str:
    """How many rows of a file an adapter was trained on, or chosen by, if its data are there."""
    from ..experiment.data.check import repeated_in_test

    if os.path.exists(trained.source.data):
        with contextlib.suppress(ValueError, OSError):  # it may be another file by now
            own = trained.source.load(trained.seed)
            seen = repeated_in_test(dataclasses.replace(own, test=task.test))
            bad = "; its scores are too good" if seen else ""
            return f"{seen} of these rows are training or validation rows of the adapter{bad}"
    return "rows that the adapter was trained on would make its scores too good"


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


def _examples(texts: Sequence[str], data: Path | None) -> list[Example]:
    """What to predict, from the command line and a file."""
    from ..experiment.data.rows import SUFFIXES, is_unicode, read_examples
    from ..files import lines_of
    from ..task import Example

    found = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise ValueError("--text: expected text, got nothing")
        if not is_unicode(text):
            raise ValueError(f"--text: expected Unicode text, got {shorten(repr(text))}")
        found.append(Example(f"text-{number}", text, None))
    if data is not None:
        if not data.is_file():
            raise ValueError(f"data {str(data)!r}: expected a file that exists, found none")
        if data.suffix.lower() in (*SUFFIXES, ".json", ".gz"):
            found += read_examples(data)
        else:
            try:
                lines = lines_of(data.read_bytes())
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
    if not found:
        raise ValueError(f"data {str(data)!r}: expected at least one text, got none")
    return found
