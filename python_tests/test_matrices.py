"""Stiefel matrices whose parts lie on two processes: every optimiser steps them as it steps whole ones."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import joined, together
from torch import Tensor, nn

from bayes_kernels import functional
from bayes_kernels.matrices import _orthonormaliser
from bayes_kernels.stiefel import StiefelAdamW, StiefelSGD, orthogonality, shard_placement

# Tall and wide; ranks that two processes cannot share evenly, the last with an empty part.
SHAPES = [(25, 4), (4, 18), (4, 18), (12, 3), (3, 20), (10, 1), (1, 6)]
OPTIMISERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw landing": (StiefelAdamW, {"method": "landing", "penalty": 1.0, "eps": 1e-6}),
    "adamw polar": (StiefelAdamW, {"method": "polar"}),
    "adamw qr": (StiefelAdamW, {"method": "qr"}),
    "adamw by element": (StiefelAdamW, {"method": "polar", "second_moment": "element"}),
    "sgd landing": (StiefelSGD, {"method": "landing"}),
    "sgd landing momentum": (StiefelSGD, {"method": "landing", "momentum": 0.9}),
    "sgd qr": (StiefelSGD, {"method": "qr"}),
    "sgd polar momentum": (StiefelSGD, {"method": "polar", "momentum": 0.9}),
}
PLACEMENTS = ("first", "long")  # FSDP2's own, and that of shard_placement
STEPS = 3


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Orthonormal factors, then a matrix and a vector that are free."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for shape in SHAPES:
        matrix = torch.empty(shape)
        nn.init.orthogonal_(matrix, generator=draw)
        found.append(nn.Parameter(matrix.to(dtype)))
    free = [torch.randn(shape, generator=draw) for shape in ((4, 4), (3,))]
    return [*found, *(nn.Parameter(value.to(dtype)) for value in free)]


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1 + step)
    return [torch.randn(p.shape, generator=draw).to(dtype) for p in parameters(dtype)]


def optimiser(name: str, given: list[Any]) -> Any:
    kind, options = OPTIMISERS[name]
    factors, free = given[: len(SHAPES)], given[len(SHAPES) :]
    groups = [{"params": factors, "stiefel": True}, {"params": free}]
    return kind(groups, lr=0.05, weight_decay=0.1, **options)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[operator]


def state_of(found: Any) -> list[Tensor]:
    """All state of an optimiser, in the order of its parameters."""
    order = [p for group in found.param_groups for p in group["params"]]
    return [whole(found.state[p][key]) for p in order for key in sorted(found.state[p])]


def largest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    assert len(found) == len(expected)
    assert all(
        a.dtype == b.dtype and a.shape == b.shape for a, b in zip(found, expected, strict=True)
    )
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a.numel()]
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0)


def _worker(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2,))
    report: dict[str, Any] = {}

    def shard(value: Tensor, where: str, like: Tensor | None = None) -> Any:
        placement = None if where == "first" else shard_placement(value if like is None else like)
        return distribute_tensor(value.detach(), mesh, [placement or Shard(0)])

    def run(name: str, where: str, dtype: torch.dtype, bad: bool = False) -> dict[str, Any]:
        expected = parameters(dtype)
        found: list[Any] = [nn.Parameter(shard(p, where, p)) for p in expected]
        theirs, ours = optimiser(name, expected), optimiser(name, found)
        counts: dict[str, int] = {}
        for step in range(STEPS):
            grads = gradients(step, dtype)
            if bad and step == 1:  # one number of the part of the second process
                grads[0][-1, 0] = math.nan
            for a, b, g in zip(expected, found, grads, strict=True):
                a.grad, b.grad = g, shard(g, where, a)
            theirs.step()
            if step == 2:
                with CommDebugMode() as seen:
                    ours.step()
                counts = {str(key): n for key, n in seen.get_comm_counts().items()}
            else:
                ours.step()
            if step == 0:  # through a checkpoint of its own
                saved = ours.state_dict()
                ours = optimiser(name, found)
                ours.load_state_dict(saved)
        defect = float(ours.orthogonality())
        error = largest([whole(p) for p in found], expected)
        state = largest(state_of(ours), state_of(theirs))
        cut = all(
            value.placements == p.placements
            for p in found
            for value in ours.state[p].values()
            if value.dim()
        )
        same_defect = abs(defect - float(orthogonality(expected[: len(SHAPES)])))
        ours.retract_()
        after = float(orthogonality(found[: len(SHAPES)]))
        return {
            "error": error,
            "state": state,
            "cut": cut,
            "defect": defect,
            "same defect": same_defect,
            "retracted": after,
            "counts": counts,
            "skipped": ours.skipped,
        }

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for where in PLACEMENTS:
            for name in OPTIMISERS:
                report[f"{name}, {where}"] = run(name, where, torch.float32)
            report[f"bfloat16, {where}"] = run("adamw polar", where, torch.bfloat16)
            report[f"float64, {where}"] = run("adamw qr", where, torch.float64)
            report[f"nan, {where}"] = run("adamw polar", where, torch.float32, bad=True)
    if torch.distributed.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("matrices")
    together("test_matrices", folder, timeout=240)
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("where", PLACEMENTS)
@pytest.mark.parametrize("name", [*OPTIMISERS, "float64", "nan"])
def test_steps_of_shards_are_those_of_whole_matrices(
    name: str, where: str, report: dict[str, Any]
) -> None:
    found = report[f"{name}, {where}"]
    # Factors have entries up to 1 and the state up to some 3.
    limit = 1e-9 if name == "float64" else 3e-6
    assert found["error"] < limit and found["state"] < 10 * limit
    assert found["same defect"] < 1e-5
    assert found["cut"]
    assert found["retracted"] < 3e-6
    assert found["skipped"] == (1 if name == "nan" else 0)
    if "landing" not in name:
        assert found["defect"] < 3e-6


@pytest.mark.parametrize("where", PLACEMENTS)
def test_half_precision_keeps_fp32_copies(where: str, report: dict[str, Any]) -> None:
    found = report[f"bfloat16, {where}"]
    assert found["state"] < 3e-5 and found["defect"] < 3e-6
    assert found["error"] <= 2**-8  # a rounding of numbers below 1 that falls to the other side


@pytest.mark.parametrize("name", OPTIMISERS)
def test_no_factor_is_gathered(name: str, report: dict[str, Any]) -> None:
    for where in PLACEMENTS:
        counts = report[f"{name}, {where}"]["counts"]
        kinds = {key.rpartition(".")[2] for key in counts}
        assert any("allreduce" in kind for kind in kinds)
        assert not any("gather" in kind or "broadcast" in kind for kind in kinds)
        assert any("alltoall" in kind for kind in kinds) == (where == "first")
        # By shapes, of which there are six, not by matrices; one says whether gradients are finite.
        assert sum(n for key, n in counts.items() if "allreduce" in key) <= 5 * 6 + 1


# --- r x r ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("retraction", ["polar", "qr"])
def test_factor_of_gram_matrices(retraction: str) -> None:
    draw = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 40, 5, generator=draw, dtype=torch.float64)
    stack[1] = stack[1] * torch.logspace(0, -4, 5)
    p, full = _orthonormaliser(stack.mT @ stack, retraction)
    assert full.all()
    for w, one in zip(stack, p, strict=True):
        expected = w.clone()
        retract = functional.polar_retract_ if retraction == "polar" else functional.qr_retract_
        retract(expected)
        torch.testing.assert_close(w @ one, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("retraction", ["polar", "qr"])
def test_matrices_that_have_no_factor_are_told(retraction: str) -> None:
    good = torch.eye(3, dtype=torch.float64)
    grams = torch.stack([good, good.clone(), good.clone(), torch.zeros_like(good)])
    grams[1, 2, 2] = math.nan
    grams[2, 0, 1] = grams[2, 1, 0] = 1.0
    p, full = _orthonormaliser(grams, retraction)
    assert full.flatten().tolist() == [True, False, False, False]
    assert torch.isfinite(p).all()
    torch.testing.assert_close(p[0], good)


def test_other_ways_to_cut_are_refused() -> None:
    import torch.testing._internal.distributed.fake_pg  # the process group "fake"

    torch.distributed.init_process_group(
        "fake", store=torch.distributed.HashStore(), rank=0, world_size=4
    )
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2, 2))
        refused: list[list[Any]] = [[Shard(0), Shard(1)], [Shard(0), Shard(0)]]
        for places in refused:
            matrix = nn.Parameter(distribute_tensor(torch.eye(8, 4), mesh, places))
            with pytest.raises(TypeError, match="cut along one dimension of a mesh by FSDP2, got"):
                StiefelAdamW([{"params": [matrix], "stiefel": True}])
        fine: list[list[Any]] = [[Replicate(), Shard(0)], [Replicate(), Replicate()]]
        for places in fine:
            matrix = nn.Parameter(distribute_tensor(torch.eye(8, 4), mesh, places))
            optimizer = StiefelAdamW([{"params": [matrix], "stiefel": True}])
            assert optimizer.param_groups[0]["params"][0] is matrix
        assert shard_placement(nn.Parameter(torch.ones(2, 8))) == Shard(1)
        assert shard_placement(nn.Parameter(torch.ones(2, 6))) is None  # of four processes
        assert shard_placement(nn.Parameter(torch.ones(8, 2))) is None
        assert shard_placement(torch.ones(2, 8)) is None
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with joined():
        _worker(Path(sys.argv[1]))
