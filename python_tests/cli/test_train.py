"""The commands that train: train, demo; their folders, errors and interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_task
from peft import PeftModel
from programs import end_all

from bayes_kernels.experiment import folders, run
from bayes_kernels.experiment.results import COSTS
from bayes_kernels.hf.checkpoint_folders import last_checkpoint
from bayes_kernels.hf.tasks.models import load_model
from cli.commands import SETTINGS, call, refuse, results

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


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
    assert found["format"] == 2 and found["seeds"] == [0]
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


def test_training_a_method_that_converts(data: Path, model: Path, tmp_path: Path) -> None:
    options = [*SETTINGS, "--method", "tfb", "--set", "anchors=20"]
    options += ["--set", "search=grid", "--set", "max_trials=2"]
    result = call("train", data, "--model", model, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = results(tmp_path / "out")
    assert found["methods"][-1]["name"] == "TFB N=3"
    assert found["training"][0]["conversion"]["anchors"] == 20
    assert found["training"][0]["conversion"]["passes"] == 3
    saved = folders.read_record(tmp_path / "out")
    assert saved is not None and saved.experiment.recipe.options["search"] == "grid"
    checkpoint = last_checkpoint(tmp_path / "out" / "checkpoints")
    assert checkpoint is not None  # plain LoRA, which has no draws yet
    result = call("evaluate", checkpoint, "--out", tmp_path / "plain")
    assert result.exit_code == 0, result.output
    assert results(tmp_path / "plain")["methods"][0]["name"] == "LoRA (MLE)"
    for bad, message in (
        ("metrc=flips", "got metrc"),
        ("metric=foo", "metric must be one of"),
        ("low=1", "range must be 0 < low < high"),
        ("anchors=0", "anchors must be an integer >= 1"),
        ('layers=["query", "valeu"]', "got ['valeu']"),
    ):
        bad_options = [*SETTINGS, "--method", "tfb", "--set", bad, "--out", tmp_path / "bad"]
        assert message in refuse("train", data, "--model", model, *bad_options)
        assert not (tmp_path / "bad").exists()  # found before training
    error = refuse("train", data, "--model", model, "--set", "low=0.01")
    assert "--set low=0.01: expected a setting that blob uses, got one of tfb" in error


def test_demo_compares_the_methods(data: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    small = ["--train-size", 40, "--test-size", 20, "--n-samples", 2, "--threads", 1]
    small += ["--set", "kl_time=0.03", "--set", "lr=2e-3", "--set", "mle.lr=3e-3"]
    result = call(
        "demo", "--data", data, "--model", model, "--seeds", 2, "--steps", 2, *small, "--out", out
    )
    assert result.exit_code == 0, result.output
    found = results(out)
    recipes = {name: one["recipe"] for name, one in found["experiments"].items()}
    assert recipes["blob"]["options"] == {"kl_time": 0.03} and recipes["blob"]["lr"] == 2e-3
    assert recipes["mle"]["lr"] == 3e-3 and recipes["mle"]["max_length"] == 32
    assert [m["name"] for m in found["methods"]] == [
        "LoRA (MLE)",
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
    assert PeftModel.from_pretrained(base, out / "blob").peft_config["default"].method == "blob"
    assert (
        PeftModel.from_pretrained(load_model(model, saved.task)[0], out / "mle")
        .peft_config["default"]
        .peft_type
        == "LORA"
    )
    assert "use --overwrite" in refuse("demo", "--data", data, "--model", model, "--out", out)


def test_a_temperature_without_validation_rows_is_missed(
    data: Path, model: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name, rows in (("train", slice(16, 24)), ("test", slice(12))):
        lines = (data / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (few / f"{name}.jsonl").write_text("".join(lines[rows]))
    common = ["--data", few, "--model", model, "--steps", 2, "--n-samples", 2]
    said = (
        "no row with a temperature: it is fitted on labelled validation rows, and this run of 'few'"
    )
    for command, more in (("train", ["--rank", 2]), ("demo", ["--threads", 1])):
        result = call(command, *common, *more, "--out", tmp_path / command)
        assert result.exit_code == 0, result.output
        assert said in result.stderr and "+ temperature" not in result.stdout
    for command in ("train", "demo"):
        words = ["--method", "laplace", "--set", "prior=validation", "--out", tmp_path / "new"]
        error = refuse(command, *common, *words)
        assert (
            "expected labelled validation rows for prior=validation of laplace, got none" in error
        )
        assert not (tmp_path / "new").exists()


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
    notes = tmp_path / "other" / "mle" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("important")
    error = refuse("demo", *options[:-1], tmp_path / "other", "--overwrite")
    assert "expected no file in the way" in error and notes.read_text() == "important"


@pytest.mark.parametrize("method", ["mle", "blob", "scalabl", "laplace-last"])
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
    assert f"{file}:3: 'label' must be an integer from 0, or a name, got None" in refuse(
        "train", file, *common
    )
    assert not out.exists()


def test_layers_of_unsupported_quantisation(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No such kernels exist for the CPU; what PEFT makes of such a layer is all that matters.
    from bayes_kernels.hf import attaching

    monkeypatch.setattr(
        attaching, "unsupported_layer", lambda layer: "PEFT handles it with AwqLoraLinear"
    )
    error = refuse("train", data, "--model", model, "--out", tmp_path / "run")
    assert "PEFT handles it with AwqLoraLinear; target linear layers that are" in error
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
    out = tmp_path / "mle"
    result = call(*common[:-2], "--out", out, "--method", "mle")
    assert result.exit_code == 0, result.output
    assert results(out)["methods"][0]["name"] == "LoRA (MLE)"
    # Plain LoRA has no posterior to draw from.
    error = refuse("predict", out, "--text", "a bright day", "--n-samples", "5")
    assert "n_samples must be 0 for adapters without a posterior" in error
    plain = call("predict", out, "--text", "a bright day", "--json")
    assert json.loads(plain.stdout)["mutual_information"] is None


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
        start_new_session=True,
    )
    try:
        first = out / "checkpoints" / "checkpoint-5" / "trainer_state.json"
        end = time.monotonic() + 120
        while not first.exists() and started.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        output, errors = started.communicate(timeout=60)
    finally:
        end_all(started)
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
