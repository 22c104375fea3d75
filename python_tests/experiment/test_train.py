"""The loss and the weights of training are finite, or it stops; the process group ends with training."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import together

from bayes_kernels.experiment import run, train
from bayes_kernels.experiment.recipe import Experiment, Source
from experiment.tiny_runs import SHORT


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


@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
@pytest.mark.parametrize("method", ["mle", "blob"])
def test_threads_of_the_process_group_end_before_the_process_goes_on(
    method: str, tiny_data: Path, tiny_model: Path
) -> None:
    """They want Python's lock, which whoever waits for them later may hold."""
    for said in together("experiment.test_train", method, tiny_data, tiny_model):
        assert said.splitlines()[-3:] == ["during: True", "freed in it: True", "after: False"]


def _gloo_runs() -> bool:
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return any("gloo" in name for name in names)


def _train_with_others(method: str, data: str, model: str) -> None:
    found = {}
    end = train._end_process_group

    def watched(trainer: Any) -> None:
        found["during"] = _gloo_runs()
        free = trainer.accelerator.free_memory

        def freed() -> None:  # DeepSpeed's engine asks the group for its rank
            found["freed in it"] = torch.distributed.is_initialized()
            free()

        trainer.accelerator.free_memory = freed
        end(trainer)
        found["after"] = _gloo_runs()

    train._end_process_group = watched
    source = Source(data=data)
    short = dataclasses.replace(SHORT, steps=2)
    run.run(
        Experiment(source, model=model, method=method, recipe=short), source.load(0), progress=False
    )
    print(*(f"{when}: {there}" for when, there in found.items()), sep="\n")


if __name__ == "__main__":
    _train_with_others(*sys.argv[1:])
