"""The command sweep: one method at several values of one setting."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Cores, Results, Seeds, start_runs
from .output import can_draw, command_line, describe_task, inputs_of, note, status, writing
from .runs import RunOptions, with_run_options

if TYPE_CHECKING:
    from ..experiment.compare import Piece
    from ..experiment.recipe import Experiment
    from ..experiment.run import Run
    from ..experiment.tables import Failure


@with_run_options
def sweep(
    *,
    vary: Annotated[
        str,
        typer.Option(
            metavar="NAME=VALUE,VALUE,...",
            help="The setting and its values, as --set takes them: n_samples=0,1,2,5,10, prior_std=0.1,0.2, "
            "kl_lr=..., rank=...; or checkpoint=50,100,..., steps of one training.",
        ),
    ],
    method: Annotated[
        str, typer.Option(help="One of `bayes-kernels methods`, ensembles excepted.")
    ] = "blob",
    seeds: Seeds = 1,
    out: Results = Path("runs/sweep"),
    threads: Cores = None,
    given: RunOptions,
) -> None:
    """Score a method at several values of one setting: one table, one picture, one page.

    Settings of predictions, such as n_samples, and checkpoints take one training for each seed, settings of
    a conversion one plain adapter, all others a training for each value. Ctrl-C keeps what has ended; the
    same command with --resume goes on, also with more values or seeds.
    """
    given.check()
    from ..experiment import build, page, results, room, run, tables
    from ..experiment import compare as comparison
    from ..experiment import sweep as sweeps
    from ..experiment.settings import recipes_of
    from ..files import write_json, write_text
    from ..hf.method import METHODS

    run.check_trainable(method)
    wanted = sweeps.parse_sweep(vary)
    processes = start_runs(threads, given.device)
    source = given.source()
    used = sweeps.used_methods(method)
    fields, settings = given.fields(), list(given.settings or ())
    recipes = {
        item: recipes_of(fields, [*settings, *more], used, given.preset)
        for item, more in wanted.settings.items()
    }
    wanted.check_steps(recipes[None][used[0]].steps)

    def make(name: str, seed: int, item: str | None) -> Experiment:
        return given.experiment(source, name, recipes[item][name], seed)

    for item in wanted.items:
        build.check_experiment(make(method, 0, item))
    files = [comparison.TABLE_FILE, comparison.RESULTS_FILE, sweeps.PICTURE_FILE]
    files.append(page.REPORT_FILE)
    inputs = {**inputs_of(source), "model": given.model}
    with writing(
        "sweep", out, files, inputs, overwrite=given.overwrite, resume=given.resume
    ) as place:
        tasks = {}
        for seed in range(seeds):
            with status(f"reading {source.data}, seed {seed}"):
                tasks[seed] = source.load(seed)
        describe_task(tasks[0])
        pieces = sweeps.plan_sweep(method, wanted, make, tasks, out, seeds=seeds)
        if given.resume:
            comparison.check_saved(pieces)
        first = pieces[0]  # whether model and data fit
        built = build.build(first.experiment, first.task, device=given.device)
        trained = [make(name, 0, item) for name in used for item in wanted.items]
        fit = room.check_room(processes, given.device, *built, trained)
        del built
        if fit is not None:
            note(fit)
        place.add([str(piece.folder.relative_to(out)) for piece in pieces])
        place.begin()

        said: set[str] = set()  # values of a prediction share what their adapter says of itself

        def done(piece: Piece, result: Run | Failure) -> None:
            what = f"failed: {result.error}" if isinstance(result, tables.Failure) else "done"
            note(f"{piece.word}, seed {piece.experiment.seed}: {what}")
            for text in () if isinstance(result, tables.Failure) else result.notes:
                if text not in said:
                    note(f"  {text}")
                said.add(text)

        runs, failures = comparison.compare(
            pieces, processes=processes, device=given.device, done=done
        )
        if not runs:
            raise ValueError(
                "sweep: every run failed: " + "; ".join(sorted({one.error for one in failures}))
            )
        shown = sweeps.swept(results.summarise(runs), wanted)
        curves = sweeps.curves(shown, wanted)
        titles = {piece.variant: piece.title for piece in pieces if piece.variant}
        text = tables.comparison_table(shown, failures, seeds, titles).markdown()
        content = results.report(runs, tasks[0], command=command_line())
        content["failures"] = [dataclasses.asdict(one) for one in failures]
        rows = [one.rows[-1] for one in runs if one.experiment.seed == 0]
        written = [comparison.TABLE_FILE, comparison.RESULTS_FILE]
        if rows:
            page.write_page(
                out,
                shown,
                rows,
                tasks[0],
                title=f"{tasks[0].name}, {given.model}: {METHODS[method].title}, {wanted.name}",
                note="Pictures below the curves, and texts, are those of seed 0.",
                figures=page.score_figures(*curves, xlabel=wanted.name),
                command=command_line(),
            )
            written.append(page.REPORT_FILE)
        write_text(out / comparison.TABLE_FILE, text)
        write_json(out / comparison.RESULTS_FILE, content)
        place.complete()
        print(text)
        (out / sweeps.PICTURE_FILE).unlink(missing_ok=True)  # of fewer values
        if len(curves.values) > 1 and can_draw():
            from .. import plots

            figure = plots.score_curves(*curves, xlabel=wanted.name)
            plots.save(figure, out / sweeps.PICTURE_FILE)
            written.append(sweeps.PICTURE_FILE)
    print(f"Wrote {out}/: {', '.join(written)}")
    if failures:
        raise typer.Exit(1)
