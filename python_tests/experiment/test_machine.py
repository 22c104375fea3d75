"""Peak memory."""

from __future__ import annotations

import pytest
import torch

from bayes_kernels.experiment import machine

# Commands choose the GPU where there is one; what they find is compared with the CPU.
pytestmark = pytest.mark.cpu_only


def test_peak_memory_is_that_of_the_phase() -> None:
    if machine.memory_measure() != "resident, reset":
        pytest.skip("the high-water mark cannot be reset here")
    with machine.peak_memory() as before:
        pass
    with machine.peak_memory() as during:
        torch.ones(64, 2**20)  # 256 MiB
    with machine.peak_memory() as after:
        pass
    assert during.mib > before.mib + 240
    assert after.mib < during.mib - 200
