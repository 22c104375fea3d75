"""Tensors and messages of all processes, without pickle."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from programs import joined, together
from torch import nn

import bayes_kernels
from bayes_kernels.hf.gathering import _device, gather_tensors, gather_texts


def _exchange(rank: int) -> None:
    model = nn.Linear(1, 1)
    shared = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    own: dict[str, torch.Tensor] = {
        "same": torch.full((rank + 1, 2), rank, dtype=torch.bfloat16),
        "number": torch.tensor(7 + rank),
        "views": shared.T,
        "whole": shared,
    }
    if rank:
        own["more"] = torch.zeros(0, 5, dtype=torch.bool)
    found = gather_tensors(own, model)
    assert [sorted(one) for one in found] == [
        ["number", "same", "views", "whole"],
        ["more", "number", "same", "views", "whole"],
    ]
    for number, one in enumerate(found):
        assert one["same"].dtype == torch.bfloat16 and one["same"].shape == (number + 1, 2)
        assert bool((one["same"] == number).all()) and one["number"].item() == 7 + number
        assert torch.equal(one["views"], shared.T) and one["views"].dtype == torch.float64
    assert found[1]["more"].shape == (0, 5) and found[1]["more"].dtype == torch.bool
    assert gather_tensors({} if rank else own, model)[1] == {}
    assert gather_texts("grün\n" if rank else None, model) == [None, "grün\n"]
    assert gather_texts("", model) == ["", ""]


def test_two_processes_exchange_tensors_of_any_kind() -> None:
    together("hf.test_gathering")


@pytest.mark.parametrize(
    ("backends", "device"),
    [("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo,cuda:gloo", "cpu"), ("meta:nccl", "meta")],
)
def test_collectives_are_on_a_device_of_the_group(backends: str, device: str) -> None:
    model = nn.Linear(1, 1, device=device)
    assert _device(backends, model).type == device


def test_a_model_elsewhere_takes_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    assert _device("cuda:nccl", nn.Linear(1, 1)) == torch.device("cuda:3")
    assert _device("cuda:nccl", nn.Identity()) == torch.device("cuda:3")


def test_no_collective_of_the_package_pickles() -> None:
    package = Path(bayes_kernels.__file__).parent
    source = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert len(source) > 100
    bad = [str(path) for path, text in source.items() if re.search(_PICKLES, text)]
    assert not bad


_PICKLES = r"(gather|scatter|broadcast|send|recv)_object"


if __name__ == "__main__":
    with joined() as number:
        _exchange(number)
