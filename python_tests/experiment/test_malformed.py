"""Hundreds of malformed command lines and files: each ends with one clear line, and nothing is touched.

Cases are made from the commands' own options, so that a new option has cases or fails the last test.
They run in one process, group by group; a failure lists every case that did not end well.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bayes_kernels.experiment import build

pytest.importorskip("typer")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import tiny_task
import typer
from typer.testing import CliRunner

from bayes_kernels.cli import app, output

pytestmark = pytest.mark.cpu_only

# What is refused says what was expected, and what there is instead.
CLEAR = re.compile(r"\b(expected|must|cannot|exclude|needs)\b")
BAD_ROW = re.compile(r":\d+: |^\.\.\. and \d+ more$")


class Case(NamedTuple):
    """A command line, run in the workspace."""

    words: tuple[str, ...]
    note: str = ""

    @property
    def name(self) -> str:
        """The command line, shortened, and what is in the file that it reads."""
        line = " ".join(self.words)
        return f"{line[:150]} {self.note}".strip()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data, a model, two adapters, and a folder for what is wrong; the current folder."""
    root = tmp_path_factory.mktemp("workspace")
    tiny_task.write_data(root / "data")
    tiny_task.write_model(root / "model")
    (root / "texts.txt").write_text("a bright day\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for method in ("blob", "mle"):
            common = ["--model", "model", "--steps", "1", "--rank", "2", "--test-size", "4"]
            draws = ["--n-samples", "2"] if method == "blob" else []
            options = [*common, *draws, "--method", method, "--out", f"run-{method}"]
            ended = CliRunner().invoke(app.app, ["train", "data", *options])
            assert ended.exit_code == 0, ended.output
        (root / "bad").mkdir()
        before = tree(root, content=True)
        yield root
        shutil.rmtree(root / "bad")
        (root / "bad").mkdir()
        assert tree(root, content=True) == before


def tree(root: Path, content: bool = False) -> dict[str, Any]:
    """Everything in a folder, with what changes when it is written to."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            info = os.lstat(path)
            if stat.S_ISDIR(info.st_mode):
                found[path] = "folder"
            elif content and stat.S_ISREG(info.st_mode):
                found[path] = Path(path).read_bytes()
            else:
                found[path] = (info.st_mode, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    return found


def fault(case: Case, root: Path) -> str | None:
    """What is wrong with how a case ended; None where it ended as it should."""
    before = tree(root)
    ended = CliRunner().invoke(app.app, list(case.words))
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        return f"raised {ended.exception!r}"
    if ended.exit_code != output.USAGE_ERROR:
        return f"exit code {ended.exit_code}: {ended.output[-300:]}"
    if "Traceback" in ended.output or ended.stdout:
        return f"printed {ended.output[-300:]}"
    notes, found, message = ended.stderr.rpartition("error: ")
    lines = message.strip().splitlines()
    if not found or (notes and not notes.endswith("\n")):
        return f"no line of its own: {ended.stderr[-300:]}"
    if len(lines) != 1 and not all(BAD_ROW.search(line) for line in lines):
        return f"{len(lines)} lines: {message[-300:]}"
    if not CLEAR.search(lines[0]) or len(lines[0]) > 1000:
        return f"not clear: {message[-300:]}"
    after = tree(root)
    if after != before:
        changed = sorted(key for key in before | after if before.get(key) != after.get(key))
        return f"touched {changed[:3]}"
    return None


def check(cases: list[Case], root: Path) -> None:
    found = [(case.name, why) for case in cases if (why := fault(case, root)) is not None]
    listed = "\n".join(f"{name}\n    {why}" for name, why in found)
    assert not found, f"{len(found)} of {len(cases)} cases:\n{listed}"


# --- From the commands' own options ----------------------------------------------------------------

# Words that a command needs beside the option in question.
NEEDS = {
    "demo": ["--data", "data", "--model", "model", "--threads", "1"],
    "train": ["data", "--model", "model"],
    "compare": ["--data", "data", "--model", "model", "--methods", "mle,blob", "--threads", "1"],
    "sweep": ["--data", "data", "--model", "model", "--threads", "1", "--vary", "n_samples=0,1"],
    "bayesianize": ["run-mle", "--n-samples", "2"],
    "evaluate": ["run-blob"],
    "predict": ["run-blob", "--text", "a bright day"],
}
# And without which an option does nothing.
WITH = {"--members": ["--methods", "mle,ensemble"], "--stop-rule": ["--stop", "0.1"]}
FLAGS = ("--compat", "--overwrite", "--plots", "--json", "--resume", "--debug", "--help")
# "The largest number of": all that there are where there are fewer.
NO_LIMIT = ("--test-size", "--ood-size", "--save-every")


def options_of(command: str) -> list[Any]:
    found: Any = typer.main.get_command(app.app)
    return [p for p in found.commands[command].params if p.opts[0].startswith("-")]


def with_option(command: str, option: str, value: str) -> Case:
    needs = list(NEEDS[command])
    if option in needs:
        place = needs.index(option)
        del needs[place : place + 2]
    if option == "--processes":
        del needs[needs.index("--threads") :][:2]
    own = WITH.get(option, [])
    return Case((command, *needs, *own, option, value))


def numbers() -> list[Case]:
    cases = []
    for command in NEEDS:
        for option in options_of(command):
            name = option.opts[0]
            if option.metavar == "INTEGER":
                values = ["abc", "1.5", "", "-1", "1e3"]
                few = name in NO_LIMIT or (
                    name == "--batch-size" and command in ("evaluate", "predict")
                )
                values += [] if few else ["9" * 30]
            elif option.metavar == "NUMBER":
                values = ["abc", "", "nan", "-1", "inf", "0x1"]
            else:
                continue
            cases += [with_option(command, name, value) for value in values]
    return cases


# Options that are words: what none of them takes.
WORDS = {
    "--method": ["foo", "", "BLoB"],
    "--methods": ["foo", "", ",", "mle,,foo"],
    "--kind": ["foo", "causal", "multiple_choice"],
    "--style": ["foo", "", "plain"],
    "--split": ["foo", "", "published"],
    "--recipe": ["foo", "", "published"],
    "--dtype": ["float", "int8", ""],
    "--quantization": ["3bit", ""],
    "--device": ["foo", "", "cuda:99"],
    "--target-modules": ["query,foo", "", ",", "foo", "quer"],
    "--label-names": ["", "a", "a,a", "a,b,a"],
    "--set": [
        *("foo", "=", "=1", "foo=1", "lora", "lora=3", "lora.x.y=1", "options.foo=1", "a.b.c=1"),
        *("lr=abc", "lr=true", "lr", "rank.x=1", "tfb.lr=1", "blob.lr=-1", "blob.metric=flips"),
        *("metric=foo", "metric=", "anchors=0", "anchors=1.5", "anchors=all", "low=a", "low=nan"),
        *("layers=query", 'layers=["foo"]', "validation=3", "progress=false", "options=3"),
        *("lora.foo=1", "lora.r=3", "lora.method=tfb", "lora.use_dora=true", "lora.bias=foo"),
        *("lora.rank_pattern=3", "lora.use_rslora=1", "lora.prior_std=3", "lora.seed=1"),
        *('lora.rank_pattern={"query":0}', 'lora.rank_pattern={"(":2}', "lora.rank_pattern=[2]"),
        *('lora.alpha_pattern={"query":NaN}', "lora.alpha_pattern=query", "lora.alpha_pattern=0"),
        *("lora.exclude_modules=(", "lora.layers_to_transform=[7]", "lora.init_lora_weights=eva"),
        *(
            "lora.trainable_token_indices=[-1]",
            'lora.modules_to_save=["foo"]',
            "lora.loftq_config=3",
        ),
        *("lora.layer_replication=[[0,9]]", "lora.runtime_config=3", 'lora.eva_config={"rho":2}'),
        *("lora.target_parameters=3", "lora.target_parameters=[3]", "lora.modules_to_save=score"),
        *("keep_lower_layers=-1", "keep_lower_layers=1GB", "activation_bits=4"),
    ],
    "--stop-rule": ["foo", "", "Normal"],
    "--draws": ["foo", "", "pairs"],
    "--draw-scope": ["foo", "", "none"],
    "--vary": ["foo", "", "=1", "foo=1,2", "lr=", "lr=abc,1", "rank=2,2", "n_samples=-1,2"],
    "--text": ["", " ", "\ud800"],
    "--data": ["nothing.jsonl", "", "./nothing", "model", "run-mle"],
    "--test": ["nothing.jsonl", "", "data", "data/train.jsonl"],
    "--ood": ["nothing.jsonl", "", "data", "data/train.jsonl", "data/test.jsonl"],
    "--model": ["./nothing", "", "data", "a/b/c", "model/config.json", "run-mle"],
    "--out": ["run-mle/metrics.json", "run-mle", "data", "model", "."],
}


def words() -> list[Case]:
    cases = []
    for command in NEEDS:
        for option in options_of(command):
            for value in WORDS.get(option.opts[0], ()) if option.opts[0] not in FLAGS else ():
                cases.append(with_option(command, option.opts[0], value))
    # What takes these as they are, or says so elsewhere.
    fine = {
        ("predict", "--data", "data"),
    }
    return [case for case in cases if (case.words[0], *case.words[-2:]) not in fine]


def test_numbers_that_no_option_takes(workspace: Path) -> None:
    cases = numbers()
    assert len(cases) > 250
    check(cases, workspace)


def test_words_that_no_option_takes(workspace: Path) -> None:
    cases = words()
    assert len(cases) > 150
    check(cases, workspace)


# --- Options that do nothing, or contradict others -------------------------------------------------

TRAIN = [
    "--method mle --n-samples 5",
    "--method polar --n-samples 5",
    "--method mle --set stiefel=qr",
    "--method mle --set prior_std=1",
    "--method polar --set init_rho=0.1",
    "--method blob --set stiefel_penalty=1",
    "--method blob --set head_lr=1",
    "--method blob --set covariance=full",
    "--method blob --set kl_direction=code",
    "--method scalabl --set kl_weight=1",
    "--method tfb --set kl_time=1",
    "--method laplace --set scope=none",
    "--method laplace --set mc_samples=4",
    "--method tfb --set search=grid --set rule=code",
    "--set lora.task_type=SEQ_CLS",
    "--set activation_bits=8 --rank 65",
    "--method mle --set activation_bits=8",
    "--method scalabl --set scope=token",
    "--method polar --set stiefel=qr --set stiefel_penalty=1",
    "--set kl_lr=0.1",
    "--set kl_gamma=3",
    "--set kl_lr=0.1 --set kl_schedule=auto",
    "--set kl_time=1 --set kl_schedule=published",
    "--set refine=true",
    "--method polar --set refine=true",
    "--method polar-vbll --set refine=1",
    "--set anchors=3",
    "--set method=tfb",
    "--set seed=3",
    "--set tfb.anchors=3",
    "--method tfb --set anchors=3 --set anchors=4",
    "--set rank=4 --rank 2",
    "--set lora.use_rslora=true --set lora.use_rslora=false",
    "--set lora.inference_mode=true",
    "--set lora.peft_type=LORA",
    "--set lora.trainable_token_indices=foo",
    "--set lora.lora_alpha=3",
    "--method ensemble",
    "--method dropout --dropout 0",
    "--batch-size 8 --accumulation 3",
    "--data data",
    "data",
    "--resume --overwrite",
    "--style laplace",
    "--kind causal",
    "--train-size 1000000",
    "--max-length 33",
    "--max-length 4",
    "--out run-blob",
    "--out run-blob --resume --steps 2",
]
OTHERS = [
    "demo --method mle",
    "demo --method ensemble",
    "demo --method polar --n-samples 3",
    "demo --set steps=2 --steps 2",
    "demo --set anchors=3",
    "demo --set tfb.lr=1",
    "demo --set blob.kl_time=often",
    "compare --methods mle --members 3",
    "compare --methods mle --n-samples 3",
    "compare --methods mle,blob --set stiefel=qr",
    "compare --methods mle,blob --set tfb.anchors=3",
    "compare --methods mle,blob --set anchors=3",
    "compare --methods mle,tfb --set tfb.lr=1",
    "compare --rank 2 --set rank=4",
    "compare --resume --overwrite",
    "bayesianize --method laplace --set metric=flips",
    "bayesianize --method laplace --set tolerance=0.1",
    "bayesianize --method laplace --set mc_samples=4",
    "bayesianize --method laplace --set mc_samples=4 --set fisher=empirical",
    "bayesianize --set search=grid --set resolution=0.1",
    "bayesianize --set search=grid --set rule=code",
    "compare --methods mle,blob,mle",
    "bayesianize --method laplace-last --set layers=last",
    "bayesianize --method blob",
    "bayesianize --set anchors=4 --set sigma=-1",
    "bayesianize --set anchors=4 --set anchors=4",
    "bayesianize --set rank=4",
    "methods foo",
    "evaluate --label-names a,b,c",
    "evaluate --data data --label-names b,a",
    "train",
    "train --data",
    "trian data",
    "--threads 3",
    "predict",
    "predict run-mle --text a --n-samples 3",
    "predict --stop 0.5",
    "predict --stop 0.1 --n-samples 1",
    "predict --stop-rule normal",
    "predict --min-samples 4",
    "predict run-blob",
    "evaluate run-mle --n-samples 3 --out new",
    "evaluate run-mle --model model run-blob",
]


def combined() -> list[Case]:
    cases = [Case(("train", *NEEDS["train"], *line.split())) for line in TRAIN]
    for line in OTHERS:
        command, *rest = line.split()
        full = len(rest) and rest[0].startswith("--") and command in NEEDS and rest != ["--data"]
        needs = list(NEEDS[command]) if full else []
        if command == "compare" and "--methods" in rest:
            needs = [word for word in needs if word not in ("--methods", "mle,blob")]
        cases.append(Case((command, *needs, *rest)))
    return cases


def test_options_that_do_nothing_or_contradict(workspace: Path) -> None:
    check(combined(), workspace)


# --- Files -----------------------------------------------------------------------------------------

GOOD_ROWS = [{"id": f"n{i}", "question": f"a day {i}", "label": i % 2} for i in range(6)]


def lines(*extra: Any) -> bytes:
    rows = [json.dumps(row) for row in GOOD_ROWS]
    rows += [row if isinstance(row, str) else json.dumps(row) for row in extra]
    return "".join(f"{row}\n" for row in rows).encode()


ROW: dict[str, Any] = {"id": "x", "question": "a day", "label": 0}
DEEP = "[" * 100_000 + "]" * 100_000
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "white space": b"\n \n",
    "cut": lines()[:-9],
    "binary": bytes(range(256)) * 4,
    "UTF-16": lines().decode().encode("utf-16"),
    "Latin-1": lines() + '{"id": "x", "question": "caf\xe9", "label": 0}\n'.encode("latin-1"),
    "list": b"[1, 2, 3]\n",
    "one array": json.dumps(GOOD_ROWS).encode(),
    "number": lines("3"),
    "null": lines("null"),
    "deep": lines(DEEP),
    "deep inside": lines(f'{{"id": "x", "question": {DEEP}, "label": 0}}'),
    "half deep": lines(f'{{"id": {"[" * 700}{"]" * 700}, "question": "a", "label": 0}}'),
    "long integer": lines(f'{{"id": "x", "question": "a", "label": {"9" * 5000}}}'),
    "twice": lines(GOOD_ROWS[0]),
    "both texts": lines({**ROW, "text": "a"}),
    "empty id": lines({**ROW, "id": ""}),
    "no question": lines({"id": "x", "label": 0}),
    "blank question": lines({**ROW, "question": " \t"}),
    "number as question": lines({**ROW, "question": 3}),
    "list as context": lines({**ROW, "context": ["a"]}),
    "one choice": lines({**ROW, "choices": ["a"]}),
    "empty choice": lines({**ROW, "choices": ["a", ""]}),
    "surrogate": lines('{"id": "x", "question": "\\ud800", "label": 0}'),
    "surrogate id": lines('{"id": "\\udc00", "question": "a", "label": 0}'),
}
LABELS: dict[str, Any] = {
    "negative": -2,  # -1 stands for none
    "true": True,
    "text": "one",
    "real": 1.0,
    "nan": float("nan"),
    "list": [0],
    "far": 1_000_000,
    "2**70": 2**70,
}
PLACES: dict[str, Callable[[str], list[str]]] = {
    "train": lambda file: ["train", file, "--model", "model"],
    "train --test": lambda file: ["train", "data", "--model", "model", "--test", file],
    "train --ood": lambda file: ["train", "data", "--model", "model", "--ood", file],
    "compare": lambda file: ["compare", *NEEDS["compare"][2:], "--data", file],
    "demo": lambda file: ["demo", *NEEDS["demo"][2:], "--data", file],
    "bayesianize": lambda file: ["bayesianize", "run-mle", "--data", file],
    "evaluate": lambda file: ["evaluate", "run-blob", "--data", file],
    "evaluate --ood": lambda file: ["evaluate", "run-blob", "--ood", file],
    "predict": lambda file: ["predict", "run-blob", "--data", file],
}


def test_files_of_rows(workspace: Path) -> None:
    cases = []
    for turn, (place, arguments) in enumerate(PLACES.items()):
        contents = dict(CONTENTS)
        for name, label in LABELS.items():
            # Classes are those of the task elsewhere, and `predict` reads no labels of classes.
            if place != "predict" or name not in ("far", "2**70", "text"):
                contents[f"label {name}"] = lines({**ROW, "label": label})
        for number, (name, content) in enumerate(contents.items()):
            if place not in ("train", "predict") and (number + turn) % 3:
                continue  # one function reads all of them: each content at some places will do
            suffix = ".jsonl.gz" if number % 5 == 4 else ".jsonl"
            file = workspace / "bad" / f"{name.replace(' ', '_').replace('*', '')}{suffix}"
            file.write_bytes(gzip.compress(content, 1) if suffix.endswith("gz") else content)
            cases.append(Case(tuple(arguments(str(file.relative_to(workspace)))), f"({name})"))
    check(cases, workspace)


def special_files(folder: Path) -> list[str]:
    """A pipe, a loop of links, a link to nothing, a device, damaged archives."""
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "train.jsonl").symlink_to("train.jsonl")  # a name that says nothing of the data
    (folder / "broken.jsonl").symlink_to("nothing")
    packed = gzip.compress(lines() * 50)
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "garbage.jsonl.gz").write_bytes(b"no archive")
    damaged = bytearray(packed)
    damaged[30:60] = bytes(30)
    (folder / "damaged.jsonl.gz").write_bytes(damaged)
    (folder / "folder.jsonl").mkdir()
    names = ("pipe.jsonl", "loop.jsonl", "broken.jsonl", "cut.jsonl.gz", "garbage.jsonl.gz")
    names = (*names, "damaged.jsonl.gz", "folder.jsonl", "train.jsonl", f"{'long' * 100}.jsonl")
    return ["/dev/zero", *(f"bad/special/{name}" for name in names)]


def test_files_that_are_none(workspace: Path) -> None:
    files = special_files(workspace / "bad" / "special")
    cases = [Case(tuple(f(file))) for f in PLACES.values() for file in files]
    for file in files:
        cases.append(Case(("train", "data", "--model", file)))
        cases.append(Case(("evaluate", file)))
        cases.append(Case(("predict", file, "--text", "a day")))
        cases.append(Case(("bayesianize", file)))
        cases.append(Case(("evaluate", "run-blob", "--model", file)))
        if not file.endswith("folder.jsonl"):  # an empty folder will do
            cases.append(Case(("train", "data", "--model", "model", "--out", file)))
            cases.append(Case(("evaluate", "run-blob", "--out", file)))
    # A folder of a model with something in it that reading would wait for.
    model = workspace / "bad" / "model"
    shutil.copytree(workspace / "model", model)
    os.mkfifo(model / "added_tokens.json")
    cases.append(Case(("train", "data", "--model", "bad/model"), "(pipe in it)"))
    check(cases, workspace)


def records(good: dict[str, Any]) -> dict[str, Any]:
    """experiment.json with something wrong in it."""

    def changed(*path: str, value: Any) -> Any:
        copy = json.loads(json.dumps(good))
        place = copy
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return copy

    return {
        "text": b"nothing",
        "empty": b"",
        "deep": DEEP.encode(),
        "list": [good],
        "nothing in it": {},
        "other format": changed("format", value=99),
        "experiment a list": changed("experiment", value=[1]),
        "experiment a text": changed("experiment", value="blob"),
        "unknown method": changed("experiment", "method", value="magic"),
        "method a list": changed("experiment", "method", value=["blob"]),
        "unknown field": changed("experiment", "recipe", "magic", value=1),
        "rank a text": changed("experiment", "recipe", "rank", value="8"),
        "alpha nan": changed("experiment", "recipe", "alpha", value=float("nan")),
        "draws": changed("experiment", "recipe", "n_samples", value=-1),
        "seed": changed("experiment", "seed", value=2**70),
        "dtype": changed("experiment", "dtype", value="complex"),
        "model": changed("experiment", "model", value=None),
        "source": changed("experiment", "source", value="data"),
        "data": changed("experiment", "source", "data", value=3),
        "task kind": changed("task", "kind", value="regression"),
        "one class": changed("task", "label_names", value=["a"]),
        "classes a text": changed("task", "label_names", value="ab"),
        "classes twice": changed("task", "label_names", value=["a", "a"]),
        "length": changed("max_length", value="long"),
        "length 0": changed("max_length", value=0),
        "length too large": changed("max_length", value=10**6),
    }


def test_records_that_are_damaged(workspace: Path) -> None:
    good = json.loads((workspace / "run-blob" / "experiment.json").read_text())
    cases = []
    for number, (name, content) in enumerate(records(good).items()):
        folder = workspace / "bad" / f"adapter-{number}"
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(workspace / "run-blob" / file, folder / file)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / "experiment.json").write_bytes(content)
        place = str(folder.relative_to(workspace))
        for words in (
            ["evaluate", place],
            ["predict", place, "--text", "a"],
            ["bayesianize", place],
        ):
            cases.append(Case(tuple(words), f"({name})"))
    check(cases, workspace)
    for number in range(len(records(good))):
        shutil.rmtree(workspace / "bad" / f"adapter-{number}")


# --- The campaign itself ---------------------------------------------------------------------------


def test_every_option_has_cases() -> None:
    """Of every command but those that read nothing; a new option needs cases of its own.

    `generate`, `score`, `export` and `answers` want a causal model and have tests of their own, `data`
    has commands of its own (cli/test_app.py).
    """
    generated: Any = typer.main.get_command(app.app)
    assert set(NEEDS) == set(generated.commands) - {
        *("info", "methods", "bench", "generate", "score", "export", "answers", "data")
    }
    used = {(c.words[0], w) for c in (*numbers(), *words(), *combined()) for w in c.words}
    used |= {(words[0], word) for f in PLACES.values() for words in [f("x")] for word in words}
    without = [
        (command, option.opts[0])
        for command in NEEDS
        for option in options_of(command)
        if option.opts[0] not in FLAGS and not any((command, o) in used for o in option.opts)
    ]
    assert not without


def test_the_campaign_notices(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(("train", "data", "--model", "model", "--steps", "0"))
    assert fault(case, workspace) is None

    def failing(error: Exception | str, leave: bool = False) -> str:
        def check_experiment(one: Any) -> None:
            if leave:
                (workspace / "left").write_text("")
            if isinstance(error, str):
                print(error)
                raise typer.Exit(2)
            raise error

        fine = Case(("train", "data", "--model", "model", "--steps", "3"))
        with monkeypatch.context() as patch:
            patch.setattr(build, "check_experiment", check_experiment)
            found = fault(fine, workspace)
        (workspace / "left").unlink(missing_ok=True)
        return found or ""

    assert failing(ValueError("steps: expected 1, got 3")) == ""
    assert "raised" in failing(KeyError("steps"))
    assert "not clear" in failing(ValueError("'>' not supported between 'str' and 'int'"))
    assert "not clear" in failing(ValueError("expected " + 600 * "ab"))
    assert "printed" in failing("error: steps: expected 1, got 3")
    assert "touched" in failing(ValueError("steps: expected 1, got 3"), leave=True)
