"""Runs side by side."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from bayes_kernels.experiment import machine, processes
from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.recipe import Experiment
from bayes_kernels.task import Task
from experiment.tiny_runs import SHORT, alike, seen_gpu

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
            self.n, self.total, self.said = 0, total, ""
            bars.append(self)

        def update(self, steps: int) -> None:
            self.n += steps

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            self.said = text

        def close(self) -> None:
            pass

    bars: list[Bar] = []
    monkeypatch.setattr(processes, "progress_bar", Bar)
    monkeypatch.setattr(processes, "_NO_STEP", 0.0)
    plain = dataclasses.replace(tiny, method="mle")
    jobs = [ex.Job(plain, task, temperature=False), ex.Job(tiny, task, tmp_path / "blob")]
    seen: list[str] = []
    threads = torch.get_num_threads()
    runs = ex.run_many(jobs, processes=2, done=lambda run: seen.append(run.experiment.method))
    assert seen == ["mle", "blob"]
    assert [(bar.n, bar.total) for bar in bars] == [(2 * SHORT.steps, 2 * SHORT.steps)]
    assert re.fullmatch(r"no step for \d+ s \(loading, converting, scoring\)", bars[0].said)
    assert [row.name for row in runs[0].rows] == ["LoRA (MLE)"]
    if threads == 1:  # each process has half of the threads, which changes roundings
        assert alike(runs[1], finished[0])
    assert (tmp_path / "blob" / "adapter_model.safetensors").is_file()
    broken = dataclasses.replace(tiny, model=str(tmp_path))
    with pytest.raises(ValueError, match=r"config\.json"):
        ex.run_many([ex.Job(broken, task), ex.Job(broken, task)], processes=1)


def _warn(module: str, progress: bool) -> None:
    warnings.warn_explicit(f"of {module}", UserWarning, "file.py", 1, module)


def test_processes_do_not_repeat_what_runs_warn_of(capfd: pytest.CaptureFixture[str]) -> None:
    modules = ["bayes_kernels.experiment.run", "bayes_kernels.hf.predict"]
    calls = [(module,) for module in modules]
    processes.side_by_side(_warn, calls, lambda *_: None, processes=2, progress=False)
    said = capfd.readouterr().err
    assert f"of {modules[1]}" in said and f"of {modules[0]}" not in said


def test_a_call_that_fails_leaves_no_memory_to_the_next() -> None:
    class Big:
        pass

    alive: list[Any] = []
    errors: list[str] = []

    def call(number: int, *, progress: bool) -> None:
        left = [one() for one in alive if one() is not None]
        big = Big()
        alive.append(weakref.ref(big))
        raise ValueError(f"{number}: {len(left)} left")

    processes.side_by_side(call, [(0,), (1,)], lambda _, error: errors.append(str(error)))
    assert errors == ["0: 0 left", "1: 0 left"]


GPUS = [machine.Gpu("2", 90, 100), machine.Gpu("GPU-5", 50, 100)]


def test_processes_are_dealt_out_to_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = GPUS
    # 90 % of what is free, in equal parts.
    assert processes.shares(GPUS, 3) == [(one, 40), (two, 45), (one, 40)]
    assert processes.shares(GPUS[:1], 4) == [(one, 20)] * 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    found: dict[int, str] = {}
    processes.side_by_side(
        seen_gpu,
        [(i,) for i in range(4)],
        found.__setitem__,
        processes=3,
        gpus=GPUS,
        progress=False,
    )
    assert [found[i] for i in range(3)] == ["2", "GPU-5", "2"] and found[3] in ("2", "GPU-5")
    processes.side_by_side(seen_gpu, [], found.__setitem__, processes=3, gpus=GPUS, progress=False)
    # A single process, too, must not see several GPUs.
    alone: dict[int, str] = {}
    processes.side_by_side(seen_gpu, [(0,)], alone.__setitem__, gpus=GPUS, progress=False)
    assert alone == {0: "2"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,GPU-5"


def test_a_process_may_take_its_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    processes.take_share(0.25)  # there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    processes.take_share(None)
    processes.take_share(0.25)
    assert limits == [0.25]
