"""The accuracy rule: an op may err at most twice as much as same-dtype PyTorch, against fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse_than_torch(
    ours: Tensor,
    same_dtype: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    floor: float = 2.0,
    what: str = "",
) -> None:
    """Compare errors against the fp64 truth, by maximum and by Frobenius norm.

    The floors are `floor` times what rounding an exact result costs at most: a unit in the last place of
    the largest entry, and half of one in norm. They avoid 0 <= 2 * 0. Two, since the error of torch's
    products depends on the BLAS: MKL's on an Intel Xeon is below a unit by luck where that on an AMD
    EPYC is not. More where a rounding error in the middle is that of many entries.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    a, b, t = (v.detach().double().cpu() for v in (ours, same_dtype, truth))
    assert torch.isfinite(a).all(), f"{what}: not finite"
    scale = t.abs().max().item()
    eps = floor * torch.finfo(ours.dtype).eps
    error = (a - t).abs().max().item()
    allowed = factor * (b - t).abs().max().item() + eps * scale
    assert error <= allowed, (
        f"{what}: max error {error:.3g} > {allowed:.3g} (largest entry {scale:.3g})"
    )
    error = (a - t).norm().item()
    allowed = factor * (b - t).norm().item() + eps / 2 * t.norm().item()
    assert error <= allowed, f"{what}: Frobenius error {error:.3g} > {allowed:.3g}"


def assert_same_but_rounding(
    actual: Tensor, expected: Tensor, what: str = "", *, units: int = 256
) -> None:
    """Compare results that torch's own products decide, of two instances of one model.

    How they round depends on where operands lie in memory (with AVX2, on their address modulo 64), and
    two instances lie elsewhere. Bits are promised for our ops alone. Allowed are so many units in the
    last place of the largest entry: a few layers make some dozens of one, and training or a curvature
    between them some thousands.
    """
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, not {expected.shape}"
    a, b = actual.detach().double(), expected.detach().double()
    eps = max(torch.finfo(expected.dtype).eps, torch.finfo(torch.float32).eps)
    allowed = units * eps * b.abs().max().item()
    error = (a - b).abs().max().item()
    assert error <= allowed, f"{what}: differs by {error:.3g} > {allowed:.3g}"
