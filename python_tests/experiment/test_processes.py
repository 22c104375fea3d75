"""Runs side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bayes_kernels.experiment import processes
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.recipe import Experiment
from bayes_kernels.hf.tasks.task import Task
from experiment.tiny_runs import SHORT, alike

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def test_runs_side_by_side_give_the_same_numbers(
    finished: tuple[ex.Run, Path],
    tiny: Experiment,
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Bar:
        def __init__(self, enabled: bool, total: int, desc: str) -> None:
            self.n, self.total = 0, total
            bars.append(self)

        def update(self, steps: int) -> None:
            self.n += steps

        def close(self) -> None:
            pass

    bars: list[Bar] = []
    monkeypatch.setattr(processes, "progress_bar", Bar)
    plain = dataclasses.replace(tiny, method="mle")
    jobs = [ex.Job(plain, task, temperature=False), ex.Job(tiny, task, tmp_path / "blob")]
    seen: list[str] = []
    threads = torch.get_num_threads()
    runs = ex.run_many(jobs, processes=2, done=lambda run: seen.append(run.experiment.method))
    assert seen == ["mle", "blob"]
    assert [(bar.n, bar.total) for bar in bars] == [(2 * SHORT.steps, 2 * SHORT.steps)]
    assert [row.name for row in runs[0].rows] == ["LoRA (MLE)"]
    if threads == 1:  # each process has half of the threads, which changes roundings
        assert alike(runs[1], finished[0])
    assert (tmp_path / "blob" / "adapter_model.safetensors").is_file()
    broken = dataclasses.replace(tiny, model=str(tmp_path))
    with pytest.raises(ValueError, match=r"config\.json"):
        ex.run_many([ex.Job(broken, task), ex.Job(broken, task)], processes=1)
