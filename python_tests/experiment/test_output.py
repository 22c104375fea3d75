"""Folders for results: apart from input, only own files replaced, one run at a time, kills survived."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayes_kernels.experiment import folders

pytest.importorskip("typer")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import tiny_task
from programs import run_command
from typer.testing import CliRunner

from bayes_kernels.cli import app
from bayes_kernels.experiment import output, run
from bayes_kernels.experiment.output import EVALUATION, PRIVATE, Output, Stopped
from bayes_kernels.files import updating_folder, write_text
from experiment import kill_runs

pytestmark = pytest.mark.cpu_only

COMMANDS = ("train", "compare", "demo", "bayesianize", "evaluate")
SMALL = ["--steps", "1", "--rank", "2", "--test-size", "4"]


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app.app, [str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder, the private ones of finished runs aside."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        if PRIVATE in path.parts:
            continue
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, model/ and a trained adapter/."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_task.write_data(folder / "data")
    tiny_task.write_model(folder / "model")
    arguments = ["train", folder / "data", "--model", folder / "model", *SMALL, "--method", "mle"]
    result = call(*arguments, "--out", folder / "adapter")
    assert result.exit_code == 0, result.output
    return folder


# --- Apart from input ----------------------------------------------------------------------------


def arguments_of(command: str, place: Path) -> dict[str, list[object]]:
    """A command's input: what names it, by the place that it is."""
    data, model = place / "data", place / "model"
    if command in ("bayesianize", "evaluate"):
        words = {"adapter": [place / "adapter"], "model": ["--model", model]}
    else:
        words = {"model": ["--model", model]}
    if command != "demo":
        words["data/test.jsonl"] = ["--test", data / "test.jsonl"]
        words["data/ood.jsonl"] = ["--ood", data / "ood.jsonl"]
    return {**words, "data": ["--data", data]}


@pytest.mark.parametrize("spelling", ["plain", "dots", "link"])
@pytest.mark.parametrize("command", COMMANDS)
def test_results_go_nowhere_near_input(
    command: str, spelling: str, inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs, tmp_path / "in")
    (tmp_path / "link").symlink_to(tmp_path / "in", target_is_directory=True)
    before = contents(tmp_path)
    words = arguments_of(command, tmp_path / "in")
    command_line = [command, *(word for part in words.values() for word in part)]

    def spell(path: Path) -> Path:
        if spelling == "dots":
            return tmp_path / "in" / "data" / ".." / path
        return tmp_path / ("link" if spelling == "link" else "in") / path

    for name in words:
        folder = not name.endswith(".jsonl")
        wrong = [spell(Path(name)), *([spell(Path(name) / "deep" / "out")] if folder else [])]
        for out in (*wrong, spell(Path()), tmp_path):
            for option in ([], ["--overwrite"], ["--resume"]):
                if option == ["--resume"] and command not in ("train", "compare"):
                    continue
                result = call(*command_line, "--out", out, *option)
                assert result.exit_code == 2, (out, result.output)
                assert "expected a folder apart from all input" in result.stderr, result.stderr
    assert contents(tmp_path) == before


def test_what_a_record_names_is_input_too(inputs: Path, tmp_path: Path) -> None:
    before = contents(inputs)
    for command in ("bayesianize", "evaluate"):
        for name in ("data", "model", "adapter"):
            result = call(command, inputs / "adapter", "--out", inputs / name, "--overwrite")
            assert result.exit_code == 2 and "apart from all input" in result.stderr
    # A base model inside the folder of results: the checkpoints of an earlier run, say.
    shutil.copytree(inputs / "model", tmp_path / "out" / "checkpoints" / "model")
    model = tmp_path / "out" / "checkpoints" / "model"
    result = call(
        *("train", inputs / "data", "--model", model, "--out", tmp_path / "out", "--overwrite")
    )
    assert result.exit_code == 2 and "holds model" in result.stderr
    # Not what only seems to be the adapter's folder for scores.
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / EVALUATION).symlink_to(tmp_path / "adapter")
    with pytest.raises(ValueError, match="one that is adapter"):
        output.check_apart(tmp_path / "adapter" / EVALUATION, {"adapter": tmp_path / "adapter"})
    output.check_apart(inputs / "adapter" / EVALUATION, {"adapter": inputs / "adapter"})
    output.check_apart(tmp_path / "data-2", {"data": [tmp_path / "data"], "test": None})
    assert contents(inputs) == before


# --- Own files and those of others ---------------------------------------------------------------

FILES = ["metrics.json", "adapter.bin", "checkpoints/checkpoint-*", "mle/seed-0", ".half.*"]


def place(folder: Path, kind: str = "train", **options: Any) -> Output:
    return Output(
        folder,
        FILES,
        kind=kind,
        command=["bayes-kernels", kind, "--out", str(folder)],
        inputs={},
        **options,
    )


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_run(folder: Path, text: str, parts: int = 4) -> None:
    """What a run would write, its last parts left out."""
    put(folder / "checkpoints" / "checkpoint-5" / "model.bin", text)
    if parts > 1:
        put(folder / "checkpoints" / "checkpoint-5" / "trainer_state.json", '{"global_step": 5}')
    if parts > 2:
        put(folder / "mle" / "seed-0" / "result.json", text)
        with updating_folder(folder, "adapter.bin") as unfinished:
            put(unfinished / "adapter.bin", text)
    if parts > 3:
        write_text(folder / "metrics.json", text)


FOREIGN = {
    "thesis.tex": "t",
    "mine.png": "p",
    "checkpoints/notes.txt": "c",
    "checkpoints/mine/model.bin": "c",
    "map/notes.txt": "m",
    "evaluation/notes.txt": "e",
    "old/run.json": "o",
}


def add_foreign(folder: Path) -> None:
    for name, text in FOREIGN.items():
        put(folder / name, text)


def has_foreign(folder: Path) -> bool:
    return all((folder / name).read_text() == text for name, text in FOREIGN.items())


def test_only_own_files_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with place(out) as first:
        first.begin()
        write_run(out, "1")
        put(out / ".half.y" / "left", "1")
    assert not (out / ".half.y").exists()
    with Output(
        out / EVALUATION, ["metrics.json"], kind="evaluate", command=[], inputs={"adapter": out}
    ) as scores:
        scores.begin()
        put(out / EVALUATION / "metrics.json", "scores of 1")
    before = contents(out)
    add_foreign(out)
    with pytest.raises(ValueError, match="use --overwrite, --resume or another folder"):
        place(out).check()
    # What a run is not to write may be there; what it is to write may not.
    put(out / "checkpoints" / "checkpoint-7" / "model.bin", "of another project")
    with pytest.raises(ValueError, match=r"checkpoint-7/model\.bin, which no run wrote; move it"):
        place(out, overwrite=True).check()
    shutil.rmtree(out / "checkpoints" / "checkpoint-7")
    put(out / "checkpoints" / "checkpoint-5" / "notes.txt", "of the user")
    with pytest.raises(ValueError, match=r"checkpoint-5/notes\.txt, which no run wrote"):
        place(out, overwrite=True).check()
    (out / "checkpoints" / "checkpoint-5" / "notes.txt").unlink()
    # A run that fails leaves everything as it was, the scores below the adapter included.
    for text in ("", "2"):
        with (
            pytest.raises(RuntimeError),
            place(out, "demo", overwrite=True) as failed,
        ):
            failed.begin()
            assert not (out / EVALUATION / "metrics.json").exists()
            if text:
                write_run(out, text)
            raise RuntimeError
        assert has_foreign(out)
        assert {k: v for k, v in contents(out).items() if k not in FOREIGN} == before
        assert (out / EVALUATION / PRIVATE / "run.json").is_file()
    with place(out, overwrite=True) as second:
        second.begin()
        write_run(out, "2", parts=3)
    assert has_foreign(out)
    own = {k: v for k, v in contents(out).items() if k not in FOREIGN}
    assert own == {
        "adapter.bin": b"2",
        "checkpoints/checkpoint-5/model.bin": b"2",
        "checkpoints/checkpoint-5/trainer_state.json": b'{"global_step": 5}',
        "mle/seed-0/result.json": b"2",
    }
    assert [path.name for path in (out / PRIVATE).iterdir()] == ["run.json"]


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("alive", [False, True])
def test_an_adapter_is_not_replaced_while_it_is_scored(
    ended: bool, begun: bool, alive: bool, tmp_path: Path
) -> None:
    """Of scoring that was killed nothing is in the way of a new folder, and what it replaced comes back."""
    out = tmp_path / "out"
    first = place(out)
    first.__enter__()
    first.begin()
    write_run(out, "1")
    (out / "mle" / "seed-0" / "empty").mkdir()
    if ended:
        first.__exit__(None, None, None)
    else:
        first._release()
    scores = out / "mle" / "seed-0" / EVALUATION

    def scoring(**options: Any) -> Output:
        files = ["metrics.json"]
        return Output(scores, files, kind="evaluate", command=[], inputs={}, **options)

    if begun:
        with scoring() as earlier:
            earlier.begin()
            put(scores / "metrics.json", "scores of 1")
    evaluation = scoring(overwrite=True)
    evaluation.__enter__()
    if begun:
        evaluation.begin()
        assert not (scores / "metrics.json").exists()
    else:
        evaluation.hold()
    before = sorted(map(str, out.rglob("*")))
    if alive:
        with pytest.raises(
            ValueError, match=r"which writes to .*seed-0/evaluation; wait for its end"
        ):
            place(out, overwrite=True).check()
        assert sorted(map(str, out.rglob("*"))) == before
        evaluation._release()
        return
    assert evaluation._lock is not None
    os.close(evaluation._lock)  # killed: the lock's file stays
    signal.signal(signal.SIGTERM, evaluation._handler)
    with pytest.raises(RuntimeError), place(out, overwrite=True) as second:
        second.begin()
        raise RuntimeError
    if begun and ended:
        output._recover(scores)
        assert (scores / "metrics.json").read_text() == "scores of 1"
    with place(out, overwrite=True) as third:
        third.begin()
        (out / "mle").mkdir(exist_ok=True)
        put(out / ".half.x" / "result.json", "3")
        os.rename(out / ".half.x", out / "mle" / "seed-0")
    assert contents(out) == {"mle/seed-0/result.json": b"3"}


def test_what_is_complete_stays(tmp_path: Path) -> None:
    """Whatever comes after it; what it replaced does not come back, and the next run may replace it."""
    out = tmp_path / "out"
    for number, error in enumerate((RuntimeError, Stopped, KeyboardInterrupt)):
        with pytest.raises(error), place(out, overwrite=bool(number)) as one:
            one.begin()
            write_run(out, str(number))
            put(out / ".half.y" / "left", "of a picture")
            one.complete()
            raise error
        assert (out / "metrics.json").read_text() == str(number)
        assert not (out / ".half.y").exists()
        assert [path.name for path in (out / PRIVATE).iterdir()] == ["run.json"]
        with pytest.raises(ValueError, match="got the results of an earlier run"):
            place(out).check()
    # A process that is killed, or finds no room to say that it has ended, leaves a run that has.
    two = place(out, overwrite=True)
    two.__enter__()
    two.begin()
    write_run(out, "killed")
    put(out / ".metrics.json.x.tmp", "half")
    two.complete()
    two._release()
    for options in ({}, {"resume": True}):
        with pytest.raises(ValueError, match=r"expected a new or empty|expected results of"):
            place(out, "demo", **options).check()
    held = place(out, overwrite=True)
    with held:
        held.hold()
        assert (out / "metrics.json").read_text() == "killed"
    with place(out, overwrite=True) as three:
        three.begin()
        write_run(out, "3")
    assert (out / "metrics.json").read_text() == "3" and not (out / ".metrics.json.x.tmp").exists()
    # Without a beginning there is nothing to complete.
    with pytest.raises(RuntimeError), place(tmp_path / "none") as one:
        one.complete()
        raise RuntimeError
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", [*FOREIGN, "metrics.json", "checkpoints/checkpoint-1/model.bin"])
def test_folders_of_others_are_refused(name: str, tmp_path: Path) -> None:
    put(tmp_path / name, "important")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        for kind in ("train", "demo"):
            if kind == "train" or "resume" not in options:
                with pytest.raises(ValueError, match="choose another folder"):
                    place(tmp_path, kind, **options).check()
    assert contents(tmp_path) == {name: b"important"}
    assert not (tmp_path / PRIVATE).exists()


def test_resume_where_nothing_is_starts(tmp_path: Path) -> None:
    """The command of a script is the same the first time, and each time after that."""
    for out in (tmp_path / "absent", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(KeyboardInterrupt), place(out, "compare", resume=True) as run:
            assert run.starts_anew()
            run.begin()
            write_run(out, "1")
            raise KeyboardInterrupt
        assert run.kept()
        with place(out, "compare", resume=True) as again:
            assert not again.starts_anew()
            again.begin()
        assert not place(out, "compare", resume=True).starts_anew()
        assert not place(tmp_path / "other").starts_anew()


@pytest.mark.parametrize("link", ["checkpoints", "mle", "mle/seed-0", "metrics.json"])
def test_links_out_of_the_folder_are_not_followed(link: str, tmp_path: Path) -> None:
    """A user who moved a part of the results elsewhere, with a link in its place, loses nothing."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    with place(out) as first:
        first.begin()
        write_run(out, "1")
    os.rename(out / link, elsewhere)
    (out / link).symlink_to(elsewhere)
    before = contents(tmp_path)
    try:
        with place(out, overwrite=True) as second:
            second.begin()
    except ValueError as error:
        assert "which no run wrote" in str(error)
        assert contents(tmp_path) == before
    kept = {k: v for k, v in before.items() if k.startswith("elsewhere")}
    assert {k: v for k, v in contents(tmp_path).items() if k.startswith("elsewhere")} == kept


@pytest.mark.parametrize(
    "record",
    ["", "{", "[]", '{"files": []}', '{"kind": 3}', "null"]
    + [
        json.dumps({"kind": "train", "command": [], "cwd": "", "files": [name], "ended": True})
        for name in ("../precious", "/precious", "a/../../precious", 3)
    ],
)
def test_a_damaged_record_removes_nothing(record: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(tmp_path / "precious", "important")
    put(out / "metrics.json", "1")
    put(out / PRIVATE / "run.json", record)
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match=r"run\.json: expected what a run wrote"):
            place(out, **options).check()
    assert contents(tmp_path) == {"precious": b"important", "out/metrics.json": b"1"}


def test_a_record_of_another_version_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(out / "metrics.json", "1")
    fields = {"kind": "train", "command": [], "cwd": "", "files": [], "ended": True, "format": 1}
    put(out / PRIVATE / "run.json", json.dumps(fields))
    with pytest.raises(ValueError, match="expected format 2, got 1, which another version wrote"):
        place(out, overwrite=True).check()
    assert set(contents(tmp_path)) == {"out/metrics.json"}


def test_the_command_keeps_files_of_others(inputs: Path, tmp_path: Path) -> None:
    """`train --overwrite` over a whole run, with files of other projects in every folder."""
    out = tmp_path / "out"
    shutil.copytree(inputs / "adapter", out)
    assert call("evaluate", out, "--n-samples", 0, "--test-size", 4).exit_code == 0
    add_foreign(out)
    command = ["train", inputs / "data", "--model", inputs / "model", *SMALL, "--out", out]
    assert call(*command).exit_code == 2
    result = call(*command, "--method", "blob", "--overwrite")
    assert result.exit_code == 0, result.output
    assert has_foreign(out) and not (out / EVALUATION / "metrics.json").exists()
    assert json.loads((out / "metrics.json").read_text())["experiments"].keys() == {"blob"}
    result = call("predict", out, "--text", "a calm day", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["mutual_information"] >= 0


# --- One run at a time ---------------------------------------------------------------------------


def test_one_run_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with place(out, "evaluate") as first:
        first.hold()
        for kind in ("train", "evaluate"):
            for options in ({}, {"overwrite": True}):
                with pytest.raises(ValueError, match=f"process {os.getpid()} on .* writes to"):
                    place(out, kind, **options).check()
        assert f"process {os.getpid()} on " in output.stopped_run(out)
        first.begin()
        with pytest.raises(ValueError, match="writes to; wait for its end"):
            place(out, overwrite=True).hold()
    assert output.stopped_run(out) == ""
    with place(out, overwrite=True) as second:  # the first has ended, and wrote nothing
        second.hold()
    shutil.rmtree(tmp_path / "deep")
    with place(out) as third:  # held only: nothing is left
        third.hold()
    assert not (tmp_path / "deep").exists()


def in_fork(work: Callable[[], None]) -> int:
    """Run something in a process of its own; its exit code, or minus the signal."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code <= 0, text
    return code


def test_the_lock_of_a_killed_run_is_gone(tmp_path: Path) -> None:
    def die() -> None:
        with place(tmp_path / "out") as run:
            run.begin()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(die) == -signal.SIGKILL
    assert (tmp_path / "out" / PRIVATE / "lock").exists()
    with place(tmp_path / "out") as run:
        run.begin()


def test_sigterm_is_like_ctrl_c(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "out"
    with pytest.raises(Stopped), place(out, "evaluate") as run:
        run.begin()
        write_run(out, "1")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not out.exists() and not run.kept()
    assert run.way_on() == f"bayes-kernels evaluate --out {out}"
    with pytest.raises(KeyboardInterrupt), place(out) as run:
        run.begin()
        write_run(out, "1", parts=2)
        raise KeyboardInterrupt
    assert run.kept() and run.way_on() == f"bayes-kernels train --out {out} --resume"
    with pytest.raises(ValueError, match=f"go on with: bayes-kernels train --out {out} --resume"):
        place(out).check()
    # Who looks for the adapter there is told the same.
    with pytest.raises(
        ValueError, match=rf"found none; a run .* --out {out} --resume; name its last"
    ):
        folders.read_record(out)
    with pytest.raises(ValueError, match="expected results of `compare`"):
        place(out, "compare", resume=True).check()
    with place(out, resume=True) as run:
        run.begin()
        assert set(contents(out)) == {
            "checkpoints/checkpoint-5/model.bin",
            "checkpoints/checkpoint-5/trainer_state.json",
        }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_how_to_go_on(
    command: str,
    number: signal.Signals,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bayes_kernels.experiment import scoring

    def stop(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(run, "train_model", stop)
    monkeypatch.setattr(scoring, "evaluate_model", stop)
    out = tmp_path / "out"
    words: list[object] = [command, inputs / "adapter", "--out", out]
    if command in ("train", "compare", "demo"):
        words = [command, "--data", inputs / "data", "--model", inputs / "model", "--out", out]
        words += ["--threads", 1]
    if command in ("compare", "demo"):
        words += ["--seeds", 1, "--train-size", 20]
    monkeypatch.setattr(sys, "argv", ["bayes-kernels", *map(str, words)])
    handler = signal.getsignal(number)
    result = call(*words)
    assert result.exit_code == 128 + number, result.output
    assert f"interrupted; {out} is as it was" in result.stderr
    advice = f"go on with: bayes-kernels {' '.join(map(str, words))}\n"
    assert result.stderr.endswith(advice), result.stderr
    assert not out.exists() and signal.getsignal(number) == handler


# --- Killed at any moment ------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: from then on no change of a file succeeds."""


class Killer:
    """Ends what runs at its n-th change of files. Of a process of its own: hooks stay to its end."""

    def __init__(self) -> None:
        self.left: int | None = None
        kill_runs.at_file_operations(self._count)

    def _count(self, number: int) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed

    def kills(self, number: int, run: Output | None, work: Callable[[], None]) -> bool:
        """Whether something was killed at its n-th change of files."""
        self.left = number - 1
        try:
            work()
            return False
        except Killed:
            return True
        finally:
            self.left = None
            if run is not None and run._lock is not None:  # as the end of a process does
                os.close(run._lock)


@pytest.mark.parametrize("kind", ["bayesianize", "train"])
@pytest.mark.parametrize("start", ["new", "replace"])
def test_a_run_killed_at_any_moment(kind: str, start: str, tmp_path: Path) -> None:
    """Afterwards there is what was there before, or what the run had to keep, and one way on."""
    in_fork(lambda: _kill_at_every_moment(kind, start, tmp_path))


def _kill_at_every_moment(kind: str, start: str, tmp_path: Path) -> None:
    names = ["adapter.bin", "mle/seed-0/result.json", "metrics.json"]
    names += ["checkpoints/checkpoint-5/model.bin"]
    state_file = {"checkpoints/checkpoint-5/trainer_state.json": b'{"global_step": 5}'}
    old, new = ({**dict.fromkeys(names, text), **state_file} for text in (b"1", b"2"))
    template, base = tmp_path / "template", tmp_path / "base"
    out = base / "out"
    template.mkdir()
    if start == "replace":
        with place(template / "out") as run:
            run.begin()
            write_run(template / "out", "1")
        add_foreign(template / "out")
    killer = Killer()

    def own() -> dict[str, Any]:
        return {k: v for k, v in contents(out).items() if k not in FOREIGN}

    def replace() -> None:
        with run:
            run.begin()
            write_run(out, "2")

    states, number, dead = set(), 0, True
    while dead:
        number += 1
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(template, base)
        run = place(out, kind, overwrite=start == "replace")
        dead = killer.kills(number, run, replace)
        if number % 2 == 0:  # killed again while the first is undone
            killer.kills(1 + number // 2 % 9, None, lambda: output._recover(out))
        assert start == "new" or has_foreign(out)
        there = output._what_is_there(out) if out.exists() else None
        try:
            place(out, kind).check()
            state = "nothing"
        except ValueError as error:
            kept = f"go on with: bayes-kernels {kind} --out {out} --resume"
            state = "kept" if kept in str(error) else "ended"
            assert kept in str(error) or "--overwrite" in str(error)
        assert (there is None) == (state == "nothing")
        output._recover(out)
        found = own()
        if state == "nothing":
            assert found == {} and start == "new"
        elif state == "kept":
            assert kind == "train" and b"1" not in found.values()
        else:
            assert found in (old, new)
        states.add((state, found.get("metrics.json")))
        # The one way on.
        options = {"kept": {"resume": True}, "ended": {"overwrite": True}}.get(state, {})
        with place(out, kind, **options) as run:
            run.begin()
            write_run(out, "3")
        assert set(own().values()) == {b"3", b'{"global_step": 5}'}
        assert [path.name for path in (out / PRIVATE).iterdir()] == ["run.json"]
        assert [path.name for path in out.rglob(".*")] == [PRIVATE]
    assert number > 15
    expected: set[Any] = {("ended", b"2")}
    expected |= {("nothing", None)} if start == "new" else {("ended", b"1")}
    expected |= {("kept", None), ("kept", b"2")} if kind == "train" else set()
    assert states == expected, states


def test_a_checkpoint_without_its_state_is_none(tmp_path: Path) -> None:
    from bayes_kernels.hf.checkpoint_folders import last_checkpoint

    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_st'), (15, ""), (20, None)):
        put(tmp_path / f"checkpoint-{step}" / "model.bin", "x")
        if state is not None:
            put(tmp_path / f"checkpoint-{step}" / "trainer_state.json", state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def test_whole_runs_that_are_killed() -> None:
    """A few kills of whole commands; ``experiment.kill_runs`` by hand makes any number."""
    ended = run_command(
        [sys.executable, "-m", "experiment.kill_runs", "--kills", "2", "--seed", "1"],
        cwd=Path(kill_runs.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 kills, nothing lost" in ended.stdout and "workers ended" in ended.stdout
