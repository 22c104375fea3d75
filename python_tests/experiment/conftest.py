"""A task, a model and a run that the tests of experiments share."""

from __future__ import annotations

from pathlib import Path

import pytest

from bayes_kernels.experiment import run as ex
from bayes_kernels.experiment.recipe import Experiment, Source
from bayes_kernels.task import Task
from experiment.tiny_runs import SHORT


@pytest.fixture(scope="module")
def source(tiny_data: Path) -> Source:
    return Source(data=str(tiny_data), ood=(str(tiny_data / "ood.jsonl"),))


@pytest.fixture(scope="module")
def task(source: Source) -> Task:
    return source.load(0)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path, source: Source) -> Experiment:
    return Experiment(source, model=str(tiny_model), method="blob", recipe=SHORT)


@pytest.fixture(scope="module")
def finished(
    tiny: Experiment, task: Task, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ex.Run, Path]:
    folder = tmp_path_factory.mktemp("finished")
    return ex.run(tiny, task, folder=folder, save_every=5), folder
