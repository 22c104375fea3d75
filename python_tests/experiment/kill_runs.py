"""Kill whole commands with SIGKILL at random moments, and see that nothing is lost and one way leads on.

    cd python_tests && python -m experiment.kill_runs --kills 30 --seed 0

Half of the kills come at a random time, half before a random operation on files, where most can go wrong.
After each: input and files of others are as they were; of results that were to be replaced, either all are
there or the new run has something to keep, pictures perhaps not yet drawn; the command as it was, or the one
that it names, ends with the scores of a run that was never killed; finished parts are not run again; no
half-written file stays.
At last a comparison with worker processes is killed, and these have to end.

Commands run in forks of this process, in which nothing is imported twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from programs import children, is_running

from bayes_kernels.experiment.output import PICTURES

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink"}
FOREIGN = ("thesis.tex", "checkpoints/notes.txt", "map/notes.txt", "mine.png")


def at_file_operations(call: Callable[[int], None]) -> None:
    """From now on, and to the end of this process: call with the number of each change of files."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes or event in _CHANGES:
            count += 1
            call(count)

    sys.addaudithook(hook)


def kill_at_file_operation(number: int) -> None:
    """Kill this process before its n-th change of files."""

    def kill(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    at_file_operations(kill)


# --- Commands in forks ---------------------------------------------------------------------------


class Ended(NamedTuple):
    """How a command ended: exit code, or minus the signal; what it printed; its seconds."""

    code: int
    text: str
    seconds: float
    operations: int


def start(words: list[str], log: Path, *, kill_at: int = 0) -> int:
    """Begin a command in a fork; its process number."""
    from bayes_kernels.cli import app

    child = os.fork()
    if child:
        return child
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.argv = ["bayes-kernels", *words]
        total = [0]
        at_file_operations(lambda count: total.__setitem__(0, count))
        if kill_at:
            kill_at_file_operation(kill_at)
        try:
            app.app(words, prog_name="bayes-kernels")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        print(f"operations: {total[0]}", flush=True)
        os._exit(code)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(99)


def run(words: list[str], log: Path, *, kill_at: int = 0, kill_after: float | None = None) -> Ended:
    begin = time.monotonic()
    child = start(words, log, kill_at=kill_at)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # still ours, be it a zombie
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = log.read_text(errors="replace")
    operations = re.search(r"operations: (\d+)", text)
    seconds = time.monotonic() - begin
    return Ended(code, text, seconds, int(operations[1]) if operations else 0)


# --- What is left --------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the private ones."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if ".bayes_kernels" not in path.parts
    }


def scores_file(folder: Path) -> Path:
    name = "results.json" if (folder / "results.json").exists() else "metrics.json"
    return folder / name


def replaced_scores(folder: Path, old: dict[str, bytes]) -> bool:
    """Whether scores are there which are not the old ones: seconds in them tell runs apart."""
    path = scores_file(folder)
    return path.exists() and path.read_bytes() != old.get(path.name)


def scores(folder: Path) -> dict[str, float]:
    found = json.loads(scores_file(folder).read_text())["methods"]
    return {one["name"]: one["mean"]["nll"] for one in found}


def check(condition: bool, *facts: object) -> None:
    if not condition:
        raise SystemExit("LOST: " + "\n".join(map(str, facts)))


def one_kill(
    words: list[str], replace: bool, whole: Path, reference: Ended, base: Path, draw: random.Random
) -> str:
    """Kill one command and go on; what happened, in a few words."""
    out, log = base / "out", base / "log"
    old: dict[str, bytes] = {}
    if replace:
        shutil.copytree(whole, out)
        old = contents(out)
        for name in FOREIGN:
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(name)
        words = [*words, "--overwrite"]
    before = contents(base / "in")
    if draw.random() < 0.5:
        number = draw.randrange(1, reference.operations + 1)
        moment = f"operation {number} of {reference.operations}"
        ended = run(words, log, kill_at=number)
    else:
        seconds = draw.uniform(0, reference.seconds)
        moment = f"{seconds:.1f} of {reference.seconds:.1f} s"
        ended = run(words, log, kill_after=seconds)
    check(ended.code in (0, -signal.SIGKILL), words, moment, ended.text)

    def intact() -> None:
        check(contents(base / "in") == before, words, moment, "input changed")
        kept = not replace or all((out / name).read_text() == name for name in FOREIGN)
        check(kept, words, moment, "files of others changed")

    intact()
    finished = {path: path.read_bytes() for path in out.glob("*/seed-*/result.json")}
    plain = [word for word in words if word != "--overwrite"]
    again = run(plain, log)
    way = "the same command"
    if again.code == 2:
        named = re.search(r"go on with: bayes-kernels (.*)", again.text)
        if named:
            way = named[1].rsplit(" ", 1)[1]
            again = run(shlex.split(named[1]), log)
            for path, content in finished.items():
                check(path.read_bytes() == content, words, moment, f"{path} was run again")
        else:
            check("use --overwrite" in again.text, words, moment, again.text)
            missing = [name for name in old or contents(whole) if not (out / name).exists()]
            if replaced_scores(out, old):  # a run that is complete may have been drawing
                missing = [name for name in missing if name not in PICTURES]
            check(not missing or any(out.rglob("old/*")), words, moment, missing)
            way = "--overwrite"
            again = run([*plain, "--overwrite"], log)
    check(again.code == 0, words, moment, way, again.text)
    intact()
    expected, found = scores(whole), scores(out)
    same = expected.keys() == found.keys() and all(
        abs(found[name] - value) <= 1e-3 * abs(value) for name, value in expected.items()
    )
    check(same, words, moment, way, expected, found)
    left = [str(p) for p in out.rglob(".*") if p.name != ".bayes_kernels"]
    left += [str(p) for p in (out / ".bayes_kernels").iterdir() if p.name != "run.json"]
    check(not left, words, moment, way, left)
    shutil.rmtree(out)
    return f"killed at {moment}; went on with {way}"


def kill_with_workers(inputs: Path, base: Path) -> None:
    """Worker processes of a killed comparison end."""
    out = base / "workers"
    words = ["compare", "--data", f"{inputs / 'data'}", "--model", f"{inputs / 'model'}"]
    words += ["--methods", "mle,blob", "--seeds", "1", "--steps", "100000", "--threads", "2"]
    parent = start([*words, "--out", str(out)], base / "log")
    deadline = time.monotonic() + 120
    while len(list(out.glob("*/.seed-0.*.tmp"))) < 2:
        early = os.waitpid(parent, os.WNOHANG)[0] or time.monotonic() > deadline
        check(not early, "no workers", (base / "log").read_text())
        time.sleep(0.1)
    workers = children(parent)
    check(len(workers) >= 2, "workers not found", workers)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 60
    while left := [worker for worker in workers if is_running(worker)]:
        check(time.monotonic() < deadline, "workers go on", left)
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    import tiny_task

    from bayes_kernels.experiment import build, compare, recipe  # noqa: F401

    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kill_runs.") as name:
        base = Path(name)
        data, model = base / "in" / "data", base / "in" / "model"
        tiny_task.write_data(data)
        tiny_task.write_model(model)
        # What commands import late; nothing is trained here, as threads do not survive a fork.
        source = recipe.Source(data=str(data))
        build.build(recipe.Experiment(source, str(model)), source.load())
        common = ["--model", str(model), "--test-size", "10", "--threads", "1"]
        short = ["--steps", "8", "--rank", "2"]
        adapter = base / "in" / "adapter"
        train = ["train", str(data), *common, *short, "--save-every", "2"]
        made = run([*train, "--method", "mle", "--out", str(adapter)], base / "log")
        check(made.code == 0, made.text)
        compared = ["compare", "--data", str(data), *common, *short, "--seeds", "1"]
        tfb = ["bayesianize", str(adapter), "--set", "anchors=16", "--set", "max_trials=3"]
        last = ["bayesianize", str(adapter), "--method", "laplace-last", "--n-samples", "2"]
        commands = [
            [*train, "--method", "blob", "--n-samples", "2"],
            [*compared, "--methods", "mle,temperature,tfb", "--set", "tfb.n_samples=2"],
            tfb,
            last,
            ["evaluate", str(adapter), "--n-samples", "0"],
        ]
        commands = [[*words, "--out", str(base / "out")] for words in commands]
        wholes: dict[int, tuple[Path, Ended]] = {}
        for number in range(options.kills):
            which = number % 3 if options.kills < 5 else draw.randrange(len(commands))
            if which not in wholes:
                reference = run(commands[which], base / "log")
                check(reference.code == 0, reference.text)
                os.rename(base / "out", base / f"whole-{which}")
                wholes[which] = base / f"whole-{which}", reference
            replace = draw.random() < 0.5
            words = commands[which]
            text = one_kill(words, replace, *wholes[which], base, draw)
            print(
                f"{number + 1}: {words[0]}{' --overwrite' if replace else ''}: {text}", flush=True
            )
        print(f"{options.kills} kills, nothing lost")
        if sys.platform == "linux":
            kill_with_workers(base / "in", base)
            print("workers ended with their killed parent")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
