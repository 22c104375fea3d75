"""`train` under launchers of several processes: torchrun and accelerate, two processes on gloo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run_command
from safetensors.torch import load_file

from bayes_kernels.cli import output
from bayes_kernels.experiment import folders
from bayes_kernels.launcher import Launched, launched
from cli.commands import call, refuse, results

pytestmark = pytest.mark.cpu_only

_STEPS = ["--steps", "3", "--save-every", "2", "--lr", "0.005", "--rank", "4", "--device", "cpu"]


def _launch(launcher: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    free = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", *launcher, "-m", "bayes_kernels", *map(str, arguments)]
    return run_command(command, env={**os.environ, **free}, timeout=240)


_TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# With --cpu it would want MPI. Processes without a GPU find gloo by themselves.
_ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
_ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
_ACCELERATE += ["--main_process_port", "0"]


@pytest.fixture(scope="module")
def shared(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain LoRA, trained by two processes."""
    out = tmp_path_factory.mktemp("launched") / "mle"
    words = ["train", data, "--model", model, "--method", "mle", *_STEPS, "--out", out]
    result = _launch(_TORCHRUN, *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Wrote ") == 1 and result.stdout.count("LoRA (MLE)") >= 1
    return out


def _differ(one: Path, other: Path) -> float:
    """Largest difference of two adapters, in steps of the largest learning rate."""
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours) / 0.005


def test_processes_train_what_one_does(
    shared: Path, data: Path, model: Path, tmp_path: Path
) -> None:
    words = ["train", data, "--model", model, "--method", "mle", *_STEPS]
    assert call(*words, "--out", tmp_path / "one").exit_code == 0
    assert _differ(shared, tmp_path / "one") < 0.05
    assert len(results(shared)["methods"]) == len(results(tmp_path / "one")["methods"])
    assert folders.read_record(shared) is not None
    names = {path.name for path in shared.iterdir()}
    assert names - {path.name for path in (tmp_path / "one").iterdir()} == set()
    # Another number of processes goes on from their checkpoint, here after step 2.
    last = shared / "checkpoints" / "checkpoint-3"
    last.rename(tmp_path / "last")
    result = call(*words, "--out", shared, "--resume")
    assert result.exit_code == 0, result.output
    assert (last / "experiment.json").exists()
    assert _differ(last, tmp_path / "last") < 0.05
    # And the reverse: two from that of one.
    last = tmp_path / "one" / "checkpoints" / "checkpoint-3"
    shutil.rmtree(last)
    result = _launch(_TORCHRUN, *words, "--out", tmp_path / "one", "--resume")
    assert result.returncode == 0, result.stderr
    assert _differ(last, tmp_path / "last") < 0.05


@pytest.mark.slow
def test_a_bayesian_method_under_accelerate(data: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "blob"
    words = ["train", data, "--model", model, "--n-samples", "2", *_STEPS, "--out", out]
    result = _launch(_ACCELERATE, *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Wrote ") == 1 and "BLoB N=2" in result.stdout
    assert sorted(path.name for path in (out / ".bayes_kernels").iterdir()) == ["run.json"]
    # Of two processes: each left the state of its own random numbers.
    assert (out / "checkpoints" / "checkpoint-3" / "rng_state_1.pth").exists()
    (entry,) = results(out)["training"]
    assert entry["steps"] == 3 and entry["log"][0]["kl"] > 0


def _pretend(monkeypatch: pytest.MonkeyPatch, rank: int, count: int = 2) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)):
        monkeypatch.setenv(name, str(value))


def test_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == Launched(0, 1, 0) and launched().first
    monkeypatch.setenv("WORLD_SIZE", "4")  # of a cluster's job, without a launcher
    assert launched().count == 1
    _pretend(monkeypatch, 1)
    assert launched() == Launched(1, 2, 1) and not launched().first


@pytest.mark.parametrize(
    "command", ["compare", "demo", "sweep", "bayesianize", "evaluate", "predict"]
)
def test_other_commands_want_one_process(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [command, "x"] if command in ("bayesianize", "evaluate", "predict") else [command]
    words += ["--vary", "rank=2,4"] if command == "sweep" else []
    words += ["--method", "tfb", "--data", "y"] if command == "bayesianize" else []
    words += ["--text", "y"] if command == "predict" else []
    _pretend(monkeypatch, 0)
    assert f"{command}: expected one process, got 2 of a launcher" in refuse(*words)
    assert list(tmp_path.iterdir()) == []


def test_the_first_process_says_what_all_have_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others give the launcher time to end them, and speak if it does not."""
    waited: list[float] = []
    monkeypatch.setattr(output.time, "sleep", waited.append)
    _pretend(monkeypatch, 0)
    assert refuse("demo").startswith("demo: expected one process") and waited == []
    _pretend(monkeypatch, 1)
    said = refuse("demo")
    assert said.startswith("process 1 of 2: demo: expected one process")
    assert waited == [output.FIRST_SPEAKS]


def test_an_error_of_all_processes_is_said_once(tmp_path: Path) -> None:
    found = _launch(_TORCHRUN, "demo", "--out", tmp_path / "out")
    assert found.returncode != 0
    said = [line for line in found.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and said[0].startswith("error: demo: expected one process, got 2")
    assert not (tmp_path / "out").exists()


def test_steps_that_cannot_be_divided(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, 0)
    words = ["train", data, "--model", model, *_STEPS, "--out", tmp_path / "out"]
    error = refuse(*words, "--batch-size", 6, "--accumulation", 2)
    assert "expected a multiple of accumulation x processes = 2 x 2, got 6" in error
    assert not (tmp_path / "out").exists()
