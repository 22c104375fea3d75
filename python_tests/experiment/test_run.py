"""Whole runs: training, scores, seeds, interruption."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bayes_kernels.experiment import callbacks, folders
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.callbacks import Interrupted
from bayes_kernels.experiment.folders import CHECKPOINTS
from bayes_kernels.experiment.recipe import Experiment
from bayes_kernels.task import Task
from experiment.tiny_runs import SHORT, TRAINED, alike, with_recipe

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def test_training_learns_the_task(tiny: Experiment, task: Task) -> None:
    longer = with_recipe(tiny, steps=40)
    for method in TRAINED:
        rows = ex.run(dataclasses.replace(longer, method=method), task).rows
        # A tenth of the labels is wrong; guessing gives one half.
        assert rows[0].report.accuracy > 0.8, method


def test_rows_of_a_run(finished: tuple[ex.Run, Path], tiny: Experiment, task: Task) -> None:
    run, _ = finished
    assert [row.name for row in run.rows] == ["BLoB mean", "BLoB mean + temperature", "BLoB N=3"]
    mean, tempered, sampled = run.rows
    assert mean.report.accuracy == tempered.report.accuracy  # a temperature changes no decision
    assert tempered.temperature is not None and mean.temperature is None
    assert sampled.n_samples == 3 and (sampled.report.mutual_information or 0) > 0
    for row in run.rows:
        assert row.report.n == len(task.test)
        assert set(row.ood["ood"]) == {"auroc", "fpr95"}  # that set has no labels
        assert row.report.ood_auroc == pytest.approx(row.ood["ood"]["auroc"])
        assert row.ms_per_example > 0 and row.peak_memory_mib > 50
    assert run.training is not None and run.training.steps == SHORT.steps
    assert {"loss", "nll", "kl", "elbo"} <= set(run.training.log[0])


def test_the_same_seed_gives_the_same_numbers(
    finished: tuple[ex.Run, Path], tiny: Experiment, task: Task
) -> None:
    torch.manual_seed(99)  # whatever the process did before
    again = ex.run(tiny, task)
    assert alike(again, finished[0])
    other = ex.run(dataclasses.replace(tiny, seed=1), task)
    assert not alike(other, again)


@pytest.mark.parametrize("method", ["mle", "blob", "tfb"])
def test_lower_layers_that_are_kept_change_nothing(
    method: str, tiny: Experiment, task: Task, tmp_path: Path
) -> None:
    """For the stock trainer, `BayesTrainer`, and a conversion after training."""
    upper = with_recipe(tiny, lora={"layers_to_transform": [1]})
    upper = dataclasses.replace(upper, method=method)
    kept = ex.run(with_recipe(upper, keep_lower_layers=2**24), task)
    for one, two in zip(kept.rows, ex.run(upper, task).rows, strict=True):
        torch.testing.assert_close(one.log_probs, two.log_probs, rtol=1e-3, atol=1e-4)
    both = with_recipe(tiny, keep_lower_layers=2**24)  # adapters in all layers
    with pytest.raises(ValueError, match="keep_lower_layers: there must be whole layers below"):
        ex.run(both, task, folder=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("method", TRAINED)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tiny: Experiment, task: Task, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = dataclasses.replace(tiny, method=method)
    whole = ex.run(one, task)

    def interrupt(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 7:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.TrainingBar, "on_step_begin", interrupt, raising=False)
        with pytest.raises(Interrupted) as stop:
            ex.run(one, task, folder=tmp_path, save_every=5)
    assert signal.getsignal(signal.SIGINT) == before
    assert (stop.value.step, stop.value.signal) == (8, signal.SIGINT)
    checkpoint = tmp_path / CHECKPOINTS / "checkpoint-8"
    assert stop.value.checkpoint == str(checkpoint)
    assert not (tmp_path / "adapter_config.json").exists()
    with pytest.raises(ValueError, match="checkpoint-8"):
        folders.read_record(tmp_path)
    saved = folders.read_record(checkpoint)
    assert saved is not None and saved.experiment == one
    folders.load_adapter(checkpoint, one, task)

    folders.check_resumable(tmp_path, one)
    folders.check_resumable(tmp_path, one, task)
    other = dataclasses.replace(task, train=task.train[::-1])
    with pytest.raises(
        ValueError, match=r"the rows that .*checkpoint-8 was made with, got data tha"
    ):
        folders.check_resumable(tmp_path, one, other)
    other = dataclasses.replace(task, label_names=task.label_names[::-1])
    with pytest.raises(
        ValueError, match=r"resume: expected the classes of .*, 0, 1, got 1, 0; name"
    ):
        folders.check_resumable(tmp_path, one, other)
    with pytest.raises(ValueError, match=r"recipe.lr 0.005 -> 0.1"):
        folders.check_resumable(tmp_path, with_recipe(one, lr=0.1))
    resumed = ex.run(one, task, folder=tmp_path, resume=True)
    assert resumed.training is not None and resumed.training.steps == SHORT.steps - 8
    assert alike(resumed, whole)
