"""Several methods on one task, over seeds: one table.

:func:`compare` runs every (method, seed) that has no result yet, several at a time. A finished one is
a folder ``METHOD/seed-N`` with its adapter and ``result.json``, which appears as a whole: a comparison
that was interrupted, or that gets more methods or seeds, goes on from what is there.

Rows that look at an adapter again, with draws of another number or kind, are scored together: the adapter is
loaded once, and one loop over the examples serves all of them. Each still has its own folder, and its own
failure.

Plain LoRA is trained once for a seed. Its adapter is what temperature scaling and conversions use, and
the first member of an ensemble.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bayes_kernels import metrics

from ..files import write_json
from ..hf.checks import read_json
from ..hf.method import METHODS, PLAIN
from ..hf.noise import DRAW_SCOPES, KINDS
from ..hf.tasks.record import FORMAT, write_members
from ..memory import out_of_memory
from ..task import Task
from .folders import (
    EXPERIMENT_FILE,
    changed_settings,
    check_data,
    load_adapter,
    read_record,
    stored_numbers,
)
from .machine import gpus
from .output import unfinished
from .processes import portable, side_by_side
from .recipe import Experiment
from .results import Summary
from .run import SNAPSHOTS, Run, finish, run
from .scoring import Row, Wanted, evaluate_model, evaluate_wanted, known_labels
from .tables import TEMPERATURE, TEMPERED_DRAWS, Failure
from .train import Training
from .variants import CHECKPOINTS, VARIANTS, method_of, snapshot_steps, source_of, title_of, varied

RESULT_FILE = "result.json"
RESULTS_FILE = "results.json"
TABLE_FILE = "table.md"
# Between the seeds of an ensemble's members, which see the same training examples.
MEMBER_SEED = 1000


def known_methods() -> tuple[str, ...]:
    """Words for `compare`: plain LoRA, the baselines, the Bayesian methods."""
    rest = [name for name in METHODS if name != PLAIN]
    return (PLAIN, TEMPERATURE, *rest, TEMPERED_DRAWS, *VARIANTS)


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods in the order of the table; "all" is one row for each method.

    Raises:
        ValueError: A word is unknown or repeated, there is none, or draws shall have a temperature where no
            method has draws.
    """
    known = known_methods()
    unknown = [name for name in methods if name not in (*known, "all")]
    if unknown or not methods:
        raise ValueError(
            f"methods: expected all or some of {', '.join(known)}, got {', '.join(unknown) or 'none'}"
        )
    if twice := sorted({name for name in methods if list(methods).count(name) > 1}):
        raise ValueError(f"methods: expected each once, got {', '.join(twice)} more than once")
    every = (*METHODS, TEMPERATURE) if "all" in methods else ()
    names = tuple(name for name in known if name in (*methods, *every))
    if TEMPERED_DRAWS in names and not any(map(_draws, names)):
        raise ValueError(
            f"methods: expected a method with draws beside {TEMPERED_DRAWS}, got {', '.join(names)}"
        )
    return names


def _is_run(word: str) -> bool:
    """Whether a word of `compare` has runs of its own; else it looks at those of others."""
    return word not in (TEMPERATURE, TEMPERED_DRAWS)


def _draws(word: str) -> bool:
    """Whether the runs of a word predict with draws; members of an ensemble are none."""
    if not _is_run(word):
        return False
    method = METHODS[method_of(word)]
    return method.bayesian and method.join is None


def used_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """Names of `METHODS` that a comparison of these words runs: plain LoRA too where it is needed."""
    words = list(filter(_is_run, methods))
    sources = [source for word in words if (source := source_of(word)) is not None]
    first = [PLAIN] if TEMPERATURE in methods or PLAIN in sources else []
    return tuple(dict.fromkeys([*first, *sources, *map(method_of, words)]))


def left_out(
    methods: Sequence[str],
    asked: Sequence[str],
    experiments: Callable[[str, int], Experiment],
    tasks: Mapping[int, Task],
) -> list[str]:
    """Rows of a comparison that need labelled validation rows, where the task of a seed has none.

    Args:
        methods: From `check_methods`.
        asked: What it was given: what is not among them may be left out.
        experiments: Settings of a method and seed.
        tasks: The task of every seed.

    Raises:
        ValueError: One of them was asked for, or a conversion shall choose on validation rows.
    """

    def fits(word: str) -> bool:
        method = method_of(word)
        return all(_can_fit(varied(experiments(method, i), word), tasks[i]) for i in tasks)

    for name in filter(_is_run, methods):
        for seed, task in tasks.items():
            check_validation(varied(experiments(method_of(name), seed), name), task)
    # Of draws only those have a row whose own runs have such rows.
    looked_at = {TEMPERATURE: [PLAIN], TEMPERED_DRAWS: list(filter(_draws, methods))}
    lacking = [name for name, of in looked_at.items() if name in methods and not any(map(fits, of))]
    if wanted := [name for name in lacking if name in asked]:
        raise ValueError(
            _no_validation(" and ".join(wanted), "methods", next(iter(tasks.values())))
        )
    return lacking


def check_validation(experiment: Experiment, task: Task) -> None:
    """Whether there is what an option of a conversion, such as ``prior=validation``, chooses on.

    Raises:
        ValueError: There are no labelled validation rows.
    """
    conversion, seen = METHODS[experiment.method].conversion, experiment.seen(task)
    if conversion is None or any(one.label is not None for one in seen.validation):
        return
    for name, value in experiment.recipe.options.items():
        if value == "validation" and conversion.takes("validation"):
            what = f"{name}=validation of {experiment.method}"
            raise ValueError(_no_validation(what, "options", task))


def _can_fit(experiment: Experiment, task: Task) -> bool:
    """Whether the runs of an experiment have rows to fit a temperature on."""
    return known_labels(experiment.seen(task).validation) is not None


def _no_validation(what: str, where: str, task: Task) -> str:
    if known_labels(task.validation) is not None:
        return (
            f"{where}: expected validation rows for {what}, got train_on_validation=true, which trains on "
            "them; leave one of them out"
        )
    return (
        f"{where}: expected labelled validation rows for {what}, got none in {task.name!r}, which has "
        f"{len(task.train)} training rows; give more rows or a file of validation rows, or leave {what} out"
    )


# --- Results as files ----------------------------------------------------------------------------


def save_run(one: Run, path: Path) -> None:
    """Write a run, with the predictions of its rows, as JSON."""
    rows = [
        {
            **{f.name: getattr(row, f.name) for f in dataclasses.fields(Row)},
            "report": dataclasses.asdict(row.report),
            "log_probs": row.log_probs.tolist(),
            "labels": row.labels.tolist(),
            "entropy_ood": row.entropy_ood.tolist(),
        }
        for row in one.rows
    ]
    content = {
        "format": FORMAT,
        "experiment": one.experiment.to_dict(),
        "training": None if one.training is None else dataclasses.asdict(one.training),
        "conversion": one.conversion,
        "conversion_seconds": one.conversion_seconds,
        "parameters": one.parameters,
        "scale": one.scale,
        "notes": list(one.notes),
        "rows": rows,
    }
    write_json(path, content)


def load_run(path: Path) -> Run:
    """What `save_run` wrote.

    Raises:
        ValueError: The file is damaged, or of another version.
    """
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is not {FORMAT}")
        training = content["training"]
        rows = [
            Row(
                **{
                    **row,
                    "report": metrics.Report(**row["report"]),
                    "log_probs": _tensor(row["log_probs"]),
                    "labels": torch.tensor(row["labels"]),
                    "entropy_ood": _tensor(row["entropy_ood"]),
                }
            )
            for row in content["rows"]
        ]
        return Run(
            Experiment.from_dict(content["experiment"]),
            None if training is None else Training(**training),
            rows,
            content["conversion"],
            content["conversion_seconds"],
            content["parameters"],
            content["scale"],
            tuple(content.get("notes", ())),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected what compare wrote, got {error!r}; remove the file to run it again"
        ) from None


def _tensor(values: list[Any]) -> torch.Tensor:
    """fp64; JSON has no infinity, and null stands for minus infinity, log 0."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(item) for item in value]
        return -math.inf if value is None else value

    return torch.tensor(finite(values), dtype=torch.float64)


# --- One method and seed -------------------------------------------------------------------------


class Piece(NamedTuple):
    """One (method, seed): what is run, where it goes, and the adapters that it is made of.

    Attributes:
        experiment, task: What is run.
        folder: Where it goes.
        plain: Adapters that it is made of; where they are of its own method, they are scored in its way.
        score: Whether it is a row.
        variant: Word and `method` of its rows, unless these are its method's.
        title: Name of its rows, in place of the method's.
        temper_draws: Whether draws have a row with a temperature.
        snapshots: Steps after which the adapter is saved on the way.
        mean: Whether adapters that are there have a row for their mean beside the one with draws.
    """

    experiment: Experiment
    task: Task
    folder: Path
    plain: tuple[Path, ...] = ()
    score: bool = True
    variant: str = ""
    title: str = ""
    temper_draws: bool = False
    snapshots: tuple[int, ...] = ()
    mean: bool = False

    @property
    def word(self) -> str:
        """What `compare --methods` calls the row."""
        return self.variant or self.experiment.method

    @property
    def label(self) -> str:
        """What a command calls it, by its folder: "blob, seed 0", "ensemble, seed 0, member 1"."""
        place = self.folder.name.replace("-member-", ", member ").replace("seed-", "seed ")
        return f"{self.folder.parent.name}, {place}"


def run_pieces(
    pieces: Sequence[Piece], device: str | None, *, progress: bool
) -> list[Exception | None]:
    """Run a piece; or several that score one adapter again, together.

    Args:
        pieces: An element of `together`.
        device: "cpu", "cuda" or "auto".
        progress: Whether to show bars.

    Returns:
        For each piece what it failed with. What fails for all of them is raised.
    """
    if len(pieces) == 1:
        run_piece(pieces[0], device, progress=progress)
        return [None]
    errors: list[Exception | None] = []
    for piece, result in zip(pieces, _score_again(pieces, device, progress), strict=True):
        try:
            if isinstance(result, Exception):
                raise result
            with _result_folder(piece) as folder:
                save_run(_renamed(piece, result), folder / RESULT_FILE)
            errors.append(None)
        except Exception as error:
            errors.append(portable(error))
    return errors


def run_piece(piece: Piece, device: str | None, *, progress: bool) -> None:
    """Train, convert or join one (method, seed), score it and write its result.

    All that it writes is in a folder beside its own until it has ended.
    """
    saved = _saved(piece.folder)
    with _result_folder(piece) as folder:
        _run_piece(piece, saved, folder, device, progress)


@contextlib.contextmanager
def _result_folder(piece: Piece) -> Iterator[Path]:
    """A folder to write into, which is the piece's at the end; its own where it has one."""
    if _saved(piece.folder) is not None:
        yield piece.folder
        return
    piece.folder.parent.mkdir(parents=True, exist_ok=True)
    name = unfinished(piece.folder.name).replace("*", secrets.token_hex(4))
    half = piece.folder.with_name(name)
    half.mkdir()
    try:
        yield half
        os.rename(half, piece.folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _run_piece(
    piece: Piece, saved: Run | None, folder: Path, device: str | None, progress: bool
) -> None:
    one, score = piece.experiment, piece.score
    task = one.seen(piece.task)
    method = METHODS[one.method]
    made = method.made
    options: dict[str, Any] = {
        "temperature": one.method == PLAIN,
        "temper_draws": piece.temper_draws,
        "mean": made == "train" or piece.mean,
        "progress": progress,
    }
    if piece.plain and _plain(piece.plain[0]).experiment.method == one.method:
        (found,) = _score_again([piece], device, progress)
        assert isinstance(found, Run)  # a single one raises
        result = found
    elif saved is not None and method.join is None:
        # Made for others, or before some row was asked for: its adapter is as it is to be.
        model, encoder = load_adapter(folder, one, task, device=device)
        rows = evaluate_model(
            model,
            encoder,
            task,
            method=one.method,
            n_samples=one.n_samples,
            seed=one.seed,
            draws=one.recipe.draws,
            scope=one.recipe.draw_scope,
            batch_size=one.recipe.eval_batch_size,
            label=f"{method.title}, seed {one.seed}",
            **options,
        )
        result = dataclasses.replace(saved, rows=rows)
    elif made == "train":
        result = run(
            one,
            task,
            folder=folder,
            checkpoints=False,
            snapshots=piece.snapshots,
            score=score,
            device=device,
            **options,
        )
    else:
        sources = [_plain(path) for path in piece.plain]
        loaded = [
            load_adapter(path, source.experiment, task, device=device)
            for path, source in zip(piece.plain, sources, strict=True)
        ]
        model, encoder = loaded[0]
        if method.join is None:
            result = finish(
                one, task, model, encoder, sources[0].training, folder=folder, **options
            )
        else:
            write_members(folder, piece.plain, method=one.method, place=piece.folder)
            ensemble = method.join([member for member, _ in loaded], piece.plain)
            del loaded, model  # their base models would count as memory of predicting
            rows = evaluate_model(
                ensemble,
                encoder,
                task,
                method=one.method,
                n_samples=len(piece.plain),
                batch_size=one.recipe.eval_batch_size,
                temperature=False,
                progress=progress,
                label=f"{method.title}, seed {one.seed}",
            )
            parameters = sum(stored_numbers(path) for path in piece.plain)
            once = sources[-1:] if piece.word == CHECKPOINTS else sources  # trained in one go
            training = _together([source.training for source in once])
            result = Run(one, training, rows, parameters=parameters)
    save_run(_renamed(piece, result), folder / RESULT_FILE)


def _renamed(piece: Piece, result: Run) -> Run:
    """The run with the names that the piece gives its rows."""
    if not piece.variant:
        return result
    title = METHODS[piece.experiment.method].title
    rows = [
        dataclasses.replace(row, name=row.name.replace(title, piece.title), method=piece.word)
        for row in result.rows
    ]
    return dataclasses.replace(result, rows=rows)


def _score_again(
    pieces: Sequence[Piece], device: str | None, progress: bool
) -> list[Run | Exception]:
    """An adapter that is there, scored with the draws of other experiments."""
    one, (path,) = pieces[0].experiment, pieces[0].plain
    source = _plain(path)
    task = one.seen(pieces[0].task)
    model, encoder = load_adapter(path, source.experiment, task, device=device)
    wanted = [
        Wanted(
            piece.experiment.n_samples,
            piece.experiment.recipe.draws,
            piece.experiment.recipe.draw_scope,
            mean=piece.mean,
            temperature=False,
            temper_draws=piece.temper_draws,
        )
        for piece in pieces
    ]
    title = METHODS[one.method].title if len(pieces) > 1 else pieces[0].title
    found = evaluate_wanted(
        model,
        encoder,
        task,
        wanted,
        method=one.method,
        seed=one.seed,
        batch_size=one.recipe.eval_batch_size,
        progress=progress,
        label=f"{title or METHODS[one.method].title}, seed {one.seed}",
    )
    return [
        rows
        if isinstance(rows, Exception)
        else dataclasses.replace(source, experiment=piece.experiment, rows=rows)
        for piece, rows in zip(pieces, found, strict=True)
    ]


def together(pieces: Sequence[Piece], left: Sequence[Piece]) -> list[tuple[Piece, ...]]:
    """What is left to run, with pieces that score one adapter again in one tuple.

    Args:
        pieces: All of them, from `plan`.
        left: Those that have no result yet.
    """
    method_in = {piece.folder: piece.experiment.method for piece in pieces}
    groups: dict[Any, list[Piece]] = {}
    for piece in left:
        one, key = piece.experiment, (piece.folder, "")
        if len(piece.plain) == 1 and method_in.get(_home(piece.plain[0])) == one.method:
            # Draws are all that may differ; a key, since options of a recipe are no hashable values.
            same = dataclasses.replace(
                one.recipe, n_samples=None, draws=KINDS[0], draw_scope=DRAW_SCOPES[0]
            )
            key = piece.plain[0], repr(dataclasses.replace(one, recipe=same))
        groups.setdefault(key, []).append(piece)
    return [tuple(group) for group in groups.values()]


def _saved(folder: Path) -> Run | None:
    path = folder / RESULT_FILE
    return load_run(path) if path.is_file() else None


def _plain(folder: Path) -> Run:
    """The run of an adapter, also of one that was saved on its way."""
    home = _home(folder)
    if home != folder and not folder.is_dir():
        raise ValueError(
            f"needs {folder}, which was not saved when the adapter was trained; use another folder"
        )
    saved = _saved(home)
    if saved is None:
        raise ValueError(f"needs the adapter in {home}, whose training failed")
    return saved


def _home(folder: Path) -> Path:
    """The folder of the run that an adapter is from, also of one that was saved on its way."""
    return folder.parent.parent if folder.parent.name == SNAPSHOTS else folder


def _together(trainings: Sequence[Training | None]) -> Training | None:
    """The cost of trainings one after the other."""
    known = [training for training in trainings if training is not None]
    if not known:
        return None
    return dataclasses.replace(
        known[0],
        seconds=sum(training.seconds for training in known),
        steps=sum(training.steps for training in known),
        peak_memory_mib=max(training.peak_memory_mib for training in known),
        log=[],
    )


# --- All of them ---------------------------------------------------------------------------------


def plan(
    methods: Sequence[str],
    experiments: Callable[[str, int], Experiment],
    tasks: Mapping[int, Task],
    folder: Path,
    *,
    seeds: int,
) -> list[Piece]:
    """Every (method, seed) of a comparison, those first that others need.

    Args:
        methods: From `check_methods`.
        experiments: Settings of a method and seed.
        tasks: The task of every seed.
        folder: Where the comparison goes.
        seeds: Number of seeds: 0, 1, ...

    Raises:
        ValueError: Settings that do not go with a method.
    """
    scored_plain = PLAIN in methods or TEMPERATURE in methods
    tempered = TEMPERED_DRAWS in methods
    others = [name for name in methods if _is_run(name) and name != PLAIN]
    # Adapters that are trained for others to be made of, and are no rows.
    made_of = {origin for name in others if (origin := source_of(name)) is not None}
    only_sources = [name for name in METHODS if name in made_of and name not in (*others, PLAIN)]

    def place(method: str, seed: int) -> Path:
        return folder / method / f"seed-{seed}"

    def plain(seed: int) -> Piece:
        one = experiments(PLAIN, seed)
        on_the_way = snapshot_steps(one.recipe.steps) if CHECKPOINTS in others else ()
        return Piece(one, tasks[seed], place(PLAIN, seed), score=scored_plain, snapshots=on_the_way)

    pieces = []
    if scored_plain or PLAIN in used_methods(methods):
        pieces = [plain(seed) for seed in range(seeds)]
    # What trains first is longest and depends on nothing.
    stages = ("train", "convert", "join")

    def order(name: str) -> tuple[bool, int]:
        return source_of(name) is not None, stages.index(METHODS[method_of(name)].made)

    for name in sorted([*only_sources, *others], key=order):
        method = method_of(name)
        made = METHODS[method].made
        on_the_way = snapshot_steps(experiments(PLAIN, 0).recipe.steps)
        alone = made != "join" or name == CHECKPOINTS
        members = 1 if alone else experiments(method, 0).n_samples
        if not alone and members < 2:
            raise ValueError(f"members: expected at least 2 for {title_of(name)}, got {members}")
        for seed in range(seeds):
            of = source_of(name)
            source = [] if of is None else [place(of, seed)]
            if name == CHECKPOINTS:
                whole = place(PLAIN, seed)
                source = [*(whole / SNAPSHOTS / f"step-{step}" for step in on_the_way), whole]
            for i in range(1, members):
                # Other factors, head and order of examples, but the same examples.
                one = experiments(PLAIN, seed + MEMBER_SEED * i)
                source.append(folder / name / f"seed-{seed}-member-{i}")
                pieces.append(Piece(one, tasks[seed], source[-1], score=False))
            one = varied(experiments(method, seed), name)
            pieces.append(
                Piece(
                    one,
                    tasks[seed],
                    place(name, seed),
                    tuple(source),
                    score=name not in only_sources,
                    variant=name if name != method else "",
                    title=title_of(name),
                    temper_draws=tempered and _draws(name),
                )
            )
    return pieces


def check_saved(pieces: Sequence[Piece]) -> None:
    """Whether results that are there have the settings and the data of the comparison.

    Raises:
        ValueError: One has other settings, classes or rows; the message says which.
    """
    for piece in pieces:
        saved = _saved(piece.folder)
        if saved is None:
            continue
        changed = changed_settings(saved.experiment, piece.experiment)
        if changed:
            raise ValueError(
                f"resume: expected the settings of {piece.folder / RESULT_FILE}, got others: "
                f"{', '.join(changed)}; give the same options as before, or another folder"
            )
        if (piece.folder / EXPERIMENT_FILE).is_file():
            record = read_record(piece.folder)
            assert record is not None
            check_data(piece.folder, record, piece.experiment.seen(piece.task))


def compare(
    pieces: Sequence[Piece],
    *,
    processes: int = 1,
    device: str | None = None,
    progress: bool = True,
    done: Callable[[Piece, Run | Failure], None] = lambda piece, result: None,
) -> tuple[list[Run], list[Failure]]:
    """Run what has no result yet, several at a time; a failure does not stop the others.

    Args:
        pieces: From `plan`.
        processes: How many at a time.
        device: "cpu", "cuda" or "auto".
        progress: Whether to show a bar.
        done: Called with every piece that ends, and its result.

    Returns:
        The results that there are, and the failures, both in the order of the pieces.

    Raises:
        ValueError: As `check_saved`, or a folder of something else stands where a result goes.
    """
    check_saved(pieces)
    for piece in pieces:
        if _saved(piece.folder) is None and os.path.lexists(piece.folder):
            raise ValueError(
                f"compare: expected {RESULT_FILE} in {piece.folder}, found none; move it away or "
                "choose another folder"
            )
    left = [piece for piece in pieces if not _is_done(piece)]
    calls = together(pieces, left)
    failed: dict[Path, Failure] = {}
    numbers = {piece.folder: i for i, call in enumerate(calls) for piece in call}

    def ended_with(piece: Piece, error: BaseException | None) -> None:
        if error is None:
            done(piece, load_run(piece.folder / RESULT_FILE))
            return
        text = " ".join(str(error).split()) or type(error).__name__
        if out_of_memory(error):
            text = (
                f"memory: expected enough for this run, got: {text}; use smaller batches, a smaller "
                "--max-length, or fewer --processes"
            )
        elif not isinstance(error, ValueError):
            text = f"{type(error).__name__}: {text}"
        failed[piece.folder] = Failure(piece.word, piece.experiment.seed, text)
        done(piece, failed[piece.folder])

    def finished(index: int, result: Any) -> None:
        call = calls[index]
        errors = [result] * len(call) if isinstance(result, BaseException) else result
        for piece, error in zip(call, errors, strict=True):
            ended_with(piece, error)

    for piece in left:  # what a killed run left half written
        for half in piece.folder.parent.glob(unfinished(piece.folder.name)):
            shutil.rmtree(half)
    if left:
        needed = [{_home(path) for piece in call for path in piece.plain} for call in calls]
        side_by_side(
            run_pieces,
            [(call, device) for call in calls],
            finished,
            after=[{numbers[path] for path in paths if path in numbers} for paths in needed],
            processes=processes,
            gpus=gpus(device),
            steps=sum(_steps(piece) for piece in left),
            progress=progress,
        )
    ended = [piece for piece in pieces if piece.folder not in failed and piece.score]
    runs = [load_run(piece.folder / RESULT_FILE) for piece in ended]
    return runs, [failed[piece.folder] for piece in pieces if piece.folder in failed]


def _is_done(piece: Piece) -> bool:
    saved = _saved(piece.folder)
    if saved is None or not piece.score:
        return saved is not None
    # Draws may have been scored before a temperature on them was asked for.
    drawn = [row for row in saved.rows if row.n_samples]
    fits = piece.temper_draws and bool(drawn) and _can_fit(piece.experiment, piece.task)
    return bool(saved.rows) and (not fits or any(row.temperature for row in saved.rows))


def _steps(piece: Piece) -> int:
    trains = METHODS[piece.experiment.method].made == "train"
    return piece.experiment.recipe.steps if trains and _saved(piece.folder) is None else 0


def chosen(summaries: Sequence[Summary], methods: Sequence[str]) -> list[Summary]:
    """The rows of the methods that were asked for, in their order."""
    found = []
    for name in methods:
        for one in summaries:
            word = one.method
            if one.temperature:
                word = TEMPERATURE if one.method == PLAIN else TEMPERED_DRAWS
            if name == word:
                found.append(one)
    return found


def missing(
    methods: Sequence[str], shown: Sequence[Summary], failures: Sequence[Failure]
) -> list[str]:
    """Methods that have neither a row nor a line that says what failed, in their order."""
    said = {failure.method for failure in failures}
    return [name for name in methods if name not in said and not chosen(shown, [name])]


def main_rows(rows: Sequence[Row], methods: Sequence[str]) -> list[Row]:
    """Of each method the row with draws where there are any: one line for each in a picture."""
    found: dict[str, Row] = {}
    for row in rows:
        name = row.method
        if row.temperature is not None:
            name = TEMPERATURE if row.method == PLAIN else TEMPERED_DRAWS
        if name in methods:
            found[name] = row
    return [found[name] for name in methods if name in found]
