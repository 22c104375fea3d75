"""The command answers: do a model's doubts find its wrong answers?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    Data,
    Debug,
    Device,
    Dtype,
    LabelNames,
    MaxLength,
    Ood,
    OodSize,
    Overwrite,
    Quantization,
    Results,
    Samples,
    Seed,
    Settings,
    Steps,
    Test,
    TestSize,
    Threads,
    TrainSize,
    source_options,
    start,
    words,
)
from .output import can_draw, command_line, describe_task, inputs_of, note, status, writing

if TYPE_CHECKING:
    from ..experiment.answers import Answers
    from ..metrics import Interval, RiskCoverageCurve

TABLE_FILE, REPORT_FILE = "answers.md", "answers.json"
PICTURE_FILES = ("risk_coverage.png", "outside.png")


def answers(
    data: Data = "stdlib-docs",
    methods: Annotated[
        str, typer.Option(help="Divided by commas: methods beside map, which is the baseline.")
    ] = "blob,tfb,laplace",
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="More prompts outside the training area: a file as generate takes it; may be repeated."
        ),
    ] = None,
    test: Test = None,
    ood: Ood = None,
    label_names: LabelNames = None,
    train_size: TrainSize = None,
    test_size: TestSize = 200,
    ood_size: OodSize = 100,
    model: Annotated[
        str, typer.Option(help="Causal language model: smollm2, a folder, or a name on the hub.")
    ] = "smollm2",
    dtype: Dtype = "float32",
    quantization: Quantization = None,
    steps: Steps = None,
    max_length: MaxLength = 64,
    n_samples: Samples = None,
    settings: Settings = None,
    seed: Seed = 0,
    out: Results = Path("runs/answers"),
    overwrite: Overwrite = False,
    threads: Threads = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Do a model's doubts find its wrong answers, and prompts outside its training area?

    Adapters of a causal model learn to write the class of a text in words. Then they answer, and each
    score of uncertainty is asked: does it tell wrong answers from right ones, and foreign prompts from those
    of the test set (AUROC with intervals), and what is the share of wrong answers among the surest?
    """
    from ..experiment import answers as study
    from ..experiment.build import check_experiment
    from ..experiment.recipe import Experiment, Source
    from ..experiment.settings import recipes_of
    from ..files import write_json, write_text
    from ..hf.method import METHODS

    names = (study.BASELINE, *(words(methods) or ()))
    known = [name for name, row in METHODS.items() if row.join is None and row.bayesian]
    if unknown := [name for name in names[1:] if name not in known]:
        raise ValueError(f"methods: expected some of {', '.join(known)}, got {unknown[0]!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"methods: expected each method once, got {methods!r}")
    fields = {"steps": steps, "max_length": max_length, "n_samples": n_samples}
    recipes = recipes_of(fields, settings or (), names, "default")
    source = Source(
        data=data or "",
        **source_options(test, ood, label_names, test_size, ood_size, train_size),
    )
    others: dict[str, list[str]] = {}
    for path in prompts or ():
        others[path.stem] = _texts(path)[:ood_size]
    start(threads, device)
    experiments = [
        Experiment(source, model, "causal", "plain", dtype, quantization, name, recipes[name], seed)
        for name in names
    ]
    for one in experiments:
        check_experiment(one)
    inputs = {**inputs_of(source), "model": model, "prompts": prompts}
    files = [TABLE_FILE, REPORT_FILE, *PICTURE_FILES]
    with writing("answers", out, files, inputs, overwrite=overwrite) as place:
        with status(f"reading {source.data}"):
            task = source.load(seed)
        if same := sorted({"test", *task.ood} & others.keys()):
            raise ValueError(f"prompts: expected a file of another name than {same[0]}; rename it")
        describe_task(task)
        place.begin()

        def done(one: Answers) -> None:
            trained = "" if one.seconds is None else f", trained in {one.seconds:.0f} s"
            note(f"{one.title}: {one.accuracy:.1%} right{trained}")
            if one.conversion is not None:
                note(one.conversion)
            if one.verdict is not None and (one.verdict.harmful or one.verdict.factor != 1):
                note(one.verdict.text)

        found = study.write_answers(experiments, task, others, device=device, done=done)
        table = study.answers_table(found)
        write_text(out / TABLE_FILE, table.markdown())
        content = {"command": command_line(), "answers": study.answers_report(found)}
        write_json(out / REPORT_FILE, content)
        place.complete()
        print(table.text())
        written = [TABLE_FILE, REPORT_FILE, *_pictures(found, out)]
    print(f"Wrote {out}/: {', '.join(written)}")


def _texts(path: Path) -> list[str]:
    """Prompts of a file that are texts."""
    from .generate import read_prompts

    found = read_prompts(path)
    if not all(isinstance(text, str) for text in found):
        raise ValueError(f"file {str(path)!r}: expected texts, got a conversation; leave it out")
    return found


def _pictures(found: list[Answers], out: Path) -> list[str]:
    """Risk and coverage, and AUROCs of foreign prompts; none where matplotlib is missing."""
    if not can_draw():
        return []
    from .. import plots

    curves: dict[str, RiskCoverageCurve] = {}
    wrong: dict[str, Interval] = {}
    outside: dict[str, dict[str, Interval]] = {}
    for one in found:
        for measure, short in (("max_mutual_information", "MI"), ("max_entropy", "entropy")):
            if measure not in one.measures:
                continue
            name = f"{one.title}, {short}"
            curves[name] = one.curve(measure)
            if (interval := one.found(measure)) is not None:
                wrong[name] = interval
            for other in one.texts:
                if other != "test":
                    panel = outside.setdefault(f"prompts of {other}", {})
                    panel[name] = one.detected(measure, other)
    plots.save(plots.risk_coverage(curves), out / PICTURE_FILES[0])
    panels = {**({"wrong answers": wrong} if wrong else {}), **outside}
    if not panels:
        return [PICTURE_FILES[0]]
    plots.save(plots.auroc_intervals(panels), out / PICTURE_FILES[1])
    return list(PICTURE_FILES)
