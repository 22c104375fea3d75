"""The command line as a whole: help, errors in one line, what is missing on a machine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import typer

from bayes_kernels import _library
from bayes_kernels.cli import app
from bayes_kernels.cli.methods import LISTING
from bayes_kernels.hf.tasks import adapters
from cli.commands import call, refuse

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only
COMMANDS = list(typer.main.get_command(app.app).commands)


def test_info_is_the_diagnosis() -> None:
    result = call("info", "--devices")
    assert result.exit_code == 0
    assert result.stdout.startswith("bayes_kernels ") and "compiled ops" in result.stdout
    assert "\n  cpu: fused " in result.stdout


def test_a_terminal_shows_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a command that waits for it, and only there: programs read what other streams hold."""
    happened: list[str] = []

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    @contextlib.contextmanager
    def status(text: str) -> Iterator[None]:
        happened.append(text)
        yield
        happened.append("end")

    monkeypatch.setattr(app, "status", status)
    monkeypatch.setattr(app, "import_module", happened.append)
    heavy = ["predict", "nowhere", "--text", "x"]
    app.app(heavy, standalone_mode=False)
    assert happened == []
    monkeypatch.setattr(sys, "stderr", Terminal())
    app.app(heavy, standalone_mode=False)
    assert happened == ["loading torch, transformers and PEFT", "bayes_kernels.hf", "end"]
    for light in (["info"], ["methods"], ["predict", "--help"]):
        app.app(light, standalone_mode=False)
    assert len(happened) == 3


def alone(*words: object) -> tuple[int, str, str]:
    """A command in a process of its own, which may import no heavy package: code, output and errors."""
    code = (
        "import sys; from bayes_kernels.__main__ import main\n"
        "try: main()\n"
        "finally: print({'torch', 'numpy', 'transformers', 'peft'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout.endswith("set()\n"), ended.stdout + ended.stderr
    return ended.returncode, ended.stdout.removesuffix("set()\n"), ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's")
@pytest.mark.parametrize(
    ("own", "turns"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "passive"}, "0"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_waiting_threads_leave_their_cores_to_others(own: dict[str, str], turns: str) -> None:
    """Soon, unless the user has said otherwise: libgomp itself prints what it was told."""
    given = {key: text for key, text in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    ended = subprocess.run(
        [sys.executable, "-m", "bayes_kernels", "info", "--devices"],
        env={**given, **own, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    if "GOMP_" not in ended.stderr:
        pytest.skip("this torch has another OpenMP than libgomp")
    assert f"GOMP_SPINCOUNT = '{turns}'" in ended.stderr


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_imports_neither_torch_nor_transformers(command: list[str]) -> None:
    code, text, _ = alone(*command, "--help")
    assert code == 0 and "Usage: bayes-kernels" in text


def test_data_are_written_and_checked_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "messages.csv"
    alone("data", "sample", file)
    assert file.read_text(encoding="utf-8").startswith("text,label\n")
    assert alone("data", "check", file) == (0, call("data", "check", file).stdout, "")
    code, _, error = alone("data", "check", tmp_path / "nothing.csv")
    assert code == 2 and error.startswith("error: data: expected stdlib-docs, one of ")


def test_methods_are_listed_without_torch() -> None:
    """From a file with the table's own words: see `test_methods.py` for what they are."""
    for words in ([], ["blob"], ["laplace"]):
        assert alone("methods", *words) == (0, call("methods", *words).stdout, "")
    code, text, error = alone("methods", "magic")
    assert (code, text) == (2, "") and error.startswith("error: method: expected one of mle, map, ")


def test_what_is_installed_is_said_without_torch() -> None:
    code, text, error = alone("info")
    assert (code, text, error) == (0, call("info").stdout, "")
    lines = call("info", "--devices").stdout.splitlines()
    *own, last = text.splitlines()
    assert "`bayes-kernels info --devices`" in last and "compiled ops: " in text
    assert [line for line in lines if line in own] == own and "  cpu: " not in text


@pytest.mark.parametrize("words", [[], ["data"]], ids=" ".join)
def test_a_group_without_a_command_ends_with_its_help(words: list[str]) -> None:
    result = call(*words)
    assert (result.exit_code, result.stderr) == (2, "") and " COMMAND " in result.stdout
    assert result.stdout.strip() == call(*words, "--help").stdout.strip()


@pytest.mark.parametrize(
    "words", [["trian"], ["train", "x", "--threds", "3"], ["bench", "--seconds", "fast"]]
)
def test_words_that_no_command_knows_are_refused_without_torch(words: list[str]) -> None:
    code, text, error = alone(*words)
    assert (code, text) == (2, "") and error.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "model './nowhere': expected a folder that exists"),
        (["--method", "magic"], "method: expected one of mle, map, dropout, "),
        (["--method", "ensemble"], "made of adapters of several seeds"),
        (["--method", "dropout", "--dropout", "0"], "expected a rate above 0 for MC dropout"),
        (
            ["--method", "scalabl", "--target-modules", "word_embeddings"],
            "cannot carry a Bayesian adapter",
        ),
        (
            ["--target-modules", "nothing"],
            "which has classifier, dense, key, query, value; got nothing",
        ),
        (["--set", "lora.use_dora=true"], "use_dora cannot be combined with a posterior over A"),
        (["--set", "rslora"], "expected NAME=VALUE, got 'rslora'"),
        (
            ["--set", "lora.speed=3"],
            "options of peft.LoraConfig that the model leaves open, got sp",
        ),
        (["--set", "lora.task_type=SEQ_CLS"], "that the model leaves open, got task_type"),
        (["--set", "prior_std=-1"], "prior_std must be a positive number, got -1"),
        (["--set", "kl_schedule=linear"], "kl_schedule must be one of"),
        (["--set", "speed=3"], "or an option of blob (sample_at_inference, activation_bits, "),
        (["--steps", "0"], "steps must be an integer >= 1, got 0"),
        (["--train-size", "1000"], "train_size: expected an integer from 1 to"),
        (["--max-length", "999"], "max_length: expected an integer from 8 to 32, got 999"),
        (["--ood", "nothing.jsonl"], "nothing.jsonl: expected a file that can be read"),
        (["--device", "tpu"], "device: expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
        (["--resume", "--overwrite"], "exclude each other"),
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
        (["predict", "x", "--text"], "; expected what bayes-kernels predict --help lists"),
        (["predict", "x", "--json=3"], "; expected what bayes-kernels predict --help lists"),
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


@pytest.mark.parametrize("kind", ["torch, CPU", "torch, GPU", "numpy"])
def test_no_memory(
    kind: str, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: Any, **__: Any) -> Any:
        if kind == "torch, GPU":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return (torch.empty if kind == "torch, CPU" else numpy.empty)(2**50)

    monkeypatch.setattr(adapters, "load_model", allocate)
    error = refuse("train", data, "--model", model, "--out", tmp_path / "run")
    assert error.startswith("memory: expected enough for this model and its batches, got: ")
    assert "use smaller batches" in error and not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(data: Path) -> None:
    result = call("train", data, "--model", "./nowhere", "--debug")
    assert isinstance(result.exception, ValueError)


def test_extras_that_are_missing(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_compiled_ops_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks need them; other commands go on with plain PyTorch and say so, or refuse if asked to."""
    ended = subprocess.run(
        [sys.executable, "-m", "bayes_kernels", "bench", "predict", "--quick"],
        env={**os.environ, "BAYES_KERNELS_LIBRARY": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and ended.stderr.startswith(
        "error: compiled ops cannot be loaded: libbayes_kernels.so was not found"
    )
    monkeypatch.setattr(_library, "problem", "libbayes_kernels.so was not found")
    monkeypatch.setattr(_library, "_told", set())
    with pytest.warns(UserWarning, match=r"libbayes_kernels.so was not found; reinstall"):
        error = refuse("predict", "nowhere", "--text", "x")
    assert "nowhere" in error
    monkeypatch.setenv("BAYES_KERNELS_STRICT", "1")
    error = refuse("predict", "nowhere", "--text", "x")
    assert "libbayes_kernels.so was not found; reinstall" in error


def test_no_network(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    datasets = pytest.importorskip("datasets")
    import transformers

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    error = refuse("train", "obqa", "--out", tmp_path / "run")
    assert "neither reachable nor in the cache" in error
    error = refuse("train", data, "--model", "some/model", "--out", tmp_path / "run")
    assert "the hub cannot be reached, and its cache has no such model" in error
    assert not (tmp_path / "run").exists()


def test_a_device_is_refused_before_data_is_read(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    for words in (["train"], ["compare", "--data"], ["demo", "--data"], ["evaluate"]):
        error = refuse(*words, nothing, "--device", "tpu")
        assert "device: expected 'auto', 'cpu' or 'cuda', got 'tpu'" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_help_breaks_lines_at_the_width_of_the_terminal_only(command: str) -> None:
    text, box, _ = call(command, "--help").stdout.partition("\u256d")
    lines = [line.strip() for line in text.splitlines()]
    width = len(max(text.splitlines(), key=len)) - 2
    assert box and any(lines)
    for line, following in pairwise(lines):
        if line and following:
            assert len(line) + 1 + len(following.split()[0]) > width - 1


def test_data_is_checked_before_it_is_used(tmp_path: Path) -> None:
    file = tmp_path / "messages.csv"
    result = call("data", "sample", file)
    assert result.exit_code == 0 and f"data check {file}" in result.stdout
    assert "expected a new file" in refuse("data", "sample", file)
    assert "ends in .csv" in refuse("data", "sample", tmp_path / "messages.txt")
    result = call("data", "check", file)
    assert result.exit_code == 0 and "classification, 3 classes" in result.stdout
    assert "no test data" in result.stdout and "praise" in result.stdout
    result = call("data", "check", file, "--test", tmp_path / "nothing.csv")
    assert (
        result.exit_code == 2 and "nothing.csv: expected a file that can be read" in result.stderr
    )
    file.write_text("text,label\nfine,good\nbad\n,good\n")
    lines = call("data", "check", file).stderr.splitlines()
    assert [line.partition("messages.csv:")[2][:2] for line in lines] == ["3:", "4:"]
    assert "bayes-kernels data check --help" in refuse("data", "check", file, "--tset", file)


def test_options_are_listed_in_panels_with_the_page_that_helps_to_choose() -> None:
    text = call("--help").stdout
    assert "docs/choosing.md" in text and text.index("Begin") < text.index("Train") < text.index(
        "Use"
    )
    text = call("train", "--help").stdout
    panels = re.findall(r"─ (\w+) ─", text)
    for name in ("Data", "Model", "Method", "Training", "Prediction", "Results", "Machine"):
        assert name in panels
    method = text.partition("─ Method ─")[2].partition("╰")[0]
    assert "--rank" in method and "--set" in method and "--steps" not in method


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("data", "info")])
def test_help_has_a_panel_for_each_method_whose_options_a_command_takes(command: str) -> None:
    text = call(command, "--help").stdout
    takes = re.search(r"│ +--set\b", text) is not None
    assert takes == (command in app._METHODS)
    made, form = app._METHODS.get(command, ((), ""))
    for name, row in json.loads(LISTING.read_text()).items():
        title = f"─ {row['title']}, {form.format(method=name)} ─"
        shown = row["made"] in made and bool(row["options"])
        assert (title in text) == shown
        if shown:
            panel = " ".join(text.partition(title)[2].partition("╰")[0].replace("│", "").split())
            for option, one in row["options"].items():
                assert f"{option}={json.dumps(one['default'])}" in panel
