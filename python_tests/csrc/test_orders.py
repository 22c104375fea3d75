"""Kernels whose blocks or warps share memory or end a sum: the same bits in any order of threads and blocks.

The emulator runs threads in one order from barrier to barrier. A missing barrier, a region of shared memory
that two warps take, or a sum in the order in which blocks come, shows as other bits in another order.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bayes_kernels import _library, random
from bayes_kernels import functional as F


def results() -> Iterator[tuple[str, list[Tensor]]]:
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    key = random.key(3)
    for rows, classes, samples in ((3, 5, 1000), (1, 32, 300), (1, 2, 5000), (1, 70, 120)):
        for spread in (1.0, 100.0):
            mean, cov = normal(rows, classes), spread * normal(rows, classes).square()
            p = F.mc_predict(mean, cov, n_samples=samples, key=key, return_standard_error=True)
            yield f"mc_predict {rows, classes, samples, spread}", [*p]
    mean, cov = normal(1, 9), (torch.eye(9) + 0.2).expand(1, 9, 9).contiguous()
    yield "mc_predict full", [*F.mc_predict(mean, cov, n_samples=600, key=key)]
    means = [normal(3, 2800), normal(5000), normal(7)]
    rhos = [normal(*m.shape).abs() + 0.1 for m in means]
    yield "gaussian_kl", [_library.ops.gaussian_kl(means, rhos, [0.2], "square", "elbo")]
    for d, k, b in ((130, 10, 4), (1100, 12, 4), (64, 20, 12), (60, 17, 20)):
        factors = [normal(d, k) for _ in range(2)]
        F.low_rank_update_(factors, [normal(b, d) for _ in range(2)])
        yield f"low_rank_update_ {d, k, b}", factors
    for r in (3, 17):
        hard = [normal(600, r) @ torch.diag(torch.logspace(0, -5, r)) @ normal(r, r)]
        F.polar_retract_(hard)
        yield f"polar_retract_ {r}", hard


def main() -> None:
    with _library.simulator():
        for name, tensors in results():
            data = b"".join(t.contiguous().numpy().tobytes() for t in tensors if t is not None)
            print(name, hashlib.sha256(data).hexdigest()[:16])


def test_same_bits_in_any_order_of_threads() -> None:
    if _library.load_simulator() is None:
        pytest.skip("the emulator library is not built")
    found = []
    for order, poison in (("forward", "0"), ("reverse", "255"), ("random", "7")):
        done = subprocess.run(
            [sys.executable, "-m", "csrc.test_orders"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
            env={
                **os.environ,
                "BAYES_KERNELS_SIM_ORDER": order,
                "BAYES_KERNELS_SIM_POISON": poison,
            },
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(done.stdout.splitlines())
    assert len(found[0]) > 10
    assert found[0] == found[1]
    assert found[0] == found[2]


if __name__ == "__main__":
    if _library.load_simulator() is None:
        sys.exit("the emulator is not built; build with BAYES_KERNELS_TESTS=ON")
    main()
