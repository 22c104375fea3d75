"""The command line: results, errors in one line, interruption."""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from bayes_kernels.experiment import folders

pytest.importorskip("typer")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402
import tiny_task  # noqa: E402
import typer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from bayes_kernels import _library  # noqa: E402
from bayes_kernels.cli import app  # noqa: E402
from bayes_kernels.experiment import build, run, train  # noqa: E402
from bayes_kernels.experiment.models import load_model  # noqa: E402
from bayes_kernels.experiment.results import COSTS  # noqa: E402
from bayes_kernels.hf.trainer import last_checkpoint  # noqa: E402

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only

COMMANDS = list(typer.main.get_command(app.app).commands)
SETTINGS = ["--steps", "8", "--lr", "0.005", "--rank", "4", "--n-samples", "3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_task.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_task.write_model(tmp_path_factory.mktemp("model"))


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app.app, [str(argument) for argument in arguments])


def refuse(*arguments: object) -> str:
    """The error of a call that must fail with exit code 2: one line, or a list of bad lines."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    notes, error, rest = result.stderr.partition("error: ")
    assert error and (not notes or notes.endswith("\n")), result.stderr
    assert "Traceback" not in result.output and result.stdout == ""
    lines = rest.strip().splitlines()
    assert len(lines) == 1 or all(re.search(r":\d+: ", line) for line in lines), result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def trained(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "blob"
    ood = ["--ood", data / "ood.jsonl"]
    result = call("train", data, "--model", model, *ood, *SETTINGS, "--out", out, "--plots")
    assert result.exit_code == 0, result.output
    assert "BLoB N=3" in result.stdout and "OOD AUROC" in result.stdout
    return out


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_relative_paths_hold_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is read from itself, as its README.md has it, and after all has moved together."""
    home, moved = tmp_path / "home", tmp_path / "moved"
    tiny_task.write_data(home / "data")
    tiny_task.write_model(home / "model")
    monkeypatch.chdir(home)
    words = ["--model", "model", "--test", "data/test.jsonl", "--ood", "data/ood.jsonl"]
    result = call("train", "data/train.jsonl", *words, *SETTINGS, "--out", "runs/blob")
    assert result.exit_code == 0, result.output
    text = Path("runs/blob/README.md").read_text()
    base = text.partition('from_pretrained("')[2].partition('"')[0]
    # Reading an adapter asks nobody on the network about its base.
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", pytest.fail)
    monkeypatch.chdir("runs/blob")
    assert os.path.samefile(base, home / "model")
    first = call("predict", ".", "--json", "--text", "a bright day")
    assert first.exit_code == 0, first.output
    monkeypatch.chdir(tmp_path)
    shutil.move(home, moved)
    again = call("predict", moved / "runs/blob", "--json", "--text", "a bright day")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["class"] == json.loads(first.stdout)["class"]
    scores = call("evaluate", moved / "runs/blob", "--n-samples", 2)
    assert scores.exit_code == 0, scores.output


# --- Results -------------------------------------------------------------------------------------


def test_info_is_the_diagnosis() -> None:
    result = call("info")
    assert result.exit_code == 0
    assert result.stdout.startswith("bayes_kernels ") and "compiled ops" in result.stdout


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_imports_neither_torch_nor_transformers(command: list[str]) -> None:
    code = (
        "import sys; from bayes_kernels.__main__ import main; sys.argv[1:] = sys.argv[1:] + ['--help']\n"
        "try: main()\n"
        "finally: print({'torch', 'numpy', 'transformers', 'peft'} & {*sys.modules})"
    )
    ended = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.endswith("set()\n"), ended.stdout + ended.stderr
    assert "Usage: bayes-kernels" in ended.stdout


def test_options_that_commands_share_are_written_once() -> None:
    places: dict[str, list[str]] = {}
    files = Path(app.__file__).parent.glob("*.py")
    bodies = [ast.parse(file.read_text(encoding="utf-8")).body for file in files]
    for command in itertools.chain(*bodies):
        for argument in command.args.args if isinstance(command, ast.FunctionDef) else ():
            annotation = ast.unparse(argument.annotation) if argument.annotation else ""
            if annotation.startswith("Annotated"):
                places.setdefault(annotation, []).append(f"{command.name} {argument.arg}")
    assert len(places) > 20  # what only one command has
    assert not [found for found in places.values() if len(found) > 1]


def test_training_writes_adapter_scores_and_pictures(trained: Path, data: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "experiment.json"} <= names
    assert {"metrics.json", "reliability.png", "risk_coverage.png", "entropy.png"} <= names
    # No temporary file is left.
    assert [name for name in names if name.startswith(".")] == [".bayes_kernels"]
    assert [path.name for path in (trained / ".bayes_kernels").iterdir()] == ["run.json"]
    for name in ("reliability.png", "risk_coverage.png", "entropy.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")


def test_metrics_json_has_its_documented_keys(trained: Path, data: Path) -> None:
    found = results(trained)
    assert found["format"] == 1 and found["seeds"] == [0]
    assert found["task"]["examples"]["test"] == 40 and found["task"]["examples"]["ood"] == 20
    assert found["experiments"]["blob"]["recipe"]["steps"] == 8
    assert {"torch", "peft", "transformers", "bayes_kernels"} <= set(found["versions"])
    assert {"threads", "cores", "platform", "peak_memory"} <= set(found["machine"])
    assert [method["name"] for method in found["methods"]] == [
        "BLoB mean",
        "BLoB mean + temperature",
        "BLoB N=3",
    ]
    for method in found["methods"]:
        assert set(method) == {
            "name",
            "method",
            "n_samples",
            "mean",
            "std",
            "cost",
            "per_seed",
        }
        (entry,) = method["per_seed"]
        assert set(entry) == {"seed", "metrics", "ood", "temperature", "cost"}
        scores = entry["metrics"]
        assert {"accuracy", "nll", "ece", "brier", "aurc", "ood_auroc", "entropy"} <= set(scores)
        assert method["mean"]["nll"] == scores["nll"] and method["std"] == {}
        assert set(entry["cost"]) == set(COSTS) - {"conversion_seconds"}
    (entry,) = found["training"]
    assert entry["steps"] == 8 and entry["log"][0]["kl"] > 0
    assert entry["adapter"]["r"] == 4 and entry["adapter"]["prior_std"] > 0
    assert entry["adapter"]["target_modules"] == ["query", "value"]


def test_evaluation_gives_the_numbers_of_training(trained: Path) -> None:
    result = call("evaluate", trained)
    assert result.exit_code == 0, result.output
    before, after = results(trained), results(trained / "evaluation")
    assert len(after["methods"]) == 3
    for old, new in zip(before["methods"], after["methods"], strict=True):
        for key in ("metrics", "ood", "temperature"):
            assert old["per_seed"][0][key] == new["per_seed"][0][key]
    assert "use --overwrite" in refuse("evaluate", trained)
    result = call("evaluate", trained, "--overwrite", "--n-samples", "0", "--test-size", "10")
    assert result.exit_code == 0, result.output
    again = results(trained / "evaluation")
    assert [m["name"] for m in again["methods"]] == ["BLoB mean", "BLoB mean + temperature"]
    assert again["methods"][0]["per_seed"][0]["metrics"]["n"] == 10


def test_a_trained_adapter_is_made_bayesian(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "tfb"
    options = ["--anchors", 16, "--metric", "flips", "--convert", "max_trials=3"]
    result = call("bayesianize", trained, *options, "--convert", "low=0.01", "--out", out)
    assert result.exit_code == 0, result.output
    assert "TFB: 4 layers, sigma_q=" in result.stdout and "change (flips)" in result.stdout
    assert "BLoB mean" in result.stdout and "TFB N=3" in result.stdout
    content = results(out)
    assert [m["name"] for m in content["methods"]] == ["BLoB mean", "TFB N=3"]
    conversion = content["conversion"]
    assert (conversion["anchors"], conversion["metric"]) == (16, "flips")
    assert len(conversion["trace"]) in (3, 4) and conversion["sigma"] >= 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["method"] == "tfb" and config["sigma_q"] == conversion["sigma"]
    result = call("evaluate", out)
    assert result.exit_code == 0, result.output
    again = results(out / "evaluation")["methods"]
    assert [m["name"] for m in again] == ["TFB mean", "TFB mean + temperature", "TFB N=3"]
    before, after = (m["per_seed"][0]["metrics"] for m in (content["methods"][1], again[2]))
    assert before == after
    assert "use --overwrite" in refuse("bayesianize", trained, "--out", out)
    error = refuse("bayesianize", trained, "--out", tmp_path / "x", "--convert", "speed=2")
    assert "expected options among anchors, metric" in error and "got speed" in error
    assert not (tmp_path / "x").exists()
    assert "expected one of tfb" in refuse("bayesianize", trained, "--method", "blob")
    result = call("bayesianize", trained, *options, "--n-samples", 0, "--out", tmp_path / "mean")
    assert result.exit_code == 0, result.output
    found = results(tmp_path / "mean")["methods"]
    assert [m["name"] for m in found] == ["BLoB mean", "TFB mean"]


def test_training_a_method_that_converts(data: Path, model: Path, tmp_path: Path) -> None:
    options = [*SETTINGS, "--method", "tfb", "--convert", "anchors=20"]
    options += ["--convert", "search=grid", "--convert", "max_trials=2"]
    result = call("train", data, "--model", model, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = results(tmp_path / "out")
    assert found["methods"][-1]["name"] == "TFB N=3"
    assert found["training"][0]["conversion"]["anchors"] == 20
    assert found["training"][0]["conversion"]["passes"] == 3
    saved = folders.read_record(tmp_path / "out")
    assert saved is not None and saved.experiment.recipe.convert["search"] == "grid"
    checkpoint = last_checkpoint(tmp_path / "out" / "checkpoints")
    assert checkpoint is not None  # plain LoRA, which has no draws yet
    result = call("evaluate", checkpoint, "--out", tmp_path / "plain")
    assert result.exit_code == 0, result.output
    assert results(tmp_path / "plain")["methods"][0]["name"] == "LoRA (MAP)"
    for bad, message in (
        ("metrc=flips", "got metrc"),
        ("metric=foo", "metric must be one of"),
        ("low=1", "range must be 0 < low < high"),
        ("anchors=0", "anchors must be an integer >= 1"),
        ('layers=["query", "valeu"]', "got ['valeu']"),
    ):
        bad_options = [*SETTINGS, "--method", "tfb", "--convert", bad, "--out", tmp_path / "bad"]
        assert message in refuse("train", data, "--model", model, *bad_options)
        assert not (tmp_path / "bad").exists()  # found before training
    error = refuse("train", data, "--model", model, "--convert", "low=0.01")
    assert "convert: expected method tfb, laplace, laplace-last with it, got 'blob'" in error


def test_predictions_as_json_lines(trained: Path, data: Path, tmp_path: Path) -> None:
    file = data / "test.jsonl"
    result = call("predict", trained, "--data", file, "--text", "bright warm day", "--json")
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [entry["id"] for entry in found[:2]] == ["text-1", "test-0"] and len(found) == 41
    truth = [json.loads(line)["label"] for line in file.read_text().splitlines()]
    right = [entry["class"] == label for entry, label in zip(found[1:], truth, strict=True)]
    expected = results(trained)["methods"][2]["per_seed"][0]["metrics"]
    assert sum(right) / len(right) == expected["accuracy"]
    entropy = sum(entry["entropy"] for entry in found[1:]) / 40
    assert entropy == pytest.approx(expected["entropy"], abs=1e-5)
    for entry in found:
        assert entry["label"] in ("0", "1")
        assert sum(entry["probabilities"]) == pytest.approx(1)
        assert entry["probability"] == max(entry["probabilities"])
        assert 0 <= entry["mutual_information"] <= entry["entropy"]
    lines = tmp_path / "texts.txt"
    lines.write_text("the road was sour\n\nthe song is kind\n")
    table = call("predict", trained, "--data", lines, "--n-samples", "0")
    assert table.exit_code == 0, table.output
    assert "the song is kind" in table.stdout and "entropy" in table.stdout


def test_demo_compares_the_methods(data: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    small = ["--train-size", 40, "--test-size", 20, "--n-samples", 2, "--threads", 1]
    result = call(
        "demo", "--data", data, "--model", model, "--seeds", 2, "--steps", 2, *small, "--out", out
    )
    assert result.exit_code == 0, result.output
    found = results(out)
    assert [m["name"] for m in found["methods"]] == [
        "LoRA (MAP)",
        "LoRA + temperature",
        "BLoB mean",
        "BLoB N=2",
    ]
    assert found["seeds"] == [0, 1] and found["methods"][0]["std"]["nll"] > 0
    assert "better calibrated" in found["verdict"] or "disagree" in found["verdict"]
    assert found["verdict"].split(":")[0] in result.stdout and "±" in result.stdout
    assert (out / "reliability.png").is_file() and (out / "risk_coverage.png").is_file()
    saved = folders.read_record(out / "blob")
    assert saved is not None
    base, _ = load_model(model, saved.task)
    assert (
        peft.PeftModel.from_pretrained(base, out / "blob").peft_config["default"].method == "blob"
    )
    assert (
        peft.PeftModel.from_pretrained(load_model(model, saved.task)[0], out / "map")
        .peft_config["default"]
        .peft_type
        == "LORA"
    )
    assert "use --overwrite" in refuse("demo", "--data", data, "--model", model, "--out", out)


def test_an_interrupted_demo_leaves_nothing(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    small = ["--train-size", 40, "--test-size", 10, "--n-samples", 1, "--threads", 1]
    options = ["--data", data, "--model", model, "--seeds", 1, "--steps", 1, *small, "--out", out]
    run_many = run.run_many

    def stop_after_the_first(jobs: Any, **settings: Any) -> None:
        run_many(jobs[:1], **settings)
        raise ValueError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(run, "run_many", stop_after_the_first)
        assert call("demo", *options).exit_code == 2
    assert not out.exists()
    for overwrite in ([], ["--overwrite"]):
        result = call("demo", *options, *overwrite)
        assert result.exit_code == 0, result.output
        assert results(out)["seeds"] == [0]
    assert "use --overwrite" in refuse("demo", *options)
    # A folder that happens to have such a name is not the demo's.
    notes = tmp_path / "other" / "map" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("important")
    error = refuse("demo", *options[:-1], tmp_path / "other", "--overwrite")
    assert "expected no file in the way" in error and notes.read_text() == "important"


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "model './nowhere': expected a folder that exists"),
        (["--method", "magic"], "method: expected one of map, dropout, "),
        (["--method", "ensemble"], "made of adapters of several seeds"),
        (["--method", "dropout", "--dropout", "0"], "expected a rate above 0 for MC dropout"),
        (["--target-modules", "word_embeddings"], "cannot carry a Bayesian adapter"),
        (
            ["--target-modules", "nothing"],
            "which has classifier, dense, key, query, value; got nothing",
        ),
        (["--lora", "use_dora=true"], "use_dora cannot be combined with a posterior over A"),
        (["--lora", "rslora"], "expected name=value, got 'rslora'"),
        (["--lora", "speed=3"], "expected options of BlobConfig, got speed"),
        (["--prior-std", "-1"], "prior_std must be a positive number, got -1"),
        (["--kl-schedule", "linear"], "kl_schedule must be one of"),
        (["--steps", "0"], "steps must be an integer >= 1, got 0"),
        (["--train-size", "1000"], "train_size: expected an integer from 1 to"),
        (["--max-length", "999"], "max_length: expected an integer from 8 to 32, got 999"),
        (["--ood", "nothing.jsonl"], "nothing.jsonl: expected a file that can be read"),
        (["--device", "tpu"], "device: expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--resume"], "resume: expected an earlier run"),
        (["--data", "x"], "as argument or as --data, got both"),
    ],
)
def test_what_cannot_work_is_one_line(
    arguments: list[str], message: str, data: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    defaults = [] if "--model" in arguments else ["--model", model]
    assert message in refuse("train", data, *defaults, *arguments, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bar"], "; expected what bayes-kernels --help lists"),
        (["trian"], "expected what bayes-kernels --help lists"),
        (["predict"], "expected what bayes-kernels predict --help lists"),
        (["train", "x", "--threds", "3"], "; expected what bayes-kernels train --help lists"),
        (["train", "x", "--steps"], "Option '--steps' requires an argument; expected what"),
        (["train", "x", "y"], "expected what bayes-kernels train --help lists"),
        (["train", "x", "--steps", "1.5"], "--steps: expected an integer, got '1.5'"),
        (["train", "x", "--lr", "fast"], "--lr: expected a number, got 'fast'"),
        (["train", "x", "--test-size", "0"], "--test-size: expected an integer >= 1, got '0'"),
        (["train", "x", "--seed", str(2**70)], "--seed: expected an integer from 0 to 4294967295"),
        (["compare", "--processes", "100000"], "--threads / --processes: expected an integer from"),
    ],
)
def test_command_lines_that_cannot_be_read(arguments: list[str], message: str) -> None:
    assert message in refuse(*arguments)


def test_texts_are_shown_as_they_are(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("[red]run")
    classes = ["--label-names", "[bold]no,:smile:"]
    options = ["--model", model, "--method", "map", "--steps", "1", "--out", out]
    result = call("train", data, *classes, *options)
    assert result.exit_code == 0, result.output
    assert f"Wrote {out}/" in result.stdout
    text = "[/x] see [1] and [bold]this[/bold] :smile:"
    result = call("predict", out, "--text", text)
    assert result.exit_code == 0, result.output
    assert text in result.stdout
    assert "[bold]no" in result.stdout or result.stdout.count(":smile:") == 2
    result = call("evaluate", out)
    assert result.exit_code == 0, result.output
    assert f"{data.name}" in result.stdout and "[red]run" in result.stdout


def test_output_where_the_terminal_has_few_characters(data: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    code = "from bayes_kernels.cli import output; output._note('ACC ↑'); output._console().print('[a] ↑')"
    code = f"import sys; sys.argv[1:] = ['info']; {code}"
    wrapped = (
        f"from bayes_kernels.cli import app\napp.app = lambda prog_name: exec({code!r})\napp.main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", wrapped], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "[a] \\u2191" and "ACC \\u2191" in ended.stderr


@pytest.mark.parametrize("method", ["map", "blob", "scalabl", "laplace-last"])
def test_training_stops_where_it_diverges(
    method: str, data: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ["--model", model, "--method", method, "--steps", "6", "--out", out]
    error = refuse("train", data, *options, "--lr", "1e30")
    assert re.match(
        r"training: expected a finite loss at step [2-6] of 6, got nan or inf, at learning rate "
        r"[\d.]+e\+(29|30); use a lower lr",
        error,
    ), error
    assert not (out / "adapter_config.json").exists() and not (out / "metrics.json").exists()
    refused = refuse("train", data, *options, "--lr", "1e39", "--overwrite")
    assert "lr must be a number of fp32, got 1e+39" in refused
    refused = refuse("train", data, *options, "--weight-decay", "1e3", "--lr", "0.1", "--overwrite")
    assert "expected lr times weight decay below 1" in refused


def test_what_was_trained_is_finite() -> None:
    class Trainer:
        model = torch.nn.Linear(2, 2)
        args = type("Arguments", (), {"learning_rate": 0.5})()

        def train(self, resume_from_checkpoint: Any) -> None:
            with torch.no_grad():
                self.model.weight[0, 0] *= self.factor

        def check_finite(self) -> None:
            pass

    one = Trainer()
    one.factor = 2.0
    train._train(one, None, "nowhere")
    one.factor = math.inf
    with pytest.raises(ValueError, match=r"finite adapter after the last step.* rate 0\.5"):
        train._train(one, None, "nowhere")  # no step follows whose loss could tell


def test_a_loss_is_looked_at_whenever_the_trainer_logs(tmp_path: Path) -> None:
    class Loop:
        state = type("State", (), {"global_step": 4, "max_steps": 10})()
        lr_scheduler = type("Schedule", (), {"get_last_lr": lambda self: [self.rate]})()
        logged = 0

        def training_step(self, model: Any, inputs: torch.Tensor) -> torch.Tensor:
            return inputs

        def log(self, logs: Any) -> None:
            self.logged += 1

    class Watched(train._WatchedMixin, Loop):
        pass

    class OnDevice(torch.Tensor):  # a loss that the host has no copy of
        device = torch.device("meta")

    one = Watched()
    one._first_bad, one._rates, one._first_step = torch.tensor(-1), [], 4
    for step, loss in enumerate((1.0, 2.0, math.nan, 1.0, math.inf), start=4):
        one.state.global_step, one.lr_scheduler.rate = step, step / 10
        for _ in range(2):  # micro-batches
            one.training_step(None, torch.tensor(loss).as_subclass(OnDevice))
    with pytest.raises(ValueError, match=r"loss at step 7 of 10, got nan or inf, at .* rate 0\.6;"):
        one.log({})
    assert one.logged == 0
    fine = Watched()
    fine.training_step(None, torch.tensor(1.0))
    fine.log({})
    assert fine.logged == 1


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Files cannot grow beyond that: what a full disk looks like to Python, Rust and C++."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_results(data: Path, model: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    common = ["train", data, "--model", model, "--method", "map", "--steps", "2", "--out", out]
    with files_of_at_most(9_000):
        error = refuse(*common)
    assert "expected room to write a checkpoint to, got" in error and "checkpoints" in error
    new = tmp_path / "new"
    common = ["bayesianize", trained, "--n-samples", "1", "--anchors", "8", "--test-size", "4"]
    with files_of_at_most(3_000):
        error = refuse(*common, "--convert", "max_trials=2", "--out", new)
    assert f"{new}: expected room to write the adapter to, got" in error
    assert not (new / "adapter_config.json").exists()
    with files_of_at_most(900):
        error = refuse("evaluate", trained, "--n-samples", "0", "--out", tmp_path / "scores")
    assert "expected room to write to, got: File too large; make room" in error
    assert not (tmp_path / "scores" / "metrics.json").exists()


@pytest.mark.parametrize("kind", ["torch, CPU", "torch, GPU", "numpy"])
def test_no_memory(
    kind: str, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: Any, **__: Any) -> Any:
        if kind == "torch, GPU":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return (torch.empty if kind == "torch, CPU" else numpy.empty)(2**50)

    monkeypatch.setattr(build, "load_model", allocate)
    error = refuse("train", data, "--model", model, "--out", tmp_path / "run")
    assert error.startswith("memory: expected enough for this model and its batches, got: ")
    assert "use smaller batches" in error and not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_predict_nothing(
    data: Path, model: Path, trained: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "model"
    shutil.copytree(model, damaged)
    tensors = safetensors.torch.load_file(damaged / "model.safetensors")
    tensors["embeddings.LayerNorm.weight"].fill_(math.nan)
    safetensors.torch.save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    for words in (
        ["evaluate", trained, "--out", tmp_path / "new"],
        ["predict", trained, "--text", "a"],
    ):
        error = refuse(*words, "--model", damaged, "--n-samples", "0")
        assert "expected finite logits, got nan for" in error
        assert "nan" in refuse(*words, "--model", damaged, "--n-samples", "2")
    error = refuse("train", data, "--model", damaged, "--out", tmp_path / "new", "--steps", "2")
    assert "expected a finite loss at step 1 of 2" in error


def test_debug_shows_the_traceback(data: Path) -> None:
    result = call("train", data, "--model", "./nowhere", "--debug")
    assert isinstance(result.exception, ValueError)


def test_data_that_is_missing_or_bad(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    common = ["--model", model, "--out", out]
    assert "expected stdlib-docs" in refuse("train", "nothing.jsonl", *common)
    assert "got none" in refuse("train", *common)
    good = tiny_task.rows(20, "row", 0)
    file = tiny_task.write_rows(tmp_path / "bad.jsonl", good)
    lines = file.read_text().splitlines()
    lines[6] = lines[6][:-4]
    file.write_text("\n".join(lines) + "\n")
    assert f"{file}:7: expected JSON, got" in refuse("train", file, *common)
    good[2].pop("label")
    tiny_task.write_rows(file, good)
    assert f"{file}:3: 'label' must be an integer from 0, got None" in refuse(
        "train", file, *common
    )
    assert not out.exists()


def test_extras_that_are_missing(
    data: Path, model: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [data, "--model", model, "--out", tmp_path / "run"]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    error = refuse("train", *common, "--quantization", "4bit")
    assert "pip install 'bayes-kernels[quant]'" in error
    monkeypatch.setitem(sys.modules, "datasets", None)
    error = refuse("train", "obqa", "--out", tmp_path / "run")
    assert "pip install 'bayes-kernels[train]'" in error
    assert not (tmp_path / "run").exists()
    code = "import sys; sys.modules['typer'] = None; from bayes_kernels.cli.app import main"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "pip install 'bayes-kernels[hf]'" in ended.stderr


def test_compiled_ops_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks need them; other commands go on with plain PyTorch and say so, or refuse if asked to."""
    monkeypatch.setattr(_library, "problem", "libbayes_kernels.so was not found")
    monkeypatch.setattr(_library, "_told", set())
    error = refuse("bench", "predict", "--quick")
    assert "compiled ops cannot be loaded: libbayes_kernels.so was not found; " in error
    with pytest.warns(UserWarning, match=r"libbayes_kernels.so was not found; reinstall"):
        error = refuse("predict", "nowhere", "--text", "x")
    assert "nowhere" in error
    monkeypatch.setenv("BAYES_KERNELS_STRICT", "1")
    error = refuse("predict", "nowhere", "--text", "x")
    assert "libbayes_kernels.so was not found; reinstall" in error


def test_layers_of_unsupported_quantisation(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No such kernels exist for the CPU; what PEFT makes of such a layer is all that matters.
    from bayes_kernels.hf import variants

    monkeypatch.setattr(
        variants, "unsupported_layer", lambda layer: "PEFT handles it with AwqLoraLinear"
    )
    error = refuse("train", data, "--model", model, "--out", tmp_path / "run")
    assert "PEFT handles it with AwqLoraLinear; target linear layers that are" in error
    assert not (tmp_path / "run").exists()


def test_no_network(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    datasets = pytest.importorskip("datasets")
    import transformers

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    error = refuse("train", "obqa", "--out", tmp_path / "run")
    assert "neither reachable nor in the cache" in error
    error = refuse("train", data, "--model", "some/model", "--out", tmp_path / "run")
    assert "the hub cannot be reached or has no such model" in error
    assert not (tmp_path / "run").exists()


def test_folders_are_not_overwritten_by_accident(
    data: Path, model: Path, trained: Path, tmp_path: Path
) -> None:
    common = ["train", data, "--model", model, *SETTINGS]
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    assert "use --overwrite, --resume or another" in refuse(*common, "--out", trained)
    assert before == {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    (tmp_path / "thesis.tex").write_text("important")
    error = refuse(*common, "--out", tmp_path, "--overwrite")
    assert "this folder has none" in error
    (tmp_path / "metrics.json").write_text("{}")  # of another program
    assert "expected no file in the way" in refuse(*common, "--out", tmp_path, "--overwrite")
    out = tmp_path / "map"
    result = call(*common[:-2], "--out", out, "--method", "map")
    assert result.exit_code == 0, result.output
    assert results(out)["methods"][0]["name"] == "LoRA (MAP)"
    # Plain LoRA has no posterior to draw from.
    error = refuse("predict", out, "--text", "a bright day", "--n-samples", "5")
    assert "expected 0 for an adapter that has no posterior" in error
    plain = call("predict", out, "--text", "a bright day", "--json")
    assert json.loads(plain.stdout)["mutual_information"] is None


def test_adapters_and_data_that_do_not_fit(trained: Path, data: Path, tmp_path: Path) -> None:
    assert "folder that exists" in refuse("predict", tmp_path / "nothing", "--text", "a")
    assert "adapter_config.json" in refuse("evaluate", tmp_path)
    assert "got neither" in refuse("predict", trained)
    three = [{**row, "label": i % 3} for i, row in enumerate(tiny_task.rows(30, "row", 0))]
    file = tiny_task.write_rows(tmp_path / "three.jsonl", three)
    assert "'label' must be below 2" in refuse(
        "evaluate", trained, "--data", file, "--out", tmp_path / "evaluation"
    )
    file.write_text("")
    assert "empty file" in refuse("predict", trained, "--data", file)


# --- Interruption --------------------------------------------------------------------------------


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(data: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["--steps", "2000", "--save-every", "5", "--n-samples", "2", "--test-size", "10"]
    command = ["train", str(data), "--model", str(model), *settings, "--out", str(out)]
    started = subprocess.Popen(
        [sys.executable, "-m", "bayes_kernels", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        first = out / "checkpoints" / "checkpoint-5" / "trainer_state.json"
        end = time.monotonic() + 120
        while not first.exists() and started.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        output, errors = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 130, errors
    assert output == "" and "Traceback" not in errors
    assert "interrupted after step" in errors and "--resume" in errors
    last = last_checkpoint(out / "checkpoints")
    assert last is not None and f"checkpoint: {last}" in errors
    step = int(last.rpartition("-")[2])
    assert 5 <= step < 2000
    evaluated = call("evaluate", last, "--n-samples", "0", "--out", tmp_path / "evaluation")
    assert evaluated.exit_code == 0, evaluated.output
    assert not (out / "metrics.json").exists()
    assert f"name its last checkpoint instead: {last}" in refuse("evaluate", out)
    # The number of steps is part of the experiment.
    assert "recipe.steps 2000 -> 30" in refuse(*command, "--resume", "--steps", "30")
